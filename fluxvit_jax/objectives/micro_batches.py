"""Parts of a batch, one after another, so that only one part's activations are in memory."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax
from einops import rearrange

Tree = Any
Output = TypeVar("Output")


def split(clips: Tree, parts: int, group: int) -> Tree:
    """Arrays [B, ...] as [parts, B / parts, ...].

    Groups of `group` clips stay whole: part i takes every `parts`-th group, offset i. This strided
    split keeps each device's share local.
    """
    return jax.tree.map(
        lambda x: rearrange(x, "(n parts g) ... -> parts (n g) ...", parts=parts, g=group), clips
    )


def joined(parts: Tree, group: int) -> Tree:
    """The inverse of `split`."""
    return jax.tree.map(
        lambda x: rearrange(x, "parts (n g) ... -> (n parts g) ...", g=group), parts
    )


def mapped(
    function: Callable[[Tree, Tree], Output], params: Tree, clips: Tree, parts: int, group: int
) -> Output:
    """`function(params, clips)`, an array for each clip, computed part by part.

    The backward pass computes each part's activations again, so a loss may compare the outputs of
    the whole batch in the memory of one part (GradCache, arXiv 2101.06983). Gradients of `params`
    are added up in float32.
    """
    if parts == 1:
        return function(params, clips)
    wide = optax.tree.cast(params, jnp.float32)

    @jax.checkpoint
    def part(clips: Tree) -> Output:
        narrow = jax.tree.map(lambda x, like: x.astype(like.dtype), wide, params)
        return function(narrow, clips)

    return joined(jax.lax.map(part, split(clips, parts, group)), group)
