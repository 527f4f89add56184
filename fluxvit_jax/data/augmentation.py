"""Training augmentation on the host: uint8 clips in, uint8 clips out, one function per step.

Every step treats all frames of a clip alike. RandAugment has the operations and magnitudes of timm
("rand-m7-n4-mstd0.5-inc1") and the pixel results of Pillow, computed with OpenCV and lookup tables;
tests/data/test_augmentation.py compares them. Augmentations in patch space (erasing, mixup, cutmix)
run on the device instead.

No step writes into its input frames, so that one decoded video can serve several clips.
"""

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import cv2
import ml_collections
import numpy as np

from fluxvit_jax.config.randaugment import RandAugment, parse_randaugment
from fluxvit_jax.data.frame_sampling import resized_size

MAX_SHORT_SIDE = 320  # pixels; the official data are stored at this short side
MULTI_SCALES = (1.0, 0.875, 0.75, 0.66)  # official pre-training crops
FILL = 128  # gray beyond the borders of a warped frame, as in timm

IDENTITY = np.arange(256)


class Box(NamedTuple):
    """A rectangle of a frame in pixels."""

    y: int
    x: int
    height: int
    width: int


def augment_clip(
    frames: np.ndarray, size: int, config: ml_collections.ConfigDict, rng: np.random.Generator
) -> np.ndarray:
    """A training clip: RandAugment, random crop and flip, in the official order.

    frames: uint8 [T, height, width, 3], RGB. size: height and width of the result in pixels.
    config: the section `data.augment` (crop, scale, ratio, flip, randaugment).
    Returns uint8 [T, size, size, 3].
    """
    frames = limit_short_side(frames)
    if config.randaugment:
        frames = rand_augment(frames, parse_randaugment(config.randaugment), rng)
    height, width = frames.shape[1:3]
    if config.crop == "multi_scale":
        box = multi_scale_crop(height, width, rng)
    else:
        box = random_resized_crop(height, width, config.scale, config.ratio, rng)
    frames = resize_clip(crop(frames, box), size, size)
    return flip(frames) if rng.random() < config.flip else frames


# --- Size and crop --------------------------------------------------------------------------------


def resize_clip(
    frames: np.ndarray, height: int, width: int, interpolation: int = cv2.INTER_LINEAR
) -> np.ndarray:
    """Frames uint8 [T, h, w, 3] resized to [T, height, width, 3].

    By default linear without antialiasing, as in the official training and test code.
    """
    if frames.shape[1:3] == (height, width):
        return frames
    resized = np.empty((len(frames), height, width, 3), np.uint8)
    for frame, target in zip(frames, resized, strict=True):
        cv2.resize(frame, (width, height), dst=target, interpolation=interpolation)
    return resized


def limit_short_side(frames: np.ndarray) -> np.ndarray:
    """Frames [T, h, w, 3] scaled down to a short side of at most 320."""
    height, width = frames.shape[1:3]
    if min(height, width) <= MAX_SHORT_SIDE:
        return frames
    height, width = resized_size(height, width, MAX_SHORT_SIDE)
    return resize_clip(frames, height, width, cv2.INTER_AREA)


def crop(frames: np.ndarray, box: Box) -> np.ndarray:
    """The rectangle `box` of frames [T, h, w, 3]: a view [T, box.height, box.width, 3].

    Raises ValueError when the box leaves the frames.
    """
    height, width = frames.shape[1:3]
    bottom, right = box.y + box.height, box.x + box.width
    if box.y < 0 or box.x < 0 or bottom > height or right > width:
        raise ValueError(f"{box} leaves frames of {height} x {width} px")
    return frames[:, box.y : bottom, box.x : right]


def crop_view(frames: np.ndarray, size: int, y: int, x: int) -> np.ndarray:
    """The square spatial view of `size` pixels at (y, x): an array view [T, size, size, 3]."""
    return crop(frames, Box(y, x, size, size))


