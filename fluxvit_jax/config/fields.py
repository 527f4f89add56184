"""Table of all config fields: default, rule, help, and whether they may change on resume.

Defaults, validation, the check on resume and the documentation all come from `FIELDS`. To add a
field, add a line there.
"""

import itertools
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ml_collections import ConfigDict

from fluxvit_jax.config.randaugment import parse_randaugment
from fluxvit_jax.config.variants import TEACHERS, TEXT_ENCODERS, VARIANTS
from fluxvit_jax.errors import UserError
from fluxvit_jax.grids import PATCH

# The value of train.init_from in a recipe that only makes sense from trained weights.
REQUIRED = "REQUIRED"
MVBENCH_PROMPTS = ("videochat2", "lmms_eval")
CROP_RANGES = ("scale", "ratio")  # of data.augment, for the crop "random_resized" only

Rule = Callable[[Any], str | None]  # value -> what is wrong, to follow "config.NAME: "


@dataclass(frozen=True, slots=True)
class Field:
    """A field of a config; its type is that of its default.

    Attributes:
        rule: check of a value of that type.
        help: one line, for people.
        may_change: whether a resumed run may have another value. Another value of any other field
            makes another model.
        may_grow, may_fall: whether it may have a larger or a smaller value.
        choices: the allowed values of a field made by `one_of`.
        step: the default step of a range, in a field made by `numbers`.
    """

    default: Any
    help: str
    rule: Rule = lambda value: None
    may_change: bool = False
    may_grow: bool = False
    may_fall: bool = False
    choices: tuple[str, ...] = ()
    step: int = 0


# ---------------------------------------------------------------------------------------------
# Rules


def _each(right: Callable[[Any], bool], words: str) -> Rule:
    """A rule for a number, or for each number of a tuple."""

    def rule(value: Any) -> str | None:
        values = value if isinstance(value, tuple | list) else [value]
        if any(isinstance(own, float) and not math.isfinite(own) for own in values):
            return f"{value} must be finite"
        return None if all(map(right, values)) else f"{value} must be {words}"

    return rule


positive = _each(lambda value: value > 0, "above 0")
negative = _each(lambda value: value < 0, "below 0")
not_negative = _each(lambda value: value >= 0, "0 or more")
seed = _each(lambda value: 0 <= value < 2**32, "between 0 and 2^32 - 1")  # others repeat these
share = _each(lambda value: 0 <= value <= 1, "between 0 and 1")
share_below_one = _each(lambda value: 0 <= value < 1, "at least 0 and below 1")
mesh_side = _each(lambda side: side == -1 or side > 0, "above 0, or -1 for all that are left")


def positive_share(value: Any) -> str | None:
    """A rule: above 0 and at most 1."""
    return positive(value) or share(value)


def bounds(rule: Rule) -> Rule:
    """A rule for the lower and the upper end of an interval."""

    def both(value: Any) -> str | None:
        low, high = value
        if problem := rule(value):
            return problem
        return f"the lower end {low} is above the upper end {high}" if low > high else None

    return both


def one_of(*choices: str, help: str, default: str = "", may_change: bool = False) -> Field:
    """A field with a few allowed texts; the first of them is the default unless one is named."""

    def rule(value: str) -> str | None:
        return None if value in choices else f"{value!r} is none of {', '.join(choices)}"

    return Field(default or choices[0], help, rule, may_change, choices=choices)


def _freeze(text: str) -> str | None:
    if text in ("none", "backbone", "all_but_head", "all") or re.fullmatch(r"[1-9]\d*", text):
        return None
    return f"{text!r} is none of none, backbone, all_but_head, all, nor a number of blocks above 0"


def numbers(default: str, step: int, help: str, may_change: bool = False) -> Field:
    """A field that lists or spans whole numbers above 0; see `numbers_of`."""

    def rule(value: str) -> str | None:
        try:
            _parse_numbers(value, step)
        except ValueError as error:
            return str(error)
        return None

    return Field(default, help, rule, may_change, step=step)


def _randaugment(text: str) -> str | None:
    try:
        if text:
            parse_randaugment(text)
    except UserError as error:
        return str(error)
    return None


def _steps(text: str) -> str | None:
    try:
        step_range(text)
    except ValueError as error:
        return str(error)
    return None


