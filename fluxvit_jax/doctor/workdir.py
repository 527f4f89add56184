"""Checks of the storage that a workdir is on: room, clock, lock and whole writes."""

import multiprocessing
import shutil
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

from etils import epath

from fluxvit_jax.checkpoints.workdir_lock import WorkdirLock
from fluxvit_jax.data import durable_files
from fluxvit_jax.distributed import atomic, storage
from fluxvit_jax.doctor.outcome import FailedError, NotHereError, Place
from fluxvit_jax.errors import UserError

LEAST_FREE_GB = 5  # of a few checkpoints of S, half a gigabyte each
CLOCK_SECONDS = 10.0
WRITE_SECONDS = 1.0
DURABLE_WRITES = 20
KILOBYTES = 256


def _made(place: Place) -> epath.Path:
    folder = storage.path_of(place.folder)
    storage.make_folder(folder)
    return folder


def space(place: Place) -> str:
    """Whether there is room for checkpoints."""
    if storage.is_remote(place.folder):
        raise NotHereError("a bucket has no limit of its own")
    free = shutil.disk_usage(_made(place)).free / 1e9
    detail = f"{free:.0f} GB free; a checkpoint takes 0.5 GB (S), 1.7 (B), 5.3 (L)"
    if free < LEAST_FREE_GB:
        raise FailedError(detail, "make room, or name another --workdir")
    return detail


def clock(place: Place) -> str:
    """Whether the storage dates files as this machine does."""
    path = _made(place) / "now"
    before = time.time()
    with storage.errors(path):
        atomic.write(path, "now")
        written = path.stat().mtime
    after = time.time()
    off = max(0.0, before - 1 - written, written - after)  # whole seconds
    detail = f"files are dated {off:.0f} s off this machine's clock"
    if off > CLOCK_SECONDS:
        raise FailedError(detail, "set both clocks by NTP: lists of files by date mislead")
    return detail


def lock(place: Place) -> str:
    """Whether the lock of a workdir keeps a second process out."""
    folder = _made(place) / "locked"
    with WorkdirLock(folder):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            said = pool.submit(_refusal, str(folder)).result()
        if "is in use by" not in said:
            raise FailedError(
                f"a second process took the folder {said}".strip(),
                "do not start two runs in one workdir there",
            )
    return "a second process is refused, and the lock let go"


def _refusal(folder: str) -> str:
    try:
        with WorkdirLock(epath.Path(folder)):
            return ""
    except UserError as error:
        return str(error)


def writes(place: Place) -> str:
    """Whether who reads a file that is written again and again finds it whole each time."""
    path = _made(place) / "written"
    contents = [bytes([letter]) * (KILOBYTES << 10) for letter in b"ab"]
    atomic.write(path, contents[0])
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(_write_for_a_while, path, contents)
        reads = torn = 0
        while not writing.done():
            torn += storage.read_bytes(path) not in contents
            reads += 1
        number = writing.result()
    if torn:
        raise FailedError(
            f"{torn} of {reads} reads found half a file",
            "use storage that renames at once; network file systems may have an option for it",
        )
    told = f"{reads} reads during {number} writes, all whole"
    if storage.is_remote(path):
        return told
    return f"{told}; {_durable_milliseconds(path):.1f} ms until one is on the disk"


def _write_for_a_while(path: epath.Path, contents: Sequence[bytes]) -> int:
    """Writes the contents in turn for `WRITE_SECONDS`; returns how often."""
    end, number = time.monotonic() + WRITE_SECONDS, 0
    while time.monotonic() < end:
        atomic.write(path, contents[number % len(contents)])
        number += 1
    return number


def _durable_milliseconds(path: epath.Path) -> float:
    """The median time until a small file is on the disk."""
    times = []
    for number in range(DURABLE_WRITES):
        begin = time.perf_counter()
        durable_files.write(path, str(number))
        times.append(time.perf_counter() - begin)
    return 1000 * statistics.median(times)
