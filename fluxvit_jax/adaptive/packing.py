"""Runs cascades and rules of motion on many videos in full batches.

Videos that go on to a step, or that a rule sends to a cell, are packed together.
Every step has one compiled program of one batch size, so nothing recompiles and the mean cost is
real time. Videos that wait for a step, less than two batches for each, keep their patches in the
memory of the host.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh
from jax.stages import Wrapped

from fluxvit_jax.adaptive.cascade import Cascade, Pass, Size, Step
from fluxvit_jax.adaptive.motion import MotionRule
from fluxvit_jax.distributed.mesh import (
    local_rows,
    shard_batch,
)
from fluxvit_jax.evaluation.settings import Setting
from fluxvit_jax.evaluation.view_programs import (
    MAX_PROGRAMS,
    class_count,
    jit_by_clip,
    on_view,
    predictor,
    probabilities_of,
)
from fluxvit_jax.grids import Grid
from fluxvit_jax.models.fluxvit import FluxViTConfig


@dataclass(slots=True)
class Video:
    """A video on its way through a cascade.

    number: of the video, for random selectors; patches: by frames and pixels of a grid, uint8
    [V, P, 588]; total: float32 [C], the sum of the last step's probabilities over its views;
    average: float [C], of the steps so far; ranked: by grid, int32 [V, N], the patches of each view
    as the selector ranks them.
    """

    number: int
    patches: Mapping[Size, np.ndarray]
    total: np.ndarray | None = None
    average: np.ndarray | None = None
    ranked: dict[Size, np.ndarray] = field(default_factory=dict)


class Finished(NamedTuple):
    """The answer to a video: probabilities float [C], and the step that it stopped at, from 0."""

    number: int
    probabilities: np.ndarray
    step: int


class PackedCascade:
    """A cascade over a stream of videos. `add` them, and `finish` at the end."""

    def __init__(
        self,
        cascade: Cascade,
        model: FluxViTConfig,
        params: dict,
        batch: int,
        views: int,
        seed: int,
        mesh: Mesh,
    ):
        """params: on the devices; batch: videos of a batch; views: of a video."""
        self._cascade, self._params, self._batch, self._mesh = cascade, params, batch, mesh
        self._waiting: list[list[Video]] = [[] for _ in cascade.steps]
        self._passes = cascade.passes(views, shares_ranking=model.rounding == "exact")
        self._programs = [_program(own, model, seed, mesh) for own in self._passes]

    def add(self, videos: Sequence[Video]) -> list[Finished]:
        """Takes videos, runs the batches that are full, and returns the answers that are known."""
        self._waiting[0] += videos
        return self._run(full_only=True)

    def finish(self) -> list[Finished]:
        """Runs what is left in batches that are filled up, and returns all other answers."""
        return self._run(full_only=False)

    def _run(self, full_only: bool) -> list[Finished]:
        finished: list[Finished] = []
        for number, waiting in enumerate(self._waiting):
            while len(waiting) >= (self._batch if full_only else 1):
                videos = waiting[: self._batch]
                del waiting[: self._batch]
                finished += self._run_batch(number, videos)
        return finished

    def _run_batch(self, number: int, videos: Sequence[Video]) -> list[Finished]:
        own = self._passes[number]
        rows = [*videos, *[videos[0]] * (self._batch - len(videos))]
        totals = self._ask(number, rows)[: len(videos)]
        before = None
        if number:
            before = np.stack([video.average for video in videos if video.average is not None])
        averages, stops = self._cascade.join(number, totals / own.stop, before)
        finished = []
        for video, total, average, done in zip(videos, totals, averages, stops, strict=True):
            if done:
                finished.append(Finished(video.number, average, number))
                continue
            video.total, video.average = total, average
            video.patches = {grid: video.patches[grid] for grid in own.later_grids}
            self._waiting[number + 1].append(video)
        return finished

    def _ask(self, number: int, rows: Sequence[Video]) -> np.ndarray:
        """Sums of the probabilities over the views so far: float32 [batch, C]."""
        own, program = self._passes[number], self._programs[number]
        start = np.zeros((len(rows), class_count(self._params)), np.float32)
        if own.start:
            start = np.stack([row.total for row in rows if row.total is not None])
        videos = np.array([row.number for row in rows], np.int32)
        sharded = shard_batch({"total": start, "video": videos}, self._mesh)
        total, rankings = sharded["total"], []
        grid = own.step.grid
        for view in range(own.start, own.stop):
            arrays = {"patches": np.stack([row.patches[grid][view] for row in rows])}
            if own.takes_ranking:
                arrays["ranked"] = np.stack([row.ranked[grid][view] for row in rows])
            more = tuple(shard_batch(arrays, self._mesh).values())
            total = program(self._params, total, *more, sharded["video"], np.int32(view))
            if own.ranked_budget:
                total, ranked = total
                rankings.append(local_rows(ranked))
        for row, ranked in zip(rows, np.stack(rankings, axis=1) if rankings else (), strict=False):
            row.ranked[grid] = ranked
        return local_rows(total)


class PackedRule:
    """A rule of motion over a stream of videos, as `PackedCascade`; a "step" is a rule's cell."""

    def __init__(
        self,
        rule: MotionRule,
        score: Callable[[np.ndarray], np.ndarray],
        cells: Sequence[PackedCascade],
        batch: int,
    ):
        """score: of `motion_scores.scorer`; cells: each of one step; batch: most videos at once."""
        self._rule, self._score, self._cells, self._batch = rule, score, cells, batch

    def add(self, videos: Sequence[Video]) -> list[Finished]:
        """Sends at most a batch of videos to their cells, and returns the answers that are known.

        Videos need patches on the rule's grid too.
        """
        if not videos:
            return []
        rows = [*videos, *[videos[0]] * (self._batch - len(videos))]
        scores = self._score(np.stack([video.patches[self._rule.grid][0] for video in rows]))
        routed = self._rule.route(scores[: len(videos)])
        return self._from_cells(
            cell.add([video for video, own in zip(videos, routed, strict=True) if own == number])
            for number, cell in enumerate(self._cells)
        )

    def finish(self) -> list[Finished]:
        """All other answers."""
        return self._from_cells(cell.finish() for cell in self._cells)

    def _from_cells(self, answers: Iterable[Sequence[Finished]]) -> list[Finished]:
        return [one._replace(step=number) for number, found in enumerate(answers) for one in found]


