"""Recipes load and hold the published numbers; what is wrong with a config is one helpful line."""

import ast
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from absl import flags
from etils import epath
from ml_collections import ConfigDict

from fluxvit_jax import command_line
from fluxvit_jax.checkpoints import stored_recipe
from fluxvit_jax.checkpoints.workdir import check_workdir, read_config, write_config
from fluxvit_jax.config.checks import validate, validate_for_training
from fluxvit_jax.config.fields import (
    ADDED,
    FIELDS,
    RENAMED,
    REQUIRED,
    config_difference,
    default_config,
    flatten,
)
from fluxvit_jax.config.grids import admissible_grids, search_grids
from fluxvit_jax.config.loading import from_dict, load_config, read_recipe
from fluxvit_jax.config.variants import VARIANTS
from fluxvit_jax.errors import UserError
from fluxvit_jax.evaluation.settings import settings_of
from fluxvit_jax.grids import kept_tokens
from fluxvit_jax.models.token_selection import SELECTORS, Rounding
from fluxvit_jax.objectives.base import check_objective
from fluxvit_jax.objectives.flux_umt import MASKS
from fluxvit_jax.objectives.flux_umt_teacher import block_pairs
from tests import limited, programs

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"
GOLDEN = Path(__file__).parent / "golden"
CLASSES = {
    "k400": 400,
    "k600": 600,
    "k700": 700,
    "k710": 710,
    "ssv2": 174,
    "coin": 180,
    "ucf101": 101,
    "hmdb51": 51,
    "custom": 12,
}
K400 = str(CONFIGS / "k400.py")


def recipe(name: str, options: str = "base", overrides=()) -> ConfigDict:
    classes = ["--config.model.classes=12"] if name == "custom" else []
    return load_config(f"{CONFIGS / name}.py:{options}", [*classes, *overrides])


