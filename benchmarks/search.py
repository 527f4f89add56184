"""What a search takes beside its forward passes, on the demo's clips.

    python -m benchmarks.search [--clips=demo/clips] [--videos=96] [--rounds=3]

The demo's network with random weights and 5 x 5 grids at 3 budgets see so many validation clips:
decoding, cutting, transfers and noting results are all of it. In turn with that, the same programs
run as often on patches that lie on the device already. Both are compiled before; given are the
medians of their times and of each round's ratio.
"""

import argparse
import contextlib
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from benchmarks.demo import data_flags
from fluxvit_jax.config.loading import load_config
from fluxvit_jax.config.network import model_config
from fluxvit_jax.data.decoding import Video
from fluxvit_jax.data.patches import PATCH_VALUES
from fluxvit_jax.distributed.devices import device_name
from fluxvit_jax.distributed.mesh import make_mesh, replicated, shard_batch
from fluxvit_jax.distributed.watchdog import Watchdog
from fluxvit_jax.evaluation.trained_weights import Weights
from fluxvit_jax.models import fluxvit
from fluxvit_jax.token_optimization.candidate_evaluator import CandidateEvaluator
from fluxvit_jax.token_optimization.candidates import candidates
from fluxvit_jax.token_optimization.search import Search, splits_of


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    config = load_config(
        "configs/demo.py",
        [
            *data_flags(options.clips),
            f"--config.search.split={options.clips / 'validation.csv'}",
            f"--config.search.videos={options.videos}",
        ],
    )
    model = model_config(config)
    weights = Weights(fluxvit.init_params(model, jax.random.key(0)), "random", None)
    cells = len(candidates(config, model))
    print(f"{cells} cells, {options.videos} videos, {device_name()}, jax {jax.__version__}")
    with counting_openings() as opened:
        searching(config, weights), passing(config, weights, options.videos)  # these compile
    print(f"{len(opened)} times a video was opened, {len(set(opened))} of them different ones")
    rounds = [
        (searching(config, weights), passing(config, weights, options.videos))
        for _ in range(options.rounds)
    ]
    search, passes = (statistics.median(seconds) for seconds in zip(*rounds, strict=True))
    ratio = statistics.median(whole / part for whole, part in rounds)
    print(f"search {search:.1f} s, its forward passes {passes:.1f} s, ratio {ratio:.2f}")
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.search", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--clips", type=Path, default=Path("demo/clips"), help="the demo's clips")
    parser.add_argument("--videos", type=int, default=96, help="clips to search on (default: 96)")
    parser.add_argument("--rounds", type=int, default=3, help="of either (default: 3)")
    return parser.parse_args(arguments)


@contextlib.contextmanager
def counting_openings() -> Iterator[list[str]]:
    """The files of the videos that are opened meanwhile."""
    opened, real = [], Video.__init__

    def note(self: Video, source: str, *rest: object) -> None:
        opened.append(source)
        real(self, source, *rest)

    Video.__init__ = note
    try:
        yield opened
    finally:
        Video.__init__ = real


def searching(config: ConfigDict, weights: Weights) -> float:
    """Seconds in which all cells see the videos."""
    splits, notes = splits_of(config, weights)
    with (
        tempfile.TemporaryDirectory() as folder,
        Search(config, weights, splits, notes, Path(folder), Watchdog(0, folder)) as search,
    ):
        begin = time.perf_counter()
        search.choose()
        return time.perf_counter() - begin


def passing(config: ConfigDict, weights: Weights, videos: int) -> float:
    """Seconds of the forward passes alone: of each cell, for each chunk and view."""
    mesh, b = make_mesh(config), config.eval.batch_size
    evaluator = CandidateEvaluator(config, weights.params, mesh)
    params = jax.device_put(weights.params, replicated(mesh))
    passes, seconds = math.ceil(videos / b) * config.eval.clips * config.eval.crops, 0.0
    start = {"total": np.zeros((b, config.model.classes), np.float32), "video": np.arange(b)}
    for cell in candidates(config, model_config(config)):
        shape = (b, cell.grid.tokens, PATCH_VALUES)
        patches = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
        clips = shard_batch(start | {"patches": patches}, mesh)
        program = evaluator.program(cell)
        begin = time.perf_counter()
        for view in range(passes):
            total = program(
                params, clips["total"], clips["patches"], clips["video"], np.int32(view)
            )
            total.block_until_ready()
        seconds += time.perf_counter() - begin
    evaluator.close()
    return seconds


if __name__ == "__main__":
    sys.exit(main())
