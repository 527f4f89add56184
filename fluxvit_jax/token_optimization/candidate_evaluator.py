"""Evaluates many candidates on one chunk of videos, decoding every video only once."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import groupby

import cv2
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from fluxvit_jax.adaptive.motion_scores import scorer
from fluxvit_jax.config.network import model_config
from fluxvit_jax.data.patches import PATCH_VALUES
from fluxvit_jax.data.sources import labels_of
from fluxvit_jax.data.views import cut_views, views_of
from fluxvit_jax.distributed import devices, partition_rules
from fluxvit_jax.distributed.mesh import device_put_global, make_mesh, platform_of
from fluxvit_jax.evaluation import zero_shot
from fluxvit_jax.evaluation.accuracy import likeliest
from fluxvit_jax.evaluation.settings import Setting
from fluxvit_jax.evaluation.view_programs import class_count, means_after, predictor
from fluxvit_jax.grids import Grid
from fluxvit_jax.token_optimization.candidates import Candidate
from fluxvit_jax.token_optimization.frame_reader import DecodedVideo, FrameReader, Task
from fluxvit_jax.token_optimization.results_log import FAILED, TOP1, TOP5, WRONG

Pending = Task | Future[tuple[np.ndarray, str]]  # reading for one grid, or cutting


class CandidateEvaluator:
    """Runs candidates on chunks of videos, whose views threads cut while the devices work.

    Close it at the end. before_compiling: is called before a program is compiled.
    """

    def __init__(
        self,
        config: ConfigDict,
        params: dict,
        mesh: Mesh | None = None,
        before_compiling: Callable[[], None] = lambda: None,
    ):
        self._before_compiling = before_compiling
        cv2.setNumThreads(0)  # the threads themselves are the parallelism
        self._view_settings, self._seed = views_of(config), config.seed
        self._mesh = mesh or make_mesh(config)
        self._model = model_config(config, platform_of(self._mesh))
        self._params = device_put_global(
            params, partition_rules.shardings(params, self._mesh, zero_shot.RULES)
        )
        self._programs: dict[Candidate, Callable] = {}
        # OpenCV releases the interpreter lock.
        self._cutters = ThreadPoolExecutor(max(1, config.data.workers))

    def close(self) -> None:
        self._cutters.shutdown(cancel_futures=True)

    def program(self, candidate: Candidate) -> Callable:
        """The compiled program that `--mode=evaluate` runs at the same setting."""
        if candidate not in self._programs:
            self._before_compiling()
            setting = Setting(candidate.budget, candidate.grid, candidate.head)
            network = candidate.network(self._model)
            self._programs[candidate] = predictor(
                network, setting, self._seed, self._mesh, multi_label=False
            )
        return self._programs[candidate]

    def keep_programs(self, candidates: Sequence[Candidate]) -> None:
        """Releases the programs of all other candidates: a search compiles hundreds."""
        self._programs = {c: self._programs[c] for c in candidates if c in self._programs}

    def motion(self, videos: Sequence[DecodedVideo], grid: Grid, reader: FrameReader) -> np.ndarray:
        """How much moves in the first view of each video: float32 [videos]; see `motion_scores`."""
        score = scorer(self._model, grid, self._params, self._seed, self._mesh)
        cut = self._cut_views(self._cut(videos, grid, reader), grid, reader)
        return score(np.stack([views[0] for views, _ in cut]))

    def evaluate(
        self,
        videos: Sequence[DecodedVideo],
        candidates: Sequence[Candidate],
        reader: FrameReader,
    ) -> Iterator[tuple[Candidate, str, np.ndarray]]:
        """Each candidate with its outcomes on the videos, one character each (see `results_log`).

        And the probabilities after each of `Views.counts` of the views: float32 [videos, counts,
        classes], also of those that could not be read or are none.

        videos: read for at least these candidates; candidates: those of one grid in succession;
        reader: of the videos, for those too large to keep.
        """
        video = np.array([one.number for one in videos])
        counts = self._view_settings.counts
        by_grid = [(grid, list(group)) for grid, group in groupby(candidates, lambda c: c.grid)]
        cutting = self._cut(videos, by_grid[0][0], reader)
        for (grid, group), following in zip(by_grid, [*by_grid[1:], None], strict=True):
            views, failures = zip(*self._cut_views(cutting, grid, reader), strict=True)
            cutting = self._cut(videos, following[0], reader) if following else []
            programs = [self.program(candidate) for candidate in group]
            patches = np.stack(views, axis=1).swapaxes(0, 1)  # one view of all lies in one piece
            names = ", ".join(candidate.name for candidate in group)
            with devices.enough_memory(
                f"{len(videos)} videos at once are too many for the device's memory in {names}; "
                "lower --config.eval.batch_size, and what was found stays"
            ):
                found = means_after(
                    programs,
                    self._params,
                    class_count(self._params),
                    video,
                    patches,
                    self._mesh,
                    counts,
                )
            for candidate, means in zip(group, found, strict=True):
                rows = zip(videos, failures, likeliest(means[-1]), strict=True)
                outcomes = "".join(_outcome(*row) for row in rows)
                yield candidate, outcomes, np.stack(means, axis=1)

    def _cut(
        self, videos: Sequence[DecodedVideo], grid: Grid, reader: FrameReader
    ) -> list[Pending]:
        """Starts to cut each video's views, or to read those too large to keep for this grid."""
        pending: list[Pending] = []
        for video in videos:
            if video.is_too_large:
                task = (video.number, (grid,), grid.resolution)
                reader.start([task])
                pending.append(task)
            else:
                pending.append(self._cutters.submit(self._views, video, grid))
        return pending

    def _cut_views(
        self, pending: Sequence[Pending], grid: Grid, reader: FrameReader
    ) -> list[tuple[np.ndarray, str]]:
        """The results of `_views` for each video."""
        cutting = [
            one
            if isinstance(one, Future)
            else self._cutters.submit(self._views, reader.take(one), grid)
            for one in pending
        ]
        return [future.result() for future in cutting]

    def _views(self, video: DecodedVideo, grid: Grid) -> tuple[np.ndarray, str]:
        """Views uint8 [V, P, 588], zeros for an unreadable video, and the reason."""
        if video.frames is not None:
            return cut_views(video.frames, grid, self._view_settings), ""
        views = self._view_settings.count
        shape = (views, grid.tokens, PATCH_VALUES)
        return np.zeros(shape, np.uint8), video.failure


def _outcome(video: DecodedVideo, failure: str, top: Sequence[tuple[int, float]]) -> str:
    """The character of a video; none beyond the last one."""
    if video.number < 0:
        return ""
    if failure:
        return FAILED
    classes, right = [c for c, _ in top], labels_of(video.label)
    if classes[0] in right:
        return TOP1
    return WRONG if set(right).isdisjoint(classes) else TOP5
