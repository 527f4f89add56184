"""`--mode=export`: a server answers as the live network does, and needs JAX and NumPy only."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import fluxvit_jax
from fluxvit_jax.errors import UserError
from fluxvit_jax.export import export, run
from fluxvit_jax.exported import MANIFEST, WEIGHTS
from tests.convert.test_files import CONFIG, TINY_PTH
from tests.test_pretrained import photograph

SETTINGS = ((40, 6, 56), (20, 4, 42), (9, 5, 28))


@pytest.fixture(scope="module")
def live(compiled):
    config = CONFIG | {"head_budgets": [40, 20, 10], "rounding": "exact"}
    return fluxvit_jax.from_pretrained(
        TINY_PTH, config | {"id2label": {str(i): f"c{i}" for i in range(10)}}
    )


@pytest.fixture(scope="module")
def folder(live, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "folder"
    export(live, folder, SETTINGS)
    return folder


@pytest.mark.parametrize(("budget", "frames", "resolution"), SETTINGS)
@pytest.mark.parametrize("clips", [1, 3])
def test_every_budget_answers_as_the_live_network(live, folder, budget, frames, resolution, clips):
    video = np.stack([photograph(frames, resolution, resolution, seed) for seed in range(clips)])
    ours, theirs = fluxvit_jax.load_exported(folder)(video, budget), live(video, budget)
    np.testing.assert_allclose(ours.logits, theirs.logits, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(ours.pooled, theirs.pooled, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(ours.kept, theirs.kept)


def test_other_videos_are_fitted_to_the_grid(live, folder):
    """Of 20 frames of 48 x 80 px: evenly spread ones, scaled, the middle square."""
    model = fluxvit_jax.load_exported(folder)
    flat = (
        np.full((20, 48, 80, 3), 7, np.uint8)
        * np.arange(1, 21, dtype=np.uint8)[:, None, None, None]
    )
    seen = np.broadcast_to(flat[[2, 7, 12, 16], :1, :1], (4, 42, 42, 3))
    np.testing.assert_allclose(model(flat, 20).logits, live(seen, 20).logits, rtol=1e-4, atol=1e-4)
    assert model(photograph(3, 30, 70)).kept.shape == (1, 6, 4, 4)
    assert model(photograph(3, 30, 70)).kept.sum() == 40


def test_a_folder_holds_the_weights_once(live, folder):
    """Two per cent and 5 MB over the weights at most; no program has them."""
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(live.params))
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert size <= 1.02 * weights + 5_000_000
    assert (folder / WEIGHTS).stat().st_size < 1.1 * weights
    for budget, *_ in SETTINGS:
        assert (folder / f"{budget}.stablehlo").stat().st_size < weights / 4


def test_programs_are_for_all_platforms_and_any_batch(folder):
    for budget, frames, resolution in SETTINGS:
        program = jax.export.deserialize(bytearray((folder / f"{budget}.stablehlo").read_bytes()))
        assert set(program.platforms) == {"cpu", "cuda", "tpu"}
        patches = program.in_avals[-1]
        assert str(patches.shape[0]) == "b" and patches.shape[1] == frames * (resolution // 14) ** 2


def test_the_manifest(folder):
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["classes"] == [f"c{i}" for i in range(10)]
    assert manifest["budgets"]["20"] | {"sha256": ""} == {
        **{"program": "20.stablehlo", "frames": 4, "resolution": 42, "head": 1, "sha256": ""},
    }
    assert manifest["input"]["mean"] == [0.485, 0.456, 0.406]


def test_damage_is_found(folder, tmp_path):
    for name in (WEIGHTS, "20.stablehlo"):
        copy = tmp_path / name.replace(".", "_")
        shutil.copytree(folder, copy)
        content = bytearray((copy / name).read_bytes())
        content[len(content) // 2] ^= 1
        (copy / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}: its checksum differs"):
            fluxvit_jax.load_exported(copy)(photograph(4, 42, 42), 20)
        (copy / name).unlink()
        with pytest.raises(ValueError, match="cannot be read"):
            fluxvit_jax.load_exported(copy)(photograph(4, 42, 42), 20)
    with pytest.raises(ValueError, match="is no manifest"):
        fluxvit_jax.load_exported(tmp_path)


def test_what_cannot_be_is_refused(live, folder, tmp_path):
    model = fluxvit_jax.load_exported(folder)
    with pytest.raises(ValueError, match=r"no program for 21 tokens, but for \[40, 20, 9\]"):
        model(photograph(4, 42, 42), 21)
    with pytest.raises(ValueError, match="a video is uint8"):
        model(photograph(4, 42, 42).astype(np.float32), 20)
    with pytest.raises(UserError, match="is there already"):
        export(live, folder, SETTINGS)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written: Not a directory"):
        export(live, tmp_path / "file" / "folder", SETTINGS)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    with pytest.raises(UserError, match="multiple of 14"):
        export(live, tmp_path / "other", ((20, 4, 40),))


def test_the_command_exports_a_workdir(finished, tmp_path, capsys):
    assert run(str(finished.workdir), str(tmp_path / "out"), tokens=(20,)) == 0
    assert "1 budgets" in capsys.readouterr().out
    live = fluxvit_jax.from_pretrained(finished.workdir)
    model = fluxvit_jax.load_exported(tmp_path / "out")
    video = photograph(6, 42, 42)  # the grid of 24 tokens, the nearest that the recipe names
    np.testing.assert_allclose(
        model(video, 20).logits, live(video, 20).logits, rtol=1e-5, atol=1e-5
    )


def test_it_loads_with_jax_and_numpy_alone(live, folder, tmp_path):
    """In an interpreter that finds only JAX, NumPy and what those need, jax.export included."""
    allowed = ("jax", "jaxlib", "numpy", "ml_dtypes", "opt_einsum", "scipy", "flatbuffers")
    bare = tmp_path / "site"
    bare.mkdir()
    for name in allowed:
        package = Path(__import__(name).__file__).parent
        (bare / name).symlink_to(package)
        for libraries in package.parent.glob(f"{name}.libs"):
            (bare / libraries.name).symlink_to(libraries)
    (bare / "fluxvit_jax").symlink_to(Path(fluxvit_jax.__file__).parent)
    video, answer = tmp_path / "video.npy", tmp_path / "answer.npy"
    np.save(video, photograph(4, 42, 42))
    program = (
        "import sys, importlib.util\n"
        "assert not any(map(importlib.util.find_spec, ('flax', 'orbax', 'grain', 'cv2', 'av')))\n"
        "import numpy, fluxvit_jax\n"
        f"out = fluxvit_jax.load_exported({str(folder)!r})(numpy.load({str(video)!r}), tokens=20)\n"
        f"numpy.save({str(answer)!r}, out.logits)\n"
    )
    environment = {"PYTHONPATH": str(bare), "JAX_PLATFORMS": "cpu", "PATH": os.environ["PATH"]}
    done = subprocess.run(
        [sys.executable, "-S", "-c", program], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    expected = live(photograph(4, 42, 42), 20).logits
    np.testing.assert_allclose(np.load(answer), expected, rtol=1e-5, atol=1e-5)
