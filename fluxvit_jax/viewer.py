"""Chunks of videos through the cells of a search: decoded once, whatever the number of cells."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import groupby
from typing import NamedTuple

import cv2
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from fluxvit_jax import devices, evaluate, parallel, sharding
from fluxvit_jax.budgets import Grid
from fluxvit_jax.cells import Cell
from fluxvit_jax.config import model_config
from fluxvit_jax.data.annotations import Record
from fluxvit_jax.data.decode import DecodeError, Video
from fluxvit_jax.data.patches import PATCH_VALUES
from fluxvit_jax.data.views import Frames, cut_views, read_frames
from fluxvit_jax.evaluate import Setting
from fluxvit_jax.results import AMONG_FIRST, FAILED, FIRST, WRONG

# Frames of one video that are kept at their own size, for two chunks of videos at a time. A video
# of more is decoded again for each grid.
MAX_DECODED_BYTES = 1 << 30


class Shot(NamedTuple):
    """A video that was read for a chunk.

    record: None beyond the last video; frames: None where they are too many to keep, or could not
    be read; failure: why not, else "".
    """

    record: Record | None
    frames: Frames | None = None
    failure: str = ""


class Viewer:
    """Shows chunks of videos to cells. Threads decode and cut while the devices work.

    Threads do, where training and evaluation have processes: decoding is a small part of what a
    search does, and OpenCV and FFmpeg let others run meanwhile.
    """

    def __init__(self, config: ConfigDict, params: dict, mesh: Mesh | None = None):
        cv2.setNumThreads(0)  # the threads themselves are the parallelism
        self._clips, self._crops, self._seed = config.eval.clips, config.eval.crops, config.seed
        self._mesh = mesh or parallel.make_mesh(config)
        self._model = model_config(config, parallel.platform_of(self._mesh))
        self._params = parallel.place(params, sharding.shardings(params, self._mesh))
        # Apart, so that reading the next chunk does not keep this one from being cut.
        self._readers, self._cutters = (
            ThreadPoolExecutor(max(1, config.data.workers)) for _ in range(2)
        )

    def close(self) -> None:
        for pool in (self._readers, self._cutters):
            pool.shutdown(cancel_futures=True)

    def read(self, records: Sequence[Record | None], cells: Sequence[Cell]) -> list[Future[Shot]]:
        """Begins to read all frames of videos that the cells need.

        records: None beyond the last video.
        """
        grids = list({cell.grid: None for cell in cells})
        return [self._readers.submit(self._read, record, grids) for record in records]

    def see(
        self, shots: Sequence[Shot], numbers: Sequence[int], cells: Sequence[Cell]
    ) -> Iterator[tuple[Cell, str]]:
        """Each cell with what it makes of the videos, a character each (see `results`).

        shots: what `read` found, at least for these cells; numbers: of the videos in their split;
        cells: those of one grid behind one another.
        """
        video = np.where([shot.record is not None for shot in shots], numbers, -1)
        by_grid = [(grid, list(own)) for grid, own in groupby(cells, lambda cell: cell.grid)]
        cutting = self._cut(shots, by_grid[0][0])
        for (_, own), following in zip(by_grid, [*by_grid[1:], None], strict=True):
            views, failures = zip(*(future.result() for future in cutting), strict=True)
            cutting = self._cut(shots, following[0]) if following else []
            programs = [self.program(cell) for cell in own]
            patches = np.stack(views, axis=1).swapaxes(0, 1)  # one view of all lies in one piece
            names = ", ".join(cell.name for cell in own)
            with devices.enough_memory(
                f"{len(shots)} videos at once are too many for the device's memory in {names}; "
                "lower --config.eval.batch_size, and what was found stays"
            ):
                tops = evaluate.classify(programs, self._params, video, patches, self._mesh)
            for cell, top in zip(own, tops, strict=True):
                marks = zip([shot.record for shot in shots], failures, top, strict=True)
                yield cell, "".join(_mark(*one) for one in marks)

    def program(self, cell: Cell) -> Callable:
        """The compiled program that `--mode=evaluate` runs at the same setting."""
        setting = Setting(cell.budget, cell.grid, cell.head)
        return evaluate.predictor(cell.network(self._model), setting, self._seed, self._mesh)

    def _read(self, record: Record | None, grids: Sequence[Grid]) -> Shot:
        if record is None:
            return Shot(None)
        try:
            with Video(record.video) as video:
                return Shot(record, read_frames(video, grids, self._clips, MAX_DECODED_BYTES))
        except DecodeError as error:
            return Shot(record, failure=error.reason)

    def _cut(self, shots: Sequence[Shot], grid: Grid) -> list[Future]:
        """Begins to cut each video's views: what `_views` returns, later."""
        return [self._cutters.submit(self._views, shot, grid) for shot in shots]

    def _views(self, shot: Shot, grid: Grid) -> tuple[np.ndarray, str]:
        """Views uint8 [V, P, 588], zeros where there are none, and why."""
        failure, frames = shot.failure, shot.frames
        if shot.record and not failure:
            try:
                frames = frames or self._read_again(shot.record, grid)
                return cut_views(frames, grid, self._clips, self._crops), ""
            except DecodeError as error:
                failure = error.reason
        return np.zeros((self._clips * self._crops, grid.tokens, PATCH_VALUES), np.uint8), failure

    def _read_again(self, record: Record, grid: Grid) -> Frames:
        with Video(record.video) as video:
            return read_frames(video, [grid], self._clips, MAX_DECODED_BYTES, grid.resolution)


def _mark(record: Record | None, failure: str, top: Sequence[tuple[int, float]]) -> str:
    """The character of a video; none beyond the last one."""
    if record is None:
        return ""
    if failure:
        return FAILED
    classes = [c for c, _ in top]
    if record.label == classes[0]:
        return FIRST
    return AMONG_FIRST if record.label in classes else WRONG