def step_range(text: str) -> range:
    """The steps from the first to the last of "10,20"; none of "". Raises ValueError."""
    match = re.fullmatch(r"(\d+),(\d+)", text)
    if match and 0 < int(match[1]) <= int(match[2]):
        return range(int(match[1]), int(match[2]) + 1)
    if text:
        raise ValueError(f'{text!r} is not the first and the last step, such as "10,20"')
    return range(0)


def _parse_numbers(text: str, step: int) -> tuple[int, ...]:
    """The numbers of a range "6..24..2" or a list "6,8,12". Raises ValueError."""
    kind = 'a range "start..last..step", such as "6..24..2", or a list that rises, such as "6,8,12"'
    if match := re.fullmatch(r"(\d+)\.\.(\d+)(?:\.\.(\d+))?", text):
        first, last, step = int(match[1]), int(match[2]), int(match[3] or step)
        if not 0 < first <= last or not step:
            raise ValueError(f"{text} is empty or not above 0; write {kind}")
        return tuple(range(first, last + 1, step))
    if re.fullmatch(r"\d+(,\d+)*", text):
        listed = tuple(map(int, text.split(",")))
        if listed[0] > 0 and all(a < b for a, b in itertools.pairwise(listed)):
            return listed
    hint = hint_at_range(text)
    raise ValueError(f"{text}{hint}" if hint else f"{text!r} is not {kind}")


def hint_at_range(text: str) -> str:
    """Advice for "(6, 24, 2)", the form that ranges once had; "" for any other text."""
    match = re.fullmatch(r"[(\[]?\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*[)\]]?", text)
    if not match:
        return ""
    listed = sorted({int(number) for number in match.groups()})
    return (
        f' can be read in two ways: for start, last and step write "{"..".join(match.groups())}", '
        f'for a list of values "{",".join(map(str, listed))}"'
    )


# ---------------------------------------------------------------------------------------------
# The table

