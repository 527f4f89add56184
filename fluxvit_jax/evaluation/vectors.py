"""Vectors of videos and of texts, by trained weights of Flux-CLIP."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jax.stages import Wrapped
from ml_collections import ConfigDict

from fluxvit_jax.config.network import model_config
from fluxvit_jax.data.sources import Source
from fluxvit_jax.data.supervised_workers import Quarantine
from fluxvit_jax.data.tokenizer import tokenize
from fluxvit_jax.distributed import partition_rules
from fluxvit_jax.distributed.mesh import (
    compiler_options,
    device_put_global,
    gather,
    platform_of,
    replicated,
    traced_on_mesh,
)
from fluxvit_jax.evaluation import zero_shot
from fluxvit_jax.evaluation.evaluate import for_each_batch
from fluxvit_jax.evaluation.retrieval import unit
from fluxvit_jax.evaluation.settings import Setting
from fluxvit_jax.evaluation.view_programs import MAX_PROGRAMS, mean_over_views, view_program
from fluxvit_jax.models import fluxvit
from fluxvit_jax.models.fluxvit import FluxViTConfig, ModelOutput
from fluxvit_jax.models.text_encoder import TextEncoderConfig, unit_vectors
from fluxvit_jax.objectives.flux_clip import HEAD, FluxCLIP
from fluxvit_jax.objectives.flux_clip_text import TEXT, text_encoder_config

TEXTS_AT_ONCE = 64


class VideoVectors(NamedTuple):
    """Unit vectors of videos: float32 [N, D] for each setting, zeros for those not read.

    failures: reason for each video that could not be read, by its number.
    """

    by_setting: list[np.ndarray]
    failures: dict[int, str]


def of_videos(
    params: dict,
    config: ConfigDict,
    source: Source,
    settings: Sequence[Setting],
    mesh: Mesh,
    after_batch: Callable[[], None] = lambda: None,
    stop: Callable[[], bool] = lambda: False,
    quarantine: Quarantine | None = None,
) -> VideoVectors | None:
    """The vectors of all videos of a source, the means of their views' unit vectors.

    params: as in `flux_clip_weights`; after_batch, stop, quarantine: as in `evaluate.evaluate`.

    Raises UserError if there is too little shared memory.
    """
    params = fluxvit.network_params(params) | {HEAD: params[HEAD]}
    shardings = partition_rules.shardings(params, mesh, FluxCLIP.partition_rules)
    params = device_put_global(params, shardings)
    model = model_config(config, platform_of(mesh))
    programs = [video_embedder(model, setting, config.seed, mesh) for setting in settings]
    width = params[HEAD]["proj"]["kernel"].shape[1]
    rows: list[tuple[int, str, list[list[float]]]] = []

    def take(batch: dict[str, np.ndarray]) -> None:
        found = [
            mean_over_views([program], params, width, batch["video"], batch[f"patches{k}"], mesh)[0]
            for k, program in enumerate(programs)
        ]
        rows.extend(
            (int(number), str(batch["failure"][row]), [own[row].tolist() for own in found])
            for row, number in enumerate(batch["video"])
            if number >= 0
        )

    if not for_each_batch(
        take, config, source, settings, mesh, stop, quarantine, after_batch, "embedding"
    ):
        return None
    vectors = np.zeros((len(settings), len(source), width), np.float32)
    failures = {}
    for number, failure, own in gather(rows):
        if failure:
            failures[number] = failure
        else:
            vectors[:, number] = own
    return VideoVectors([unit(own) for own in vectors], failures)


def of_texts(params: dict, config: ConfigDict, texts: Sequence[str], mesh: Mesh) -> np.ndarray:
    """Unit vectors of texts: float32 [T, D]. They are tokenized as they are, not cleaned."""
    encoder = params[TEXT]
    shardings = partition_rules.shardings({TEXT: encoder}, mesh, FluxCLIP.partition_rules)[TEXT]
    encoder = device_put_global(encoder, shardings)
    program = text_embedder(text_encoder_config(config), mesh)
    ids = tokenize(texts)
    padding = -len(ids) % TEXTS_AT_ONCE
    ids = np.pad(ids, ((0, padding), (0, 0)))
    parts = [
        np.asarray(program(encoder, ids[first : first + TEXTS_AT_ONCE]))
        for first in range(0, len(ids), TEXTS_AT_ONCE)
    ]
    return np.concatenate(parts)[: len(texts)]


@functools.lru_cache(MAX_PROGRAMS)
def video_embedder(model: FluxViTConfig, setting: Setting, seed: int, mesh: Mesh) -> Wrapped:
    """The jitted program of a setting, which adds a view's unit vectors to a running total.

    Arguments as in `view_programs.predictor`; its parameters are the network's and the head's.
    """

    def vectors(params: dict, output: ModelOutput) -> jax.Array:
        return zero_shot.to_text(params[HEAD], output.pooled, model.dtype)

    return view_program(vectors, model, setting, seed, mesh)


@functools.cache
def text_embedder(config: TextEncoderConfig, mesh: Mesh) -> Wrapped:
    """The jitted program (parameters, ids int32 [B, 77]) -> unit vectors [B, D], on all devices."""
    return jax.jit(
        traced_on_mesh(functools.partial(unit_vectors, config), mesh),
        in_shardings=(None, replicated(mesh)),
        out_shardings=replicated(mesh),
        compiler_options=compiler_options(mesh),
    )
