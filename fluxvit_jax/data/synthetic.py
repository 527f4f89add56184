"""The demo's data set: photographs that ship inside packages, filmed under twelve motions.

    python -m fluxvit_jax.data.synthetic --out=DIR [--train=N] [--validation=M] [--seed=0]

A clip shows two flat worlds, one over the other: a photograph, and small cut-outs of another
photograph. Both are endless (the photograph by mirroring, the cut-outs by repeating). The class
says how the two move on screen. Everything else is drawn alike for every class, and at the middle
of the clip all classes look the same, so that a single frame tells nothing. Training must not flip
frames: it would swap left and right, and the senses of rotation.

DIR gets train/ and validation/ with a folder a class, train.csv and validation.csv (path,label),
and classes.txt. The two splits share no photograph. The same arguments give the same bytes (with
the same versions of the packages); a run that was interrupted goes on where it stopped.
"""

import argparse
import importlib.util
import json
import math
import multiprocessing
import os
import signal
import sys
from concurrent.futures import ProcessPoolExecutor
from fractions import Fraction
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import av
import cv2
import numpy as np
from tqdm import tqdm

from fluxvit_jax.errors import UserError

# Counts changes that alter the clips; a folder made with another number is not added to.
RECIPE = 1

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
# height, width: 4:3, 16:9, square, 3:4, 9:16.
SIZES = (
    *((84, 112), (96, 128), (108, 144), (120, 160), (132, 176)),
    *((80, 142), (90, 160), (100, 176)),
    *((96, 96), (112, 112), (128, 128)),
    *((112, 84), (128, 96), (144, 108)),
    *((142, 80), (160, 90)),
)
FRAME_RATES = (Fraction(12), Fraction(15), Fraction(24), Fraction(25), Fraction(30000, 1001))
FRAMES = (24, 91)  # shortest, and one more than longest
SOUND = 0.25  # share of clips with a sound track
SAMPLE_RATE = 16000

# Magnification from the first to the last instant of a zoom.
ZOOM = (1.5, 2.0)
# Pixels of the photograph under one pixel of a frame, at the middle of a clip: at most this, or the
# frames would alias. A larger photograph is shrunk first; by how much is random, because at a
# constant sharpness any loss of it would tell a zoom.
STRIDE = (0.5, 1.0)
# The cut-outs lie one a cell in a square of CELLS x CELLS cells, which repeats without end; a frame
# shows one to four of them. TILE is the square's side in short sides of a frame.
CELLS = 2
TILE = 1.6


class Course(NamedTuple):
    """How a flat world moves on screen, relative to the middle of the clip; each float64 [T]."""

    x: np.ndarray  # right, in short sides of the frame
    y: np.ndarray  # down, in short sides of the frame
    turn: np.ndarray  # clockwise, radians
    zoom: np.ndarray  # natural logarithm of the magnification


class View(NamedTuple):
    """What a frame shows of a flat world where its course is 0."""

    centre: np.ndarray  # (x, y), pixels of the world
    span: float  # pixels of the world along the frame's short side
    tilt: float  # clockwise, radians


def photographs(split: str) -> list[np.ndarray]:
    """The photographs of "train" or "validation": uint8 RGB [H, W, 3] of various sizes.

    Raises UserError when a package that ships them is not installed.
    """
    return [_photograph(name) for name in PHOTOGRAPHS[split]]


@cache
def _photograph(name: str) -> np.ndarray:
    package, inside = name.split("/", 1)
    spec = importlib.util.find_spec(package)  # does not import the package
    path = Path(spec.submodule_search_locations[0]) / inside if spec else None
    if path is None or not path.is_file():
        raise UserError(f"photograph {name} is missing: pip install 'fluxvit_jax[demo]'")
    with av.open(path) as file:
        image = next(file.decode(video=0)).to_ndarray(format="rgb24")
    if "retina" in name:  # a disc on black: keep a square inside it
        image = image[240:1170, 240:1170]
    height, width = image.shape[:2]
    shrink = max(1, min(height, width) / 480)
    size = (round(width / shrink), round(height / shrink))
    image = cv2.resize(image, size, interpolation=cv2.INTER_AREA).astype(np.float32)
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
    """One clip of a motion of MOTIONS: uint8 RGB [frames, height, width, 3], size (height, width).

    photo is uint8 [H, W, 3]; the cut-outs come from cutout_photo (by default from photo itself).
    The same random numbers are drawn from rng for every motion, so that clips of equal rng differ
    in nothing but how the two worlds move.
    """
    ground_course, cutout_course = _courses(motion, rng, frames)
    ground = _recolour(photo, rng)
    source = _recolour(photo if cutout_photo is None else cutout_photo, rng)
    ground, view = _shrink(ground, _choose_view(ground, rng), rng.uniform(*STRIDE) * min(size))
    clip = _film(ground, view, ground_course, size, cv2.BORDER_REFLECT)
    tile = _cutouts(source, rng, size)
    side = len(tile)
    span = side / TILE * math.exp(rng.uniform(-0.25, 0.25))
    view = View(rng.uniform(0, side, 2), span, rng.uniform(-np.pi, np.pi))
    layer = _film(tile, view, cutout_course, size, cv2.BORDER_WRAP)
    for frame, above in zip(clip, layer, strict=True):
        alpha = cv2.cvtColor(above[..., 3], cv2.COLOR_GRAY2RGB)
        above = cv2.multiply(above[..., :3], alpha, scale=1 / 255)
        cv2.add(above, cv2.multiply(frame, 255 - alpha, scale=1 / 255), frame)
    return clip


