"""The wheel works outside the clone: it has the recipes, and they go by their names."""

import json
import shutil
import sys
import zipfile

import pytest

from fluxvit_jax.config.loading import load_config
from tests import limited, tiny

PARTS = ("configs", "fluxvit_jax", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """The content of a wheel of the working tree."""
    pytest.importorskip("setuptools")
    clone, out = (tmp_path_factory.mktemp(name) for name in ("clone", "out"))
    for part in PARTS:
        source, skipped = tiny.ROOT / part, shutil.ignore_patterns("__pycache__")
        if source.is_dir():
            shutil.copytree(source, clone / part, ignore=skipped)
        else:
            shutil.copy(source, clone / part)
    build = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    done = limited.run([sys.executable, "-c", build, out], cwd=clone)
    assert done.returncode == 0, done.stderr
    (wheel,) = out.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(out / "site")
    return out / "site"


def test_a_recipe_by_its_name(unpacked, tmp_path):
    program = "import sys; from fluxvit_jax.main import main; sys.exit(main())"
    options = ["--config=k400:small", "--config.train.epochs=2", "--print_config"]
    done = limited.run(
        [sys.executable, "-c", program, *options],
        cwd=tmp_path,
        env=tiny.environment(tmp_path) | {"PYTHONPATH": str(unpacked)},
    )
    assert done.returncode == 0, done.stderr
    expected = load_config("configs/k400.py:small", options[1:2]).to_dict()
    assert json.loads(done.stdout) == json.loads(json.dumps(expected))


def test_what_comes_with_it(unpacked):
    assert (unpacked / "fluxvit_jax/py.typed").exists()
    assert (unpacked / "fluxvit_jax/weights/ti.safetensors").exists()
    (about,) = unpacked.glob("fluxvit_jax-*.dist-info")
    assert "fluxvit = fluxvit_jax.main:main" in (about / "entry_points.txt").read_text()
    clone = {path.name for path in (tiny.ROOT / "configs").glob("*.py")}
    assert {path.name for path in (unpacked / "fluxvit_jax/recipes").glob("*.py")} == clone