def error_of(function, *arguments, **options) -> str:
    with pytest.raises(UserError) as caught:
        function(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- Variants and defaults


@pytest.mark.parametrize("variant", ["S", "B"])
def test_variants_have_the_sizes_of_the_released_weights(variant):
    shapes = manifest_shapes(variant)
    sizes = VARIANTS[variant]
    per_frame = (sizes.resolution // 14) ** 2
    assert shapes["pos_embed"] == [1, 1 + sizes.frames * per_frame, sizes.width]
    assert f"blocks.{sizes.depth - 1}.mlp.fc1.weight" in shapes
    assert f"blocks.{sizes.depth}.mlp.fc1.weight" not in shapes
    assert sizes.width % sizes.heads == 0


def manifest_shapes(variant: str) -> dict[str, list[int]]:
    """Parameter shapes of the official S or B."""
    manifest = json.loads((GOLDEN / "full_manifest.json").read_text())
    return manifest[{"S": "fluxvit_small_patch14", "B": "fluxvit_base_patch14"}[variant]]["keys"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_default_of_every_variant_is_valid(variant):
    config = default_config(variant)
    validate(config)
    sizes = VARIANTS[variant]
    assert (config.model.frames, config.model.resolution) == (sizes.frames, sizes.resolution)
    config.model.resolution += 1  # and what is wrong with it would be found
    assert "config.model.resolution: " in error_of(validate, config)


def test_a_config_survives_json_and_old_ones_get_new_fields():
    config = recipe("k400", "small")
    stored = json.loads(json.dumps(config.to_dict()))
    assert from_dict(stored).to_dict() == config.to_dict()
    del stored["train"]["align_weight"]
    assert from_dict(stored).train.align_weight == default_config().train.align_weight
    stored["train"]["epoch"] = 1
    assert "config.train.epoch:" in error_of(from_dict, stored)


def old_form(config: ConfigDict) -> dict:
    """What runs stored when ranges were (start, last, step)."""
    stored = json.loads(json.dumps(config.to_dict()))
    for section in (stored["data"]["grids"], stored["search"]):
        for side in ("frames", "resolutions"):
            section[side] = [int(number) for number in section[side].split("..")]
    return stored


def test_ranges_that_a_run_has_stored_as_lists_are_read_as_ranges(tmp_path):
    config = recipe("k400", "small")
    stored = old_form(config)
    assert stored["data"]["grids"]["frames"] == [6, 24, 2]
    assert from_dict(stored).to_dict() == config.to_dict()
    assert config_difference(stored, config.to_dict()) == []
    (tmp_path / "config.json").write_text(json.dumps(stored))
    check_workdir(epath.Path(tmp_path), config)
    stored["data"]["grids"]["frames"] = [6, 24, 4]
    assert config_difference(stored, config.to_dict()) == [
        "data.grids.frames: 6..24..4 -> 6..24..2"
    ]
    stored["data"]["grids"]["frames"] = [8, 8, 1]
    fixed = recipe("k400", "small", ["--config.data.grids.frames=8"])
    assert config_difference(stored, fixed.to_dict()) == []  # the same numbers


def test_crops_of_earlier_versions_without_an_effect_are_read():
    """Stored with `multi_scale`, the ranges of the other crop did nothing."""
    config = recipe("pretrain", "small,data=mixture.csv")
    stored = json.loads(config.to_json_best_effort())
    stored["data"]["augment"] |= {"scale": [0.5, 1.0], "ratio": [0.9, 1.1]}
    assert from_dict(stored).to_dict() == config.to_dict()
    assert config_difference(stored, config.to_dict()) == []


def test_a_language_model_takes_budgets_that_every_grid_has():
    def check(*frames):
        grids = [f"--config.data.grids.{name}" for name in ("tokens=(1,9000)", *frames)]
        check_objective(recipe("chat", "base", grids))

    check("frames=16,24")  # of 2304 tokens and more
    assert "2048 tokens, and a grid of data.grids has 576; " in error_of(check)


@pytest.mark.parametrize(
    ("text", "frames", "resolutions"),
    [
        ("14..56", list(range(14, 57)), [14, 28, 42, 56]),
        ("28..56..14", [28, 42, 56], [28, 42, 56]),
        ("28..55..14", [28, 42], [28, 42]),
        ("28", [28], [28]),
        ("28,42,140", [28, 42, 140], [28, 42, 140]),
    ],
)
def test_ranges_and_lists_of_numbers(text, frames, resolutions):
    overrides = [f"--config.search.{side}={text}" for side in ("frames", "resolutions")]
    grids = search_grids(recipe("k400", "small", overrides))
    assert sorted({grid.frames for grid in grids}) == frames
    assert sorted({grid.resolution for grid in grids}) == resolutions


def test_default_grids_are_the_official_ones():
    golden = json.loads((GOLDEN / "optim_case.json").read_text())["sampler_official_script"]
    grids = [[g.frames, g.rows * 14, g.tokens] for g in admissible_grids(default_config())]
    assert sorted(grids) == sorted(golden["pairs_frames_res_tokens"])


# --- Recipes


@pytest.mark.parametrize("variant", ["small", "base", "large"])
@pytest.mark.parametrize("name", CLASSES)
def test_every_recipe_loads(name, variant):
    config = recipe(name, variant)
    sizes = VARIANTS[config.model.variant]
    assert config.model.variant == variant[0].upper()
    assert (config.model.frames, config.model.resolution) == (sizes.frames, sizes.resolution)
    assert config.model.classes == CLASSES[name]
    assert config.train.budgets == (3072, 2048, 1024)
    assert config.train.init_from == REQUIRED
    assert recipe(name, f"{variant},single=2048").train.budgets == (2048,)


def test_every_recipe_is_tested():
    # No recipe; the table of the rest; those that have tests of their own.
    not_here = {"common", "finetune", "demo", "demo_pretrain", "pretrain"}
    not_here |= {"clip", "retrieval", "zero_shot", "demo_clip", "demo_chat", "chat", "mvbench"}
    assert {file.stem for file in CONFIGS.glob("*.py")} - not_here == CLASSES.keys()


@pytest.mark.parametrize("name", CLASSES)
def test_the_file_of_a_data_set_is_its_entry_in_the_table(name):
    for options in ("", "small", "large,single=2048"):
        entry = read_recipe(f"{CONFIGS / 'finetune.py'}:{name},{options}")
        assert entry.to_dict() == read_recipe(f"{CONFIGS / name}.py:{options}").to_dict()


def test_a_recipe_of_the_table_asks_for_its_data_set():
    for argument in ("", ":", ":small", ":k40,small"):
        message = error_of(load_config, f"{CONFIGS / 'finetune.py'}{argument}")
        assert "the data set comes first (k400,small)" in message
        assert f"none of {', '.join(CLASSES)}" in message


@pytest.mark.parametrize("name", [*CLASSES, "finetune", "pretrain", "demo", "demo_pretrain"])
def test_the_command_in_a_recipe_is_one_that_trains(name):
    """Of its own recipe, with a workdir; all that has no default is in it."""
    docstring = ast.get_docstring(ast.parse((CONFIGS / f"{name}.py").read_text()))
    (command,) = re.findall(r"python -m fluxvit_jax\.main ((?:.*\\\n)*.*)", docstring)
    options = shlex.split(command.replace("\\\n", " "))
    (recipe,) = [o.removeprefix("--config=") for o in options if o.startswith("--config=")]
    assert recipe.partition(":")[0] == f"configs/{name}.py"
    assert any(o.startswith("--workdir=") for o in options)
    config = load_config(f"{ROOT / recipe}", [o for o in options if o.startswith("--config.")])
    assert REQUIRED not in flatten(config).values()
    validate_for_training(config)


@pytest.mark.parametrize("variant", ["small", "base", "large"])
def test_the_recipe_of_pretraining(variant):
    """Table 14 of the paper, and the base of InternVideo2's distillation."""
    config = recipe("pretrain", f"{variant},data=mixture.csv")
    train, optim, distill = config.train, config.optim, config.distill
    assert config.model.variant == variant[0].upper()
    assert config.data.train == "mixture.csv"
    assert (train.batch_size, train.epochs, train.warmup_epochs) == (2048, 100, 20)
    assert (train.budgets, distill.tokens) == ((2048, 1536, 1024), 2048)
    assert (optim.learning_rate, optim.min_learning_rate) == (1e-3, 1e-5)
    assert (optim.b1, optim.b2, optim.eps, optim.weight_decay) == (0.9, 0.98, 1e-6, 0.05)
    assert (optim.clip_norm, config.model.drop_path, config.data.augment.flip) == (5, 0.05, 0.5)
    depth = VARIANTS[config.model.variant].depth
    students = range(depth - 6, depth)
    assert block_pairs(config) == tuple(zip(students, (23, 26, 29, 33, 36, 39), strict=True))
    grids = admissible_grids(config)
    assert {grid.frames for grid in grids} <= set(range(4, 25, 2))
    assert {grid.rows * 14 for grid in grids} == {168, 196, 224, 252}
    check_objective(config)
    assert "config.distill.teacher=WEIGHTS" in error_of(check_objective, config, training=True)
    assert "--config.data.train" in error_of(validate_for_training, recipe("pretrain", variant))


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("variant", ["small", "base"])
def test_the_recipe_of_flux_clip(variant, stage):
    """Table 16 of the paper, and the base, InternVideo2 CLIP."""
    config = recipe("clip", f"{variant},stage={stage},data=captions.json")
    train, optim, clip = config.train, config.optim, config.clip
    first = stage == 1
    assert config.model.variant == variant[0].upper() and config.data.train == "captions.json"
    assert train.batch_size == (2048 if variant == "base" and not first else 4096)
    assert (train.epochs, train.warmup_epochs) == ((3, 0.6) if first else (1, 0))
    assert optim.learning_rate == (4e-4 if first else 2e-5)
    assert optim.min_learning_rate == pytest.approx(optim.learning_rate / 100)
    assert (optim.b1, optim.b2, optim.eps, optim.weight_decay) == (0.9, 0.98, 1e-8, 0.02)
    assert (optim.schedule, optim.clip_norm) == ("cosine_floor", 0)
    assert (clip.temperature, clip.least_temperature, clip.train_text) == (0.01, 0.01, False)
    assert config.data.augment.crop == "random_resized"
    assert (config.data.augment.scale, config.data.augment.ratio) == ((0.5, 1), (3 / 4, 4 / 3))
    grids = admissible_grids(config)
    assert {grid.frames for grid in grids} <= set(range(4, 25, 2))
    assert {grid.rows * 14 for grid in grids} == {168, 196, 224, 252}
    assert all(2048 <= grid.tokens <= 4096 for grid in grids)
    check_objective(config)
    asked = error_of(check_objective, config, training=True)
    assert "config.clip.text_encoder=WEIGHTS" in asked


def test_the_recipes_of_its_evaluations():
    retrieval = recipe("retrieval", "didemo,small")
    assert (retrieval.eval.videos, retrieval.eval.paragraphs) == (1003, True)
    assert (retrieval.eval.frames, retrieval.eval.resize) == ("middle", "squeeze")
    assert [setting[0] for setting in retrieval.eval.settings] == [2048, 1024, 512]
    assert recipe("zero_shot", "k600,small").data.class_names == "k600"
    assert recipe("zero_shot", "custom").data.class_names == ""
    assert "none of msrvtt, didemo" in error_of(recipe, "retrieval", "msr")
    assert "none of k400, k600" in error_of(recipe, "zero_shot", "base")


@pytest.mark.parametrize("variant", ["small", "base", "large"])
def test_the_recipe_of_video_chat(variant):
    """Table 10 of the paper, and the base, stage 1 of VideoChat-Flash."""
    config = recipe("chat", f"{variant},data=list.json")
    train, optim, chat = config.train, config.optim, config.chat
    assert config.model.variant == variant[0].upper() and config.data.train == "list.json"
    assert (train.freeze, train.budgets) == ("all", (2048, 1024, 512))
    assert (train.batch_size, train.epochs, train.warmup_epochs) == (512, 1, 0.03)
    assert (optim.learning_rate, optim.weight_decay, optim.clip_norm) == (1e-3, 0, 1)
    assert (optim.b1, optim.b2, optim.eps) == (0.9, 0.999, 1e-8)
    assert (chat.layer, chat.merge, chat.template, chat.train) == (-2, 16, "plain", "projector")
    assert (config.data.augment.crop, config.data.augment.flip) == ("random_resized", 0)
    assert (config.data.augment.scale, config.data.augment.ratio) == ((0.9, 1), (0.5, 2))
    assert (config.eval.frames, config.eval.resize) == ("middle", "squeeze")
    assert recipe("chat", "base,single=512").train.budgets == (512,)
    check_objective(config)
    config.chat.llm = ""
    assert "add --config.chat.llm=FOLDER" in error_of(check_objective, config, training=True)
    evaluation = recipe("mvbench", variant)
    assert (evaluation.eval.task, evaluation.eval.prompt) == ("mvbench", "videochat2")


@pytest.mark.parametrize(
    "override, message",
    [
        ("model.classes=400", "captions have no classes; leave it 1"),
        ("train.cutmix=1.0", "config.train.cutmix: flux_clip has no such thing"),
        ("data.repeated_aug=2", "clips of one video would be each other's positives"),
        ("data.holdout_fraction=0.1", "leaves no videos out"),
        ("model.selector.rounding=official", "exact budgets only"),
        ("train.multi_label=True", "no more than one label a video"),
        ("eval.clips=4", "no frames in the middle of its segments"),
        ("eval.crops=3", "squeeze makes one view, not 3"),
        ("clip.network=CLIP-L", "none of MobileCLIP-B, Ti"),
        ("clip.temperature=0.0", "must be above 0"),
        ("optim.schedule=linear", "none of cosine, cosine_floor"),
    ],
)
def test_mistakes_in_flux_clip(override, message):
    def check():
        check_objective(recipe("clip", "base", [f"--config.{override}"]))

    assert message in error_of(check)


@pytest.mark.parametrize(
    "override, message",
    [
        ("model.classes=400", "knows of no classes; leave it 1"),
        ("train.mixup=0.8", "config.train.mixup: distillation has no such thing"),
        ("data.validation=val.csv", "no classifier that could be evaluated"),
        ("data.holdout_fraction=0.1", "leaves no videos out"),
        ("data.grids.tokens=(1024, 4096)", "1024 tokens cannot fill the teacher's 2048"),
        ("train.budgets=(3072, 2048)", "cannot see 3072 of the teacher's 2048"),
        ("model.selector.rounding=official", "exact budgets only"),
        ("distill.teacher_blocks=(23, 26, 29, 33, 36, 40)", "of 40 from 0 to 39"),
        ("distill.teacher_blocks=(26, 23, 29, 33, 36, 39)", "in ascending order"),
        ("distill.student_blocks=(10, 11)", "2 blocks for 6 of distill.teacher_blocks"),
        ("distill.student_blocks=(-13, 11)", "of 12 from 0 to 11"),
        ("distill.network=InternVideo2-2B", "none of InternVideo2-Ti, InternVideo2-1B"),
        ("distill.resolution=225", "no multiple of the patch size 14"),
        ("distill.mask=tube", "none of attention, attention_topk, random"),
        ("data.augment.scale=(0.5,1.0)", "multi_scale has crops of its own; leave it (0.08, 1.0)"),
        ("data.augment.ratio=(0.9,1.1)", "or set data.augment.crop=random_resized"),
        (
            "data.sampling=balanced",
            "objective flux_umt trains without labels",
        ),
        ("train.class_weights=balanced", "so it has no classes to balance"),
        ("train.freeze=backbone", "config.train.freeze: objective flux_umt trains the whole"),
    ],
)
def test_mistakes_in_distillation(override, message):
    def check():
        check_objective(recipe("pretrain", "base", [f"--config.{override}"]))

    error = error_of(check)
    assert message in error and "\n" not in error


def test_what_would_train_nothing_is_refused():
    config = default_config()
    config.train.freeze = "all"
    assert '"all" leaves nothing of it' in error_of(check_objective, config)
    check_objective(recipe("clip", "base", ["--config.train.freeze=all"]))


def test_an_unknown_objective_is_refused():
    config = default_config()
    config.train.objective = "flux_multy"
    error = error_of(check_objective, config)
    # Other tests may have registered one of their own.
    known = "flux_chat, flux_clip, flux_multi, flux_umt"
    assert error.startswith(f"config.train.objective: 'flux_multy' is none of {known}")


# Published numbers: paper's table 15, released K400 script, InternVideo2-S's SSv2 script.
# clips a step, epochs, warm-up, rate for 256 clips, smoothing, mixup, cutmix, erasing, flip
PUBLISHED = {
    "k710:small": (1024, 35, 5, 2e-4, 0, 0, 0, 0, 0.5),
    "k710:base": (1024, 20, 5, 2e-4, 0, 0, 0, 0, 0.5),
    "k400:small": (512, 5, 1, 2e-4, 0, 0, 0, 0, 0.5),
    "k400:base": (512, 3, 1, 2e-4, 0, 0, 0, 0, 0.5),
    "k400:base,recipe=paper": (512, 3, 1, 2e-4, 0, 0, 0, 0, 0.5),
    "k400:base,recipe=released": (1024, 5, 1, 2e-4, 0.1, 0.8, 1, 0.25, 0.5),
    "coin:small": (512, 40, 5, 5e-4, 0, 0, 0, 0, 0.5),
    "coin:base": (512, 25, 5, 5e-4, 0, 0, 0, 0, 0.5),
    "ssv2:small": (512, 30, 5, 5e-4, 0.1, 0.8, 1, 0.25, 0),
}


@pytest.mark.parametrize("which", PUBLISHED)
def test_recipes_hold_the_published_numbers(which):
    name, options = which.split(":")
    config = recipe(name, options)
    train, optim = config.train, config.optim
    batch, epochs, warmup, rate, smoothing, mixup, cutmix, erase, flip = PUBLISHED[which]
    assert (train.batch_size, train.epochs, train.warmup_epochs) == (batch, epochs, warmup)
    assert optim.learning_rate == pytest.approx(rate * batch / 256)
    assert optim.min_learning_rate == pytest.approx(1e-6 * batch / 256)
    assert (train.label_smoothing, train.mixup, train.cutmix) == (smoothing, mixup, cutmix)
    assert (train.random_erasing, config.data.augment.flip) == (erase, flip)
    assert (optim.b1, optim.b2, optim.weight_decay, optim.layer_decay) == (0.9, 0.999, 0.05, 0.75)
    assert config.model.drop_path == 0.1
    assert config.data.augment.scale == (0.08, 1)
    views = (2, 3) if name == "ssv2" else (4, 3)
    assert (config.eval.clips, config.eval.crops) == views


def test_the_released_recipe_has_the_official_rate_and_augmentation():
    config = recipe("k400", "base,recipe=released")
    assert config.optim.learning_rate == pytest.approx(8e-4)
    assert config.data.repeated_aug == 2
    assert config.data.augment.randaugment == "rand-m7-n4-mstd0.5-inc1"
    assert config.data.clips_per_grid == 16  # 8 videos of a GPU, each twice


@pytest.mark.parametrize("name", CLASSES)
def test_evaluation_chooses_from_more_tokens_than_each_budget(name):
    settings = recipe(name).eval.settings
    assert [setting[0] for setting in settings] == [3072, 2048, 1024, 512]
    for budget, frames, resolution in settings:
        assert 1.5 <= frames * (resolution // 14) ** 2 / budget <= 2.3


def test_a_recipe_for_a_laptop_needs_no_weights():
    config = recipe("custom", "tiny", ["--config.data.train=list.csv"])
    validate_for_training(config)
    assert config.model.variant == "Ti"
    assert "tiny has no options" in error_of(recipe, "custom", "tiny,single=128")


def test_a_recipe_that_starts_from_weights_asks_for_them():
    config = recipe("k400", overrides=["--config.data.train=list.csv"])
    assert "--config.train.init_from=CHECKPOINT" in error_of(validate_for_training, config)
    scratch = ["--config.data.train=list.csv", "--config.train.init_from="]
    validate_for_training(recipe("k400", overrides=scratch))
    blind = recipe("k400", overrides=[*scratch, "--config.train.early_stopping_epochs=2"])
    assert "add --config.data.validation=LIST" in error_of(validate_for_training, blind)
    frozen = recipe("k400", overrides=[*scratch, "--config.train.freeze=backbone"])
    assert "backbone would keep random weights" in error_of(validate_for_training, frozen)
    assert "--config.data.train" in error_of(validate_for_training, recipe("k400"))


# --- Overrides


def test_overrides_of_every_type():
    config = recipe(
        "k400",
        overrides=[
            "--config.train.epochs=7",
            "--config.train.warmup_epochs=2",
            "--config.optim.learning_rate",
            "3e-4",
            "--config.data.root=/videos",
            "--noconfig.model.scan",
            "--config.data.augment.scale=(1,1)",
            "--config.eval.settings=((1024,12,168),)",
        ],
    )
    assert (config.train.epochs, config.train.warmup_epochs) == (7, 2.0)
    assert config.optim.learning_rate == 3e-4
    assert config.data.root == "/videos"
    assert config.model.scan is False
    assert config.data.augment.scale == (1, 1)
    assert config.eval.settings == ((1024, 12, 168),)


def test_a_variant_from_the_command_line_brings_its_native_grid():
    model = recipe("k400", overrides=["--config.model.variant=S"]).model
    assert (model.frames, model.resolution) == (24, 252)
    given = ["--config.model.variant=S", "--config.model.frames=8"]
    model = recipe("k400", overrides=given).model
    assert (model.frames, model.resolution) == (8, 252)


# An override of k400 and what the message must say.
WRONG = {
    "train.epoch=3": "config.train.epoch: no such field; did you mean train.epochs?",
    "epochs=3": "did you mean train.epochs?",
    "trian.epochs=3": "did you mean train.epochs?",
    "optim.learning_rat=1": "did you mean optim.learning_rate?",
    "data.clips_per_gird=4": "did you mean data.clips_per_grid?",
    "train=3": "config.train is a section",
    "train.epochs=abc": "config.train.epochs: 'abc' is not a whole number",
    "train.epochs=1.5": "config.train.epochs: '1.5' is not a whole number",
    "optim.b1=high": "config.optim.b1: 'high' is not a number",
    "model.scan=maybe": "config.model.scan: 'maybe' is not true or false",
    "train.budgets=many": "config.train.budgets",
    "data.grids.frames=(6,24)": """'(6,24)' is not a range "start..last..step", such as""",
    "data.grids.frames=(6,24,2)": 'step write "6..24..2", for a list of values "2,6,24"',
    "data.grids.frames=6,24,2": 'step write "6..24..2", for a list of values "2,6,24"',
    "search.frames=(6, 8, 10)": "(6, 8, 10) can be read in two ways: for start, last",
    "search.resolutions=[112,336,28]": 'step write "112..336..28"',
    "search.frames=6:10:2": 'such as "6..24..2", or a list that rises, such as "6,8,12"',
    "search.frames=6,8,8": 'for a list of values "6,8"',
    "search.frames=0,8": "'0,8' is not a range",
    "search.frames=0..8": "0..8 is empty or not above 0",
    "search.frames=-4..8": "'-4..8' is not a range",
    "search.frames=": "'' is not a range",
    "data.augment.scale=(0.1,'a')": "config.data.augment.scale",
    "eval.settings=(1024,12,168)": "(budget, frames, resolution)",
    "eval.settings=((1024,12),)": "(budget, frames, resolution)",
    "model.variant=H": "none of Ti, S, B, L",
    "model.gelu=relu": "none of tanh, erf",
    "model.selector.kind=best": "group_dynamic",
    "model.drop_path=1": "at least 0 and below 1",
    "train.ema_decay=1": "config.train.ema_decay",
    "train.epochs=0": "config.train.epochs: 0 must be above 0",
    "seed=-1": "config.seed: -1 must be between 0 and 2^32 - 1",
    "seed=4294967296": "config.seed: 4294967296 must be between 0 and",
    "optim.learning_rate=inf": "config.optim.learning_rate: inf must be finite",
    "data.clip_seconds=nan": "config.data.clip_seconds: nan must be finite",
    "data.augment.flip=2": "between 0 and 1",
    "data.augment.scale=(0.5,0.1)": "the lower end 0.5 is above",
    "data.augment.randaugment=strong": "config.data.augment.randaugment",
    "data.grids.frames=6..24..0": "6..24..0 is empty or not above 0",
    "data.grids.frames=24..6..2": "24..6..2 is empty",
    "data.grids.resolutions=112..336..20": "no multiple of the patch size 14",
    "data.grids.tokens=(9,10)": "no grid has between 9 and 10 tokens",
    "model.resolution=250": "the nearest is 252",
    "model.classes=-1": "config.model.classes: -1 must be 0 or more",
    "eval.settings=((1024,12,170),)": "170 px is no multiple of the patch size 14",
    "eval.settings=((1024,0,168),)": "must be above 0",
    "eval.settings=((1024,12,168),(1024,4,224))": "1024 tokens twice",
    "train.batch_size=100": "the nearest that does is 96",
    "train.grad_accum_steps=3": "train.grad_accum_steps=3",
    "data.repeated_aug=3": "no multiple of data.repeated_aug=3",
    "train.budgets=(1024,2048)": "largest first",
    "train.budgets=(4000,3000,2000,1000)": "at most 3",
    "train.budgets=6145": "no grid can fill 6145 tokens",
    "model.selector.kind=none": "none keeps every token",
    "train.class_weights=equal": "'equal' is none of none, balanced",
    "data.sampling=even": "'even' is none of uniform, balanced",
    "train.early_stopping_epochs=-1": "0 or more",
    "train.freeze=head": "none of none, backbone, all_but_head, all, nor a number of blocks",
    "train.freeze=0": "nor a number of blocks above 0",
    "train.freeze=13": "13 blocks are more than FluxViT-B has, 12",
    "train.warmup_epochs=4": "more than train.epochs=3",
    "optim.min_learning_rate=1": "above optim.learning_rate",
}


@pytest.mark.parametrize("override", WRONG)
def test_a_wrong_override_is_one_line_that_names_the_field(override):
    assert WRONG[override] in error_of(load_config, K400, [f"--config.{override}"])


def test_no_selection_needs_grids_and_settings_within_the_budget():
    fixed = [
        "--config.model.selector.kind=none",
        "--config.data.grids.frames=8",
        "--config.data.grids.resolutions=224",
        "--config.data.grids.tokens=(2048,2048)",
        "--config.train.budgets=2048",
    ]
    message = error_of(load_config, K400, fixed)
    assert "20 frames of 224 px have 5120 tokens" in message
    config = load_config(K400, [*fixed, "--config.eval.settings=((2048,8,224),(1024,4,224))"])
    assert [grid.tokens for grid in admissible_grids(config)] == [2048]


def test_a_budget_above_the_tokens_of_an_evaluation_keeps_all():
    config = load_config(K400, ["--config.eval.settings=((3072,4,112),)"])
    ((budget, grid, _),) = settings_of(config)
    assert kept_tokens(grid, budget) == grid.tokens == 4 * 8 * 8


def test_mixing_needs_a_group():
    overrides = ["--config.data.clips_per_grid=1", "--config.train.mixup=0.8"]
    assert "mixup" in error_of(load_config, K400, overrides)
    config = load_config(K400, overrides[:1])
    assert (config.data.clips_per_grid, config.train.mixup, config.train.cutmix) == (1, 0, 0)


def test_classes_are_balanced_in_one_way_only():
    both = ["--config.data.sampling=balanced", "--config.train.class_weights=balanced"]
    assert "set one of the two" in error_of(load_config, K400, both)


def test_only_the_group_dynamic_selector_has_groups():
    overrides = ["--config.model.selector.kind=tube", "--config.model.selector.groups=2"]
    assert "config.model.selector.groups" in error_of(load_config, K400, overrides)


def test_the_selectors_of_the_config_are_those_of_the_network():
    assert FIELDS["model.selector.kind"].choices == SELECTORS
    assert FIELDS["distill.mask"].choices == MASKS
    assert FIELDS["model.selector.rounding"].choices == get_args(Rounding)


# --- Recipe files


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("huge", "'huge' is none of small, base, large"),
        ("base,singel=2048", "'singel=2048' is not single=TOKENS or recipe=paper|released"),
        ("base,single=few", "single=TOKENS"),
        ("base,recipe=mine", "'mine' is none of paper, released"),
    ],
)
def test_a_wrong_option_of_a_recipe(options, message):
    assert message in error_of(load_config, f"{K400}:{options}")


def test_a_missing_recipe_names_the_nearest():
    message = error_of(load_config, str(CONFIGS / "k40.py"))
    assert f"did you mean {K400}?" in message


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("config.train.epoch = 3", "config.train.epoch: no such field; did you mean train.epochs"),
        ("config.trian.epochs = 3", "mine.py, line 4: AttributeError"),
        ("config.train.epochs = 'x'", "mine.py, line 4: TypeError"),
        (
            "config.data.grids.frames = (6, 24, 2)",
            '(6, 24, 2) can be read in two ways: for start, last and step write "6..24..2", '
            'for a list of values "2,6,24"',
        ),
        ("config.search.frames = [6, 8, 10]", 'step write "6..8..10", for a list of values "6,8,1'),
        ("return 3", "get_config returns int"),
        ("del config.train.epochs", "config.train.epochs is missing"),
        ("import nothing_of_this_name", "mine.py, line 4: ModuleNotFoundError"),
        ("if config", "SyntaxError"),
    ],
)
def test_a_faulty_recipe_names_its_line(tmp_path, body, message):
    file = tmp_path / "mine.py"
    file.write_text(
        "from fluxvit_jax.config.fields import default_config\n"
        "def get_config():\n"
        "    config = default_config()\n"
        f"    {body}\n"
        "    return config\n"
    )
    assert message in error_of(load_config, str(file))