# Some defaults follow the variant of the network: see `default_config`.
FIELDS: dict[str, Field] = {
    "seed": Field(0, "of everything random", seed),
    # model
    "model.variant": one_of(*VARIANTS, default="B", help="size of the network"),
    "model.classes": Field(
        400, "classes of the classifier; 0: as many as the data have", not_negative
    ),
    "model.frames": Field(32, "frames of the position table's native grid", positive),
    "model.resolution": Field(280, "pixels of the position table's native grid", positive),
    "model.gelu": one_of(
        "tanh", "erf", help='"tanh": the released weights\'; "erf": golden data\'s'
    ),
    "model.cls": one_of(
        "outside", "inside", help='CLS counts in the budget ("inside", for TPU) or not (official)'
    ),
    "model.drop_path": Field(0.1, "stochastic depth of the last block", share_below_one),
    "model.dtype": one_of("bfloat16", "float32", help="of the computation; parameters are float32"),
    "model.scan": Field(
        True, "scan over the blocks: quick to compile; false: quicker steps", may_change=True
    ),
    "model.remat": one_of(
        "none", "names", "full", help="what the backward pass recomputes", may_change=True
    ),
    "model.attention": one_of(
        "auto",
        "xla",
        "chunked",
        "pallas",
        "splash",
        "cudnn",
        help='kernel of attention; "auto": the fastest of the platform',
        may_change=True,
    ),
    "model.selector.kind": one_of(
        "group_dynamic",
        "dynamic_l1",
        "dynamic_l2",
        "tube",
        "random",
        "none",
        help="how tokens are selected (paper, table 2)",
    ),
    "model.selector.groups": Field(
        0, "groups of frames; 0: by the rule, as many as 4, 2 or 1", not_negative
    ),
    "model.selector.rounding": one_of(
        "exact", "official", help='"official" loses up to four tokens of a budget'
    ),
    # data
    # Moved videos are the same: checkpoints know them by ids, labels and classes.
    "data.train": Field(
        "", "CSV or text list, folder of class folders, or prepared folder", may_change=True
    ),
    "data.validation": Field("", "likewise, to evaluate on", may_change=True),
    "data.root": Field("", "folder that the paths of lists are relative to", may_change=True),
    "data.class_names": Field(
        "", "class names: a file with one a line, or a data set's, such as k400", may_change=True
    ),
    "data.grids.frames": numbers(
        "6..24..2", 1, 'frames of the grids: start..last..step, or a list "6,8,12"'
    ),
    "data.grids.resolutions": numbers("112..336..28", PATCH, "pixels of the grids, likewise"),
    "data.grids.tokens": Field((2048, 6144), "fewest and most tokens of a grid", bounds(positive)),
    "data.clips_per_grid": Field(8, "clips that share a grid", positive),
    "data.holdout_fraction": Field(
        0.0, "share of the training list left out, for a search to choose on", share_below_one
    ),
    "data.repeated_aug": Field(1, "augmented clips of one decoded video", positive),
    "data.sampling": one_of(
        "uniform", "balanced", help='"balanced": every class is drawn equally often'
    ),
    "data.sampling_period_epochs": Field(
        0, "epochs after which grids, frames and crops repeat; 0: never", not_negative
    ),
    "data.workers": Field(2, "processes that read videos; 0: none", not_negative, may_change=True),
    "data.clip_seconds": Field(
        60.0,
        "time limit of a worker for a clip, which counts as unreadable then; 0: none. Without "
        "workers there is none",
        not_negative,
        may_change=True,
    ),
    "data.max_bad_fraction": Field(
        0.05, "unreadable clips: a larger share ends training, else warns", share, may_change=True
    ),
    "data.augment.crop": one_of(
        "random_resized",
        "multi_scale",
        help='"multi_scale": sides of 1, 0.875, 0.75 or 0.66 of the short side',
    ),
    "data.augment.scale": Field(
        (0.08, 1.0), 'of "random_resized": share of the area cropped', bounds(positive_share)
    ),
    "data.augment.ratio": Field(
        (3 / 4, 4 / 3), "likewise, width over height of a crop", bounds(positive)
    ),
    "data.augment.flip": Field(0.5, "probability of a horizontal flip", share),
    "data.augment.randaugment": Field("", 'as timm: "rand-m7-n4-mstd0.5-inc1"', _randaugment),
    # train
    "train.objective": Field(
        "flux_multi",
        'a file of objectives/; "flux_umt" learns from a teacher, "flux_clip" from captions, '
        '"flux_chat" puts videos before a language model',
    ),
    "train.batch_size": Field(512, "clips a step over all devices, repeats included", positive),
    "train.epochs": Field(5, "epochs of the whole run", positive, may_grow=True),
    "train.warmup_epochs": Field(1.0, "epochs in which the learning rate rises", not_negative),
    "train.budgets": Field(
        (3072, 2048, 1024), "tokens; budget i ends in head i; one: Flux-Single", positive
    ),
    "train.align_weight": Field(
        1.0, 'weight of the alignment loss, of "flux_multi" and "flux_clip"', not_negative
    ),
    "train.label_smoothing": Field(0.0, "share spread over all classes", share_below_one),
    "train.class_weights": one_of(
        "none", "balanced", help='in the loss; "balanced": rare classes count more, by frequency'
    ),
    "train.multi_label": Field(
        False,
        'several labels a video, in lists as "0|3|7": binary cross entropy of sigmoids, measured '
        "by mAP",
    ),
    "train.mixup": Field(0.0, "parameter of mixup's Beta distribution; 0: off", not_negative),
    "train.cutmix": Field(0.0, "parameter of CutMix's Beta distribution; 0: off", not_negative),
    "train.mixup_probability": Field(1.0, "share of groups that are mixed", share),
    "train.random_erasing": Field(0.0, "probability of random erasing", share),
    "train.ema_decay": Field(
        0.0, "decay of the parameters' average; 0: none is kept", share_below_one
    ),
    "train.grad_accum_steps": Field(1, "parts of a batch whose gradients are added", positive),
    "train.init_from": Field(
        "", "weights to start from, of any form, hf://OWNER/NAME or builtin://ti"
    ),
    "train.max_nonfinite": Field(
        10,
        "steps in a row whose loss or gradient is not finite, after which training ends; until "
        "then they are skipped",
        positive,
        may_change=True,
    ),
    "train.early_stopping_epochs": Field(
        0,
        "epochs without a better validation accuracy after which training ends; 0: never",
        not_negative,
        may_change=True,
    ),
    "train.freeze": Field(
        "none",
        '"backbone": train pooling and head (attentive probe); "all_but_head": the head alone '
        '(linear probe); "6": not the embeddings and the first 6 blocks; "all": only what the '
        "objective adds",
        _freeze,
    ),
    # distill: of train.objective "flux_umt" only
    "distill.teacher": Field("", "weights of the teacher", may_change=True),
    "distill.network": one_of(
        *TEACHERS, *VARIANTS, default="InternVideo2-1B", help="network of the teacher"
    ),
    "distill.frames": Field(4, "frames of the teacher's position table", positive),
    "distill.resolution": Field(224, "pixels of the teacher's position table", positive),
    "distill.gelu": one_of("tanh", "erf", help="of the teacher"),
    "distill.tokens": Field(
        2048, "of a clip that the teacher sees; students see train.budgets of these", positive
    ),
    "distill.selector_features": one_of(
        "teacher", "student", help="whose patch embedding the selector looks at"
    ),
    "distill.mask": one_of(
        "attention", "attention_topk", "random", help="how students' tokens are drawn"
    ),
    "distill.student_blocks": Field(
        (-6, -5, -4, -3, -2, -1), "blocks compared, from 0 or from the end"
    ),
    "distill.teacher_blocks": Field((23, 26, 29, 33, 36, 39), "likewise, of the teacher"),
    "distill.feature_loss_weight": Field(
        1.0, "weight of the tokens' distance in the loss", not_negative
    ),
    "distill.clip_loss_weight": Field(
        1.0, "weight of the clip vectors' distance in the loss", not_negative
    ),
    "distill.cache": Field(
        "", "folder of --mode=cache: the teacher's targets of a fixed plan", may_change=True
    ),
    # clip: of train.objective "flux_clip" only
    "clip.text_encoder": Field(
        "",
        "weights of the text encoder: of MobileCLIP, open_clip or InternVideo2 CLIP; "
        '"": random ones',
        may_change=True,
    ),
    "clip.network": one_of(*TEXT_ENCODERS, help="size of the text encoder"),
    "clip.train_text": Field(False, "train the text encoder too; a frozen one is in no checkpoint"),
    "clip.temperature": Field(
        0.01,
        'initial temperature, a parameter; a run of "flux_clip" in train.init_from has its own',
        positive,
    ),
    "clip.least_temperature": Field(
        0.01, "a temperature below it is moved back to it before each step", positive
    ),
    # chat: of train.objective "flux_chat" only
    "chat.llm": Field(
        "",
        "folder of the language model, as Hugging Face has them: config.json, *.safetensors, "
        "tokenizer.json; Qwen2, Qwen2.5, Qwen3 or Llama",
        may_change=True,
    ),
    "chat.train": one_of(
        "projector",
        "projector+llm",
        help="what learns; a frozen language model is in no checkpoint",
    ),
    "chat.step_budgets": one_of(
        "all", "one", help="which of train.budgets a step trains: all of them, or one, in turn"
    ),
    "chat.layer": Field(
        -2, "block of the video network, from the end, whose tokens are projected", negative
    ),
    "chat.merge": Field(
        16, "tokens merged into one for the language model, on average; 1: none", positive
    ),
    "chat.order": one_of(
        "time", "official", help="of merged tokens: as in the video, or as merging leaves them"
    ),
    "chat.frame_times": Field(
        False, 'a text such as "2.5s" stands before the tokens of each frame; takes chat.order=time'
    ),
    # Official: in the later stages of training and in inference. Stage 1 ("plain") has no question
    # that it could stand in.
    "chat.time_message": Field(
        True,
        "a first question begins with the length of the video and the number of frames; in "
        'training with "qwen"',
    ),
    "chat.template": one_of(
        "plain",
        "qwen",
        help='"plain": the video, then the answer (stage 1); "qwen": whole conversations',
    ),
    "chat.labels": one_of(
        "answers", "official", help='the official code also learns the marks of turns, with "qwen"'
    ),
    "chat.text_tokens": Field(128, "tokens of a text in training; longer ones are cut", positive),
    # optim
    "optim.schedule": one_of(
        "cosine",
        "cosine_floor",
        help='"cosine": warm-up from and half a cosine to the rates below; "cosine_floor": both '
        "from and to 0, but never below optim.min_learning_rate",
    ),
    "optim.learning_rate": Field(
        8e-4, "for the whole batch: nothing scales it later", positive, may_fall=True
    ),
    "optim.min_learning_rate": Field(1e-6, "at the end of the schedule", not_negative),
    "optim.warmup_learning_rate": Field(1e-6, "at the start of the warm-up", not_negative),
    "optim.b1": Field(0.9, "of AdamW", share_below_one),
    "optim.b2": Field(0.999, "of AdamW", share_below_one),
    "optim.eps": Field(1e-8, "of AdamW", positive),
    "optim.weight_decay": Field(0.05, "of AdamW, for the kernels of dense layers", not_negative),
    "optim.layer_decay": Field(
        0.75, "factor of the learning rate from block to block; 1: the same", positive_share
    ),
    "optim.clip_norm": Field(0.0, "largest norm of the gradient; 0: no clipping", not_negative),
    # eval: how the model is measured
    "eval.settings": Field(
        ((3072, 20, 224), (2048, 16, 196), (1024, 12, 168), (512, 8, 168)),
        "(budget, frames, pixels) of each evaluation",
        may_change=True,
    ),
    "eval.plan": Field(
        "", "report of a search, whose chosen cells replace eval.settings", may_change=True
    ),
    "eval.cascade": Field(
        "",
        "of a search: name of a cascade or cell, or a limit such as average_gflops=40 or "
        "average_milliseconds=8,milliseconds=20; or a .json file",
        may_change=True,
    ),
    "eval.adaptive": one_of(
        "cascade",
        "motion",
        help="what eval.cascade is of: cascades, or rules of how much moves in a video",
        may_change=True,
    ),
    "eval.clips": Field(4, "clips of a video", positive, may_change=True),
    "eval.crops": Field(3, "crops of a clip", positive, may_change=True),
    "eval.frames": one_of(
        "spread",
        "middle",
        help='of a clip: as in fine-tuning, or in the "middle" of segments, as InternVideo2 CLIP',
        may_change=True,
    ),
    "eval.resize": one_of(
        "crop",
        "squeeze",
        help='to a square: the middle, or "squeeze" the whole frame, as InternVideo2 CLIP does',
        may_change=True,
    ),
    "eval.seconds": Field(
        0.0, "of a video that count, from its beginning; 0: all", not_negative, may_change=True
    ),
    "eval.batch_size": Field(16, "videos at once over all devices", positive, may_change=True),
    "eval.task": one_of(
        "auto",
        "accuracy",
        "retrieval",
        "zero_shot",
        "multiple_choice",
        "mvbench",
        help='what to measure; "auto": accuracy, and retrieval of what was trained on captions; '
        '"zero_shot": accuracy by the names of the classes; "mvbench": questions with options, of '
        "a language model",
        may_change=True,
    ),
    "eval.prompt": one_of(
        *MVBENCH_PROMPTS,
        help="of MVBench's questions: as VideoChat2 asks them, or lmms-eval for VideoChat-Flash",
        may_change=True,
    ),
    "eval.dataset": Field("", "name of the videos in a report of retrieval", may_change=True),
    "eval.videos": Field(
        0,
        "videos that data.validation must have for retrieval; 0: any number",
        not_negative,
        may_change=True,
    ),
    "eval.texts": Field(0, "likewise, texts", not_negative, may_change=True),
    "eval.allow_missing": Field(
        False, "accept another number of videos or texts; the report says so", may_change=True
    ),
    "eval.paragraphs": Field(
        False, "a video's captions are sentences of one text", may_change=True
    ),
    "eval.dual_temperature": Field(
        1.0, "temperature of the dual softmax; 1 is official", positive, may_change=True
    ),
    "eval.prompts": Field(
        "",
        'file of prompts for zero_shot, one a line, with {} for the class; "": the official 16',
        may_change=True,
    ),
    "eval.every_epochs": Field(1, "epochs between evaluations", positive, may_change=True),
    # search: Token Optimization
    "search.budgets": Field((3072, 2048, 1024, 512), "tokens", positive, may_change=True),
    "search.frames": numbers("4..32..2", 1, "as data.grids.frames", may_change=True),
    "search.resolutions": numbers(
        "112..336..28", PATCH, "as data.grids.resolutions", may_change=True
    ),
    "search.heads": one_of(
        "nearest", "all", help="nearest to the budget, or all of them", may_change=True
    ),
    "search.merging": Field(False, "try token merging beside selection", may_change=True),
    "search.split": Field(
        "",
        'list to choose on; "": what data.holdout_fraction left out of data.train',
        may_change=True,
    ),
    "search.videos": Field(2000, "most videos to choose on; 0: all", not_negative, may_change=True),
    "search.strategy": one_of(
        "full",
        "halving",
        help='"halving": drop the worse half of the cells again and again',
        may_change=True,
    ),
    "search.cascade_steps": Field(
        3, "most steps of a cascade (adaptive budgets); 1: no cascades", positive, may_change=True
    ),
    "search.timed_batch": Field(8, "clips of the second timing", positive, may_change=True),
    # parallel: devices along each axis
    "parallel.mesh.data": Field(-1, "devices that split the clips", mesh_side, may_change=True),
    "parallel.mesh.fsdp": Field(
        1, "devices that split the clips and the training state", mesh_side, may_change=True
    ),
    "parallel.mesh.tensor": Field(
        1, "devices that split heads and hidden units", mesh_side, may_change=True
    ),
    # preflight
    "preflight.topology": Field(
        "current", 'or, with commas between, "v5e:4x4", "cpu:8", ...', may_change=True
    ),
    "preflight.find_max_batch_size": Field(
        True, "find the largest batch that fits as well", may_change=True
    ),
    "preflight.videos": Field(
        0, "videos to train on, where data.train is not at hand", not_negative, may_change=True
    ),
    # checkpoint and log
    "checkpoint.every_steps": Field(1000, "steps between checkpoints", positive, may_change=True),
    "checkpoint.keep": Field(
        2, "latest checkpoints that stay, besides the best", positive, may_change=True
    ),
    "log.every_steps": Field(20, "steps between two lines of metrics", positive, may_change=True),
    "log.watchdog_seconds": Field(
        1800,
        "without a finished step or batch until the program ends with status 75 and writes "
        "where it hangs; 0: it waits",
        not_negative,
        may_change=True,
    ),
    "log.wandb": Field(
        "", 'project of Weights & Biases to log to as well; "": none', may_change=True
    ),
    "log.profile_steps": Field(
        "", 'steps to trace into WORKDIR/profile, "first,last"; "": none', _steps, may_change=True
    ),
}

