"""Cycles of Pallas kernels on TPU, from the instruction bundles that the compiler writes.

A TPU core issues one bundle of instructions a cycle, so a kernel takes at least as many cycles as
it issues bundles, and at least as many as its matrix units need for the rows that are given to
them. libtpu can write each kernel's bundles, and marks its loops. Counted is the larger of the two
for each loop, times its trips, the steps of the grid among them, as if every branch were taken;
what the core waits for memory is not seen. Where trips are not constant they count as one, and that
is told. The same goes for the few instructions of a program for
which the compiler makes no estimate of its own, such as sorting.

The text of a bundle, "0x29 LB: >> { ... }", has its number, whether a loop's body begins, and as
many ">" as there are loops around it.
"""

import atexit
import collections
import functools
import os
import re
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

PREFIX = "fluxvit-bundles-"
SUFFIX = "-final_bundles.txt"
# A loop over a grid is a pipeline: it fetches a step ahead and stores a step behind.
PIPELINE_STEPS = 2

_BUNDLE = re.compile(r"^\s*(?:0x[0-9a-f]+|0)\s+(LB|LH|LE|PB|PF|CT)?\s*:\s*(>*)\s*\{(.*)")
_EXIT = re.compile(r"scmp\.\w+(?:\.\w+)* (?:\(\S+\), )?(%\w+), (\d+) /\* loop exit test \*/")
_PRODUCT = re.compile(r"= vmatmul\.[\w.]*?(f32|bf16|s8)[\w.]*\.mxu(\d)")
ROWS = {"f32": 8, "bf16": 16, "s8": 32}  # of 128 numbers, that one instruction gives a matrix unit
_PIPELINE = "/* phi copy :: iteration index, stage = 0"


@functools.cache
def folder() -> Path:
    """Where this process has the compiler write; gone at its end.

    Those of processes that were killed are removed here: they may hold hundreds of megabytes.
    """
    for left in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        owner = left.name.removeprefix(PREFIX).partition("-")[0]
        if owner.isdecimal() and not _runs(int(owner)):
            shutil.rmtree(left, ignore_errors=True)
    path = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)  # sends nothing
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        pass
    return True


def request_dumps() -> None:
    """Makes libtpu write bundles. It reads this once, when it is loaded."""
    options = os.environ.get("LIBTPU_INIT_ARGS", "")
    if "--xla_jf_dump_to=" not in options:
        own = (
            f"--xla_jf_dump_to={folder()}",
            "--xla_jf_dump_llo_text=true",
            "--xla_jf_dump_llo_pass_label_regex=^final_bundles",
            "--xla_jf_dump_category_filter=codegen",
        )
        os.environ["LIBTPU_INIT_ARGS"] = " ".join([options, *own]).strip()


def clear() -> None:
    """Removes what has been written."""
    for file in folder().iterdir():
        file.unlink()


class Count(NamedTuple):
    """Cycles of one run. whole: False if loops count once whose trips are not constant."""

    cycles: int
    whole: bool


def read(names: Iterable[str], rows_a_cycle: int) -> dict[str, Count]:
    """The instructions called `names` that were written; of equal ones only one is, by its name.

    rows_a_cycle: of a matrix unit.
    """
    files = {}
    for file in folder().glob(f"*{SUFFIX}"):
        # "1795634224690787366-splash_mha_fwd.1-01-final_bundles.txt"
        _, _, rest = file.name.removesuffix(SUFFIX).partition("-")
        files[rest.rpartition("-")[0]] = file
    return {name: count(files[name].read_text(), rows_a_cycle) for name in names if name in files}


class _Loop:
    """A loop while its bundles are read. `begin`: what its first bundle does."""

    def __init__(self, begin: str = ""):
        self.begin = begin
        self.own = 0  # bundles outside of inner loops
        self.rows = collections.Counter()  # given to each matrix unit there
        self.inner: list[_Loop] = []
        self.exit: tuple[str, int] | None = None  # what is tested against which bound

    def count(self, text: str, rows_a_cycle: int) -> Count:
        inner = [loop.count(text, rows_a_cycle) for loop in self.inner]
        trips = self._trips(text)
        own = max(self.own, max(self.rows.values(), default=0) // rows_a_cycle)
        cycles = (1 if trips is None else trips) * (own + sum(one.cycles for one in inner))
        return Count(cycles, trips is not None and all(one.whole for one in inner))

    def _trips(self, text: str) -> int | None:
        if self.exit is None:
            return None
        counter, bound = self.exit
        if _PIPELINE in self.begin:
            return max(bound - PIPELINE_STEPS, 1)
        return max(bound - _start(text, self.begin, counter), 1)


def count(text: str, rows_a_cycle: int) -> Count:
    """Cycles of a run of a kernel, by what the compiler writes of it."""
    program = _Loop()
    program.exit = "", 1
    stack = [program]
    for line in text.splitlines():
        match = _BUNDLE.match(line)
        if match is None:
            continue  # comments may go on over lines
        label, depth, content = match[1], len(match[2]), match[3]
        if label == "LB" and depth > 0:
            del stack[depth:]
            stack[-1].inner.append(_Loop(content))
            stack.append(stack[-1].inner[-1])
        while len(stack) <= depth:  # a loop goes on after bundles that bear fewer marks
            stack.append(stack[-1].inner[-1])
        stack[depth].own += 1
        for dtype, unit in _PRODUCT.findall(content):
            stack[depth].rows[unit] += ROWS[dtype]
        for counter, bound in _EXIT.findall(content):
            # The test may stand in a bundle of the loop around: told by what it tests.
            loop = next((one for one in reversed(stack) if counter in one.begin), stack[depth])
            loop.exit = counter, int(bound)
    return program.count(text, rows_a_cycle)


def _start(text: str, begin: str, counter: str) -> int:
    """What a loop's counter starts at: 0, as is usual, where that cannot be seen."""
    first = re.search(rf"= sphi (%\w+), {counter}\b", begin)
    value = re.search(rf"{first[1]} = smov (\d+)\b", text) if first else None
    return int(value[1]) if value else 0
