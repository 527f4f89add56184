"""The teacher of Flux-UMT and the student's decoders: networks, config checks, and weights.

A teacher is an InternVideo2 (`TEACHERS`) or a FluxViT (`VARIANTS`). Its weights do not change a
run's programs and are not saved in its checkpoints: they are read at each start, and a checksum in
checkpoints and caches tells that they are still the same.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from ml_collections import ConfigDict

from fluxvit_jax.checkpoints.weights import read_weights
from fluxvit_jax.config.checks import check_resolution
from fluxvit_jax.config.fields import REQUIRED
from fluxvit_jax.config.grids import admissible_grids
from fluxvit_jax.config.network import choose_attention, model_config
from fluxvit_jax.config.variants import NO_CLASSES, TEACHERS, VARIANTS
from fluxvit_jax.convert import teacher as teacher_files
from fluxvit_jax.data.teacher_targets import CACHED, Fields
from fluxvit_jax.distributed import partition_rules
from fluxvit_jax.distributed.console import say
from fluxvit_jax.distributed.mesh import device_put_global
from fluxvit_jax.distributed.partition_rules import Rules
from fluxvit_jax.errors import UserError
from fluxvit_jax.grids import PATCH
from fluxvit_jax.models import fluxvit, padded_sequence
from fluxvit_jax.models.decoders import DecodersConfig
from fluxvit_jax.models.fluxvit import FluxViT, FluxViTConfig
from fluxvit_jax.models.internvideo2 import InternVideo2, InternVideo2Config
from fluxvit_jax.objectives.base import check_without_classes

Tree = dict[str, Any]
TeacherConfig = InternVideo2Config | FluxViTConfig

INTERNVIDEO2, FLUXVIT = "internvideo2", "fluxvit"  # kinds of teachers, as in partition rules


def teacher_config(config: ConfigDict, platform: str = "") -> TeacherConfig:
    """The teacher's network; platform: as for `model_config`."""
    distill, model = config.distill, config.model
    side = distill.resolution // PATCH
    shape = {
        "frames": distill.frames,
        "rows": side,
        "columns": side,
        "gelu": distill.gelu,
        "dtype": model.dtype,
        "float32_products": platform == "cpu",
    }
    if distill.network in TEACHERS:
        sizes = TEACHERS[distill.network]._asdict()
    else:
        variant = VARIANTS[distill.network]
        names = ("width", "depth", "heads", "pool_width", "pool_heads")
        sizes = {name: getattr(variant, name) for name in names}
    kernel = choose_attention(config, platform, sizes["width"] // sizes["heads"])
    if distill.network in TEACHERS:
        return InternVideo2Config(**sizes, **shape, attention=kernel)
    return FluxViTConfig(**sizes, **shape, classes=NO_CLASSES, cls=model.cls, attention=kernel)


def kind(teacher: TeacherConfig) -> str:
    """The kind of a teacher, the first part of its parameters' paths in partition rules."""
    return INTERNVIDEO2 if isinstance(teacher, InternVideo2Config) else FLUXVIT


def make_network(teacher: TeacherConfig, rngs: nnx.Rngs) -> InternVideo2 | FluxViT:
    """The teacher's network with randomly initialized parameters."""
    if isinstance(teacher, InternVideo2Config):
        return InternVideo2(teacher, rngs)
    return FluxViT(teacher, rngs)


def decoders_config(config: ConfigDict) -> DecodersConfig:
    """The student's decoders, with a position table for the student's native grid."""
    student, teacher = model_config(config), teacher_config(config)
    return DecodersConfig(
        count=len(config.distill.student_blocks),
        width=student.width,
        pool_width=student.pool_width,
        target_width=teacher.width,
        target_pool_width=teacher.pool_width,
        frames=student.frames,
        rows=student.rows,
        columns=student.columns,
        dtype=student.dtype,
    )


def block_pairs(config: ConfigDict) -> tuple[tuple[int, int], ...]:
    """(block of the student, block of the teacher), counted from 0, for each pair of layers.

    Raises UserError if a network has no such block, or the blocks are out of order.
    """
    depths = model_config(config).depth, teacher_config(config).depth
    pairs = []
    for name, depth in zip(("student_blocks", "teacher_blocks"), depths, strict=True):
        blocks = [b + depth if b < 0 else b for b in config.distill[name]]
        if blocks != sorted(set(blocks)) or not all(0 <= b < depth for b in blocks):
            raise UserError(
                f"config.distill.{name}: {tuple(config.distill[name])} must be blocks in ascending "
                f"order, of {depth} from 0 to {depth - 1} (or from the end: -1 is the last)"
            )
        pairs.append(blocks)
    if len(pairs[0]) != len(pairs[1]):
        raise UserError(
            f"config.distill.student_blocks: {len(pairs[0])} blocks for {len(pairs[1])} of "
            "distill.teacher_blocks; each goes with one"
        )
    return tuple(zip(*pairs, strict=True))


def runs_teacher(config: ConfigDict) -> bool:
    """Whether training steps run the teacher, because its targets are not cached."""
    return not config.distill.cache


def target_fields(config: ConfigDict) -> Fields:
    """Shape and dtype of the cached targets of one clip: see `FluxUMT.targets_to_cache`."""
    teacher, K = teacher_config(config), len(config.distill.teacher_blocks)
    N = padded_sequence.patch_budget(config.distill.tokens, config.model.cls)
    dtype = "uint16" if jnp.dtype(config.model.dtype).itemsize == 2 else config.model.dtype
    fields = (
        ((N,), "int32"),
        ((N,), "float32"),
        ((teacher.pool_width,), "float32"),
        ((K, 1 + N, teacher.width), dtype),
    )
    return dict(zip(CACHED, fields, strict=True))


def check_config(config: ConfigDict) -> None:
    """Raises UserError for the first setting that Flux-UMT does not support."""
    check_without_classes(config, "distillation", "distillation knows of no classes")
    if config.data.validation:
        raise UserError(
            "config.data.validation: distillation trains no classifier that could be evaluated; "
            "fine-tune from its workdir by train.init_from, and evaluate that"
        )
    if config.data.holdout_fraction:
        raise UserError(
            "config.data.holdout_fraction: distillation leaves no videos out; leave it 0"
        )
    check_resolution("distill.resolution", config.distill.resolution)
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
    if not config.data.sampling_period_epochs:
        raise UserError(
            "config.distill.cache: needs a plan that repeats: add "
            "--config.data.sampling_period_epochs=1"
        )
    if config.distill.selector_features != "teacher":
        raise UserError(
            "config.distill.cache: the student, which changes, cannot choose what the teacher saw; "
            "leave distill.selector_features=teacher"
        )
    if config.model.selector.kind in ("tube", "random"):
        raise UserError(
            f"config.distill.cache: the selector {config.model.selector.kind} chooses anew at each "
            "step; use one that does not draw"
        )


def check_teacher_named(config: ConfigDict) -> None:
    """Raises UserError if the config names no weights of a teacher."""
    if config.distill.teacher in ("", REQUIRED):
        raise UserError(
            f"no teacher: add --config.distill.teacher=WEIGHTS of an {config.distill.network}, a "
            "folder or file that `python -m fluxvit_jax.convert` has written"
        )


# ---------------------------------------------------------------------------------------------
# The teacher's weights


def abstract_teacher(config: ConfigDict, mesh: Mesh | AbstractMesh, rules: Rules) -> Tree:
    """Shapes and shardings of the teacher's parameters: sharded like trained parameters.

    Kernels are in the compute dtype.

    Raises UserError if the size of a mesh axis does not divide a dimension sharded over it.
    """
    teacher = teacher_config(config)
    shapes = jax.eval_shape(lambda: fluxvit.split(make_network(teacher, nnx.Rngs(0)))[1])
    partition_rules.check({kind(teacher): shapes}, mesh, config.distill.network, rules)

    def stored(path: tuple, leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        dtype = config.model.dtype if path[-1].key == "kernel" else jnp.float32
        return jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype), sharding=sharding)

    shardings = partition_rules.shardings({kind(teacher): shapes}, mesh, rules)[kind(teacher)]
    return jax.tree_util.tree_map_with_path(stored, shapes, shardings)


