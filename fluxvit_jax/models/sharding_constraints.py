"""Sharding constraints for activations on the ambient mesh; without effect on one device.

The batch is split over the mesh axes `data` and `fsdp`, attention heads and hidden units of the MLP
over `tensor`. Constraining the token array is enough: XLA then gathers the parameters of a block
where they are sharded and leaves activations in place. Without it XLA may gather activations
instead of parameters.
"""

import math

import jax
from jax.sharding import AbstractMesh, AxisType, PartitionSpec
from jaxtyping import Shaped

from fluxvit_jax.models.arrays import Array, Size

CLIP_AXES = ("data", "fsdp")
HEAD_AXIS = "tensor"


def ambient_mesh() -> AbstractMesh | None:
    """The current mesh, or None if it has no automatic axis of size > 1.

    Axes made manual by shard_map (`data`, in a training step) are excluded: inside it the network
    sees only its shard.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return mesh if any(mesh.shape[axis] > 1 for axis in open_axes(mesh)) else None


def open_axes(mesh: AbstractMesh) -> set[str]:
    """The automatic axes among ours: XLA partitions along them."""
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return {axis for axis in (*CLIP_AXES, HEAD_AXIS) if types.get(axis) == AxisType.Auto}


def clip_axes(mesh: AbstractMesh, clips: Size) -> tuple[str, ...] | None:
    """The axes that a batch of `clips` is split over; None if their sizes do not divide it."""
    axes = tuple(axis for axis in CLIP_AXES if axis in open_axes(mesh))
    return None if clips % math.prod(mesh.shape[axis] for axis in axes) else axes


def head_axis(mesh: AbstractMesh, heads: int) -> str | None:
    """The axis that `heads` are split over; None if its size does not divide them."""
    is_open = HEAD_AXIS in open_axes(mesh)
    return HEAD_AXIS if is_open and heads % mesh.shape[HEAD_AXIS] == 0 else None


def constrain_batch(x: Shaped[Array, "B *rest"]) -> Shaped[Array, "B *rest"]:
    """x, [B, ...], constrained to be split along its clips only."""
    mesh = ambient_mesh()
    if mesh is None:
        return x
    spec = PartitionSpec(clip_axes(mesh, x.shape[0]), *[None] * (x.ndim - 1))
    return jax.lax.with_sharding_constraint(x, spec)


def constrain_cache(x: Shaped[Array, "depth B L heads D"]) -> Shaped[Array, "depth B L heads D"]:
    """Keys or values of all layers, constrained to be split along texts and heads."""
    mesh = ambient_mesh()
    if mesh is None:
        return x
    _, B, _, heads, _ = x.shape
    spec = PartitionSpec(None, clip_axes(mesh, B), None, head_axis(mesh, heads), None)
    return jax.lax.with_sharding_constraint(x, spec)
