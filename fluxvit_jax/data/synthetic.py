"""The demo's data set: synthetic clips of twelve motions, rendered from photographs in packages.

    python -m fluxvit_jax.data.synthetic --out=DIR [--train=N] [--validation=M] [--seed=0]

A clip shows a print (an oblong cut of a photograph, lightened) and a small object (a disc cut of
another photograph, tinted red) over a third photograph, dark, blurred and still. The class is the
motion of print and object; in all but the two object classes the object sticks to the print.
Everything else has the same distribution for every class, and in one frame near the middle of the
clip all classes look the same. Training must not flip frames: it would swap left and right, and the
senses of rotation.

The middle frame does not reveal the class, but the first and the last reveal much of it: what moves
right begins on the left, what grows begins small. A random forest on colors, edges, positions and
shapes of print and object in one frame classifies an unseen clip correctly in 9 % of cases for the
middle frame (chance is 8 %), 23 % for a random frame, 53 % for the first and 55 % for the last; on
the motion of both, in 99 % (tests/data/test_synthetic.py).

DIR gets train/ and validation/ with a folder a class, train.csv and validation.csv (path,label),
classes.txt, and train_captions.json and validation_captions.json with words for motion, way and
speed; in the latter, clips that are described alike stand together. The two splits share no
photograph. The same arguments give the same bytes (with the same versions of the packages); an
interrupted run goes on where it stopped.
"""

import argparse
import importlib.util
import json
import math
import multiprocessing
import os
import signal
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import av
import cv2
import numpy as np
from tqdm import tqdm

from fluxvit_jax.data import synthetic_captions
from fluxvit_jax.data.synthetic_movement import Movement, draw_movement
from fluxvit_jax.distributed import storage
from fluxvit_jax.errors import UserError

# Counts changes that alter the clips; a folder made with another number is not added to.
RECIPE = 3

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
SIZES = (  # height, width
    (84, 112), (90, 120), (96, 128),  # 4:3
    (84, 150), (90, 160),  # 16:9
    (84, 84), (96, 96), (112, 112),  # square
    (112, 84), (120, 90), (128, 96),  # 3:4
    (150, 84), (160, 90),  # 9:16
)  # fmt: skip
FRAME_RATES = (Fraction(12), Fraction(15), Fraction(24), Fraction(25), Fraction(30000, 1001))
FRAMES = (20, 45)  # shortest, and one more than longest
SOUND = 0.25  # share of clips with a sound track
SAMPLE_RATE = 16000

# Pixels along the short side of a print, and along a square that an object fills, before they are
# drawn into a frame at about half that size.
PRINT_SIDE = 64
OBJECT_SIDE = 32


class Course(NamedTuple):
    """Motion of print or object on screen, relative to its position at rest; each float64 [T]."""

    x: np.ndarray  # right, in short sides of the frame
    y: np.ndarray  # down, in short sides of the frame
    turn: np.ndarray  # clockwise, radians, about the print's center
    zoom: np.ndarray  # natural logarithm of the magnification about the print's center


def photographs(split: str) -> list[np.ndarray]:
    """The photographs of "train" or "validation": uint8 RGB [H, W, 3] of various sizes.

    Raises UserError when a package that ships them is not installed.
    """
    return [_photograph(name) for name in PHOTOGRAPHS[split]]


