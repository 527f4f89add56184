import contextlib
import gc
import itertools
import pickle
from collections.abc import Callable
from pathlib import Path

import av
import cv2
import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
from av.bitstream import BitStreamFilterContext

from fluxvit_jax.data import decoding
from fluxvit_jax.data.clips import read_clip
from fluxvit_jax.data.decoding import DecodeError, Video
from fluxvit_jax.data.frame_sampling import resized_size
from tests.data import videos

FRAMES = videos.moving_texture(60)
IRREGULAR = np.random.default_rng(1).integers(5, 120, len(FRAMES)).cumsum().tolist()
QUIET_HEVC = "log-level=none:keyint=12:min-keyint=12:bframes=3:no-scenecut=1"

# name of the file: how it is encoded. Those below `h264.mp4` are what readers get wrong.
ENCODED = {
    "h264.mp4": {"options": {"g": "12", "bf": "3"}},
    "audio.mp4": {"audio": True},
    "fragmented.mp4": {"muxing": {"movflags": "frag_keyframe+empty_moov"}},
    "irregular.mp4": {"times": IRREGULAR},
    "irregular.mkv": {"times": IRREGULAR},
    "open_gop.mp4": {"options": videos.OPEN_GOP},
    "open_gop.mkv": {"options": videos.OPEN_GOP},
    "open_gop.avi": {"options": videos.OPEN_GOP},
    "open_gop.ts": {"options": videos.OPEN_GOP},
    "interlaced.mp4": {"options": {"g": "12", "x264-params": "interlaced=1"}},
    "no_key_frames.mp4": {"options": {"x264-params": "intra-refresh=1:keyint=20"}},
    "mpeg4.avi": {"codec": "mpeg4", "options": {"g": "12", "bf": "2"}},
    "mpeg4.mp4": {"codec": "mpeg4", "options": {"g": "12", "bf": "2"}},
    "mpeg2.mpg": {"codec": "mpeg2video", "options": {"g": "12", "bf": "2"}},
    "vp8.webm": {"codec": "libvpx", "options": {"g": "15", "auto-alt-ref": "1"}},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"g": "15", "cpu-used": "8"}},
    "ten_bits.mp4": {"pixels": "yuv420p10le"},
    "full_chroma.mp4": {"pixels": "yuv444p"},
    "hevc.mp4": {
        "codec": "libx265",
        "options": {"x265-params": f"{QUIET_HEVC}:open-gop=1:temporal-layers=3"},
    },
    "hevc_one_layer.mp4": {"codec": "libx265", "options": {"x265-params": QUIET_HEVC}},
    "hevc_one_layer.mkv": {"codec": "libx265", "options": {"x265-params": QUIET_HEVC}},
    "av1_pyramid.mp4": {"codec": "libsvtav1", "options": {"g": "16", "preset": "8"}},
    "av1_pyramid.mkv": {"codec": "libsvtav1", "options": {"g": "48", "preset": "10"}},
    "av1.mp4": {"codec": "libsvtav1", "options": {"g": "15", "preset": "11"}},
}


def _second_key(packets: list[av.Packet]) -> int:
    return [i for i, packet in enumerate(packets) if packet.is_keyframe][1]


def _all_marked_as_keys(source: Path, target: Path) -> Path:
    """Without its table of key frames, every frame of an mp4 counts as one."""
    target.write_bytes(source.read_bytes().replace(b"stss", b"free"))
    return target


def _turned(a: int, b: int, c: int, d: int) -> Callable[[Path, Path], Path]:
    def write(source: Path, target: Path) -> Path:
        target.write_bytes(source.read_bytes())
        return videos.set_display_matrix(target, (a, b, c, d))

    return write


