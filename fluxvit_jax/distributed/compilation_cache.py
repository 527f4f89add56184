"""Compiled programs, kept from one process to the next by JAX's persistent compilation cache."""

import os
import platform
import sys
import zlib
from pathlib import Path

import jax

VARIABLE = "JAX_COMPILATION_CACHE_DIR"

_is_chosen = False  # whether `keep_programs` was called in this process


def keep_programs(folder: str | None) -> None:
    """Has JAX keep every program that takes a second to compile; call it before the first one.

    folder: None: what `JAX_COMPILATION_CACHE_DIR` names, or else a folder of the user's, which is
    said when it is made, and left alone if it cannot be written; "": no program is kept.
    """
    global _is_chosen
    _is_chosen = True
    if folder is None:
        if VARIABLE in os.environ:
            return
        folder = _user_folder()
    jax.config.update("jax_compilation_cache_dir", folder or None)


def keep_programs_by_default() -> None:
    """`keep_programs(None)` for Python's own users, unless JAX or a command was told a folder."""
    told = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]  # mypy knows no flags
    if not _is_chosen and told is None:
        keep_programs(None)


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
    return str(folder) if os.access(folder, os.W_OK) else ""


def _cpu() -> str:
    """What tells CPUs with other instruction sets apart."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
