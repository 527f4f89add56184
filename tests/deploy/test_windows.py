"""`--mode=predict --window=4s`: windows, their clips, and the timeline."""

import csv

import cv2
import numpy as np
import pytest

import fluxvit_jax
from fluxvit_jax.data.decoding import DecodeError, Video
from fluxvit_jax.deploy import windows as module
from fluxvit_jax.deploy.predict import Options, run
from fluxvit_jax.deploy.timeline import Moment, segments
from fluxvit_jax.deploy.windows import read_windows, seconds_of, windows_of
from fluxvit_jax.errors import UserError
from tests.data.videos import moving_texture, write_video


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    """Seven seconds at 10 frames a second, key frames every 12."""
    path = tmp_path_factory.mktemp("long") / "<long> =1.mp4"
    return write_video(path, moving_texture(70, 64, 80), rate=10)


@pytest.mark.parametrize(
    ("frames", "window", "stride", "expected"),
    [
        (70, 2, 2, [(0, 20), (20, 40), (40, 60), (50, 70)]),  # the last one ends with the video
        (60, 2, 2, [(0, 20), (20, 40), (40, 60)]),
        (45, 2, 1, [(0, 20), (10, 30), (20, 40), (25, 45)]),
        (15, 2, 1, [(0, 15)]),  # shorter than a window
        (1, 2, 1, [(0, 1)]),
        (30, 1, 2, [(0, 10), (20, 30)]),  # with gaps
        (4, 0.1, 0.01, [(0, 1), (1, 2), (2, 3), (3, 4)]),  # less than a frame apart
    ],
)
def test_windows_cover_a_video(frames, window, stride, expected):
    assert [(own.start, own.stop) for own in windows_of(frames, 10, window, stride)] == expected


def test_windows_do_not_drift_at_odd_rates():
    starts = [own.start for own in windows_of(30_000, 30_000 / 1001, 4, 2)]
    np.testing.assert_allclose(starts[:-1], 2 * 30_000 / 1001 * np.arange(len(starts) - 1), atol=1)


def test_times_of_flags():
    assert [seconds_of("window", text) for text in ("4s", "4", "0.5s", ".5")] == [4, 4, 0.5, 0.5]
    for text in ("0", "0s", "-1", "4m", "s", "nan", "four", "9" * 400):
        with pytest.raises(UserError, match=f"--window={text}: is no time above 0 in seconds"):
            seconds_of("window", text)


def test_clips_are_those_of_the_windows_own_frames(long):
    with Video(long) as video:
        windows = windows_of(len(video), video.frame_rate, 2, 1)
        clips = list(read_windows(video, windows, 4, 28))
        for window, clip in zip(windows, clips, strict=True):
            assert clip.numbers.min() >= window.start and clip.numbers.max() < window.stop
            whole = video.read(clip.numbers)
            for frame, shown in zip(whole, clip.frames, strict=True):
                resized = cv2.resize(frame, (35, 28))  # 80 x 64
                np.testing.assert_array_equal(resized[:, 3:31], shown)
            np.testing.assert_allclose(clip.times, clip.numbers / 10)


@pytest.mark.parametrize("suffix", ["mp4", "avi"])
def test_no_window_costs_a_whole_decode(tmp_path, monkeypatch, suffix):
    """An AVI, which has to be decoded from its start, is so a few times, not for each window."""
    codec = {"mp4": "libx264", "avi": "mpeg4"}[suffix]
    path = write_video(tmp_path / f"a.{suffix}", moving_texture(70, 64, 64), codec, rate=10)
    decoded = []
    real = Video._decode

    def count(self, first, last, requested=None):
        decoded.append(last - first + 1)
        return real(self, first, last, requested)

    monkeypatch.setattr("fluxvit_jax.data.decoding.MAX_CACHED_BYTES", 0)
    with Video(path) as video:
        windows = windows_of(len(video), 10, 1, 0.2)
        assert len(windows) == 31
        monkeypatch.setattr(Video, "_decode", count)
        monkeypatch.setattr(module, "MAX_BYTES", 8 * 4 * 28 * 28 * 3)  # eight windows at once
        assert len(list(read_windows(video, windows, 4, 28))) == 31
    assert sum(decoded) < 5 * 70