# Elements of a tuple, and how many there are (None: one or more).
TUPLES: dict[str, tuple[type, int | None]] = {
    "data.grids.tokens": (int, 2),
    "data.augment.scale": (float, 2),
    "data.augment.ratio": (float, 2),
    "train.budgets": (int, None),
    "distill.student_blocks": (int, None),
    "distill.teacher_blocks": (int, None),
    "eval.settings": (tuple, None),
    "search.budgets": (int, None),
}

# Of earlier versions: fields with new names, fields that are gone, and values with new names.
RENAMED = {
    "train.align": "train.align_weight",
    "train.ema": "train.ema_decay",
    "train.erase": "train.random_erasing",
    "train.accumulate": "train.grad_accum_steps",
    "data.repeats": "data.repeated_aug",
    "data.grid_group": "data.clips_per_grid",
    "data.held_out": "data.holdout_fraction",
    "data.plan_epochs": "data.sampling_period_epochs",
    "distill.scored_by": "distill.selector_features",
    "distill.layer_weight": "distill.feature_loss_weight",
    "distill.pooled_weight": "distill.clip_loss_weight",
    "search.choose": "search.split",
    "preflight.bisect": "preflight.find_max_batch_size",
}
REMOVED = ("train.compiled_steps",)
# Fields that came later. Runs from before did what their defaults say.
ADDED = (
    "data.sampling",
    "data.clip_seconds",
    "train.class_weights",
    "train.freeze",
    "train.multi_label",
    "clip.text_encoder",
    "clip.network",
    "clip.train_text",
    "clip.temperature",
    "clip.least_temperature",
    "chat.llm",
    "chat.train",
    "chat.step_budgets",
    "chat.layer",
    "chat.merge",
    "chat.order",
    "chat.frame_times",
    "chat.time_message",
    "chat.template",
    "chat.labels",
    "chat.text_tokens",
    "optim.schedule",
)
OLD_OBJECTIVES = {"supervised": "flux_multi", "distillation": "flux_umt"}