def _courses(motion: str, rng: np.random.Generator, frames: int) -> tuple[Course, Course]:
    """The courses of the photograph and of the cut-outs. Both are 0 at the middle of the clip."""
    time = (np.arange(frames) + 0.5) / frames
    distance = rng.uniform(0.5, 1.0)  # in short sides of the frame, over the clip
    further = rng.uniform(0.7, 1.0)
    heading = rng.uniform(-np.pi, np.pi)
    other_heading = heading + rng.uniform(0.6, 1.4) * np.pi  # never near the first
    slant = rng.uniform(-0.2, 0.2)
    turn = math.radians(rng.uniform(50, 110))
    zoom = math.log(rng.uniform(*ZOOM))
    corner = rng.uniform(0.4, 0.6)  # when it stops, or turns round
    bend = rng.uniform(-0.25, 0.25)  # speeds up or slows down by up to a quarter
    steady = time - 0.5 + bend * (time * (1 - time) - 0.25)
    here = Course(*np.zeros((4, frames)))

    def slide(progress: np.ndarray, angle: float, length: float = distance) -> Course:
        along = length * progress
        return here._replace(x=np.cos(angle) * along, y=np.sin(angle) * along)

    match motion:
        case "object_over_moving":
            return slide(steady, heading), slide(steady, other_heading, further)
        case "object_over_still":
            return here, slide(steady, other_heading, further)
        case "pan_left":  # the picture moves right, and so on
            course = slide(steady, slant)
        case "pan_up":
            course = slide(steady, slant + np.pi / 2)
        case "pan_right":
            course = slide(steady, slant + np.pi)
        case "pan_down":
            course = slide(steady, slant - np.pi / 2)
        case "reversal":
            course = slide(abs(0.5 - corner) - abs(time - corner), heading, 2 * distance)
        case "rotate_clockwise":
            course = here._replace(turn=turn * steady)
        case "rotate_counterclockwise":
            course = here._replace(turn=-turn * steady)
        case "start_stop":
            course = slide(np.minimum(time, corner) - min(0.5, corner), heading, 2 * distance)
        case "zoom_in":
            course = here._replace(zoom=zoom * steady)
        case "zoom_out":
            course = here._replace(zoom=-zoom * steady)
        case _:
            raise ValueError(f"unknown motion {motion!r}; there are {', '.join(MOTIONS)}")
    return course, course  # the cut-outs stick to the photograph


def _film(
    world: np.ndarray, view: View, course: Course, size: tuple[int, int], border: int
) -> np.ndarray:
    """Frames of a flat world uint8 [H, W, C] that moves on course: uint8 [T, height, width, C]."""
    (height, width), short = size, min(size)
    centre, span, tilt = view
    angle = -(course.turn + tilt)
    factor = span / short * np.exp(-course.zoom)
    cos, sin = factor * np.cos(angle), factor * np.sin(angle)
    x = (width - 1) / 2 + course.x * short
    y = (height - 1) / 2 + course.y * short
    clip = np.empty((len(x), height, width, world.shape[2]), np.uint8)
    for t in range(len(x)):
        to_world = np.array(
            [
                [cos[t], -sin[t], centre[0] - cos[t] * x[t] + sin[t] * y[t]],
                [sin[t], cos[t], centre[1] - sin[t] * x[t] - cos[t] * y[t]],
            ]
        )
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        cv2.warpAffine(world, to_world, (width, height), clip[t], flags, border)
    return clip