# --- Difference of two runs


def test_difference_names_what_makes_another_model():
    old = json.loads(json.dumps(recipe("k400", "base").to_dict()))
    assert config_difference(old, recipe("k400", "base").to_dict()) == []
    new = recipe("k400", "base", ["--config.train.epochs=2", "--config.train.budgets=2048"])
    assert config_difference(old, new.to_dict()) == [
        "train.budgets: (3072, 2048, 1024) -> (2048,)",
        "train.epochs: 3 -> 2",
    ]
    del old["train"]["align_weight"]
    assert config_difference(old, recipe("k400").to_dict()) == [
        "train.align_weight: (absent) -> 1.0"
    ]


def test_a_run_may_be_trained_for_more_epochs():
    longer = recipe("k400", "base", ["--config.train.epochs=5"])
    assert config_difference(recipe("k400").to_dict(), longer.to_dict()) == []


def test_difference_leaves_out_what_may_change():
    changes = [
        "--config.log.every_steps=1",
        "--config.checkpoint.keep=9",
        "--config.eval.clips=1",
        "--config.eval.settings=((512,8,168),)",
        "--config.data.root=/elsewhere",
        "--config.data.workers=0",
        "--config.model.remat=full",
    ]
    assert config_difference(recipe("k400").to_dict(), recipe("k400", "base", changes)) == []
    may_change = {name for name, field in FIELDS.items() if field.may_change}
    sections = {"log", "checkpoint", "eval", "search", "parallel", "preflight"}
    assert {name for name in FIELDS if name.split(".")[0] in sections} < may_change
    trained = {name for name in may_change if name.split(".")[0] in ("optim", "train")}
    # They end a run, and change no step of it.
    assert trained == {"train.early_stopping_epochs", "train.max_nonfinite"}


