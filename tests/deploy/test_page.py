"""The page and the film of one video: what they say, their pixels, and a browser's view."""

import base64
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
import skimage.data

from fluxvit_jax.data.decoding import Video
from fluxvit_jax.deploy import page
from fluxvit_jax.deploy.page import Shown, fade
from tests import limited
from tests.data.videos import moving_texture

NASTY = '<script>alert(1)</script> & "x"'
RED, GREEN = (214, 40, 40), (20, 150, 60)


def shown(
    budget: int | None = 20, T: int = 4, H: int = 4, W: int = 4, seed: int = 0, **others
) -> Shown:
    """A moving texture of which `budget` patches are kept at random, one frame a second."""
    kept = np.random.default_rng(seed).permutation(T * H * W) < (budget or T * H * W)
    given = {
        "frames": moving_texture(T, 14 * H, 14 * W, seed),
        "kept": kept.reshape(T, H, W),
        "times": 0.25 + np.arange(T),
        "top": [("run", 0.75), ("jump", 0.125)],
        "head": 1,
        "seconds": 0.0123,
    }
    return Shown(budget, **{**given, **others})


def solid(*colours: tuple[int, int, int], side: int = 4) -> np.ndarray:
    """A frame of one colour for each of `colours`: uint8 [T, 14 side, 14 side, 3]."""
    pixels = np.array(colours, np.uint8)[:, None, None]
    return pixels.repeat(14 * side, 1).repeat(14 * side, 2)


# Fading.


def test_kept_patches_stay_as_they_are_and_dropped_ones_turn_grey():
    one = shown(T=3, H=2, W=5, budget=11)
    faded = fade(one.frames, one.kept)
    assert faded.dtype == np.uint8
    assert faded.shape == one.frames.shape
    for t, h, w in np.ndindex(one.kept.shape):
        patch = np.s_[t, 14 * h : 14 * (h + 1), 14 * w : 14 * (w + 1)]
        if one.kept[t, h, w]:
            np.testing.assert_array_equal(faded[patch], one.frames[patch])
        else:
            assert (faded[patch] != one.frames[patch]).any(axis=-1).all()
            assert (faded[patch] == faded[patch][..., :1]).all()


def test_dropped_patches_can_be_recognised():
    frames = solid((0, 0, 0), (120, 120, 120), (255, 255, 255))
    levels = fade(frames, np.zeros((3, 4, 4), bool))[:, 0, 0, 0].astype(int)
    assert (np.diff(levels) > 40).all()  # what was darker stays so, visibly


def test_shapes_that_do_not_belong_together_are_refused():
    with pytest.raises(ValueError, match="do not divide"):
        fade(np.zeros((2, 28, 28, 3), np.uint8), np.ones((2, 2, 3), bool))


# The page as text.


