"""Frames of a video file by their number: each wanted frame is decoded once, the rest skipped.

PyAV demuxes, decodes and converts colours. Which packets to decode is decided here, in `Video`.
"""

import contextlib
import functools
import io
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import BinaryIO

import av
import cv2
import numpy as np
from av.container.core import Flags
from av.stream import Disposition
from av.video.reformatter import VideoReformatter

from fluxvit_jax import storage
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
SKIPPING_CODECS = {"h264"}

# A frame larger than this is taken for damage: a flipped bit in the size must not eat the memory.
MAX_PIXELS = 8192 * 8192

# Frames that were decoded only to be counted are kept up to this size, as YUV.
MAX_KEPT_BYTES = 64 * 2**20

Decoded = tuple[int, av.VideoFrame | None]  # number of the packet; no frame means damage
Convert = Callable[[av.VideoFrame], np.ndarray]

# What PyAV, the file system and OpenCV raise on bad data (LookupError: a stream that comes late).
_FAILURES = (
    *(av.FFmpegError, OSError, ValueError, LookupError, OverflowError, MemoryError),
    cv2.error,
)


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

    Attributes:
      name: what errors call the video.
      frame_rate: mean frames per second; 0 where the file does not say.

    Args:
      source: path of a file, on this machine or in a bucket, or its bytes. It is opened here, not
        by FFmpeg, which would follow any URL.
      name: the path by default.

    Raises:
      DecodeError: whatever is wrong with the file.
      UserError: the bucket cannot be read, which is no fault of the video.
    """

    def __init__(self, source: str | os.PathLike | bytes, name: str | None = None):
        self.name = name or ("video in memory" if isinstance(source, bytes) else os.fspath(source))
        self._reformatter = VideoReformatter()
        self._size = None
        options = {"format_whitelist": CONTAINERS, "protocol_whitelist": "none"}
        with (
            self._decode_errors("cannot open"),
            self._open_file(source) as file,
            av.open(file, "r", options=options, metadata_errors="replace") as container,
        ):
            self._open_stream(container)
            self._index_packets(container)

    def __enter__(self) -> "Video":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Frees the memory; the file itself is closed as soon as its packets are read."""
        self._packets, self._order, self._decoded = [], [], None
        self._context.flush_buffers()

    def __len__(self) -> int:
        return len(self._order)

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
        if strangers := [i for i in indices if not 0 <= i < len(self)]:
            raise IndexError(f"{self.name}: no frame {strangers[0]}, there are {len(self)}")
        packets = [self._order[i] for i in indices]
        with self._decode_errors("cannot decode"):
            convert = functools.partial(
                self._image, short_side=short_side, interpolation=interpolation
            )
            images = self._images(set(packets), convert)
        for index, packet in zip(indices, packets, strict=True):
            if packet not in images:
                raise DecodeError(self.name, f"frame {index} is missing or damaged")
        return np.stack([images[packet] for packet in packets])

    @contextlib.contextmanager
    def _decode_errors(self, doing: str) -> Iterator[None]:
        try:
            yield
        except _FAILURES as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise DecodeError(self.name, f"{doing}: {reason}") from error

    def _open_file(self, source: str | os.PathLike | bytes) -> BinaryIO:
        if isinstance(source, bytes):
            return io.BytesIO(source)
        if storage.is_remote(source):
            try:
                return io.BytesIO(storage.read_bytes(source))
            except FileNotFoundError:
                raise DecodeError(self.name, "no such file") from None
        if not os.path.isfile(source):  # opening a pipe, say, would wait for ever
            raise DecodeError(self.name, "no such file")
        return open(source, "rb")

    def _open_stream(self, container: av.container.InputContainer) -> None:
        stream = container.streams.best("video")
        is_cover = stream is not None and stream.disposition & Disposition.attached_pic
        if stream is None or stream.codec_context is None or is_cover:
            raise DecodeError(self.name, "no video that can be decoded")
        self.frame_rate = float(stream.average_rate or 0)
        self._stream, self._context = stream.index, stream.codec_context
        self._coded_size = self._context.height, self._context.width
        self._context.thread_type = "NONE"
        self._context.thread_count = 1  # dav1d starts threads whatever the type
        self._context.options = {"max_pixels": str(MAX_PIXELS)}
        if self._context.name == "hevc":  # by itself it does not tell of damage
            self._context.options |= {"err_detect": "explode"}

    def _index_packets(self, container: av.container.InputContainer) -> None:
        """Lists the packets, the packet of each frame shown, and where decoding each must start."""
        # PyAV has FFmpeg invent missing presentation times; we must know that they are missing.
        container.flags &= ~Flags.gen_pts.value
        # Empty packets: those without a time are PyAV's own, one at the end of each stream; those
        # with one come from the file and stand for frames that were dropped.
        packets = [packet for packet in container.demux() if packet.size or packet.dts is not None]
        ours = [packet for packet in packets if packet.stream_index == self._stream]
        kind = container.format.name.split(",")[0]
        # A file may end inside a packet, also of its sound, or between two; the index of an mp4
        # names every packet.
        named = len(container.streams[self._stream].index_entries) if kind == "mov" else 0
        if len(ours) < named or (packets and packets[-1].is_corrupt):
            raise DecodeError(self.name, "truncated")
        self._packets = [packet for packet in ours if packet.size]
        times = [packet.pts for packet in self._packets]
        for number, packet in enumerate(self._packets):
            packet.pts = number  # decoders hand it on, so a frame names the packet it came from
        self._is_timed = (
            kind in TIMED_CONTAINERS
            and self._context.name in TIMED_CODECS
            and None not in times
            and len(set(times)) == len(times)
        )
        self._decoded = None
        if self._is_timed:
            shown = sorted(range(len(times)), key=times.__getitem__)
            self._start = self._start_packets(shown)
            # The decoder drops what leads the first key frame, and what edit lists hide.
            self._order = [n for n in shown if n in self._start and not self._packets[n].is_discard]
            self._packets = [_unhidden(packet) for packet in self._packets]
        else:
            self._order = self._count()
            self._start = self._start_packets(self._order)
        if not self._order:
            raise DecodeError(self.name, "no frames")

    def _count(self) -> list[int]:
        """Decodes everything: the packets of the frames in the order in which they come out."""
        shown, kept, size = [], [], 0
        for packet, frame in self._decode(0, len(self._packets) - 1):
            if frame is not None:
                shown.append(packet)
                size += sum(plane.buffer_size for plane in frame.planes)
            if size <= MAX_KEPT_BYTES:
                kept.append((packet, frame))
        if None in shown or len(set(shown)) < len(shown):
            raise DecodeError(self.name, "the decoder does not tell its frames apart")
        self._decoded = kept if size <= MAX_KEPT_BYTES else None
        return shown

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

    def _images(self, wanted: set[int], convert: Convert) -> dict[int, np.ndarray]:
        """The images of packets `wanted`, less those that are missing or damaged."""
        if not self._is_timed:  # packets may be lost unnoticed, so decode as a player does
            decoded = self._decoded or self._decode(0, max(wanted))
            return self._convert(decoded, wanted, convert)
        images = {}
        for first, last in self._runs(wanted):
            images |= self._convert(self._decode(first, last, wanted), wanted, convert)
        if missing := wanted - images.keys():  # key frames are marked that are none, for example
            images |= self._convert(self._decode(0, max(missing)), missing, convert)
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

    def _convert(
        self, decoded: Iterable[Decoded], wanted: set[int], convert: Convert
    ) -> dict[int, np.ndarray]:
        """The images of those packets `wanted` that were decoded undamaged."""
        images, damaged = {}, []
        for packet, frame in decoded:
            if frame is None:
                damaged.append(packet)
            elif packet in wanted:
                images[packet] = convert(frame)
        # Damage spreads to all frames that build on it, though the decoder flags only the first.
        return {
            packet: image
            for packet, image in images.items()
            if not any(self._start.get(packet, 0) <= d <= packet for d in damaged)
        }

    def _decode(self, first: int, last: int, wanted: set[int] | None = None) -> Iterator[Decoded]:
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
        rgb = self._reformatter.reformat(frame, format="rgb24", threads=1)
        # The nearest quarter turn. Not `frame.side_data`, which keeps the frame alive in a cycle.
        quarters = round(frame.rotation / 90)
        image = np.ascontiguousarray(np.rot90(rgb.to_ndarray(), quarters))
        if self._size is None:
            self._size = self._coded_size[::-1] if quarters % 2 else self._coded_size
        height, width = self._size
        if short_side is not None and short_side < min(height, width):
            height, width = resized_size(height, width, short_side)
        if image.shape[:2] != (height, width):  # a stream may also change its size midway
            image = cv2.resize(image, (width, height), interpolation=interpolation)
        return image


def _unhidden(packet: av.Packet) -> av.Packet:
    """The packet such that its frame comes out of the decoder, where damage to it is seen."""
    if not packet.is_discard:
        return packet
    copy = av.Packet(bytes(packet))
    copy.pts, copy.is_keyframe = packet.pts, packet.is_keyframe
    return copy