def load_teacher(config: ConfigDict, mesh: Mesh, rules: Rules) -> Tree:
    """The teacher's parameters on the mesh. Raises UserError as `read_teacher`."""
    return put_teacher(read_teacher(config), config, mesh, rules)


def put_teacher(params: Tree, config: ConfigDict, mesh: Mesh, rules: Rules) -> Tree:
    """Parameters of `read_teacher` on the mesh; says whose they are."""
    abstract = abstract_teacher(config, mesh, rules)
    say(f"the teacher is {config.distill.network} of {config.distill.teacher}")
    cast = jax.tree.map(lambda leaf, like: np.asarray(leaf, like.dtype), params, abstract)
    return device_put_global(cast, jax.tree.map(lambda like: like.sharding, abstract))


def read_teacher(config: ConfigDict) -> Tree:
    """The teacher's parameters, numpy arrays.

    Raises UserError if there are no such weights, or they are for another network than that of the
    config.
    """
    network: TeacherConfig
    source, expected = config.distill.teacher, teacher_config(config)
    if isinstance(expected, InternVideo2Config):
        internvideo2 = teacher_files.read(source)
        params, network = internvideo2.params(), internvideo2.config
    else:
        weights = read_weights(source)
        params, network = weights.params(np.float32), weights.config.model
        # The classifier is not used.
        params["heads"] = jax.tree.map(lambda leaf: leaf[..., :NO_CLASSES], params["heads"])
    _check_network(config, expected, network)
    return params


def _check_network(config: ConfigDict, expected: TeacherConfig, found: TeacherConfig) -> None:
    """Raises UserError with the differences between the weights' network and the config's."""
    free = {"dtype", "attention", "classes", "cls", "scan", "remat", "drop_path"}
    free |= {"selector", "groups", "rounding", "layer_scale", "kernel_std", "position_scale"}
    differs = [
        f"{field.name} is {getattr(found, field.name)}, not {getattr(expected, field.name)}"
        for field in dataclasses.fields(expected)
        if field.name not in free and getattr(found, field.name) != getattr(expected, field.name)
    ]
    if differs:
        raise UserError(
            f"{config.distill.teacher}: not the {config.distill.network} that config.distill "
            f"describes: {'; '.join(differs)}"
        )
