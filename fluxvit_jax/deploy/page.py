"""What `--mode=predict` shows of one video: a page of its frames at each budget, and a film.

Both show the pixels that the network saw, with the patches that were dropped faded.
"""

import base64
import html
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import av
import cv2
import numpy as np

from fluxvit_jax.grids import PATCH
from fluxvit_jax.reports import style

if TYPE_CHECKING:
    from fluxvit_jax.deploy.timeline import Timeline

# A dropped patch is its grey, mixed with this level. A middle level stands out from kept patches
# that are dark as well as from those that are bright, and from a page of either colour.
FADED_SHARE, FADED_LEVEL = 0.4, 200

# At 85 a page of four budgets of 24 frames of 336 px stays below 6 MB. Colour at full resolution:
# halved, as JPEG does by default, it would run from kept patches into their faded neighbours.
JPEG = (
    *(cv2.IMWRITE_JPEG_QUALITY, 85),
    *(cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444),
)
TINY = 112  # narrower frames are enlarged as blocks, here and in the page; smoothed, they blur

FILM_RATE = 10  # frames a second
FILM_SECONDS = 3, 20  # shortest and longest film
PANEL = 224  # pixels, the least width of a budget: its texts fit in
TEXT, BARS, MARGIN = 28, 36, 12  # pixels
GROUND, INK, QUIET, ACCENT = (22, 24, 29), (232, 234, 237), (84, 90, 101), (122, 166, 255)

STYLE = (
    style.colors(style.LIGHT, style.DARK)
    + style.BASE
    + """
h2, .time { font-size: 1.25rem; font-weight: 700; }
ol { list-style: none; }
.legend { color: var(--quiet); font-size: 0.875rem; max-width: 48rem; margin: 0.35rem 0 1.25rem; }
.budgets {
  display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 19rem), 1fr));
}
/* Budgets share the rows of heading, classes and frames, so that frames begin at one height. */
.budget {
  display: grid; grid-row: span 3; grid-template-rows: subgrid; gap: 1rem;
  grid-template-columns: minmax(0, 1fr);
  background: var(--card); border: 1px solid var(--line); border-radius: 0.75rem; padding: 1rem;
}
.row { display: flex; justify-content: space-between; gap: 0.75rem; }
.row :last-child { white-space: nowrap; }
.budget > :not(.frames) { max-width: 36rem; }
.facts { color: var(--quiet); font-size: 0.875rem; }
.classes { display: grid; gap: 0.5rem; align-content: start; }
.classes li:first-child { font-weight: 600; }
.bar { height: 0.375rem; margin-top: 0.2rem; border-radius: 1rem; background: var(--line); }
.bar div { height: 100%; border-radius: 1rem; background: var(--accent); }
.frames {
  display: grid; gap: 0.875rem 0.625rem; align-content: start;
  grid-template-columns: repeat(auto-fit, minmax(7.5rem, 1fr));
}
.frames li { max-width: 21rem; }
.frames .row { flex-wrap: wrap; gap: 0 0.75rem; font-size: 0.75rem; color: var(--quiet); }
img { display: block; width: 100%; height: auto; border-radius: 0.25rem; margin-bottom: 0.25rem; }
.tiny { image-rendering: pixelated; }
"""
)


class Shown(NamedTuple):
    """A video at one budget: what the network saw of it, and what it answered."""

    budget: int | None  # tokens asked for; None: every token
    frames: np.ndarray  # uint8 [T, 14 H, 14 W, 3], what the network saw
    kept: np.ndarray  # bool [T, H, W]
    times: np.ndarray  # float [T], seconds in the video
    top: Sequence[tuple[str, float]]  # class names with probabilities, likeliest first
    head: int  # which pooling head and classifier answered
    seconds: float  # time of one forward pass, once compiled


