"""`--mode=predict` as a user runs it, on videos of all kinds, with weights of all forms."""

import csv
import io
import json
import os
import re
import shutil
from functools import partial

import cv2
import numpy as np
import pytest
import safetensors.numpy

import fluxvit_jax
from fluxvit_jax.checkpoints.weights import read_weights
from fluxvit_jax.convert import config_json, weight_files
from fluxvit_jax.data import durable_files
from fluxvit_jax.data.clips import read_clip
from fluxvit_jax.data.decoding import Video
from fluxvit_jax.deploy.predict import Options, run
from fluxvit_jax.distributed import devices
from fluxvit_jax.errors import UserError
from fluxvit_jax.token_optimization.planner import read_report
from tests import tiny
from tests.data.videos import moving_texture, write_video
from tests.deploy.test_pretrained import evaluated
from tests.test_main import error_line, outcome, outcome_here
from tests.token_optimization.test_planner import (
    BEST,
    CHEAPEST,
    MERGING,
    SECOND,
    TWIN,
    change,
    tiny_search,
)

GRIDS = {24: (6, 42), 12: (4, 28)}  # of the tiny recipe: budget, frames, pixels


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """A folder with an odd-sized, a portrait, a 1-frame, a 3-second and a broken video."""
    folder = tmp_path_factory.mktemp("videos")
    write_video(folder / "odd.mp4", moving_texture(11, 50, 74))
    write_video(folder / "portrait.mp4", moving_texture(9, 96, 54))
    write_video(folder / "one.mp4", moving_texture(1, 64, 64))
    (folder / "below").mkdir()
    write_video(folder / "below" / "long.mp4", moving_texture(90, 64, 64))
    (folder / "broken.mp4").write_bytes((folder / "odd.mp4").read_bytes()[:300])
    return folder


@pytest.fixture(scope="module")
def weights(finished, tmp_path_factory):
    """The finished run as a folder that knows the names of its classes."""
    folder = tmp_path_factory.mktemp("weights") / "folder"
    pretrained = read_weights(finished.workdir, {"id2label": dict(zip("0123", NAMES, strict=True))})
    weight_files.write(pretrained, folder)
    return folder


NAMES = ("red", "green", "blue", "<yellow>")


def options(weights, video, out, **more) -> Options:
    given = {"tokens": (), "network": "", "dtype": "float32"} | more
    return Options(str(weights), str(out), video=str(video), **given)


def test_the_command(finished, videos, tiny_data, compiled, tmp_path):
    """A workdir, two budgets, the recipe's class names from a file: text, page, film."""
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    status, out, err = outcome(
        tiny.start(
            *(tiny_data, finished.workdir, compiled, "--mode=predict", "--tokens=24,12", "--top=2"),
            *(f"--video={videos / 'odd.mp4'}", f"--class_names={tmp_path / 'names.txt'}"),
            *(f"--out={tmp_path / 'out'}", f"--compile_cache={tmp_path / 'programs'}"),
        )
    )
    assert status == 0, err
    assert list((tmp_path / "programs").iterdir())
    lines = out.splitlines()
    assert re.match(r"24 of 54 tokens \(6 frames of 42 x 42 px, head 0\): [\d.]+ ms", lines[0])
    assert re.match(r"12 of 16 tokens \(4 frames of 28 x 28 px, head 1\): [\d.]+ ms", lines[3])
    assert all(re.match(rf"  +[\d.]+%  ({'|'.join(NAMES)})$", lines[i]) for i in (1, 2, 4, 5))
    page = (tmp_path / "out" / "odd.kept.html").read_text()
    assert page.count("<img") == 6 + 4
    with Video(tmp_path / "out" / "odd.kept.mp4") as film:
        assert len(film) >= 10


def test_it_answers_as_the_model_does(weights, videos, tmp_path, capsys):
    for name in ("odd", "portrait", "one"):
        assert run(options(weights, videos / f"{name}.mp4", tmp_path)) == 0
        said = capsys.readouterr().out
        model = fluxvit_jax.from_pretrained(weights)
        with Video(videos / f"{name}.mp4") as video:
            for budget, (frames, resolution) in GRIDS.items():
                clip = read_clip(video, frames, resolution)
                logits = np.asarray(model(clip.frames, budget).logits[0])
                odds = np.exp(logits) / np.exp(logits).sum()
                best = f"{odds.max():7.2%}  {NAMES[odds.argmax()]}"
                assert best in said
                assert clip.frames.shape == (frames, resolution, resolution, 3)
    assert (tmp_path / "portrait.kept.html").exists() and (tmp_path / "one.kept.mp4").exists()


