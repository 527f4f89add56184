"""Reads the moments of videos in processes that may hang or crash: a video, or windows of it."""

import heapq
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from fluxvit_jax.data.clips import read_clip
from fluxvit_jax.data.decoding import DecodeError, Video
from fluxvit_jax.data.supervised_workers import (
    Quarantine,
    SupervisedWorkers,
    check_shared_memory,
    reading,
)
from fluxvit_jax.data.time_limit import within
from fluxvit_jax.deploy.windows import read_windows, windows_of
from fluxvit_jax.find.index_file import Moment, Settings

# A part of a video is what a worker reads at a time, so that hours of video fit into memory and
# a time limit is one for minutes of it.
PART_BYTES, PART_SECONDS = 16 << 20, 64.0
AHEAD = 2  # parts that a worker is given
DYING = (
    "--workers: a worker that reads videos {}; use fewer and start the same command again; what "
    "was found stays"
)

Task = tuple[int, int, str]  # number of the video, of its part, and its path


@dataclass(frozen=True, kw_only=True)
class Part:
    """Moments of a video that were read.

    clips: uint8 [T, resolution, resolution, 3] of each of `moments`; parts: how many the video has;
    failed: reasons by the moments that could not be read; failure: of the whole video, else "".
    """

    moments: list[Moment] = field(default_factory=list)
    clips: list[np.ndarray] = field(default_factory=list)
    parts: int = 1
    failed: dict[Moment, str] = field(default_factory=dict)
    failure: str = ""


def read_parts(
    paths: Iterable[str],
    settings: Settings,
    workers: int,
    clip_seconds: float,
    open_video: Callable[[str], Video] = Video,
) -> Iterator[tuple[int, Part]]:
    """All parts of all videos, with the number of each video; parts of several come in turn.

    paths: local files. workers: processes; 0: none, then a file that crashes the decoder ends the
    program. clip_seconds: time limit for a part; 0: none.

    Raises UserError: too little shared memory, or workers die again and again.
    """
    todo = _Tasks(paths)
    quarantine: Quarantine = {}
    read = _Reading(settings, quarantine, open_video)
    if not workers:
        while (task := todo.take()) is not None:
            yield task[0], todo.noted(task, _read_here(read, task, clip_seconds))
        return
    check_shared_memory("--workers", workers * (AHEAD + 1) * PART_BYTES)
    pool = SupervisedWorkers(read, workers, clip_seconds, quarantine, AHEAD, DYING)
    under_way = 0
    try:
        while True:
            while under_way < workers * AHEAD and (task := todo.take()) is not None:
                pool.submit(task)
                under_way += 1
            if not under_way:
                return
            for task, made in pool.finished():
                if isinstance(made, Exception):
                    raise made
                under_way -= 1
                pool.went_on()
                yield task[0], todo.noted(task, made)
    finally:
        pool.close()


def _read_here(read: "_Reading", task: Task, seconds: float) -> Part:
    try:
        return within(seconds, task[2], lambda: read(task))
    except DecodeError as error:
        return Part(failure=error.reason)


class _Tasks:
    """What is still to be given to workers: the parts of videos that were begun, then new videos.

    How many parts a video has is known once its first one is read.
    """

    def __init__(self, paths: Iterable[str]):
        self._new = enumerate(paths)
        self._known: list[Task] = []  # a heap

    def take(self) -> Task | None:
        if self._known:
            return heapq.heappop(self._known)
        number, path = next(self._new, (0, None))
        return None if path is None else (number, 0, path)

    def noted(self, task: Task, part: Part) -> Part:
        number, first, path = task
        if first == 0:
            for other in range(1, part.parts):
                heapq.heappush(self._known, (number, other, path))
        return part


@dataclass(frozen=True)
class _Reading:
    """The function of the workers: a task to its part."""

    settings: Settings
    quarantine: Quarantine
    open_video: Callable[[str], Video]

    def __call__(self, task: Task) -> Part:
        _, part, path = task
        try:
            with reading(path, self.quarantine):
                video = self._opened(path)
            with reading(path, self.quarantine):
                return self._windows(video, part) if self.settings.window else self._whole(video)
        except DecodeError as error:
            return Part(failure=error.reason)

    def _whole(self, video: Video) -> Part:
        rate = video.frame_rate
        clip = read_clip(video, self.settings.frames, self.settings.resolution)
        moment = Moment(0.0, len(video) / rate if rate else 0.0)
        return Part(moments=[moment], clips=[clip.frames])

    def _windows(self, video: Video, part: int) -> Part:
        _, _, frames, resolution, window, stride = self.settings
        rate = video.frame_rate
        if not rate:
            raise DecodeError(video.name, "names no frame rate, which --window needs")
        windows = windows_of(len(video), rate, window, stride)
        most = PART_BYTES // (3 * frames * resolution**2)
        each = max(1, min(most, int(PART_SECONDS / stride)))
        own = windows[part * each : (part + 1) * each]
        moments = [Moment(one.start / rate, one.stop / rate) for one in own]
        clips = list(read_windows(video, own, frames, resolution))
        failed = {
            moment: clip.reason
            for moment, clip in zip(moments, clips, strict=True)
            if isinstance(clip, DecodeError)
        }
        return Part(
            moments=[moment for moment in moments if moment not in failed],
            clips=[clip.frames for clip in clips if not isinstance(clip, DecodeError)],
            parts=math.ceil(len(windows) / each),
            failed=failed,
        )

    def _opened(self, path: str) -> Video:
        """A video; the one that was read last is open still: its packets are indexed once."""
        if not _last or _last[0][0] != path:
            for _, video in _last:
                video.close()
            _last[:] = []
            _last.append((path, self.open_video(path)))
        return _last[0][1]


_last: list[tuple[str, Video]] = []  # the video that this process has read last, and its path
