"""Programs that one command has compiled and the next one loads."""

import os
import platform
import sys
from pathlib import Path

import pytest

from fluxvit_jax.distributed import compilation_cache
from tests import limited, tiny

UNSAID = "nothing is said of a folder"
COMPILE = """
import sys
import jax
from fluxvit_jax.distributed.compilation_cache import keep_programs
keep_programs(*map(eval, sys.argv[1:]))
jax.jit(lambda x: x + 1)(1.0)
print(jax.config.jax_compilation_cache_dir or "")
"""


IN_PYTHON = """
import sys
import numpy as np
import jax
BEFORE = sys.argv[1:]
if BEFORE:
    from fluxvit_jax.distributed.compilation_cache import keep_programs
    keep_programs(*map(eval, BEFORE))
import fluxvit_jax
model = fluxvit_jax.from_pretrained("builtin://ti")
model(np.zeros((4, 56, 56, 3), np.uint8), tokens=16)
print(jax.config.jax_compilation_cache_dir or "")
"""

# Blocks that malloc keeps when they are free, since the last one lies above them.
LEAVES_MEMORY = """
from pathlib import Path
import jax
from fluxvit_jax.distributed.compilation_cache import LONG, keep_programs
def resident_pages():
    return int(Path("/proc/self/statm").read_text().split()[1])
compiled = []
jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: compiled.append(event))
keep_programs("")
jax.jit(lambda x: x + 1)(1.0)
blocks = [bytes(10_000) for _ in range(20_000)]
for size in range(0, 20_000, 2):
    blocks[size] = None
before = resident_pages()
jax.monitoring.record_event_duration_secs(compiled[-1], LONG / 2)
between = resident_pages()
jax.monitoring.record_event_duration_secs(compiled[-1], LONG)
print(before - between, between - resident_pages())
"""


def compile_once(
    home: Path, folder: str | None, *, code: str = COMPILE, **variables: str
) -> tuple[str, str]:
    """The folder that programs are kept in, and what is said of it."""
    environment = tiny.environment(home)
    del environment["JAX_COMPILATION_CACHE_DIR"]
    environment |= {"XDG_CACHE_HOME": str(home)} | variables
    command = [sys.executable, "-c", code, *([] if folder == UNSAID else [repr(folder)])]
    done = limited.run(command, env=environment, check=True)
    said = [line for line in done.stderr.splitlines() if "programs are kept" in line]
    return done.stdout.strip(), "\n".join(said)


def test_a_folder_of_the_user_is_made_and_said_once(tmp_path):
    folder, said = compile_once(tmp_path, None)
    assert Path(folder).parent == tmp_path / "fluxvit_jax" and list(Path(folder).iterdir())
    assert said == f"compiled programs are kept in {folder}; JAX_COMPILATION_CACHE_DIR= keeps none"
    assert compile_once(tmp_path, None) == (folder, "")


@pytest.mark.parametrize("given", ["", "{}/own"])
def test_another_folder_or_none(tmp_path, given):
    folder = given.format(tmp_path)
    assert compile_once(tmp_path, folder, JAX_COMPILATION_CACHE_DIR="elsewhere") == (folder, "")
    assert [path.name for path in tmp_path.iterdir()] == ["own"] * bool(given)


def test_jax_own_variable_comes_before_the_default(tmp_path):
    assert compile_once(tmp_path, None, JAX_COMPILATION_CACHE_DIR=f"{tmp_path}/a")[0].endswith("/a")


def test_programs_that_nobody_used_for_long_make_room(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = Path(compilation_cache._user_folder())
    for number, used in enumerate((30, 10, 20, 40)):
        (folder / f"{number}-cache").write_bytes(bytes(100))
        os.utime(folder / f"{number}-cache", (used, 50 - used))
    monkeypatch.setattr(compilation_cache, "MOST_KEPT", 250)
    assert compilation_cache._user_folder() == str(folder)
    assert {path.name for path in folder.iterdir()} == {"0-cache", "3-cache"}


def test_a_home_that_cannot_be_written_is_left_alone(tmp_path):
    (tmp_path / "fluxvit_jax").write_text("a file where the folder would be")
    assert compile_once(tmp_path, None) == ("", "")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="others give memory back themselves")
def test_memory_of_a_long_compilation_is_given_back(tmp_path):
    command = [sys.executable, "-c", LEAVES_MEMORY]
    done = limited.run(command, env=tiny.environment(tmp_path), check=True)
    after_short, after_long = map(int, done.stdout.split())
    assert after_short < 1_000 and after_long > 10_000  # pages of 4096 bytes


def test_a_user_without_a_home_keeps_none(monkeypatch):
    def no_home(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "expanduser", no_home)
    assert compilation_cache._user_folder() == ""


@pytest.mark.slow
def test_a_model_in_python_keeps_its_programs_unless_told_otherwise(tmp_path):
    folder, said = compile_once(tmp_path, UNSAID, code=IN_PYTHON)
    assert Path(folder).parent == tmp_path / "fluxvit_jax" and "programs are kept in" in said
    kept = set(Path(folder).iterdir())
    assert kept
    assert compile_once(tmp_path, UNSAID, code=IN_PYTHON) == (folder, "")
    assert {path.name.removesuffix("-atime") for path in Path(folder).iterdir()} == {
        path.name.removesuffix("-atime") for path in kept
    }  # nothing was compiled anew
    assert compile_once(tmp_path, "", code=IN_PYTHON) == ("", "")
    other = {"JAX_COMPILATION_CACHE_DIR": f"{tmp_path}/own"}
    assert compile_once(tmp_path, UNSAID, code=IN_PYTHON, **other) == (f"{tmp_path}/own", "")
    assert compile_once(tmp_path, UNSAID, code=IN_PYTHON, JAX_COMPILATION_CACHE_DIR="")[0] == ""
