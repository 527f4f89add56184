"""The configuration: variants of the network, every field with its default, loading and checks.

A recipe in `configs/` is a file whose `get_config(argument)` starts from `default_config()` and
sets what it needs. The command line names it, with an argument after a colon where the recipe
takes one, and overrides single fields: `--config=configs/k400.py:small --config.train.epochs=3`.
Everything wrong with a config is one `UserError` of one line.
"""

import difflib
import math
import re
import runpy
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from absl import flags
from ml_collections import ConfigDict, config_flags

from fluxvit_jax.budgets import PATCH, Grid, square_grids
from fluxvit_jax.data.augment import parse_randaugment
from fluxvit_jax.errors import UserError

if TYPE_CHECKING:
    from fluxvit_jax.models.fluxvit import FluxViTConfig

# The value of train.init_from in a recipe that only makes sense from trained weights.
REQUIRED = "REQUIRED"


class Variant(NamedTuple):
    """Size of a network and the grid its position table is laid out on."""

    width: int
    depth: int
    heads: int
    frames: int  # of the native grid
    resolution: int  # of the native grid, pixels
    pool_width: int = 768  # of the clip vector
    pool_heads: int = 16  # of the attention pooling
    layer_scale: float = 1e-5  # what LayerScale starts at
    kernel_std: float = 0.02  # deviation that kernels start with
    position_scale: float = 1.0  # what GPE's scale starts at


# S and B as released (facts of the official checkpoints). The paper names L but no file of it is
# out: ViT-L's size on B's grid is the natural reading. Ti is ours, for the demo and the tests. The
# official initial values suit wide networks that were pre-trained for long: with them Ti stays at
# chance for the demo's whole length; with larger kernels and positions it learns within 500 steps.
VARIANTS = {
    "Ti": Variant(
        width=64,
        depth=2,
        heads=2,
        frames=8,
        resolution=56,
        pool_width=64,
        pool_heads=2,
        layer_scale=1.0,
        kernel_std=0.06,
        position_scale=2.0,
    ),
    "S": Variant(384, 12, 6, frames=24, resolution=252),
    "B": Variant(768, 12, 12, frames=32, resolution=280),
    "L": Variant(1024, 24, 16, frames=32, resolution=280),
}


class TeacherSizes(NamedTuple):
    """An InternVideo2 encoder, by the fields of `models.internvideo2.InternVideo2Config`."""

    width: int
    depth: int
    heads: int
    hidden: int
    pool_width: int = 768
    pool_heads: int = 16


# Sizes of the official models (facts of the released files); Ti is ours, for the tests.
TEACHERS = {
    "InternVideo2-Ti": TeacherSizes(48, 4, 4, hidden=96, pool_width=32, pool_heads=4),
    "InternVideo2-1B": TeacherSizes(1408, 40, 16, hidden=6144),
    "InternVideo2-6B": TeacherSizes(3200, 48, 25, hidden=12800),
}