def _choose_view(world: np.ndarray, rng: np.random.Generator) -> View:
    """A random view of a photograph uint8 [H, W, 3].

    Of four places the one with most texture in every direction is taken (Shi and Tomasi's measure:
    the smaller eigenvalue of the gradients' covariance), since over blank sky no motion shows.
    """
    height, width = world.shape[:2]
    span = min(height, width) * math.exp(rng.uniform(math.log(0.35), math.log(0.7)))
    gray = cv2.cvtColor(world, cv2.COLOR_RGB2GRAY)

    def texture(place: np.ndarray) -> float:
        left, top = np.maximum(place - 0.8 * span, 0).astype(int)
        right, bottom = (place + 0.8 * span).astype(int) + 1
        window = cv2.resize(gray[top:bottom, left:right], (24, 24), interpolation=cv2.INTER_AREA)
        gradients = np.reshape(np.gradient(window.astype(float)), (2, -1))
        return np.linalg.eigvalsh(np.cov(gradients))[0]

    places = rng.uniform((0, 0), (width, height), (4, 2))
    return View(max(places, key=texture), span, rng.uniform(-np.pi, np.pi))


def _shrink(world: np.ndarray, view: View, span: float) -> tuple[np.ndarray, View]:
    """The same view of the world shrunk such that view.span is at most span pixels."""
    height, width = world.shape[:2]
    shrink = max(1, view.span / span)
    size = (round(width / shrink), round(height / shrink))
    world = cv2.resize(world, size, interpolation=cv2.INTER_AREA)
    return world, view._replace(centre=view.centre / shrink, span=view.span / shrink)