def test_calibrated_probabilities(finished, videos, tmp_path, capsys):
    workdir = evaluated(finished.workdir, tmp_path / "run")
    assert run(options(workdir, videos / "odd.mp4", tmp_path, top=4, calibrated=True)) == 0
    said = capsys.readouterr()
    assert said.err.splitlines()[-1] == (
        "temperatures of 13 videos of /home/lists/b.csv: 0.5 at 24 tokens, 2 at 12 tokens"
    )
    model = fluxvit_jax.from_pretrained(workdir)
    for tokens in GRIDS:
        for name, probability in model.predict(videos / "odd.mp4", tokens, calibrated=True):
            assert f"{probability:7.2%}  {name}" in said.out
    plain = model.predict(videos / "odd.mp4", 12)
    assert f"{plain[0].probability:7.2%}  {plain[0].name}" not in said.out


def test_calibration_that_is_not_known(finished, videos, tmp_path):
    """And not of classes that are named by texts, for which Flux-CLIP's weights are needed."""
    folder = tmp_path / "folder"
    weight_files.write(read_weights(finished.workdir)._replace(evaluations=()), folder)
    for more, message in (
        ({}, f"--calibrated: {folder}: no evaluation has calibrated these weights"),
        ({"classes": ["a", "b"]}, "has no text encoder"),
    ):
        with pytest.raises(UserError, match=re.escape(message)) as error:
            run(options(folder, videos / "odd.mp4", tmp_path, calibrated=True, **more))
        assert "\n" not in str(error.value)


def test_a_clip_is_the_middle_square_of_evenly_spread_frames(videos):
    with Video(videos / "portrait.mp4") as video:
        clip = read_clip(video, 4, 28)
        source = video.read(clip.numbers)
        assert len(video) == 9 and clip.numbers.tolist() == [1, 3, 5, 7]
        np.testing.assert_allclose(clip.times, clip.numbers / video.frame_rate)
    square = cv2.resize(source[2][21:75], (28, 28))  # the middle 54 of 96 rows
    assert np.abs(clip.frames[2].astype(int) - square).mean() < 12


