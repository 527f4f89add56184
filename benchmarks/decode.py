"""Clips a second and core of reading video files: 16 random frames of 300, at 256p and 720p.

    python -m benchmarks.decode [FILE or FOLDER ...] [--videos=4] [--rounds=20] [--out=FILE.json]

Files, or all videos in folders, are read in place of those that are made, in turn over the rounds.
Ours, a plain PyAV loop and, where it is installed (only this needs it: pip install decord==0.6.0),
decord 0.6 read the same frames of the same files in turn, round after round, in changing order, so
that whatever else the machine does hits them alike. Counted is CPU time of all threads. Given are
medians over the rounds, the median of each round's ratio to decord or the loop, and whether the
pixels are ours.
"""

import argparse
import importlib.util
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np

from benchmarks.videos import DecordVideo, PlainVideo, write_videos
from fluxvit_jax.data.annotations import VIDEO_SUFFIXES
from fluxvit_jax.data.decoding import Video
from fluxvit_jax.data.frame_sampling import train_frames

READERS = {"ours": Video, "pyav": PlainVideo}
if importlib.util.find_spec("decord"):
    READERS["decord"] = DecordVideo

SIZES = {"256p": (256, 340), "720p": (720, 1280)}
FILE_FRAMES, CLIP_FRAMES = 300, 16


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Benchmark of reading frames of video files.")
    parser.add_argument("files", nargs="*", metavar="FILE", help="videos, or folders of them")
    parser.add_argument("--videos", type=int, default=4, help="files of each size that are made")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    report = {
        "unit": "clips a second and core",
        "clip": f"{CLIP_FRAMES} random frames",
        "machine": machine(),
        "rounds": options.rounds,
        "results": {},
    }
    print(f"{report['clip']}; {report['machine']}")
    for group, paths in files_of(options.files, options.videos):
        results = report["results"][group] = compare(paths, options.rounds)
        for name, result in results.items():
            print(
                f"{group}  {name:7} {result['clips_per_core_second']:7.2f} clips/s a core   "
                f"ours is {result['times_faster_is_ours']:.2f} x as fast   "
                f"same pixels: {result['same_pixels']}"
            )
    if options.out:
        options.out.write_text(json.dumps(report, indent=2) + "\n")


def files_of(given: list[str], number: int) -> Iterator[tuple[str, list[Path]]]:
    """Groups of files by name: those given, or `number` of each size, made in H.264."""
    if given:
        named = [sorted(p.rglob("*.*")) if (p := Path(name)).is_dir() else [p] for name in given]
        files = [path for paths in named for path in paths if path.suffix in VIDEO_SUFFIXES]
        if not files:
            sys.exit("no videos in what was given")
        yield f"{len(files)} files", np.random.default_rng(0).permutation(files).tolist()
        return
    for name, size in SIZES.items():
        with tempfile.TemporaryDirectory() as folder:
            yield name, write_videos(Path(folder), number, FILE_FRAMES, size)


def machine() -> str:
    """Processor, cores and the versions that matter."""
    processor = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        processor = names[0] if names else processor
    return f"{processor}, {os.cpu_count()} cores, PyAV {av.__version__}"


def compare(paths: list[Path], rounds: int) -> dict[str, dict]:
    """By reader: its rate, how many times faster ours is, and whether it gives our pixels."""
    rng = np.random.default_rng(0)
    seconds = {name: [] for name in READERS}
    same = dict.fromkeys(READERS, True)
    for number in range(rounds + 1):
        path = paths[number % len(paths)]
        with Video(path) as video:
            indices = train_frames(len(video), CLIP_FRAMES, rng)
        clips = {}
        for name in rng.permutation(list(READERS)):
            start = time.process_time()
            with READERS[name](path) as video:
                clips[name] = video.read(indices)
            if number:  # the first round warms up
                seconds[name].append(time.process_time() - start)
        for name, clip in clips.items():
            same[name] = same[name] and np.array_equal(clip, clips["ours"])
    return {
        name: {
            "clips_per_core_second": 1 / statistics.median(taken),
            "times_faster_is_ours": statistics.median(np.divide(taken, seconds["ours"]).tolist()),
            "same_pixels": same[name],
        }
        for name, taken in seconds.items()
    }


if __name__ == "__main__":
    main()
