"""Length of the token sequence that the blocks process: budget, CLS and padding.

A sequence holds CLS, the patches that a budget keeps, and padding of zeros up to a length that the
attention kernel handles well. The padding is masked in attention and removed after the last block,
so it changes no result and only adds cost:

- xla and chunked take any length and need no padding.
- cudnn takes no odd length in training, and tensor cores prefer multiples of 8: up to 7 more
  tokens, under 1 % of a budget of 1024.
- pallas and splash work on tiles whose sides divide the length and are multiples of 128; large
  tiles are faster. Milliseconds of splash attention, forward and backward, for one clip of B, by
  the compiler for a v5e: 1.56 at 3072 in tiles of 1024, 1.84 at 3200 in tiles of 640 with a mask,
  and 2.95 at 2176, which is 17 x 128 and has no larger tile (ours: 0.78 at 3072, 0.96 at 3200).
  Lengths without a tile of at least LEAST_TILE are therefore skipped.

CLS is added to the budget (`cls="outside"`, as in the official code) or counted in it
(`"inside"`). Budgets are round numbers, so on a TPU CLS outside costs more than one token: 3072,
2048 and 1024 become 3200, 2304 and 1152, 10.6 % more work in the blocks. With CLS inside there is
no padding and no mask. Recipes for TPUs therefore count it in.
"""

import math
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, Shaped

from fluxvit_jax.models.arrays import Array, Size

LANES = 128  # pallas, splash: sides of tiles are multiples of it
LEAST_TILE, LARGEST_TILE = 384, 1024
EVEN = 8  # cudnn: lengths are multiples of it


def patch_budget(budget: int, cls: str) -> int:
    """Patches of a token budget, which may count CLS."""
    return budget - (cls == "inside")


def tile(length: int, largest: int = LARGEST_TILE) -> int:
    """The largest side of a tile that divides a length, which is a multiple of LANES."""
    return max(side for side in range(LANES, min(length, largest) + 1, LANES) if length % side == 0)


def length_for(tokens: int, kernel: str) -> int:
    """The padded length of a sequence of `tokens`, CLS included, for an attention kernel."""
    if kernel == "cudnn":
        return math.ceil(tokens / EVEN) * EVEN
    if kernel in ("xla", "chunked"):
        return tokens
    length = math.ceil(tokens / LANES) * LANES
    while tile(length) < min(length, LEAST_TILE):
        length += LANES
    return length


@dataclass(frozen=True, slots=True, kw_only=True)
class PaddedSequence:
    """Lengths of a sequence: S tokens, CLS included, and L tokens with padding."""

    tokens: int
    length: int

    def pad(self, x: Float[Array, "B S C"]) -> Float[Array, "B L C"]:
        """Appends the padding: [B, S, C] -> [B, L, C]."""
        padding = self.length - self.tokens
        return jnp.pad(x, ((0, 0), (0, padding), (0, 0))) if padding else x

    def unpad(self, x: Float[Array, "B L C"]) -> Float[Array, "B S C"]:
        """Removes the padding: [B, L, C] -> [B, S, C]."""
        return x[:, : self.tokens]

    def lengths(self, clips: Size, valid: Bool[Array, "B N"] | None) -> Int[Array, " B"] | None:
        """Tokens at the front of each clip's sequence that are attended to: int32 [B].

        valid: bool [B, N], True for the real patches, which come first; None if all are real.
        Returns None if every token of every clip is attended to.
        """
        if valid is not None:
            return 1 + jnp.sum(valid, axis=1, dtype=jnp.int32)
        if self.length > self.tokens:
            return jnp.full(clips, self.tokens, jnp.int32)
        return None


def padded_sequence(patches: int, kernel: str) -> PaddedSequence:
    """The sequence of CLS and `patches` patches for an attention kernel."""
    return PaddedSequence(tokens=1 + patches, length=length_for(1 + patches, kernel))


def pad_for_cls(x: Shaped[Array, "B N *rest"]) -> Shaped[Array, "B 1+N *rest"]:
    """Prepends a zero row for CLS: [B, N, ...] -> [B, 1 + N, ...].

    `set_cls` fills the row in later, so its value does not matter. Reserving it early gives every
    array as many rows as the blocks process, a round number in training, and avoids shifting the
    array by one.
    """
    return jnp.pad(x, [(0, 0), (1, 0)] + [(0, 0)] * (x.ndim - 2))


def set_cls(x: Float[Array, "B S C"], cls: Float[Array, " C"]) -> Float[Array, "B S C"]:
    """x, [B, 1 + N, C], with CLS, [C], as the first token of each clip."""
    return jnp.where(jnp.arange(x.shape[1])[:, None] == 0, cls.astype(x.dtype), x)


def prepend_valid(valid: Bool[Array, "B N"] | None) -> Bool[Array, "B 1+N"] | None:
    """The mask of valid patches, bool [B, N] or None, with CLS in front: [B, 1 + N]."""
    return None if valid is None else jnp.pad(valid, ((0, 0), (1, 0)), constant_values=True)
