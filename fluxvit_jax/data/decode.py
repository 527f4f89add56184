"""Frames of a video file by their number: each wanted frame is decoded once, the rest skipped.

PyAV demuxes, decodes and converts colours. Which packets to decode is decided here, in `Video`.
"""

import contextlib
import io
import os
from collections.abc import Iterator, Sequence

import av
import cv2
import numpy as np

from fluxvit_jax.data.sampling import resized_size

# Only containers that hold video themselves. Playlists and the like, which a demuxer would follow
# to other files or to the network, and the text formats that FFmpeg draws as pictures, stay out.
CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,asf,flv,ogg,mpeg,mpegts"

# Where a packet is one frame and its time is the frame's. Elsewhere (AVI has no presentation
# times, a transport stream may cut a frame in two) only decoding tells how many frames there are.
TIMED_CONTAINERS = {"mov", "matroska"}
TIMED_CODECS = {"h264", "hevc", "vp9", "libvpx-vp9", "av1", "libdav1d"}

# Decoders that can be told, packet by packet, to skip frames on which no other builds. dav1d takes
# that only once; in HEVC "not a reference" holds only within one temporal layer.
SKIPPING_CODECS = {"h264", "mpeg4"}

# A frame larger than this is taken for damage: a flipped bit in the size must not eat the memory.
MAX_PIXELS = 8192 * 8192

# What PyAV, the file system and OpenCV raise on bad data.
_FAILURES = (av.FFmpegError, OSError, ValueError, OverflowError, MemoryError, cv2.error)