class Parsed(HTMLParser):
    """Attributes of every element by tag, and all text; fails on tags that do not close."""

    def __init__(self, path: Path):
        super().__init__()
        self.elements: dict[str, list[dict]] = {}
        self.text, self._open = "", []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.elements.setdefault(tag, []).append(dict(attributes))
        if tag not in ("br", "img", "meta"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def write_page(folder: Path, *budgets: Shown, title: str = "run/a.mp4") -> Path:
    path = folder / "page.html"
    page.write_page(path, title, budgets)
    return path


def decode(address: str) -> np.ndarray:
    """The picture in a data URI: uint8 [height, width, 3]."""
    head, data = address.split(",")
    assert head == "data:image/jpeg;base64"
    picture = cv2.imdecode(np.frombuffer(base64.b64decode(data), np.uint8), cv2.IMREAD_COLOR)
    return picture[..., ::-1]


def test_a_page_has_every_frame_of_every_budget_in_order(tmp_path):
    # Different frames, sizes and budgets; a single frame; every token.
    budgets = shown(), shown(15, T=1, H=3, W=5, seed=1), shown(None, T=2, H=8, W=9, seed=2)
    images = Parsed(write_page(tmp_path, *budgets)).elements["img"]
    assert len(images) == 4 + 1 + 2
    assert images[0]["alt"] == f"frame at 0.25 s, {budgets[0].kept[0].sum()} of 16 patches kept"
    assert ["class" in image for image in images] == [True] * 5 + [False] * 2  # 56, 70; 126 px
    expected = [picture for one in budgets for picture in fade(one.frames, one.kept)]
    for image, picture in zip(images, expected, strict=True):
        assert (int(image["height"]), int(image["width"])) == picture.shape[:2]
        # JPEG is off by up to 7 levels on this texture, BGR and other pictures by 20 or more.
        assert np.abs(decode(image["src"]) - picture.astype(int)).mean() < 10


def test_a_page_says_budget_tokens_head_time_and_classes(tmp_path):
    budgets = shown(1024, T=8, H=16, W=16, head=2), shown(None)
    text = Parsed(write_page(tmp_path, *budgets)).text
    for words in ("1,024 tokens", "1,024 of 2,048 tokens kept", "8 frames of 224 x 224 px, head 2"):
        assert words in text
    for words in ("all tokens", "64 of 64 tokens kept", "4 frames of 56 x 56 px, head 1"):
        assert words in text
    assert text.count("12.3 ms") == text.count("run 75.0 %") == text.count("jump 12.5 %") == 2


def test_bars_are_as_long_as_probabilities_and_shares_of_the_fullest_frame(tmp_path):
    kept = np.zeros((3, 4, 4), bool)
    kept[0, :2] = kept[1, :1] = True
    parsed = Parsed(write_page(tmp_path, shown(12, T=3, kept=kept)))
    widths = [div["style"] for div in parsed.elements["div"] if "style" in div]
    assert widths == [f"width:{share}%" for share in (75.0, 12.5, 100.0, 50.0, 0.0)]
    for words in ("0.25 s 8 of 16", "1.25 s 4 of 16", "2.25 s 0 of 16"):
        assert words in parsed.text


def test_names_are_text_whatever_they_are_called(tmp_path):
    path = write_page(tmp_path, shown(top=[(NASTY, 0.5)]), title=NASTY)
    parsed = Parsed(path)
    assert "script" not in parsed.elements
    assert parsed.text.count(NASTY) == 3  # title, heading, class


def test_a_page_needs_no_other_file(tmp_path):
    path = write_page(tmp_path, shown())
    parsed = Parsed(path)
    assert parsed.elements.keys().isdisjoint({"link", "script", "iframe", "base"})
    assert all("href" not in own for elements in parsed.elements.values() for own in elements)
    assert not re.search(r"url\(|@import|https?:", path.read_text())


def test_a_page_of_four_budgets_of_24_large_frames_is_below_6_mb(tmp_path):
    grass = skimage.data.grass()[..., None].repeat(3, 2)  # of the photographs here, the largest
    frames = np.stack([grass[t : t + 336, 2 * t : 2 * t + 336] for t in range(24)])
    budgets = [
        shown(budget, T=24, H=24, W=24, frames=frames) for budget in (None, 3072, 2048, 1024)
    ]
    assert write_page(tmp_path, *budgets).stat().st_size < 6e6


# The film.


def write_film(folder: Path, *budgets: Shown) -> np.ndarray:
    """Every frame of the film, as it comes back from its file: uint8 [F, height, width, 3]."""
    page.write_film(folder / "film.mp4", budgets)
    with Video(folder / "film.mp4") as film:
        assert film.frame_rate == 10
        return film.read(range(len(film)))


def panel(film: np.ndarray, number: int, height: int, width: int = 224) -> np.ndarray:
    """The pictures of one budget: int [F, height, width, 3]."""
    left = page.MARGIN + number * (width + page.MARGIN)
    return film[:, page.TEXT : page.TEXT + height, left : left + width].astype(int)


def middle(pictures: np.ndarray) -> np.ndarray:
    """Pictures [..., height, width, 3] without their edges, where H.264 mixes colours."""
    return pictures[..., 8:-8, 8:-8, :]


def test_a_film_shows_each_budgets_latest_frame_side_by_side(tmp_path):
    colours = [(30 * t, 250 - 30 * t, 20 * (t % 4)) for t in range(8)]
    kept = np.ones((8, 4, 4), bool)
    often = shown(None, T=8, frames=solid(*colours), kept=kept, times=0.25 + np.arange(8) / 2)
    seldom = shown(None, frames=solid(*colours[:4]), kept=kept[:4])  # one a second
    film = write_film(tmp_path, often, seldom)
    assert len(film) == 40  # four seconds
    for number, frames in ((0, 5), (1, 10)):  # of the film, for each of the budget
        for i, picture in enumerate(panel(film, number, 224)):
            assert np.abs(middle(picture) - colours[i // frames]).max() < 10


def test_a_budget_whose_first_frame_is_later_begins_with_it(tmp_path):
    kept = np.ones((2, 4, 4), bool)
    early = shown(None, T=2, frames=solid(RED, GREEN), kept=kept, times=np.array([0.0, 2.0]))
    late = early._replace(times=np.array([1.0, 3.0]))
    film = write_film(tmp_path, early, late)
    assert len(film) == 50
    for number, turn in ((0, 20), (1, 30)):
        error = np.abs(middle(panel(film, number, 224)) - RED).max((1, 2, 3))
        np.testing.assert_array_equal(error < 10, np.arange(50) < turn)


def test_a_film_shows_kept_patches_as_they_are_and_the_others_faded(tmp_path):
    one = shown(128, T=2, H=16, W=16)
    film = panel(write_film(tmp_path, one), 0, 224)
    pixels = one.kept.repeat(14, 1).repeat(14, 2)
    faded = fade(one.frames, one.kept)
    for picture, t in ((film[0], 0), (film[-1], 1)):
        error = np.abs(picture - faded[t]).mean(-1)
        assert error[pixels[t]].mean() < 12  # H.264 halves the colours; another frame is 60 off
        assert error[~pixels[t]].mean() < 12
        assert np.ptp(picture[~pixels[t]], axis=-1).mean() < 12  # grey


def test_budgets_of_different_sizes_and_lengths_share_a_film(tmp_path):
    tiny = shown(None, T=1, H=2, W=3, times=np.array([1.5]))
    large = shown(None, T=5, H=10, W=20)
    film = write_film(tmp_path, tiny, large)
    assert film.shape[0] == 50
    assert film.shape[1] % 2 == film.shape[2] % 2 == 0
    assert film.shape[2] == 2 * 280 + 3 * page.MARGIN
    enlarged = cv2.resize(tiny.frames[0], (280, 187), interpolation=cv2.INTER_NEAREST)
    assert np.abs(panel(film, 0, 187, 280) - enlarged).mean() < 4.5  # smoothed, it is 6.5 off
    assert np.abs(panel(film, 1, 140, 280)[0] - large.frames[0]).mean() < 12
    assert np.abs(panel(film, 1, 140, 280)[-1] - large.frames[-1]).mean() < 12


@pytest.mark.parametrize(("step", "frames"), [(0.01, 30), (0.5, 40), (1000.0, 200)])
def test_a_film_lasts_3_to_20_seconds(tmp_path, step, frames):
    film = write_film(tmp_path, shown(None, T=8, times=step * np.arange(8)))
    assert len(film) == frames
    # However fast it goes, the last frame is seen.
    one = cv2.resize(shown(T=8).frames[-1], (224, 224), interpolation=cv2.INTER_NEAREST)
    assert np.abs(panel(film, 0, 224)[-1] - one).mean() < 12


def test_a_film_of_one_frame_lasts_3_seconds(tmp_path):
    assert len(write_film(tmp_path, shown(9, T=1, times=np.array([7.0])))) == 30


def test_the_bar_of_the_current_frame_is_bright_and_as_high_as_its_tokens(tmp_path):
    kept = np.zeros((2, 4, 4), bool)
    kept[0] = kept[1, :2] = True
    film = write_film(tmp_path, shown(24, T=2, kept=kept))
    bars = film[:, page.TEXT + 224 : page.TEXT + 224 + page.BARS].astype(int)
    bright = np.abs(bars - page.ACCENT).max(-1) < 30
    for i, height, bar, other in (
        (0, page.BARS - 6, slice(16, 120), slice(128, None)),  # 6 px apart from the picture
        (-1, (page.BARS - 6) / 2, slice(128, 232), slice(0, 120)),
    ):
        assert np.abs(bright[i, :, bar].sum(0) - height).max() <= 2
        assert not bright[i, :, other].any()


def test_browsers_can_play_a_film_while_it_loads(tmp_path):
    path = tmp_path / "film.mp4"
    page.write_film(path, [shown()])
    with av.open(str(path)) as file:
        assert file.streams.video[0].codec_context.name == "h264"
        assert file.streams.video[0].codec_context.pix_fmt == "yuv420p"
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")  # the index comes before the pictures


# The page in a browser.


@pytest.fixture(scope="module")
def browser() -> str:
    """The first browser here that starts; a distribution may have a stub that only prints."""
    for name in ("chromium", "chromium-browser", "google-chrome", "chrome"):
        path = shutil.which(name)
        if path and not limited.run([path, "--version"]).returncode:
            return path
    pytest.skip("no Chromium or Chrome on PATH that starts; Debian's package is chromium")


def screenshot(browser: str, path: Path, width: int, *flags: str) -> np.ndarray:
    """The page at `width`, 1600 px of it: int [1600, width, 3]."""
    picture = path.with_name("screenshot.png")
    command = [
        *(browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
        *("--force-device-scale-factor=1", f"--window-size={width},1600"),
        *(f"--user-data-dir={path.with_name('profile')}", f"--screenshot={picture}"),
        *(*flags, path.as_uri()),
    ]
    done = limited.run(command)
    assert picture.exists(), done.stderr
    pixels = cv2.imread(str(picture))[..., ::-1].astype(int)
    assert pixels.shape == (1600, width, 3)
    return pixels


def mask(pixels: np.ndarray, colour: tuple[int, ...] | np.ndarray) -> np.ndarray:
    """Where `pixels` [height, width, 3] have that colour, up to JPEG: bool [height, width]."""
    return np.abs(pixels - colour).max(-1) <= 6


def box(found: np.ndarray) -> tuple[int, int, int, int]:
    """Top, bottom, left and right of what is true in `found` [height, width]."""
    rows, columns = np.nonzero(found)
    return rows.min(), rows.max(), columns.min(), columns.max()


@pytest.fixture
def two_colours(tmp_path) -> Path:
    """A page of two budgets: six red frames, all kept, and four green ones, the left half kept."""
    half = np.zeros((4, 4, 4), bool)
    half[..., :2] = True
    return write_page(
        tmp_path,
        shown(None, T=6, frames=solid(*[RED] * 6), kept=np.ones((6, 4, 4), bool)),
        shown(32, frames=solid(*[GREEN] * 4), kept=half),
    )


def test_a_wide_window_has_budgets_side_by_side(browser, two_colours):
    pixels = screenshot(browser, two_colours, 1400)
    red, green = box(mask(pixels, RED)), box(mask(pixels, GREEN))
    assert red[0] == green[0]  # frames begin at one height
    assert red[3] < 700 < green[2]
    # Frames of 56 px are enlarged.
    assert mask(pixels, RED).sum() > 6 * 100**2


def test_a_narrow_window_has_budgets_below_each_other(browser, two_colours):
    pixels = screenshot(browser, two_colours, 400)
    red, green = box(mask(pixels, RED)), box(mask(pixels, GREEN))
    assert red[1] < green[0]
    assert red[2] == green[2]
    assert red[3] - red[2] > 300  # the window is used
    assert mask(pixels, RED).sum() > 6 * 100**2


def test_dropped_patches_are_pale_on_the_screen(browser, two_colours):
    pixels = screenshot(browser, two_colours, 1400)
    pale = fade(solid(GREEN), np.zeros((1, 4, 4), bool))[0, 0, 0]
    kept, dropped = mask(pixels, GREEN), mask(pixels, pale)
    assert kept.sum() == pytest.approx(dropped.sum(), rel=0.1)  # half of each frame
    row = box(kept)[0] + 30
    (kept_from, dropped_from) = (np.flatnonzero(found[row])[0] for found in (kept, dropped))
    assert kept_from < dropped_from  # the left half


def test_a_page_is_light_or_dark_as_the_reader_likes(browser, two_colours):
    light = screenshot(browser, two_colours, 400, "--blink-settings=preferredColorScheme=1")
    dark = screenshot(browser, two_colours, 400, "--blink-settings=preferredColorScheme=0")
    assert light[0, 0].min() > 230
    assert dark[0, 0].max() < 40
    np.testing.assert_array_equal(mask(light, RED), mask(dark, RED))  # frames are the same