def default_config(variant: str = "B") -> ConfigDict:
    """Every field there is. Neutral values: no augmentation but crop and flip, no soft labels."""
    config = ConfigDict()
    config.seed = 0

    config.model = ConfigDict()
    config.model.variant = variant  # a key of VARIANTS
    config.model.classes = 400
    config.model.frames = VARIANTS[variant].frames  # native grid of the position table
    config.model.resolution = VARIANTS[variant].resolution  # native grid, pixels
    config.model.gelu = "tanh"  # the released weights' | "erf": the golden data's
    config.model.cls = "outside"  # of the token budget, as the official code | "inside": for TPU
    config.model.drop_path = 0.1
    config.model.dtype = "bfloat16"  # of the computation; parameters are float32
    config.model.scan = True  # over the blocks: quick to compile; False: quicker steps
    config.model.remat = "none"  # | "names" | "full"
    config.model.attention = "auto"  # the platform's fastest | "xla" | "pallas", "splash" | "cudnn"
    config.model.selector = ConfigDict()
    config.model.selector.kind = "group_dynamic"
    config.model.selector.groups = 0  # of frames; 0: by the rule, as many as 4, 2 or 1
    config.model.selector.rounding = "exact"  # | "official": loses up to four tokens

    config.data = ConfigDict()
    config.data.train = ""  # CSV or text list, folder of class folders, or prepared folder
    config.data.validation = ""
    config.data.root = ""  # the lists' paths are relative to this
    config.data.class_names = ""  # file of names, one a line
    config.data.grids = ConfigDict()
    config.data.grids.frames = (6, 24, 2)  # start, last, step
    config.data.grids.resolutions = (112, 336, 28)  # start, last, step; pixels
    config.data.grids.tokens = (2048, 6144)  # fewest, most
    config.data.grid_group = 8  # clips that share a grid
    config.data.held_out = 0.0  # share of the training list left out, for a search to choose on
    config.data.repeats = 1  # augmented clips of one decoded video
    config.data.plan_epochs = 0  # epochs after which grids, frames and crops repeat; 0: never
    config.data.workers = 2
    config.data.max_bad_fraction = 0.05  # of unreadable clips before training stops
    config.data.augment = ConfigDict()
    config.data.augment.crop = "random_resized"  # | "multi_scale"
    config.data.augment.scale = (0.08, 1.0)
    config.data.augment.ratio = (3 / 4, 4 / 3)
    config.data.augment.flip = 0.5
    config.data.augment.randaugment = ""  # as timm writes it: "rand-m7-n4-mstd0.5-inc1"

    config.train = ConfigDict()
    config.train.objective = "supervised"  # | "distillation": by a teacher, see `distill`
    config.train.batch_size = 512  # clips a step over all devices, repeats included
    config.train.epochs = 5
    config.train.warmup_epochs = 1.0
    config.train.budgets = (3072, 2048, 1024)  # pass i ends in head i; one: Flux-Single
    config.train.align = 1.0  # weight of the alignment loss
    config.train.label_smoothing = 0.0
    config.train.mixup = 0.0
    config.train.cutmix = 0.0
    config.train.mixup_probability = 1.0
    config.train.erase = 0.0
    config.train.ema = 0.0  # decay; 0: no average is kept
    config.train.accumulate = 1  # gradients of so many parts of the batch
    config.train.init_from = ""  # checkpoint to start from; REQUIRED: the user must name one
    config.train.compiled_steps = 1  # train steps compiled in all, for any number of grids

    config.distill = ConfigDict()  # of train.objective "distillation" only
    config.distill.teacher = ""  # its weights; REQUIRED: the user must name them
    config.distill.network = "InternVideo2-1B"  # one of TEACHERS or VARIANTS
    config.distill.frames = 4  # the grid of its position table
    config.distill.resolution = 224  # pixels
    config.distill.gelu = "tanh"
    config.distill.tokens = 2048  # of a clip that it sees; students see train.budgets of these
    config.distill.scored_by = "teacher"  # whose patch embedding the selector looks at | "student"
    config.distill.mask = "attention"  # how these are drawn | "attention_topk" | "random"
    config.distill.student_blocks = (-6, -5, -4, -3, -2, -1)  # from 0, or from the end
    config.distill.teacher_blocks = (23, 26, 29, 33, 36, 39)
    config.distill.layer_weight = 1.0  # of the tokens' distance in the loss
    config.distill.pooled_weight = 1.0  # of the clip vectors'
    config.distill.cache = ""  # folder of --mode=cache: what the teacher has made of a fixed plan

    config.optim = ConfigDict()
    config.optim.learning_rate = 8e-4  # for the whole batch: nothing scales it later
    config.optim.min_learning_rate = 1e-6
    config.optim.warmup_learning_rate = 1e-6
    config.optim.b1 = 0.9
    config.optim.b2 = 0.999
    config.optim.eps = 1e-8
    config.optim.weight_decay = 0.05
    config.optim.layer_decay = 0.75  # 1: the same rate for all
    config.optim.clip_norm = 0.0  # 0: no clipping

    config.eval = ConfigDict()
    config.eval.settings = (  # budget, frames, resolution in pixels
        (3072, 20, 224),
        (2048, 16, 196),
        (1024, 12, 168),
        (512, 8, 168),
    )
    config.eval.plan = ""  # report of a search: the cells it chose take the place of `settings`
    config.eval.clips = 4
    config.eval.crops = 3
    config.eval.batch_size = 16  # videos over all devices
    config.eval.every_epochs = 1

    config.search = ConfigDict()
    config.search.budgets = (3072, 2048, 1024, 512)
    config.search.frames = (4, 32, 2)  # start, last, step
    config.search.resolutions = (112, 336, 28)  # start, last, step; pixels
    config.search.heads = "nearest"  # to the budget | "all"
    config.search.merging = False  # try token merging beside selection
    config.search.choose = ""  # list to choose on; "": what data.held_out left out of data.train
    config.search.videos = 2000  # most to choose on; 0: all
    config.search.strategy = "full"  # | "halving": drop the worse half of cells again and again
    config.search.timed_batch = 8  # clips at once, in the second of a cell's timings

    config.parallel = ConfigDict()
    config.parallel.mesh = ConfigDict()  # devices along each axis; -1: all that are left
    config.parallel.mesh.data = -1  # clips
    config.parallel.mesh.fsdp = 1  # clips, and the training state
    config.parallel.mesh.tensor = 1  # heads and hidden units

    config.preflight = ConfigDict()
    config.preflight.topology = "current"  # or, with commas between, "v5e:4x4", "cpu:8", ...
    config.preflight.bisect = True  # find the largest batch that fits as well
    config.preflight.videos = 0  # to train on, where data.train is not at hand

    config.checkpoint = ConfigDict()
    config.checkpoint.every_steps = 1000
    config.checkpoint.keep = 2

    config.log = ConfigDict()
    config.log.every_steps = 20
    return config


