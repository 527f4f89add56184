"""Host cost of a training clip: CPU seconds and bytes read from storage."""

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import av
import cv2
import numpy as np
from ml_collections import ConfigDict

from fluxvit_jax.config.grids import admissible_grids
from fluxvit_jax.data.captions import TextArrays, clip_texts
from fluxvit_jax.data.multi_label import multi_hot_classes
from fluxvit_jax.data.pipeline import TrainGroups, training_source
from fluxvit_jax.data.sources import Example, FileSource, Source
from fluxvit_jax.distributed.storage import file_sizes
from fluxvit_jax.errors import UserError

SECONDS = 5.0  # of measuring; at least `GROUPS` groups of clips after one that warms up
GROUPS = 3
SIZED_VIDEOS = 200  # files over which sizes are averaged
# The synthetic stand-in where no video is at hand: as Kinetics is usually stored.
FRAMES, HEIGHT, WIDTH = 300, 256, 340
NOISE = 8.0  # deviation, of 255: makes 0.45 Mbit a second, about what Kinetics has at that size


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipCost:
    """Cost of decoding, augmenting and patchifying one training clip on this machine."""

    cpu_seconds: float  # of one core
    bytes: float  # of its file, divided by the clips that share it; 0 where unknown
    measured_on: str  # the videos that were read
    videos: int | None  # number of training videos; None where unknown


def clip_cost(
    config: ConfigDict,
    open_training: Callable[[ConfigDict], Source] = training_source,
    texts: TextArrays = clip_texts,
) -> ClipCost:
    """Cost measured on the videos of `data.train` or, without them, on a synthetic video.

    open_training, texts: open the videos, and make arrays of their texts; see `Objective`.
    """
    videos, reason = None, "config.data.train names none"
    if config.data.train:
        try:
            source = open_training(config)
            videos = len(source)
            seconds = _seconds_a_clip(config, source, texts)
            size = _mean_size(source) / config.data.repeated_aug
            return ClipCost(
                cpu_seconds=seconds,
                bytes=size,
                measured_on=f"{videos} videos of config.data.train",
                videos=videos,
            )
        except UserError as error:
            reason = str(error)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "example.mp4"
        _write_example(path)
        # Shuffling a handful of videos takes longer than shuffling many.
        example = FileSource([Example("example", 0, str(path))] * 1000)
        seconds = _seconds_a_clip(config, example, texts)
    what = f"a synthetic video, {FRAMES} frames of {WIDTH} x {HEIGHT} px ({reason})"
    return ClipCost(cpu_seconds=seconds, bytes=0.0, measured_on=what, videos=videos)


def _seconds_a_clip(config: ConfigDict, source: Source, texts: TextArrays) -> float:
    """Median CPU seconds a clip over groups. Raises UserError if videos cannot be read."""
    groups = TrainGroups(
        source=source,
        seed=config.seed,
        grids=admissible_grids(config),
        group=config.data.clips_per_grid,
        repeats=config.data.repeated_aug,
        augment=config.data.augment,
        texts=texts,
        multi_hot=multi_hot_classes(config),
    )
    threads = cv2.getNumThreads()
    cv2.setNumThreads(0)  # as in the processes that read the data
    try:
        groups[0]
        taken: list[float] = []
        begin = time.perf_counter()
        while len(taken) < GROUPS or time.perf_counter() - begin < SECONDS:
            start = time.process_time()
            groups[1 + len(taken)]
            taken.append((time.process_time() - start) / config.data.clips_per_grid)
    finally:
        cv2.setNumThreads(threads)
    return statistics.median(taken)


def _mean_size(source: Source) -> float:
    """Mean file size in bytes of the first videos."""
    records = [source[number].video for number in range(min(len(source), SIZED_VIDEOS))]
    paths = [video for video in records if isinstance(video, str)]
    sizes = file_sizes(paths) if paths else [len(video) for video in records]
    return statistics.fmean(sizes)


def _write_example(path: Path) -> None:
    """A sliding picture of soft blobs under noise, in H.264 with FFmpeg's defaults."""
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((HEIGHT + FRAMES, WIDTH + FRAMES, 3)).astype(np.float32)
    blobs = [side * cv2.GaussianBlur(noise, (0, 0), side) for side in (2, 8, 32)]
    picture = 128 + 48 * np.sum(blobs, axis=0)
    with av.open(path, "w") as file:
        stream = file.add_stream("libx264", rate=30)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        for number in range(FRAMES):
            window = picture[number : number + HEIGHT, number : number + WIDTH]
            window = window + NOISE * rng.standard_normal(window.shape, np.float32)
            pixels = np.clip(window, 0, 255).astype(np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
