"""The vision encoder of InternVideo2, the teacher: patches and their grid in, features out.

It is FluxViT's network before FluxViT changed it: no norms around the patch embedding, no position
terms beyond the table (GPE, LPE), one pooling head, no classifier. The official encoder
sees all tokens of the grid it was built for; this one sees those that are kept of any grid, with
positions resized to it as the official loader resizes them once.

Source: InternVideo2 of OpenGVLab's InternVideo, single_modality/models/internvideo2_teacher.py.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fluxvit_jax.models import layers, placement, positions, sequence
from fluxvit_jax.models.fluxvit import PATCH_VALUES, Features
from fluxvit_jax.models.selection import GridLimits, Selection


@dataclass(frozen=True)
class InternVideo2Config:
    """The network's shape; the default is 1B's.

    frames, rows, columns: the grid of the position table (4 frames in the file of stage 2, 8 in
    that of stage 1). gelu: "tanh" is the fused layer that the weights were trained with, "erf" the
    official code's other path.
    """

    width: int = 1408
    depth: int = 40
    heads: int = 16
    hidden: int = 6144
    frames: int = 4
    rows: int = 16
    columns: int = 16
    pool_width: int = 768
    pool_heads: int = 16
    gelu: str = "tanh"
    dtype: str = "bfloat16"
    attention: str = "xla"


class InternVideo2(nnx.Module):
    """The network, for forward passes; without anything random."""

    def __init__(self, config: InternVideo2Config, rngs: nnx.Rngs):
        self.config = config
        C, dtype = config.width, jnp.dtype(config.dtype)
        self.cls_token = nnx.Param(layers.kernel_init(rngs.params(), (C,)))
        self.pos_embed = nnx.Param(
            jnp.asarray(positions.sincos_table(config.frames, config.rows, config.columns, C))
        )
        self.patch_embed = layers.Linear(PATCH_VALUES, C, dtype=dtype, rngs=rngs)
        block = layers.BlockConfig(
            width=C,
            heads=config.heads,
            hidden=config.hidden,
            kernel=config.attention,
            exact=config.gelu == "erf",
            dtype=dtype,
            lpe=False,
        )
        self.blocks = layers.stack(config.depth, rngs, partial(layers.Block, block))
        self.pool = layers.AttentionPool(C, config.pool_width, config.pool_heads, dtype, rngs)

    def features(
        self, patches: jax.Array, position: jax.Array, kept: Selection, after: tuple[int, ...]
    ) -> Features:
        """The features of kept patches: as `FluxViT.features`."""
        places = sequence.of(kept.index.shape[1], self.config.attention)
        x = places.pad(self.embed(patches, position))
        x, middle = self._run_blocks(x, places.real(x.shape[0], kept.valid), after)
        tokens, valid = places.cut(x), sequence.with_cls(kept.valid)
        attention = self.pool.weights(tokens, valid)[:, 1:]
        return Features(middle[:, :, : places.tokens], self.pool(tokens, valid), attention)

    def embed(self, patches: jax.Array, position: jax.Array) -> jax.Array:
        """Tokens with their positions, [B, 1 + N, C], CLS first."""
        x = self.patch_embed(placement.by_clip(patches))
        return sequence.put_cls(x, self.cls_token[...]) + position

    def position(self, grid: jax.Array, index: jax.Array, limits: GridLimits) -> jax.Array:
        """The position embeddings of CLS and of kept patches: as `FluxViT.position`."""
        config, table = self.config, self.pos_embed[...]
        native = (config.frames, config.rows, config.columns, config.width)
        patches = table[1:].reshape(native)
        return positions.of_tokens(table[0], patches, grid, index, limits[:3]).astype(config.dtype)

    def _run_blocks(
        self, x: jax.Array, lengths: jax.Array | None, after: tuple[int, ...]
    ) -> tuple[jax.Array, jax.Array]:
        """x, [B, N, C], after all blocks, and after those of `after`, [K, B, N, C]."""
        graph, stacked = nnx.split(self.blocks)
        slots = np.full(self.config.depth, len(after))  # all others overwrite one slot too many
        slots[list(after)] = range(len(after))

        def body(carry, layer):
            (x, middle), (state, slot) = carry, layer
            x = nnx.merge(graph, state)(x, lengths, 0.0, None)
            return (x, middle.at[slot].set(x)), None

        middle = jnp.zeros((len(after) + 1, *x.shape), x.dtype)
        (x, middle), _ = jax.lax.scan(body, (x, middle), (stacked, jnp.asarray(slots)))
        return x, middle[:-1]
