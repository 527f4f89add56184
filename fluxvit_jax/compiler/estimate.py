"""How long a program takes on a TPU, put together from what its compiler says.

An estimate: no TPU has run anything here, and nothing is calibrated.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax

from fluxvit_jax.compiler.collectives import Collective
from fluxvit_jax.compiler.topology import Topology, ring
from fluxvit_jax.compiler.work import Work

HOP = 1e-6  # seconds from a chip to its neighbour, about
METHOD = (
    "Times are estimates: the compiler's cycles of all instructions with the trips of their loops "
    "and, of Pallas kernels and sorts, the bundles that they issue or what their matrix units "
    "take, over the clock; plus the bytes of exchanges over the links of the torus, as far as no "
    "work runs between their start and their end. Nothing is calibrated on a device."
)


class Estimate(NamedTuple):
    """Seconds of a run: computing, in kernels (a part of that), exchanging without computing."""

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
            one.times * max(0.0, exchange_seconds(one, topology, devices) - one.covered / clock)
            for one in work.collectives
        ),
    )


def exchange_seconds(one: Collective, topology: Topology, devices: Sequence[jax.Device]) -> float:
    """One exchange alone, by the links that a device of the group has to the others.

    Along each axis of the torus that the group is spread over, data goes both ways round where the
    axis closes to a ring, else one way. An all-reduce of S bytes among n sends 2 S (n - 1) / n,
    each of the others half of that; with all-to-all, data passes a quarter of a ring or a third of
    a line on its way. At the least it takes as long as the hops.
    """
    n, link = len(one.group), topology.chip.link
    extents = _extents([devices[number] for number in one.group])
    if n < 2 or not extents:
        return 0.0
    rings = [ring(topology, extent) for extent in extents]
    hops = sum(extent // 2 if closed else extent - 1 for extent, closed in _zip(extents, rings))
    if one.kind == "collective-permute":
        return max(one.bytes / link, hops * HOP)
    sent = one.bytes * (n - 1) / n
    if one.kind == "all-reduce":
        sent, hops = 2 * sent, 2 * hops
    elif one.kind == "all-to-all":
        sent *= max(1.0, extents[0] / (4 if rings[0] else 3))
    links = sum(2 if closed else 1 for closed in rings)
    return max(sent / (links * link), hops * HOP)


def _zip(extents: Sequence[int], rings: Sequence[bool]):
    return zip(extents, rings, strict=True)


def _extents(group: Sequence[jax.Device]) -> list[int]:
    """How many chips a group lies on along each axis of the torus where they are several."""
    along = zip(*(device.coords for device in group), strict=True)
    return sorted((n for n in (len(set(places)) for places in along) if n > 1), reverse=True)
