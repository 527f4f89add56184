"""What a language model reads of a video: FluxViT's kept tokens, merged and projected."""

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fluxvit_jax.data.patches import patchify
from fluxvit_jax.errors import UserError
from fluxvit_jax.grids import PATCH, Grid
from fluxvit_jax.models import fluxvit
from fluxvit_jax.models.fluxvit import FluxViT, FluxViTConfig
from fluxvit_jax.models.token_selection import GridLimits
from fluxvit_jax.objectives import flux_chat
from fluxvit_jax.objectives.flux_chat_weights import Projection

Tree = dict[str, Any]


class ChatEncoder:
    """Maps frames to tokens of a language model; compiles once for each grid and budget.

    Attributes:
        merge: tokens of the network that become one of the language model.
        width: channels of these.
    """

    def __init__(self, projection: Projection, dtype: str = "float32"):
        config = projection.config
        self.merge: int = config.chat.merge
        self.width: int = projection.connector["fc2"]["bias"].shape[0]
        self._in_time = config.chat.order == "time"
        network = flux_chat.encoder_config(config, jax.default_backend())
        self._network = replace(network, dtype=dtype)
        self._params = jax.device_put(flux_chat.encoder_params(projection.network, network))
        self._connector = jax.device_put(projection.connector)

    def __call__(self, frames: np.ndarray, tokens: int) -> jax.Array:
        """The tokens of a clip, [N, width], in the order of the video.

        frames: uint8 [T, side, side, 3]; tokens: the budget, of which `merge` become one.

        Raises UserError for a budget below `merge`.
        """
        T, side = len(frames), frames.shape[1] // PATCH
        budget = min(tokens, T * side * side)
        if budget < self.merge:
            raise UserError(
                f"--tokens={tokens}: {self.merge} tokens are merged into one; ask for more"
            )
        program = _Program(
            self._network, Grid(T, side, side), self.width, budget, self.merge, self._in_time
        )
        patches = jnp.asarray(patchify(frames))[None]
        return _encode(program, self._params, self._connector, patches)[0]


class _Program(NamedTuple):
    """What a program is compiled for."""

    network: FluxViTConfig
    grid: Grid
    width: int
    budget: int
    merge: int
    in_time: bool


@partial(jax.jit, static_argnums=0)
def _encode(program: _Program, params: Tree, connector: Tree, patches: jax.Array) -> jax.Array:
    """Tokens [B, N, width] of patches uint8 [B, P, 588]."""
    grid, network = program.grid, program.network
    limits = GridLimits(*grid, grid.tokens)
    model: FluxViT = fluxvit.from_params(fluxvit.graphdef(network), params)
    grids = jnp.broadcast_to(jnp.asarray(grid, jnp.int32), (len(patches), 3))
    normalized = fluxvit.normalize(patches, jnp.dtype(network.dtype))
    kept = model.select(normalized, grids, program.budget, limits, jax.random.key(0))
    tokens = flux_chat.features(model, patches, grids[:1], kept, limits)
    projector = flux_chat.connector_of(network, program.width, connector)
    return flux_chat.project(projector, tokens, program.merge, network.heads, program.in_time)
