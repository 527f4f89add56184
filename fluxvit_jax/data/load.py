"""What making a training clip costs a host: seconds of CPU, and bytes read from storage."""

import statistics
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import av
import cv2
import numpy as np
from ml_collections import ConfigDict

from fluxvit_jax.config import admissible_grids
from fluxvit_jax.data.annotations import Example, FileSource, Source
from fluxvit_jax.data.pipeline import TrainGroups, training_source
from fluxvit_jax.errors import UserError
from fluxvit_jax.storage import file_sizes

SECONDS = 5.0  # of measuring; at least `GROUPS` groups of clips after one that warms up
GROUPS = 3
SIZED_VIDEOS = 200  # whose files are looked at
# The video that stands for those which are not at hand: as Kinetics is usually stored.
FRAMES, HEIGHT, WIDTH = 300, 256, 340
NOISE = 8.0  # deviation, of 255: makes 0.45 Mbit a second, about what Kinetics has at that size


class ClipCost(NamedTuple):
    """Of one training clip: decoded, augmented and cut into patches, on this machine.

    cpu_seconds: of one core; bytes: of its file, a share where a video gives several clips; 0 where
    that is not known. measured_on: what was read. videos: to train on; None where not at hand.
    """

    cpu_seconds: float
    bytes: float
    measured_on: str
    videos: int | None


def clip_cost(config: ConfigDict) -> ClipCost:
    """Measured on the videos of `data.train`; where they are not at hand, on one made for it."""
    videos, reason = None, "config.data.train names none"
    if config.data.train:
        try:
            source = training_source(config)
            videos = len(source)
            seconds = _seconds_a_clip(config, source)
            size = _mean_size(source) / config.data.repeats
            return ClipCost(seconds, size, f"{videos} videos of config.data.train", videos)
        except UserError as error:
            reason = str(error)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "example.mp4"
        _write_example(path)
        # Many of them: to shuffle a handful takes longer, and no data set is so small.
        seconds = _seconds_a_clip(config, FileSource([Example("example", 0, str(path))] * 1000))
    what = f"a synthetic video, {FRAMES} frames of {WIDTH} x {HEIGHT} px ({reason})"
    return ClipCost(seconds, 0.0, what, videos)


def _seconds_a_clip(config: ConfigDict, source: Source) -> float:
    """Median over groups. Raises UserError if videos cannot be read."""
    groups = TrainGroups(
        source=source,
        seed=config.seed,
        grids=admissible_grids(config),
        group=config.data.grid_group,
        repeats=config.data.repeats,
        augment=config.data.augment,
    )
    threads = cv2.getNumThreads()
    cv2.setNumThreads(0)  # as in the processes that read the data
    try:
        groups[0]
        taken, begin = [], time.perf_counter()
        while len(taken) < GROUPS or time.perf_counter() - begin < SECONDS:
            start = time.process_time()
            groups[1 + len(taken)]
            taken.append((time.process_time() - start) / config.data.grid_group)
    finally:
        cv2.setNumThreads(threads)
    return statistics.median(taken)


def _mean_size(source: Source) -> float:
    """Mean bytes of the files of some videos."""
    records = [source[number].video for number in range(min(len(source), SIZED_VIDEOS))]
    paths = [video for video in records if isinstance(video, str)]
    sizes = file_sizes(paths) if paths else [len(video) for video in records]
    return statistics.fmean(sizes)


def _write_example(path: Path) -> None:
    """A picture of soft blobs that slides by under noise, in H.264 by FFmpeg's defaults."""
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((HEIGHT + FRAMES, WIDTH + FRAMES, 3)).astype(np.float32)
    picture = 128 + 48 * sum(side * cv2.GaussianBlur(noise, (0, 0), side) for side in (2, 8, 32))
    with av.open(path, "w") as file:
        stream = file.add_stream("libx264", rate=30)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        for number in range(FRAMES):
            window = picture[number : number + HEIGHT, number : number + WIDTH]
            window = window + NOISE * rng.standard_normal(window.shape, np.float32)
            window = np.clip(window, 0, 255).astype(np.uint8)
            frame = av.VideoFrame.from_ndarray(window, format="rgb24")
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
