"""Reading the videos of a source, which may hang or crash the process that does."""

import contextlib
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fluxvit_jax.data.decoding import DecodeError, Video
from fluxvit_jax.data.images import Image, open_clip
from fluxvit_jax.data.sources import Record, Source
from fluxvit_jax.data.supervised_workers import (
    Quarantine,
    SupervisedWorkers,
    reading,
)
from fluxvit_jax.data.time_limit import within

DYING = (
    "config.data.workers: a worker that reads data {}, before any else is started; see what else "
    "takes the memory of this machine"
)


@contextlib.contextmanager
def reading_video(source: Source, number: int, quarantine: Quarantine) -> Iterator[Record]:
    """A context that reads a video of a source: what hangs or crashes inside is charged to it.

    Raises DecodeError, which names the id of the video, or its number if not even that can be read.
    """
    with reading(f"video {number}", quarantine):
        record = source[number]
    if record.failure:
        raise DecodeError(record.id, record.failure)
    with reading(record.id, quarantine):
        try:
            yield record
        except DecodeError as error:
            raise DecodeError(record.id, error.reason) from error


def segment_of(record: Record, video: Video | Image) -> tuple[int, int]:
    """The first frame of a record's clip in its video, and the one after its last.

    A clip in seconds has at least one frame, and ends with the video at the latest.

    Raises DecodeError if the video ends before, or does not tell how long a second is.
    """
    length = len(video)
    if record.seconds:
        start, stop = record.seconds
        if not video.frame_rate:
            raise DecodeError(record.id, "tells no frames per second, and the list names seconds")
        first = int(start * video.frame_rate)
        if first >= length:
            lasts = length / video.frame_rate
            raise DecodeError(record.id, f"lasts {lasts:.2f} s, and the list names {start} s")
        frames = max(1, int((stop - start) * video.frame_rate))
        return first, min(first + frames, length)
    first, end = record.segment or (0, length)
    if end > length:
        raise DecodeError(record.id, f"has {length} frames, and the list names {first} to {end}")
    return first, end


@dataclass(frozen=True)
class VideoPart:
    """The frames of a video from `first` to before `end`, numbered from 0."""

    video: Video | Image
    first: int
    end: int

    def __len__(self) -> int:
        return self.end - self.first

    @property
    def frame_rate(self) -> float | None:
        return self.video.frame_rate

    def read(self, indices: Sequence[int] | np.ndarray, *size: Any) -> np.ndarray:
        """As `Video.read`."""
        return self.video.read(np.asarray(indices) + self.first, *size)


def part_of(record: Record, video: Video | Image) -> Any:
    """What a record is about, all of its video or a `VideoPart`. Raises as `segment_of`."""
    if record.segment is None and not record.seconds:
        return video
    return VideoPart(video, *segment_of(record, video))


def reasons_unreadable(
    source: Source,
    workers: int,
    clip_seconds: float,
    open_video: Callable[..., Any] = open_clip,
) -> Generator[str]:
    """Why the first frame of each video cannot be read, one video after another; "" if it can.

    Read in a process of its own, which may hang or crash, unless there are no `workers`.

    Raises UserError: the process dies again and again, and it is no video's fault.
    """
    quarantine: Quarantine = {}
    why = _WhyUnreadable(source, quarantine, open_video)
    if not workers:
        for number in range(len(source)):
            yield _within(clip_seconds, why, number)
        return
    process = SupervisedWorkers(why, 1, clip_seconds, quarantine, ahead=1, dying=DYING)
    with contextlib.closing(process):
        for number in range(len(source)):
            process.submit(number)
            while not (found := process.finished()):
                pass
            [(_, reason)] = found
            if isinstance(reason, Exception):
                raise reason
            process.went_on()
            yield reason


def _within(seconds: float, why: "_WhyUnreadable", number: int) -> str:
    try:
        return within(seconds, f"video {number}", lambda: why(number))
    except DecodeError as error:
        return error.reason


@dataclass(frozen=True)
class _WhyUnreadable:
    """The function of the worker: the number of a video to the reason."""

    source: Source
    quarantine: Quarantine
    open_video: Callable[..., Any]

    def __call__(self, number: int) -> str:
        try:
            with (
                reading_video(self.source, number, self.quarantine) as record,
                self.open_video(record.video) as video,
            ):
                video.read([0])
        except DecodeError as error:
            return error.reason
        return ""
