"""What packets tell without being decoded, by codec; nothing where their headers are damaged."""

from pathlib import Path

import av
import numpy as np
import pytest

from fluxvit_jax.data.packet_headers import read_headers
from tests.data import videos

FRAMES = videos.moving_texture(60)
HEVC = "log-level=none:keyint=60:bframes=3:b-adapt=0:no-scenecut=1"
# of each: the codec, its options, and how many of 60 packets may be left out
KINDS = {
    "h264.mp4": ("libx264", {"bf": "3", "b_strategy": "0", "g": "60"}, range(25, 31)),
    "h264_no_b.mp4": ("libx264", {"bf": "0", "g": "60"}, range(1)),
    "hevc.mp4": ("libx265", {"x265-params": HEVC}, range(25, 31)),
    "hevc_layers.mkv": ("libx265", {"x265-params": f"{HEVC}:temporal-layers=3"}, range(25, 31)),
    "hevc_no_b.mp4": ("libx265", {"x265-params": HEVC.replace("=3", "=0")}, range(1)),
    "av1.mp4": ("libsvtav1", {"g": "60", "preset": "8"}, range(10, 31)),
    "mpeg4.mp4": ("mpeg4", {"bf": "2", "b_strategy": "0", "g": "60"}, range(35, 41)),
    "vp9.webm": ("libvpx-vp9", {"g": "60", "cpu-used": "8"}, range(1)),
}
Demuxed = tuple[list[av.Packet], str, bytes | None]


@pytest.fixture(scope="module")
def demux(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")

    def demux(name: str) -> Demuxed:
        codec, options, _ = KINDS[name]
        if codec not in av.codecs_available:
            pytest.skip(f"this build of FFmpeg has no encoder {codec}")
        path: Path = folder / name
        if not path.exists():
            videos.write_video(path, FRAMES, codec, options=options)
        with av.open(str(path)) as container:
            packets = [packet for packet in container.demux(video=0) if packet.size]
            context = container.streams.video[0].codec_context
            return packets, context.name, context.extradata

    return demux


@pytest.mark.parametrize("name", KINDS)
def test_without_them_all_others_are_decoded_to_the_same_pictures(demux, name):
    packets, codec, extradata = demux(name)
    left_out = read_headers(packets, codec, extradata).unreferenced
    assert len(left_out) in KINDS[name][2]

    def decode(kept: list[av.Packet]) -> dict[int, np.ndarray]:
        context = av.CodecContext.create(codec, "r")
        context.extradata = extradata
        frames = [frame for packet in [*kept, None] for frame in context.decode(packet)]
        return {frame.pts: frame.to_ndarray() for frame in frames}

    everything = decode(packets)
    rest = decode([packet for i, packet in enumerate(packets) if i not in left_out])
    assert len(everything) == 60 and len(rest) == 60 - len(left_out)
    for time, picture in rest.items():
        np.testing.assert_array_equal(picture, everything[time])


@pytest.mark.parametrize("name", ["h264.mp4", "hevc.mp4", "av1.mp4"])
def test_none_where_headers_cannot_be_read(demux, name):
    packets, codec, extradata = demux(name)
    assert read_headers(packets, codec, extradata).unreferenced
    for damaged in (None, b"", b"\0\0\0\1" + extradata, extradata[:4]):  # the third: a raw stream's
        assert read_headers(packets, codec, damaged).unreferenced == set()
    for end in range(1, 6):
        cut = av.Packet(bytes(packets[7])[:end])
        assert read_headers([*packets[:7], cut], codec, extradata).unreferenced == set()


@pytest.mark.parametrize(("name", "kind"), [("h264.mp4", 7 | 3 << 5), ("hevc.mp4", 33 << 1)])
def test_packets_that_also_bring_parameters_are_needed(demux, name, kind):
    packets, codec, extradata = demux(name)
    number = min(read_headers(packets, codec, extradata).unreferenced)
    parameters = b"\0\0\0\2" + bytes([kind, 1])
    packets = [*packets]
    packets[number] = av.Packet(parameters + bytes(packets[number]))
    left_out = read_headers(packets, codec, extradata).unreferenced
    assert left_out and number not in left_out


def test_packets_of_mpeg4_that_are_not_one_frame_each(demux):
    packets, codec, extradata = demux("mpeg4.mp4")
    assert read_headers(packets, codec, extradata).are_single_frames
    uncoded, two = av.Packet(videos.NOT_CODED), av.Packet(bytes(packets[3]) + bytes(packets[4]))
    for other in (uncoded, two, av.Packet(b"\0\0\1\xb3"), av.Packet(videos.NOT_CODED[:5])):
        assert not read_headers([*packets, other], codec, extradata).are_single_frames
    for damaged in (None, b"", extradata[:20], extradata + extradata):
        assert not read_headers(packets, codec, damaged).are_single_frames
    assert not read_headers(packets, "mjpeg", extradata).are_single_frames


def test_damaged_headers_end_in_nothing_worse_than_a_wrong_set(demux):
    """The set only says what may be left out: a damaged file has no right pictures to lose."""
    rng = np.random.default_rng(0)
    for name in ("h264.mp4", "hevc.mp4", "av1.mp4", "mpeg4.mp4"):
        packets, codec, extradata = demux(name)
        for _ in range(200):
            damaged = [bytearray(bytes(packet)) for packet in packets]
            for content in damaged:
                content[rng.integers(0, min(16, len(content)))] ^= 1 << rng.integers(0, 8)
            header = bytearray(extradata)
            header[rng.integers(0, len(header))] ^= 1 << rng.integers(0, 8)
            flipped = [av.Packet(bytes(content)) for content in damaged]
            assert read_headers(flipped, codec, bytes(header)).unreferenced <= set(range(60))
