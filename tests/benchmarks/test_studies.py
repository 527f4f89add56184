"""The parts of the studies that take no training: whose clips, which of them, and the tables."""

import csv
import json

import numpy as np
import pytest

from benchmarks import (
    adaptive_study,
    clip_study,
    method_study,
    pretrain_study,
    recipe_study,
    study,
)
from fluxvit_jax.config.loading import load_config
from fluxvit_jax.distributed import checksums
from fluxvit_jax.recipes import demo

CLASSES = ("left", "right", "up")


@pytest.fixture
def lists(tmp_path):
    """Lists with names for labels: 30 clips to train on, and 6, the last class first."""
    for name, clips in (("train", 30), ("validation", 6)):
        rows = [(f"{name}{n}.mp4", CLASSES[-1 - n % 3]) for n in range(clips)]
        with (tmp_path / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("path", "label"), *rows])
    return tmp_path


def clips_of(*arguments):
    parser = study.parser_of("some_study", "Some study.", "out", "of path,label")
    return study.clips_of(parser.parse_args(arguments))


def test_lists_of_ones_own_are_seen_as_often_as_the_demos_clips(lists):
    clips = clips_of(f"--train={lists / 'train.csv'}", f"--validation={lists / 'validation.csv'}")
    config = load_config(
        "configs/demo.py:multi", [*clips.flags(), *clips.schedule(demo.get_config())]
    )
    assert config.data.root == str(lists)
    assert config.train.epochs == config.eval.every_epochs == 1040  # 31,200 of 30 clips
    assert config.train.warmup_epochs / config.train.epochs == pytest.approx(0.7 / 13, rel=1e-2)
    assert clips.validation_labels().tolist() == [2, 1, 0, 2, 1, 0]
    with pytest.raises(SystemExit, match="belong together"):
        clips_of(f"--train={lists / 'train.csv'}")
    with pytest.raises(SystemExit, match=r"error: .*nowhere.csv"):
        clips_of(f"--train={lists / 'nowhere.csv'}", f"--validation={lists / 'validation.csv'}")


def test_captions_of_ones_own(tmp_path):
    path = tmp_path / "train.json"
    path.write_text(json.dumps([{"video": f"{n}.mp4", "caption": "a dog"} for n in range(24)]))
    clips = study.Clips(
        train=path, validation=path, root=tmp_path, classes=None, captioned=True, own=True
    )
    config = demo.get_config()
    config.train.epochs, config.train.warmup_epochs = 1, 0.1
    assert "--config.train.epochs=100" in clips.schedule(config)
    assert clip_study.captions(clips) == (path, path)


def test_labeled_clips_of_each_class_differ_by_seed(lists):
    clips = clips_of(f"--train={lists / 'train.csv'}", f"--validation={lists / 'validation.csv'}")
    chosen = []
    for seed in range(2):
        path, number = pretrain_study.write_labeled(clips, 4, seed, lists / "out")
        rows = list(csv.DictReader(path.open(newline="")))
        assert len(rows) == number == 12
        assert {own: sum(row["label"] == own for row in rows) for own in CLASSES} == dict.fromkeys(
            CLASSES, 4
        )
        chosen.append({row["path"] for row in rows})
    assert not chosen[0] & chosen[1]


def test_differences_are_paired_by_clip():
    better = [np.array([1, 1, 1, 0] * 25, bool)] * 2
    worse = [np.array([1, 1, 0, 0] * 25, bool)] * 2
    assert study.difference_text(better, worse).startswith("yes: +25.0 (")
    assert study.difference_text(worse, better).startswith("no: -25.0 (")
    assert study.difference_text(better, better) == "open: +0.0 (0.0 to 0.0)"
    # Two seeds that agree tell no more than one: the same clips are drawn for both.
    assert study.mean_text(better) == study.mean_text(better[:1])


def test_a_claim_is_told_once_both_rows_are_there(tmp_path):
    right = {2: {budget: np.ones(4, bool) for budget in (128, 64, 32)}}
    wrong = {seed: {budget: np.zeros(4, bool) for budget in (128, 64, 32)} for seed in (0, 2)}
    found = {row.name: {} for row in method_study.ROWS} | {method_study.FIXED: wrong}
    method_study.write(found, tmp_path)
    assert method_study.FIXED in (tmp_path / "study.md").read_text()
    assert len((tmp_path / "claims.md").read_text().splitlines()) == 2
    method_study.write(found | {method_study.SINGLE: right}, tmp_path)
    *_, line = (tmp_path / "claims.md").read_text().splitlines()
    assert line.count("yes: +100.0 (100.0 to 100.0)") == 3 and line.endswith("| 1 |")
    assert line.startswith("| 1 | Flux-Single > Fixed grid")


