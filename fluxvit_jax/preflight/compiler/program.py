"""Compiling a program for devices that need not be there, and reading the result."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import jax

from fluxvit_jax.preflight.compiler import bundles, hlo, memory
from fluxvit_jax.preflight.compiler.bundles import Count
from fluxvit_jax.preflight.compiler.chips import Chip
from fluxvit_jax.preflight.compiler.estimate import Estimate, estimate
from fluxvit_jax.preflight.compiler.memory import Memory, Shortage
from fluxvit_jax.preflight.compiler.topology import Topology
from fluxvit_jax.preflight.compiler.work import Work, is_kernel, takes_time, work_of

LONGEST_FAILURE = 300  # characters of a compiler's message that are passed on


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """Results of compiling a program, for one of its devices.

    seconds, cpu_seconds: of compiling, wall-clock time and CPU time of all cores.
    available: bytes of memory; None where that is not known.
    failure: the compiler's message in one line, if it cannot compile the program; else "".
    shortage: of memory, where the program does not fit.
    memory, work: None without a compiled program.
    time: an estimate, for TPUs by name only.
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
    compiled, message = None, ""
    with _no_cache():
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            message = str(error)
    program = Program(
        seconds=time.perf_counter() - wall,
        cpu_seconds=time.process_time() - cpu,
        available=limit,
    )
    if compiled is None:
        shortage = memory.shortage(message)
        return replace(program, shortage=shortage, failure="" if shortage else _one_line(message))
    used = memory.memory_of(compiled)
    if limit is not None and used.used > limit:
        return replace(program, shortage=Shortage(used.used, limit), memory=used)
    module = hlo.parse(compiled.as_text() or "")
    if topology.chip is None:
        return replace(program, memory=used, work=work_of(module, len(devices)))
    kernels = _kernel_cycles(module, topology.chip)
    bundles.clear()
    work = work_of(module, len(devices), kernels)
    return replace(program, memory=used, work=work, time=estimate(work, topology, devices))


def _kernel_cycles(module: hlo.Module, chip: Chip) -> dict[str, Count]:
    """Cycles of kernels, and of other instructions without an estimate in the program."""
    untimed = [
        step.instruction
        for step in hlo.executed(module)
        if not step.fused and step.instruction.cycles is None
        if is_kernel(step.instruction) or takes_time(step.instruction)
    ]
    written = bundles.read({one.name for one in untimed}, chip.rows)
    # The compiler writes identical instructions once.
    twins = {_identity(one): written[one.name] for one in untimed if one.name in written}
    counts = {one.name: written.get(one.name, twins.get(_identity(one))) for one in untimed}
    return {name: count for name, count in counts.items() if count is not None}


def _identity(instruction: hlo.Instruction) -> str:
    """Key of instructions that are identical to the compiler: a kernel's code, or a type."""
    code = instruction.attribute(r'"body":"([^"]*)"')
    return code or f"{instruction.opcode} {instruction.result}"


def _one_line(message: str) -> str:
    """The beginning of a compiler's message, which may be pages long."""
    text = " ".join(message.split())
    return text if len(text) <= LONGEST_FAILURE else text[:LONGEST_FAILURE] + " ..."


@contextlib.contextmanager
def _no_cache() -> Iterator[None]:
    before = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