class DecodeError(Exception):
    """A video, or a wanted frame of it, cannot be read; `str` is one line.

    Attributes:
      path: what the video was called when it was opened.
      reason: what is wrong.
    """

    def __init__(self, path: str, reason: str):
        super().__init__(path, reason)  # both, so that it survives pickling
        self.path = path
        self.reason = " ".join(reason.split())

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class Video:
    """A video file, opened for reading frames by number in the order they are shown.

    `len(video)` is the number of frames that decoding the whole file gives. Use as a context
    manager, or call `close`.

    Args:
      source: path of a file, or its bytes. Never a URL: the file is opened here, not by FFmpeg.
      name: what errors call the video; the path by default.

    Raises:
      DecodeError: whatever is wrong with the file.
    """

    def __init__(self, source: str | os.PathLike | bytes, name: str | None = None):
        is_path = not isinstance(source, bytes)
        self.name = name or (os.fspath(source) if is_path else "video in memory")
        self._reformatter = av.video.reformatter.VideoReformatter()
        with contextlib.ExitStack() as resources, self._decode_errors():
            if is_path and not os.path.isfile(source):  # also: a pipe would block for ever
                raise DecodeError(self.name, "no such file")
            file = resources.enter_context(open(source, "rb") if is_path else io.BytesIO(source))
            options = {"format_whitelist": CONTAINERS, "protocol_whitelist": "none"}
            container = resources.enter_context(
                av.open(file, "r", options=options, metadata_errors="replace")
            )
            self._open_stream(container)
            self._index_packets(container)
            self._resources = resources.pop_all()

    def __enter__(self) -> "Video":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        self._resources.close()

    def __len__(self) -> int:
        return len(self._order)

    @property
    def frame_rate(self) -> float:
        """Mean frames per second; 0 where the file does not say."""
        return float(self._stream.average_rate or 0)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels, as shown, i.e. after the rotation that the file asks for."""
        if self._size is None:
            self.read([0])
        return self._size

    def read(
        self,
        indices: Sequence[int] | np.ndarray,
        short_side: int | None = None,
        interpolation: int = cv2.INTER_LINEAR,
    ) -> np.ndarray:
        """Frames `indices`, in any order and with repeats: uint8 [n, height, width, 3] RGB.

        Args:
          indices: numbers of frames, at least one, in presentation order from 0.
          short_side: larger frames are scaled down, to the size that `resized_size` gives.
          interpolation: OpenCV's. Linear is what the official evaluation does; `cv2.INTER_AREA`
            does not alias.

        Raises:
          DecodeError: a frame is missing or damaged.
          IndexError: an index is no frame of this video.
        """
        indices = [int(i) for i in indices]
        if not indices or min(indices) < 0 or max(indices) >= len(self):
            raise IndexError(f"{self.name}: frames {indices} of {len(self)}")
        packets = [self._order[i] for i in indices]
        with self._decode_errors():
            images = self._images(set(packets), short_side, interpolation)
        for index, packet in zip(indices, packets, strict=True):
            if packet not in images:
                raise DecodeError(self.name, f"frame {index} is missing or damaged")
        return np.stack([images[packet] for packet in packets])

    @contextlib.contextmanager
    def _decode_errors(self) -> Iterator[None]:
        try:
            yield
        except _FAILURES as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise DecodeError(self.name, reason) from error

    def _open_stream(self, container: av.container.InputContainer) -> None:
        stream = container.streams.best("video")
        if stream is None or stream.codec_context is None:
            raise DecodeError(self.name, "no video stream that can be decoded")
        self._stream, self._context = stream, stream.codec_context
        self._context.thread_type = "NONE"
        self._context.thread_count = 1  # dav1d starts threads whatever the type
        self._context.options = {"max_pixels": str(MAX_PIXELS)}
        self._coded_size = self._context.height, self._context.width
        self._size = None

    def _index_packets(self, container: av.container.InputContainer) -> None:
        """Lists the packets, the packet of each frame shown, and where decoding each must start."""
        # PyAV has FFmpeg invent missing presentation times; we must know that they are missing.
        container.flags &= ~av.container.core.Flags.gen_pts.value
        packets = [packet for packet in container.demux(self._stream) if packet.size]
        times = [packet.pts for packet in packets]
        for number, packet in enumerate(packets):
            packet.pts = number  # decoders hand it on, so a frame names the packet it came from
        self._packets = packets
        is_timed = (
            container.format.name.split(",")[0] in TIMED_CONTAINERS
            and self._context.name in TIMED_CODECS
            and None not in times
            and len(set(times)) == len(times)
        )
        if is_timed:
            shown = sorted(range(len(packets)), key=times.__getitem__)
        else:
            shown = [n for n, frame in self._decode(0, len(packets) - 1) if frame is not None]
            if None in shown or len(set(shown)) < len(shown):
                raise DecodeError(self.name, "the decoder does not tell its frames apart")
        self._start = self._start_packets(shown)
        if is_timed:  # the decoder drops what edit lists hide and what leads the first key frame
            shown = [n for n in shown if n in self._start and not packets[n].is_discard]
        if not shown:
            raise DecodeError(self.name, "no frames")
        self._order = shown

    def _start_packets(self, shown: list[int]) -> dict[int, int]:
        """For each packet that has one, the last key packet from which it can be decoded.

        A frame that is shown before a key frame but stored after it (open GOP) needs what came
        before the key frame.
        """
        place = {packet: i for i, packet in enumerate(shown)}
        starts, keys = {}, []
        for packet in sorted(shown):
            if self._packets[packet].is_keyframe:
                keys.append(packet)
            start = next((key for key in reversed(keys) if place[key] <= place[packet]), None)
            if start is not None:
                starts[packet] = start
        return starts

    def _images(
        self, wanted: set[int], short_side: int | None, interpolation: int
    ) -> dict[int, np.ndarray]:
        """The frames of packets `wanted`, less those that are missing or damaged."""
        images = {}
        for first, last in self._runs(wanted):
            images |= self._images_between(first, last, wanted, True, short_side, interpolation)
        if missing := wanted - images.keys():  # key frames that are none, for example
            last = len(self._packets) - 1
            images |= self._images_between(0, last, missing, False, short_side, interpolation)
        return images

    def _runs(self, wanted: set[int]) -> list[tuple[int, int]]:
        """(first, last) packets to decode: from a key packet to the last that is wanted of it."""
        runs = []
        for last in sorted(wanted):
            first = self._start.get(last, 0)
            while runs and first <= runs[-1][1]:
                first = min(first, runs.pop()[0])
            runs.append((first, last))
        return runs

    def _images_between(
        self,
        first: int,
        last: int,
        wanted: set[int],
        skip: bool,
        short_side: int | None,
        interpolation: int,
    ) -> dict[int, np.ndarray]:
        images, damaged = {}, []
        for packet, frame in self._decode(first, last, wanted if skip else None):
            if frame is None:
                damaged.append(packet)
            elif packet in wanted:
                images[packet] = self._image(frame, short_side, interpolation)
        # Damage spreads to all frames that build on it, though the decoder flags only the first.
        return {
            packet: image
            for packet, image in images.items()
            if not any(self._start.get(packet, 0) <= d <= packet for d in damaged)
        }

    def _decode(
        self, first: int, last: int, wanted: set[int] | None = None
    ) -> Iterator[tuple[int, av.VideoFrame | None]]:
        """Decodes packets first..last: yields (packet, frame), and (packet, None) for damage.

        Given `wanted`, packets are skipped that neither are wanted nor have others build on them.
        """
        can_skip = wanted is not None and self._context.name in SKIPPING_CODECS
        self._context.flush_buffers()
        for number in [*range(first, last + 1), None]:  # None drains the decoder
            packet = None if number is None else self._packets[number]
            self._context.skip_frame = "NONREF" if can_skip and number not in wanted else "DEFAULT"
            try:
                frames = self._context.decode(packet)
            except av.FFmpegError:
                yield last if number is None else number, None
                continue
            if packet is not None and packet.is_corrupt:
                yield number, None
            for frame in frames:
                false_key = frame.pts == first and self._packets[first].is_keyframe
                if frame.is_corrupt or (false_key and not frame.key_frame):
                    yield frame.pts, None
                yield frame.pts, frame

    def _image(
        self, frame: av.VideoFrame, short_side: int | None, interpolation: int
    ) -> np.ndarray:
        """The frame as shown: uint8 [height, width, 3] RGB."""
        image = self._reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()
        image = _turn(image, frame)
        if self._size is None:
            swapped = image.shape[0] != frame.height
            self._size = self._coded_size[::-1] if swapped else self._coded_size
        height, width = self._size
        if short_side is not None and short_side < min(height, width):
            height, width = resized_size(height, width, short_side)
        if image.shape[:2] != (height, width):  # a stream may also change its size midway
            image = cv2.resize(image, (width, height), interpolation=interpolation)
        return image


def _turn(image: np.ndarray, frame: av.VideoFrame) -> np.ndarray:
    """Turns and mirrors the image by quarter turns as the frame's display matrix says."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return image
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()  # x' = ax + cy, y' = bx + dy
    if abs(b) > abs(a):
        image, a, d = image.transpose(1, 0, 2), c, b
    return np.ascontiguousarray(image[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])
