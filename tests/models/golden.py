"""The numbers that the official PyTorch code produced, and the tiny network they belong to."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from fluxvit_jax.convert import official_names
from fluxvit_jax.models import fluxvit
from fluxvit_jax.models.token_selection import GridLimits

GOLDEN = Path(__file__).parents[1] / "golden"
PATCH = 14

# What the weights of TINY do not tell, as fields of a config.json.
UNTOLD = {
    "heads": 3,
    "pool_heads": 4,
    "frames": 8,
    "rows": 4,
    "columns": 4,
    "gelu": "erf",
}
TINY = fluxvit.FluxViTConfig(
    width=48, depth=3, heads=3, frames=8, rows=4, columns=4, classes=10, pool_width=64,
    pool_heads=4, gelu="erf", cls="outside", rounding="official",
)  # fmt: skip


@cache
def manifest(name: str) -> dict:
    return json.loads((GOLDEN / f"{name}.json").read_text())


@cache
def arrays(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{name}.npz") as stored:
        return dict(stored)


@cache
def tiny_params() -> dict:
    return official_names.from_official(arrays("tiny_state"), heads=TINY.heads)


def tiny_model(**changes) -> fluxvit.FluxViT:
    return fluxvit.from_params(fluxvit.graphdef(replace(TINY, **changes)), tiny_params())


def patches_of(video: np.ndarray) -> tuple[np.ndarray, tuple[int, int, int]]:
    """Official input [B, 3, T, H, W] as patches [B, T*h*w, 588] and its grid (T, h, w)."""
    B, _, T, height, width = video.shape
    h, w = height // PATCH, width // PATCH
    cut = video.reshape(B, 3, T, h, PATCH, w, PATCH).transpose(0, 2, 3, 5, 4, 6, 1)
    return cut.reshape(B, T * h * w, -1), (T, h, w)


def batch(video: np.ndarray, capacity: int | None = None) -> tuple[jnp.ndarray, jnp.ndarray]:
    """Patches padded to `capacity` with noise, which must not matter, and grids int32 [B, 3]."""
    patches, grid = patches_of(video)
    extra = (capacity or patches.shape[1]) - patches.shape[1]
    noise = np.random.default_rng(0).normal(size=(len(patches), extra, patches.shape[2]))
    patches = np.concatenate([patches, noise.astype(np.float32)], axis=1)
    return jnp.asarray(patches), jnp.tile(jnp.asarray(grid, jnp.int32), (len(patches), 1))


def limits_of(*grids: tuple[int, int, int]) -> GridLimits:
    sides = np.asarray(grids)
    return GridLimits(*(int(s) for s in sides.max(axis=0)), int(sides.prod(axis=1).min()))
