"""Clips a second and core of reading video files: 16 random frames of each.

    python -m benchmarks.decode [FILE or FOLDER ...] [--codecs=H.264,HEVC,VP9,AV1,MPEG-4]
        [--sizes=256p,720p] [--frames=300,40] [--videos=2] [--rounds=20] [--out=FILE.json]

Files, or all videos in folders, are read in place of those that are made: of each codec, size and
length, in turn over the rounds. Ours, a plain PyAV loop and, where they are installed, decord 0.6
and torchcodec in its exact mode (pip install decord==0.6.0; torchcodec wants PyTorch and FFmpeg's
libraries too) read the same frames of the same files in turn, round after round, in changing order,
so that whatever else the machine does hits them alike. Counted is CPU time of all threads. Given
are medians over the rounds, the median of each round's ratio to ours, and how far the pixels are
from ours (the mean of the absolute difference; converting YUV to RGB differs by a unit or two).
"""

import argparse
import importlib.util
import itertools
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np

from benchmarks.videos import CODECS, DecordVideo, PlainVideo, TorchcodecVideo, write_videos
from fluxvit_jax.data.annotations import VIDEO_SUFFIXES
from fluxvit_jax.data.decoding import DecodeError, Video
from fluxvit_jax.data.frame_sampling import train_frames

READERS = {"ours": Video, "pyav": PlainVideo}
if importlib.util.find_spec("decord"):
    READERS["decord"] = DecordVideo
if importlib.util.find_spec("torchcodec"):
    READERS["torchcodec"] = TorchcodecVideo

SIZES = {"256p": (256, 340), "720p": (720, 1280)}
CLIP_FRAMES = 16


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Runs and prints all; the report."""
    parser = argparse.ArgumentParser(description="Benchmark of reading frames of video files.")
    parser.add_argument("files", nargs="*", metavar="FILE", help="videos, or folders of them")
    parser.add_argument("--codecs", default=",".join(CODECS), help="of the files that are made")
    parser.add_argument("--sizes", default=",".join(SIZES), help="of the files that are made")
    parser.add_argument("--frames", default="300,40", help="of the files that are made")
    parser.add_argument("--videos", type=int, default=2, help="files of each kind that are made")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    for known, given in ((CODECS, options.codecs), (SIZES, options.sizes)):
        if unknown := set(given.split(",")) - known.keys():
            parser.error(f"{min(unknown)!r} is none of {', '.join(known)}")
    report: dict[str, Any] = {
        "unit": "clips a second and core",
        "clip": f"{CLIP_FRAMES} random frames",
        "machine": machine(),
        "rounds": options.rounds,
        "results": {},
    }
    print(f"{report['clip']}; {report['machine']}")
    for group, paths in files_of(options):
        try:
            results = report["results"][group] = compare(paths, options.rounds)
        except DecodeError as error:
            sys.exit(f"benchmarks.decode: {error}")
        for name, result in results.items():
            print(
                f"{group:24} {name:10} {result['clips_per_core_second']:7.2f} clips/s a core   "
                f"ours is {result['times_faster_is_ours']:.2f} x as fast   "
                f"pixels differ by {result['pixels_differ']:.2f}",
                flush=True,
            )
    if options.out:
        options.out.write_text(json.dumps(report, indent=2) + "\n")
    return report


def files_of(options: argparse.Namespace) -> Iterator[tuple[str, list[Path]]]:
    """Groups of files by name: those given, or those that are made of each kind."""
    if options.files:
        named = [
            sorted(p.rglob("*.*")) if (p := Path(name)).is_dir() else [p] for name in options.files
        ]
        files = [path for paths in named for path in paths if path.suffix in VIDEO_SUFFIXES]
        if not files:
            sys.exit("no videos in what was given")
        yield f"{len(files)} files", np.random.default_rng(0).permutation(files).tolist()
        return
    kinds = itertools.product(
        options.codecs.split(","), options.sizes.split(","), map(int, options.frames.split(","))
    )
    for codec, size, frames in kinds:
        with tempfile.TemporaryDirectory() as folder:
            own = write_videos(Path(folder), options.videos, frames, SIZES[size], CODECS[codec])
            yield f"{codec}, {size}, {frames} frames", own


def machine() -> str:
    """Processor, cores and the versions that matter."""
    processor = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        processor = names[0] if names else processor
    return f"{processor}, {os.cpu_count()} cores, PyAV {av.__version__}"


def compare(paths: list[Path], rounds: int) -> dict[str, dict]:
    """By reader: its rate, how many times faster ours is, how far its pixels are from ours."""
    rng = np.random.default_rng(0)
    readers = readers_of(paths[0])
    seconds = {name: [] for name in readers}
    apart = {name: [] for name in readers}
    for number in range(rounds + 1):
        path = paths[number % len(paths)]
        with Video(path) as video:
            indices = train_frames(len(video), CLIP_FRAMES, rng)
        clips = {}
        for name in rng.permutation(list(readers)):
            start = time.process_time()
            with readers[name](path) as video:
                clips[name] = video.read(indices)
            if number:  # the first round warms up
                seconds[name].append(time.process_time() - start)
        for name, clip in clips.items():
            apart[name].append(np.abs(clip.astype(np.int16) - clips["ours"]).mean())
    return {
        name: {
            "clips_per_core_second": 1 / statistics.median(taken),
            "times_faster_is_ours": statistics.median(np.divide(taken, seconds["ours"]).tolist()),
            "pixels_differ": float(np.mean(apart[name])),
        }
        for name, taken in seconds.items()
    }


def readers_of(path: Path) -> dict[str, Callable[[Path], Any]]:
    """Those that can read a file at all; says which cannot."""
    able = {}
    for name, reader in READERS.items():
        try:
            with reader(path) as video:
                video.read([0])
        except Exception as error:  # decord and torchcodec have errors of their own
            if reader is Video:
                raise
            print(f"{name} cannot read {path.name}: {str(error).splitlines()[0][:120]}")
        else:
            able[name] = reader
    return able


if __name__ == "__main__":
    main()
