"""How much moves in a video: the mean frame difference of its patches, as the selector has it."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.stages import Wrapped

from fluxvit_jax.distributed.mesh import (
    batch_sharding,
    compiler_options,
    local_rows,
    shard_batch,
    traced_on_mesh,
)
from fluxvit_jax.evaluation.view_programs import on_view
from fluxvit_jax.grids import Grid
from fluxvit_jax.models.fluxvit import FluxViTConfig
from fluxvit_jax.models.token_selection import frame_difference


@functools.lru_cache
def score_program(model: FluxViTConfig, grid: Grid, seed: int, mesh: Mesh) -> Wrapped:
    """The jitted program of scores: (params, patches uint8 [b, P, 588]) -> float32 [b]."""

    def score(params: dict, patches: jax.Array) -> jax.Array:
        clips = jnp.zeros(len(patches), jnp.int32)  # of no concern: nothing is random here
        network, patches, _ = on_view(params, patches, clips, jnp.int32(0), model, seed)
        grids = jnp.broadcast_to(jnp.asarray(grid, jnp.int32), (len(patches), 3))
        tokens = network.patch_embed(patches)
        return frame_difference(tokens, grids, jnp.ones_like(clips), order=2).mean(axis=1)

    by_clip = batch_sharding(mesh)
    return jax.jit(
        traced_on_mesh(score, mesh),
        in_shardings=(None, by_clip),
        out_shardings=by_clip,
        compiler_options=compiler_options(mesh),
    )


def scorer(
    model: FluxViTConfig, grid: Grid, params: dict, seed: int, mesh: Mesh
) -> Callable[[np.ndarray], np.ndarray]:
    """Scores of clips: uint8 [b, P, 588] -> float32 [b]; params: on the devices."""
    program = score_program(model, grid, seed, mesh)

    def score(patches: np.ndarray) -> np.ndarray:
        return local_rows(program(params, shard_batch({"patches": patches}, mesh)["patches"]))

    return score
