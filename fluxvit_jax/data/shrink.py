"""Small copies of videos: those of a phone are large, and take long to decode in every epoch.

    python -m fluxvit_jax.data.shrink --root=VIDEOS --out=SMALL [--short_side=128]

SMALL has the same names in the same folders: a list still fits with --config.data.root=SMALL. Every
frame stays, sound goes. Frames are scaled down to a shorter side of `--short_side` pixels, and are
H.264 with a key frame every 12 frames, so that random ones are read fast. A video that cannot be
decoded, or that is no larger, is copied as it is: an evaluation must count the first as failed.
Finished copies stay, so that the same command goes on where it was stopped. Choose a `--short_side`
that is larger than the resolution of training: random crops are cut from it.
"""

import argparse
import contextlib
import dataclasses
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
from tqdm import tqdm

from fluxvit_jax.data import durable_files
from fluxvit_jax.data.annotations import videos_below
from fluxvit_jax.data.decoding import DecodeError, Video
from fluxvit_jax.data.frame_sampling import resized_size
from fluxvit_jax.data.supervised_workers import (
    Quarantine,
    SupervisedWorkers,
    reading,
)
from fluxvit_jax.distributed import storage
from fluxvit_jax.errors import ArgumentParser, UserError

SHORT_SIDE = 128
QUALITY = 18  # x264's constant rate factor: hardly to be told from the original
KEY_FRAME_INTERVAL = 12
CHUNK = 240  # frames in memory at a time
NOTE = ".short_side"  # file in the folder that is written
FRAME_RATE = 30  # where the file does not say
CLIP_SECONDS = 600.0
DYING = (
    "a worker process {}; finished copies are kept, and the same command goes on from there; fewer "
    "--workers need less memory"
)


def shrink(
    root: str | os.PathLike,
    out: str | os.PathLike,
    short_side: int = SHORT_SIDE,
    workers: int = 1,
    clip_seconds: float = CLIP_SECONDS,
) -> dict[str, str]:
    """Writes small copies of all videos below `root`.

    Args:
      root: folder of videos; hidden files are left out.
      out: folder to write, outside `root`.
      short_side: pixels of the shorter side, even, at least 16.
      workers: processes.
      clip_seconds: time limit for a video, which counts as unreadable then; 0: none.

    Returns:
      Why videos cannot be read, by their names.

    Raises:
      UserError: no videos, not one that can be read, an `out` that cannot be written, is in use or
        has copies of another size, a process that dies again and again.
    """
    root, out = Path(os.path.abspath(root)), Path(os.path.abspath(out))
    names = _names(root, out, short_side)
    quarantine: Quarantine = {}
    copies = _Copies(root, out, names, short_side, quarantine)
    workers = min(workers, len(names))
    with durable_files.one_run_at_a_time(out, "shrink"):
        _claim(out, short_side)
        pool = SupervisedWorkers(copies, workers, clip_seconds, quarantine, ahead=2, dying=DYING)
        with contextlib.closing(pool):
            unreadable = _results(pool, names)
    if len(unreadable) == len(names):
        name, reason = min(unreadable.items())
        raise UserError(f"{root}: not one video can be read; {name}: {reason}")
    return unreadable


def _names(root: Path, out: Path, short_side: int) -> list[str]:
    """The videos' paths below the root. Raises UserError for arguments that cannot be."""
    if short_side < 16 or short_side % 2:
        raise UserError(f"short_side ({short_side}) must be even and at least 16")
    if not os.path.isdir(root):
        raise UserError(f"{storage.display_name(root)}: no such folder")
    if out == root or root in out.parents:
        raise UserError(f"{storage.display_name(out)}: lies in the folder of the videos")
    names = [str(path.relative_to(root)) for path in videos_below(storage.path_of(root))]
    if not names:
        raise UserError(f"{storage.display_name(root)}: holds no videos")
    return names


def _claim(out: Path, short_side: int) -> None:
    """Notes in `out` how large its copies are. Raises UserError if it has others."""
    note = out / NOTE
    try:
        before = note.read_text(errors="replace") if note.exists() else ""
        if not before:
            durable_files.write(note, f"{short_side}\n")
    except OSError as error:
        raise UserError(
            f"{storage.display_name(out)}: cannot be written: {error.strerror}"
        ) from None
    if before and before.strip() != str(short_side):
        raise UserError(
            f"{storage.display_name(out)}: has copies with --short_side={before.strip()}; choose "
            "another --out"
        )


