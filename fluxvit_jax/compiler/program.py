"""Compiling a program for devices that need not be there, and reading what comes out."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax

from fluxvit_jax.compiler import bundles, hlo, memory
from fluxvit_jax.compiler.bundles import Count
from fluxvit_jax.compiler.chips import Chip
from fluxvit_jax.compiler.estimate import Estimate, estimate
from fluxvit_jax.compiler.memory import Memory, Shortage
from fluxvit_jax.compiler.topology import Topology
from fluxvit_jax.compiler.work import Work, is_kernel, takes_time, work_of

LONGEST_FAILURE = 300  # characters of what a compiler says that are passed on


class Program(NamedTuple):
    """What is known of a program after its compiler ran, on one of its devices.

    seconds, cpu_seconds: of compiling, on the wall and of all cores.
    available: bytes of memory that there are; None where that is not known.
    failure: what the compiler says, one line, if it cannot compile the program; "" otherwise.
    shortage: how much is missing, where it does not fit.
    memory, work: None without a compiled program.
    time: an estimate; None but for TPUs by name.
    """

    seconds: float
    cpu_seconds: float
    available: int | None
    failure: str = ""
    shortage: Shortage | None = None
    memory: Memory | None = None
    work: Work | None = None
    time: Estimate | None = None

    @property
    def fits(self) -> bool:
        return not self.failure and self.shortage is None


def compile_for(
    lowered: jax.stages.Lowered, topology: Topology, devices: Sequence[jax.Device]
) -> Program:
    """Compiles anew, whatever JAX's cache of compiled programs holds.

    devices: of the program's mesh, in its order.
    """
    if topology.chip:
        bundles.clear()
    limit = round(topology.chip.memory) if topology.chip else memory.available(devices[0])
    wall, cpu = time.perf_counter(), time.process_time()
    message = None
    with _no_cache():
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            message = str(error)
    spent = time.perf_counter() - wall, time.process_time() - cpu
    if message is not None:
        short = memory.shortage(message)
        return Program(*spent, limit, "" if short else _one_line(message), short)
    used = memory.memory_of(compiled)
    if limit is not None and used.used > limit:
        return Program(*spent, limit, shortage=Shortage(used.used, limit), memory=used)
    module = hlo.parse(compiled.as_text())
    kernels = {}
    if topology.chip:
        kernels = _kernel_cycles(module, topology.chip)
        bundles.clear()
    work = work_of(module, len(devices), kernels)
    return Program(
        *spent,
        limit,
        memory=used,
        work=work,
        time=estimate(work, topology, devices) if topology.chip else None,
    )


def _kernel_cycles(module: hlo.Module, chip: Chip) -> dict[str, Count]:
    """Cycles of kernels, and of other instructions for which the program has no estimate."""
    wanted = [
        step.instruction
        for step in hlo.executed(module)
        if not step.fused and step.instruction.cycles is None
        if is_kernel(step.instruction) or takes_time(step.instruction)
    ]
    written = bundles.read({one.name for one in wanted}, chip.rows)
    equals = {_identity(one): written[one.name] for one in wanted if one.name in written}
    found = {one.name: written.get(one.name, equals.get(_identity(one))) for one in wanted}
    return {name: count for name, count in found.items() if count is not None}


def _identity(one: hlo.Instruction) -> str:
    """What instructions share that the compiler takes for one: a kernel's code, or a type."""
    return one.attribute(r'"body":"([^"]*)"') or f"{one.opcode} {one.result}"


def _one_line(message: str) -> str:
    """The beginning of what a compiler says, which may be pages."""
    text = " ".join(message.split())
    return text if len(text) <= LONGEST_FAILURE else text[:LONGEST_FAILURE] + " ..."


@contextlib.contextmanager
def _no_cache() -> Iterator[None]:
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
