"""What a language model reads of a video: FluxViT's kept tokens, merged and projected."""

from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jax.stages import Wrapped

from fluxvit_jax.data.patches import patchify
from fluxvit_jax.distributed import partition_rules
from fluxvit_jax.distributed.mesh import (
    compiler_options,
    device_put_global,
    mesh_over,
    platform_of,
    put_rows,
    traced_on_mesh,
)
from fluxvit_jax.errors import UserError
from fluxvit_jax.grids import PATCH, Grid
from fluxvit_jax.models.fluxvit import FluxViTConfig
from fluxvit_jax.objectives import flux_chat
from fluxvit_jax.objectives.flux_chat import CONNECTOR, FluxChat
from fluxvit_jax.objectives.flux_chat_weights import Projection
from fluxvit_jax.objectives.frame_times import VideoTokens

Tree = dict[str, Any]


class ChatEncoder:
    """Maps frames to tokens of a language model; compiles once for each grid and budget.

    Attributes:
        merge: tokens of the network that become one of the language model.
        width: channels of these.
        frame_times: whether the language model was trained with the times of frames between.

    mesh: the devices, which split clips and parameters; by default the first one alone.
    """

    def __init__(self, projection: Projection, dtype: str = "float32", mesh: Mesh | None = None):
        config = projection.config
        self._mesh = mesh or mesh_over("fsdp", jax.devices()[:1])
        self.merge: int = config.chat.merge
        self.width: int = projection.connector["fc2"]["bias"].shape[0]
        self.frame_times: bool = config.chat.frame_times
        self._order = flux_chat.token_order(config)
        network = flux_chat.encoder_config(config, platform_of(self._mesh))
        self._network = replace(network, dtype=dtype)
        params = flux_chat.encoder_params(projection.network, network)
        params |= {CONNECTOR: projection.connector}
        shardings = partition_rules.shardings(params, self._mesh, FluxChat.partition_rules)
        self._params = device_put_global(params, shardings)

    def __call__(self, frames: np.ndarray, tokens: int) -> jax.Array:
        """The tokens of a clip, [N, width], in the order of the video.

        frames: uint8 [T, side, side, 3]; tokens: the budget, of which `merge` become one.

        Raises UserError for a budget below `merge`, and ValueError for other frames.
        """
        return self.encode(frames[None], tokens).tokens[0]

    def encode(self, clips: np.ndarray, tokens: int) -> VideoTokens:
        """The same of several clips, uint8 [B, T, side, side, 3], with the tokens' frames.

        Raises ValueError for others.
        """
        T, side = clips.shape[1], clips.shape[2] // PATCH
        expected = (len(clips), T, side * PATCH, side * PATCH, 3)
        if clips.dtype != np.uint8 or clips.shape != expected or 0 in expected:
            raise ValueError(
                f"frames are uint8 [T, side, side, 3], the side a multiple of {PATCH}, not "
                f"{clips.dtype} {list(clips.shape[1:])}"
            )
        budget = min(tokens, T * side * side)
        if budget < self.merge:
            raise UserError(
                f"--tokens={tokens}: {self.merge} tokens are merged into one; ask for more"
            )
        program = _Program(
            self._network, Grid(T, side, side), self.width, budget, self.merge, self._order
        )
        patches = np.stack([patchify(frames) for frames in clips])
        return _compiled(program, self._mesh)(self._params, put_rows(patches, self._mesh))


class _Program(NamedTuple):
    """What a program is compiled for."""

    network: FluxViTConfig
    grid: Grid
    width: int
    budget: int
    merge: int
    order: str


@lru_cache
def _compiled(program: _Program, mesh: Mesh) -> Wrapped:
    """The jitted program: (params, patches uint8 [B, P, 588]) -> tokens, [B, N, width]."""

    def encode(params: Tree, patches: jax.Array) -> VideoTokens:
        return _encode(program, params, patches)

    return jax.jit(traced_on_mesh(encode, mesh), compiler_options=compiler_options(mesh))


def _encode(program: _Program, params: Tree, patches: jax.Array) -> VideoTokens:
    network, params = program.network, dict(params)
    projector = flux_chat.connector_of(network, program.width, params.pop(CONNECTOR))
    found = flux_chat.features_on_grid(network, params, patches, program.grid, program.budget)
    return flux_chat.project(
        projector, VideoTokens(*found), program.merge, network.heads, program.order
    )