def model_config(config: ConfigDict, platform: str = "") -> "FluxViTConfig":
    """The network that `config` describes: a variant of `VARIANTS`, changed by `config.model`.

    It has the official three pooling heads and classifiers, however many budgets are trained.

    platform: where it will run, "cpu", "gpu" or "tpu", which decides how attention is computed;
        without it, in the way that works everywhere.

    Raises UserError where the platform has no such attention.
    """
    from fluxvit_jax.models.fluxvit import FluxViTConfig  # late: data workers do without JAX

    model, variant = config.model, VARIANTS[config.model.variant]
    side = model.resolution // PATCH
    kernel = choose_attention(config, platform, variant.width // variant.heads)
    return FluxViTConfig(
        width=variant.width,
        depth=variant.depth,
        heads=variant.heads,
        frames=model.frames,
        rows=side,
        columns=side,
        classes=model.classes,
        budgets=HEADS,
        pool_width=variant.pool_width,
        pool_heads=variant.pool_heads,
        layer_scale=variant.layer_scale,
        kernel_std=variant.kernel_std,
        position_scale=variant.position_scale,
        gelu=model.gelu,
        cls=model.cls,
        selector=model.selector.kind,
        groups=model.selector.groups,
        rounding=model.selector.rounding,
        drop_path=model.drop_path,
        dtype=model.dtype,
        scan=model.scan,
        remat=model.remat,
        attention=kernel,
    )


def choose_attention(config: ConfigDict, platform: str, head_size: int) -> str:
    """How attention of heads of a size is computed on a platform; "": as works everywhere.

    Raises UserError where the platform has no such attention.
    """
    from fluxvit_jax.models import attention  # late: data workers do without JAX

    if not platform:
        return "xla"
    try:
        return attention.choose(config.model.attention, platform, config.model.dtype, head_size)
    except ValueError as error:
        raise UserError(f"config.model.attention: {error}") from error


# ---------------------------------------------------------------------------------------------
# Loading


def define_flag(
    flag_values: flags.FlagValues = flags.FLAGS, argv: Sequence[str] | None = None
) -> flags.FlagHolder:
    """Defines `--config`, with `--config.a.b=VALUE` for every field; `argv` as for sys.argv."""
    return config_flags.DEFINE_config_file(
        "config",
        default=None,
        help_string="Recipe, such as configs/k400.py:small; --config.a.b=VALUE sets a field of it.",
        flag_values=flag_values,
        sys_argv=argv,
    )


def parse_flags(argv: Sequence[str], flag_values: flags.FlagValues = flags.FLAGS) -> list[str]:
    """Parses a command line; the `flags_parser` that `absl.app.run` takes.

    Afterwards the value of `define_flag`'s flag is a locked, validated config, or None where no
    recipe was named. Returns the name of the program. Raises UserError for everything that is
    wrong with any flag.
    """
    recipe = _flag_argument(argv, "config")
    if recipe is not None:
        _check_names(flatten(read_recipe(recipe)))
    for name in _override_names(argv):
        _check_name(name)
    try:
        program, *rest = flag_values(argv)
    except (flags.Error, ValueError) as error:
        raise UserError(_flag_message(error)) from error
    if rest:
        raise UserError(f"unexpected argument {rest[0]!r}: every option starts with --")
    config = flag_values["config"].value
    if config is not None:
        _follow_variant(config, flag_values["config"].override_values)
        validate(config)
    return [program]


def load_config(recipe: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """The config of `recipe`, "configs/k400.py:small,single=2048", with `overrides` applied.

    Overrides are written as on the command line: "--config.train.epochs=3". Raises UserError.
    """
    argv = ["load_config", f"--config={recipe}", *overrides]
    flag_values = flags.FlagValues()
    define_flag(flag_values, argv)
    parse_flags(argv, flag_values)
    return flag_values["config"].value


def read_recipe(recipe: str) -> ConfigDict:
    """What `get_config` of the file returns for "FILE" or "FILE:ARGUMENT", not yet validated.

    Raises UserError if the file is missing or fails, with the line of the file that fails.
    """
    path, colon, argument = recipe.partition(":")
    if not Path(path).is_file():
        nearby = sorted(str(file) for file in Path(path).parent.glob("*.py"))
        raise UserError(f"--config={recipe}: no file {path}{_suggestion(path, nearby)}")
    root = str(Path(path).resolve().parent.parent)
    if root not in sys.path:
        sys.path.append(root)  # recipes share configs/common.py, wherever the program is started
    try:
        get_config = runpy.run_path(path)["get_config"]
        config = get_config(argument) if colon else get_config()
    except UserError as error:
        raise UserError(f"--config={recipe}: {error}") from error
    except Exception as error:
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
        where = f"{path}, line {lines[-1]}" if lines else path
        message = next(iter(str(error).splitlines()), "")
        raise UserError(f"{where}: {type(error).__name__}: {message}") from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"{path}: get_config returns {type(config).__name__}, not a ConfigDict")
    return config


def from_dict(values: Mapping[str, Any]) -> ConfigDict:
    """The validated config of a `config.json` or of `ConfigDict.to_dict`; absent fields: default.

    Raises UserError.
    """

    def merged(default: Any, value: Any) -> Any:
        if isinstance(default, dict) and isinstance(value, Mapping):
            return default | {name: merged(default.get(name), value[name]) for name in value}
        return _as_tuple(value)

    config = ConfigDict(merged(default_config().to_dict(), values))
    validate(config)
    return config


def _flag_argument(argv: Sequence[str], name: str) -> str | None:
    """What follows `--name=` or `--name` in argv, if it is there."""
    for argument, following in zip(argv, [*argv[1:], None], strict=True):
        if match := re.fullmatch(rf"--?{name}(?:=(.*))?", argument):
            return following if match[1] is None else match[1]
    return None


def _override_names(argv: Sequence[str]) -> list[str]:
    matches = (re.match(r"--?(?:no)?config\.([^=]+)", argument) for argument in argv)
    return [match[1] for match in matches if match]


def _flag_message(error: Exception) -> str:
    """One line for what absl says of a flag; for one of our fields, in the words of `validate`."""
    message = " ".join(str(error).split())
    match = re.match(r"flag --config\.([\w.]+)=(.*?): ", message)
    return _type_message(match[1], match[2]) if match else message


def _follow_variant(config: ConfigDict, overridden: Mapping[str, Any]) -> None:
    """A variant from the command line brings its native grid, unless that is given as well."""
    variant = VARIANTS.get(config.model.variant)
    if variant and "model.variant" in overridden:
        for side in ("frames", "resolution"):
            if f"model.{side}" not in overridden:
                config.model[side] = getattr(variant, side)


# ---------------------------------------------------------------------------------------------
# Checks

CHOICES = {
    "model.variant": tuple(VARIANTS),
    "model.gelu": ("tanh", "erf"),
    "model.cls": ("outside", "inside"),
    "model.dtype": ("bfloat16", "float32"),
    "model.remat": ("none", "names", "full"),
    "model.attention": ("auto", "xla", "pallas", "splash", "cudnn"),
    "model.selector.kind": (
        "group_dynamic",
        "dynamic_l1",
        "dynamic_l2",
        "tube",
        "random",
        "none",
    ),
    "model.selector.rounding": ("exact", "official"),
    "data.augment.crop": ("random_resized", "multi_scale"),
    "train.objective": ("supervised", "distillation"),
    "distill.network": (*TEACHERS, *VARIANTS),
    "distill.gelu": ("tanh", "erf"),
    "distill.scored_by": ("teacher", "student"),
    "distill.mask": ("attention", "attention_topk", "random"),
    "search.heads": ("nearest", "all"),
    "search.strategy": ("full", "halving"),
}
# Tuples of a fixed form: what their elements are, and how many (None: one or more).
TUPLES = {
    "data.grids.frames": (int, 3),
    "data.grids.resolutions": (int, 3),
    "data.grids.tokens": (int, 2),
    "data.augment.scale": (float, 2),
    "data.augment.ratio": (float, 2),
    "train.budgets": (int, None),
    "distill.student_blocks": (int, None),
    "distill.teacher_blocks": (int, None),
    "eval.settings": (tuple, None),
    "search.budgets": (int, None),
    "search.frames": (int, 3),
    "search.resolutions": (int, 3),
}
POSITIVE = (
    "model.frames",
    "model.resolution",
    "data.grids.frames",
    "data.grids.resolutions",
    "data.grids.tokens",
    "data.grid_group",
    "data.repeats",
    "data.augment.scale",
    "data.augment.ratio",
    "train.batch_size",
    "train.epochs",
    "train.budgets",
    "train.accumulate",
    "train.compiled_steps",
    "distill.frames",
    "distill.resolution",
    "distill.tokens",
    "optim.learning_rate",
    "optim.eps",
    "optim.layer_decay",
    "eval.clips",
    "eval.crops",
    "eval.batch_size",
    "eval.every_epochs",
    "search.budgets",
    "search.frames",
    "search.resolutions",
    "search.timed_batch",
    "checkpoint.every_steps",
    "checkpoint.keep",
    "log.every_steps",
)
NOT_NEGATIVE = (
    "seed",
    "model.selector.groups",
    "data.plan_epochs",
    "data.workers",
    "train.warmup_epochs",
    "train.align",
    "train.mixup",
    "train.cutmix",
    "distill.layer_weight",
    "distill.pooled_weight",
    "optim.min_learning_rate",
    "optim.warmup_learning_rate",
    "optim.weight_decay",
    "optim.clip_norm",
    "search.videos",
    "preflight.videos",
)
SHARES = (  # 0 to 1
    "data.max_bad_fraction",
    "data.augment.scale",
    "data.augment.flip",
    "train.mixup_probability",
    "train.erase",
    "optim.layer_decay",
)
SHARES_BELOW_ONE = (
    "model.drop_path",
    "data.held_out",
    "train.label_smoothing",
    "train.ema",
    "optim.b1",
    "optim.b2",
)
NO_CLASSES = 1  # model.classes where no classifier is trained: the least that there can be
HEADS = 3  # pooling heads of the network: as many budgets can be trained at once


def validate(config: ConfigDict) -> None:
    """Raises UserError, one line, for the first thing wrong with `config`.

    Checked: names and types of all fields, their ranges, and that they go together. Not checked:
    whether files exist, nor what depends on the number of devices.
    """
    values = flatten(config)
    _check_names(values)
    _check_types(values)
    _check_ranges(values)
    _check_model(config)
    _check_batch(config)
    _check_budgets(config)
    if is_distillation(config):
        _check_distillation(config)
    _check_optimiser(config)
    _check_evaluation(config)


def is_distillation(config: ConfigDict) -> bool:
    """Whether a teacher is learnt from, and no labels."""
    return config.train.objective == "distillation"


def asks_teacher(config: ConfigDict) -> bool:
    """Whether training steps run a teacher: distillation without a cache of its answers."""
    return is_distillation(config) and not config.distill.cache


def validate_for_training(config: ConfigDict) -> None:
    """What only a training run needs: data to train on and, in some recipes, weights to start from.

    Raises UserError.
    """
    if not config.data.train:
        raise UserError("no training data: add --config.data.train=LIST, a CSV of path,label")
    if config.train.init_from == REQUIRED:
        raise UserError(
            "this recipe starts from trained weights: add --config.train.init_from=CHECKPOINT "
            '(or "" to start from random ones)'
        )
    if asks_teacher(config):
        from fluxvit_jax.distill import check_teacher_named  # late: it is built on this module

        check_teacher_named(config)


def admissible_grids(config: ConfigDict) -> tuple[Grid, ...]:
    """The grids that training draws from. Raises UserError if there are none."""
    sides = [_span(config, f"data.grids.{name}") for name in ("frames", "resolutions")]
    try:
        return square_grids(*sides, *config.data.grids.tokens)
    except UserError as error:
        raise UserError(f"config.data.grids: {error}") from error


def evaluation_grids(config: ConfigDict) -> tuple[Grid, ...]:
    """The grid of each of `eval.settings`."""
    return tuple(Grid.square(*size) for _, *size in config.eval.settings)


def search_grids(config: ConfigDict) -> tuple[Grid, ...]:
    """The lattice of frames x resolution that a search tries. Raises UserError if it is empty."""
    sides = [_span(config, f"search.{name}") for name in ("frames", "resolutions")]
    try:
        return square_grids(*sides, 1, math.inf)
    except UserError as error:
        raise UserError(f"config.search: {error}") from error


def _span(config: ConfigDict, name: str) -> range:
    """The numbers of a field (first, last, step)."""
    first, last, step = flatten(config)[name]
    if first > last:
        raise UserError(
            f"config.{name}: ({first}, {last}, {step}) is (first, last, step) and the first is "
            "above the last"
        )
    return range(first, last + 1, step)


# May differ between the runs that share a workdir; all else makes another model of it.
MAY_CHANGE = (
    "log",  # what is printed, and how often
    "checkpoint",  # when it is saved, not what
    "eval",  # how the model is measured
    "search",  # how its budgets are chosen
    "data.validation",  # measured on
    "data.class_names",  # only shown
    "data.root",  # videos moved to another disk are the same videos
    "data.workers",  # the order of the data does not depend on it
    "data.max_bad_fraction",  # when to give up
    "model.scan",  # the same mathematics, compiled otherwise
    "model.remat",  # the same mathematics, in less memory
    "model.attention",  # the same mathematics, in another program
    "parallel",  # the same batch, on other devices
    "preflight",  # nothing is trained by it
    "distill.cache",  # the same lessons, computed before
)


def config_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The fields, as "train.epochs: 5 -> 10", that forbid going on with a run.

    old, new: nested dicts, from a `config.json` or `ConfigDict.to_dict`. Fields of `MAY_CHANGE` are
    left out.
    """
    old, new = ({k: _as_tuple(v) for k, v in flatten(side).items()} for side in (old, new))
    absent = "(absent)"
    return [
        f"{name}: {old.get(name, absent)} -> {new.get(name, absent)}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name, absent) != new.get(name, absent)
        and not any(name == free or name.startswith(f"{free}.") for free in MAY_CHANGE)
    ]


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train.epochs": 5, ...} of nested mappings."""
    flat = {}
    for name, value in values.items():
        section = isinstance(value, Mapping | ConfigDict)
        flat |= flatten(value, f"{prefix}{name}.") if section else {f"{prefix}{name}": value}
    return flat


def _suggestion(word: str, known: Sequence[str]) -> str:
    """Names the one of `known` that is most like `word`, as a whole and after its last dot."""

    def likeness(candidate: str) -> float:
        pairs = ((word, candidate), (word.rpartition(".")[2], candidate.rpartition(".")[2]))
        return sum(difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)

    return f"; did you mean {max(known, key=likeness)}?" if known else ""


def _as_tuple(value: Any) -> Any:
    """Lists, at any depth, as the tuples that they were before JSON."""
    return tuple(map(_as_tuple, value)) if isinstance(value, list | tuple) else value


def _check_name(name: str) -> None:
    known = flatten(default_config())
    if name in known:
        return
    inside = [f.removeprefix(f"{name}.") for f in known if f.startswith(f"{name}.")]
    if inside:
        raise UserError(f"config.{name} is a section; its fields are {', '.join(inside)}")
    raise UserError(f"config.{name}: no such field{_suggestion(name, list(known))}")


def _check_names(values: Mapping[str, Any]) -> None:
    for name in values:
        _check_name(name)
    if missing := flatten(default_config()).keys() - values.keys():
        raise UserError(f"config.{min(missing)} is missing: start from default_config()")


def _has_type(value: Any, wanted: type) -> bool:
    if wanted is tuple:
        return isinstance(value, tuple | list)
    if wanted is float:
        wanted = int | float
    return isinstance(value, wanted) and (wanted is bool or not isinstance(value, bool))


TYPE_NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    tuple: "a tuple",
}


