"""Video frames by number: each requested frame is decoded once, other frames only where needed.

PyAV demuxes, decodes and converts colors. `Video` decides which packets to decode.
"""

import bisect
import contextlib
import functools
import io
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import BinaryIO

import av
import cv2
import numpy as np
from av.container.core import Flags
from av.sidedata.sidedata import SideDataContainer, Type
from av.stream import Disposition
from av.video.codeccontext import VideoCodecContext
from av.video.frame import PictureType
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from fluxvit_jax.data.frame_sampling import resized_size
from fluxvit_jax.data.packet_headers import Headers, read_headers
from fluxvit_jax.distributed import storage

# Only containers that hold video themselves. Excluded are playlists and the like, which a demuxer
# would follow to other files or to the network, and text formats that FFmpeg renders as pictures.
CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,asf,flv,ogg,mpeg,mpegts"

# Formats in which a packet can be one frame and carries its time. Elsewhere (AVI has no
# presentation times, a transport stream may cut a frame in two) only decoding reveals how many
# frames there are.
TIMED_CONTAINERS = {"mov", "matroska"}

# A larger frame counts as damage: a flipped bit in the size must not exhaust the memory.
MAX_PIXELS = 8192 * 8192

# Packets of a video: 9 hours at 30 frames a second. So many take 1 GB besides their content and 5 s
# to index, or 13 s where frames must be decoded to be counted (measured with 200,000 and 10^6).
MAX_PACKETS = 2**20

# Limit, as YUV, of the frames that are cached after they were decoded to count them.
MAX_CACHED_BYTES = 64 * 2**20
FRAME_BYTES = 4096  # of a frame besides its planes

IMAGE_SIGNATURES = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"GIF8": "GIF",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
}

UNKNOWN_PACKET = -1  # for a frame that does not name its packet
Decoded = tuple[int, av.VideoFrame | None]  # number of the packet; no frame means damage
Convert = Callable[[av.VideoFrame], np.ndarray]

# Errors of PyAV, the file system and OpenCV on bad data (LookupError: a stream that comes late).
_FAILURES = (
    av.FFmpegError, OSError, ValueError, LookupError, OverflowError, MemoryError, cv2.error,
)  # fmt: skip


class DecodeError(Exception):
    """Error for a video, or a requested frame of it, that cannot be read; `str` is one line.

    Attributes:
      path: the name of the video.
      reason: what is wrong.
    """

    def __init__(self, path: str, reason: str):
        super().__init__(path, reason)  # both, so that it survives pickling
        self.path = path
        self.reason = " ".join(reason.split())

    def __str__(self) -> str:
        return f"{storage.display_name(self.path)}: {self.reason}"


