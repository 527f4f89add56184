"""Reads the frames of videos for many grids at once, in processes that may hang or crash."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from ml_collections import ConfigDict

from fluxvit_jax.data.decoding import DecodeError, Video
from fluxvit_jax.data.reading import reading_video
from fluxvit_jax.data.sources import Source
from fluxvit_jax.data.supervised_workers import Quarantine, SupervisedWorkers
from fluxvit_jax.data.time_limit import within
from fluxvit_jax.data.views import Frames, Views, read_frames, views_of
from fluxvit_jax.grids import Grid

# Frames of one video that are kept at their own size, for two chunks of videos at a time. A video
# of more is decoded again for each grid.
MAX_DECODED_BYTES = 1 << 30
DYING = (
    "config.data.workers: a worker that reads data {}; lower data.workers or eval.batch_size and "
    "start the same command again; what was found stays"
)

# Number of the video, grids that it is read for, and the short side to scale it to; 0: not scaled.
Task = tuple[int, tuple[Grid, ...], int]


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodedVideo:
    """A video of a source.

    number: -1 beyond the last video; frames: None where they are too many to keep or could not be
    read; failure: why they could not be read, else "".
    """

    number: int = -1
    label: Any = None
    frames: Frames | None = None
    failure: str = ""

    @property
    def is_too_large(self) -> bool:
        return self.number >= 0 and self.frames is None and not self.failure


class FrameReader:
    """Reads tasks on the videos of a source in `data.workers` processes, or in place without any.

    What hangs or crashes a process is that video's failure, as in training and evaluation. Use it
    with `with`. most: tasks that are started together.
    """

    def __init__(
        self,
        config: ConfigDict,
        source: Source,
        most: int,
        open_video: Callable[..., Video] = Video,
    ):
        quarantine: Quarantine = {}
        self._clip_seconds = config.data.clip_seconds
        self._read = _Reading(source, views_of(config), quarantine, open_video)
        self._arrived: dict[Task, DecodedVideo | Exception] = {}
        self._workers: SupervisedWorkers | None = None
        if workers := config.data.workers:
            ahead = math.ceil(most / workers)  # they read on while the devices work
            self._workers = SupervisedWorkers(
                self._read, workers, self._clip_seconds, quarantine, ahead, DYING
            )

    def __enter__(self) -> "FrameReader":
        return self

    def __exit__(self, *_: object) -> None:
        if self._workers:
            self._workers.close()

    def start(self, tasks: Iterable[Task]) -> None:
        """Starts to read, if there are workers."""
        for task in tasks:
            if self._workers:
                self._workers.submit(task)

    def take(self, task: Task) -> DecodedVideo:
        """The video of a task that was started. Raises UserError: workers die again and again."""
        if self._workers is None:
            return self._read_here(task)
        while task not in self._arrived:
            self._arrived |= self._workers.finished()
        self._workers.went_on()
        made = self._arrived.pop(task)
        if isinstance(made, Exception):
            raise made
        return made

    def _read_here(self, task: Task) -> DecodedVideo:
        try:
            return within(self._clip_seconds, f"video {task[0]}", lambda: self._read(task))
        except DecodeError as error:
            return DecodedVideo(number=task[0], failure=error.reason)


@dataclass(frozen=True)
class _Reading:
    """The function of the workers: a task to its video."""

    source: Source
    views: Views
    quarantine: Quarantine
    open_video: Callable[..., Video]

    def __call__(self, task: Task) -> DecodedVideo:
        number, grids, short_side = task
        if number >= len(self.source):
            return DecodedVideo()
        try:
            with (
                reading_video(self.source, number, self.quarantine) as record,
                self.open_video(record.video) as video,
            ):
                frames = read_frames(
                    video, grids, self.views, MAX_DECODED_BYTES, short_side or None
                )
            return DecodedVideo(number=number, label=record.label, frames=frames)
        except DecodeError as error:
            return DecodedVideo(number=number, failure=error.reason)
