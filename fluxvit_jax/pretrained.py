"""A trained network to call from Python: `from_pretrained`, and what it returns."""

import functools
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import jax
import jax.numpy as jnp
import numpy as np

from fluxvit_jax.budgets import PATCH, Grid, nearest_head
from fluxvit_jax.convert import files, names
from fluxvit_jax.convert.config_json import PretrainedConfig
from fluxvit_jax.data.patches import patchify
from fluxvit_jax.models import fluxvit, selection
from fluxvit_jax.models.fluxvit import Answer, FluxViTConfig
from fluxvit_jax.models.selection import NOISY_SELECTORS


class Output(NamedTuple):
    """What the network says of B clips.

    logits: float32 [B, classes]; pooled: float32 [B, pool_width], the clips' vectors;
    kept: bool [B, T, H, W], the patches that were looked at, and tokens_kept, how many they are in
    each clip; head: which of the heads answered.
    """

    logits: jax.Array
    pooled: jax.Array
    kept: jax.Array
    tokens_kept: int
    head: int


class Features(NamedTuple):
    """The kept tokens of B clips after the last block, in the order t, h, w.

    tokens: [B, N, C]; places: int32 [B, N, 3], frame, patch row and column of each;
    pooled: float32 [B, pool_width].
    """

    tokens: np.ndarray
    places: np.ndarray
    pooled: np.ndarray


def from_pretrained(
    path: str | os.PathLike,
    config: Mapping[str, Any] | str | os.PathLike | None = None,
    dtype: str = "float32",
) -> "PretrainedModel":
    """The network in `path`, ready to be called.

    Args:
        path: a workdir, one step of it, a folder that `save_pretrained` or the converter wrote, a
            .safetensors file, or an official .pth file.
        config: fields of `config.json`, or the path of such a file: what a bare file does not tell,
            or what is to be otherwise than the file says, such as {"gelu": "erf"}.
        dtype: of the computation, "float32" or "bfloat16". Parameters are float32.

    Raises:
        UserError: there are no such weights, or they do not fit.

    >>> model = fluxvit_jax.from_pretrained("runs/k400_small")
    >>> out = model(video, tokens=1024)
    >>> out.logits.argmax(-1), out.tokens_kept
    """
    if isinstance(config, str | os.PathLike):
        config = files.read_config(config)
    found = files.read(path, config)
    model = replace(found.config.model, dtype=dtype)
    return PretrainedModel(found.params(np.float32), replace(found.config, model=model))


