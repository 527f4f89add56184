"""What a student's features become before they are compared with a teacher's.

Source: InternVideo2's distillation, single_modality/models/internvideo2_distill.py: one decoder
for each pair of layers, one table of positions for all of them, one decoder for the pooled vector.
"""

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

    def __call__(
        self, middle: jax.Array, grid: jax.Array, index: jax.Array, limits: GridLimits
    ) -> jax.Array:
        """The tokens after some blocks as the teacher would have them: float32 [K, B, 1 + N, out].

        middle: [K, B, 1 + N, C], CLS first; grid: int32 [G, 3] where G divides B, one grid for each
        run of B / G clips; index: int32 [B, N], the places of the others.
        """
        graph, state = nnx.split(self.tokens)
        x = middle + self.position(grid, index, limits).astype(middle.dtype)
        return jax.vmap(lambda own, x: nnx.merge(graph, own)(x))(state, x)

    def position(self, grid: jax.Array, index: jax.Array, limits: GridLimits) -> jax.Array:
        """Positions of tokens, CLS first: float32 [B, 1 + N, C]."""
        config, table = self.config, self.pos_embed[...]
        patches = table[1:].reshape(config.frames, config.rows, config.columns, config.width)
        return positions.of_tokens(table[0], patches, grid, index, limits[:3])
