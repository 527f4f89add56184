"""Trained weights of Flux-CLIP, whole: network, head, temperature, text encoder."""

from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from fluxvit_jax.checkpoints import checkpointer
from fluxvit_jax.config.loading import from_dict
from fluxvit_jax.distributed import storage
from fluxvit_jax.errors import UserError
from fluxvit_jax.models import fluxvit
from fluxvit_jax.objectives import flux_clip_text
from fluxvit_jax.objectives.base import objective_class
from fluxvit_jax.objectives.flux_clip import HEAD, TEMPERATURE
from fluxvit_jax.objectives.flux_clip_text import TEXT

PARAMS = (*fluxvit.PARAMS, HEAD, TEMPERATURE, TEXT)


class ClipWeights(NamedTuple):
    """params: float32 numpy arrays by `PARAMS`; config: of the run; origin: the step's folder."""

    params: dict[str, Any]
    config: ConfigDict
    origin: str


def read(workdir: storage.PathLike, text_encoder: str = "") -> ClipWeights:
    """The weights of a run of `flux_clip`, its best step.

    text_encoder: where the weights of a frozen text encoder are now; by default where the run had
    them.

    Raises UserError: no such run, damaged, or of another objective; a frozen text encoder that is
    missing, or not the one the run was trained with.
    """
    found = checkpointer.restore(workdir)
    config = from_dict(found.config)
    if not objective_class(config).captioned:
        raise UserError(
            f"{found.step}: was trained by {config.train.objective}, not on captions, and has no "
            "text encoder; train with configs/clip.py"
        )
    params = dict(found.params)
    if TEXT not in params:
        config.clip.text_encoder = text_encoder or config.clip.text_encoder
        params[TEXT] = flux_clip_text.read(config)
        if flux_clip_text.checksum(params[TEXT]) != found.frozen.get(TEXT):
            raise UserError(
                f"{config.clip.text_encoder}: is not the text encoder that {found.step} was "
                "trained with; --config.clip.text_encoder=FILE names it where it was moved"
            )
    params = {
        name: jax.tree.map(lambda x: np.asarray(x, np.float32), params[name]) for name in PARAMS
    }
    workdir_of = found.step.parents[1]
    return ClipWeights(params, config, str(found.step.relative_to(workdir_of)))
