"""Small real video files for tests, of the kinds that readers of video get wrong."""

import struct
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

OPEN_GOP = {"g": "12", "x264-params": "open-gop=1:bframes=3:b-pyramid=normal:scenecut=0"}


def moving_texture(count: int, height: int = 64, width: int = 128, seed: int = 0) -> np.ndarray:
    """Frames uint8 [count, height, width, 3], no two alike: a window that slides over blocks.

    The default size is one for which x264 writes the same bytes every time: at widths that are no
    multiple of 64 they depend on memory that nothing has written to.
    """
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, ((height + count) // 8 + 1, (width + 2 * count) // 8 + 1, 3))
    picture = blocks.astype(np.uint8).repeat(8, 0).repeat(8, 1)
    return np.stack([picture[i : i + height, 2 * i : 2 * i + width] for i in range(count)])


def write_video(
    path: Path,
    frames: np.ndarray,
    codec: str = "libx264",
    *,
    rate: int = 25,
    pixels: str = "yuv420p",
    options: dict[str, str] | None = None,
    times: Sequence[int] | None = None,
    muxing: dict[str, str] | None = None,
    audio: bool = False,
) -> Path:
    """Encodes frames uint8 [T, H, W, 3]; `times`, if given, are theirs in milliseconds."""
    with av.open(str(path), "w", options=muxing or {}) as container:
        stream = container.add_stream(codec, rate=rate, options=options or {"g": "12"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pixels
        stream.codec_context.thread_count = 1  # the bytes depend on how many there are
        if times is not None:
            stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        sound = container.add_stream("aac", rate=8000, layout="mono") if audio else None
        for i, picture in enumerate(frames):
            if pixels == "pal8":  # FFmpeg converts nothing to it; this shows the first channel
                shades = np.arange(256, dtype=np.uint8)[:, None].repeat(4, 1)
                indices = np.ascontiguousarray(picture[..., 0])
                frame = av.VideoFrame.from_ndarray((indices, shades), format="pal8")
            else:
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[i], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if sound:
            samples = np.sin(np.arange(8000 * len(frames) // rate) / 9).astype(np.float32)[None]
            noise = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
            noise.sample_rate = 8000
            container.mux([*sound.encode(noise), *sound.encode(None)])
    return path


def write_sound(path: Path) -> Path:
    """A file that holds sound only."""
    with av.open(str(path), "w") as container:
        sound = container.add_stream("aac", rate=8000, layout="mono")
        noise = av.AudioFrame.from_ndarray(
            np.sin(np.arange(8000) / 9).astype(np.float32)[None], format="fltp", layout="mono"
        )
        noise.sample_rate = 8000
        container.mux([*sound.encode(noise), *sound.encode(None)])
    return path


def remux(
    source: Path,
    target: Path,
    change: Callable[[list[av.Packet]], list[av.Packet]],
    muxing: dict[str, str] | None = None,
) -> Path:
    """Copies the video packets of `source`, as `change` returns them, without encoding again."""
    with av.open(str(source)) as reader, av.open(str(target), "w", options=muxing or {}) as writer:
        stream = writer.add_stream_from_template(reader.streams.video[0])
        packets = [packet for packet in reader.demux(video=0) if packet.size]
        for packet in change(packets):
            packet.stream = stream
            writer.mux(packet)
    return target


def hide_start(source: Path, target: Path, count: int) -> Path:
    """Copies an mp4 and hides its first `count` frames by an edit list, as cutting tools do."""

    def shift(packets: list[av.Packet]) -> list[av.Packet]:
        times = sorted(packet.pts for packet in packets)
        for packet in packets:
            packet.pts, packet.dts = packet.pts - times[count], packet.dts - times[count]
        return packets

    return remux(source, target, shift, {"avoid_negative_ts": "disabled"})


# A picture of MPEG-4 part 2, at 25 frames a second, for which a decoder puts out nothing.
NOT_CODED = b"\x00\x00\x01\xb6\x50\x40\x7f"


def leave_uncoded(source: Path, target: Path, number: int) -> Path:
    """Copies a video of MPEG-4 part 2 with one of its packets replaced by a picture not coded."""

    def change(packets: list[av.Packet]) -> list[av.Packet]:
        old, new = packets[number], av.Packet(NOT_CODED)
        new.pts, new.dts, new.time_base = old.pts, old.dts, old.time_base
        return [*packets[:number], new, *packets[number + 1 :]]

    return remux(source, target, change)


def pack_b_frames(source: Path, target: Path) -> Path:
    """Copies an MPEG-4 AVI and puts every B-frame into the packet before it, as DivX once did.

    An empty frame ("not coded") takes its place. `source` must have single B-frames.
    """
    start = NOT_CODED[:4]  # of a picture; the two bits that follow are its type

    def pack(packets: list[av.Packet]) -> list[av.Packet]:
        packed = []
        for packet in packets:
            data = bytes(packet)
            place = data.index(start)
            if data[place + 4] >> 6 == 2:  # a B-frame
                packed[-1] = (packed[-1][0] + data, packed[-1][1])
                packed.append((NOT_CODED, False))
            else:
                mark = b"\x00\x00\x01\xb2DivX503b1393p" if packet.is_keyframe else b""
                packed.append((data[:place] + mark + data[place:], packet.is_keyframe))
        return [_packet(data, i, is_key) for i, (data, is_key) in enumerate(packed)]

    def _packet(data: bytes, number: int, is_key: bool) -> av.Packet:
        packet = av.Packet(data)
        packet.pts = packet.dts = number
        packet.time_base, packet.is_keyframe = packets_time_base, is_key
        return packet

    with av.open(str(source)) as reader:
        packets_time_base = reader.streams.video[0].time_base
    return remux(source, target, pack)


def hide_end(source: Path, target: Path, milliseconds: int) -> Path:
    """Copies an mp4 and has its edit list end after that time."""
    data = bytearray(source.read_bytes())
    # After the type: version and flags 4, number of edits 4, then the duration of the first.
    struct.pack_into(">I", data, data.index(b"elst") + 12, milliseconds)
    target.write_bytes(data)
    return target


def set_display_matrix(path: Path, matrix: Sequence[int]) -> Path:
    """Writes (a, b, c, d), each -1, 0 or 1, into every track header of an mp4."""
    a, b, c, d = (value << 16 for value in matrix)
    data = bytearray(path.read_bytes())
    position = data.find(b"tkhd")
    while position >= 0:
        # After the type: version and flags 4, times and numbers 20, reserved 8, layer to volume 8.
        struct.pack_into(">9i", data, position + 44, a, b, 0, c, d, 0, 0, 0, 1 << 30)
        position = data.find(b"tkhd", position + 1)
    path.write_bytes(data)
    return path


def full_decode(path: Path) -> np.ndarray:
    """Every frame, turned as the file asks: uint8 [T, height, width, 3]. The plain way."""
    with av.open(str(path), metadata_errors="replace") as container:
        return np.stack(
            [
                np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)
                for frame in container.decode(video=0)
            ]
        )