def default_config(variant: str = "B") -> ConfigDict:
    """Every field with its default, and the native grid of a variant.

    Neutral values: no augmentation but crop and flip, no soft labels.
    """
    nested: dict[str, Any] = {}
    for name, field in FIELDS.items():
        *sections, last = name.split(".")
        section = nested
        for part in sections:
            section = section.setdefault(part, {})
        section[last] = field.default
    config = ConfigDict(nested)
    config.model.variant = variant
    config.model.frames = VARIANTS[variant].frames
    config.model.resolution = VARIANTS[variant].resolution
    return config


def numbers_of(name: str, text: str) -> tuple[int, ...]:
    """The numbers, rising, of a field made by `numbers`.

    Either a range "6..24..2" (start..last..step; the last only if a step ends there), or a list
    "6,8,12" of the numbers themselves. Without a step, frames go up by 1, pixels by a patch.

    Raises UserError for anything else.
    """
    try:
        return _parse_numbers(text, FIELDS[name].step)
    except ValueError as error:
        raise UserError(f"config.{name}: {error}") from None


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train.epochs": 5, ...} of nested mappings."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping | ConfigDict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def as_tuple(value: Any) -> Any:
    """The value with lists, which JSON makes of tuples, as tuples again, at any depth."""
    return tuple(map(as_tuple, value)) if isinstance(value, list | tuple) else value


