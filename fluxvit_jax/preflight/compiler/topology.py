"""Devices to compile for, by name: "v5e:4x4", "cpu:8", "current", or several with commas between.

TPUs need not be there: libtpu alone describes and compiles for them. Call `open_devices` before
anything else makes JAX look for devices, since its settings cannot be changed later.
"""

import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import topologies

from fluxvit_jax.errors import UserError
from fluxvit_jax.preflight.compiler import bundles
from fluxvit_jax.preflight.compiler.chips import CHIPS, Chip

CURRENT = "current"
CPU = "cpu"
HOST = (2, 2, 1)  # chips of a host, as they lie in the torus
KNOWN = ", ".join(f"{name}:AxB{'xC' * (chip.axes - 2)}" for name, chip in CHIPS.items())
KNOWN += f", {CPU}:N, {CURRENT}"


@dataclass(frozen=True, slots=True)
class Topology:
    """Named devices to compile for.

    family: a key of `CHIPS`, "cpu" or "current"; shape: chips along each axis of a TPU's torus, or
    the number of CPU devices; () for "current".
    """

    name: str
    family: str
    shape: tuple[int, ...]

    @property
    def chip(self) -> Chip | None:
        """Specification of the chip; None unless this is a TPU by name."""
        return CHIPS.get(self.family)

    @property
    def known_chip(self) -> Chip:
        """Specification of a TPU's chip. Raises KeyError unless this is a TPU by name."""
        return CHIPS[self.family]


def parse(text: str) -> list[Topology]:
    """The topologies in `text`, each once. Raises UserError for unknown ones."""
    names = [name.strip() for name in text.split(",")]
    return [_parse_one(name) for name in dict.fromkeys(filter(None, names))] or [_parse_one("")]


def _parse_one(name: str) -> Topology:
    if name == CURRENT:
        return Topology(name, CURRENT, ())
    family, _, size = name.partition(":")
    if family == CPU and re.fullmatch(r"[1-9]\d{0,3}", size):
        return Topology(name, CPU, (int(size),))
    chip = CHIPS.get(family)
    if chip is None or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)+", size):
        raise UserError(f"topology {name!r} is none of those known: {KNOWN}")
    shape = tuple(map(int, size.split("x")))
    if len(shape) > chip.axes:
        raise UserError(f"topology {name!r}: chips of {family} form a torus of {chip.axes} axes")
    return Topology(name, family, shape)


def open_devices(requested: Sequence[Topology]) -> list[list[jax.Device]]:
    """The devices of each topology, in JAX's order. Those of a TPU by name cannot run anything.

    Raises UserError: libtpu is missing; the CPU's back end has started with fewer devices; a slice
    of a TPU that does not exist.
    """
    if all(topology.family != CURRENT for topology in requested):
        jax.config.update("jax_platforms", CPU)  # the machine's accelerators stay free
        os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # and libtpu does not look for a TPU
    if os.environ.get("TPU_SKIP_MDS_QUERY") == "1":
        # libtpu warns where it cannot query the type of the TPU; the value does not matter.
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
    if any(topology.chip for topology in requested):
        _prepare_libtpu()
    default_cpus = _default_cpus()
    if counts := [topology.shape[0] for topology in requested if topology.family == CPU]:
        _prepare_cpus(max(counts))
    return [_devices(topology, default_cpus) for topology in requested]


def _prepare_libtpu() -> None:
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "TPU topologies need the TPU compiler, which compiles without a TPU: "
            f"pip install '{_libtpu_requirement()}'"
        )
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # other processes may hold its lock
    bundles.request_dumps()


def _libtpu_requirement() -> str:
    """The requirement that this JAX states, such as "libtpu==0.0.42.*"."""
    for requirement in importlib.metadata.requires("jax") or ():
        if match := re.match(r"libtpu\S*(?=\s*;)", requirement):
            return match[0]
    return "libtpu"


def _prepare_cpus(count: int) -> None:
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError as error:  # the back end has started
        if len(jax.devices(CPU)) < count:
            raise UserError(
                f"topology cpu:{count}: JAX has started with {len(jax.devices(CPU))} CPU devices "
                f"already; start the program with XLA_FLAGS="
                f"--xla_force_host_platform_device_count={count}"
            ) from error


def _default_cpus() -> int:
    """Number of CPU devices before `_prepare_cpus` asks for more."""
    flag = re.search(r"host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    return max(jax.config.values["jax_num_cpu_devices"], int(flag[1]) if flag else 1)


def _devices(topology: Topology, default_cpus: int) -> list[jax.Device]:
    if topology.family == CURRENT:
        devices = jax.devices()
        return devices[:default_cpus] if devices[0].platform == CPU else devices
    if topology.family == CPU:
        return jax.devices(CPU)[: topology.shape[0]]
    shape = topology.shape + (1,) * (3 - len(topology.shape))
    chip = topology.known_chip
    options: dict[str, Any] = {"chips_per_host_bounds": tuple(map(min, shape, HOST))}
    if chip.megacore:
        options["chip_config_name"] = "megacore"
    full_name = f"{topology.family}:{'x'.join(map(str, shape))}"
    try:
        return list(topologies.get_topology_desc(full_name, "tpu", **options).devices)
    except jax.errors.JaxRuntimeError as error:
        raise UserError(
            f"topology {topology.name!r}: the compiler knows no such slice; sides are 1 or even, "
            f"such as {topology.family}:{'x'.join(map(str, HOST[: chip.axes]))}"
        ) from error


def hosts(devices: Sequence[jax.Device]) -> int:
    """Number of machines that the devices belong to."""
    return len({device.process_index for device in devices})


def ring(topology: Topology, extent: int) -> bool:
    """Whether an axis of `extent` chips of a TPU's topology closes to a ring."""
    chip = topology.known_chip
    if chip.axes == 2:
        return extent == chip.ring
    return len(topology.shape) == 3 and all(side % chip.ring == 0 for side in topology.shape)
