"""Decoders that map a student's features to its teacher's, to compare them.

Source: InternVideo2's distillation, single_modality/models/internvideo2_distill.py: one decoder
for each pair of layers, one position table for all of them, one decoder for the pooled vector.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from fluxvit_jax.models import blocks, position_embedding
from fluxvit_jax.models.arrays import Array
from fluxvit_jax.models.token_selection import GridLimits


@dataclass(frozen=True)
class DecodersConfig:
    """The shape of the decoders.

    count: pairs of layers; width, pool_width: the student's; target_width, target_pool_width: the
    teacher's; frames, rows, columns: the grid of the position table.
    """

    count: int
    width: int
    pool_width: int
    target_width: int
    target_pool_width: int
    frames: int
    rows: int
    columns: int
    dtype: str = "float32"


class Decoder(nnx.Module):
    """Linear, GELU (erf, even if the blocks have its tanh form), linear, LayerNorm."""

    def __init__(self, width: int, out: int, dtype: DTypeLike, rngs: nnx.Rngs):
        self.fc1 = blocks.Linear(width, width, dtype=dtype, rngs=rngs)
        self.fc2 = blocks.Linear(width, out, dtype=dtype, rngs=rngs)
        self.norm = blocks.LayerNorm(out, rngs=rngs)

    def __call__(self, x: Float[Array, "*batch C"]) -> Float[Array, "*batch out"]:
        """[..., C] -> float32 [..., out]."""
        return self.norm(self.fc2(jax.nn.gelu(self.fc1(x), approximate=False)))


class Decoders(nnx.Module):
    """The parameters of a student that only distillation needs; dropped afterwards."""

    def __init__(self, config: DecodersConfig, rngs: nnx.Rngs):
        self.config = config
        C, dtype = config.width, jnp.dtype(config.dtype)
        self.pos_embed = nnx.Param(
            jnp.asarray(
                position_embedding.sincos_table(config.frames, config.rows, config.columns, C)
            )
        )
        self.tokens = blocks.stack(
            config.count, rngs, lambda r: Decoder(C, config.target_width, dtype, r)
        )
        self.pooled = Decoder(config.pool_width, config.target_pool_width, dtype, rngs)

    def compare(
        self,
        hidden_states: Float[Array, "K B S C"],
        position: Float[Array, "B S C"],
        targets: Float[Array, "K B S out"],
        measure: Callable[[jax.Array, jax.Array], jax.Array],
    ) -> Float[Array, "K *rest"]:
        """`measure(decoded tokens, target)` of each pair of layers: [K, ...].

        hidden_states: [K, B, 1 + N, C], after some blocks, CLS first; position: of these tokens, by
        `position`; targets: [K, B, 1 + N, out]. Decoded tokens are float32 [B, 1 + N, out]. Pairs
        are processed one after another, and decoded again in the backward pass: all decoded tokens
        at once would be as large as the targets, in float32.
        """
        graph, state = nnx.split(self.tokens)

        @jax.checkpoint
        def compare_pair(decoder: nnx.State, x: jax.Array, target: jax.Array) -> jax.Array:
            return measure(nnx.merge(graph, decoder)(x + position), target)

        return jax.lax.map(lambda pair: compare_pair(*pair), (state, hidden_states, targets))

    def position(
        self, grid: Int[Array, "G 3"], index: Int[Array, "B N"], limits: GridLimits
    ) -> Float[Array, "B 1+N C"]:
        """Position embeddings of CLS and of selected patches: as `FluxViT.position`."""
        config, table = self.config, self.pos_embed[...]
        patches = table[1:].reshape(config.frames, config.rows, config.columns, config.width)
        return position_embedding.token_positions(
            table[0], patches, grid, index, limits[:3]
        ).astype(config.dtype)
