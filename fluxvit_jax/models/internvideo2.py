"""The vision encoder of InternVideo2, the teacher: patches and their grid in, features out.

FluxViT is a modified version of this network, which has no norms around the patch embedding, no
position terms beyond the table (GPE, LPE), one pooling head, no classifier. The official encoder
processes all tokens of the grid it was built for. This one processes the selected tokens of any
grid, with positions resized to that grid as the official loader resizes them once.

Source: InternVideo2 of OpenGVLab's InternVideo, single_modality/models/internvideo2_teacher.py.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Int

from fluxvit_jax.models import blocks, padded_sequence, position_embedding, sharding_constraints
from fluxvit_jax.models.arrays import Array
from fluxvit_jax.models.fluxvit import PATCH_VALUES, Features
from fluxvit_jax.models.token_selection import GridLimits, Selection


@dataclass(frozen=True)
class InternVideo2Config:
    """The network's shape; the default is that of 1B.

    frames, rows, columns: the grid of the position table (4 frames in the file of stage 2, 8 in
    that of stage 1). gelu: "tanh" is the fused layer that the weights were trained with, "erf" the
    other path of the official code. float32_products: for CPUs, as in `blocks.BlockConfig`.
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
    float32_products: bool = False


class InternVideo2(nnx.Module):
    """The network, for deterministic forward passes."""

    def __init__(self, config: InternVideo2Config, rngs: nnx.Rngs):
        self.config = config
        C, dtype = config.width, jnp.dtype(config.dtype)
        self.cls_token = nnx.Param(blocks.kernel_init(rngs.params(), (C,)))
        self.pos_embed = nnx.Param(
            jnp.asarray(
                position_embedding.sincos_table(config.frames, config.rows, config.columns, C)
            )
        )
        self.patch_embed = blocks.Linear(PATCH_VALUES, C, dtype=dtype, rngs=rngs)
        block = blocks.BlockConfig(
            width=C,
            heads=config.heads,
            hidden=config.hidden,
            kernel=config.attention,
            exact=config.gelu == "erf",
            dtype=dtype,
            lpe=False,
            float32_products=config.float32_products,
        )
        self.blocks = blocks.stack(config.depth, rngs, partial(blocks.Block, block))
        self.pool = blocks.AttentionPool(C, config.pool_width, config.pool_heads, dtype, rngs)

    def features(
        self,
        patches: Float[Array, "B S 588"],
        position: Float[Array, "B S C"],
        kept: Selection,
        after: tuple[int, ...],
    ) -> Features:
        """The features of selected patches: as `FluxViT.features`."""
        sequence = padded_sequence.padded_sequence(kept.token_index.shape[1], self.config.attention)
        x = sequence.pad(self.embed(patches, position))
        x, outputs = self._run_blocks(x, sequence.lengths(x.shape[0], kept.valid), after)
        tokens, valid = sequence.unpad(x), padded_sequence.prepend_valid(kept.valid)
        attention = self.pool.weights(tokens, valid)[:, 1:]
        return Features(outputs[:, :, : sequence.tokens], self.pool(tokens, valid), attention)

    def embed(
        self, patches: Float[Array, "B S 588"], position: Float[Array, "B S C"]
    ) -> Float[Array, "B S C"]:
        """Token embeddings with positions added, [B, 1 + N, C], CLS first."""
        x = self.patch_embed(sharding_constraints.constrain_batch(patches))
        return padded_sequence.set_cls(x, self.cls_token[...]) + position

    def position(
        self, grid: Int[Array, "G 3"], index: Int[Array, "B N"], limits: GridLimits
    ) -> Float[Array, "B 1+N C"]:
        """Position embeddings of CLS and of selected patches: as `FluxViT.position`."""
        config, table = self.config, self.pos_embed[...]
        native = (config.frames, config.rows, config.columns, config.width)
        patches = table[1:].reshape(native)
        return position_embedding.token_positions(
            table[0], patches, grid, index, limits[:3]
        ).astype(config.dtype)

    def _run_blocks(
        self, x: jax.Array, lengths: jax.Array | None, after: tuple[int, ...]
    ) -> tuple[jax.Array, jax.Array]:
        """x, [B, L, C], after all blocks, and after the K blocks `after`, [K, B, L, C]."""
        graph, stacked = nnx.split(self.blocks)
        slots = np.full(self.config.depth, len(after))  # other blocks write to an unused last slot
        slots[list(after)] = range(len(after))

        def body(carry: tuple, layer: tuple) -> tuple[tuple, None]:
            (x, outputs), (state, slot) = carry, layer
            x = nnx.merge(graph, state)(x, lengths, 0.0, None)
            return (x, outputs.at[slot].set(x)), None

        outputs = jnp.zeros((len(after) + 1, *x.shape), x.dtype)
        (x, outputs), _ = jax.lax.scan(body, (x, outputs), (stacked, jnp.asarray(slots)))
        return x, outputs[:-1]