def test_renamed_fields_are_read_from_old_runs_and_named_in_errors():
    error = error_of(load_config, K400, ["--config.train.align=0"])
    assert error == "config.train.align is called train.align_weight now"
    old = recipe("k400").to_dict()
    for before, now in RENAMED.items():
        section, name = now.split(".")
        old[section][before.split(".")[1]] = old[section].pop(name)
    old["train"] |= {"objective": "supervised", "compiled_steps": 1}
    assert config_difference(old, recipe("k400").to_dict()) == []
    assert from_dict(old).to_dict() == recipe("k400").to_dict()


def test_a_run_from_before_a_field_goes_on_with_its_default():
    old = recipe("k400").to_dict()
    for name in ADDED:
        section, field = name.split(".")
        del old[section][field]
    assert config_difference(old, recipe("k400").to_dict()) == []
    frozen = recipe("k400", overrides=["--config.train.freeze=3"])
    assert config_difference(old, frozen.to_dict()) == ["train.freeze: none -> 3"]


def test_every_field_is_described_and_its_default_is_right():
    assert flatten(default_config()).keys() == FIELDS.keys()
    for name, field in FIELDS.items():
        assert field.help and "\n" not in field.help, name
        assert not field.rule(field.default), name


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "is not the config of a run"),
        ("null", "is not the config of a run"),
        ("5", "is not the config of a run"),
        ('{"train": null}', "is not the config of a run"),
        ('{"train": [1]}', "is not the config of a run"),
        ('{"chat": null, "train": {"objective": "flux_chat"}}', "is not the config of a run"),
        ('{"data": {"grids": 3}}', "is not the config of a run"),
        ('{"train": {"objective": []}}', "is not the config of a run"),
        ('{"train": {"epochs": "5"}}', "config.train.epochs: '5' is not a whole number"),
        ('{"optim": {"b1": null}}', "config.optim.b1: None is not a number"),
        ('{"train": {"budgets": ["a"]}}', "config.train.budgets: ['a'] is not one or more whole"),
    ],
)
def test_a_config_of_a_run_that_is_none(tmp_path, content, message):
    path = epath.Path(tmp_path / "config.json")
    path.write_text(content)
    for reader in (read_config, stored_recipe.is_run, stored_recipe.get_config):
        error = error_of(reader, epath.Path(tmp_path))
        assert error.startswith(f"{path}: ") and message in error
    assert message in error_of(check_workdir, epath.Path(tmp_path), recipe("k400"))


