"""Where activations lie on the ambient mesh; nothing of this matters on one device.

The mesh has the axes `data`, `fsdp` and `tensor`: clips are cut over the first two, attention
heads and the hidden channels of the MLP over the third. Stated for the tokens alone, that is
enough: the partitioner follows them, gathers the parameters of a block where they are cut, and
leaves activations where they are. Unstated, it may as well move the activations.
"""

import math

import jax
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

CLIP_AXES = ("data", "fsdp")
HEAD_AXIS = "tensor"


def ambient_mesh() -> AbstractMesh | None:
    """The mesh that the network runs on, or None: where there is none, or nothing is left to cut.

    An axis that is not left to the partitioner is cut already (`data`, in a training step): then
    what the network sees is one part of it.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return mesh if any(mesh.shape[axis] > 1 for axis in open_axes(mesh)) else None


def open_axes(mesh: AbstractMesh) -> set[str]:
    """Those of our axes that the partitioner cuts."""
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return {axis for axis in (*CLIP_AXES, HEAD_AXIS) if types.get(axis) == AxisType.Auto}


def clip_axes(mesh: AbstractMesh, clips: int) -> tuple[str, ...] | None:
    """The axes that so many clips are cut over: None where they do not divide."""
    axes = tuple(axis for axis in CLIP_AXES if axis in open_axes(mesh))
    return None if clips % math.prod(mesh.shape[axis] for axis in axes) else axes


def head_axis(mesh: AbstractMesh, heads: int) -> str | None:
    """The axis that so many heads are cut over: None where they do not divide."""
    is_open = HEAD_AXIS in open_axes(mesh)
    return HEAD_AXIS if is_open and heads % mesh.shape[HEAD_AXIS] == 0 else None


def by_clip(x: jax.Array) -> jax.Array:
    """x, [B, ...], cut along its clips and nowhere else."""
    mesh = ambient_mesh()
    if mesh is None:
        return x
    spec = PartitionSpec(clip_axes(mesh, x.shape[0]), *[None] * (x.ndim - 1))
    return jax.lax.with_sharding_constraint(x, spec)
