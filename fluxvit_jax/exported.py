"""Runs what `--mode=export` wrote. Of all that this package needs, it needs JAX and NumPy only."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.export
import numpy as np

from fluxvit_jax.budgets import PATCH
from fluxvit_jax.data.patches import patchify
from fluxvit_jax.data.sampling import resized_size, test_crops, test_frames

MANIFEST = "manifest.json"
WEIGHTS = "weights.npz"
VERSION = 1  # of the folder's layout


class ExportedOutput(NamedTuple):
    """logits: float32 [B, classes]; pooled: float32 [B, pool_width]; kept: bool [B, T, H, W]."""

    logits: jax.Array
    pooled: jax.Array
    kept: jax.Array


class ExportedModel:
    """An exported network; its programs are loaded when they are first asked for.

    Attributes:
        manifest: what the folder says of itself.
        budgets: the token budgets it can be asked at, largest first.
        classes: names of the classes, as far as they are known.
    """

    def __init__(self, folder: str | os.PathLike):
        """Raises ValueError if a file is missing, damaged, or of a later version."""
        self._folder = Path(folder)
        self.manifest = self._read_manifest()
        self.budgets = sorted(map(int, self.manifest["budgets"]), reverse=True)
        self.classes = tuple(self.manifest["classes"])
        weights = self.manifest["weights"]
        path = self._checked(weights["file"], weights["sha256"])
        with np.load(path) as arrays:
            self._params = {name: jax.device_put(array) for name, array in arrays.items()}
        self._programs: dict[int, Any] = {}

    def __call__(self, video: np.ndarray, tokens: int | None = None) -> ExportedOutput:
        """Class scores and vectors of clips at a token budget.

        Args:
            video: uint8 pixels, RGB, [T, height, width, 3] or [B, T, ...]. Where they are not of
                the budget's grid, frames are taken evenly, the short side is scaled and the middle
                square cut out.
            tokens: one of `budgets`; the largest by default.

        Raises ValueError for a video or budget that cannot be.
        """
        budget = self.budgets[0] if tokens is None else tokens
        if budget not in self.budgets:
            raise ValueError(f"there is no program for {budget} tokens, but for {self.budgets}")
        own = self.manifest["budgets"][str(budget)]
        clips = fit(video, own["frames"], own["resolution"])
        patches = np.stack([patchify(clip) for clip in clips])
        if budget not in self._programs:
            program = self._checked(own["program"], own["sha256"]).read_bytes()
            self._programs[budget] = jax.jit(jax.export.deserialize(bytearray(program)).call)
        logits, pooled, kept = self._programs[budget](self._params, patches)
        side = own["resolution"] // PATCH
        return ExportedOutput(logits, pooled, kept.reshape(-1, own["frames"], side, side))

    def _read_manifest(self) -> dict[str, Any]:
        path = self._folder / MANIFEST
        try:
            manifest = json.loads(path.read_text())
            version = manifest["version"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: is no manifest of an exported network: {error}") from error
        if version != VERSION:
            raise ValueError(f"{path}: is of version {version}, and this reads version {VERSION}")
        return manifest

    def _checked(self, name: str, checksum: str) -> Path:
        """The path of a file of the folder, after comparing its checksum."""
        path = self._folder / Path(name).name
        try:
            found = sha256(path)
        except OSError as error:
            raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
        if found != checksum:
            raise ValueError(f"{path}: its checksum differs from the manifest's; export again")
        return path


def load_exported(folder: str | os.PathLike) -> ExportedModel:
    """The network that `--mode=export` wrote into a folder.

    >>> model = fluxvit_jax.load_exported("exported")
    >>> out = model(video, tokens=1024)

    Raises ValueError if a file is missing, damaged, or of a later version.
    """
    return ExportedModel(folder)


def fit(video: np.ndarray, T: int, resolution: int) -> np.ndarray:
    """A video as uint8 [B, T, resolution, resolution, 3]; untouched where it is that already."""
    video = np.asarray(video)
    if video.ndim == 4:
        video = video[None]
    if video.ndim != 5 or video.shape[-1] != 3 or 0 in video.shape or video.dtype != np.uint8:
        found = f"{video.dtype} {video.shape}"
        raise ValueError(f"a video is uint8 [T, height, width, 3] or [B, T, ...], not {found}")
    if video.shape[1] != T:
        video = video[:, test_frames(video.shape[1], T)]
    if video.shape[2:4] != (resolution, resolution):
        video = middle_square(video, resolution)
    return video


def middle_square(video: np.ndarray, resolution: int) -> np.ndarray:
    """uint8 [B, T, resolution, resolution, 3]: the short side scaled bilinearly, then cut."""
    height, width = resized_size(*video.shape[2:4], resolution)
    shape = (*video.shape[:2], height, width, 3)
    resized = jax.image.resize(video.astype(np.float32), shape, "linear", antialias=False)
    y, x = test_crops(height, width, 1)[0]
    square = resized[:, :, y : y + resolution, x : x + resolution]
    return np.asarray(square.round().clip(0, 255)).astype(np.uint8)


def sha256(path: Path) -> str:
    """The checksum of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
