"""The weights that find videos: those of Flux-CLIP, and their checksum."""

import os

from fluxvit_jax.convert import official_names
from fluxvit_jax.deploy.pretrained import PretrainedModel, from_pretrained
from fluxvit_jax.errors import UserError


def load(checkpoint: str | os.PathLike, text_encoder: str = "") -> PretrainedModel:
    """The network in `checkpoint`, of any form. Raises UserError unless it is Flux-CLIP's."""
    if not checkpoint:
        raise UserError("no weights given: add --checkpoint=DIR, a workdir or folder of Flux-CLIP")
    model = from_pretrained(checkpoint, text_encoder=text_encoder)
    if model.space is None:
        raise UserError(
            f"--checkpoint={checkpoint}: has no text encoder; weights of Flux-CLIP have one, see "
            "configs/clip.py"
        )
    return model


def checksum(model: PretrainedModel) -> str:
    """SHA-256 of all weights that vectors depend on, whatever form they were read from."""
    assert model.space is not None  # `load` has looked
    parts = model.space.parts
    added = {"clip_head": parts.head, "text_encoder": parts.text_encoder}
    return official_names.fingerprint({**model.params, **added})