def config_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The differences, as "train.epochs: 5 -> 10", that forbid resuming a run.

    old, new: nested dicts, from a `config.json` or `ConfigDict.to_dict`. Differences of fields that
    may change are ignored, and so are different spellings of the same numbers.
    """
    added = {name: FIELDS[name].default for name in ADDED}
    old, new = (
        added | {name: as_tuple(value) for name, value in flatten(upgraded(side)).items()}
        for side in (old, new)
    )
    absent = "(absent)"

    def same(name: str) -> bool:
        values = [side.get(name, absent) for side in (old, new)]
        if name in FIELDS and FIELDS[name].step and absent not in values:
            values = [numbers_of(name, text) for text in values]
        if values[0] == values[1] or name not in FIELDS or absent in values:
            return values[0] == values[1]
        field = FIELDS[name]
        return (field.may_grow and values[0] < values[1]) or (
            field.may_fall and values[0] > values[1]
        )

    return [
        f"{name}: {old.get(name, absent)} -> {new.get(name, absent)}"
        for name in sorted(old.keys() | new.keys())
        if not same(name) and not (name in FIELDS and FIELDS[name].may_change)
    ]


def upgraded(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A stored config in today's form.

    Ranges were lists [start, last, step] once. Only in a stored config is such a list certain to be
    a range.
    """
    result = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if name in REMOVED:
            continue
        if name in RENAMED:
            key = RENAMED[name].rpartition(".")[2]
        if isinstance(value, Mapping | ConfigDict):
            value = upgraded(value, f"{name}.")
        elif name == "train.objective":
            value = OLD_OBJECTIVES.get(value, value)
        elif name in FIELDS and FIELDS[name].step and isinstance(value, list | tuple):
            value = "..".join(map(str, value))
        result[key] = value
    if not prefix:
        _forgo_time_message(result)
        _forgo_crop_ranges(result)
    return result


def _forgo_time_message(values: dict[str, Any]) -> None:
    """Sets `chat.time_message` of a stored config from before there was that field.

    Conversations, where it has a place, were learned without the message then.
    """
    chat = values.get("chat", {})
    if values.get("train", {}).get("objective") == "flux_chat" and chat.get("template") == "qwen":
        chat.setdefault("time_message", False)


def _forgo_crop_ranges(values: dict[str, Any]) -> None:
    """Resets the ranges of a stored config whose crop has none: today they are refused."""
    augment = values.get("data", {}).get("augment", {})
    if augment.get("crop") == "multi_scale":
        augment |= {name: FIELDS[f"data.augment.{name}"].default for name in CROP_RANGES}
