"""The head that maps clip vectors into the space of texts.

Source: OpenGVLab's InternVideo, InternVideo2/multi_modality, models/internvideo2_clip_small.py
(vision_align).
"""

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Float

from fluxvit_jax.models import blocks
from fluxvit_jax.models.arrays import Array


class ClipHead(nnx.Module):
    """LayerNorm and a linear layer."""

    def __init__(self, width: int, out: int, dtype: DTypeLike, rngs: nnx.Rngs):
        self.norm = blocks.LayerNorm(width, rngs=rngs)
        self.proj = blocks.Linear(width, out, dtype=dtype, rngs=rngs)

    def __call__(self, pooled: Float[Array, "B pool_width"]) -> Float[Array, "B out"]:
        """Clip vectors to vectors that are compared with texts', float32, not normalized."""
        return self.proj(self.norm(pooled)).astype(jnp.float32)
