"""Checks of the storage that a workdir is on: room, clock, lock and whole writes."""

import itertools
import multiprocessing
import shutil
import statistics
import threading
import time
from concurrent.futures import ProcessPoolExecutor

from etils import epath

from fluxvit_jax.checkpoints.workdir_lock import WorkdirLock
from fluxvit_jax.data import durable_files
from fluxvit_jax.distributed import atomic, storage
from fluxvit_jax.doctor.outcome import FailedError, NotHereError, Place
from fluxvit_jax.errors import UserError

LEAST_FREE_GB = 5  # of a few checkpoints of S, half a gigabyte each
CLOCK_SECONDS = 10.0
WRITES = 20
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
    over = threading.Event()
    errors: list[Exception] = []
    writer = threading.Thread(target=_write_until, args=(over, path, contents, errors))
    writer.start()
    try:
        found = [storage.read_bytes(path) for _ in range(WRITES)]
    finally:
        over.set()
        writer.join()
    if errors:
        raise errors[0]
    if torn := sum(content not in contents for content in found):
        raise FailedError(
            f"{torn} of {WRITES} reads found half a file",
            "use storage that renames at once; network file systems may have an option for it",
        )
    if storage.is_remote(path):
        return f"{WRITES} reads during writes, all whole"
    return (
        f"{WRITES} reads during writes, all whole; {_durable_milliseconds(path):.1f} ms to be safe"
    )


def _write_until(
    over: threading.Event, path: epath.Path, contents: list[bytes], errors: list[Exception]
) -> None:
    try:
        for content in itertools.cycle(contents):
            if over.is_set():
                return
            atomic.write(path, content)
    except Exception as error:
        errors.append(error)


def _durable_milliseconds(path: epath.Path) -> float:
    """The median time until a small file is on the disk."""
    times = []
    for number in range(WRITES):
        begin = time.perf_counter()
        durable_files.write(path, str(number))
        times.append(time.perf_counter() - begin)
    return 1000 * statistics.median(times)
