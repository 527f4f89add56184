"""Small copies: of odd sizes, turned, broken, stopped and gone on with."""

import fcntl
import os
import re
import shutil
import subprocess
import sys

import cv2
import numpy as np
import pytest

from fluxvit_jax.data import shrink as module
from fluxvit_jax.data.decoding import DecodeError, Video
from fluxvit_jax.data.shrink import main, shrink
from fluxvit_jax.errors import UserError
from tests.data.videos import moving_texture, write_video


@pytest.fixture
def videos(tmp_path):
    """A folder with a wide, a tall, a small and a broken video, and a pipe with a video's name."""
    root = tmp_path / "videos"
    (root / "in folder").mkdir(parents=True)
    write_video(root / "wide.mp4", moving_texture(30, 90, 162), rate=10, audio=True)
    write_video(root / "in folder" / "tall é.mkv", moving_texture(7, 130, 98))
    write_video(root / "small.mp4", moving_texture(5, 32, 48))
    (root / "broken.mp4").write_bytes((root / "wide.mp4").read_bytes()[:2000])
    os.mkfifo(root / "pipe.mp4")
    return root


def read(path, **options):
    with Video(path) as video:
        return video.read(range(len(video)), **options), video.frame_rate


def test_copies_are_the_videos_with_fewer_pixels(videos, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 8)  # several chunks a video
    unreadable = shrink(videos, tmp_path / "out", short_side=64, workers=2)
    assert list(unreadable) == ["broken.mp4", "pipe.mp4"]
    assert "regular file" in unreadable["pipe.mp4"]
    for name, size in (("wide.mp4", (64, 114)), ("in folder/tall é.mkv", (84, 64))):
        copy, rate = read(tmp_path / "out" / name)
        original, original_rate = read(videos / name, short_side=64, interpolation=cv2.INTER_AREA)
        assert copy.shape == (len(original), *size, 3)
        assert rate == original_rate
        # Less than half as far from its original as from any other frame.
        pictures = (copy.mean(-1), original[:, : size[0], : size[1]].mean(-1))
        far = np.abs(pictures[0][:, None] - pictures[1]).mean((2, 3))
        others = np.where(np.eye(len(far), dtype=bool), np.inf, far).min(axis=1)
        assert (far.diagonal() < others / 2).all()
    for name in ("small.mp4", "broken.mp4"):
        assert (tmp_path / "out" / name).read_bytes() == (videos / name).read_bytes()
    assert not (tmp_path / "out" / "pipe.mp4").exists()


def test_the_same_command_goes_on(videos, tmp_path):
    out = tmp_path / "out"
    shrink(videos, out, short_side=64)
    finished = {path: path.stat().st_ino for path in out.rglob("*.m*")}
    (out / "wide.mp4").unlink()  # as if it had been stopped before
    write_video(videos / "small.mp4", moving_texture(9, 32, 48))  # another video since
    assert list(shrink(videos, out, short_side=64)) == ["broken.mp4", "pipe.mp4"]
    again = {path for path in finished if path.stat().st_ino != finished[path]}
    assert {path.name for path in again} >= {"wide.mp4", "small.mp4"}
    assert out / "in folder" / "tall é.mkv" not in again
    assert len(read(out / "small.mp4")[0]) == 9
    assert not list(out.rglob("*.tmp"))


def test_copies_of_another_size_are_refused(videos, tmp_path):
    shrink(videos, tmp_path / "out", short_side=64)
    with pytest.raises(UserError, match="out: has copies with --short_side=64; choose another --o"):
        shrink(videos, tmp_path / "out", short_side=32)
    assert min(read(tmp_path / "out" / "wide.mp4")[0].shape[1:3]) == 64


def test_one_run_at_a_time(videos, tmp_path):
    folder = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    with pytest.raises(UserError, match="another run of `shrink` is at work"):
        shrink(videos / "in folder", tmp_path)
    os.close(folder)
    assert shrink(videos / "in folder", tmp_path) == {}


def test_a_file_without_permission_is_only_listed(videos, tmp_path):
    """Root may read all files, so the command runs without that privilege."""
    (videos / "wide.mp4").chmod(0)
    unprivileged = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all"]
    if os.getuid() or not shutil.which("setpriv"):
        unprivileged = []
    command = [sys.executable, "-m", "fluxvit_jax.data.shrink", f"--root={videos}"]
    own = [f"--out={tmp_path / 'out'}", "--short_side=64", "--workers=1"]
    done = subprocess.run([*unprivileged, *command, *own], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if unprivileged or os.getuid():
        assert re.search("cannot be read: wide.mp4: .*[Pp]ermission denied", done.stdout)
    assert read(tmp_path / "out" / "in folder" / "tall é.mkv")[0].shape[2] == 64


def test_the_command(videos, tmp_path, capsys):
    assert main([f"--root={videos}", f"--out={tmp_path / 'out'}", "--short_side=64"]) == 0
    said = capsys.readouterr().out
    assert "cannot be read: broken.mp4: " in said
    with pytest.raises(DecodeError):
        Video(tmp_path / "out" / "broken.mp4")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"root": "nowhere"}, "nowhere: no such folder"),
        ({"root": "empty"}, "empty: holds no videos"),
        ({"root": "bad"}, "bad: not one video can be read; text.mp4: "),
        ({"short_side": "63"}, "short_side (63) must be even and at least 16"),
        ({"out": "videos/small"}, "small: lies in the folder of the videos"),
        ({"out": "file"}, "file: cannot be used as a folder: File exists"),
        ({"workers": "0"}, "--workers must be above 0"),
    ],
)
def test_errors(change, message, videos, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "text.mp4").write_text("no video")
    (tmp_path / "file").write_text("in the way")
    flags = {"root": "videos", "out": "out", "short_side": "64", "workers": "1"} | change
    assert main([f"--{name}={value}" for name, value in flags.items()]) == 2
    (line,) = [s for s in capsys.readouterr().err.splitlines() if s.startswith("shrink: ")]
    assert message in line


def test_no_folder_in_python(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        shrink(tmp_path / "nowhere", tmp_path / "out")
