"""`config.json` and `preprocessor_config.json`: what a folder of weights says of its network.

The names in `config.json` are those of `FluxViTConfig`. Besides there are `head_budgets`, the
tokens that each head was trained at, `id2label`, the classes, and for several labels a video
`problem_type`, as Hugging Face calls it. `preprocessor_config.json` says
how a video becomes patches, and on which grid each budget is best asked. A bare file of weights
tells its widths, depth and classes; `describe` adds what the released sizes tell, and what is then
still open must be given.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from fluxvit_jax.config.fields import FIELDS, default_config
from fluxvit_jax.config.network import model_config
from fluxvit_jax.config.variants import VARIANTS
from fluxvit_jax.data.class_names import DATASETS, OF_OFFICIAL_WEIGHTS, of_dataset
from fluxvit_jax.errors import UserError
from fluxvit_jax.grids import PATCH, nearest_head
from fluxvit_jax.models.fluxvit import MEAN, STD, FluxViTConfig

MODEL_TYPE = "fluxvit"
SIZES = ("width", "depth", "heads", "frames", "rows", "columns", "classes")
POOL = ("budgets", "pool_width", "pool_heads")
BEHAVIOUR = {
    "gelu": "model.gelu",
    "cls": "model.cls",
    "selector": "model.selector.kind",
    "rounding": "model.selector.rounding",
}
NUMBERS = (*SIZES, *POOL, "groups")
# Values of "problem_type", absent for one label a video.
MULTI_LABEL, SINGLE_LABEL = "multi_label_classification", "single_label_classification"
# Of no meaning for the network: of Flux-CLIP (`clip_parts`), and written by others into files of
# this name.
FOREIGN = (
    "text_encoder",
    "architectures",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "label2id",
)
HEAD_BUDGETS = (3072, 2048, 1024)  # of the released weights
RELEASED = ("S", "B")  # sizes of the released weights

Setting = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class PretrainedConfig:
    """A network with weights, and how to ask it.

    head_budgets: tokens that each head was trained at, largest first.
    settings: (budget, frames, resolution in pixels), the grid that each budget is asked on.
    class_names: as many as classes, or none where they are not known.
    assumed_names: the data set that `class_names` are taken of, one of `class_names.DATASETS`,
        where the weights name none and only their form speaks for it; else "".
    multi_label: whether the probability of a class is the sigmoid of its logit, not the softmax.
    """

    model: FluxViTConfig
    head_budgets: tuple[int, ...] = HEAD_BUDGETS
    settings: tuple[Setting, ...] = ()
    class_names: tuple[str, ...] = ()
    assumed_names: str = dataclasses.field(default="", compare=False)
    multi_label: bool = False

    def asked(self, budgets: Sequence[int] = (), settings: Sequence[Setting] = ()) -> list[Setting]:
        """The grid of each of `budgets`: that of the nearest in `settings`, by default its own.

        Without budgets, all settings.
        """
        settings = settings or self.settings
        known = [budget for budget, _, _ in settings]
        return [(budget, *settings[nearest_head(budget, known)][1:]) for budget in budgets or known]


def assume_names(config: PretrainedConfig) -> PretrainedConfig:
    """The config with the class names that official weights of its size and classes have.

    Official files name no classes. Those of the released sizes with as many classes as Kinetics
    are taken for Kinetics'. They may be somebody's own, so whoever uses the names must say so.
    """
    model = config.model
    dataset = OF_OFFICIAL_WEIGHTS.get(model.classes)
    released = {(VARIANTS[v].width, VARIANTS[v].depth) for v in RELEASED}
    if config.class_names or not dataset or (model.width, model.depth) not in released:
        return config
    return dataclasses.replace(config, class_names=of_dataset(dataset), assumed_names=dataset)


def describe_assumption(config: PretrainedConfig, source: str) -> str:
    """The warning that belongs to `assume_names`, in a line; "" where nothing is assumed."""
    if not config.assumed_names:
        return ""
    return (
        f"{source}: names no classes; as official weights its {config.model.classes} are taken "
        f"for those of {DATASETS[config.assumed_names]}"
    )


def to_json(config: PretrainedConfig) -> dict[str, Any]:
    """The content of `config.json`."""
    own = {name: getattr(config.model, name) for name in (*NUMBERS, *BEHAVIOUR)}
    labels = {str(i): name for i, name in enumerate(config.class_names)}
    return {
        "model_type": MODEL_TYPE,
        **own,
        "head_budgets": list(config.head_budgets),
        **({"id2label": labels} if labels else {}),
        **({"problem_type": MULTI_LABEL} if config.multi_label else {}),
    }


def preprocessor_json(config: PretrainedConfig) -> dict[str, Any]:
    """The content of `preprocessor_config.json`."""
    settings = [
        {"tokens": budget, "frames": frames, "resolution": resolution}
        for budget, frames, resolution in config.settings
    ]
    return {
        "patch_size": PATCH,
        "rescale_factor": 1 / 255,
        "image_mean": list(MEAN),
        "image_std": list(STD),
        "settings": settings,
    }


def from_run_config(config: ConfigDict, class_names: Sequence[str] = ()) -> PretrainedConfig:
    """What the config of a run says of the network it trains.

    class_names: as its checkpoints keep them. The config only knows where they once lay.
    """
    return PretrainedConfig(
        model_config(config),
        tuple(config.train.budgets),
        tuple(tuple(setting) for setting in config.eval.settings),
        tuple(class_names),
        multi_label=config.train.multi_label,
    )


def to_run_config(config: PretrainedConfig) -> ConfigDict:
    """The config that a workdir of this network has; the inverse of `from_run_config`.

    Raises UserError for a network that is none of `VARIANTS`, or with a native grid that is not
    square: recipes know no others.
    """
    model = config.model
    sizes = ("width", "depth", "heads", "pool_width", "pool_heads")
    same = [
        name
        for name, variant in VARIANTS.items()
        if all(getattr(variant, size) == getattr(model, size) for size in sizes)
    ]
    if not same:
        raise UserError(f"no variant of a recipe has width {model.width} and depth {model.depth}")
    if model.rows != model.columns:
        raise UserError(f"a recipe's grid is square, not {model.rows} x {model.columns}")
    recipe = default_config(same[0])
    recipe.model.classes = model.classes
    recipe.model.frames, recipe.model.resolution = model.frames, model.rows * PATCH
    recipe.model.gelu, recipe.model.cls = model.gelu, model.cls
    recipe.model.selector.kind = model.selector
    recipe.model.selector.groups = model.groups
    recipe.model.selector.rounding = model.rounding
    recipe.train.budgets = config.head_budgets
    recipe.train.multi_label = config.multi_label
    recipe.eval.settings = config.settings
    return recipe


def describe(
    state: Mapping[str, np.ndarray],
    given: Mapping[str, Any],
    preprocessor: Mapping[str, Any],
    source: str,
    default: Mapping[str, Any] | None = None,
) -> PretrainedConfig:
    """The network that official weights belong to.

    Args:
        state: tensors under their official names; some may be missing.
        given: a `config.json`, whole or in part; of what the weights tell it may only say the same.
        preprocessor: a `preprocessor_config.json`, or nothing.
        source: what the weights are called in errors.
        default: fields of a `config.json` for what neither `given` nor the weights tell.

    Raises:
        UserError: `given` has an unknown or impossible field, contradicts the weights, or leaves
            open what they do not tell.
    """
    _check(given, source)
    told = _told_by_weights(state)
    if wrong := [name for name in told if given.get(name, told[name]) != told[name]]:
        listed = ", ".join(f"{name} is {told[name]}, not {given[name]}" for name in wrong)
        raise UserError(f"{source}: its config.json contradicts its weights: {listed}")
    said = {name: given[name] for name in (*NUMBERS, *BEHAVIOUR) if name in given}
    places = state["pos_embed"].shape[1] - 1 if "pos_embed" in state else None
    fields = {**(default or {}), **_of_released_size(told, places), **told, **said}
    if missing := [name for name in (*SIZES, "pool_heads") if name not in fields]:
        raise UserError(
            f"{source}: the weights do not tell {', '.join(missing)}; name a config.json that "
            "does: --config=FILE, or config= in Python"
        )
    model = FluxViTConfig(**fields)
    _check_division(model, source)
    if places not in (None, model.native_tokens):
        raise UserError(
            f"{source}: its position table has {places} places, not the {model.frames} x "
            f"{model.rows} x {model.columns} of its config.json"
        )
    budgets = tuple(given.get("head_budgets", HEAD_BUDGETS))
    if len(budgets) > model.budgets:
        raise UserError(
            f"{source}: has {model.budgets} heads, fewer than the head_budgets {list(budgets)}; "
            "name a config.json with those of its heads: --config=FILE, or config= in Python"
        )
    return PretrainedConfig(
        model,
        budgets,
        _settings(preprocessor, model, budgets, source),
        _class_names(given.get("id2label", {}), model.classes, source),
        multi_label=given.get("problem_type") == MULTI_LABEL,
    )


def _told_by_weights(state: Mapping[str, np.ndarray]) -> dict[str, int]:
    """The sizes that shapes tell, as far as the tensors are there."""
    ends = {
        "width": "patch_embed.norm.weight",
        "classes": "head.0.bias",
        "pool_width": "fc_norm.weight",
    }
    told = {size: len(state[name]) for size, name in ends.items() if name in state}
    counted = {"depth": ".norm1.weight", "budgets": ".norm1_q.weight"}
    counts = {size: sum(n.endswith(end) for n in state) for size, end in counted.items()}
    return told | {size: count for size, count in counts.items() if count}


def _check_division(model: FluxViTConfig, source: str) -> None:
    for heads in ("heads", "pool_heads"):
        if model.width % getattr(model, heads):
            raise UserError(
                f"{source}: the width {model.width} does not divide into "
                f"{getattr(model, heads)} {heads}"
            )


def _of_released_size(told: Mapping[str, int], places: int | None) -> dict[str, int]:
    """What the variant of the weights' width, depth and places adds; nothing without one."""
    for variant in VARIANTS.values():
        side = variant.resolution // PATCH
        size = (variant.width, variant.depth, variant.frames * side * side)
        if size == (told.get("width"), told.get("depth"), places):
            return {
                "heads": variant.heads,
                "frames": variant.frames,
                "rows": side,
                "columns": side,
                "pool_heads": variant.pool_heads,
            }
    return {}


