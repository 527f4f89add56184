"""The recipe of `benchmarks.soak`, and a decoder that two videos bring down.

    --config=benchmarks/soak_recipe.py:FOLDER

FOLDER has train/, validation/, train.csv and validation.csv. The network and its grids are the
demo's. `hangs.mp4` never ends to be read and `crashes.mp4` is a segmentation fault, if they are
videos: a FOLDER in which they are broken files is the undisturbed run's.
"""

import ctypes
import dataclasses
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from fluxvit_jax.data import images, pipeline

HANGS, CRASHES = "hangs.mp4", "crashes.mp4"
CLIP_SECONDS = 5.0


def get_config(folder: str) -> ConfigDict:
    from benchmarks import soak_recipe  # a recipe's own classes cannot be pickled for workers
    from fluxvit_jax.recipes import custom  # which workers need not import

    pipeline.TrainGroups = soak_recipe.FatalGroups
    config = custom.get_config("tiny")
    config.data.train = f"{folder}/train.csv"
    config.data.validation = f"{folder}/validation.csv"
    config.data.root = folder
    config.data.clip_seconds = CLIP_SECONDS
    config.data.max_bad_fraction = 0.1
    config.train.epochs = 100
    config.eval.every_epochs = 25
    config.checkpoint.every_steps = 20
    config.log.every_steps = 5
    return config


def open_clip(path: str) -> "images.Video | images.Image":
    """Opens a video of training, as `images.open_clip` does but for two."""
    video = images.open_clip(path)  # raises DecodeError for a broken file
    name = os.path.basename(path)
    while name == HANGS:
        time.sleep(1)
    if name == CRASHES:
        ctypes.string_at(0)
    return video


@dataclasses.dataclass(repr=False)
class FatalGroups(pipeline.TrainGroups):
    """Groups of training whose videos are opened so."""

    open_video: Callable[..., Any] = open_clip


def write_folder(folder: Path, clips: Path, broken: bool) -> None:
    """A FOLDER with links to the clips of `fluxvit_jax.data.synthetic` and the two videos."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "validation"):
        if not (folder / split).exists():
            (folder / split).symlink_to((clips / split).resolve())
    header, *rows = (clips / "train.csv").read_text().splitlines()
    video, label = rows[0].split(",")
    content = (clips / video).read_bytes()
    for name in (HANGS, CRASHES):
        (folder / name).write_bytes(content[:100] if broken else content)
    rows += [f"{name},{label}" for name in (HANGS, CRASHES)]
    (folder / "train.csv").write_text("\n".join([header, *rows]) + "\n")
    (folder / "validation.csv").write_text((clips / "validation.csv").read_text())
