"""Views of retrieval, as the official code cuts them."""

import numpy as np

from fluxvit_jax.data.decoding import Video
from fluxvit_jax.data.patches import patchify
from fluxvit_jax.data.views import Frames, Views, cut_views, read_frames
from fluxvit_jax.grids import Grid
from fluxvit_jax.models.fluxvit import MEAN, STD
from tests.data.videos import moving_texture, write_video
from tests.models.golden import GOLDEN

ARRAYS = np.load(GOLDEN / "clip/frames_cases.npz")


def test_golden_squeezed_frames():
    """Bicubic without antialiasing, as the pinned torchvision; newer ones differ."""
    frames = ARRAYS["frames"].transpose(0, 2, 3, 1)
    expected = ARRAYS["antialias_off"].transpose(0, 2, 3, 1) * np.array(STD) + np.array(MEAN)
    views = Views(frames="middle", squeeze=True)
    (found,) = cut_views(Frames(frames, np.arange(2), 2), Grid(2, 2, 2), views)
    own = patchify(np.round(255 * expected).astype(np.uint8))
    assert np.abs(found.astype(int) - own).max() <= 1 and (found == own).mean() > 0.999


def test_the_beginning_of_a_video(tmp_path):
    """The official "trimmed30": the first int(seconds * frame rate) frames, if there are more."""
    path = tmp_path / "long.mp4"
    write_video(path, moving_texture(40, 28, 28))
    with Video(path) as video:
        rate, grids = video.frame_rate, [Grid(4, 2, 2)]
        views = Views(frames="middle", seconds=20 / rate + 1e-6)
        short = read_frames(video, grids, views, 1 << 30)
        whole = read_frames(video, grids, Views(frames="middle"), 1 << 30)
        longer = read_frames(video, grids, Views(frames="middle", seconds=99.0), 1 << 30)
    assert short.length == 20 and short.numbers.tolist() == [2, 7, 12, 17]
    assert whole.length == longer.length == 40 and whole.numbers.tolist() == [4, 14, 24, 34]


def test_what_a_report_says():
    assert str(Views(clips=4, crops=3)) == "4x3"
    views = Views(frames="middle", squeeze=True, seconds=30)
    assert str(views) == "1x1, middle frames, squeezed, first 30 s"