def _results(pool: SupervisedWorkers, names: list[str]) -> dict[str, str]:
    """Has all videos copied; why some cannot be read, by their names."""
    unreadable: dict[str, str] = {}
    interval = 0.5 if sys.stderr.isatty() else 10  # seconds: no flood in the log of a batch job
    for number in range(len(names)):
        pool.submit(number)
    with tqdm(total=len(names), unit=" videos", mininterval=interval) as bar:
        while bar.n < len(names):
            for number, reason in pool.finished():
                if isinstance(reason, Exception):
                    raise reason
                if reason:
                    unreadable[storage.display_name(names[number])] = reason
                pool.went_on()
                bar.update()
    return unreadable


@dataclasses.dataclass(frozen=True)
class _Copies:
    """The function of the workers: the number of a video to why it cannot be read, or ""."""

    root: Path
    out: Path
    names: list[str]
    short_side: int
    quarantine: Quarantine

    def __call__(self, number: int) -> str:
        name = self.names[number]
        source, target = self.root / name, self.out / name
        unfinished = target.with_name(f".{target.name}.tmp")
        try:
            if _is_finished(source, target):
                return ""
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                with reading(name, self.quarantine), Video(source, name) as video:
                    small = min(video.size) <= self.short_side
                    if not small:
                        _write(video, unfinished, self.short_side)
            except DecodeError as error:
                if os.access(source, os.R_OK):
                    _copy(source, unfinished, target)
                return error.reason
            if small:
                _copy(source, unfinished, target)
            else:
                durable_files.move(unfinished, target)
            shutil.copystat(source, target)  # a copy with another time is unfinished
        except OSError as error:
            where = storage.display_name(target)
            raise UserError(f"{where}: cannot be written: {error.strerror or error}") from None
        return ""


def _is_finished(source: Path, target: Path) -> bool:
    """Whether `target` is a copy of what `source` is now."""
    return (
        target.exists()
        and source.exists()
        and target.stat().st_mtime_ns == source.stat().st_mtime_ns
    )


def _copy(source: Path, unfinished: Path, target: Path) -> None:
    """Copies a regular file as it is; anything else, a pipe say, is left out."""
    if source.is_file():
        shutil.copyfile(source, unfinished)
        durable_files.move(unfinished, target)


def _write(video: Video, path: Path, short_side: int) -> None:
    """Writes all frames of a video, scaled down, as H.264 in MP4. Raises DecodeError, OSError."""
    height, width = (side // 2 * 2 for side in resized_size(*video.size, short_side))
    rate = Fraction(video.frame_rate or FRAME_RATE).limit_denominator(1001)
    with av.open(str(path), "w", format="mp4") as container:
        options = {"crf": str(QUALITY), "preset": "veryfast", "g": str(KEY_FRAME_INTERVAL)}
        stream = container.add_stream("libx264", rate=rate, options=options)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.codec_context.thread_count = 1  # the workers themselves are the parallelism
        for first in range(0, len(video), CHUNK):
            chunk = range(first, min(first + CHUNK, len(video)))
            for image in video.read(chunk, short_side, cv2.INTER_AREA):
                image = np.ascontiguousarray(image[:height, :width])  # yuv420p has even sides
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, "rgb24")))
        container.mux(stream.encode())


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="python -m fluxvit_jax.data.shrink",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--root", required=True, metavar="VIDEOS", help="folder of videos")
    add("--out", required=True, metavar="SMALL", help="folder to write")
    add(
        "--short_side",
        type=int,
        default=SHORT_SIDE,
        help="pixels of the shorter side (default: %(default)s)",
    )
    add("--workers", type=int, default=os.cpu_count(), help="processes (default: %(default)s)")
    add(
        "--clip_seconds",
        type=float,
        default=CLIP_SECONDS,
        help="time limit for a video, which counts as unreadable then; 0: none (%(default)g)",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status: 0, 2 for a UserError, 130 when interrupted."""
    try:
        args = _arguments(argv)
        if args.workers < 1 or not args.clip_seconds >= 0:
            raise UserError("--workers must be above 0, --clip_seconds 0 or more")
        unreadable = shrink(args.root, args.out, args.short_side, args.workers, args.clip_seconds)
    except UserError as error:
        print(f"shrink: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("shrink: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    print(f"{storage.display_name(args.out)}: small copies of the videos")
    for name, reason in unreadable.items():
        print(f"  copied as it is, cannot be read: {name}: {reason}")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stop as on Ctrl-C
    sys.exit(main())
