"""What a config says of distillation: the teacher, its weights, the student's decoders.

A teacher is an InternVideo2 (`TEACHERS`) or a model of ours (`config.VARIANTS`). Its weights change
nothing about a run's programs, and are no part of its checkpoints: they are read at each start.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from fluxvit_jax import parallel, sharding
from fluxvit_jax.budgets import PATCH
from fluxvit_jax.config import (
    NO_CLASSES,
    REQUIRED,
    TEACHERS,
    VARIANTS,
    choose_attention,
    model_config,
)
from fluxvit_jax.errors import UserError
from fluxvit_jax.models import fluxvit, layers, sequence
from fluxvit_jax.models.decoders import Decoders, DecodersConfig
from fluxvit_jax.models.fluxvit import FluxViT, FluxViTConfig
from fluxvit_jax.models.internvideo2 import InternVideo2, InternVideo2Config
from fluxvit_jax.models.selection import GridLimits
from fluxvit_jax.objectives.distillation import CACHED, DECODERS, Distillation

Tree = dict[str, Any]

INTERNVIDEO2, FLUXVIT = "internvideo2", "fluxvit"  # kinds of teachers, as `sharding` names them


def teacher_config(config: ConfigDict, platform: str = "") -> InternVideo2Config | FluxViTConfig:
    """The teacher's network; platform: as for `config.model_config`."""
    distill, model = config.distill, config.model
    side = distill.resolution // PATCH
    own = {
        **{"frames": distill.frames, "rows": side, "columns": side},
        **{"gelu": distill.gelu, "dtype": model.dtype},
    }
    if distill.network in TEACHERS:
        sizes = TEACHERS[distill.network]._asdict()
    else:
        variant = VARIANTS[distill.network]
        names = ("width", "depth", "heads", "pool_width", "pool_heads")
        sizes = {name: getattr(variant, name) for name in names}
    kernel = choose_attention(config, platform, sizes["width"] // sizes["heads"])
    if distill.network in TEACHERS:
        return InternVideo2Config(**sizes, **own, attention=kernel)
    return FluxViTConfig(**sizes, **own, classes=NO_CLASSES, cls=model.cls, attention=kernel)


def kind(teacher: InternVideo2Config | FluxViTConfig) -> str:
    return INTERNVIDEO2 if isinstance(teacher, InternVideo2Config) else FLUXVIT


def make_network(teacher: InternVideo2Config | FluxViTConfig, rngs: nnx.Rngs) -> nnx.Module:
    """The teacher's network with fresh parameters."""
    network = InternVideo2 if kind(teacher) == INTERNVIDEO2 else FluxViT
    return network(teacher, rngs)


def decoders_config(config: ConfigDict) -> DecodersConfig:
    """The student's decoders, with the position table of its own native grid."""
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


def make_objective(config: ConfigDict, limits: GridLimits, platform: str) -> Distillation:
    """The loss that `config.distill` and `config.train` describe."""
    distill, student = config.distill, model_config(config, platform)
    teacher = teacher_config(config, platform)
    patches = [sequence.patch_budget(n, student.cls) for n in config.train.budgets]
    return Distillation(
        student=fluxvit.structure(student),
        decoders=layers.structure(lambda rngs: Decoders(decoders_config(config), rngs)),
        teacher=layers.structure(lambda rngs: make_network(teacher, rngs)),
        limits=limits,
        tokens=sequence.patch_budget(distill.tokens, student.cls),
        budgets=tuple(patches),
        names=tuple(config.train.budgets),
        pairs=block_pairs(config),
        group=config.data.grid_group,
        mask=distill.mask,
        scored_by=distill.scored_by,
        selector=student.selector,
        groups=student.groups,
        layer_weight=distill.layer_weight,
        pooled_weight=distill.pooled_weight,
        dtype=student.dtype,
        drop_path=student.drop_path > 0,
    )


def block_pairs(config: ConfigDict) -> tuple[tuple[int, int], ...]:
    """(block of the student, block of the teacher), counted from 0, for each pair of layers.

    Raises UserError where a network has no such block, or they are out of order.
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


def lesson_fields(config: ConfigDict) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of what a cache has of each clip: see `Distillation.cached_lesson`."""
    teacher, K = teacher_config(config), len(config.distill.teacher_blocks)
    N = sequence.patch_budget(config.distill.tokens, config.model.cls)
    middle = "uint16" if jnp.dtype(config.model.dtype).itemsize == 2 else config.model.dtype
    found = (
        ((N,), "int32"),
        ((N,), "float32"),
        ((teacher.pool_width,), "float32"),
        ((K, 1 + N, teacher.width), middle),
    )
    return dict(zip(CACHED, found, strict=True))


def check_teacher_named(config: ConfigDict) -> None:
    """Raises UserError where a run has no weights of a teacher to read."""
    if config.distill.teacher in ("", REQUIRED):
        raise UserError(
            f"no teacher: add --config.distill.teacher=WEIGHTS of an {config.distill.network}, a "
            "folder or file that `python -m fluxvit_jax.convert` has written"
        )


def fresh_decoders(config: ConfigDict, key: jax.Array) -> Tree:
    """What the student has for its teacher alone, beside its own parameters."""
    return {DECODERS: fluxvit.split(Decoders(decoders_config(config), nnx.Rngs(key)))[1]}


# ---------------------------------------------------------------------------------------------
# The teacher's weights


def abstract_teacher(config: ConfigDict, mesh: Mesh) -> Tree:
    """Shapes of the teacher's parameters, and where they lie: cut as those that are trained.

    Kernels are in the dtype of the computation, as they are read by it.

    Raises UserError if a side of the mesh does not divide what is cut along it.
    """
    teacher = teacher_config(config)
    shapes = jax.eval_shape(lambda: fluxvit.split(make_network(teacher, nnx.Rngs(0)))[1])
    sharding.check(config, shapes, mesh, kind(teacher))

    def stored(path: tuple, leaf: Any, own: NamedSharding) -> jax.ShapeDtypeStruct:
        dtype = config.model.dtype if path[-1].key == "kernel" else jnp.float32
        return jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype), sharding=own)

    places = sharding.shardings({kind(teacher): shapes}, mesh)[kind(teacher)]
    return jax.tree_util.tree_map_with_path(stored, shapes, places)