def _type_message(name: str, value: Any) -> str:
    return f"config.{name}: {value!r} is not {TYPE_NAMES[type(flatten(default_config())[name])]}"


def _check_types(values: Mapping[str, Any]) -> None:
    for name, default in flatten(default_config()).items():
        value = values[name]
        if not _has_type(value, type(default)):
            raise UserError(_type_message(name, value))
        if name not in TUPLES:
            continue
        wanted, length = TUPLES[name]
        right_length = len(value) == length if length else len(value) > 0
        if not right_length or not all(_has_type(element, wanted) for element in value):
            kind = {int: "whole numbers", float: "numbers", tuple: "(budget, frames, resolution)"}
            raise UserError(
                f"config.{name}: {value} is not {length or 'one or more'} {kind[wanted]}, "
                f"such as {default}"
            )
    for setting in values["eval.settings"]:
        if len(setting) != 3 or not all(_has_type(element, int) for element in setting):
            raise UserError(
                f"config.eval.settings: {setting} is not (budget, frames, resolution), "
                "such as (1024, 12, 168)"
            )


def _check_ranges(values: Mapping[str, Any]) -> None:
    def check(names: Sequence[str], right: Any, rule: str) -> None:
        for name in names:
            value = values[name]
            if not all(map(right, value if isinstance(value, tuple | list) else [value])):
                raise UserError(f"config.{name}: {value} must be {rule}")

    for name, choices in CHOICES.items():
        if values[name] not in choices:
            raise UserError(f"config.{name}: {values[name]!r} is none of {', '.join(choices)}")
    if values["data.augment.randaugment"]:
        try:
            parse_randaugment(values["data.augment.randaugment"])
        except UserError as error:
            raise UserError(f"config.data.augment.randaugment: {error}") from error
    check(POSITIVE, lambda value: value > 0, "above 0")
    check(NOT_NEGATIVE, lambda value: value >= 0, "0 or more")
    check(SHARES, lambda value: 0 <= value <= 1, "between 0 and 1")
    check(SHARES_BELOW_ONE, lambda value: 0 <= value < 1, "at least 0 and below 1")
    sides = {name: values[name] for name in values if name.startswith("parallel.mesh.")}
    for name, side in sides.items():
        if side < 1 and side != -1:
            raise UserError(f"config.{name}: {side} must be above 0, or -1 for all that are left")
    if list(sides.values()).count(-1) > 1:
        raise UserError("config.parallel.mesh: only one side can be -1, all that are left")
    for name in ("data.augment.scale", "data.augment.ratio", "data.grids.tokens"):
        low, high = values[name]
        if low > high:
            raise UserError(f"config.{name}: the lower end {low} is above the upper end {high}")


