"""Trained weights of video chat: network and projector, and with them the language model."""

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

# Of VideoChat-Flash, in its mm_projector.bin: our layer -> theirs.
OFFICIAL_NAMES = {"fc1": "model.mm_projector.mlp.0", "fc2": "model.mm_projector.mlp.2"}


class Projection(NamedTuple):
    """What turns videos into tokens of a language model.

    network: the whole FluxViT, float32; connector: the projector, float32; config: of the run that
    trained it; origin: the step's folder.
    """

    network: dict[str, Any]
    connector: dict[str, Any]
    config: ConfigDict
    origin: str


class ChatWeights(NamedTuple):
    """What video chat runs.

    llm: the language model in its compute dtype; llm_config: its shape; llm_folder: where its
    tokenizer is; llm_fingerprint: of a frozen one, else "".
    """

    projection: Projection
    llm: dict[str, Any]
    llm_config: LanguageModelConfig
    llm_folder: str
    llm_fingerprint: str


def read(source: storage.PathLike, llm: str = "", dtype: str = "float32") -> ChatWeights:
    """The weights of a run of `flux_chat`, or of one of its steps.

    llm: folder of the language model, by default where the run had it; dtype: to compute in.

    Raises UserError: as `read_projection`; a frozen language model that is missing, or not the one
    that the projector was trained for.
    """
    found = checkpointer.restore(download.local_copy(source))
    projection = _projection(found)
    folder = llm or projection.config.chat.llm
    try:
        config = language_model_files.read_config(folder).in_dtype(dtype)
        params = found.params.get(LLM) or _read_frozen(folder, config, found)
    except UserError as error:
        if llm:
            raise
        raise UserError(
            f"{error}; it is the language model of {found.step}: where it is now, --llm=FOLDER "
            "tells, or llm= of load_chat"
        ) from error
    narrow = jax.tree.map(lambda x: np.asarray(x, jnp.dtype(dtype)), params)
    return ChatWeights(projection, narrow, config, folder, found.frozen.get(LLM, ""))


def read_projection(source: storage.PathLike) -> Projection:
    """The same without the language model.

    Raises UserError: no such weights, damaged, or of another objective.
    """
    return _projection(checkpointer.restore(download.local_copy(source)))


def official_projector(connector: dict[str, Any]) -> dict[str, np.ndarray]:
    """A projector under the names of VideoChat-Flash's code, its matrices as PyTorch has them."""
    state = {}
    for ours, theirs in OFFICIAL_NAMES.items():
        state[f"{theirs}.weight"] = np.ascontiguousarray(np.asarray(connector[ours]["kernel"]).T)
        state[f"{theirs}.bias"] = np.asarray(connector[ours]["bias"])
    return state


def _projection(found: RestoredCheckpoint) -> Projection:
    config = from_dict(found.config)
    if config.train.objective != OBJECTIVE:
        raise UserError(
            f"{found.step}: was trained by {config.train.objective}, and has no projector for a "
            "language model; train one with configs/chat.py"
        )
    return Projection(
        fluxvit.network_params(found.params),
        found.params[CONNECTOR],
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