def load_teacher(config: ConfigDict, mesh: Mesh) -> Tree:
    """The teacher's parameters on the mesh.

    Raises UserError: there are no such weights, or they are of another network than the config
    says.
    """
    source, expected = config.distill.teacher, abstract_teacher(config, mesh)
    wanted = teacher_config(config)
    read = _read_internvideo2 if kind(wanted) == INTERNVIDEO2 else _read_fluxvit
    params, found = read(source)
    _check_network(config, wanted, found)
    parallel.say(f"the teacher is {config.distill.network} of {source}")
    cast = jax.tree.map(lambda leaf, own: np.asarray(leaf, own.dtype), params, expected)
    return parallel.place(cast, jax.tree.map(lambda own: own.sharding, expected))


def _read_internvideo2(source: str) -> tuple[Tree, InternVideo2Config]:
    from fluxvit_jax.convert import teacher  # late, as is the next: they know of every form

    found = teacher.read(source)
    return found.params(), found.config


def _read_fluxvit(source: str) -> tuple[Tree, FluxViTConfig]:
    from fluxvit_jax.convert import files

    found = files.read(source)
    params = found.params(np.float32)
    # Nothing reads the classifier.
    heads = jax.tree.map(lambda leaf: leaf[..., :NO_CLASSES], params["heads"])
    return params | {"heads": heads}, found.config.model


def _check_network(config: ConfigDict, wanted: Any, found: Any) -> None:
    """Raises UserError with what differs between the weights' network and the config's."""
    free = {"dtype", "attention", "classes", "cls", "scan", "remat", "drop_path"}
    free |= {"selector", "groups", "rounding", "layer_scale", "kernel_std", "position_scale"}
    differs = [
        f"{field.name} is {getattr(found, field.name)}, not {getattr(wanted, field.name)}"
        for field in dataclasses.fields(wanted)
        if field.name not in free and getattr(found, field.name) != getattr(wanted, field.name)
    ]
    if differs:
        raise UserError(
            f"{config.distill.teacher}: not the {config.distill.network} that config.distill "
            f"describes: {'; '.join(differs)}"
        )
