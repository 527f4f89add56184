"""Cycles of Pallas kernels on TPU, from the instruction bundles that the compiler writes.

A TPU core issues one bundle of instructions per cycle, so a kernel takes at least as many cycles as
it issues bundles, and at least as many as its matrix units need for the rows they are given. libtpu
can write each kernel's bundles, and marks its loops. For each loop we take max(bundles, matrix-unit
cycles) x trip count, including the steps of the Pallas grid. All branches count as taken. Memory
stalls are not modeled. A loop without a constant trip count counts once, and the kernel is reported
as not completely known. The same holds for the few instructions without an estimate of the
compiler's own, such as sorts.

The text of a bundle, "0x29 LB: >> { ... }", has its number, whether a loop's body begins, and one
">" for each loop around it.
"""

import atexit
import collections
import functools
import os
import re
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

PREFIX = "fluxvit-bundles-"
SUFFIX = "-final_bundles.txt"
# A loop over a grid is a pipeline: it fetches one step ahead and stores one step behind.
PIPELINE_STEPS = 2

_BUNDLE = re.compile(r"^\s*(?:0x[0-9a-f]+|0)\s+(LB|LH|LE|PB|PF|CT)?\s*:\s*(>*)\s*\{(.*)")
_EXIT = re.compile(r"scmp\.\w+(?:\.\w+)* (?:\(\S+\), )?(%\w+), (\d+) /\* loop exit test \*/")
_PRODUCT = re.compile(r"= vmatmul\.[\w.]*?(f32|bf16|s8)[\w.]*\.mxu(\d)")
ROWS = {"f32": 8, "bf16": 16, "s8": 32}  # of 128 numbers, fed to a matrix unit per instruction
_PIPELINE = "/* phi copy :: iteration index, stage = 0"


@functools.cache
def folder() -> Path:
    """The folder that this process has the compiler write to; removed at its end.

    Folders of killed processes are removed here: they may hold hundreds of megabytes.
    """
    for leftover in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        owner = leftover.name.removeprefix(PREFIX).partition("-")[0]
        if owner.isdecimal() and not _is_running(int(owner)):
            shutil.rmtree(leftover, ignore_errors=True)
    path = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)  # sends nothing
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        pass
    return True


def request_dumps() -> None:
    """Makes libtpu write bundles. It reads the variable once, when it is loaded."""
    options = os.environ.get("LIBTPU_INIT_ARGS", "")
    if "--xla_jf_dump_to=" not in options:
        options += (
            f" --xla_jf_dump_to={folder()}"
            " --xla_jf_dump_llo_text=true"
            " --xla_jf_dump_llo_pass_label_regex=^final_bundles"
            " --xla_jf_dump_category_filter=codegen"
        )
        os.environ["LIBTPU_INIT_ARGS"] = options.strip()


def clear() -> None:
    """Removes the written files."""
    for file in folder().iterdir():
        file.unlink()


@dataclass(frozen=True, slots=True)
class Count:
    """Cycles of one run. complete: False if it has loops with an unknown trip count."""

    cycles: int
    complete: bool


def read(names: Iterable[str], rows_a_cycle: int) -> dict[str, Count]:
    """Cycles of the instructions among `names` that were written, by name.

    The compiler writes identical instructions once, under one of their names. rows_a_cycle: of a
    matrix unit.
    """
    files: dict[str, Path] = {}
    for file in folder().glob(f"*{SUFFIX}"):
        # "1795634224690787366-splash_mha_fwd.1-01-final_bundles.txt"
        _, _, rest = file.name.removesuffix(SUFFIX).partition("-")
        files[rest.rpartition("-")[0]] = file
    return {name: count(files[name].read_text(), rows_a_cycle) for name in names if name in files}


class _Loop:
    """A loop while its bundles are read. `begin`: the text of its first bundle."""

    def __init__(self, begin: str = ""):
        self.begin = begin
        self.bundles = 0  # outside of inner loops
        self.rows: collections.Counter[str] = collections.Counter()  # by matrix unit, likewise
        self.inner: list[_Loop] = []
        self.exit: tuple[str, int] | None = None  # the counter and the bound of its exit test

    def count(self, text: str, rows_a_cycle: int) -> Count:
        inner = [loop.count(text, rows_a_cycle) for loop in self.inner]
        trips = self._trips(text)
        cycles = max(self.bundles, max(self.rows.values(), default=0) // rows_a_cycle)
        cycles += sum(loop.cycles for loop in inner)
        complete = trips is not None and all(loop.complete for loop in inner)
        return Count((1 if trips is None else trips) * cycles, complete)

    def _trips(self, text: str) -> int | None:
        if self.exit is None:
            return None
        counter, bound = self.exit
        if _PIPELINE in self.begin:
            return max(bound - PIPELINE_STEPS, 1)
        return max(bound - _start(text, self.begin, counter), 1)


def count(text: str, rows_a_cycle: int) -> Count:
    """Cycles of a run of a kernel, from the text of its bundles."""
    program = _Loop()
    program.exit = "", 1
    stack = [program]
    for line in text.splitlines():
        match = _BUNDLE.match(line)
        if match is None:
            continue  # comments may span lines
        label, depth, content = match[1], len(match[2]), match[3]
        if label == "LB" and depth > 0:
            del stack[depth:]
            stack[-1].inner.append(_Loop(content))
            stack.append(stack[-1].inner[-1])
        while len(stack) <= depth:  # a loop continues after bundles with fewer marks
            stack.append(stack[-1].inner[-1])
        stack[depth].bundles += 1
        for dtype, unit in _PRODUCT.findall(content):
            stack[depth].rows[unit] += ROWS[dtype]
        for counter, bound in _EXIT.findall(content):
            # The test may be in a bundle of the outer loop: the counter identifies its loop.
            loop = next((loop for loop in reversed(stack) if counter in loop.begin), stack[depth])
            loop.exit = counter, int(bound)
    return program.count(text, rows_a_cycle)


def _start(text: str, begin: str, counter: str) -> int:
    """Initial value of a loop's counter: 0, the usual one, where it is unknown."""
    first = re.search(rf"= sphi (%\w+), {counter}\b", begin)
    value = re.search(rf"{first[1]} = smov (\d+)\b", text) if first else None
    return int(value[1]) if value else 0