def test_results_of_the_same_clips_and_config_are_found_again(lists):
    own = [f"--train={lists / 'train.csv'}", f"--validation={lists / 'validation.csv'}"]
    clips, path = clips_of(*own), lists / "results" / "some.jsonl"
    config = load_config("configs/demo.py:multi,seed=1", clips.flags())
    right = {64: np.array([1, 0, 1, 0, 0, 1], bool), 32: np.zeros(6, bool)}
    study.Results(path, clips).add("multi-seed-1", config, right)
    (lists / "moved").mkdir()
    moved = clips_of(*own, f"--root={lists / 'moved'}")
    found = study.Results(path, moved).find("multi-seed-1", load_config(
        "configs/demo.py:multi,seed=1", moved.flags()
    ))  # fmt: skip
    assert {budget: one.tolist() for budget, one in found.items()} == {
        64: right[64].tolist(),
        32: right[32].tolist(),
    }
    results = study.Results(path, clips)
    assert results.find("multi-seed-2", config) is None
    with config.unlocked():
        config.optim.weight_decay = 0.5
    assert results.find("multi-seed-1", config) is None
    (lists / "validation.csv").write_text("path,label\nvalidation0.mp4,up\n")
    others = clips_of(*own)
    config = load_config("configs/demo.py:multi,seed=1", clips.flags())
    assert study.Results(path, others).find("multi-seed-1", config) is None


def test_every_row_is_a_recipe_in_a_folder_of_its_own():
    for row in method_study.ROWS:
        load_config(f"configs/demo.py:{row.recipe},seed=1", list(row.flags))
    assert len({row.folder for row in method_study.ROWS}) == len(method_study.ROWS)
    named = {name for claim in method_study.CLAIMS for name in (claim.better, claim.worse)}
    assert named <= {row.name for row in method_study.ROWS}


def test_what_chooses_a_recipe_is_left_out_of_its_training(lists):
    clips = clips_of(f"--train={lists / 'train.csv'}", f"--validation={lists / 'validation.csv'}")
    left_out = []
    for seed in range(2):
        part = recipe_study.split(clips, seed, lists / "out")
        trained, chosen = (
            list(csv.DictReader(path.open(newline=""))) for path in (part.train, part.validation)
        )
        assert {
            own: sum(row["label"] == own for row in chosen) for own in CLASSES
        } == dict.fromkeys(CLASSES, 2)
        paths = [row["path"] for row in trained + chosen]
        assert sorted(paths) == sorted(f"train{n}.mp4" for n in range(30))
        left_out.append({row["path"] for row in chosen})
    assert left_out[0] != left_out[1]


def test_the_recipe_that_is_best_over_all_budgets_and_seeds_is_chosen(tmp_path):
    right = [{64: np.array([1, 1], bool), 32: np.array([1, 0], bool)}]
    assert recipe_study.mean(right) == 0.75
    recipe_study.write({"a": right}, tmp_path / "choosing.md")
    *_, line = (tmp_path / "choosing.md").read_text().splitlines()
    assert line.startswith("| a | 64: 100.0 (") and line.endswith("| 75.0 | 1 |")


def test_rows_of_recipes_can_be_trained(lists):
    clips = clips_of(f"--train={lists / 'train.csv'}", f"--validation={lists / 'validation.csv'}")
    for row in recipe_study.ROWS:
        flags = [f"--config.{flag}" for flag in row.flags]
        config = load_config(recipe_study.RECIPE, [*flags, *clips.flags()])
        assert config.eval.every_epochs <= config.train.epochs


def test_hits_of_a_search_are_those_of_the_reporting_split(tmp_path):
    (tmp_path / "search").mkdir()
    lines = [
        {"about": {}},
        {"split": "report", "first": 2, "cell": "a", "found": "1-"},
        {"split": "choose", "first": 0, "cell": "a", "found": "1111"},
        {"split": "report", "first": 0, "cell": "a", "found": "15"},
    ]
    text = "".join(f"{checksums.to_line(line)}\n" for line in lines)
    (tmp_path / "search" / "cells.jsonl").write_text(text)
    right = adaptive_study.right_of_cells(tmp_path)
    assert {cell: own.tolist() for cell, own in right.items()} == {"a": [True, False, True, False]}


def test_what_costs_more_is_not_chosen():
    right = np.ones(2, bool)
    ways = {"a": (1.0, 0.5, lambda: right), "b": (2.0, 0.9, lambda: right)}
    assert adaptive_study.best(ways, 1.0).name == "a"
    assert adaptive_study.best(ways, 2.0).name == "b"
    assert adaptive_study.best(ways, 0.5) is None