# name of the file: the file it is made of, and how.
DERIVED = {
    "edit_list.mp4": ("h264.mp4", lambda s, t: videos.hide_start(s, t, 17)),
    "edit_list_end.mp4": ("open_gop.mp4", lambda s, t: videos.hide_end(s, t, 1700)),
    "edit_list_open_gop.mp4": ("open_gop.mp4", lambda s, t: videos.hide_start(s, t, 11)),
    "cut_in_gop.mkv": ("open_gop.mp4", lambda s, t: videos.remux(s, t, lambda p: p[5:])),
    "cut_at_key.mkv": (
        "open_gop.mp4",
        lambda s, t: videos.remux(s, t, lambda p: p[_second_key(p) :]),
    ),
    "cut_at_key_hevc.mkv": (
        "hevc.mp4",
        lambda s, t: videos.remux(s, t, lambda p: p[_second_key(p) :]),
    ),
    "false_keys.mp4": ("hevc.mp4", _all_marked_as_keys),
    "turned_90.mp4": ("h264.mp4", _turned(0, 1, -1, 0)),
    "turned_180.mp4": ("h264.mp4", _turned(-1, 0, 0, -1)),
    "turned_270.mp4": ("h264.mp4", _turned(0, -1, 1, 0)),
    "mpeg4_not_coded.mp4": ("mpeg4.mp4", lambda s, t: videos.leave_uncoded(s, t, 29)),
    "packed.avi": ("one_b_frame.avi", videos.pack_b_frames),
}


