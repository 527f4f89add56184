"""Images, read as videos of one frame."""

import os
from collections.abc import Sequence

import cv2
import numpy as np

from fluxvit_jax.data.decoding import DecodeError, Video, check_regular, image_format
from fluxvit_jax.data.frame_sampling import resized_size
from fluxvit_jax.distributed import storage

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
IMAGE_FORMATS = ("JPEG", "PNG", "WebP")  # those of the suffixes


def open_clip(source: str | os.PathLike | bytes, name: str | None = None) -> "Video | Image":
    """A video or an image, by the suffix of its path or the beginning of its bytes.

    Raises as `Video` does.
    """
    return (Image if _is_image(source) else Video)(source, name)


def _is_image(source: str | os.PathLike | bytes) -> bool:
    if isinstance(source, bytes):
        return image_format(source[:16]) in IMAGE_FORMATS
    return os.path.splitext(os.fspath(source))[1].lower() in IMAGE_SUFFIXES


class Image:
    """An image with the interface of a `Video` of one frame; EXIF rotation is applied.

    Raises:
      DecodeError: the file is missing, or is no image that can be read whole.
      UserError: the bucket cannot be read.
    """

    def __init__(self, source: str | os.PathLike | bytes, name: str | None = None):
        self.name = name or ("image in memory" if isinstance(source, bytes) else os.fspath(source))
        if not isinstance(source, bytes) and not storage.is_remote(source):
            check_regular(source, self.name)
        try:
            content = source if isinstance(source, bytes) else storage.read_bytes(source)
        except OSError as error:
            reason = "no such file" if isinstance(error, FileNotFoundError) else error.strerror
            raise DecodeError(self.name, reason or str(error)) from error
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
