"""Programs that one command has compiled and the next one loads."""

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


def test_a_home_that_cannot_be_written_is_left_alone(tmp_path):
    (tmp_path / "fluxvit_jax").write_text("a file where the folder would be")
    assert compile_once(tmp_path, None) == ("", "")


def test_a_user_without_a_home_keeps_none(monkeypatch):
    def no_home(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "expanduser", no_home)
    assert compilation_cache._user_folder() == ""


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
