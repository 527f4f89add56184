"""Images, read as videos of one frame."""

import os
import struct
from collections.abc import Sequence

import cv2
import numpy as np

from fluxvit_jax.data.decoding import (
    MAX_PIXELS,
    DecodeError,
    Video,
    check_regular,
    image_format,
)
from fluxvit_jax.data.frame_sampling import resized_size
from fluxvit_jax.distributed import storage

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
IMAGE_FORMATS = ("JPEG", "PNG", "WebP")  # those of the suffixes


def open_clip(source: str | os.PathLike | bytes, name: str | None = None) -> "Video | Image":
    """A video or an image, by the suffix of its path or the beginning of its bytes.

    Raises as `Video` does.
    """
    return (Image if is_image(source) else Video)(source, name)


def is_image(source: str | os.PathLike | bytes) -> bool:
    """Whether a path's suffix, or the beginning of a file's bytes, is that of an image."""
    if isinstance(source, bytes):
        return image_format(source[:16]) in IMAGE_FORMATS
    return os.path.splitext(os.fspath(source))[1].lower() in IMAGE_SUFFIXES


class Image:
    """An image with the interface of a `Video` of one frame; EXIF rotation is applied.

    Attributes:
      name: the image's name in errors.
      frame_rate: 0, as of a video whose file does not say.

    Raises:
      DecodeError: the file is missing, or is no image that can be read whole.
      UserError: the bucket cannot be read.
    """

    frame_rate = 0.0

    def __init__(self, source: str | os.PathLike | bytes, name: str | None = None):
        self.name = name or ("image in memory" if isinstance(source, bytes) else os.fspath(source))
        if not isinstance(source, bytes) and not storage.is_remote(source):
            check_regular(source, self.name)
        try:
            content = source if isinstance(source, bytes) else storage.read_bytes(source)
        except OSError as error:
            reason = "no such file" if isinstance(error, FileNotFoundError) else error.strerror
            raise DecodeError(self.name, reason or str(error)) from error
        height, width = _size(content, self.name)
        if height * width > MAX_PIXELS:
            raise DecodeError(self.name, f"{width} x {height} px are more than {MAX_PIXELS}")
        try:
            pixels = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
        except cv2.error as error:
            raise DecodeError(self.name, f"cannot decode: {error.err}") from error
        if pixels is None:
            raise DecodeError(self.name, "no image that can be decoded")
        self._frame = cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)

    def __enter__(self) -> "Image":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __len__(self) -> int:
        return 1

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        height, width, _ = self._frame.shape
        return height, width

    def read(
        self,
        indices: Sequence[int] | np.ndarray,
        short_side: int | None = None,
        interpolation: int = cv2.INTER_LINEAR,
    ) -> np.ndarray:
        """As `Video.read`: uint8 [n, height, width, 3] RGB. Every index must be 0."""
        if any(index != 0 for index in indices):
            raise IndexError(f"{self.name}: no frame {max(indices)}, there is 1")
        frame, (height, width) = self._frame, self.size
        if short_side is not None and short_side < min(height, width):
            height, width = resized_size(height, width, short_side)
            frame = cv2.resize(frame, (width, height), interpolation=interpolation)
        return np.repeat(frame[None], len(indices), axis=0)


def _size(content: bytes, name: str) -> tuple[int, int]:
    """(height, width) in the header of an image: OpenCV would decode a bomb before it tells.

    Raises DecodeError if the file is none of `IMAGE_FORMATS`, or has no whole header.
    """
    kind = image_format(content[:16])
    try:
        if kind == "PNG":
            width, height = struct.unpack_from(">2I", content, 16)
        elif kind == "WebP":
            width, height = _webp_size(content)
        elif kind == "JPEG":
            height, width = _jpeg_size(content)
        else:
            formats = ", ".join(IMAGE_FORMATS)
            raise DecodeError(name, f"no image that can be decoded: none of {formats}")
    except struct.error as error:
        raise DecodeError(name, "no image that can be decoded") from error
    return height, width


def _webp_size(content: bytes) -> tuple[int, int]:
    """(width, height) of the canvas, or of the only frame."""
    match content[12:16]:
        case b"VP8X":
            low, high, low_height, high_height = struct.unpack_from("<HBHB", content, 24)
            return 1 + low + (high << 16), 1 + low_height + (high_height << 16)
        case b"VP8L":
            [bits] = struct.unpack_from("<I", content, 21)
            return 1 + bits % 2**14, 1 + (bits >> 14) % 2**14
        case _:
            width, height = struct.unpack_from("<2H", content, 26)
            return width % 2**14, height % 2**14


def _jpeg_size(content: bytes) -> tuple[int, int]:
    """(height, width) in the start-of-frame segment, the only one of any size."""
    place = 2
    while True:
        [marker] = struct.unpack_from(">B", content, place)
        if marker != 0xFF:  # a decoder skips what does not belong there
            place += 1
            continue
        kind, length = struct.unpack_from(">BH", content, place + 1)
        if 0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC):  # not tables
            height, width = struct.unpack_from(">2H", content, place + 5)
            return height or 2**16, width  # 0: told after the first scan
        # Markers without a segment: fill bytes, stuffed bytes, TEM and restarts.
        alone = kind in (0x00, 0x01, 0xFF) or 0xD0 <= kind <= 0xD8
        place += (1 if kind == 0xFF else 2) if alone else 2 + length
