"""Pictures of the patches that a few validation clips keep, for TensorBoard."""

from functools import cached_property

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from fluxvit_jax.config.network import model_config
from fluxvit_jax.data.evaluation_videos import EvaluationVideos
from fluxvit_jax.data.multi_label import multi_hot_classes
from fluxvit_jax.data.patches import unpatchify
from fluxvit_jax.data.sources import Source
from fluxvit_jax.data.supervised_workers import Quarantine
from fluxvit_jax.data.views import Views
from fluxvit_jax.deploy.page import fade
from fluxvit_jax.distributed.mesh import (
    compiler_options,
    device_put_global,
    platform_of,
    replicated,
    traced_on_mesh,
)
from fluxvit_jax.evaluation.settings import Setting, settings_of
from fluxvit_jax.models import fluxvit, token_selection
from fluxvit_jax.models.fluxvit import FluxViTConfig
from fluxvit_jax.models.token_selection import GridLimits

CLIPS = 4  # spread evenly over the validation videos
FRAMES = 8  # most frames of a clip, spread evenly over it
SIDE, GAP = 112, 4  # pixels, of a frame and between two


class KeptPatches:
    """Pictures of `eval.settings` on the same few clips, decoded once and on every host.

    Selecting needs the embedding of the patches only, so none of the blocks is run or compiled.

    quarantine: clips that are not to be read, by id.
    """

    def __init__(self, config: ConfigDict, source: Source, mesh: Mesh, quarantine: Quarantine):
        self._source = source
        self._quarantine = quarantine
        self._multi_hot = multi_hot_classes(config)
        self._mesh = mesh
        self._model = model_config(config, platform_of(mesh))
        self._settings = settings_of(config) if self._model.selector != "none" else []
        self._programs = [_program(self._model, setting, mesh) for setting in self._settings]

    def pictures(self, params: dict) -> dict[str, np.ndarray]:
        """{"kept_1024": uint8 [height, width, 3], ...}, a row per clip, dropped patches faded.

        Empty if no clip can be read, or the network selects nothing. All hosts call it.
        """
        if not self._settings:
            return {}
        params = fluxvit.network_params(params)
        pictures = {}
        for setting, program, patches in zip(
            self._settings, self._programs, self._patches, strict=True
        ):
            if len(patches):
                on_devices = device_put_global(patches, replicated(self._mesh))
                kept = np.asarray(program(params, on_devices)).reshape(-1, *setting.grid)
                rows = [
                    _row(unpatchify(own, setting.grid), mask)
                    for own, mask in zip(patches, kept, strict=True)
                ]
                pictures[f"kept_{setting.budget}"] = np.concatenate(rows)
        return pictures

    @cached_property
    def _patches(self) -> list[np.ndarray]:
        """The clips that can be read, for each setting: uint8 [n, P, 588]."""
        grids = tuple(setting.grid for setting in self._settings)
        videos = EvaluationVideos(
            self._source, grids, Views(), multi_hot=self._multi_hot, quarantine=self._quarantine
        )
        numbers = np.unique(np.linspace(0, len(videos) - 1, CLIPS).astype(int))
        items = [videos[int(number)] for number in numbers]
        read = [item for item in items if not item["failure"][0]]
        return [np.array([item[f"patches{k}"][0, 0] for item in read]) for k in range(len(grids))]


def _program(model: FluxViTConfig, setting: Setting, mesh: Mesh) -> jax.stages.Wrapped:
    """The jitted mask of kept patches: (params, patches uint8 [n, P, 588]) -> bool [n, P]."""
    graph, grid = fluxvit.graphdef(model), setting.grid

    def mask(params: dict, patches: jax.Array) -> jax.Array:
        network = fluxvit.from_params(graph, params)
        patches = fluxvit.normalize(patches, jnp.dtype(model.dtype))
        grids = jnp.broadcast_to(jnp.asarray(grid, jnp.int32), (len(patches), 3))
        limits = GridLimits(*grid, grid.tokens)
        kept = network.select(patches, grids, setting.budget, limits, jax.random.key(0))
        return token_selection.mask(kept, grid.tokens)

    everywhere = replicated(mesh)
    return jax.jit(
        traced_on_mesh(mask, mesh),
        in_shardings=(None, everywhere),  # None: parameters keep their sharding
        out_shardings=everywhere,
        compiler_options=compiler_options(mesh),
    )


def _row(frames: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Some of the frames of a clip beside each other: uint8 [SIDE + GAP, width, 3]."""
    chosen = np.unique(np.linspace(0, len(frames) - 1, FRAMES).astype(int))
    row = np.full((SIDE + GAP, len(chosen) * (SIDE + GAP), 3), 255, np.uint8)
    for i, frame in enumerate(fade(frames[chosen], kept[chosen])):
        left = i * (SIDE + GAP)
        row[:SIDE, left : left + SIDE] = cv2.resize(
            frame, (SIDE, SIDE), interpolation=cv2.INTER_AREA
        )
    return row