def random_resized_crop(
    height: int,
    width: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    rng: np.random.Generator,
) -> Box:
    """A crop of random area (a fraction `scale` of the frame) and aspect ratio, width / height.

    torchvision's RandomResizedCrop: ten tries, then the largest central crop that the range of
    aspect ratios allows.
    """
    low, high = ratio
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(low), math.log(high)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            y, x = rng.integers(height - h, endpoint=True), rng.integers(width - w, endpoint=True)
            return Box(int(y), int(x), h, w)
    w, h = min(width, round(height * high)), min(height, round(width / low))
    return Box((height - h) // 2, (width - w) // 2, h, w)


def multi_scale_crop(height: int, width: int, rng: np.random.Generator) -> Box:
    """A crop of scale 1, .875, .75 or .66 of the short side, at one of 13 fixed positions.

    The two sides differ by at most one scale; the positions are corners, middles of the sides, the
    center, and the centers of the quarters (TSN's MultiScaleCrop with all its fixed positions).
    """
    sides = [int(min(height, width) * scale) for scale in MULTI_SCALES]
    sizes = [
        (h, w) for (i, h), (j, w) in itertools.product(enumerate(sides), repeat=2) if abs(i - j) < 2
    ]
    positions = [*itertools.product((0, 2, 4), repeat=2), *itertools.product((1, 3), repeat=2)]
    h, w = sizes[rng.integers(len(sizes))]
    down, right = positions[rng.integers(len(positions))]
    return Box(down * ((height - h) // 4), right * ((width - w) // 4), h, w)


def flip(frames: np.ndarray) -> np.ndarray:
    """Frames [T, h, w, 3] with left and right exchanged."""
    return np.ascontiguousarray(frames[:, :, ::-1])


# --- RandAugment ----------------------------------------------------------------------------------


def rand_augment(frames: np.ndarray, policy: RandAugment, rng: np.random.Generator) -> np.ndarray:
    """Apply `policy.layers` random operations, each with its probability, to [T, h, w, 3]."""
    operations = INCREASING_OPERATIONS if policy.increasing else PLAIN_OPERATIONS
    names = list(operations)
    for choice in rng.integers(len(names), size=policy.layers):
        if rng.random() > policy.probability:
            continue
        magnitude = min(10.0, max(0.0, rng.normal(policy.magnitude, policy.std)))
        sign = -1 if rng.random() > 0.5 else 1
        frames = operations[names[choice]](frames, magnitude / 10, sign)
    return frames


def auto_contrast(frames: np.ndarray) -> np.ndarray:
    """Stretch each channel of each frame to the full range."""
    return _map_channels(frames, _stretching_table)


def equalize(frames: np.ndarray) -> np.ndarray:
    """Flatten the histogram of each channel of each frame."""
    return _map_channels(frames, _equalizing_table)


def invert(frames: np.ndarray) -> np.ndarray:
    """Negative of the frames."""
    return ~frames


def posterize(frames: np.ndarray, bits: int) -> np.ndarray:
    """Keep the `bits` highest bits of each value."""
    return frames & np.uint8(256 - 2 ** (8 - bits))


def solarize(frames: np.ndarray, threshold: int) -> np.ndarray:
    """Invert the values from `threshold` on."""
    return _map(frames, np.where(threshold > IDENTITY, IDENTITY, 255 - IDENTITY))


def solarize_add(frames: np.ndarray, amount: int) -> np.ndarray:
    """Add `amount` to the values below 128."""
    return _map(frames, np.where(IDENTITY < 128, np.minimum(IDENTITY + amount, 255), IDENTITY))


def brightness(frames: np.ndarray, factor: float) -> np.ndarray:
    """Blend with black; factor 1 changes nothing, 0 gives black."""
    return _map(frames, _blending_table(0, factor))


def contrast(frames: np.ndarray, factor: float) -> np.ndarray:
    """Blend each frame with its mean gray; factor 1 changes nothing, 0 gives plain gray."""
    means = [int(gray.mean() + 0.5) for gray in _gray(frames)]
    pairs = zip(frames, means, strict=True)
    return np.stack([cv2.LUT(frame, _blending_table(mean, factor)) for frame, mean in pairs])


def color(frames: np.ndarray, factor: float) -> np.ndarray:
    """Blend with the grayscale frames; factor 1 changes nothing, 0 gives gray."""
    gray = cv2.cvtColor(_gray(frames).reshape(-1, frames.shape[2]), cv2.COLOR_GRAY2RGB)
    return _blend(gray, frames, factor)


def sharpness(frames: np.ndarray, factor: float) -> np.ndarray:
    """Blend with the smoothed frames; factor 1 changes nothing, 0 smooths, 2 sharpens."""
    smooth = frames.copy()  # the outermost pixels stay as they are
    kernel = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13
    for frame, target in zip(frames, smooth, strict=True):
        target[1:-1, 1:-1] = cv2.filter2D(frame, -1, kernel)[1:-1, 1:-1]
    return _blend(smooth, frames, factor)


def rotate(frames: np.ndarray, degrees: float) -> np.ndarray:
    """Rotate counterclockwise about the center."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return _warp(frames, np.array([[cos, -sin], [sin, cos]]), about_center=True)


def shear(frames: np.ndarray, x: float = 0.0, y: float = 0.0) -> np.ndarray:
    """Shift rows by `x` pixels for each pixel down, columns by `y` for each pixel right."""
    return _warp(frames, np.array([[1, x], [y, 1]]))


def translate(frames: np.ndarray, x: float = 0.0, y: float = 0.0) -> np.ndarray:
    """Move left by the share `x` of the width and up by the share `y` of the height."""
    height, width = frames.shape[1:3]
    return _warp(frames, np.eye(2), (x * width, y * height))


# An operation takes frames, a level in 0..1 and a sign. The numbers are timm's.
_Operation = Callable[[np.ndarray, float, int], np.ndarray]
_COMMON: dict[str, _Operation] = {
    "auto_contrast": lambda frames, level, sign: auto_contrast(frames),
    "equalize": lambda frames, level, sign: equalize(frames),
    "invert": lambda frames, level, sign: invert(frames),
    "rotate": lambda frames, level, sign: rotate(frames, sign * level * 30),
    "solarize_add": lambda frames, level, sign: solarize_add(frames, int(level * 110)),
    "shear_x": lambda frames, level, sign: shear(frames, x=sign * level * 0.3),
    "shear_y": lambda frames, level, sign: shear(frames, y=sign * level * 0.3),
    "translate_x": lambda frames, level, sign: translate(frames, x=sign * level * 0.45),
    "translate_y": lambda frames, level, sign: translate(frames, y=sign * level * 0.45),
}
PLAIN_OPERATIONS: dict[str, _Operation] = _COMMON | {
    "posterize": lambda frames, level, sign: posterize(frames, int(level * 4)),
    "solarize": lambda frames, level, sign: solarize(frames, int(level * 256)),
    "color": lambda frames, level, sign: color(frames, 0.1 + level * 1.8),
    "contrast": lambda frames, level, sign: contrast(frames, 0.1 + level * 1.8),
    "brightness": lambda frames, level, sign: brightness(frames, 0.1 + level * 1.8),
    "sharpness": lambda frames, level, sign: sharpness(frames, 0.1 + level * 1.8),
}
INCREASING_OPERATIONS: dict[str, _Operation] = _COMMON | {
    "posterize": lambda frames, level, sign: posterize(frames, 4 - int(level * 4)),
    "solarize": lambda frames, level, sign: solarize(frames, 256 - int(level * 256)),
    "color": lambda frames, level, sign: color(frames, 1 + sign * level * 0.9),
    "contrast": lambda frames, level, sign: contrast(frames, 1 + sign * level * 0.9),
    "brightness": lambda frames, level, sign: brightness(frames, 1 + sign * level * 0.9),
    "sharpness": lambda frames, level, sign: sharpness(frames, 1 + sign * level * 0.9),
}


# --- Building blocks of the operations ------------------------------------------------------------


def _map(frames: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Map all values of [T, h, w, 3] through `table` [256]."""
    rows = frames.reshape(-1, *frames.shape[2:])  # [T * h, w, 3]: one call per clip
    return cv2.LUT(rows, table.astype(np.uint8)).reshape(frames.shape)


def _map_channels(frames: np.ndarray, table_of: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Map each channel of each frame through the table [256] of its histogram [256]."""
    mapped = np.empty(frames.shape, np.uint8)
    for frame, target in zip(frames, mapped, strict=True):
        counts = [cv2.calcHist([frame], [c], None, [256], [0, 256]).ravel() for c in range(3)]
        tables = [table_of(count.astype(np.int64)) for count in counts]
        table = np.stack(tables, axis=-1)  # [256, 3]
        cv2.LUT(frame, table.astype(np.uint8)[:, None], dst=target)
    return mapped


def _stretching_table(counts: np.ndarray) -> np.ndarray:
    present = np.flatnonzero(counts)
    low, high = present[0], present[-1]
    if low == high:
        return IDENTITY
    scale = 255.0 / (high - low)
    return np.clip(IDENTITY * scale - low * scale, 0, 255)


def _equalizing_table(counts: np.ndarray) -> np.ndarray:
    step = (counts.sum() - counts[np.flatnonzero(counts)[-1]]) // 255
    if step == 0:
        return IDENTITY
    below = np.cumsum(counts) - counts
    return np.minimum((step // 2 + below) // step, 255)


def _blending_table(value: int, factor: float) -> np.ndarray:
    """Table [256] that extrapolates away from `value`, truncated in float32 as in Pillow."""
    blended = np.float32(value) + np.float32(factor) * (IDENTITY - value).astype(np.float32)
    return np.clip(blended, 0, 255).astype(np.uint8)


def _blend(first: np.ndarray, second: np.ndarray, factor: float) -> np.ndarray:
    """`first` + factor * (`second` - `first`) of two clips of equal size: the shape of `second`.

    The offset makes OpenCV's rounding truncate like Pillow's; it is slightly less than one half to
    keep integers exact in float32.
    """
    rows = (-1, *second.shape[2:])
    blended = cv2.addWeighted(first.reshape(rows), 1 - factor, second.reshape(rows), factor, -0.499)
    return blended.reshape(second.shape)


def _gray(frames: np.ndarray) -> np.ndarray:
    """Gray values [T, h, w] of [T, h, w, 3], by Pillow's weights, finer than OpenCV's."""
    weights = np.array([[19595, 38470, 7471]], np.float32) / 2**16
    rows = frames.reshape(-1, *frames.shape[2:])
    return cv2.transform(rows, weights).reshape(frames.shape[:3])


def _warp(
    frames: np.ndarray,
    matrix: np.ndarray,
    offset: tuple[float, float] = (0.0, 0.0),
    about_center: bool = False,
) -> np.ndarray:
    """Take the pixel at p = (x, y) from `matrix` [2, 2] @ p + `offset`, gray where that is outside.

    Coordinates are those of pixel centers (x + 1/2), as in Pillow. Interpolation is linear: the
    official cubic one costs 2.7 times as much, and its kernel differs between Pillow and OpenCV.
    """
    height, width = frames.shape[1:3]
    center = np.array([width, height]) / 2 * about_center
    shift = center - matrix @ center + offset
    x, y = np.arange(width) + 0.5, np.arange(height)[:, None] + 0.5
    source_x, source_y = (row[0] * x + row[1] * y + s for row, s in zip(matrix, shift, strict=True))
    outside = (source_x < 0) | (source_x >= width) | (source_y < 0) | (source_y >= height)
    outside = outside.astype(np.uint8)

    gray = np.full(frames.shape[1:], FILL, np.uint8)
    # OpenCV's pixel centers are at integers.
    opencv = np.column_stack([matrix, matrix.sum(1) / 2 + shift - 0.5])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    warped = np.empty(frames.shape, np.uint8)
    for frame, target in zip(frames, warped, strict=True):
        cv2.warpAffine(
            frame, opencv, (width, height), target, flags=flags, borderMode=cv2.BORDER_REPLICATE
        )
        cv2.copyTo(gray, outside, target)
    return warped
