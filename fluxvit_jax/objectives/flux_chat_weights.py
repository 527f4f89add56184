"""Trained weights of video chat, whole: network, projector, language model."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from fluxvit_jax.checkpoints import checkpointer, download
from fluxvit_jax.checkpoints.checkpointer import RestoredCheckpoint
from fluxvit_jax.config.loading import from_dict
from fluxvit_jax.convert import language_model_files
from fluxvit_jax.distributed import storage
from fluxvit_jax.errors import UserError
from fluxvit_jax.models import fluxvit
from fluxvit_jax.models.language_model import LanguageModelConfig
from fluxvit_jax.objectives.flux_chat import CONNECTOR, LLM, OBJECTIVE


class ChatWeights(NamedTuple):
    """What video chat runs.

    network: the whole FluxViT, float32; connector: the projector, float32; llm: the language model
    in its compute dtype; llm_config: its shape; llm_folder: where its tokenizer is;
    llm_fingerprint: of a frozen one, else ""; config: of the run that trained the projector;
    origin: the step's folder.
    """

    network: dict[str, Any]
    connector: dict[str, Any]
    llm: dict[str, Any]
    llm_config: LanguageModelConfig
    llm_folder: str
    llm_fingerprint: str
    config: ConfigDict
    origin: str


def read(source: storage.PathLike, llm: str = "", dtype: str = "float32") -> ChatWeights:
    """The weights of a run of `flux_chat`, or of one of its steps.

    llm: folder of the language model, by default where the run had it; dtype: to compute in.

    Raises UserError: no such weights, damaged, or of another objective; a frozen language model
    that is missing, or not the one that the projector was trained for.
    """
    found = checkpointer.restore(download.local_copy(source))
    config = from_dict(found.config)
    if config.train.objective != OBJECTIVE:
        raise UserError(
            f"{found.step}: was trained by {config.train.objective}, and has no projector for a "
            "language model; train one with configs/chat.py"
        )
    folder = llm or config.chat.llm
    try:
        llm_config = language_model_files.read_config(folder).in_dtype(dtype)
        params = found.params.get(LLM) or _read_frozen(folder, llm_config, found)
    except UserError as error:
        if llm:
            raise
        raise UserError(
            f"{error}; it is the language model of {found.step}: where it is now, --llm=FOLDER "
            "tells, or llm= of load_chat"
        ) from error
    narrow = jax.tree.map(lambda x: np.asarray(x, jnp.dtype(dtype)), params)
    return ChatWeights(
        fluxvit.network_params(found.params),
        found.params[CONNECTOR],
        narrow,
        llm_config,
        folder,
        found.frozen.get(LLM, ""),
        config,
        str(found.step.relative_to(found.step.parents[1])),
    )


def _read_frozen(
    folder: str, config: LanguageModelConfig, found: RestoredCheckpoint
) -> dict[str, Any]:
    if language_model_files.fingerprint(folder) != found.frozen.get(LLM):
        raise UserError(f"{folder}: is not the language model that {found.step} was trained for")
    shapes = jax.tree.map(
        lambda like: jax.ShapeDtypeStruct(like.shape, jnp.dtype(config.dtype)),
        language_model_files.shapes(config),
    )
    return language_model_files.read(folder, shapes)
