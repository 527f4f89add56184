"""Estimated run time of a program on a TPU, from the compiler's cycles and the exchanged bytes.

No TPU has run anything here, and nothing is calibrated.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax

from fluxvit_jax.preflight.compiler.collectives import Collective
from fluxvit_jax.preflight.compiler.topology import Topology, ring
from fluxvit_jax.preflight.compiler.work import Work

HOP = 1e-6  # seconds from a chip to its neighbor, about
METHOD = (
    "Times are estimates: the compiler's cycles of all instructions with the trips of their loops "
    "and, of Pallas kernels and sorts, the bundles that they issue or what their matrix units "
    "take, over the clock; plus the bytes of exchanges over the links of the torus, as far as no "
    "work runs between their start and their end. Nothing is calibrated on a device."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Seconds of a run: computing, in kernels (part of computing), exchanging without computing."""

    computing: float
    kernels: float
    exchanging: float

    @property
    def seconds(self) -> float:
        return self.computing + self.exchanging


def estimate(work: Work, topology: Topology, devices: Sequence[jax.Device]) -> Estimate:
    """devices: in the order of the program's mesh. Raises ValueError for other than TPUs."""
    if topology.chip is None:
        raise ValueError(f"{topology.name}: its compiler tells no cycles")
    clock = topology.chip.clock
    return Estimate(
        computing=(work.cycles + work.kernel_cycles) / clock,
        kernels=work.kernel_cycles / clock,
        exchanging=sum(
            exchange.times
            * max(0.0, exchange_seconds(exchange, topology, devices) - exchange.covered / clock)
            for exchange in work.collectives
        ),
    )


def exchange_seconds(
    exchange: Collective, topology: Topology, devices: Sequence[jax.Device]
) -> float:
    """One exchange alone, by the links of a device to the other devices of the group.

    Along each axis of the torus that the group spans, data goes both ways around where the axis
    closes to a ring, else one way. An all-reduce of S bytes among n sends 2 S (n - 1) / n, each of
    the others half of that; with all-to-all, data passes a quarter of a ring or a third of a line
    on its way. The hops are a lower bound.
    """
    n, link = len(exchange.group), topology.known_chip.link
    extents = _extents([devices[number] for number in exchange.group])
    if n < 2 or not extents:
        return 0.0
    rings = [ring(topology, extent) for extent in extents]
    hops = sum(
        extent // 2 if closed else extent - 1 for extent, closed in zip(extents, rings, strict=True)
    )
    if exchange.kind == "collective-permute":
        return max(exchange.bytes / link, hops * HOP)
    sent = exchange.bytes * (n - 1) / n
    if exchange.kind == "all-reduce":
        sent, hops = 2 * sent, 2 * hops
    elif exchange.kind == "all-to-all":
        sent *= max(1.0, extents[0] / (4 if rings[0] else 3))
    links = sum(2 if closed else 1 for closed in rings)
    return max(sent / (links * link), hops * HOP)


def _extents(group: Sequence[jax.Device]) -> list[int]:
    """Numbers of chips along the axes of the torus that the group spans, largest first."""
    coordinates = zip(*(device.coords for device in group), strict=True)
    extents = [len(set(axis)) for axis in coordinates]
    return sorted((extent for extent in extents if extent > 1), reverse=True)