def _check_resolution(name: str, resolution: int) -> None:
    if resolution % PATCH:
        near = max(1, round(resolution / PATCH)) * PATCH
        raise UserError(
            f"config.{name}: {resolution} px is no multiple of the patch size {PATCH}; "
            f"the nearest is {near}"
        )


def _check_model(config: ConfigDict) -> None:
    if config.model.classes < 1:
        raise UserError("say how many classes the data has: add --config.model.classes=NUMBER")
    _check_resolution("model.resolution", config.model.resolution)
    if config.model.selector.groups and config.model.selector.kind != "group_dynamic":
        raise UserError(
            f"config.model.selector.groups: only group_dynamic has groups, "
            f"not {config.model.selector.kind}"
        )


def _check_batch(config: ConfigDict) -> None:
    batch, group, repeats = config.train.batch_size, config.data.grid_group, config.data.repeats
    if group % repeats:
        raise UserError(
            f"config.data.grid_group: {group} clips that share a grid are no multiple of "
            f"data.repeats={repeats}, the clips of one video"
        )
    if batch % (unit := group * config.train.accumulate):
        raise UserError(
            f"config.train.batch_size: {batch} clips do not split into groups of "
            f"data.grid_group={group} in each of train.accumulate={config.train.accumulate} parts; "
            f"the nearest that does is {max(1, round(batch / unit)) * unit}"
        )
    if group == 1 and (config.train.mixup or config.train.cutmix):
        raise UserError(
            "config.data.grid_group: mixup and cutmix mix clips that share a grid; with groups of "
            "1 set train.mixup=0 and train.cutmix=0"
        )