@pytest.fixture(scope="module")
def make(tmp_path_factory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("videos")

    def make_file(name: str) -> Path:
        path = folder / name
        if path.exists():
            return path
        if name in DERIVED:
            source, derive = DERIVED[name]
            return derive(make_file(source), path)
        if name == "one_b_frame.avi":
            options = {"g": "12", "bf": "1", "b_strategy": "0"}
            return videos.write_video(path, FRAMES, "mpeg4", options=options)
        settings = ENCODED[name]
        codec = settings.get("codec", "libx264")
        if codec not in av.codecs_available:
            pytest.skip(f"this build of FFmpeg has no encoder {codec}")
        return videos.write_video(path, FRAMES, **settings)

    return make_file


@pytest.mark.parametrize("name", [*ENCODED, *DERIVED])
def test_frames_equal_those_of_a_full_decode(make, name):
    path = make(name)
    expected = videos.full_decode(path)
    assert len({frame.tobytes() for frame in expected}) == len(expected) > 40
    rng = np.random.default_rng(0)
    with Video(path) as video:
        assert len(video) == len(expected)
        assert video.size == expected.shape[1:3]
        for count in (1, 1, 1, 2, 3, 3, 5, 8, 16, 32):
            indices = rng.integers(0, len(video), count)  # unordered, with repeats
            np.testing.assert_array_equal(video.read(indices), expected[indices])
        np.testing.assert_array_equal(video.read(range(len(video))), expected)


CONTAINERS = ("mov", "avi", "mkv", "flv")
SIZES = {"dvvideo": (720, 576), "dnxhd": (256, 192)}  # others take what H.261 takes
OPTIONS = {"g": "5", "strict": "-2"}
MORE_OPTIONS = {"dnxhd": {"profile": "dnxhr_lb"}}


def _video_encoders() -> list[str]:
    names = []
    for name in sorted(av.codecs_available):
        try:
            codec = av.Codec(name, "w")
        except av.codec.codec.UnknownCodecError:
            continue
        if codec.type == "video":
            names.append(name)
    return names


def _encode_with(codec: str, path: Path) -> bool:
    """Writes 12 frames, a key frame every 5 where that can be asked for; whether that worked."""
    width, height = SIZES.get(codec, (176, 144))
    formats = av.Codec(codec, "w").video_formats or [av.VideoFormat("yuv420p")]
    frames = videos.moving_texture(12, height, width)
    for pixels in [one.name for one in formats[:3]]:
        with contextlib.suppress(av.FFmpegError, ValueError, av.codec.codec.UnknownCodecError):
            options = OPTIONS | MORE_OPTIONS.get(codec, {})
            videos.write_video(path, frames, codec, pixels=pixels, options=options)
            return True
    return False


@pytest.mark.parametrize("codec", _video_encoders())
def test_every_codec_that_can_be_written_is_read(tmp_path, codec):
    read = []
    for suffix in CONTAINERS:
        path = tmp_path / f"a.{suffix}"
        if not _encode_with(codec, path):
            continue
        try:
            expected = videos.full_decode(path)
        except (av.FFmpegError, ValueError):  # no decoder, or FFmpeg reads nothing of its own file
            continue
        read.append(suffix)
        with Video(path) as video:
            assert len(video) == len(expected) >= 11, path
            np.testing.assert_array_equal(video.read(range(len(video))), expected, path.name)
            np.testing.assert_array_equal(video.read([7, 2, 7]), expected[[7, 2, 7]], path.name)
    if not read:
        pytest.skip("this build of FFmpeg writes it into none of the containers")


def test_files_are_of_the_kinds_they_are_named_for(make):
    def packets(name):
        with av.open(str(make(name))) as container:
            return [packet for packet in container.demux(video=0) if packet.size]

    def leads(packets):  # the frame is stored after a key frame and shown before it
        return any(a.is_keyframe and b.pts < a.pts for a, b in itertools.pairwise(packets))

    assert not leads(packets("h264.mp4"))
    assert leads(packets("open_gop.mp4"))
    assert leads(packets("hevc.mp4"))
    assert sum(packet.is_discard for packet in packets("edit_list.mp4")) == 5
    steps = np.diff(sorted(packet.pts for packet in packets("irregular.mp4")))
    assert len(set(steps)) > 20
    assert len(packets("turned_90.mp4")) == len(FRAMES)
    for name in ("h264.mp4", "mpeg4.avi"):
        with av.open(str(make(name))) as container:
            kinds = {frame.pict_type for frame in container.decode(video=0)}
        assert av.video.frame.PictureType.B in kinds
    with av.open(str(make("ten_bits.mp4"))) as container:
        assert container.streams.video[0].format.name == "yuv420p10le"


def test_turned_picture_is_upright(make):
    with Video(make("h264.mp4")) as video, Video(make("turned_90.mp4")) as turned:
        assert (video.size, turned.size) == ((64, 128), (128, 64))
        # The matrix (x, y) -> (-y, x) turns by a quarter, clockwise where y points down.
        np.testing.assert_array_equal(turned.read([9])[0], np.rot90(video.read([9])[0], -1))


def _moved_by(matrix: tuple[int, int, int, int], frames: np.ndarray) -> np.ndarray:
    """Frames whose pixels went from (x, y) to (a x + c y, b x + d y), as the MP4 standard says.

    The result is shifted to begin at 0.
    """
    a, b, c, d = matrix
    y, x = np.indices(frames.shape[1:3])
    new_x, new_y = a * x + c * y, b * x + d * y
    new_x, new_y = new_x - new_x.min(), new_y - new_y.min()
    moved = np.zeros((len(frames), new_y.max() + 1, new_x.max() + 1, 3), np.uint8)
    moved[:, new_y, new_x] = frames
    return moved


@pytest.mark.parametrize(
    ("matrix", "numpy_way"),
    [
        ((1, 0, 0, 1), lambda frame: frame),
        ((0, 1, -1, 0), lambda frame: np.rot90(frame, -1)),
        ((-1, 0, 0, -1), lambda frame: np.rot90(frame, 2)),
        ((0, -1, 1, 0), np.rot90),
        ((-1, 0, 0, 1), np.fliplr),
        ((1, 0, 0, -1), np.flipud),
        ((0, 1, 1, 0), lambda frame: frame.transpose(1, 0, 2)),
        ((0, -1, -1, 0), lambda frame: np.rot90(frame.transpose(1, 0, 2), 2)),
    ],
)
def test_all_eight_orientations(make, tmp_path, matrix, numpy_way):
    plain = videos.full_decode(make("h264.mp4"))
    path = tmp_path / "turned.mp4"
    path.write_bytes(make("h264.mp4").read_bytes())
    videos.set_display_matrix(path, matrix)
    expected = _moved_by(matrix, plain)
    np.testing.assert_array_equal(expected[9], numpy_way(plain[9]))
    for source in (path, path.read_bytes()):
        with Video(source) as video:
            assert video.size == expected.shape[1:3]
            np.testing.assert_array_equal(video.read([59, 0, 9]), expected[[59, 0, 9]])
            small = video.read([9], short_side=32)[0]
            assert small.shape[:2] == resized_size(*video.size, 32)
            assert abs(cv2.resize(expected[9], small.shape[1::-1]).astype(int) - small).max() == 0
    with Video(path) as video, Video(make("h264.mp4")) as upright:  # what prediction sees
        clip, plain_clip = (read_clip(one, 4, 32).frames.astype(int) for one in (video, upright))
    assert abs(clip - _moved_by(matrix, plain_clip)).max() <= 1


@pytest.mark.parametrize(
    ("turn", "numpy_way"),
    [
        ("rotate=90", np.rot90),  # counterclockwise
        ("flip=horizontal", np.fliplr),
        ("flip=vertical", np.flipud),
    ],
)
def test_orientation_that_a_frame_itself_carries(make, tmp_path, turn, numpy_way):
    def insert(packets):
        with av.open(str(make("h264.mp4"))) as container:
            stream = container.streams.video[0]
            change = BitStreamFilterContext(
                f"h264_metadata=display_orientation=insert:{turn}", stream
            )
            return [new for packet in container.demux(stream) for new in change.filter(packet)]

    path = videos.remux(make("h264.mp4"), tmp_path / "turned.mp4", insert)
    with Video(path) as video, Video(make("h264.mp4")) as plain:
        assert len(video) == len(plain)  # although its first packet loses the mark of a key frame
        np.testing.assert_array_equal(video.read([0])[0], numpy_way(plain.read([0])[0]))


@pytest.mark.parametrize("orientation", [None, *range(1, 9)])
def test_orientation_of_motion_jpeg_with_exif(tmp_path, orientation):
    """Its frames carry side data of a kind that PyAV does not know."""
    picture, exif = PIL.Image.fromarray(FRAMES[0]), PIL.Image.Exif()
    exif[0x010F] = "maker"
    if orientation:
        exif[0x0112] = orientation
    picture.save(tmp_path / "a.jpg", exif=exif, subsampling=0)
    plain = videos.write_video(tmp_path / "a.avi", FRAMES[:2], "mjpeg", pixels="yuvj444p")

    def replace(packets):
        new = [av.Packet((tmp_path / "a.jpg").read_bytes()) for _ in packets]
        for packet, old in zip(new, packets, strict=True):
            packet.pts, packet.dts, packet.time_base = old.pts, old.dts, old.time_base
        return new

    path = videos.remux(plain, tmp_path / "b.avi", replace)
    upright = PIL.ImageOps.exif_transpose(PIL.Image.open(tmp_path / "a.jpg"))
    with Video(path) as video:
        frame = video.read([1])[0]
    assert frame.shape == np.shape(upright)
    assert abs(frame.astype(int) - upright).mean() < 2  # two decoders of JPEG


def test_frames_do_not_outlive_the_reading(make):
    gc.collect()
    gc.disable()
    try:
        with Video(make("turned_90.mp4")) as video:
            video.read(range(60))
        assert sum(type(one) is av.VideoFrame for one in gc.get_objects()) < 5
    finally:
        gc.enable()


@pytest.mark.parametrize("name", ["h264.mp4", "hevc.mp4", "hevc_one_layer.mkv", "mpeg4.mp4"])
def test_most_packets_are_left_out(make, name):
    with Video(make(name)) as video:
        decoded = []
        decode = video._decode
        video._decode = lambda *args: (decoded.append(item[0]) or item for item in decode(*args))
        video.read([1, 59])
    assert len(decoded) < 20


def test_bytes_and_path_agree(make):
    path = make("open_gop.mp4")
    with Video(path) as one, Video(str(path)) as two, Video(path.read_bytes(), "a/b") as three:
        assert (one.name, two.name, three.name) == (str(path), str(path), "a/b")
        for video in (two, three):
            np.testing.assert_array_equal(video.read([50, 3]), one.read([50, 3]))


def test_frame_rate(make):
    with Video(make("h264.mp4")) as video:
        assert video.frame_rate == 25


def test_short_side_scales_down_only(make):
    with Video(make("h264.mp4")) as video:
        frames = video.read([0, 5], short_side=40)
        assert frames.shape[1:3] == resized_size(64, 128, 40) == (40, 80)
        blurred = FRAMES[[0, 5]].reshape(2, 8, 8, 16, 8, 3).mean((2, 4))
        small = frames.reshape(2, 8, 5, 16, 5, 3).mean((2, 4))
        assert abs(blurred - small).mean() < 4  # levels of 255
        np.testing.assert_array_equal(video.read([0], short_side=65), video.read([0]))


def test_size_that_changes_midway_is_scaled_to_the_first(make, tmp_path):
    small = videos.write_video(
        tmp_path / "small.webm", FRAMES[:20, :32, :48], "libvpx-vp9", options={"cpu-used": "8"}
    )

    def append(packets):
        with av.open(str(small)) as container:
            more = [packet for packet in container.demux(video=0) if packet.size]
        for packet in more:
            packet.pts += packets[-1].pts + 40
            packet.dts = packet.pts
        return packets + more

    path = videos.remux(make("vp9.webm"), tmp_path / "both.webm", append)
    with Video(path) as video:
        assert len(video) == 80
        assert video.read([0, 79]).shape == (2, 64, 128, 3)


def test_indices_outside_are_a_mistake_of_the_caller(make):
    with Video(make("h264.mp4")) as video:
        for indices in ([60], [-1]):
            with pytest.raises(IndexError, match="there are 60"):
                video.read(indices)


def _playlist(target: Path) -> bytes:
    return f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile://{target}\n".encode()


def test_what_is_no_video(make, tmp_path):
    video = make("open_gop.ts")
    contents = {
        "empty.mp4": b"",
        "text.mp4": b"not a video\n" * 100,
        "page.mp4": b"<html><body>404 Not Found</body></html>",
        "sound.mp4": videos.write_sound(tmp_path / "s.m4a").read_bytes(),
        "list.m3u8": _playlist(video),
        "concat.mp4": f"ffconcat version 1.0\nfile {video}\n".encode(),
    }
    for name, content in contents.items():
        path = tmp_path / name
        path.write_bytes(content)
        for source in (path, content):
            with pytest.raises(DecodeError) as caught:
                Video(source, name)
            assert caught.value.path == name
            assert "\n" not in str(caught.value)
    with pytest.raises(DecodeError, match="is empty"):
        Video(tmp_path / "empty.mp4")
    with pytest.raises(DecodeError, match="no such file"):
        Video(tmp_path / "missing.mp4")
    with pytest.raises(DecodeError, match="no such file"):
        Video("https://example.com/video.mp4")
    with pytest.raises(DecodeError, match="is no regular file"):
        Video(tmp_path)


def test_error_survives_pickling():
    error = pickle.loads(pickle.dumps(DecodeError("a.mp4", "two\nlines")))
    assert str(error) == "a.mp4: two lines"
    assert (error.path, error.reason) == ("a.mp4", "two lines")


def test_reading_closes_the_file(make, monkeypatch):
    opened = []
    open_file = Video._open_file
    monkeypatch.setattr(
        Video, "_open_file", lambda *args: opened.append(open_file(*args)) or opened[-1]
    )
    Video(make("h264.mp4")).close()
    damaged = make("h264.mp4").with_name("damaged.mp4")
    damaged.write_bytes(make("h264.mp4").read_bytes()[:500])
    with pytest.raises(DecodeError):
        Video(damaged)
    assert [file.closed for file in opened] == [True, True]


def _damage(data: bytes, kind: str, rng: np.random.Generator) -> bytes:
    place, count = int(rng.integers(len(data))), int(rng.integers(1, 400))
    data = bytearray(data)
    if kind == "truncated":
        del data[place:]
    elif kind == "hole":
        del data[place : place + count]
    elif kind == "noise":
        data[place : place + count] = rng.bytes(len(data[place : place + count]))
    else:
        for position in rng.integers(0, len(data), count % 20 + 1):
            data[position] ^= 1 << int(rng.integers(8))
    return bytes(data)


def _lenient_decode(path: Path) -> list[bytes]:
    """The frames of a damaged file, as bytes, as far as the decoder gives any."""
    frames = []
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.thread_type, stream.codec_context.thread_count = "NONE", 1
            for packet in container.demux(stream):
                try:
                    pictures = packet.decode()
                except av.FFmpegError:
                    continue
                frames += [frame.to_ndarray(format="rgb24").tobytes() for frame in pictures]
    except (av.FFmpegError, IndexError):
        pass
    return frames


@pytest.mark.parametrize("name", ["rpza.mov", "cfhd.mov", "flashsv.flv"])
def test_damage_spreads_where_key_frames_are_not_told(tmp_path, name):
    """The containers of some mark every packet as a key frame, and no decoder says otherwise."""
    path = tmp_path / name
    assert _encode_with(path.stem, path)
    expected = videos.full_decode(path)
    with av.open(str(path)) as container:
        packet = list(container.demux(video=0))[3]
    data = bytearray(path.read_bytes())
    place = data.index(bytes(packet))
    data[place : place + packet.size] = bytes(packet.size)
    with Video(bytes(data)) as video:
        np.testing.assert_array_equal(video.read([2, 0]), expected[[2, 0]])
        for index in (3, 4):
            with pytest.raises(DecodeError, match=f"frame {index} is missing or damaged"):
                video.read([index])


@pytest.mark.parametrize("kind", ["truncated", "hole", "noise", "bits"])
@pytest.mark.parametrize("name", ["h264.mp4", "edit_list.mp4", "open_gop.avi", "vp9.webm"])
def test_damaged_file_gives_right_frames_or_decode_error(make, tmp_path, name, kind):
    original = make(name).read_bytes()
    intact = set(_lenient_decode(make(name)))
    outcomes = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        path = tmp_path / f"{seed}{make(name).suffix}"
        path.write_bytes(_damage(original, kind, rng))
        try:
            with Video(path) as video:
                indices = rng.integers(0, len(video), 4)
                frames = {frame.tobytes() for frame in video.read(indices)}
        except DecodeError:
            outcomes.append("error")
            continue
        assert frames <= intact or frames <= intact.union(_lenient_decode(path)), seed
        outcomes.append("right" if frames <= intact else "as decoded")
    assert "error" in outcomes


@pytest.mark.parametrize("name", ["h264.mp4", "audio.mp4"])
def test_truncated_mp4_is_an_error(make, tmp_path, name):
    path = videos.remux(make(name), tmp_path / name, list, {"movflags": "faststart"})
    data = path.read_bytes()
    with Video(data) as video:
        assert len(video) == 60
    for size in range(100, len(data) - 1, len(data) // 40):
        with pytest.raises(DecodeError):
            Video(data[:size])


def test_damage_spreads_to_what_builds_on_it(make):
    """Noise in the second key frame spoils its group of pictures, 12..23, and no other."""
    data = bytearray(make("h264.mp4").read_bytes())
    with av.open(str(make("h264.mp4"))) as container:
        key = list(container.demux(video=0))[12]
        assert key.is_keyframe
        middle = key.pos + key.size // 2
    data[middle : middle + 99] = np.random.default_rng(0).bytes(99)
    expected = videos.full_decode(make("h264.mp4"))
    with Video(bytes(data)) as video:
        for index in (12, 17, 23):
            with pytest.raises(DecodeError, match=f"frame {index} is missing or damaged"):
                video.read([index, 30])
        np.testing.assert_array_equal(video.read([11, 24, 59]), expected[[11, 24, 59]])


def test_a_film_of_too_many_frames_is_refused(tmp_path, monkeypatch):
    path = videos.write_video(tmp_path / "a.mp4", videos.moving_texture(5))
    monkeypatch.setattr(decoding, "MAX_PACKETS", 5)
    assert len(Video(path)) == 5
    monkeypatch.setattr(decoding, "MAX_PACKETS", 4)
    with pytest.raises(DecodeError, match="more than 4 frames"):
        Video(path)


def test_packets_crafted_to_be_slow():
    """Key packets shown last, then as many others: once 10^10 comparisons, within the time limit.

    Each of the others can be decoded from the first key packet only.
    """
    half = 100_000
    shown = [0, *range(half, 2 * half), *range(half - 1, 0, -1)]
    starts = Video._start_packets(shown, set(range(half)))
    assert starts == {n: n if n < half else 0 for n in range(2 * half)}
    assert Video._start_packets([2, 0, 1, 3], {0, 1}) == {0: 0, 1: 1, 3: 1}