class Video:
    """A video file, opened for reading frames by number in presentation order.

    `len(video)` is the number of frames that decoding the whole file gives. Use as a context
    manager, or call `close`.

    Attributes:
      name: the video's name in errors.
      frame_rate: mean frames per second; 0 where the file does not say.

    Args:
      source: path of a local file or of one in a bucket, or its bytes. It is opened here, not by
        FFmpeg, which would follow any URL.
      name: the path by default.

    Raises:
      DecodeError: whatever is wrong with the file.
      UserError: the bucket cannot be read, which is no fault of the video.
    """

    _packets: list[av.Packet]  # of the video stream; their `pts` is their index here
    _order: list[int]  # packet of each frame, in presentation order
    _start: dict[int, int]  # packet -> key packet at which decoding it must start
    _unreferenced: set[int]  # packets that no other one needs

    def __init__(self, source: str | os.PathLike | bytes, name: str | None = None):
        self.name = name or ("video in memory" if isinstance(source, bytes) else os.fspath(source))
        self._reformatter = VideoReformatter()
        self._size: tuple[int, int] | None = None
        self._decoded: list[Decoded] | None = None
        with (
            self._decode_errors("cannot open"),
            self._open_file(source) as file,
            self._open_container(file) as container,
        ):
            self._open_stream(container)
            self._index_packets(container)

    def __enter__(self) -> "Video":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Frees the memory; the file itself is closed as soon as its packets are read."""
        self._packets, self._order, self._decoded = [], [], None
        self._context.flush_buffers()

    def __len__(self) -> int:
        return len(self._order)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels, as shown, i.e. after the rotation in the file's metadata."""
        if self._size is None:
            self.read([0])
        assert self._size is not None  # set by the first frame
        return self._size

    def read(
        self,
        indices: Sequence[int] | np.ndarray,
        short_side: int | None = None,
        interpolation: int = cv2.INTER_LINEAR,
    ) -> np.ndarray:
        """Frames `indices`, in any order and with repeats: uint8 [n, height, width, 3] RGB.

        Args:
          indices: frame numbers, at least one, in presentation order from 0.
          short_side: larger frames are scaled down to the size that `resized_size` gives.
          interpolation: OpenCV's. Linear is what the official evaluation does; `cv2.INTER_AREA`
            does not alias.

        Raises:
          DecodeError: a frame is missing or damaged.
          IndexError: an index is no frame of this video.
        """
        indices = [int(i) for i in indices]
        if invalid := [i for i in indices if not 0 <= i < len(self)]:
            raise IndexError(f"{self.name}: no frame {invalid[0]}, there are {len(self)}")
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
        check_regular(source, self.name)
        return open(source, "rb")

    def _open_container(self, file: BinaryIO) -> av.container.InputContainer:
        if not file.read(1):
            raise DecodeError(self.name, "is empty")
        file.seek(0)
        options = {"format_whitelist": CONTAINERS, "protocol_whitelist": "none"}
        try:
            return av.open(file, "r", options=options, metadata_errors="replace")
        except av.FFmpegError as error:
            file.seek(0)
            kind = image_format(file.read(16))
            if kind is None and not isinstance(error, av.ArgumentError):
                raise
            if kind is None:  # the file is sound, but not in the whitelist
                reason = f"is in none of the formats that are read: {CONTAINERS}"
            elif kind == "GIF":
                reason = "is a GIF; convert it to a video first: ffmpeg -i a.gif a.mp4"
            else:
                reason = f"is an image ({kind}), not a video"
            raise DecodeError(self.name, reason) from error

    def _open_stream(self, container: av.container.InputContainer) -> None:
        stream = container.streams.best("video")
        is_cover = stream is not None and stream.disposition & Disposition.attached_pic
        if not isinstance(stream, VideoStream) or stream.codec_context is None or is_cover:
            raise DecodeError(self.name, "no video that can be decoded")
        self.frame_rate = float(stream.average_rate or 0)
        self._stream = stream.index
        self._context: VideoCodecContext = stream.codec_context
        self._coded_size = self._context.height, self._context.width
        self._context.thread_type = "NONE"
        self._context.thread_count = 1  # dav1d starts threads whatever the type
        self._context.options = {"max_pixels": str(MAX_PIXELS)}
        if self._context.name == "hevc":  # by default it does not report damage
            self._context.options |= {"err_detect": "explode"}

    def _index_packets(self, container: av.container.InputContainer) -> None:
        """Sets the packets, their presentation order, and where decoding each must start."""
        kind = container.format.name.split(",")[0]
        self._packets = self._demux(container, is_indexed=kind == "mov")
        times = [packet.pts for packet in self._packets]
        for number, packet in enumerate(self._packets):
            packet.pts = number  # decoders pass it on, so a frame names the packet it came from
        distinct = {time for time in times if time is not None}
        headers = Headers(are_single_frames=False, unreferenced=set())
        if kind in TIMED_CONTAINERS and len(distinct) == len(times):
            headers = read_headers(self._packets, self._context.name, self._context.extradata)
        self._is_timed, self._unreferenced = headers
        marked = {number for number, packet in enumerate(self._packets) if packet.is_keyframe}
        if self._is_timed:
            shown = sorted(range(len(times)), key=lambda number: times[number] or 0)
            self._start = self._start_packets(shown, marked)
            self._start |= self._leading(set(shown) - self._start.keys())
            # Some frames before the first key frame cannot be decoded; edit lists hide others.
            self._order = [n for n in shown if n in self._start and not self._packets[n].is_discard]
            self._packets = [_unhidden(packet) for packet in self._packets]
        else:
            self._order, keys = self._count()
            # A container that marks every packet may not know better; then ask the decoder.
            all_marked = len(marked) == len(self._packets)
            self._start = self._start_packets(self._order, keys if all_marked else marked)
        if not self._order:
            raise DecodeError(self.name, "no frames")

    def _demux(self, container: av.container.InputContainer, is_indexed: bool) -> list[av.Packet]:
        """The packets of the video stream.

        is_indexed: whether the container has an index of every packet, as an mp4 does.
        """
        # PyAV has FFmpeg invent missing presentation times; we must know that they are missing.
        container.flags &= ~Flags.gen_pts.value  # type: ignore[operator]  # an int, not a Flags
        # Empty packets: those without a time are added by PyAV, one at the end of each stream;
        # those with a time come from the file and stand for dropped frames.
        ours: list[av.Packet] = []
        last = None
        for packet in container.demux():
            if not packet.size and packet.dts is None:
                continue
            last = packet
            if packet.stream_index == self._stream:
                ours.append(packet)
                if len(ours) > MAX_PACKETS:
                    raise DecodeError(self.name, f"more than {MAX_PACKETS} frames; cut it in parts")
        # A file may end inside a packet, of video or sound, or between two.
        stream = container.streams[self._stream]
        indexed = len(stream.index_entries) if is_indexed else 0
        if len(ours) < indexed or (last is not None and last.is_corrupt):
            raise DecodeError(self.name, "truncated")
        return [packet for packet in ours if packet.size]

    def _count(self) -> tuple[list[int], set[int]]:
        """Decodes the whole file.

        Returns the packets of the frames in the order in which the decoder puts them out, and those
        that the decoder calls key frames.
        """
        shown: list[int] = []
        keys: set[int] = set()
        cached: list[Decoded] = []
        size = 0
        for packet, frame in self._decode(0, len(self._packets) - 1):
            if frame is not None:
                shown.append(packet)
                if frame.key_frame:
                    keys.add(packet)
                size += FRAME_BYTES + sum(plane.buffer_size for plane in frame.planes)
            if size <= MAX_CACHED_BYTES:
                cached.append((packet, frame))
        if UNKNOWN_PACKET in shown or len(set(shown)) < len(shown):
            raise DecodeError(self.name, "the decoder does not tell its frames apart")
        self._decoded = cached if size <= MAX_CACHED_BYTES else None
        return shown, keys

    @staticmethod
    def _start_packets(shown: list[int], key_packets: set[int]) -> dict[int, int]:
        """The last key packet from which each packet can be decoded, where there is one.

        A frame that is shown before a key frame but stored after it (open GOP) also references
        frames before the key frame.
        """
        rank = {packet: i for i, packet in enumerate(shown)}
        starts: dict[int, int] = {}
        # Key packets so far and their ranks, ascending in both: one that is shown after a later one
        # never is the last.
        keys: list[int] = []
        ranks: list[int] = []
        for packet in sorted(shown):
            if packet in key_packets:
                while ranks and ranks[-1] > rank[packet]:
                    keys.pop()
                    ranks.pop()
                keys.append(packet)
                ranks.append(rank[packet])
            if place := bisect.bisect_right(ranks, rank[packet]):
                starts[packet] = keys[place - 1]
        return starts

    def _leading(self, packets: set[int]) -> dict[int, int]:
        """Start packets of those `packets` before any marked key frame that can be decoded.

        The decoder drops frames that reference others from before the file; but a key frame may
        lack its mark.
        """
        if not packets:
            return {}
        decoded = self._decode(0, max(packets))
        return {n: 0 for n, frame in decoded if frame is not None and n in packets}

    def _images(self, requested: set[int], convert: Convert) -> dict[int, np.ndarray]:
        """The images of packets `requested`, without those that are missing or damaged."""
        if not self._is_timed:  # packets may be lost unnoticed, so decode as a player does
            decoded = self._decoded or self._decode(0, max(requested))
            return self._convert(decoded, requested, convert)
        images: dict[int, np.ndarray] = {}
        for first, last in self._runs(requested):
            images |= self._convert(self._decode(first, last, requested), requested, convert)
        if missing := requested - images.keys():  # e.g. packets wrongly marked as key frames
            images |= self._convert(self._decode(0, max(missing)), missing, convert)
        return images

    def _runs(self, requested: set[int]) -> list[tuple[int, int]]:
        """Disjoint ranges (first, last) of packets to decode, each from a key packet on."""
        runs: list[tuple[int, int]] = []
        for last in sorted(requested):
            first = self._start.get(last, 0)
            while runs and first <= runs[-1][1]:
                first = min(first, runs.pop()[0])
            runs.append((first, last))
        return runs

    def _convert(
        self, decoded: Iterable[Decoded], requested: set[int], convert: Convert
    ) -> dict[int, np.ndarray]:
        """The images of those packets `requested` that were decoded undamaged."""
        images, damaged = {}, []
        for packet, frame in decoded:
            if frame is None:
                damaged.append(packet)
            elif packet in requested:
                images[packet] = convert(frame)
        # Damage spreads to all frames that reference it, though the decoder flags only the first.
        damaged.sort()

        def is_sound(packet: int) -> bool:
            first = bisect.bisect_left(damaged, self._start.get(packet, 0))
            return first == len(damaged) or damaged[first] > packet

        return {packet: image for packet, image in images.items() if is_sound(packet)}

    def _decode(
        self, first: int, last: int, requested: set[int] | None = None
    ) -> Iterator[Decoded]:
        """Decodes packets first..last: yields (packet, frame), and (packet, None) for damage.

        Given `requested`, packets outside it are left out unless others reference them.
        """
        left_out = set() if requested is None else self._unreferenced - requested
        self._context.flush_buffers()
        for number in [*range(first, last + 1), None]:  # None drains the decoder
            if number in left_out:
                continue
            packet = None if number is None else self._packets[number]
            current = last if number is None else number
            try:
                frames = self._context.decode(packet)
            except av.FFmpegError:
                yield current, None
                continue
            if packet is not None and packet.is_corrupt:
                yield current, None
            for frame in frames:
                origin = UNKNOWN_PACKET if frame.pts is None else frame.pts
                starts_run = origin == first and self._packets[first].is_keyframe
                if frame.is_corrupt or (starts_run and self._is_false_key(frame)):
                    yield origin, None
                yield origin, frame

    def _is_false_key(self, frame: av.VideoFrame) -> bool:
        """Whether a frame references others, though its packet is marked as a key frame."""
        # Many decoders never set the key-frame flag; then the picture type decides.
        flags_keys = self._is_timed or frame.pict_type in (PictureType.P, PictureType.B)
        return flags_keys and not frame.key_frame

    def _image(
        self, frame: av.VideoFrame, short_side: int | None, interpolation: int
    ) -> np.ndarray:
        """The frame as shown: uint8 [height, width, 3] RGB."""
        rgb = self._reformatter.reformat(frame, format="rgb24", threads=1)
        image: np.ndarray = rgb.to_ndarray()
        mirrored, quarters = _orientation(frame)
        if mirrored:
            image = np.fliplr(image)
        image = np.ascontiguousarray(np.rot90(image, quarters))
        if self._size is None:
            coded_height, coded_width = self._coded_size
            self._size = (
                (coded_width, coded_height) if quarters % 2 else (coded_height, coded_width)
            )
        height, width = self._size
        if short_side is not None and short_side < min(height, width):
            height, width = resized_size(height, width, short_side)
        if image.shape[:2] != (height, width):  # a stream may also change its size midway
            image = cv2.resize(image, (width, height), interpolation=interpolation)
        return image