@cache
def _photograph(name: str) -> np.ndarray:
    package, inside = name.split("/", 1)
    spec = importlib.util.find_spec(package)  # does not import the package
    folders = spec.submodule_search_locations if spec else None
    path = Path(folders[0]) / inside if folders else None
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
    photos: Sequence[np.ndarray],
    rng: np.random.Generator,
    frames: int,
    size: tuple[int, int],
) -> np.ndarray:
    """One clip of a motion of MOTIONS: uint8 RGB [frames, height, width, 3], size (height, width).

    photos are three, uint8 [H, W, 3] each: of the print, of the object and of the background. The
    same random numbers are drawn from rng for every motion, so that clips of equal rng differ in
    nothing but how print and object move.
    """
    print_course, object_course = _courses(motion, draw_movement(rng), frames)
    print_photo, object_photo, background_photo = (_recolor(photo, rng) for photo in photos)
    middle, short = np.array(size[::-1]) / 2, min(size)
    center = middle + rng.uniform(-0.12, 0.12, 2) * short
    offset = rng.uniform(0.14, 0.28) * short * _direction(rng.uniform(-np.pi, np.pi))

    clip = np.repeat(_background(background_photo, rng, size)[None], frames, axis=0)
    picture, tilt = _print(print_photo, rng), math.radians(rng.uniform(-30, 30))
    rest = _placed(picture, rng.uniform(0.38, 0.52) * short / PRINT_SIDE, tilt, center)
    _draw(clip, picture, rest, print_course, center)
    picture = _object(object_photo, rng)
    rest = _placed(picture, rng.uniform(0.22, 0.3) * short / OBJECT_SIDE, 0, center + offset)
    _draw(clip, picture, rest, object_course, center)
    return clip


def _courses(motion: str, drawn: Movement, frames: int) -> tuple[Course, Course]:
    """The courses of print and object; both are 0 at one frame near the middle of the clip."""
    time = (np.arange(frames) + 0.5) / frames
    central = time[int(drawn.central * frames)]
    distance, heading, other_heading = drawn.distance, drawn.heading, drawn.other_heading
    slant, corner = drawn.slant, drawn.corner
    turn = math.radians(drawn.degrees) * (time - central)
    zoom = math.log(drawn.magnification) * (time - central)
    still = Course(*np.zeros((4, frames)))

    def slide(angle: float, progress: np.ndarray = time - central) -> Course:
        x, y = distance * np.outer(_direction(angle), progress)
        return still._replace(x=x, y=y)

    match motion:
        case "object_over_moving":
            return slide(heading), slide(other_heading)
        case "object_over_still":
            return still, slide(other_heading)
        case "pan_left":  # the picture moves right, and so on
            course = slide(slant)
        case "pan_up":
            course = slide(slant + np.pi / 2)
        case "pan_right":
            course = slide(slant + np.pi)
        case "pan_down":
            course = slide(slant - np.pi / 2)
        case "reversal":
            course = slide(heading, 1.5 * (abs(central - corner) - abs(time - corner)))
        case "rotate_clockwise":
            course = still._replace(turn=turn)
        case "rotate_counterclockwise":
            course = still._replace(turn=-turn)
        case "start_stop":
            course = slide(heading, 1.3 * (np.minimum(time, corner) - min(central, corner)))
        case "zoom_in":
            course = still._replace(zoom=zoom)
        case "zoom_out":
            course = still._replace(zoom=-zoom)
        case _:
            raise ValueError(f"unknown motion {motion!r}; there are {', '.join(MOTIONS)}")
    return course, course  # the object sticks to the print


def _direction(angle: float) -> np.ndarray:
    """The unit vector (x, y) that lies clockwise by angle, in radians, from the right."""
    return np.array([math.cos(angle), math.sin(angle)])


