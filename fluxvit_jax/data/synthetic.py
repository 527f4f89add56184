"""The demo's data set: photographs that ship inside packages, filmed under twelve motions.

    python -m fluxvit_jax.data.synthetic --out=DIR [--train=N] [--validation=M] [--seed=0]

A clip shows two flat worlds, one over the other: a photograph, and scattered cut-outs of another
photograph. Both are endless (the photograph by mirroring, the cut-outs by repeating). The class says
how the two move on screen; everything else (which part is seen, how large, at what tilt, which
colours) is drawn alike for every class at the middle of the clip, so a single frame tells nothing.
"""

import importlib.util
import math
from functools import cache
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from fluxvit_jax.errors import UserError

# In alphabetical order, so that labels are the same read from the lists or from the class folders.
# The camera pans and zooms (under pan_left the picture moves right); in rotate_clockwise the
# picture turns clockwise on screen.
MOTIONS: tuple[str, ...] = (
    "object_over_moving",
    "object_over_still",
    "pan_down",
    "pan_left",
    "pan_right",
    "pan_up",
    "reversal",
    "rotate_clockwise",
    "rotate_counterclockwise",
    "start_stop",
    "zoom_in",
    "zoom_out",
)
PHOTOGRAPHS = {
    "train": (
        "sklearn/datasets/images/flower.jpg",
        "matplotlib/mpl-data/sample_data/grace_hopper.jpg",
        "skimage/data/brick.png",
        "skimage/data/camera.png",
        "skimage/data/grass.png",
        "skimage/data/gravel.png",
        "skimage/data/hubble_deep_field.jpg",
        "skimage/data/logo.png",
        "skimage/data/moon.png",
        "skimage/data/motorcycle_left.png",
        "skimage/data/page.png",
        "skimage/data/retina.jpg",
        "skimage/data/rocket.jpg",
        "skimage/data/text.png",
    ),
    "validation": (
        "sklearn/datasets/images/china.jpg",
        "skimage/data/astronaut.png",
        "skimage/data/chelsea.png",
        "skimage/data/coffee.png",
        "skimage/data/coins.png",
        "skimage/data/ihc.png",
    ),
}
# Source pixels a frame pixel may span before the photograph is shrunk first (else it would alias).
MAX_STRIDE = 1.3


class Path2D(NamedTuple):
    """How a flat world moves on screen, relative to the middle of the clip; each float64 [T]."""

    x: np.ndarray  # right, in short sides of the frame
    y: np.ndarray  # down, in short sides of the frame
    turn: np.ndarray  # clockwise, radians
    zoom: np.ndarray  # natural logarithm of the magnification


def photographs(split: str) -> list[np.ndarray]:
    """The photographs of "train" or "validation": uint8 RGB [H, W, 3] of various sizes.

    Raises UserError when a package that ships them is not installed.
    """
    return [_photograph(name) for name in PHOTOGRAPHS[split]]


@cache
def _photograph(name: str) -> np.ndarray:
    package, inside = name.split("/", 1)
    spec = importlib.util.find_spec(package)
    path = Path(spec.submodule_search_locations[0]) / inside if spec else None
    if path is None or not path.is_file():
        raise UserError(f"{name}: photograph not found; install fluxvit_jax[demo]")
    image = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_COLOR_RGB)
    if "retina" in name:  # a disc on black: keep the square inside it
        image = image[240:-240, 240:-240]
    height, width = image.shape[:2]
    shrink = 480 / min(height, width)
    if shrink < 1:
        size = (round(width * shrink), round(height * shrink))
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    low, high = np.percentile(image, (1, 99))
    return np.clip((image - low) * (255 / (high - low)), 0, 255).astype(np.uint8)


