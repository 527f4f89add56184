"""Compiled programs, kept from one process to the next by JAX's persistent compilation cache."""

import os
import platform
import zlib
from pathlib import Path

import jax

from fluxvit_jax.distributed.console import say

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
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "fluxvit_jax"
    folder = base / f"compiled-{platform.machine()}-{zlib.crc32(_cpu().encode()):08x}"
    if not folder.exists():
        try:
            folder.mkdir(parents=True)
        except OSError:
            return ""
        say(f"compiled programs are kept in {folder}; {VARIABLE}= keeps none")
    return str(folder) if os.access(folder, os.W_OK) else ""


def _cpu() -> str:
    """What tells CPUs with other instruction sets apart."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
