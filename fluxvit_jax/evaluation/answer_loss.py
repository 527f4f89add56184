"""The loss of answers in held-out conversations at every token budget: validation of video chat.

It is that of training, the mean over all labels, on the clips of an evaluation: the middle view of
each video on the grid of a setting. A video that cannot be read counts in no mean.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jax.stages import Wrapped
from ml_collections import ConfigDict

from fluxvit_jax.data.captions import ClipTimes
from fluxvit_jax.data.chat_templates import IGNORED
from fluxvit_jax.data.sources import Source
from fluxvit_jax.data.supervised_workers import Quarantine
from fluxvit_jax.data.views import Views, views_of
from fluxvit_jax.distributed.mesh import (
    batch_sharding,
    compiler_options,
    gather,
    local_rows,
    platform_of,
    shard_batch,
    traced_on_mesh,
)
from fluxvit_jax.evaluation.evaluate import for_each_batch
from fluxvit_jax.evaluation.settings import Setting, settings_of
from fluxvit_jax.evaluation.unreadable import NothingReadableError, first_of
from fluxvit_jax.evaluation.view_programs import MAX_PROGRAMS
from fluxvit_jax.models import fluxvit
from fluxvit_jax.models.token_selection import GridLimits
from fluxvit_jax.objectives import flux_chat
from fluxvit_jax.objectives.flux_chat import CONNECTOR, LLM, LOSS, TEXTS, FluxChat

Tree = dict[str, Any]


class AnswerLoss(NamedTuple):
    """Losses of answers.

    report: {"budgets": {"1024": {"loss", "top1"}, ...}, "failures", "warning"}, where "loss" is the
    mean cross entropy of a label, and "top1" the share of labels that are the likeliest token.
    """

    report: dict[str, Any]

    def scalars(self) -> dict[str, float]:
        """{"loss_1024": .., "top1_1024": .., ..., "failed": ..}: the metrics."""
        budgets = self.report["budgets"].items()
        scalars = {f"{LOSS}{budget}": row["loss"] for budget, row in budgets}
        scalars |= {f"top1_{budget}": row["top1"] for budget, row in budgets}
        return scalars | {"failed": len(self.report["failures"])}

    def told(self) -> dict[str, float]:
        """The scalars that people are told."""
        return self.scalars()


def measure(
    params: Tree,
    config: ConfigDict,
    source: Source,
    mesh: Mesh,
    after_batch: Callable[[], None] = lambda: None,
    stop: Callable[[], bool] = lambda: False,
    quarantine: Quarantine | None = None,
) -> AnswerLoss | None:
    """The losses at each of `eval.settings`; None if `stop` ended it.

    params: of the video network, the projector and the language model, on the mesh; source: of
    conversations; the rest as in `evaluate.evaluate`.

    Raises UserError if there is too little shared memory, NothingReadableError if no video can be
    read.
    """
    config = config.copy_and_resolve_references()
    config.eval.clips = config.eval.crops = 1
    settings, views = settings_of(config), views_of(config)
    texts_of = [
        dataclasses.replace(FluxChat.text_arrays(config), frames=frames)
        for frames in (setting.grid.frames * config.chat.frame_times for setting in settings)
    ]
    objectives = [_objective(config, setting, mesh) for setting in settings]
    programs = [
        _program(objective, setting, mesh)
        for objective, setting in zip(objectives, settings, strict=True)
    ]
    rows: list[tuple] = []

    def take(batch: dict[str, np.ndarray]) -> None:
        numbers = np.maximum(batch["video"], 0)  # of padding: any text, whose labels do not count
        records = [source[int(number)] for number in numbers]
        read = (batch["video"] >= 0) & (batch["failure"] == "")
        found = []
        for k, (program, setting) in enumerate(zip(programs, settings, strict=True)):
            times = [
                clip_times(views, setting, int(length), float(rate))
                for length, rate in zip(batch["length"], batch["frame_rate"], strict=True)
            ]
            texts = texts_of[k](records, numbers, config.seed, times)
            texts["labels"] = np.where(read[:, None], texts["labels"], IGNORED)
            counted = (texts["labels"][:, 1:] >= 0).sum(axis=1)
            clips = texts | {"patches": batch[f"patches{k}"][:, 0]}
            losses, hits = program(params, shard_batch(clips, mesh))
            found.append((local_rows(losses), local_rows(hits), counted))
        rows.extend(
            (
                int(number),
                str(batch["id"][row]),
                str(batch["failure"][row]),
                [[float(x[row]) for x in own] for own in found],
            )
            for row, number in enumerate(batch["video"])
            if number >= 0
        )

    if not for_each_batch(
        take, config, source, settings, mesh, stop, quarantine, after_batch, "validating"
    ):
        return None
    return AnswerLoss(_report(config, source, settings, gather(rows)))


def _report(
    config: ConfigDict, source: Source, settings: Sequence[Setting], rows: list[tuple]
) -> dict[str, Any]:
    """As in `AnswerLoss`, of the videos of all hosts; raises NothingReadableError.

    rows: number, id, failure, and [loss, hits, labels] at each setting, of every video.
    """
    # Hosts whose devices share clips have measured the same videos.
    videos = list({number: own for number, *own in sorted(rows)}.values())
    failures = [{"id": name, "reason": failure} for name, failure, *_ in videos if failure]
    if len(failures) == len(videos):
        reason = failures[0]["reason"]
        raise NothingReadableError(config.data.validation, len(videos), source[0], reason)
    sums = np.sum([found for *_, found in videos], axis=0)
    budgets = {
        str(setting.budget): {"loss": loss / max(1, counted), "top1": hits / max(1, counted)}
        for setting, (loss, hits, counted) in zip(settings, sums.tolist(), strict=True)
    }
    warning = None
    if len(failures) > config.data.max_bad_fraction * len(videos):
        warning = (
            f"{len(failures)} of {len(videos)} videos could not be read and are left out; "
            f"{first_of(failures)}"
        )
    return {"budgets": budgets, "failures": failures, "warning": warning}


def clip_times(views: Views, setting: Setting, length: int, rate: float) -> ClipTimes:
    """The times of a setting's clip of a video with `length` frames, `rate` a second."""
    if not rate:
        return ClipTimes(0.0, np.zeros(setting.grid.frames))
    return ClipTimes(length / rate, views.numbers(length, setting.grid)[0] / rate)


