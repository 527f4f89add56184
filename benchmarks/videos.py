"""The video files that the benchmarks read, and the readers they compare.

`decord` is wanted by the benchmarks only: pip install decord==0.6.0
"""

import os
from collections.abc import Sequence
from pathlib import Path

import av
import cv2
import numpy as np

from fluxvit_jax.data.synthetic import MOTIONS, photographs, render


def write_videos(
    folder: Path, count: int, frames: int = 300, size: tuple[int, int] = (256, 340), seed: int = 0
) -> list[Path]:
    """Writes `count` H.264 files as FFmpeg makes them by default (key frames up to 250 apart).

    The defaults are 10 s at 30 frames a second, (height, width) as Kinetics is usually stored.
    """
    photos = photographs("train")
    paths = []
    for i in range(count):
        rng = np.random.default_rng([seed, i])
        photo = cv2.resize(photos[i % len(photos)], None, fx=size[0] / 128, fy=size[0] / 128)
        clip = render(MOTIONS[i % len(MOTIONS)], [photo] * 3, rng, frames, size)
        paths.append(folder / f"{i}.mp4")
        with av.open(paths[-1], "w") as file:
            stream = file.add_stream("libx264", rate=30)
            stream.height, stream.width = size
            stream.pix_fmt = "yuv420p"
            for picture in clip:
                file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            file.mux(stream.encode())
    return paths


class PlainVideo:
    """The loop that one writes first with PyAV: decode from the start, convert what is wanted."""

    frame_rate = 0.0  # nothing here asks for times

    def __init__(self, path: str | os.PathLike):
        self._container = av.open(path)

    def __enter__(self) -> "PlainVideo":
        return self

    def __exit__(self, *_: object) -> None:
        self._container.close()

    def __len__(self) -> int:
        return self._container.streams.video[0].frames

    def read(self, indices: Sequence[int], *_: object) -> np.ndarray:
        """Frames `indices`: uint8 [n, height, width, 3]."""
        wanted, images = {int(i) for i in indices}, {}
        for number, frame in enumerate(self._container.decode(video=0)):
            if number in wanted:
                images[number] = frame.to_ndarray(format="rgb24")
            if len(images) == len(wanted):
                break
        return np.stack([images[int(i)] for i in indices])


class DecordVideo:
    """decord with one thread, as data loaders use it."""

    frame_rate = 0.0

    def __init__(self, path: str | os.PathLike):
        import decord

        self._reader = decord.VideoReader(os.fspath(path), num_threads=1)

    def __enter__(self) -> "DecordVideo":
        return self

    def __exit__(self, *_: object) -> None:
        del self._reader

    def __len__(self) -> int:
        return len(self._reader)

    def read(self, indices: Sequence[int], *_: object) -> np.ndarray:
        """Frames `indices`: uint8 [n, height, width, 3]."""
        return self._reader.get_batch([int(i) for i in indices]).asnumpy()