def test_a_damaged_part_costs_its_windows_only(long, monkeypatch):
    real = Video.read

    def read(self, indices, *rest, **more):
        if any(30 <= i < 32 for i in indices):
            raise DecodeError(self.name, "damaged")
        return real(self, indices, *rest, **more)

    monkeypatch.setattr(Video, "read", read)
    with Video(long) as video:
        windows = windows_of(len(video), 10, 1, 1)
        clips = list(read_windows(video, windows, 10, 28))
    assert [isinstance(clip, DecodeError) for clip in clips] == [i == 3 for i in range(7)]


def test_segments_join_windows_of_one_class():
    tops = [[("a", 0.9), ("b", 0.1)], [("a", 0.7), ("b", 0.3)], [], [("b", 1.0), ("a", 0.0)]]
    moments = [Moment(i, i + 2, top) for i, top in enumerate(tops)]
    assert segments(moments) == [(0, 3, "a", pytest.approx(0.8)), (3, 5, "b", 1.0)]


# --- The command


def options(weights, video, out, **more) -> Options:
    return Options(str(weights), str(out), (), "", "float32", str(video), **more)


def rows_of(path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def times_of(rows: list[dict[str, str]]) -> list[tuple[str, str]]:
    return [(row["start"], row["end"]) for row in rows]


def test_a_timeline_of_one_video(finished, long, tmp_path, capsys):
    assert run(options(finished.workdir, long, tmp_path, window="2s", stride="1s", top=2)) == 0
    said = capsys.readouterr().out
    table = tmp_path / "<long> =1.timeline.csv"
    assert said.splitlines()[-1] == f"6 windows; written to {table}"
    rows = rows_of(table)
    assert [(row["tokens"], row["frames"], row["resolution"]) for row in rows[::6]] == [
        ("24", "6", "42"),
        ("12", "4", "28"),
    ]
    assert [(row["start"], row["end"]) for row in rows[4:6]] == [
        ("4.000", "6.000"),
        ("5.000", "7.000"),
    ]
    assert rows[0]["video"] == "<long> =1.mp4" and "class3" not in rows[0]
    model = fluxvit_jax.from_pretrained(finished.workdir)
    with Video(long) as video:
        (clip,) = read_windows(video, [range(40, 60)], 6, 42)
    logits = np.asarray(model(clip.frames, 24).logits[0], np.float64)
    odds = np.exp(logits - logits.max())
    assert float(rows[4]["probability1"]) == pytest.approx(odds.max() / odds.sum(), abs=1e-4)
    page = (tmp_path / "<long> =1.kept.html").read_text()
    assert page.count("<picture") == 2 and page.count("&lt;long&gt; =1.mp4") == 2
    assert "24 tokens, 6 windows" in page and " to 7.0</th>" in page


def test_a_folder_has_one_file_of_timelines(finished, long, tmp_path):
    folder = tmp_path / "videos"
    folder.mkdir()
    (folder / "a.mp4").write_bytes(long.read_bytes())
    (folder / "=b.mp4").write_bytes(long.read_bytes()[:300])
    asked = options(finished.workdir, folder, tmp_path, window="4")
    assert run(asked._replace(tokens=(12,))) == 0
    rows = rows_of(tmp_path / "timeline.csv")
    assert [row["video"] for row in rows] == ["'=b.mp4", "a.mp4", "a.mp4"]
    assert rows[0]["failure"] and not rows[0]["start"] and not rows[1]["failure"]
    assert [(row["start"], row["end"]) for row in rows[1:]] == [
        ("0.000", "4.000"),
        ("3.000", "7.000"),
    ]
    assert len(rows_of(tmp_path / "predictions.csv")) == 2


def test_mistakes_are_one_line(finished, long, tmp_path):
    for more, message in (
        ({"window": "4m"}, r"--window=4m: is no time above 0 in seconds, such as 4s or 0.5s"),
        ({"window": "4s", "stride": "0"}, r"--stride=0: is no time above 0"),
        ({"stride": "2s"}, r"--stride=2s: add --window, the length of a window"),
    ):
        with pytest.raises(UserError, match=message) as error:
            run(options(finished.workdir, long, tmp_path, **more))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "beginning", "hint"),
    [
        ("a.gif", b"GIF89a", "convert it to a video first"),
        ("a.png", b"\x89PNG\r\n\x1a\n", "is an image"),
    ],
)
def test_what_is_no_video_says_so(finished, tmp_path, name, beginning, hint):
    (tmp_path / name).write_bytes(beginning + bytes(50))
    with pytest.raises(UserError, match=hint):
        run(options(finished.workdir, tmp_path / name, tmp_path, window="1s"))