def _check(given: Mapping[str, Any], source: str) -> None:
    known = {"model_type", *NUMBERS, *BEHAVIOUR, "head_budgets", "id2label", "problem_type"}
    known |= {*FOREIGN}
    if unknown := [name for name in given if name not in known]:
        raise UserError(f"{source}: config.json has an unknown field {unknown[0]!r}")
    if given.get("model_type", MODEL_TYPE) != MODEL_TYPE:
        raise UserError(f"{source}: it is a {given['model_type']}, not a {MODEL_TYPE}")
    for name in NUMBERS:
        value, least = given.get(name, 1), 0 if name == "groups" else 1
        if type(value) is not int or value < least:
            raise UserError(f"{source}: config.json says {name} {value!r}, no number from {least}")
    for name, field in BEHAVIOUR.items():
        if name in given and given[name] not in FIELDS[field].choices:
            choices = ", ".join(FIELDS[field].choices)
            raise UserError(f"{source}: config.json says {name} {given[name]!r}, none of {choices}")
    problem = given.get("problem_type")
    if problem not in (None, SINGLE_LABEL, MULTI_LABEL):
        raise UserError(
            f"{source}: config.json says problem_type {problem!r}, none of {SINGLE_LABEL}, "
            f"{MULTI_LABEL}"
        )
    budgets = given.get("head_budgets", HEAD_BUDGETS)
    right = isinstance(budgets, Sequence) and all(type(b) is int and b > 0 for b in budgets)
    if not right or list(budgets) != sorted(set(budgets), reverse=True) or not budgets:
        raise UserError(f"{source}: head_budgets {budgets!r} are no numbers, largest first")


