"""What compiling leaves: programs, kept for the next process by JAX's persistent cache, and memory.

The compiler takes hundreds of megabytes for a program of S. They are free when it is done, but
malloc holds on to them, and a training step would come on top.
"""

import contextlib
import ctypes
import functools
import os
import platform
import sys
import zlib
from pathlib import Path

import jax
import jax.monitoring

VARIABLE = "JAX_COMPILATION_CACHE_DIR"
COMPILED = "/jax/core/compile/backend_compile_duration"  # JAX's event: a program was compiled
LONG = 1.0  # seconds of compiling, from which on it is worth looking for free memory
MOST_KEPT = 4 << 30  # bytes of programs in the user's folder; JAX itself would keep all for ever

_is_chosen = False  # whether `keep_programs` was called in this process


def keep_programs(folder: str | None) -> None:
    """Has JAX keep every program that takes a second to compile; call it before the first one.

    folder: None: what `JAX_COMPILATION_CACHE_DIR` names, or else a folder of the user's, which is
    said when it is made, and left alone if it cannot be written; "": no program is kept.
    """
    global _is_chosen
    _is_chosen = True
    _give_back_after_compiling()
    if folder is None:
        if VARIABLE in os.environ:
            return
        folder = _user_folder()
    jax.config.update("jax_compilation_cache_dir", folder or None)


def keep_programs_by_default() -> None:
    """`keep_programs(None)` for Python's own users, unless JAX or a command was told a folder."""
    told = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]  # mypy knows no flags
    _give_back_after_compiling()
    if not _is_chosen and told is None:
        keep_programs(None)


def give_back_memory() -> None:
    """Returns what malloc holds and nobody uses to the system, where the C library can (glibc)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


@functools.cache  # once in a process
def _give_back_after_compiling() -> None:
    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event == COMPILED and duration_secs >= LONG:
            give_back_memory()

    jax.monitoring.register_event_duration_secs_listener(listen)


def _user_folder() -> str:
    """The folder for this kind of CPU, made; "" where that fails.

    Programs for CPUs use their instruction sets, and a home may be shared by machines that differ.
    """
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
        name = f"compiled-{platform.machine()}-{zlib.crc32(_cpu().encode()):08x}"
        folder = cache / "fluxvit_jax" / name
        if not folder.exists():
            folder.mkdir(parents=True)
            if jax.process_index() == 0:  # not by `console.say`: a server has JAX and NumPy alone
                print(
                    f"compiled programs are kept in {folder}; {VARIABLE}= keeps none",
                    file=sys.stderr,
                )
    except (OSError, RuntimeError):  # a home that cannot be written, or none at all
        return ""
    if not os.access(folder, os.W_OK):
        return ""
    with contextlib.suppress(OSError):  # another process may do the same
        _drop_longest_unused(folder)
    return str(folder)


def _drop_longest_unused(folder: Path) -> None:
    """Removes programs until `MOST_KEPT` are left."""
    programs = [(path, path.stat()) for path in folder.iterdir()]
    size = sum(status.st_size for _, status in programs)
    for path, status in sorted(programs, key=lambda program: program[1].st_atime_ns):
        if size <= MOST_KEPT:
            return
        path.unlink(missing_ok=True)
        size -= status.st_size


def _cpu() -> str:
    """What tells CPUs with other instruction sets apart."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
