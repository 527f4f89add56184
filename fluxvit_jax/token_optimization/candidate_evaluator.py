"""Evaluates many candidates on one chunk of videos, decoding every video only once."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby

import cv2
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from fluxvit_jax.config.network import model_config
from fluxvit_jax.data.annotations import Record
from fluxvit_jax.data.decoding import DecodeError, Video
from fluxvit_jax.data.patches import PATCH_VALUES
from fluxvit_jax.data.time_limit import within
from fluxvit_jax.data.views import Frames, cut_views, read_frames
from fluxvit_jax.distributed import devices, partition_rules
from fluxvit_jax.distributed.mesh import device_put_global, make_mesh, platform_of
from fluxvit_jax.evaluation import evaluate
from fluxvit_jax.evaluation.evaluate import Setting
from fluxvit_jax.grids import Grid
from fluxvit_jax.token_optimization.candidates import Candidate
from fluxvit_jax.token_optimization.results_log import FAILED, TOP1, TOP5, WRONG

# Frames of one video that are kept at their own size, for two chunks of videos at a time. A video
# of more is decoded again for each grid.
MAX_DECODED_BYTES = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodedVideo:
    """A video of a chunk.

    record: None beyond the last video; frames: None where they are too many to keep or could not
    be read; failure: why they could not be read, else "".
    """

    record: Record | None
    frames: Frames | None = None
    failure: str = ""


class CandidateEvaluator:
    """Runs candidates on chunks of videos. Threads decode and cut while the devices work.

    Threads suffice, where training and evaluation use processes: decoding is a small part of a
    search, and OpenCV and FFmpeg release the interpreter lock. Close it at the end.
    """

    def __init__(self, config: ConfigDict, params: dict, mesh: Mesh | None = None):
        cv2.setNumThreads(0)  # the threads themselves are the parallelism
        self._clips, self._crops, self._seed = config.eval.clips, config.eval.crops, config.seed
        self._clip_seconds = config.data.clip_seconds
        self._mesh = mesh or make_mesh(config)
        self._model = model_config(config, platform_of(self._mesh))
        self._params = device_put_global(params, partition_rules.shardings(params, self._mesh))
        self._programs: dict[Candidate, Callable] = {}
        # Two pools, so that reading the next chunk does not delay cutting this one.
        self._readers, self._cutters = (
            ThreadPoolExecutor(max(1, config.data.workers)) for _ in range(2)
        )

    def close(self) -> None:
        for pool in (self._readers, self._cutters):
            pool.shutdown(cancel_futures=True)

    def program(self, candidate: Candidate) -> Callable:
        """The compiled program that `--mode=evaluate` runs at the same setting."""
        if candidate not in self._programs:
            setting = Setting(candidate.budget, candidate.grid, candidate.head)
            network = candidate.network(self._model)
            self._programs[candidate] = evaluate.predictor(
                network, setting, self._seed, self._mesh, multi_label=False
            )
        return self._programs[candidate]

    def keep_programs(self, candidates: Sequence[Candidate]) -> None:
        """Releases the programs of all other candidates: a search compiles hundreds."""
        self._programs = {c: self._programs[c] for c in candidates if c in self._programs}

    def read(
        self, records: Sequence[Record | None], candidates: Sequence[Candidate]
    ) -> list[Future[DecodedVideo]]:
        """Starts to read all frames of videos that the candidates need.

        records: None beyond the last video.
        """
        grids = list({candidate.grid: None for candidate in candidates})
        return [self._readers.submit(self._read, record, grids) for record in records]

    def evaluate(
        self,
        videos: Sequence[DecodedVideo],
        numbers: Sequence[int],
        candidates: Sequence[Candidate],
    ) -> Iterator[tuple[Candidate, str]]:
        """Each candidate with its outcomes on the videos, one character each (see `results_log`).

        videos: results of `read`, for at least these candidates; numbers: of the videos in their
        split; candidates: those of one grid in succession.
        """
        video = np.where([one.record is not None for one in videos], numbers, -1)
        by_grid = [(grid, list(group)) for grid, group in groupby(candidates, lambda c: c.grid)]
        cutting = self._cut(videos, by_grid[0][0])
        for (_, group), following in zip(by_grid, [*by_grid[1:], None], strict=True):
            views, failures = zip(*(future.result() for future in cutting), strict=True)
            cutting = self._cut(videos, following[0]) if following else []
            programs = [self.program(candidate) for candidate in group]
            patches = np.stack(views, axis=1).swapaxes(0, 1)  # one view of all lies in one piece
            names = ", ".join(candidate.name for candidate in group)
            with devices.enough_memory(
                f"{len(videos)} videos at once are too many for the device's memory in {names}; "
                "lower --config.eval.batch_size, and what was found stays"
            ):
                tops = evaluate.classify(programs, self._params, video, patches, self._mesh)
            for candidate, top in zip(group, tops, strict=True):
                rows = zip(videos, failures, top, strict=True)
                yield candidate, "".join(_outcome(one.record, *row) for one, *row in rows)

    def _read(self, record: Record | None, grids: Sequence[Grid]) -> DecodedVideo:
        if record is None:
            return DecodedVideo(record=None)
        if record.failure:
            return DecodedVideo(record=record, failure=record.failure)
        try:
            return DecodedVideo(record=record, frames=self._frames(record, grids))
        except DecodeError as error:
            return DecodedVideo(record=record, failure=error.reason)

    def _cut(
        self, videos: Sequence[DecodedVideo], grid: Grid
    ) -> list[Future[tuple[np.ndarray, str]]]:
        """Starts to cut each video's views; the results are those of `_views`."""
        return [self._cutters.submit(self._views, video, grid) for video in videos]

    def _views(self, video: DecodedVideo, grid: Grid) -> tuple[np.ndarray, str]:
        """Views uint8 [V, P, 588], zeros for an unreadable video, and the reason."""
        failure = video.failure
        if video.record and not failure:
            try:
                frames = video.frames or self._frames(video.record, [grid], grid.resolution)
                assert frames is not None  # frames scaled to a short side have no limit
                return cut_views(frames, grid, self._clips, self._crops), ""
            except DecodeError as error:
                failure = error.reason
        return np.zeros((self._clips * self._crops, grid.tokens, PATCH_VALUES), np.uint8), failure

    def _frames(
        self, record: Record, grids: Sequence[Grid], short_side: int | None = None
    ) -> Frames | None:
        """`read_frames` of a video within the time limit. Raises DecodeError."""

        def read() -> Frames | None:
            with Video(record.video) as video:
                return read_frames(video, grids, self._clips, MAX_DECODED_BYTES, short_side)

        return within(self._clip_seconds, record.id, read)


def _outcome(record: Record | None, failure: str, top: Sequence[tuple[int, float]]) -> str:
    """The character of a video; none beyond the last one."""
    if record is None:
        return ""
    if failure:
        return FAILED
    classes = [c for c, _ in top]
    if record.label == classes[0]:
        return TOP1
    return TOP5 if record.label in classes else WRONG
