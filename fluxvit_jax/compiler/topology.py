"""Devices to compile for, by name: "v5e:4x4", "cpu:8", "current", or several with commas between.

TPUs need not be there: libtpu alone describes and compiles for them. `open_devices` comes before
JAX is first asked for a device, since what it sets cannot be changed later.
"""

import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Sequence
from typing import NamedTuple

import jax
from jax.experimental import topologies

from fluxvit_jax.compiler import bundles
from fluxvit_jax.compiler.chips import CHIPS, Chip
from fluxvit_jax.errors import UserError

CURRENT = "current"
CPU = "cpu"
HOST = (2, 2, 1)  # chips of a host, as they lie in the torus
KNOWN = ", ".join(f"{name}:AxB{'xC' * (chip.axes - 2)}" for name, chip in CHIPS.items())
KNOWN += f", {CPU}:N, {CURRENT}"


class Topology(NamedTuple):
    """family: a key of `CHIPS`, "cpu" or "current"; shape: chips along each axis of a TPU's torus,
    or the number of CPU devices; () for what there is.
    """

    name: str
    family: str
    shape: tuple[int, ...]

    @property
    def chip(self) -> Chip | None:
        """What is known of the chip; None where it is no TPU by name."""
        return CHIPS.get(self.family)


def parse(text: str) -> list[Topology]:
    """The topologies that `text` names, each once. Raises UserError for those that are none."""
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


def open_devices(wanted: Sequence[Topology]) -> list[list[jax.Device]]:
    """The devices of each topology, in JAX's order. Those of a TPU by name cannot run anything.

    Raises UserError: libtpu is missing; the CPU's back end has started with fewer devices; a slice
    of a TPU that does not exist.
    """
    if all(topology.family != CURRENT for topology in wanted):
        jax.config.update("jax_platforms", CPU)  # the machine's accelerators stay free
        os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # and are not looked for, as where JAX finds none
    if os.environ.get("TPU_SKIP_MDS_QUERY") == "1":
        # No TPU is asked what it is. Without an answer libtpu warns; it does not use this one.
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
    if any(topology.chip for topology in wanted):
        _prepare_libtpu()
    own_cpus = _own_cpus()
    if counts := [topology.shape[0] for topology in wanted if topology.family == CPU]:
        _prepare_cpus(max(counts))
    return [_devices(topology, own_cpus) for topology in wanted]


def _prepare_libtpu() -> None:
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "TPU topologies need the TPU compiler, which compiles without a TPU: "
            f"pip install '{_wanted_libtpu()}'"
        )
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # other processes may hold its lock
    bundles.request_dumps()


def _wanted_libtpu() -> str:
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


def _own_cpus() -> int:
    """CPU devices that a program has unless it asks for more."""
    flag = re.search(r"host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    return max(jax.config.jax_num_cpu_devices, int(flag[1]) if flag else 1)


def _devices(topology: Topology, own_cpus: int) -> list[jax.Device]:
    if topology.family == CURRENT:
        found = jax.devices()
        return found[:own_cpus] if found[0].platform == CPU else found
    if topology.family == CPU:
        return jax.devices(CPU)[: topology.shape[0]]
    shape = topology.shape + (1,) * (3 - len(topology.shape))
    options = {"chips_per_host_bounds": tuple(map(min, shape, HOST))}
    if topology.chip.megacore:
        options["chip_config_name"] = "megacore"
    full_name = f"{topology.family}:{'x'.join(map(str, shape))}"
    try:
        return list(topologies.get_topology_desc(full_name, "tpu", **options).devices)
    except jax.errors.JaxRuntimeError as error:
        raise UserError(
            f"topology {topology.name!r}: the compiler knows no such slice; sides are 1 or even, "
            f"such as {topology.family}:{'x'.join(map(str, HOST[: topology.chip.axes]))}"
        ) from error


def hosts(wanted: Sequence[jax.Device]) -> int:
    """Machines that so many devices are spread over."""
    return len({device.process_index for device in wanted})


def ring(topology: Topology, extent: int) -> bool:
    """Whether an axis of so many chips closes to a ring."""
    chip = topology.chip
    if chip.axes == 2:
        return extent == chip.ring
    return len(topology.shape) == 3 and all(side % chip.ring == 0 for side in topology.shape)