def fade(frames: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Frames uint8 [T, 14 H, 14 W, 3], grey and pale where `kept` [T, H, W] is false.

    Raises ValueError when the shapes do not belong together.
    """
    T, H, W = kept.shape
    if frames.shape != (T, PATCH * H, PATCH * W, 3):
        raise ValueError(f"frames of {frames.shape} do not divide into patches of {kept.shape}")
    lines = frames.reshape(-1, PATCH * W, 3)  # one tall picture
    grey = cv2.cvtColor(lines, cv2.COLOR_RGB2GRAY).reshape(*frames.shape[:3], 1)
    pale = np.rint(FADED_SHARE * grey + (1 - FADED_SHARE) * FADED_LEVEL).astype(np.uint8)
    pixels = kept.repeat(PATCH, axis=1).repeat(PATCH, axis=2)[..., None]
    return np.where(pixels, frames, pale)


def write_page(
    path: Path, title: str, shown: Sequence[Shown], timelines: "Sequence[Timeline]" = ()
) -> None:
    """Writes one HTML file that needs no other: the budgets side by side, under `title`.

    timelines: of the video in windows, shown above.
    """
    css, above = STYLE, ""
    if timelines:
        from fluxvit_jax.deploy import timeline  # imports matplotlib

        css, above = STYLE + timeline.CSS, timeline.section(timelines)
    name = html.escape(title)
    budgets = "".join(_budget(one) for one in shown)
    page = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name}</title>
<style>{css}</style>
</head>
<body>
<h1>{name}</h1>
{above}<p class="legend">Kept patches are in full colour, dropped ones pale and grey. The bar under
a frame is its share of tokens, full for the frame that keeps most at that budget. The time is that
of one forward pass, once compiled.</p>
<main class="budgets">
{budgets}</main>
</body>
</html>
"""
    path.write_text(page, encoding="utf-8")


def _budget(one: Shown) -> str:
    """The column of one budget."""
    T, height, width, _ = one.frames.shape
    grid = f"{T} {'frame' if T == 1 else 'frames'} of {width} x {height} px"
    kept = f"{one.kept.sum():,} of {one.kept.size:,} tokens kept"
    milliseconds = f"{1000 * one.seconds:.1f} ms"
    return f"""<section class="budget">
<div>
<div class="row"><h2>{_budget_name(one.budget)}</h2> <p class="time">{milliseconds}</p></div>
<p class="facts">{kept}<br>{grid}, head {one.head}</p>
</div>
<ol class="classes">
{"".join(_class(name, probability) for name, probability in one.top)}</ol>
<ol class="frames">
{"".join(_frames(one))}</ol>
</section>
"""


def _budget_name(budget: int | None) -> str:
    return "all tokens" if budget is None else f"{budget:,} tokens"


def _class(name: str, probability: float) -> str:
    label = f"<span>{html.escape(name)}</span> <span>{100 * probability:.1f} %</span>"
    return f'<li><div class="row">{label}</div>{_bar(probability)}</li>\n'


def _frames(one: Shown) -> Iterator[str]:
    """An item of the list for each frame: picture, time, tokens, and their bar."""
    _, H, W = one.kept.shape
    height, width = one.frames.shape[1:3]
    size = f'width="{width}" height="{height}"' + (' class="tiny"' if width < TINY else "")
    for picture, time, count, share in zip(
        fade(one.frames, one.kept), one.times, *_counts(one.kept), strict=True
    ):
        alt = f"frame at {time:.2f} s, {count} of {H * W} patches kept"
        label = f"<span>{time:.2f} s</span> <span>{count} of {H * W}</span>"
        yield (
            f'<li><img {size} alt="{alt}" src="{data_uri(picture)}">'
            f'<div class="row">{label}</div>{_bar(share)}</li>\n'
        )


def _counts(kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of each frame of `kept` [T, H, W], and their share of the fullest frame's: [T]."""
    counts = kept.sum((1, 2))
    return counts, counts / max(1, counts.max())


def _bar(share: float) -> str:
    return f'<div class="bar"><div style="width:{100 * share:.1f}%"></div></div>'


def data_uri(picture: np.ndarray) -> str:
    """A picture uint8 [height, width, 3] as an address that holds all of it."""
    _, data = cv2.imencode(".jpg", picture[..., ::-1], JPEG)
    return "data:image/jpeg;base64," + base64.b64encode(data.tobytes()).decode()


def write_film(path: Path, shown: Sequence[Shown]) -> None:
    """Writes an H.264 mp4 in which the budgets play side by side over the video's time.

    Each shows its latest frame, or its first where that is still to come. The film lasts as long
    as what was sampled, slowed down or sped up to be within `FILM_SECONDS`.
    """
    width = max(PANEL, *(one.frames.shape[2] for one in shown))
    panels = [_panels(one, width) for one in shown]
    lefts = [MARGIN + i * (width + MARGIN) for i in range(len(shown))]
    sides = max(panel.shape[1] for panel in panels) + MARGIN, lefts[-1] + width + MARGIN
    height, whole = (side + side % 2 for side in sides)  # yuv420p wants them even
    canvas = np.full((height, whole, 3), GROUND, np.uint8)
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as file:
        stream = file.add_stream("libx264", rate=FILM_RATE, options={"crf": "18"})
        stream.height, stream.width, stream.pix_fmt = height, whole, "yuv420p"
        for moment in _moments([one.times for one in shown]):
            for one, panel, left in zip(shown, panels, lefts, strict=True):
                now = max(0, np.searchsorted(one.times, moment, "right") - 1)
                canvas[: panel.shape[1], left : left + width] = panel[now]
            file.mux(stream.encode(av.VideoFrame.from_ndarray(canvas, format="rgb24")))
        file.mux(stream.encode(None))


def _moments(times: Sequence[np.ndarray]) -> np.ndarray:
    """Times of the video that the film shows, evenly spaced; `times` are the budgets' [T]."""
    first = min(own[0] for own in times)
    # The last frame stands as long as those before it did on average.
    last = max(own[-1] + (own[-1] - own[0]) / max(1, len(own) - 1) for own in times)
    count = round(FILM_RATE * np.clip(last - first, *FILM_SECONDS))
    return first + (last - first) * np.arange(count) / count


def _panels(one: Shown, width: int) -> np.ndarray:
    """One budget's part of the film for each of its frames: uint8 [T, height, width, 3].

    Budget and time are above the picture, below it the tokens of every frame as bars, this
    frame's bright and in figures.
    """
    T, rows, columns, _ = one.frames.shape
    height = round(rows * width / columns)
    interpolation = cv2.INTER_NEAREST if columns < TINY else cv2.INTER_LINEAR
    panels = np.full((T, TEXT + height + BARS + TEXT, width, 3), GROUND, np.uint8)
    counts, shares = _counts(one.kept)
    edges = np.linspace(0, width, T + 1).astype(int)
    foot = TEXT + height + BARS
    for t, (panel, picture) in enumerate(zip(panels, fade(one.frames, one.kept), strict=True)):
        panel[TEXT : TEXT + height] = cv2.resize(
            picture, (width, height), interpolation=interpolation
        )
        for other, (share, left, right) in enumerate(
            zip(shares, edges[:-1], edges[1:], strict=True)
        ):
            top = foot - round(share * (BARS - 6))
            panel[top:foot, left : max(left + 1, right - 1)] = ACCENT if other == t else QUIET
        _write(panel, _budget_name(one.budget), TEXT)
        _write(panel, f"{one.times[t]:.2f} s", TEXT, right=True)
        _write(panel, f"{counts[t]} of {one.kept[t].size} patches", foot + TEXT)
    return panels


def _write(panel: np.ndarray, text: str, bottom: int, right: bool = False) -> None:
    """Writes into the line above `bottom`, from the left or up to the right edge."""
    font, scale = cv2.FONT_HERSHEY_SIMPLEX, 0.5
    (width, _), _ = cv2.getTextSize(text, font, scale, 1)
    left = panel.shape[1] - width if right else 0
    cv2.putText(panel, text, (left, bottom - 9), font, scale, INK, 1, cv2.LINE_AA)
