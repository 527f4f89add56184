"""Trained weights of video chat: network and projector, and with them the language model."""

from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from fluxvit_jax.checkpoints import checkpointer, download
from fluxvit_jax.checkpoints.checkpointer import RestoredCheckpoint
from fluxvit_jax.config.loading import from_dict
from fluxvit_jax.convert import language_model_files
from fluxvit_jax.distributed import storage
from fluxvit_jax.distributed.mesh import device_put_global
from fluxvit_jax.errors import UserError
from fluxvit_jax.models import fluxvit
from fluxvit_jax.models.language_model import LanguageModelConfig
from fluxvit_jax.objectives.flux_chat import CONNECTOR, LLM, OBJECTIVE, llm_shapes

# Of VideoChat-Flash, in its mm_projector.bin: our layer -> theirs.
OFFICIAL_NAMES = {"fc1": "model.mm_projector.mlp.0", "fc2": "model.mm_projector.mlp.2"}

Tree = dict[str, Any]


class Projection(NamedTuple):
    """What turns videos into tokens of a language model.

    network: the whole FluxViT, float32; connector: the projector, float32; config: of the run that
    trained it; origin: the step's folder.
    """

    network: Tree
    connector: Tree
    config: ConfigDict
    origin: str


class ChatWeights(NamedTuple):
    """What video chat runs.

    llm: the language model in its compute dtype, on a mesh; llm_config: its shape; llm_folder:
    where its tokenizer is; llm_fingerprint: of a frozen one, else "".
    """

    projection: Projection
    llm: Tree
    llm_config: LanguageModelConfig
    llm_folder: str
    llm_fingerprint: str


def read(source: storage.PathLike, llm: str, dtype: str, mesh: Mesh) -> ChatWeights:
    """The weights of a run of `flux_chat`, or of one of its steps.

    llm: folder of the language model, "": where the run had it; dtype: to compute in; mesh: the
    devices that share the language model, by the rules of training.

    Raises UserError: as `read_projection`; a frozen language model that is missing, or not the one
    that the projector was trained for; the mesh does not divide it.
    """
    found = checkpointer.restore(download.local_copy(source))
    projection = _projection(found)
    folder = llm or projection.config.chat.llm
    try:
        config = language_model_files.read_config(folder).in_dtype(dtype)
        if LLM not in found.params:
            _check_frozen(folder, found)
    except UserError as error:
        if llm:
            raise
        raise UserError(
            f"{error}; it is the language model of {found.step}: where it is now, --llm=FOLDER "
            "tells, or llm= of load_chat"
        ) from error
    shapes = llm_shapes(config, mesh)
    if LLM in found.params:
        params = _placed(found.params[LLM], shapes)
    else:
        params = language_model_files.read(folder, shapes)
    return ChatWeights(projection, params, config, folder, found.frozen.get(LLM, ""))


def read_projection(source: storage.PathLike) -> Projection:
    """The same without the language model.

    Raises UserError: no such weights, damaged, or of another objective.
    """
    return _projection(checkpointer.restore(download.local_copy(source)))


def official_projector(connector: Tree) -> dict[str, np.ndarray]:
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


def _placed(params: Tree, shapes: Tree) -> Tree:
    """Parameters of a checkpoint, as arrays of those dtypes and shardings."""
    narrow = jax.tree.map(lambda x, like: np.asarray(x, like.dtype), params, shapes)
    return device_put_global(narrow, jax.tree.map(lambda like: like.sharding, shapes))


def _check_frozen(folder: str, found: RestoredCheckpoint) -> None:
    if language_model_files.fingerprint(folder) != found.frozen.get(LLM):
        raise UserError(f"{folder}: is not the language model that {found.step} was trained for")