def _background(photo: np.ndarray, rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """Dark and blurred: uint8 RGB [height, width, 3]."""
    image = cv2.GaussianBlur(_cut(photo, rng, size, (0.5, 1.0)), (0, 0), min(size) / 42)
    return cv2.convertScaleAbs(image, alpha=0.35)


def _print(photo: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """An oblong, lightened, in an invisible margin: uint8 RGBA, RGB premultiplied by alpha."""
    width = round(PRINT_SIDE * rng.uniform(1.5, 2.0))
    image = _cut(photo, rng, (PRINT_SIDE, width), (0.5, 0.9))
    image = cv2.cvtColor(cv2.convertScaleAbs(image, alpha=0.6, beta=100), cv2.COLOR_RGB2RGBA)
    return cv2.copyMakeBorder(image, 2, 2, 2, 2, cv2.BORDER_CONSTANT)


def _object(photo: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A disc, tinted red, in an invisible margin: uint8 RGBA, RGB premultiplied by alpha."""
    side = OBJECT_SIDE
    image = _cut(photo, rng, (side, side), (0.5, 0.9))
    red = np.full_like(image, (190, 30, 30))
    image = cv2.cvtColor(cv2.addWeighted(image, 0.3, red, 0.7, 0), cv2.COLOR_RGB2RGBA)
    disc = cv2.circle(np.zeros_like(image), (side // 2, side // 2), side // 2 - 1, (255,) * 4, -1)
    return cv2.copyMakeBorder(cv2.bitwise_and(image, disc), 2, 2, 2, 2, cv2.BORDER_CONSTANT)


def _cut(
    photo: np.ndarray,
    rng: np.random.Generator,
    size: tuple[int, int],
    share: tuple[float, float],
) -> np.ndarray:
    """A random part of the photograph resized to size: uint8 [height, width, 3].

    It is larger than share[0] and smaller than share[1] of the largest of its proportions.
    """
    largest = min(photo.shape[0] / size[0], photo.shape[1] / size[1])
    height, width = (np.array(size) * (largest * rng.uniform(*share))).astype(int)
    top = rng.integers(photo.shape[0] - height + 1)
    left = rng.integers(photo.shape[1] - width + 1)
    part = photo[top : top + height, left : left + width]
    return cv2.resize(part, size[::-1], interpolation=cv2.INTER_AREA)


def _placed(picture: np.ndarray, scale: float, turn: float, center: np.ndarray) -> np.ndarray:
    """The map [3, 3] that takes pixels of a picture to where the frame has it at rest."""
    height, width = picture.shape[:2]
    to_origin = _similarity(1, 0, np.array([-width / 2, -height / 2]))
    return _similarity(scale, turn, center) @ to_origin


def _similarity(scale: float, turn: float, shift: np.ndarray) -> np.ndarray:
    """The map [3, 3] that scales, turns clockwise (radians), then shifts by (x, y), [2]."""
    cos, sin = scale * _direction(turn)
    return np.array([[cos, -sin, shift[0]], [sin, cos, shift[1]], [0, 0, 1]])


def _draw(
    clip: np.ndarray, picture: np.ndarray, rest: np.ndarray, course: Course, center: np.ndarray
) -> None:
    """Draw on the frames, uint8 [T, height, width, 3], a picture that moves on course.

    The picture is uint8 RGBA with RGB premultiplied by alpha; rest takes it to its place.
    """
    height, width = clip.shape[1:3]
    for frame, x, y, turn, zoom in zip(clip, *course, strict=True):
        shift = center + min(height, width) * np.array([x, y])
        moved = _similarity(math.exp(zoom), turn, shift) @ _similarity(1, 0, -center) @ rest
        layer = cv2.warpAffine(picture, moved[:2], (width, height))
        around = 255 - cv2.cvtColor(layer[..., 3], cv2.COLOR_GRAY2RGB)
        cv2.add(layer[..., :3], cv2.multiply(frame, around, scale=1 / 255), frame)


def _recolor(photo: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The photograph, or its mirror image, in other colors: of equal size.

    Three in ten keep their colors but for brightness; the others get their channels swapped and
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Clip:
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
    out: str | Path, train: int = 2400, validation: int = 240, seed: int = 0, workers: int = 0
) -> None:
    """Write the demo's data set of train and validation clips to the folder out, or finish it.

    workers is the number of processes, 0 for one a core up to 8. Raises UserError when it is
    negative, or the folder holds anything else, such as a data set made with other arguments.
    """
    if workers < 0:
        raise UserError(f"--workers={workers}: must be 0 or more")
    out = Path(out)
    _claim(out, {"train": train, "validation": validation, "seed": seed, "recipe": RECIPE})
    splits = {
        "train": [Clip(split="train", index=index) for index in range(train)],
        "validation": [Clip(split="validation", index=index) for index in range(validation)],
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
    captions = {
        clip: tuple(synthetic_captions.of_clip(MOTIONS[clip.label], movement))
        for clip in clips
        for movement in [draw_movement(begin(clip, seed)[0])]
    }
    training = [{"video": clip.path, "caption": list(captions[clip])} for clip in splits["train"]]
    _write_text(out / "train_captions.json", json.dumps(training, indent=0))
    alike: dict[tuple[str, ...], list[str]] = {}  # validation clips that are described alike
    for clip in splits["validation"]:
        alike.setdefault(captions[clip], []).append(clip.path)
    pairs = [{"video": videos, "caption": list(texts)} for texts, videos in alike.items()]
    _write_text(out / "validation_captions.json", json.dumps(pairs, indent=0))
    _write_text(out / "classes.txt", "\n".join(MOTIONS))


def _claim(out: Path, arguments: dict[str, int]) -> None:
    """Make the folder, or check that it was made with these arguments."""
    if min(arguments["train"], arguments["validation"]) < 1 or arguments["seed"] < 0:
        raise UserError("--train and --validation must be at least 1, --seed at least 0")
    marker = out / "synthetic.json"
    if marker.is_file():
        recorded = json.loads(marker.read_text())
        differences = [
            f"{key} {recorded.get(key)}, not {value}"
            for key, value in arguments.items()
            if recorded.get(key) != value
        ]
        if differences:
            raise UserError(f"{out} was made with {'; '.join(differences)}: give another --out")
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is no data set of ours: give another --out")
    else:
        out.mkdir(parents=True, exist_ok=True)
        _write_text(marker, json.dumps(arguments))


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    cv2.setNumThreads(1)


def _write_clip(out: Path, seed: int, clip: Clip) -> None:
    rng, chosen, length, size = begin(clip, seed)
    photos = photographs(clip.split)
    motion = MOTIONS[clip.label]
    frames = render(motion, [photos[number] for number in chosen], rng, length, size)
    path = out / clip.path
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_path = path.with_suffix(".partial")
    _encode(partial_path, frames, rng)
    partial_path.replace(path)


def begin(clip: Clip, seed: int) -> tuple[np.random.Generator, list[int], int, tuple[int, int]]:
    """The generator of a clip after the first draws; photographs, frames and size of the clip.

    photographs: numbers of that of the print, of the object and of the background.
    """
    rng = np.random.default_rng([seed, list(PHOTOGRAPHS).index(clip.split), clip.index])
    photos = len(PHOTOGRAPHS[clip.split])
    # As prints every class gets every photograph equally often.
    first = clip.index // len(MOTIONS) % photos
    others = first + 1 + rng.choice(photos - 1, 2, replace=False)
    chosen = [int(number % photos) for number in (first, *others)]
    length = int(rng.integers(*FRAMES))
    return rng, chosen, length, SIZES[rng.integers(len(SIZES))]


def _encode(path: Path, frames: np.ndarray, rng: np.random.Generator) -> None:
    """Write frames uint8 RGB [T, H, W, 3] as H.264 in mp4, some with a tone as sound (AAC)."""
    rate = FRAME_RATES[rng.integers(len(FRAME_RATES))]
    options = {
        "preset": "veryfast",
        "crf": str(rng.integers(20, 25)),
        "g": str(rng.integers(12, 25)),
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
    """Writes a file atomically, so that an interrupted run leaves no half list."""
    draft = path.with_suffix(".partial")
    draft.write_text(text + "\n")
    draft.replace(path)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write the demo's data set of synthetic videos.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--train", type=int, default=2400, help="clips (default %(default)s)")
    parser.add_argument("--validation", type=int, default=240, help="clips (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other clips")
    parser.add_argument("--workers", type=int, default=0, help="processes (default: one a core)")
    options = parser.parse_args(arguments)
    try:
        with storage.write_errors(options.out):
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