def check_sizes(model: FluxViTConfig, settings: Sequence[Setting]) -> None:
    """Raises UserError for a budget, number of frames or resolution that cannot be."""
    fewest = 2 if model.cls == "inside" else 1
    for budget, frames, resolution in settings:
        if budget < fewest or frames < 1 or resolution < PATCH or resolution % PATCH:
            raise UserError(
                f"{budget} tokens of {frames} frames of {resolution} px: a resolution is a "
                f"multiple of {PATCH}, frames are above 0, a budget is at least {fewest}"
            )


def _class_names(labels: Any, classes: int, source: str) -> tuple[str, ...]:
    if not labels:
        return ()
    wanted = [str(i) for i in range(classes)]
    if not isinstance(labels, Mapping) or sorted(labels) != sorted(wanted):
        raise UserError(
            f"{source}: id2label does not name the {classes} classes 0 to {classes - 1}"
        )
    return tuple(str(labels[i]) for i in wanted)


def _settings(
    preprocessor: Mapping[str, Any], model: FluxViTConfig, budgets: Sequence[int], source: str
) -> tuple[Setting, ...]:
    """Those of `preprocessor_config.json`; else the released recipe's, or the native grid."""
    if preprocessor.get("settings"):
        try:
            settings = tuple(map(_setting, preprocessor["settings"]))
            check_sizes(model, settings)
        except (TypeError, KeyError):
            raise UserError(
                f"{source}: a setting in preprocessor_config.json is not "
                '{"tokens": .., "frames": .., "resolution": ..} with whole numbers'
            ) from None
        except UserError as error:
            raise UserError(f"{source}: preprocessor_config.json says {error}") from error
        return settings
    if tuple(budgets) == HEAD_BUDGETS:
        return tuple(default_config().eval.settings)
    return tuple((budget, model.frames, model.rows * PATCH) for budget in budgets)


def _setting(described: Mapping[str, Any]) -> Setting:
    """Raises TypeError or KeyError for what is none."""
    budget, frames, resolution = (described[name] for name in ("tokens", "frames", "resolution"))
    if not all(type(number) is int for number in (budget, frames, resolution)):
        raise TypeError(described)
    return budget, frames, resolution