# --- As a program


def test_of_a_flag_that_is_given_twice_the_last_holds(tmp_path, capsys):
    for name, epochs in (("a", 3), ("b", 7)):
        (tmp_path / name).mkdir()
        config = recipe("k400", "base", [f"--config.train.epochs={epochs}"])
        write_config(epath.Path(tmp_path / name), config)
    twice = [f"--workdir={tmp_path}/a", "--workdir", f"{tmp_path}/b"]
    assert programs.run_module("fluxvit_jax.main", *twice, "--print_config") == 0
    assert json.loads(capsys.readouterr().out)["train"]["epochs"] == 7
    modes = ["main", "--mode=train", "--mode=export", twice[0]]
    assert command_line.resolved(modes) == modes  # of weights: no recipe is put in


def test_two_recipes_are_one_too_many():
    lines = (["--config=demo", "--config", "k400"], ["--config=demo", "--config=demo:single"])
    for line in lines:
        assert "leave one of them out" in error_of(command_line.resolved, ["main", *line])
    same = ["main", "--config=k400", "--config=k400"]
    assert len(set(command_line.resolved(same)[1:])) == 1


def test_a_workdir_that_is_no_run_is_named(tmp_path, capsys):
    """And not the field of its config, which is right."""
    field = "--config.search.split=x"
    typo = f"--workdir={tmp_path}/typo"
    assert programs.run_module("fluxvit_jax.main", "--mode=search", typo, field) == 2
    error = capsys.readouterr().err
    assert f"{typo}: there is no run whose config.search.split could be set" in error
    assert error.count("\n") == 1
    assert programs.run_module("fluxvit_jax.main", "--mode=search", field) == 2
    assert "--config.search.split: no recipe to set it in; add one" in capsys.readouterr().err


