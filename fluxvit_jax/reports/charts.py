"""Charts of pages: drawn by matplotlib, in light and dark colors, for wide and narrow screens."""

import base64
import html
import io
from collections.abc import Callable

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fluxvit_jax.reports.style import DARK, LIGHT

Colors = dict[str, str]
Size = tuple[int, int]  # pixels, width and height
Draw = Callable[[Colors, Size], Figure]

WIDE, NARROW = (600, 372), (380, 330)  # of a chart


def card(title: str, content: str) -> str:
    """A card of the page with a title, which is text, and a `picture`."""
    return f'<figure class="card"><h3>{html.escape(title)}</h3>\n{content}</figure>\n'


def picture(
    alt: str,
    draw: Draw,
    wide: Size = WIDE,
    narrow: Size = NARROW,
    light: Colors = LIGHT,
    dark: Colors = DARK,
) -> str:
    """A chart, each of `draw` for colors and a size. alt: text for those who cannot see it."""
    is_narrow, is_dark = "(max-width: 48rem)", "(prefers-color-scheme: dark)"
    sources = "".join(
        f'<source media="{media}" srcset="{svg(draw(colors, size))}" '
        f'width="{size[0]}" height="{size[1]}">\n'
        for media, colors, size in (
            (f"{is_narrow} and {is_dark}", dark, narrow),
            (is_narrow, light, narrow),
            (is_dark, dark, wide),
        )
    )
    return (
        f"<picture>\n{sources}"
        f'<img src="{svg(draw(light, wide))}" alt="{html.escape(alt)}" '
        f'width="{wide[0]}" height="{wide[1]}">\n</picture>'
    )


def new_figure(size: Size) -> Figure:
    """An empty figure in which a point is a pixel."""
    return Figure(figsize=(size[0] / 72, size[1] / 72), dpi=72)


def add_axes(figure: Figure, left: int, right: int, bottom: int, top: int) -> Axes:
    """Axes that leave these numbers of points on each side."""
    width, height = (72 * inches for inches in figure.get_size_inches())
    start = left / width, bottom / height
    return figure.add_axes((*start, 1 - right / width - start[0], 1 - top / height - start[1]))


def svg(figure: Figure) -> str:
    """A data URL with a figure as an SVG, the same bytes every time."""
    content = io.BytesIO()
    # Letters as outlines look the same everywhere; a fixed salt makes the same bytes every time.
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "report"}):
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(content, format="svg", transparent=True, metadata=no_metadata)
    return "data:image/svg+xml;base64," + base64.b64encode(content.getvalue()).decode()


def style(axes: Axes, colors: Colors, across: str, up: str) -> None:
    """The style of charts and heat maps; names of the axes below, and above on the left."""
    axes.set_facecolor("none")
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(colors["quiet"])
    axes.tick_params(length=0, labelsize=11, labelcolor=colors["quiet"], pad=5)
    axes.set_xlabel(across, color=colors["quiet"], fontsize=11, labelpad=6)
    axes.set_title(up, loc="left", color=colors["quiet"], fontsize=11, pad=8)
