"""What `benchmarks.gpu` and `benchmarks.peers` have their sides do; without any framework."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from fluxvit_jax.config.checks import validate
from fluxvit_jax.config.fields import default_config
from fluxvit_jax.grids import PATCH, Grid


class Case(NamedTuple):
    """What both have to do.

    dtype: of the computation, "" for what suits the device; compiler: a backend of torch.compile,
    "" for none; weights: a folder, written by ours and read by the others; attention: our kernel;
    checkout: a folder with the official code.
    """

    task: str
    variant: str
    grid: Grid
    budgets: tuple[int, ...]
    batch: int
    dtype: str
    compiler: str
    weights: str
    attention: str = "auto"
    checkout: str = ""


class Side(NamedTuple):
    """One of the two, in its own process.

    about: "platform", "dtype" and what else is to be reported; programs: each starts one call and
    returns what it will give; wait: until such answers are there; fetch: one of their arrays;
    peak: bytes on the device in the calls of a program since it was last asked, None where nobody
    counts them.
    """

    about: dict[str, str]
    programs: dict[str, Callable[[], dict[str, Any]]]
    wait: Callable[[dict[str, Any]], None]
    fetch: Callable[[Any], np.ndarray]
    peak: Callable[[str], int | None]


def make_config(case: Case, dtype: str) -> ConfigDict:
    """One grid, one group of all clips, a rate that stays: all that PyTorch is given as well.

    Raises UserError for a case that cannot be.
    """
    frames, resolution = case.grid.frames, case.grid.resolution
    config = default_config(case.variant)
    config.model.dtype = dtype
    config.model.attention = case.attention
    config.model.drop_path = 0.0
    config.model.scan = False  # the quicker steps
    config.data.grids.frames = str(frames)
    config.data.grids.resolutions = str(resolution)
    config.data.grids.tokens = (case.grid.tokens, case.grid.tokens)
    config.data.clips_per_grid = config.train.batch_size = config.eval.batch_size = case.batch
    config.train.budgets = case.budgets
    config.train.warmup_epochs = 0.0
    config.optim.min_learning_rate = config.optim.learning_rate
    config.optim.layer_decay = 1.0
    config.eval.settings = ((case.budgets[0], frames, resolution),)
    validate(config)
    return config


def clips_of(case: Case, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Videos uint8 [B, T, 14 H, 14 W, 3] of patches of all colours, and labels int32 [B]."""
    B, (T, H, W) = case.batch, case.grid
    rng = np.random.default_rng(0)
    colour = rng.integers(0, 192, (B, T, H, 1, W, 1, 3), np.uint8)
    grain = rng.integers(0, 64, (B, T, H, PATCH, W, PATCH, 3), np.uint8)
    video = (colour + grain).reshape(B, T, H * PATCH, W * PATCH, 3)
    return video, np.arange(B, dtype=np.int32) % classes


def dtype_on(case: Case, platform: str) -> str:
    """The dtype asked for, or what a platform has instructions for."""
    return case.dtype or ("float32" if platform == "cpu" else "bfloat16")


def training_name(case: Case) -> str:
    return " + ".join(map(str, case.budgets))
