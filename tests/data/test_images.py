import os

import cv2
import numpy as np
import PIL.Image
import pytest

from fluxvit_jax.data import images
from fluxvit_jax.data.decoding import DecodeError, Video
from fluxvit_jax.data.frame_sampling import train_frames
from fluxvit_jax.data.images import Image, open_clip
from tests.data import videos

PICTURE = np.arange(40 * 60 * 3, dtype=np.uint8).reshape(40, 60, 3)


def write(path, quality=()):
    assert cv2.imwrite(str(path), PICTURE[..., ::-1], list(quality))
    return path


@pytest.mark.parametrize("suffix", [".png", ".PNG", ".jpg", ".jpeg", ".webp"])
def test_an_image_is_a_video_of_one_frame(tmp_path, suffix):
    path = write(tmp_path / f"a{suffix}")
    for source in (path, str(path), path.read_bytes()):
        with open_clip(source) as clip:
            assert isinstance(clip, Image)
            assert (len(clip), clip.size) == (1, (40, 60))
            frames = clip.read(train_frames(1, 4, np.random.default_rng(0)))
            assert frames.shape == (4, 40, 60, 3) and frames.dtype == np.uint8
            if suffix.lower() == ".png":
                np.testing.assert_array_equal(frames, np.stack([PICTURE] * 4))
            assert clip.read([0], short_side=20).shape == (1, 20, 30, 3)
            assert clip.read([0], short_side=50).shape == (1, 40, 60, 3)
            with pytest.raises(IndexError, match="no frame 1"):
                clip.read([0, 1])


def test_videos_stay_videos(tmp_path):
    path = videos.write_video(tmp_path / "a.mp4", videos.moving_texture(3))
    for source in (path, path.read_bytes()):
        with open_clip(source) as clip:
            assert isinstance(clip, Video) and len(clip) == 3


def test_what_is_no_image_is_an_error(tmp_path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.jpg").write_text("no image")
    cut = write(tmp_path / "cut.png").read_bytes()[:100]
    (tmp_path / "cut.png").write_bytes(cut)
    for name, reason in [
        ("absent.png", "no such file"),
        ("empty.png", "cannot decode|no image"),
        ("text.jpg", "no image"),
        ("cut.png", "no image"),
    ]:
        with pytest.raises(DecodeError, match=reason):
            open_clip(tmp_path / name)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_size_is_checked_before_decoding(tmp_path, monkeypatch, suffix):
    path = write(tmp_path / f"a{suffix}")
    monkeypatch.setattr(images, "MAX_PIXELS", 40 * 60)
    assert open_clip(path).size == (40, 60)
    monkeypatch.setattr(images, "MAX_PIXELS", 40 * 60 - 1)
    monkeypatch.delattr(cv2, "imdecode")
    with pytest.raises(DecodeError, match="60 x 40 px are more than 2399"):
        open_clip(path)


@pytest.mark.parametrize("name", ["pipe.jpg", "pipe.mp4"])
def test_a_pipe_is_no_file(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(DecodeError, match=f"{name}: is no regular file"):
        open_clip(tmp_path / name)


@pytest.mark.parametrize(
    ("suffix", "reason"),
    [
        (".jpg", r"is an image \(JPEG\), not a video"),
        (".png", r"is an image \(PNG\), not a video"),
        (".webp", r"is an image \(WebP\), not a video"),
        (".bmp", r"is an image \(BMP\), not a video"),
        (".tiff", r"is an image \(TIFF\), not a video"),
        (".gif", r"is a GIF; convert it to a video first: ffmpeg -i a\.gif a\.mp4"),
        (".jp2", "is in none of the formats that are read: mov,mp4"),
    ],
)
def test_an_image_in_place_of_a_video_is_named_by_its_content(tmp_path, suffix, reason):
    PIL.Image.fromarray(PICTURE).save(tmp_path / f"a{suffix}")
    path = (tmp_path / f"a{suffix}").rename(tmp_path / "a.mp4")
    for source in (path, path.read_bytes()):
        with pytest.raises(DecodeError, match=f"b.mp4: {reason}"):
            Video(source, "b.mp4")
