"""How long the sequence of tokens is that the blocks see: budget, CLS and padding, decided here.

A sequence holds CLS, the patches that a budget keeps, and a tail of zeros up to a length that the
attention kernel handles well. The tail is masked in attention and cut off after the last block, so
the result is that of the network without it; only its cost counts:

- xla takes any length. No tail.
- cudnn takes no odd length in training, and tensor cores want multiples of 8: up to 7 places more,
  under 1 % of a budget of 1024.
- pallas and splash work on tiles whose sides divide the length, are multiples of 128 and want to be
  large. Milliseconds of splash attention forward and backward for one clip of B, by the compiler
  for a v5e: 1.56 at 3072 in tiles of 1024, 1.84 at 3200 in tiles of 640 with a mask, and 2.95 at
  2176, which is 17 x 128 and has no larger tile (ours: 0.78 at 3072, 0.96 at 3200). So lengths
  without a tile of LEAST_TILE at least are passed over.

CLS takes a place of its own beside the budget's (`cls="outside"`, as in the official code) or one
of the budget's (`"inside"`). Budgets are round numbers, and so on a TPU CLS outside costs more
than its one place: 3072, 2048 and 1024 become 3200, 2304 and 1152, 10.6 % more work in the blocks.
Inside, nothing is padded and no mask is needed. Recipes for TPUs therefore take it in.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

LANES = 128  # pallas, splash: sides of tiles are multiples of it
LEAST_TILE, LARGEST_TILE = 384, 1024
EVEN = 8  # cudnn: lengths are multiples of it


def patch_budget(budget: int, cls: str) -> int:
    """Places of a token budget that patches may take."""
    return budget - (cls == "inside")


def tile(length: int, largest: int = LARGEST_TILE) -> int:
    """The largest side of a tile that divides a length, which is a multiple of LANES."""
    return max(side for side in range(LANES, min(length, largest) + 1, LANES) if length % side == 0)


def length_for(tokens: int, kernel: str) -> int:
    """The places of a sequence of so many tokens, CLS included, for an attention kernel."""
    if kernel == "cudnn":
        return -(-tokens // EVEN) * EVEN
    if kernel == "xla":
        return tokens
    length = -(-tokens // LANES) * LANES
    while tile(length) < min(length, LEAST_TILE):
        length += LANES
    return length


class Sequence(NamedTuple):
    """The tokens of a sequence, CLS included, and its length with the tail."""

    tokens: int
    length: int

    def pad(self, x: jax.Array) -> jax.Array:
        """Appends the tail: [B, tokens, C] -> [B, length, C]."""
        tail = self.length - self.tokens
        return jnp.pad(x, ((0, 0), (0, tail), (0, 0))) if tail else x

    def cut(self, x: jax.Array) -> jax.Array:
        """Takes the tail off: [B, length, C] -> [B, tokens, C]."""
        return x[:, : self.tokens]

    def real(self, clips: int, valid: jax.Array | None) -> jax.Array | None:
        """How many places at the front of each clip's sequence take part in attention: int32 [B].

        valid: bool [B, tokens - 1], True for the real patches, which come first; None: all are.
        None where every place of every clip takes part.
        """
        if valid is not None:
            return 1 + jnp.sum(valid, axis=1, dtype=jnp.int32)
        if self.length > self.tokens:
            return jnp.full(clips, self.tokens, jnp.int32)
        return None


def of(patches: int, kernel: str) -> Sequence:
    """The sequence of so many patches and CLS, for an attention kernel."""
    return Sequence(1 + patches, length_for(1 + patches, kernel))


def behind_cls(x: jax.Array) -> jax.Array:
    """A place for CLS in front of each clip's tokens: [B, N, ...] -> [B, 1 + N, ...], zeros there.

    What comes of them counts for nothing: `put_cls` overwrites it. So every array has as many rows
    as the blocks will see, a round number in training, and none is ever shifted by one.
    """
    return jnp.pad(x, [(0, 0), (1, 0)] + [(0, 0)] * (x.ndim - 2))


def put_cls(x: jax.Array, cls: jax.Array) -> jax.Array:
    """x, [B, 1 + N, C], with CLS, [C], as the first token of each clip."""
    return jnp.where(jnp.arange(x.shape[1])[:, None] == 0, cls.astype(x.dtype), x)


def with_cls(valid: jax.Array | None) -> jax.Array | None:
    """The mask of patches, bool [B, N] or None, with CLS before: [B, 1 + N]."""
    return None if valid is None else jnp.pad(valid, ((0, 0), (1, 0)), constant_values=True)