def test_a_folder_becomes_a_table(weights, videos, tmp_path, capsys):
    assert run(options(weights, videos, tmp_path, tokens=(24, 12), top=9)) == 0
    said = capsys.readouterr()
    assert "broken.mp4: " in said.err and "5 videos; 1 could not be read" in said.out
    with (tmp_path / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    good = [row for row in rows if not row["failure"]]
    (bad,) = [row for row in rows if row["failure"]]
    assert bad["video"] == "broken.mp4" and bad["class1"] == ""
    assert [row["video"] for row in good[::2]] == [
        *("below/long.mp4", "odd.mp4", "one.mp4", "portrait.mp4"),
    ]
    for row in good:
        assert (int(row["frames"]), int(row["resolution"])) == GRIDS[int(row["tokens"])]
        odds = [float(row[f"probability{n}"]) for n in range(1, 5)]
        assert odds == sorted(odds, reverse=True) and sum(odds) == pytest.approx(1, abs=1e-5)
        assert {row[f"class{n}"] for n in range(1, 5)} == set(NAMES)


def test_tables_are_utf_8_in_any_locale(weights, videos, tmp_path, monkeypatch):
    shutil.copy(videos / "one.mp4", tmp_path / "é.mp4")
    monkeypatch.setattr(io, "text_encoding", lambda encoding, *_: encoding or "ascii")
    assert run(options(weights, tmp_path, tmp_path / "out", tokens=(12,))) == 0
    assert "é.mp4" in (tmp_path / "out" / "predictions.csv").read_bytes().decode()


def test_a_folder_that_is_written_into(weights, videos, tmp_path):
    """Films of earlier predictions are none of its videos, and one prediction at a time writes."""
    shutil.copy(videos / "one.mp4", tmp_path)
    assert run(options(weights, tmp_path / "one.mp4", tmp_path, tokens=(12,))) == 0
    assert (tmp_path / "one.kept.mp4").exists()
    of_folder = options(weights, tmp_path, tmp_path, tokens=(12,))
    assert run(of_folder) == 0
    table = tmp_path / "predictions.csv"
    with table.open(newline="") as file:
        assert [row["video"] for row in csv.DictReader(file)] == ["one.mp4"]
    before = table.read_bytes()
    with (
        durable_files.one_run_at_a_time(tmp_path, "another"),
        pytest.raises(UserError, match="another run of `--mode=predict` is at work here"),
    ):
        run(of_folder)
    assert table.read_bytes() == before


def test_a_folder_of_which_nothing_can_be_read_is_an_error(weights, tmp_path):
    """The reasons are in the table all the same."""
    folder = tmp_path / "videos"
    folder.mkdir()
    for name in ("a.mp4", "b.mp4"):
        (folder / name).write_bytes(b"no video")
    with pytest.raises(
        UserError, match=r"not one of its 2 videos can be read; a.mp4: .*reason"
    ) as e:
        run(options(weights, folder, tmp_path / "out"))
    assert "\n" not in str(e.value)
    with (tmp_path / "out" / "predictions.csv").open(newline="") as file:
        assert all(row["failure"] for row in csv.DictReader(file))


@pytest.mark.slow
def test_names_that_are_no_utf_8_are_shown_escaped(
    finished, videos, tiny_data, compiled, tmp_path, monkeypatch
):
    monkeypatch.setenv("PYTHONIOENCODING", "utf-8:strict")
    folder = tmp_path / "videos"
    folder.mkdir()
    names = [os.fsdecode(name) for name in (b"a.mp4", b"b\xe9.mp4", b"c.mp4")]
    for name in names:
        shutil.copy(videos / "odd.mp4", folder / name)
    shutil.copy(videos / "broken.mp4", folder / os.fsdecode(b"d\xff.mp4"))
    flags = ["--mode=predict", f"--out={tmp_path / 'out'}", "--features=pooled", "--tokens=12"]
    run = partial(tiny.start, tiny_data, finished.workdir, compiled, *flags)
    status, out, err = outcome(run(f"--video={folder}"))
    assert status == 0 and "4 videos; 1 could not be read" in out, err
    assert r"d\xff.mp4: " in err
    with (tmp_path / "out" / "predictions.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["video"] for row in rows] == ["a.mp4", r"b\xe9.mp4", "c.mp4", r"d\xff.mp4"]
    assert [bool(row["failure"]) for row in rows] == [False, False, False, True]
    assert (tmp_path / "out" / r"b\xe9.mp4.npz").exists()

    status, out, err = outcome(run(f"--video={folder / names[1]}"))
    assert status == 0 and rf"{tmp_path}/out/b\xe9.kept.html" in out, err
    assert r"<h1>b\xe9.mp4</h1>" in (tmp_path / "out" / r"b\xe9.kept.html").read_text("utf-8")


def test_names_are_no_formulas(weights, videos, tmp_path):
    """A spreadsheet would compute them."""
    folder = tmp_path / "videos"
    folder.mkdir()
    for name in ("=1+1.mp4", "-2.mp4", "@x.mp4", "+y.mp4", "\tz.mp4", "a=b.mp4"):
        shutil.copy(videos / "one.mp4", folder / name)
    shutil.copy(videos / "broken.mp4", folder / "=broken.mp4")
    (tmp_path / "names.txt").write_text("=CMD()\n-1\nred\n@two\n")
    class_names = str(tmp_path / "names.txt")
    assert run(options(weights, folder, tmp_path, class_names=class_names, top=4)) == 0
    with (tmp_path / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    named = {row["video"] for row in rows}
    assert named == {
        *("'=1+1.mp4", "'-2.mp4", "'@x.mp4", "'+y.mp4", "'\tz.mp4", "a=b.mp4"),
        "'=broken.mp4",
    }
    good = next(row for row in rows if not row["failure"])
    assert {good[f"class{n}"] for n in range(1, 5)} == {"'=CMD()", "'-1", "red", "'@two"}


@pytest.mark.parametrize("kind", ["pooled", "tokens"])
def test_features(weights, videos, tmp_path, kind):
    assert run(options(weights, videos, tmp_path, features=kind)) == 0
    model = fluxvit_jax.from_pretrained(weights)
    with (
        np.load(tmp_path / "below" / "long.mp4.npz") as arrays,
        Video(videos / "below/long.mp4") as v,
    ):
        clip = read_clip(v, *GRIDS[12])
        out = model(clip.frames, 12)
        np.testing.assert_allclose(arrays["pooled_12"], out.pooled[0], rtol=1e-5, atol=1e-5)
        if kind == "pooled":
            assert sorted(arrays) == ["pooled_12", "pooled_24"]
            return
        assert arrays["tokens_24"].shape == (24, 64) and arrays["tokens_12"].dtype == np.float32
        np.testing.assert_array_equal(arrays["thw_12"], np.argwhere(out.kept[0]))
        np.testing.assert_array_equal(arrays["frames_12"], clip.numbers)
    assert not (tmp_path / "broken.mp4.npz").exists()


def test_a_bare_file_needs_its_network_named(finished, weights, videos, tmp_path, capsys):
    """Official names in a file without a config; Ti is known by its size."""
    bare = tmp_path / "bare.safetensors"
    shutil.copy(weights / "model.safetensors", bare)
    assert run(options(bare, videos / "odd.mp4", tmp_path, tokens=(24,))) == 0
    first = capsys.readouterr().out
    network = tmp_path / "config.json"
    network.write_text(json.dumps({"head_budgets": [12], "id2label": {}}))
    named = options(bare, videos / "odd.mp4", tmp_path, tokens=(24,), network=str(network))
    assert run(named) == 0
    assert "red" in first and "class 0" in capsys.readouterr().out


def test_names_of_classes(weights, finished, videos, tiny_data, tmp_path, capsys):
    """A file on the command line, else the weights, else the recipe, whose grids go first."""
    (tmp_path / "recipe.txt").write_text("w\nx\ny\nz\n")
    (tmp_path / "flag.txt").write_text("one\ntwo\nthree\nfour\n")
    config = tiny.make_config(tiny_data, data__class_names=str(tmp_path / "recipe.txt"))
    config.eval.settings = ((20, 5, 28),)
    flag = str(tmp_path / "flag.txt")
    for source, file, expected in (
        (finished.workdir, "", set("wxyz")),
        (weights, "", set(NAMES)),
        (weights, flag, {"one", "two", "three", "four"}),
    ):
        asked = options(source, videos / "odd.mp4", tmp_path, top=4, class_names=file)
        assert run(asked, config) == 0
        said = capsys.readouterr().out
        assert said.startswith("20 of 20 tokens (5 frames of 28 x 28 px, head 0)")
        assert set(re.findall(r"%  (.+)\n", said)) == expected


def test_names_that_are_assumed_of_official_weights(
    finished, videos, tiny_data, tmp_path, capsys, monkeypatch
):
    """A bare file of a released size with 400 classes: Kinetics-400's, unless others are stated."""
    monkeypatch.setattr(config_json, "RELEASED", ("Ti",))
    state = dict(read_weights(finished.workdir).state)
    for i in range(3):
        state[f"head.{i}.weight"] = np.zeros((400, 64), np.float32)
        state[f"head.{i}.bias"] = np.where(np.arange(400) == 0, 9, 0).astype(np.float32)
    bare = tmp_path / "official.safetensors"
    safetensors.numpy.save_file(state, bare)
    (tmp_path / "own.txt").write_text("".join(f"own {i}\n" for i in range(400)))
    recipe = tiny.make_config(
        tiny_data, model__classes=400, data__class_names=str(tmp_path / "own.txt")
    )
    for flag, config, expected in (
        ("", None, "abseiling"),
        ("", recipe, "own 0"),
        ("k400", recipe, "abseiling"),
    ):
        asked = options(bare, videos / "odd.mp4", tmp_path, tokens=(24,), class_names=flag, top=1)
        assert run(asked, config) == 0
        said = capsys.readouterr()
        assert said.out.splitlines()[1].endswith(f"%  {expected}")
        warning = "are taken for those of Kinetics-400; --class_names=FILE names others\n"
        assert said.err.endswith(warning if config is None else "")
        assert bool(said.err) == (config is None)


def test_mistakes_are_one_line(weights, videos, tiny_data, tmp_path):
    (tmp_path / "two.txt").write_text("a\nb\n")
    for changes, message in [
        ({"video": videos / "none.mp4"}, "no such file or folder"),
        ({"video": ""}, "no such file or folder"),
        ({"video": videos / "broken.mp4"}, "broken.mp4"),
        ({"video": tmp_path}, "holds no videos"),
        ({"weights": tmp_path / "none.pth"}, "there are no weights"),
        ({"tokens": (1,)}, "--tokens at least 2"),
        ({"top": 0}, "--top must be at least 1"),
        ({"class_names": str(tmp_path / "two.txt")}, "has 2 names for the network's 4 classes"),
    ]:
        given = {"weights": weights, "video": videos / "odd.mp4", "out": tmp_path} | changes
        with pytest.raises(UserError, match=message) as error:
            run(options(**given))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mode=predict", "--workdir="], "no weights given"),
        (["--mode=predict", "--tokens=12,many"], "not numbers"),
        (["--mode=export", "--tokens=-3"], "not numbers"),
        (["--mode=predict", "--features=all"], "features.*pooled|tokens"),
    ],
)
def test_wrong_flags_are_one_line(tiny_data, tmp_path, capsys, flags, message):
    status, _, err = outcome_here(capsys, tiny_data, tmp_path / "run", *flags)
    assert status == 2 and re.search(message, error_line(err)), err


# ---------------------------------------------------------------------------------------------
# --milliseconds


@pytest.fixture(scope="module")
def searched(finished, tmp_path_factory):
    """The finished run with a report of a search that has timings of this device."""
    times = {BEST: 9.0, SECOND: 4.0, CHEAPEST: 2.0, MERGING: 1.0}
    return tiny_search(finished, tmp_path_factory.mktemp("searched") / "run", times)


def test_the_command_plans_by_time(searched, videos, tiny_data, tmp_path, capsys):
    """It says what it has chosen, then what that answers: the cell's grid, budget and head."""
    flags = ["--mode=predict", "--milliseconds=5", f"--video={videos / 'odd.mp4'}"]
    flags += [f"--out={tmp_path}", "--top=1"]
    status, out, err = outcome_here(capsys, tiny_data, searched, *flags)
    assert status == 0, err
    lines = out.splitlines()
    assert lines[0] == str(fluxvit_jax.plan(searched, milliseconds=5))
    assert lines[0].startswith(f"{SECOND} keeps 12 of 54 tokens (6 frames of 42 px, head 1): 4 ms")
    assert lines[1].startswith("12 of 54 tokens (6 frames of 42 x 42 px, head 1): ")
    assert (tmp_path / "odd.kept.html").read_text().count("<img") == 6


def test_the_planned_head_answers(searched, videos, tmp_path, capsys):
    """Also where it is not the one that was trained at the nearest budget."""
    folder = shutil.copytree(searched, tmp_path / "run")
    cells = read_report(folder)["cells"]
    cells[TWIN]["choose"]["top1"] = 0.75
    timings = {devices.device_name(): {"batch": 1, "cells": {TWIN: {"milliseconds": 3.0}}}}
    change(folder, cells=cells, devices=timings)
    asked = options(folder, videos / "odd.mp4", tmp_path, milliseconds=5, features="pooled")
    assert run(asked) == 0
    said, model = capsys.readouterr().out, fluxvit_jax.from_pretrained(folder)
    assert said.startswith(TWIN) and "(6 frames of 42 x 42 px, head 0)" in said
    with Video(videos / "odd.mp4") as video, np.load(tmp_path / "odd.mp4.npz") as arrays:
        clip = read_clip(video, 6, 42)
        out, nearest = model(clip.frames, 12, head=0), model(clip.frames, 12)
        np.testing.assert_allclose(arrays["pooled_12"], out.pooled[0], rtol=1e-5, atol=1e-5)
        assert np.abs(arrays["pooled_12"] - nearest.pooled[0]).max() > 1e-3
    logits = np.asarray(out.logits[0])
    assert f"{(np.exp(logits) / np.exp(logits).sum()).max():7.2%}" in said


def test_cells_that_merge_are_not_predicted(searched, videos, tmp_path, capsys):
    assert fluxvit_jax.plan(searched, milliseconds=3).cell == MERGING
    asked = options(searched, videos, tmp_path, milliseconds=3)
    assert run(asked) == 0
    assert capsys.readouterr().out.startswith(CHEAPEST)
    with (tmp_path / "predictions.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if not row["failure"]]
    grids = {(row["tokens"], row["frames"], row["resolution"], row["head"]) for row in rows}
    assert grids == {("12", "3", "28", "1")}


def test_a_search_elsewhere_of_the_same_weights_plans(searched, weights, videos, tmp_path, capsys):
    """A folder of weights has no search of its own; the workdir that was named has."""
    asked = options(weights, videos / "one.mp4", tmp_path, milliseconds=5)
    with pytest.raises(UserError, match="folder: no report of a search is there"):
        run(asked)
    assert run(asked._replace(workdir=str(searched), dtype=None)) == 0
    assert capsys.readouterr().out.startswith(SECOND)


def test_mistakes_of_plans_are_one_line(searched, videos, tmp_path):
    other = shutil.copytree(searched, tmp_path / "run")
    change(other, fingerprint="1" * 64)
    for changes, message in [
        ({"milliseconds": 5, "tokens": (12,)}, "--tokens and --milliseconds both choose a budget"),
        ({"milliseconds": 1.5}, f"no cell is within 1.5 ms .* {CHEAPEST}, takes 2 ms"),
        ({"milliseconds": -1}, "a limit is a number above 0"),
        ({"milliseconds": 5, "weights": other}, "its report is of other weights"),
    ]:
        given = {"weights": searched, "video": videos / "odd.mp4", "out": tmp_path} | changes
        with pytest.raises(UserError, match=message) as error:
            run(options(**given))
        assert "\n" not in str(error.value)