def check_regular(path: str | os.PathLike, name: str) -> None:
    """Raises DecodeError unless a path of this machine is a file: opening a pipe would block."""
    if not os.path.isfile(path):
        is_there = os.path.exists(path)
        raise DecodeError(name, "is no regular file" if is_there else "no such file")


def image_format(beginning: bytes) -> str | None:
    """The image format of a file by its first 16 bytes; None if it is no image."""
    if beginning[:4] == b"RIFF" and beginning[8:12] == b"WEBP":  # with a length between the two
        return "WebP"
    signatures = IMAGE_SIGNATURES.items()
    return next((name for begin, name in signatures if beginning.startswith(begin)), None)


class _SideData(SideDataContainer):
    """A frame's side data, up to the first of a type that PyAV does not know.

    Not `frame.side_data`, which the frame caches: a reference cycle that outlives the frame.
    """

    def __init__(self, frame: av.VideoFrame):
        with contextlib.suppress(ValueError):
            super().__init__(frame)  # type: ignore[call-arg]  # missing in PyAV's stubs

    def display_matrix(self) -> np.ndarray | None:
        """The first display matrix: int32 [9]."""
        with contextlib.suppress(ValueError):
            for data in self:
                if data.type == Type.DISPLAYMATRIX:
                    return np.frombuffer(bytes(data), np.int32)
        return None


def _orientation(frame: av.VideoFrame) -> tuple[bool, int]:
    """(mirrored, quarters): how to show a frame upright.

    Mirror it left to right or not, then turn it counterclockwise by quarters; other angles are
    rounded. The display matrix maps the point (x, y) of the picture, y downward, to
    (a x + c y, b x + d y).
    """
    matrix = _SideData(frame).display_matrix()
    if matrix is None:
        return False, round(frame.rotation / 90)
    a, b, _, c, d, *_ = matrix.tolist()
    mirrored = a * d < b * c
    if mirrored:
        a, b = -a, -b
    return mirrored, -round(math.atan2(b, a) / (math.pi / 2))


def _unhidden(packet: av.Packet) -> av.Packet:
    """The packet without its discard flag, so that the decoder returns its frame, or its damage."""
    if not packet.is_discard:
        return packet
    copy = av.Packet(bytes(packet))
    copy.pts, copy.is_keyframe = packet.pts, packet.is_keyframe
    return copy