def _objective(config: ConfigDict, setting: Setting, mesh: Mesh) -> FluxChat:
    limits = GridLimits(*setting.grid, setting.grid.tokens)
    return FluxChat.from_config(config, limits, platform_of(mesh))


@functools.lru_cache(MAX_PROGRAMS)
def _program(objective: FluxChat, setting: Setting, mesh: Mesh) -> Wrapped:
    """The jitted program: (params, batch) -> sums of losses and hits of each clip, [B] both."""
    network = objective.network
    budget = min(setting.budget, setting.grid.tokens)

    def scores(params: Tree, batch: Tree) -> tuple[jax.Array, jax.Array]:
        prepared = fluxvit.prepare_params(fluxvit.network_params(params), network)
        encoder = flux_chat.encoder_params(prepared, network)
        features, frame = flux_chat.features_on_grid(
            network, encoder, batch["patches"], setting.grid, budget
        )
        clips = {name: batch[name] for name in TEXTS if name in batch}
        clips |= {"features": features, "frame": frame}
        return objective.scores({name: params[name] for name in (CONNECTOR, LLM)}, clips)

    by_clip = batch_sharding(mesh)
    return jax.jit(
        traced_on_mesh(scores, mesh),
        in_shardings=(None, by_clip),  # None: parameters keep their sharding
        out_shardings=by_clip,
        compiler_options=compiler_options(mesh),
    )
