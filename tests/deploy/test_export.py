"""`--mode=export`: a server answers as the live network does, and needs JAX and NumPy only."""

import json
import os
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import fluxvit_jax
from fluxvit_jax.deploy.export import export, run
from fluxvit_jax.deploy.exported import LATENCY, MANIFEST, WEIGHTS
from fluxvit_jax.distributed import checksums, devices
from fluxvit_jax.errors import UserError
from fluxvit_jax.token_optimization.planner import read_report
from tests import limited
from tests.convert.test_weight_files import CONFIG, TINY_PTH
from tests.deploy.test_pretrained import photograph
from tests.token_optimization.test_planner import BEST, SECOND, TWIN, change, tiny_search

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
    path = shutil.copytree(folder, tmp_path / "manifest") / MANIFEST
    path.write_text(path.read_text().replace('"c3"', '"c2"'))
    with pytest.raises(ValueError, match=f"{MANIFEST}: its checksum differs"):
        fluxvit_jax.load_exported(path.parent)
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


def test_the_current_folder_is_left_alone(live, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for here in (Path("."), tmp_path):
        with pytest.raises(UserError, match="is the current folder; export into another"):
            export(live, here, SETTINGS)
    assert Path.cwd() == tmp_path and not any(tmp_path.iterdir())


def test_the_command_exports_a_workdir(finished, tmp_path, capsys):
    assert run(str(finished.workdir), str(tmp_path / "out"), tokens=(20,)) == 0
    assert "1 budgets" in capsys.readouterr().out
    live = fluxvit_jax.from_pretrained(finished.workdir)
    model = fluxvit_jax.load_exported(tmp_path / "out")
    video = photograph(6, 42, 42)  # the grid of 24 tokens, the nearest that the recipe names
    np.testing.assert_allclose(
        model(video, 20).logits, live(video, 20).logits, rtol=1e-5, atol=1e-5
    )


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> Path:
    """A place for packages where only JAX, NumPy and what those need lie, jax.export included."""
    bare = tmp_path_factory.mktemp("site")
    for name in ("jax", "jaxlib", "numpy", "ml_dtypes", "opt_einsum", "scipy", "flatbuffers"):
        package = Path(__import__(name).__file__).parent
        (bare / name).symlink_to(package)
        for libraries in package.parent.glob(f"{name}.libs"):
            (bare / libraries.name).symlink_to(libraries)
    (bare / "fluxvit_jax").symlink_to(Path(fluxvit_jax.__file__).parent)
    return bare


def served(bare: Path, folder: Path, video: np.ndarray, asked: str, scratch: Path) -> np.ndarray:
    """The logits that a server with nothing else finds. asked: such as "tokens=20"."""
    np.save(scratch / "video.npy", video)
    program = (
        "import sys, importlib.util\n"
        "assert not any(map(importlib.util.find_spec, ('flax', 'orbax', 'grain', 'cv2', 'av')))\n"
        "import numpy, fluxvit_jax\n"
        "model, video = fluxvit_jax.load_exported(sys.argv[1]), numpy.load('video.npy')\n"
        f"numpy.save('answer.npy', model(video, {asked}).logits)\n"
    )
    done = limited.run(
        [sys.executable, "-S", "-c", program, str(folder)],
        env={
            "PYTHONPATH": str(bare),
            "JAX_PLATFORMS": "cpu",
            "PATH": os.environ["PATH"],
            "XDG_CACHE_HOME": str(scratch / "cache"),  # where it keeps its programs
        },
        cwd=scratch,
    )
    assert done.returncode == 0, done.stderr
    return np.load(scratch / "answer.npy")


def test_it_loads_with_jax_and_numpy_alone(live, folder, bare, tmp_path):
    video = photograph(4, 42, 42)
    answer = served(bare, folder, video, "tokens=20", tmp_path)
    np.testing.assert_allclose(answer, live(video, 20).logits, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------------
# Programs that are chosen by time


@pytest.fixture(scope="module")
def searched(finished, compiled, tmp_path_factory):
    """The finished run with a report of a search, which has no timings of any device."""
    return tiny_search(finished, tmp_path_factory.mktemp("searched") / "run")


@pytest.fixture(scope="module")
def planned(searched, tmp_path_factory):
    """Its export: the cells that the report chose, without timings."""
    folder = tmp_path_factory.mktemp("planned") / "folder"
    assert run(str(searched), str(folder)) == 0
    return folder


def with_plan(planned, folder, **changes):
    """A copy of the export whose manifest's "plan" has other fields."""
    shutil.copytree(planned, folder, ignore=shutil.ignore_patterns(LATENCY))
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["plan"] |= changes
    manifest, _ = checksums.take_checksum(manifest)
    (folder / MANIFEST).write_text(json.dumps(checksums.add_checksum(manifest)))
    return folder


def test_what_the_search_chose_is_exported(searched, planned, tmp_path, capsys):
    """Its grids and heads, not those of the recipe: there 12 tokens are of 4 frames of 28 px."""
    manifest, report = json.loads((planned / MANIFEST).read_text()), read_report(searched)
    grids = {
        budget: (own["frames"], own["resolution"], own["head"])
        for budget, own in manifest["budgets"].items()
    }
    assert grids == {"24": (6, 42, 0), "12": (6, 42, 1)} and manifest["version"] == 1
    assert manifest["plan"]["choose"] == report["choose"] and manifest["plan"]["devices"] == {}
    assert manifest["plan"]["report"] == report["report"]
    assert manifest["plan"]["notes"] == report["notes"] == ["by hand"]
    for budget, name in (("24", BEST), ("12", SECOND)):
        cell = report["cells"][name]
        assert manifest["plan"]["programs"][budget] == {
            "cell": name,
            "split": "report",
            **{key: cell["report"][key] for key in ("top1", "top1_interval")},
            **{key: cell[key] for key in ("choose", "behind", "gflops")},
        }
    run(str(searched), str(tmp_path / "again"))
    assert (
        f"exporting the cells that {searched}/search/report.json chose" in capsys.readouterr().out
    )


def test_the_head_that_was_chosen_answers(searched, tmp_path):
    """Also where it is not the one that was trained at the nearest budget."""
    workdir = shutil.copytree(searched, tmp_path / "run")
    change(workdir, chosen={"12": {"select": TWIN}, "24": {"select": None}})
    run(str(workdir), str(tmp_path / "out"))
    model, live = fluxvit_jax.load_exported(tmp_path / "out"), fluxvit_jax.from_pretrained(workdir)
    video = photograph(6, 42, 42)
    found, expected = model(video, 12).logits, live(video, 12, head=0).logits
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert np.abs(found - live(video, 12).logits).max() > 1e-3
    assert model.budgets == [12]
    program = model.manifest["plan"]["programs"]["12"]  # only seen by the videos that chose
    assert (program["cell"], program["split"], program["top1"]) == (TWIN, "choose", 0.66)


def test_asked_budgets_know_their_accuracy_where_it_was_measured(searched, tmp_path):
    """Of 24 tokens on the recipe's grid there is a cell, of 20 there is none."""
    times = {devices.device_name(): {"batch": 8, "cells": {BEST: {"milliseconds": 7.0}, TWIN: {}}}}
    workdir = shutil.copytree(searched, tmp_path / "run")
    change(workdir, devices=times)
    run(str(workdir), str(tmp_path / "out"), tokens=(24, 20))
    model = fluxvit_jax.load_exported(tmp_path / "out")
    assert model.budgets == [24, 20] and set(model.manifest["plan"]["programs"]) == {"24"}
    assert model.budget_within(7) == 24
    with pytest.raises(ValueError, match="of 24 tokens, takes 7 ms"):
        model.budget_within(6.9)


def test_timings_of_another_dtype_are_left_out(searched, tmp_path):
    workdir = shutil.copytree(searched, tmp_path / "run")
    change(workdir, devices={"a": {"batch": 8, "cells": {BEST: {"milliseconds": 7.0}}}})
    for dtype, known in ((None, {"a": {"24": {"milliseconds": 7.0}}}), ("bfloat16", {})):
        out = tmp_path / str(dtype)
        run(str(workdir), str(out), tokens=(24,), dtype=dtype)
        assert json.loads((out / MANIFEST).read_text())["plan"]["devices"] == known


def test_a_report_of_other_weights_is_left_aside(searched, tmp_path, capsys):
    workdir = shutil.copytree(searched, tmp_path / "run")
    change(workdir, fingerprint="1" * 64)
    run(str(workdir), str(tmp_path / "out"))
    assert "report.json is of other weights and left aside" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert "plan" not in manifest and manifest["budgets"]["12"]["resolution"] == 28


def test_a_server_is_asked_by_time(planned, tmp_path):
    """By the manifest's timings of this device, with a sharp edge."""
    table = {"24": {"milliseconds": 9.0}, "12": {"milliseconds": 4.0}}
    folder = with_plan(planned, tmp_path / "out", devices={devices.device_name(): table})
    model = fluxvit_jax.load_exported(folder)
    video = photograph(20, 50, 80)
    for limit, budget in ((100, 24), (9, 24), (8.9, 12), (4, 12)):
        out = model(video, milliseconds=limit)
        assert out.kept.sum() == budget
        np.testing.assert_array_equal(out.logits, model(video, tokens=budget).logits)
    with pytest.raises(ValueError, match="within 3 ms; the fastest, that of 12 tokens, takes 4 ms"):
        model(video, milliseconds=3)
    with pytest.raises(ValueError, match="give one of them"):
        model(video, tokens=12, milliseconds=8)
    assert not (folder / LATENCY).exists()


def test_a_more_accurate_program_is_preferred_not_a_larger_one(planned, tmp_path):
    table = {"24": {"milliseconds": 9.0}, "12": {"milliseconds": 4.0}}
    programs = {
        "24": {"top1": 0.6, "gflops": 2},
        "12": {"top1": 0.7, "gflops": 1},
    }
    known = {devices.device_name(): table}
    folder = with_plan(planned, tmp_path / "out", devices=known, programs=programs)
    assert fluxvit_jax.load_exported(folder).budget_within(100) == 12
    # As in a plan, programs are compared on the videos that chose, whatever others report.
    for program, top1 in zip(programs.values(), (0.7, 0.6), strict=True):
        program["choose"] = {"top1": top1}
    folder = with_plan(planned, tmp_path / "compared", devices=known, programs=programs)
    assert fluxvit_jax.load_exported(folder).budget_within(100) == 24


def test_a_device_without_timings_is_timed_once(planned, tmp_path):
    """For real; the next process reads what is kept, a damaged file is measured anew."""
    folder = with_plan(planned, tmp_path / "out")
    model = fluxvit_jax.load_exported(folder)
    assert model(photograph(6, 42, 42), milliseconds=1e6).kept.sum() == 24
    kept = json.loads((folder / LATENCY).read_text())
    times = kept[devices.device_name()]
    assert set(times) == {"24", "12"} and min(times.values()) > 0
    with pytest.raises(ValueError, match="no program answers within"):
        model.budget_within(min(times.values()) / 2)
    assert sorted(p.name for p in folder.iterdir() if "latency" in p.name) == [LATENCY]

    other = {"24": 1.0, "12": 0.5}
    (folder / LATENCY).write_text(json.dumps({devices.device_name(): other, "other": other}))
    again = fluxvit_jax.load_exported(folder)
    assert [again.budget_within(limit) for limit in (1, 0.9)] == [24, 12]
    (folder / LATENCY).write_text('{"damaged')
    assert fluxvit_jax.load_exported(folder).budget_within(1e6) == 24
    assert set(json.loads((folder / LATENCY).read_text())) == {devices.device_name()}


def test_a_folder_that_cannot_be_written_serves_as_well(planned, tmp_path):
    folder = with_plan(planned, tmp_path / "out")
    (folder / f".{LATENCY}.unfinished").mkdir()  # in the way of the new file
    model = fluxvit_jax.load_exported(folder)
    first = model.budget_within(1e6), dict(model._milliseconds)
    assert first == (model.budget_within(1e6), model._milliseconds) and first[0] == 24
    assert not (folder / LATENCY).exists()


def test_a_server_times_with_jax_and_numpy_alone(searched, planned, bare, tmp_path):
    folder, video = with_plan(planned, tmp_path / "out"), photograph(6, 42, 42)
    answer = served(bare, folder, video, "milliseconds=1e6", tmp_path)
    live = fluxvit_jax.from_pretrained(searched)
    np.testing.assert_allclose(answer, live(video, 24, head=0).logits, rtol=1e-5, atol=1e-5)
    assert set(json.loads((folder / LATENCY).read_text())) == {devices.device_name()}


def test_without_accuracies_time_chooses_nothing(folder):
    with pytest.raises(ValueError, match="run --mode=search and export again"):
        fluxvit_jax.load_exported(folder)(photograph(4, 42, 42), milliseconds=8)