def render(
    motion: str,
    photo: np.ndarray,
    rng: np.random.Generator,
    frames: int,
    size: tuple[int, int],
    cutout_photo: np.ndarray | None = None,
) -> np.ndarray:
    """One clip of `motion` (of MOTIONS): uint8 RGB [frames, height, width, 3] for size (height, width).

    photo is uint8 [H, W, 3]; the cut-outs come from cutout_photo (by default from photo itself).
    Everything random is drawn from rng, in an order that does not depend on motion.
    """
    still, moving = _paths(motion, rng, frames)
    ground = _recolour(photo, rng)
    cutouts = _cutouts(_recolour(photo if cutout_photo is None else cutout_photo, rng), rng, size)
    start, span, tilt = _view(ground, rng)
    clip = _film(ground, still, size, start, span, tilt, cv2.BORDER_REFLECT)
    tile = cutouts.shape[0]
    start = rng.uniform(0, tile, 2)
    span = tile / CUTOUT_TILE
    layer = _film(cutouts, moving, size, start, span, rng.uniform(-np.pi, np.pi), cv2.BORDER_WRAP)
    alpha = layer[..., 3:].astype(np.uint16)
    return ((clip * (255 - alpha) + layer[..., :3] * alpha + 127) // 255).astype(np.uint8)


def _paths(motion: str, rng: np.random.Generator, frames: int) -> tuple[Path2D, Path2D]:
    """The paths of the photograph and of the cut-outs; all random numbers are drawn every time."""
    time = (np.arange(frames) + 0.5) / frames
    distance = rng.uniform(0.5, 1.0)  # of the short side, over the clip
    heading = rng.uniform(-np.pi, np.pi)
    wobble = rng.uniform(-0.2, 0.2)
    bend = rng.uniform(-0.25, 0.25)
    magnify = math.log(rng.uniform(1.6, 2.3))
    turn = math.radians(rng.uniform(50, 110))
    corner = rng.uniform(0.4, 0.6)
    aside = rng.uniform(0.6, 1.4) * np.pi
    steady = time - 0.5 + bend * (time * (1 - time) - 0.25)
    zero = np.zeros(frames)

    def slide(along: np.ndarray, angle: float, length: float = distance) -> Path2D:
        return Path2D(length * along * np.cos(angle), length * along * np.sin(angle), zero, zero)

    here = Path2D(zero, zero, zero, zero)
    pans = {"pan_left": 0.0, "pan_up": np.pi / 2, "pan_right": np.pi, "pan_down": -np.pi / 2}
    if motion in pans:
        path = slide(steady, pans[motion] + wobble)
    elif motion == "zoom_in":
        path = here._replace(zoom=magnify * steady)
    elif motion == "zoom_out":
        path = here._replace(zoom=-magnify * steady)
    elif motion == "rotate_clockwise":
        path = here._replace(turn=turn * steady)
    elif motion == "rotate_counterclockwise":
        path = here._replace(turn=-turn * steady)
    elif motion == "start_stop":
        path = slide(np.minimum(time / corner, 1) - 0.5, heading)
    elif motion == "reversal":
        path = slide(0.5 - np.abs(time - corner) / max(corner, 1 - corner), heading)
    elif motion == "object_over_still":
        return here, slide(steady, heading, distance + 0.1)
    elif motion == "object_over_moving":
        return slide(steady, heading), slide(steady, heading + aside, distance + 0.1)
    else:
        raise ValueError(f"unknown motion {motion!r}; one of {', '.join(MOTIONS)}")
    return path, path


def _film(
    world: np.ndarray,
    path: Path2D,
    size: tuple[int, int],
    start: np.ndarray,
    span: float,
    tilt: float,
    border: int,
) -> np.ndarray:
    """Frames of a flat world [H, W, C] -> uint8 [T, height, width, C].

    At the middle of the clip the frame is centred on pixel start (x, y) of the world, its short
    side spans `span` pixels, and the world is turned clockwise by tilt.
    """
    height, width = size
    short = min(size)
    stride = span / short * math.exp(-path.zoom.min())
    if stride > MAX_STRIDE and border == cv2.BORDER_REFLECT:
        scale = MAX_STRIDE / stride
        shrunk = (round(world.shape[1] * scale), round(world.shape[0] * scale))
        world = cv2.resize(world, shrunk, interpolation=cv2.INTER_AREA)
        start, span = start * scale, span * scale
    angle = -(path.turn + tilt)
    factor = span / short * np.exp(-path.zoom)
    cos, sin = factor * np.cos(angle), factor * np.sin(angle)
    x = (width - 1) / 2 + path.x * short
    y = (height - 1) / 2 + path.y * short
    clip = np.empty((len(x), height, width, world.shape[2]), np.uint8)
    for t in range(len(x)):
        to_world = np.array(
            [
                [cos[t], -sin[t], start[0] - cos[t] * x[t] + sin[t] * y[t]],
                [sin[t], cos[t], start[1] - sin[t] * x[t] - cos[t] * y[t]],
            ]
        )
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        cv2.warpAffine(world, to_world, (width, height), clip[t], flags, border)
    return clip


def _view(world: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, float, float]:
    """A view of the photograph: centre (x, y), pixels the frame's short side spans, tilt.

    Of a few places drawn at random the one with most texture in every direction is taken: over
    blank sky no motion shows.
    """
    height, width = world.shape[:2]
    span = min(height, width) * math.exp(rng.uniform(math.log(0.35), math.log(0.7)))
    tilt = rng.uniform(-np.pi, np.pi)
    places = rng.uniform((0, 0), (width, height), (4, 2))
    gray = cv2.cvtColor(world, cv2.COLOR_RGB2GRAY)
    texture = []
    for x, y in places:
        half = span * 0.6
        window = gray[
            int(max(y - half, 0)) : int(y + half) + 1, int(max(x - half, 0)) : int(x + half) + 1
        ]
        small = cv2.resize(window, (24, 24), interpolation=cv2.INTER_AREA).astype(np.float32)
        dy, dx = np.gradient(small)
        texture.append(np.linalg.eigvalsh(np.cov(dx.ravel(), dy.ravel()))[0])
    return places[int(np.argmax(texture))], span, tilt


def _recolour(photo: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The photograph in other colours: channels mixed, brightness curve bent, perhaps negative."""
    order = rng.permutation(3)
    gain, gamma = rng.uniform(0.6, 1.0, 3), math.exp(rng.uniform(-0.4, 0.4))
    negative = rng.random() < 0.3
    flip = rng.random() < 0.5
    table = np.linspace(0, 1, 256)[:, None] ** gamma
    table = gain * table + (1 - gain) * rng.uniform(0, 1, 3)
    table = np.round(255 * (1 - table if negative else table)).astype(np.uint8)
    image = np.ascontiguousarray(photo[:, ::-1] if flip else photo)[:, :, order]
    return cv2.LUT(image, table.reshape(1, 256, 3))


# The cut-outs lie in a square of CELLS x CELLS cells that repeats; lengths in short sides of the
# frame. One to three of them are in view.
CELLS = 2
CUTOUT_TILE = 1.6


def _cutouts(photo: np.ndarray, rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """A square of cut-outs on nothing: uint8 RGBA [side, side, 4]."""
    side = round(CUTOUT_TILE * min(size) * 1.2)
    cell = side / CELLS
    tile = np.zeros((side, side, 4), np.uint8)
    for row in range(CELLS):
        for column in range(CELLS):
            radius = rng.uniform(0.19, 0.26) * cell
            room = cell / 2 - radius - 2
            centre = (np.array([column, row]) + 0.5) * cell + rng.uniform(-room, room, 2)
            corners = rng.integers(3, 9)
            angles = np.sort(np.arange(corners) + rng.uniform(-0.25, 0.25, corners))
            angles = angles * (2 * np.pi / corners) + rng.uniform(0, 2 * np.pi)
            outline = centre + radius * np.stack([np.cos(angles), np.sin(angles)], -1)
            points = np.round(outline * 16).astype(np.int32)
            mask = np.zeros((side, side), np.uint8)
            cv2.fillPoly(mask, [points], 255, cv2.LINE_AA, shift=4)
            patch = int(2 * radius) + 3
            from_size = int(min(photo.shape[:2]) * rng.uniform(0.15, 0.4))
            top = rng.integers(0, photo.shape[0] - from_size)
            left = rng.integers(0, photo.shape[1] - from_size)
            source = photo[top : top + from_size, left : left + from_size]
            source = cv2.resize(source, (patch, patch), interpolation=cv2.INTER_AREA)
            y, x = (int(c - radius) - 1 for c in centre[::-1])
            y, x = np.clip([y, x], 0, side - patch)
            tile[y : y + patch, x : x + patch, :3] = source
            edge = rng.choice([0, 255])
            cv2.polylines(tile, [points], True, (int(edge),) * 3 + (0,), 3, cv2.LINE_AA, shift=4)
            tile[..., 3] = np.maximum(tile[..., 3], mask)
    return tile
