"""The confusion matrix as a picture, legible for few classes and for hundreds."""

import io
import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fluxvit_jax.reports.charts import Colors, Size, add_axes, card, new_figure, picture, style
from fluxvit_jax.reports.style import LIGHT

NAMED = 30  # most classes whose names stand beside their rows
COUNTED = 12  # most classes whose cells have their counts in them
WIDE, NARROW = (600, 520), (380, 380)  # pixels
LETTER = 6.2  # points that a letter of a name is wide
PNG_DPI, PNG_PIXELS = 150, 1200  # pixels: the least height


def section_card(confusion: np.ndarray, names: Sequence[str]) -> str:
    """The card of the page with the matrix. confusion: int [C, C + 1], see `Results.confusion`."""

    def drawn(colors: Colors, size: Size) -> Figure:
        return _figure(confusion, names, colors, size)

    alt = f"Confusion matrix of {len(names):,} classes"
    return card("Predicted class by true class", picture(alt, drawn, WIDE, NARROW))


def png(confusion: np.ndarray, names: Sequence[str]) -> bytes:
    """The matrix as a PNG file in light colors, with at least two pixels a class."""
    side = max(PNG_PIXELS * 72 // PNG_DPI, len(names) + 80)
    figure = _figure(confusion, names, LIGHT, (side + side // 8, side))
    figure.set_facecolor("white")
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=PNG_DPI, metadata={"Software": None})
    return content.getvalue()


def _figure(confusion: np.ndarray, names: Sequence[str], colors: Colors, size: Size) -> Figure:
    figure, classes = new_figure(size), len(names)
    letters = min(size[0] // 24, max(map(len, names))) if classes <= NAMED else 4
    axes = add_axes(figure, left=24 + round(LETTER * letters), right=10, bottom=42, top=28)
    shares = confusion[:, :classes] / np.maximum(1, confusion.sum(1, keepdims=True))
    colormap = LinearSegmentedColormap.from_list("accent", (colors["card"], colors["accent"]))
    # By the root: single confusions are seen among hundreds of classes.
    image = np.sqrt(shares)
    axes.imshow(
        _fit(image, int(min(axes.bbox.size))),
        cmap=colormap,
        vmin=0,
        vmax=1,
        aspect="auto",
        interpolation="none",
        extent=(-0.5, classes - 0.5, classes - 0.5, -0.5),
    )
    style(axes, colors, "predicted class", "true class")
    axes.spines["bottom"].set_visible(False)
    if classes <= NAMED:
        texts = [f"{_cut(name, letters)} {i}" for i, name in enumerate(names)]
        axes.set_yticks(range(classes), texts, fontsize=10, parse_math=False)
        axes.set_xticks(range(classes), [str(i) for i in range(classes)], fontsize=10)
    else:
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(8, integer=True))
    if classes <= COUNTED:
        _write_counts(axes, confusion, image, colors)
    return figure


def _fit(image: np.ndarray, pixels: int) -> np.ndarray:
    """The image, or where it is larger than so many pixels, the maxima of its blocks."""
    starts = np.arange(0, len(image), math.ceil(len(image) / pixels))
    return np.maximum.reduceat(np.maximum.reduceat(image, starts, axis=0), starts, axis=1)


def _write_counts(axes: Axes, confusion: np.ndarray, image: np.ndarray, colors: Colors) -> None:
    for row, column in zip(*np.nonzero(image), strict=True):
        axes.text(
            column,
            row,
            f"{confusion[row, column]:,}",
            ha="center",
            va="center",
            fontsize=10,
            color=colors["card" if image[row, column] > 0.6 else "ink"],
        )


def _cut(text: str, letters: int) -> str:
    return text if len(text) <= letters else text[: max(1, letters - 3)] + "..."