PROGRAM = """
import sys
from absl import app, flags
from fluxvit_jax.config import loading
from fluxvit_jax.errors import UserError

loading.define_flag()
flags.DEFINE_enum("mode", "train", ["train", "evaluate"], "what to do")
flags.DEFINE_string("workdir", None, "where")

def main(argv):
    print(flags.FLAGS.mode, flags.FLAGS.config.train.epochs, flags.FLAGS.config.model.variant)

if __name__ == "__main__":
    try:
        app.run(main, flags_parser=loading.parse_flags)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
"""


def test_a_program_gets_its_config_or_one_line(tmp_path):
    """One absl program, started anew for each command line as a user would."""
    (tmp_path / "program.py").write_text(PROGRAM)
    lines = {
        f"--mode=evaluate --config={K400}:small --config.train.epochs 3": "evaluate 3 S",
        f"--config={K400} --config.train.epohcs=3": "did you mean train.epochs?",
        f"--config={K400} --wrokdir=x": "Unknown command line flag 'wrokdir'",
        f"--config={K400} --mode=trian": "flag --mode=trian",
        f"--config.train.epochs=3 --config={K400}": "before a value for --config was specified",
    }
    running = {
        line: limited.Process(
            [sys.executable, "program.py", *line.split()],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for line in lines
    }
    for line, process in running.items():
        out, err = process.communicate()
        good = "evaluate" in line
        assert process.returncode == (0 if good else 2), err
        assert lines[line] in (out if good else err)
        assert len((out if good else err).splitlines()) == 1


def test_loading_leaves_the_flags_of_the_program_alone():
    before = set(flags.FLAGS)
    load_config(K400)
    assert set(flags.FLAGS) == before