def _check_budgets(config: ConfigDict) -> None:
    budgets = tuple(config.train.budgets)
    if len(budgets) > HEADS or list(budgets) != sorted(set(budgets), reverse=True):
        raise UserError(
            f"config.train.budgets: {budgets} must be at most {HEADS} numbers, largest first"
        )
    grids = admissible_grids(config)
    largest = max(grid.tokens for grid in grids)
    if budgets[0] > largest:
        raise UserError(
            f"config.train.budgets: no grid can fill {budgets[0]} tokens, the largest of "
            f"data.grids has {largest}"
        )
    if config.model.selector.kind == "none" and largest > budgets[-1]:
        raise UserError(
            f"config.model.selector.kind: none keeps every token, but a grid of data.grids has "
            f"{largest} and train.budgets asks for {budgets[-1]}"
        )


def _check_distillation(config: ConfigDict) -> None:
    from fluxvit_jax.distill import block_pairs  # late: it is built on this module

    if config.model.classes != NO_CLASSES:
        raise UserError(
            f"config.model.classes: {config.model.classes}, but distillation knows of no classes; "
            f"leave it {NO_CLASSES}"
        )
    for name in ("train.mixup", "train.cutmix", "train.erase", "train.label_smoothing"):
        if flatten(config)[name]:
            raise UserError(f"config.{name}: distillation has no such thing; leave it 0")
    if config.data.validation:
        raise UserError(
            "config.data.validation: distillation trains no classifier that could be evaluated; "
            "fine-tune from its workdir by train.init_from, and evaluate that"
        )
    if config.data.held_out:
        raise UserError("config.data.held_out: distillation leaves no videos out; leave it 0")
    _check_resolution("distill.resolution", config.distill.resolution)
    tokens, fewest = config.distill.tokens, min(grid.tokens for grid in admissible_grids(config))
    if fewest < tokens:
        raise UserError(
            f"config.data.grids.tokens: a grid of {fewest} tokens cannot fill the teacher's "
            f"{tokens} of distill.tokens"
        )
    if config.train.budgets[0] > tokens:
        raise UserError(
            f"config.train.budgets: a student cannot see {config.train.budgets[0]} of the "
            f"teacher's {tokens} tokens of distill.tokens"
        )
    if config.model.selector.rounding != "exact":
        raise UserError("config.model.selector.rounding: distillation takes exact budgets only")
    block_pairs(config)
    if config.distill.cache:
        _check_cache(config)


