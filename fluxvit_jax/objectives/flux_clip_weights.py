"""Trained weights of Flux-CLIP, whole: network, head, temperature, text encoder."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from fluxvit_jax.checkpoints import checkpointer, download
from fluxvit_jax.checkpoints.checkpointer import RestoredCheckpoint
from fluxvit_jax.checkpoints.weights import read_weights
from fluxvit_jax.checkpoints.workdir import read_config
from fluxvit_jax.config.loading import from_dict
from fluxvit_jax.config.variants import TEXT_ENCODERS
from fluxvit_jax.convert import clip_parts, config_json, official_names
from fluxvit_jax.convert.clip_parts import ClipParts
from fluxvit_jax.distributed import storage
from fluxvit_jax.errors import UserError
from fluxvit_jax.models import fluxvit
from fluxvit_jax.objectives import flux_clip_text
from fluxvit_jax.objectives.base import objective_class
from fluxvit_jax.objectives.flux_clip import HEAD, OBJECTIVE, TEMPERATURE, added_params
from fluxvit_jax.objectives.flux_clip_text import TEXT

PARAMS = (*fluxvit.PARAMS, HEAD, TEMPERATURE, TEXT)


class ClipWeights(NamedTuple):
    """params: float32 numpy arrays by `PARAMS`; config: of the run; origin: the step's folder."""

    params: dict[str, Any]
    config: ConfigDict
    origin: str


def read(source: storage.PathLike, text_encoder: str = "") -> ClipWeights:
    """The weights of a run of `flux_clip`, its best step, or of a folder that was made of one.

    text_encoder: where the weights of a frozen text encoder are now; by default where the run had
    them.

    Raises UserError: no such weights, damaged, or of another objective; a frozen text encoder that
    is missing, or not the one the run was trained with.
    """
    source = download.local_copy(source)
    if not storage.is_remote(source) and clip_parts.is_in(Path(source)):
        return _read_folder(Path(source))
    found = checkpointer.restore(source)
    config = from_dict(found.config)
    if not objective_class(config).captioned:
        raise UserError(
            f"{found.step}: was trained by {config.train.objective}, not on captions, and has no "
            "text encoder; train with configs/clip.py"
        )
    params = dict(found.params)
    if TEXT not in params:
        config.clip.text_encoder = text_encoder or config.clip.text_encoder
        params[TEXT] = _read_frozen(config, found)
    params = {
        name: jax.tree.map(lambda x: np.asarray(x, np.float32), params[name]) for name in PARAMS
    }
    workdir_of = found.step.parents[1]
    return ClipWeights(params, config, str(found.step.relative_to(workdir_of)))


def _read_frozen(config: ConfigDict, found: RestoredCheckpoint) -> dict[str, Any]:
    """The parameters of the frozen text encoder that a run was trained with."""
    file = config.clip.text_encoder
    moved = (
        "where it is now, --config.clip.text_encoder=FILE tells, --text-encoder=FILE of "
        "fluxvit_jax.convert and .find, or text_encoder= of from_pretrained"
    )
    try:
        params = flux_clip_text.read(config)
    except UserError as error:
        raise UserError(f"the text encoder of {found.step}: {error}; {moved}") from error
    if official_names.fingerprint(params) != found.frozen.get(TEXT):
        raise UserError(
            f"{file}: is not the text encoder that {found.step} was trained with; {moved}"
        )
    return params


def _read_folder(folder: Path) -> ClipWeights:
    """As `read`, of a folder; the config is what a run that trained these weights would have."""
    pretrained, parts = read_weights(folder), clip_parts.read(folder)
    config = config_json.to_run_config(pretrained.config)
    config.train.objective = OBJECTIVE
    config.clip.network = _network_name(parts, folder)
    params = pretrained.params(np.float32) | added_params(parts)
    return ClipWeights(params, config, folder.name)


def _network_name(parts: ClipParts, folder: Path) -> str:
    """The name that recipes have for a text encoder. Raises UserError for another size."""
    for name, sizes in TEXT_ENCODERS.items():
        if all(getattr(parts.network, field) == size for field, size in sizes._asdict().items()):
            return name
    raise UserError(
        f"{folder}: no recipe has a text encoder of width {parts.network.width} and depth "
        f"{parts.network.depth}"
    )


def read_parts(source: storage.PathLike, text_encoder: str = "") -> ClipParts | None:
    """What weights of Flux-CLIP, of any form, have beside the network; None for other weights.

    text_encoder: as in `read`. Raises UserError: as `read`.
    """
    local = storage.path_of(download.local_copy(source))
    if not storage.is_remote(local) and clip_parts.is_in(Path(local)):
        return clip_parts.read(Path(local))
    if not _is_run(local):
        return None
    params, config, _ = read(local, text_encoder)
    network = flux_clip_text.text_encoder_config(config)
    return ClipParts(params[HEAD], float(params[TEMPERATURE]), params[TEXT], network)


def _is_run(path: epath.Path) -> bool:
    """Whether a path is the workdir of a run of `flux_clip`, or a step of one."""
    for workdir in (path, path.parent.parent):
        if (workdir / checkpointer.FOLDER).exists():
            recipe = read_config(workdir) or {}
            return recipe.get("train", {}).get("objective") == OBJECTIVE
    return False
