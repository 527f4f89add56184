"""The video files that the benchmarks read, and the readers they compare.

The other readers are wanted by the benchmarks only: pip install decord==0.6.0 torchcodec==0.13.0
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import av
import cv2
import numpy as np

from fluxvit_jax.data.synthetic import MOTIONS, photographs, render


class Codec(NamedTuple):
    """encoder: FFmpeg's; suffix: of the file; options: where the default takes minutes a video."""

    encoder: str
    suffix: str
    options: dict[str, str]


CODECS = {
    "H.264": Codec("libx264", ".mp4", {}),
    "HEVC": Codec("libx265", ".mp4", {"preset": "fast", "x265-params": "log-level=none"}),
    "VP9": Codec("libvpx-vp9", ".webm", {"cpu-used": "5", "deadline": "realtime"}),
    "AV1": Codec("libsvtav1", ".mp4", {"preset": "10"}),
    "MPEG-4": Codec("mpeg4", ".mp4", {}),
}
os.environ.setdefault("SVT_LOG", "1")  # of the encoder of AV1: errors alone


def write_videos(
    folder: Path,
    count: int,
    frames: int = 300,
    size: tuple[int, int] = (256, 340),
    codec: Codec = CODECS["H.264"],
) -> list[Path]:
    """Writes `count` files as FFmpeg makes them by default (H.264: key frames up to 250 apart).

    The defaults are 10 s at 30 frames a second, (height, width) as Kinetics is usually stored.
    """
    photos = photographs("train")
    paths = []
    for i in range(count):
        rng = np.random.default_rng([0, i])
        photo = cv2.resize(photos[i % len(photos)], None, fx=size[0] / 128, fy=size[0] / 128)
        clip = render(MOTIONS[i % len(MOTIONS)], [photo] * 3, rng, frames, size)
        paths.append(folder / f"{i}{codec.suffix}")
        with av.open(paths[-1], "w") as file:
            stream = file.add_stream(codec.encoder, rate=30, options=codec.options)
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


class TorchcodecVideo:
    """torchcodec with one thread, in its exact mode, which asks the file for its frames first."""

    frame_rate = 0.0

    def __init__(self, path: str | os.PathLike):
        from torchcodec.decoders import VideoDecoder

        self._decoder = VideoDecoder(
            os.fspath(path), dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="exact"
        )

    def __enter__(self) -> "TorchcodecVideo":
        return self

    def __exit__(self, *_: object) -> None:
        del self._decoder

    def __len__(self) -> int:
        return len(self._decoder)

    def read(self, indices: Sequence[int], *_: object) -> np.ndarray:
        """Frames `indices`: uint8 [n, height, width, 3]."""
        return self._decoder.get_frames_at([int(i) for i in indices]).data.numpy()
