"""Clips a second of a cascade in full batches, against the single cells that its steps are.

    python -m benchmarks.adaptive_serving --workdir=WORKDIR [--validation=LIST] [--cascade=NAME]
        [--batch=48] [--rounds=5]

The workdir needs a search of one view a video; the cascade is by default the most accurate one of
several steps. Videos are decoded and cut before; measured is all else, from patches in the memory
of the host to answers, in turns: medians over the rounds, and of each round's ratio to the last
cell. `taskset -c 1` before it measures one core.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import jax
import numpy as np

from fluxvit_jax.adaptive import cascade as cascades
from fluxvit_jax.adaptive.cascade import Cascade
from fluxvit_jax.adaptive.packing import Finished, PackedCascade, Video, setting_of
from fluxvit_jax.checkpoints.checkpointer import restore_params
from fluxvit_jax.checkpoints.stored_recipe import get_config
from fluxvit_jax.config.network import model_config
from fluxvit_jax.data.annotations import open_source
from fluxvit_jax.distributed import partition_rules
from fluxvit_jax.distributed.devices import device_name
from fluxvit_jax.distributed.mesh import device_put_global, make_mesh, platform_of
from fluxvit_jax.evaluation import evaluate
from fluxvit_jax.models import fluxvit
from fluxvit_jax.token_optimization.planner import read_report


def main() -> int:
    options = parse()
    config = get_config(str(options.workdir))
    config.eval.clips = config.eval.crops = 1
    config.eval.batch_size = options.batch
    config.data.validation = options.validation or config.data.validation
    report = read_report(options.workdir)
    several = {n: own for n, own in report["cascades"].items() if len(own["steps"]) > 1}
    name = options.cascade or max(several, key=lambda n: several[n]["choose"]["credited"])
    cascade = cascades.from_json(report["cascades"][name], name)
    singles = [Cascade((step_alone(step),)) for step in cascade.steps]
    mesh = make_mesh(config)
    model = model_config(config, platform_of(mesh))
    params = fluxvit.network_params(restore_params(options.workdir))
    params = device_put_global(params, partition_rules.shardings(params, mesh))
    videos, labels = decoded(config, cascade, mesh)
    print(f"{name}: {cascade}")
    print(
        f"{len(videos)} clips, batches of {options.batch}, {device_name()}, jax {jax.__version__}"
    )

    def serve(one: Cascade) -> tuple[float, list[Finished]]:
        packed = PackedCascade(one, model, params, options.batch, 1, config.seed, mesh)
        begin, answers = time.perf_counter(), []
        for first in range(0, len(videos), options.batch):
            own = [Video(n, patches) for n, patches in videos[first : first + options.batch]]
            answers += packed.add(own)
        answers += packed.finish()
        return len(videos) / (time.perf_counter() - begin), answers

    ways = {"cascade": cascade} | {str(one): one for one in singles}
    found = {way: serve(one)[1] for way, one in ways.items()}  # compiles
    speeds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(options.rounds):
        for way, one in ways.items():
            speeds[way].append(serve(one)[0])
    for way, own in speeds.items():
        right = np.mean([labels[f.number] == f.probabilities.argmax() for f in found[way]])
        ratios = [a / b for a, b in zip(own, speeds[str(singles[-1])], strict=True)]
        print(
            f"{way}: {statistics.median(own):.0f} clips a second, "
            f"{statistics.median(ratios):.2f} x the last cell, top-1 {right:.1%}"
        )
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.adaptive_serving", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--workdir", type=Path, required=True, help="trained and searched")
    parser.add_argument("--validation", default="", help="list of videos (default: the run's)")
    parser.add_argument("--cascade", default="", help="name in the report")
    parser.add_argument("--batch", type=int, default=48, help="videos of a batch (default: 48)")
    parser.add_argument("--rounds", type=int, default=5, help="timed turns (default: 5)")
    return parser.parse_args()


def step_alone(step: cascades.Step) -> cascades.Step:
    """A step as a cell of its own."""
    size = {key: getattr(step, key) for key in ("budget", "frames", "resolution", "head")}
    return cascades.Step(**size)


def decoded(config, cascade: Cascade, mesh) -> tuple[list, dict[int, int]]:
    """(number, patches by grid) of each readable video, and the labels by number."""
    source = open_source(config.data.validation, config.data.root)
    grids = {step.grid: setting_of(step) for step in cascade.steps}
    videos, labels = [], {}

    def take(batch: dict[str, np.ndarray]) -> None:
        for row, number in enumerate(batch["video"].tolist()):
            if number >= 0 and not batch["failure"][row]:
                patches = {g: batch[f"patches{k}"][row].copy() for k, g in enumerate(grids)}
                videos.append((number, patches))
                labels[number] = int(batch["label"][row])

    settings = list(grids.values())
    nothing = lambda: None  # noqa: E731
    evaluate.for_each_batch(
        take, config, source, settings, mesh, lambda: False, None, nothing, "reading"
    )
    return videos, labels


if __name__ == "__main__":
    sys.exit(main())