def setting_of(step: Step) -> Setting:
    """The setting of an evaluation that is a step's."""
    return Setting(step.budget, Grid.square(*step.grid), step.head)


def _program(own: Pass, model: FluxViTConfig, seed: int, mesh: Mesh) -> Callable | Wrapped:
    """The program of a pass, which adds a view's probabilities to a running total.

    Arguments as of `view_programs.predictor`, which it is where nothing is shared; one that ranks
    returns the total and the ranking int32 [b, N], one that takes a ranking has it after the
    patches.
    """
    setting = setting_of(own.step)
    if not own.ranked_budget and not own.takes_ranking:
        return predictor(model, setting, seed, mesh, multi_label=False)
    return _sharing_program(model, setting, own.ranked_budget, seed, mesh)


@functools.lru_cache(MAX_PROGRAMS)
def _sharing_program(
    model: FluxViTConfig, setting: Setting, ranked_budget: int, seed: int, mesh: Mesh
) -> Wrapped:
    """The program of a pass that ranks patches for so many tokens, or at 0 takes a ranking."""
    answer, (budget, grid, head) = probabilities_of(model, multi_label=False), setting

    def rank(params, total, patches, video, view):
        network, patches, keys = on_view(params, patches, video, view, model, seed)
        ranked = network.rank(patches, grid, ranked_budget, keys)
        output = network.on_grid(patches, grid, budget, head, ranked=ranked)
        return total + answer(params, output), ranked

    def take(params, total, patches, ranked, video, view):
        network, patches, _ = on_view(params, patches, video, view, model, seed)
        output = network.on_grid(patches, grid, budget, head, ranked=ranked)
        return total + answer(params, output)

    if ranked_budget:
        return jit_by_clip(rank, mesh, clips=3, outputs=2)
    return jit_by_clip(take, mesh, clips=4)