class PretrainedModel:
    """A network with its weights. Compiles once for each grid, budget, head and number of clips.

    Videos are uint8 pixels [T, height, width, 3] or [B, T, height, width, 3], or float32 of the
    same shapes, already normalised. Frames whose sides are no multiples of 14 are resized to the
    nearest ones. `tokens` is the budget: so many patches are kept, all where there are no more or
    where it is None.

    Attributes:
        params: nested dict of float32 arrays.
        config: `PretrainedConfig`: the network, the budgets of its heads, its classes.
    """

    def __init__(self, params: dict[str, Any], config: PretrainedConfig):
        self.params = jax.device_put(params)
        self.config = config

    def __call__(
        self,
        video: np.ndarray | jax.Array,
        tokens: int | None = None,
        head: int | None = None,
        rounding: str | None = None,
    ) -> Output:
        """Class scores and vectors of clips at a token budget.

        head: 0, 1 or 2; by default the one that was trained at the nearest budget.
        rounding: "official" keeps as many tokens as the official code, up to four fewer.

        Raises ValueError for a video, budget or head that cannot be.
        """
        answer, kept, head = self._run(video, tokens, head, rounding)
        index, valid = answer.kept
        count = index.shape[1] if valid is None else int(valid[0].sum())
        return Output(answer.logits, answer.pooled, kept, count, head)

    def select(
        self, video: np.ndarray | jax.Array, tokens: int | None = None, rounding: str | None = None
    ) -> np.ndarray:
        """Which patches are kept: bool [B, T, H, W]."""
        return np.asarray(self(video, tokens, None, rounding).kept)

    def features(
        self,
        video: np.ndarray | jax.Array,
        tokens: int | None = None,
        head: int | None = None,
        rounding: str | None = None,
    ) -> Features:
        """The kept tokens after the last block with their places, and the clips' vectors."""
        answer, mask, _ = self._run(video, tokens, head, rounding)
        index, valid = (None if x is None else np.asarray(x) for x in answer.kept)
        kept = index if valid is None else index[:, : valid[0].sum()]  # one grid: as many in each
        order = np.argsort(kept, axis=1)
        places = np.take_along_axis(kept, order, axis=1)
        tokens_after = np.asarray(answer.tokens.astype(jnp.float32))[:, 1:]
        return Features(
            np.take_along_axis(tokens_after, order[..., None], axis=1),
            np.stack(np.unravel_index(places, mask.shape[1:]), axis=-1).astype(np.int32),
            np.asarray(answer.pooled),
        )

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Writes config.json, model.safetensors (official names), and the network for PyTorch.

        Raises UserError if the folder cannot be written.
        """
        state = names.to_official(jax.tree.map(np.asarray, self.params))
        files.write(files.Pretrained(state, self.config), Path(folder))

    def _run(
        self,
        video: np.ndarray | jax.Array,
        tokens: int | None,
        head: int | None,
        rounding: str | None,
    ) -> tuple[Answer, jax.Array, int]:
        """The answer, which patches were kept, bool [B, T, H, W], and the head."""
        patches, grid = as_patches(video)
        model = self.config.model
        if rounding not in (None, "exact", "official"):
            raise ValueError(f"rounding is 'exact' or 'official', not {rounding!r}")
        if tokens is not None and tokens < 1 + (model.cls == "inside"):
            raise ValueError(f"a budget of {tokens} tokens leaves no patch")
        everything = grid.tokens + (model.cls == "inside")
        budget = everything if tokens is None else min(tokens, everything)
        if model.selector == "none" and budget < everything:
            raise ValueError(f"this network selects nothing: {grid.tokens} patches are too many")
        if head is None:
            head = nearest_head(tokens or grid.tokens, self.config.head_budgets)
        if not 0 <= head < model.budgets:
            raise ValueError(f"there are heads 0 to {model.budgets - 1}, no head {head}")
        if rounding is not None:
            model = replace(model, rounding=rounding)
        return *_compiled(self.params, patches, model, grid, budget, head), head


def as_patches(video: np.ndarray | jax.Array) -> tuple[np.ndarray, Grid]:
    """A video, as `PretrainedModel` takes it, as patches [B, P, 588] and their grid.

    Raises ValueError for another shape or kind of numbers.
    """
    video = np.asarray(video)
    if video.ndim == 4:
        video = video[None]
    if video.ndim != 5 or video.shape[-1] != 3 or 0 in video.shape:
        raise ValueError(f"a video is [T, height, width, 3] or [B, T, ...], not {video.shape}")
    if video.dtype != np.uint8:
        if not np.issubdtype(video.dtype, np.floating) and video.dtype != jnp.bfloat16:
            raise ValueError(f"pixels are uint8, or float32 if normalised, not {video.dtype}")
        video = video.astype(np.float32)
    sides = [max(1, round(side / PATCH)) * PATCH for side in video.shape[2:4]]
    if list(video.shape[2:4]) != sides:
        video = np.stack([[cv2.resize(frame, sides[::-1]) for frame in clip] for clip in video])
    return np.stack([patchify(clip) for clip in video]), Grid(
        video.shape[1], sides[0] // PATCH, sides[1] // PATCH
    )


def forward(
    params: dict, patches: jax.Array, model: FluxViTConfig, grid: Grid, budget: int, head: int
) -> tuple[Answer, jax.Array]:
    """The answer to clips on one grid, and which of their patches were kept, bool [B, P].

    patches: [B, P, 588], uint8 or normalised.
    """
    network = fluxvit.merge(fluxvit.structure(model), params)
    if patches.dtype == jnp.uint8:
        patches = fluxvit.normalise(patches)
    # Selectors that draw their scores draw the same ones in every call.
    key = jax.random.key(0) if model.selector in NOISY_SELECTORS else None
    answer = network.on_grid(patches.astype(model.dtype), grid, budget, head, key)
    return answer, selection.mask(answer.kept, grid.tokens)


@functools.partial(jax.jit, static_argnames=("model", "grid", "budget", "head"))
def _compiled(
    params: dict, patches: jax.Array, model: FluxViTConfig, grid: Grid, budget: int, head: int
) -> tuple[Answer, jax.Array]:
    answer, kept = forward(params, patches, model, grid, budget, head)
    return answer, kept.reshape(-1, *grid)
