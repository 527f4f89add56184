"""Training clips a second and core of the whole data path: decode, augment, cut into patches.

    python -m benchmarks.data_path [--videos=16] [--height=256] [--width=340] [--rounds=12]
        [--frames=300] [--out=FILE.json]

The path is `TrainGroups`, what a worker runs; only the reader of the files is exchanged: ours, a
plain PyAV loop, decord 0.6 (pip install decord==0.6.0). All of them make the same group of clips in
turn, round after round, so that whatever else the machine does hits them alike. Counted is CPU time
of all threads; given are medians over the rounds, and medians of each round's ratio to ours.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path

import av
import cv2
import numpy as np

from benchmarks.videos import DecordVideo, PlainVideo, write_videos
from fluxvit_jax.config.fields import default_config
from fluxvit_jax.config.grids import admissible_grids
from fluxvit_jax.data.decoding import Video
from fluxvit_jax.data.pipeline import TrainGroups
from fluxvit_jax.data.sources import Example, FileSource

READERS = {"ours": Video, "pyav": PlainVideo, "decord": DecordVideo}


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    cv2.setNumThreads(0)
    with tempfile.TemporaryDirectory() as folder:
        paths = write_videos(Path(folder), options.videos, options.frames, options.size)
        # Many more than files: the shuffle of a handful takes long, and no data set is so small.
        source = FileSource([Example(path.name, 0, str(path)) for path in paths] * 50)
        groups = {name: make_groups(source, reader) for name, reader in READERS.items()}
        results = measure(groups, options.rounds)
    report = {
        "unit": "training clips a second and core",
        "videos": f"{options.frames} frames of {options.size[0]} x {options.size[1]} px, H.264",
        "grids": "6..24 frames, 112..336 px, 2048..6144 tokens",
        "augmentation": groups["ours"].augment.randaugment,
        "rounds": options.rounds,
        "processor": platform.processor() or platform.machine(),
        "results": results,
    }
    for name, result in results.items():
        print(
            f"{name:8} {result['clips_per_core_second']:6.2f} clips/s a core, "
            f"{result['ratio']:.2f} x ours, same pixels: {result['same_pixels']}"
        )
    if options.out:
        options.out.write_text(json.dumps(report, indent=2) + "\n")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Benchmark of the training data path.")
    parser.add_argument("--videos", type=int, default=16, help="files to make and read")
    parser.add_argument("--frames", type=int, default=300, help="of a file")
    parser.add_argument("--height", type=int, default=256)
    parser.add_argument("--width", type=int, default=340)
    parser.add_argument("--rounds", type=int, default=12, help="groups of 8 clips for each reader")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    options.size = options.height, options.width
    return options


def make_groups(source: FileSource, reader: type) -> TrainGroups:
    """The released fine-tuning recipe: its grids and its RandAugment."""
    config = default_config()
    config.data.augment.randaugment = "rand-m7-n4-mstd0.5-inc1"
    return TrainGroups(
        source=source,
        seed=0,
        grids=admissible_grids(config),
        group=config.data.clips_per_grid,
        repeats=1,
        augment=config.data.augment,
        open_video=reader,
    )


def measure(groups: dict[str, TrainGroups], rounds: int) -> dict[str, dict]:
    """Times group after group with each reader in turn, starting with another each round."""
    speeds = {name: [] for name in groups}
    same = dict.fromkeys(groups, True)
    names = list(groups)
    for number in range(rounds + 1):  # the first warms up
        patches = {}
        for name in names[number % len(names) :] + names[: number % len(names)]:
            start = time.process_time()
            group = groups[name][number]
            seconds = time.process_time() - start
            if failed := [text for text in group["failure"] if text]:
                raise RuntimeError(f"{name}: {failed[0]}")
            patches[name] = group["patches"]
            if number:
                speeds[name].append(len(group["label"]) / seconds)
        for name in names:
            same[name] &= np.array_equal(patches[name], patches["ours"])
    return {
        name: {
            "clips_per_core_second": statistics.median(own),
            "ratio": statistics.median(
                speed / ours for speed, ours in zip(own, speeds["ours"], strict=True)
            ),
            "same_pixels": same[name],
        }
        for name, own in speeds.items()
    }


if __name__ == "__main__":
    av.logging.set_level(av.logging.ERROR)
    main()