def _check_cache(config: ConfigDict) -> None:
    if not config.data.plan_epochs:
        raise UserError(
            "config.distill.cache: needs a plan that repeats: add --config.data.plan_epochs=1"
        )
    if config.distill.scored_by != "teacher":
        raise UserError(
            "config.distill.cache: the student, which changes, cannot choose what the teacher saw; "
            "leave distill.scored_by=teacher"
        )
    if config.model.selector.kind in ("tube", "random"):
        raise UserError(
            f"config.distill.cache: the selector {config.model.selector.kind} chooses anew at each "
            "step; use one that does not draw"
        )


def _check_optimiser(config: ConfigDict) -> None:
    if config.train.warmup_epochs > config.train.epochs:
        raise UserError(
            f"config.train.warmup_epochs: {config.train.warmup_epochs} is more than "
            f"train.epochs={config.train.epochs}"
        )
    if config.optim.min_learning_rate > config.optim.learning_rate:
        raise UserError(
            f"config.optim.min_learning_rate: {config.optim.min_learning_rate} is above "
            f"optim.learning_rate={config.optim.learning_rate}"
        )


def _check_evaluation(config: ConfigDict) -> None:
    """A budget of more tokens than the grid has is no error: every token is kept."""
    settings = config.eval.settings
    for budget, frames, resolution in settings:
        if min(budget, frames, resolution) <= 0:
            raise UserError(f"config.eval.settings: {(budget, frames, resolution)} must be above 0")
        _check_resolution("eval.settings", resolution)
        tokens = Grid.square(frames, resolution).tokens
        if config.model.selector.kind == "none" and tokens > budget:
            raise UserError(
                f"config.eval.settings: {frames} frames of {resolution} px have {tokens} tokens, "
                f"and model.selector.kind=none cannot bring them down to {budget}"
            )
    budgets = [setting[0] for setting in settings]
    if twice := {budget for budget in budgets if budgets.count(budget) > 1}:
        raise UserError(
            f"config.eval.settings: {min(twice)} tokens twice, but results are kept by budget"
        )