def _recolour(photo: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The photograph, or its mirror image, in other colours: of equal size.

    Three in ten keep their colours but for brightness; the others get their channels swapped and
    scaled, and half of those become negatives.
    """
    order, gain, lift = rng.permutation(3), rng.uniform(0.6, 1, 3), rng.random(3)
    gamma, mirrored = math.exp(rng.uniform(-0.4, 0.4)), rng.random() < 0.5
    look = rng.random()
    curve = np.linspace(0, 1, 256)[:, None].repeat(3, 1) ** gamma
    if look > 0.3:
        curve = gain * curve + (1 - gain) * lift
        photo = photo[..., order]
    if look > 0.65:
        curve = 1 - curve
    table = np.round(255 * curve).astype(np.uint8).reshape(1, 256, 3)
    return cv2.LUT(np.ascontiguousarray(photo[:, ::-1] if mirrored else photo), table)


def _cutouts(photo: np.ndarray, rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """A square of cut-outs with nothing between them: uint8 RGBA [side, side, 4]."""
    cell = round(TILE / CELLS * min(size))
    rows = [np.hstack([_cutout(photo, rng, cell) for _ in range(CELLS)]) for _ in range(CELLS)]
    return np.vstack(rows)


def _cutout(photo: np.ndarray, rng: np.random.Generator, cell: int) -> np.ndarray:
    """A polygon cut out of the photograph, with an edge, somewhere in RGBA [cell, cell, 4]."""
    radius = rng.uniform(0.19, 0.26) * cell
    centre = rng.uniform(radius + 2, cell - radius - 2, 2)
    corners = int(rng.integers(3, 9))
    angles = np.arange(corners) + rng.uniform(-0.25, 0.25, corners) + rng.random()
    angles *= 2 * np.pi / corners
    outline = centre + radius * np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    outline = np.round(16 * outline).astype(np.int32)  # cv2 wants sixteenths of a pixel
    # A cell's worth of picture: the part of the photograph that a cut-out shows is small.
    side = int(min(photo.shape[:2]) * rng.uniform(0.4, 0.9))
    top, left = rng.integers(0, np.array(photo.shape[:2]) - side)
    piece = photo[top : top + side, left : left + side]
    piece = cv2.resize(piece, (cell, cell), interpolation=cv2.INTER_AREA)
    edge = 255 * int(rng.integers(2))
    cv2.polylines(piece, [outline], True, (edge,) * 3, max(2, cell // 25), cv2.LINE_AA, shift=4)
    alpha = np.zeros((cell, cell), np.uint8)
    cv2.fillPoly(alpha, [outline], 255, cv2.LINE_AA, shift=4)
    return np.dstack([piece, alpha])


class Clip(NamedTuple):
    """One file of the data set."""

    split: str
    index: int  # within the split

    @property
    def label(self) -> int:
        return self.index % len(MOTIONS)

    @property
    def path(self) -> str:
        """Relative to the data set's folder."""
        return f"{self.split}/{MOTIONS[self.label]}/{self.index // len(MOTIONS):04d}.mp4"


def write_dataset(
    out: str | Path, train: int = 1200, validation: int = 240, seed: int = 0, workers: int = 0
) -> None:
    """Write the demo's data set of train and validation clips to the folder out, or finish it.

    workers is the number of processes, 0 for one a core up to 8. Raises UserError when the folder
    holds anything else, such as a data set made with other arguments.
    """
    out = Path(out)
    _claim(out, {"train": train, "validation": validation, "seed": seed, "recipe": RECIPE})
    splits = {
        "train": [Clip("train", index) for index in range(train)],
        "validation": [Clip("validation", index) for index in range(validation)],
    }
    clips = [clip for split in splits.values() for clip in split]
    missing = [clip for clip in clips if not (out / clip.path).exists()]
    if missing:
        pool = ProcessPoolExecutor(
            workers or min(8, os.cpu_count() or 1),
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_start_worker,
        )
        with pool:
            written = pool.map(partial(_write_clip, out, seed), missing, chunksize=8)
            before = len(clips) - len(missing)
            for _ in tqdm(written, "clips", len(clips), initial=before, mininterval=0.5):
                pass
    for split, members in splits.items():
        rows = [f"{clip.path},{clip.label}" for clip in members]
        _write_text(out / f"{split}.csv", "\n".join(["path,label", *rows]))
    _write_text(out / "classes.txt", "\n".join(MOTIONS))


def _claim(out: Path, arguments: dict[str, int]) -> None:
    """Make the folder, or check that it was made with these arguments."""
    if min(arguments["train"], arguments["validation"]) < 1 or arguments["seed"] < 0:
        raise UserError("--train and --validation must be at least 1, --seed at least 0")
    marker = out / "synthetic.json"
    if marker.is_file():
        found = json.loads(marker.read_text())
        other = [
            f"{key} {found.get(key)}, not {value}"
            for key, value in arguments.items()
            if found.get(key) != value
        ]
        if other:
            raise UserError(f"{out} was made with {'; '.join(other)}: give another --out")
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is no data set of ours: give another --out")
    else:
        out.mkdir(parents=True, exist_ok=True)
        _write_text(marker, json.dumps(arguments))


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    cv2.setNumThreads(1)


def _write_clip(out: Path, seed: int, clip: Clip) -> None:
    rng = np.random.default_rng([seed, list(PHOTOGRAPHS).index(clip.split), clip.index])
    photos = photographs(clip.split)
    # Every class gets every photograph equally often.
    photo = clip.index // len(MOTIONS) % len(photos)
    cutout_photo = (photo + rng.integers(1, len(photos))) % len(photos)
    length = int(rng.integers(*FRAMES))
    size = SIZES[rng.integers(len(SIZES))]
    motion = MOTIONS[clip.label]
    frames = render(motion, photos[photo], rng, length, size, photos[cutout_photo])
    path = out / clip.path
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_path = path.with_suffix(".partial")
    _encode(partial_path, frames, rng)
    partial_path.replace(path)


def _encode(path: Path, frames: np.ndarray, rng: np.random.Generator) -> None:
    """Write frames uint8 RGB [T, H, W, 3] as H.264 in mp4, some with a tone beside it (AAC)."""
    rate = FRAME_RATES[rng.integers(len(FRAME_RATES))]
    options = {
        "preset": "veryfast",
        "crf": str(rng.integers(20, 25)),
        "g": str(rng.integers(12, 49)),
        "bf": str(rng.integers(1, 4)),
        "threads": "1",
        # With macroblock trees on, x264's vector code gives other bytes at every run.
        "x264-params": "mbtree=0",
    }
    sound, pitch = rng.random() < SOUND, rng.uniform(200, 800)
    with av.open(path, "w", format="mp4") as file:
        video = file.add_stream("libx264", rate=rate, options=options)
        video.height, video.width = frames.shape[1:3]
        video.pix_fmt = "yuv420p"
        if sound:
            audio = file.add_stream(
                "aac", rate=SAMPLE_RATE, options={"aac_coder": "fast"}, layout="mono"
            )
        for frame in frames:
            file.mux(video.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(video.encode())
        if sound:
            time = np.arange(int(SAMPLE_RATE * len(frames) / rate)) / SAMPLE_RATE
            wave = 0.1 * np.sin(2 * np.pi * pitch * time) + 0.02 * rng.standard_normal(len(time))
            samples = av.AudioFrame.from_ndarray(wave[None].astype(np.float32), "fltp", "mono")
            samples.sample_rate = SAMPLE_RATE
            file.mux(audio.encode(samples))
            file.mux(audio.encode())


def _write_text(path: Path, text: str) -> None:
    """Whole or not at all, so that an interrupted run leaves no half list."""
    draft = path.with_suffix(".partial")
    draft.write_text(text + "\n")
    draft.replace(path)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write the demo's data set of synthetic videos.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--train", type=int, default=1200, help="clips (default %(default)s)")
    parser.add_argument("--validation", type=int, default=240, help="clips (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other clips")
    parser.add_argument("--workers", type=int, default=0, help="processes (default: one a core)")
    options = parser.parse_args(arguments)
    try:
        write_dataset(**vars(options))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
