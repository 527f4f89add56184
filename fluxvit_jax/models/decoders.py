"""What a student's features become before they are compared with a teacher's.

Source: InternVideo2's distillation, single_modality/models/internvideo2_distill.py: one decoder
for each pair of layers, one table of positions for all of them, one decoder for the pooled vector.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from fluxvit_jax.models import layers, positions
from fluxvit_jax.models.selection import GridLimits


@dataclass(frozen=True)
class DecodersConfig:
    """count: pairs of layers; width, pool_width: the student's; target_width, target_pool_width:
    the teacher's; frames, rows, columns: the grid of the position table.
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
    """Linear, GELU (erf, also where the blocks have its tanh form), linear, LayerNorm."""

    def __init__(self, width: int, out: int, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.fc1 = layers.Linear(width, width, dtype=dtype, rngs=rngs)
        self.fc2 = layers.Linear(width, out, dtype=dtype, rngs=rngs)
        self.norm = layers.LayerNorm(out, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., C] -> float32 [..., out]."""
        return self.norm(self.fc2(jax.nn.gelu(self.fc1(x), approximate=False)))


class Decoders(nnx.Module):
    """All that a student has for its teacher alone; dropped afterwards."""

    def __init__(self, config: DecodersConfig, rngs: nnx.Rngs):
        self.config = config
        C, dtype = config.width, jnp.dtype(config.dtype)
        self.pos_embed = nnx.Param(
            jnp.asarray(positions.sincos_table(config.frames, config.rows, config.columns, C))
        )
        self.tokens = layers.stack(
            config.count, rngs, lambda own: Decoder(C, config.target_width, dtype, own)
        )
        self.pooled = Decoder(config.pool_width, config.target_pool_width, dtype, rngs)

    def compare(
        self,
        middle: jax.Array,
        position: jax.Array,
        targets: jax.Array,
        measure: Callable[[jax.Array, jax.Array], jax.Array],
    ) -> jax.Array:
        """`measure(tokens as the teacher has them, target)` of each pair of layers: [K, ...].

        middle: [K, B, 1 + N, C], after some blocks, CLS first; position: theirs, as `position` has
        it; targets: [K, B, 1 + N, out]. What `measure` gets first is float32 [B, 1 + N, out]. One
        pair after another, and decoded once more on the way back: all that is decoded at once would
        be as large as what the teacher keeps, in float32.
        """
        graph, state = nnx.split(self.tokens)

        @jax.checkpoint
        def one(own: nnx.State, x: jax.Array, target: jax.Array) -> jax.Array:
            return measure(nnx.merge(graph, own)(x + position), target)

        return jax.lax.map(lambda pair: one(*pair), (state, middle, targets))

    def position(self, grid: jax.Array, index: jax.Array, limits: GridLimits) -> jax.Array:
        """Positions of CLS and of kept patches, [B, 1 + N, C]: as `FluxViT.position`."""
        config, table = self.config, self.pos_embed[...]
        patches = table[1:].reshape(config.frames, config.rows, config.columns, config.width)
        return positions.of_tokens(table[0], patches, grid, index, limits[:3]).astype(config.dtype)
