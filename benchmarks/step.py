"""Time of a training step and of evaluation on the devices at hand, at several token budgets.

    python -m benchmarks.step [--variants=Ti,S] [--batch=2] [--frames=12] [--resolution=112]
        [--rounds=3] [--out=FILE.json]

The budgets keep the released recipe's proportions: a half, a third and a sixth of the grid's
tokens (3072, 2048 and 1024 of 6144, for which give --frames=24 --resolution=224). All contenders
run in turn, round after round, each round starting with another, so that whatever else the machine
does hits them alike. Given are medians over the rounds, of the time and of each round's ratio to
all tokens. Model FLOPs are those of the matrix products of the kept tokens, two a
multiply-accumulate, and three times as many for a step; recomputation does not count.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict
from tqdm import tqdm

from fluxvit_jax.config.checks import validate
from fluxvit_jax.config.fields import default_config
from fluxvit_jax.config.grids import admissible_grids
from fluxvit_jax.config.network import model_config
from fluxvit_jax.data.patches import PATCH_VALUES
from fluxvit_jax.distributed.devices import device_name
from fluxvit_jax.distributed.mesh import make_mesh, replicated, shard_batch
from fluxvit_jax.evaluation.settings import Setting
from fluxvit_jax.evaluation.view_programs import predictor
from fluxvit_jax.grids import PATCH, Grid
from fluxvit_jax.models import fluxvit
from fluxvit_jax.models.flops import gflops
from fluxvit_jax.training.optimizer import make_optimizer
from fluxvit_jax.training.train_state import abstract_params, initial_state
from fluxvit_jax.training.train_step import make_objective, make_train_step

SHARES = (2, 3, 6)  # of the grid's tokens: one in so many is kept


class Contender(NamedTuple):
    """Something to time: `run` waits until the devices are done."""

    run: Callable[[], None]
    gigaflops: float  # a clip
    compiled: Callable[[], int]  # programs so far


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    mesh = make_mesh(default_config())
    side = options.resolution // PATCH
    grid = Grid(options.frames, side, side)
    results = {}
    for variant in options.variants.split(","):
        for name, make in (("training", training), ("evaluation", evaluation)):
            title = f"{variant} {name}"
            results[title] = measure(make(variant, grid, options.batch, mesh), options, title)
            print(
                f"\n{title}: {options.batch} clips of {grid.tokens} tokens\n{table(results[title])}"
            )
    report = machine() | {
        "clips": options.batch,
        "grid": list(grid),
        "tokens": grid.tokens,
        "dtype": dtype(),
        "rounds": options.rounds,
        "results": results,
    }
    print(f"\n{report['devices']} x {report['device']}, {report['cores']} cores")
    if options.out:
        options.out.write_text(json.dumps(report, indent=2) + "\n")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Benchmark of training steps and evaluation.")
    parser.add_argument("--variants", default="Ti,S", help="networks, with commas between")
    parser.add_argument("--batch", type=int, default=2, help="clips on all devices together")
    parser.add_argument("--frames", type=int, default=12, help="of a clip")
    parser.add_argument("--resolution", type=int, default=112, help="of a clip, pixels")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    return parser.parse_args(arguments)


def training(variant: str, grid: Grid, batch: int, mesh: Mesh) -> dict[str, Contender]:
    """One step with all tokens, at the largest budget (Flux-Single), at all three (Flux-Multi)."""
    budgets = tuple(grid.tokens // share for share in SHARES)
    contenders = {
        "all tokens": ((grid.tokens,), "none"),
        "Flux-Single": (budgets[:1], "group_dynamic"),
        "Flux-Multi": (budgets, "group_dynamic"),
    }
    return {
        f"{name} ({' + '.join(map(str, kept))})": step_of(
            make_config(variant, grid, batch // mesh.size, kept, selector), batch, mesh
        )
        for name, (kept, selector) in contenders.items()
    }


def step_of(config: ConfigDict, batch: int, mesh: Mesh) -> Contender:
    """A training step that goes on from the state of the one before."""
    grids = admissible_grids(config)
    optimizer = make_optimizer(config, 1000, abstract_params(config))
    objective = make_objective(config, grids, jax.default_backend())
    step = make_train_step(config, objective, optimizer, mesh)
    state = initial_state(config, optimizer, mesh)
    clips = shard_batch(random_clips(batch, grids[0]), mesh)

    def run() -> None:
        nonlocal state
        state, measured = step(state, {}, clips)
        jax.block_until_ready(measured)

    model = model_config(config)
    flops = sum(6 * gflops(model, grids[0], budget).kept for budget in config.train.budgets)
    return Contender(run, flops, step._cache_size)


def evaluation(variant: str, grid: Grid, batch: int, mesh: Mesh) -> dict[str, Contender]:
    """One view of each clip at every budget, and the smallest budget without any selection."""
    config = make_config(variant, grid, batch // mesh.size, (grid.tokens,), "group_dynamic")
    params = fluxvit.init_params(model_config(config), jax.random.key(0))
    params = jax.device_put(params, replicated(mesh))
    budgets = [grid.tokens // share for share in (1, *SHARES)]
    settings = {f"{budget} of {grid.tokens}": Setting(budget, grid, 0) for budget in budgets}
    fewest = grid._replace(frames=max(1, grid.frames // SHARES[-1]))
    settings[f"all of {fewest.tokens}"] = Setting(fewest.tokens, fewest, 0)
    return {
        name: view_of(config, setting, params, batch, mesh) for name, setting in settings.items()
    }


def view_of(
    config: ConfigDict, setting: Setting, params: dict, batch: int, mesh: Mesh
) -> Contender:
    model = model_config(config, jax.default_backend())
    program = predictor(model, setting, 0, mesh, multi_label=False)
    clips = shard_batch(
        {
            "total": np.zeros((batch, config.model.classes), np.float32),
            "patches": random_patches(batch, setting.grid),
            "video": np.arange(batch, dtype=np.int32),
        },
        mesh,
    )

    def run() -> None:
        placed = (clips[name] for name in ("total", "patches", "video"))
        jax.block_until_ready(program(params, *placed, np.int32(0)))

    flops = 2 * gflops(model, setting.grid, setting.budget).kept
    return Contender(run, flops, program._cache_size)


def make_config(
    variant: str, grid: Grid, group: int, budgets: tuple[int, ...], selector: str
) -> ConfigDict:
    """One grid only, and a group of all clips of a device."""
    config = default_config(variant)
    config.model.dtype = dtype()
    config.model.selector.kind = selector
    config.data.grids.frames = str(grid.frames)
    config.data.grids.resolutions = str(grid.rows * PATCH)
    config.data.grids.tokens = (grid.tokens, grid.tokens)
    config.data.clips_per_grid = config.train.batch_size = group
    config.train.budgets = budgets
    config.eval.settings = ((grid.tokens, grid.frames, grid.rows * PATCH),)
    validate(config)
    return config


def dtype() -> str:
    """CPUs compute in float32, what all of them have instructions for."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def random_clips(batch: int, grid: Grid) -> dict[str, np.ndarray]:
    """As `train_step.device_batch` makes them."""
    return {
        "patches": random_patches(batch, grid),
        "grid": np.tile(np.int32(grid), (batch, 1)),
        "label": np.arange(batch, dtype=np.int32),
        "bad": np.zeros(batch, bool),
        "stop": np.zeros(batch, np.int32),
    }


def random_patches(batch: int, grid: Grid) -> np.ndarray:
    shape = (batch, grid.tokens, PATCH_VALUES)
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def measure(
    contenders: dict[str, Contender], options: argparse.Namespace, title: str
) -> dict[str, dict]:
    """Medians of all contenders, by name; ratios are to the first."""
    names = list(contenders)
    seconds = {name: [] for name in names}
    for number in tqdm(range(options.rounds + 1), desc=title, leave=False):  # the first compiles
        first = number % len(names)
        for name in names[first:] + names[:first]:
            start = time.perf_counter()
            contenders[name].run()
            if number:
                seconds[name].append(time.perf_counter() - start)
    for name, contender in contenders.items():
        if contender.compiled() != 1:
            raise RuntimeError(f"{title}, {name}: {contender.compiled()} compiled programs")
    return {
        name: {
            "milliseconds": 1e3 * (median := statistics.median(own)),
            "clips_per_second": options.batch / median,
            "times_faster": statistics.median(np.divide(seconds[names[0]], own).tolist()),
            "model_gigaflops_a_clip": contenders[name].gigaflops,
            "model_gigaflops_per_second": contenders[name].gigaflops * options.batch / median,
        }
        for name, own in seconds.items()
    }


def table(results: dict[str, dict]) -> str:
    lines = [
        f"{'tokens':30} {'ms':>8} {'clips/s':>8} {'faster':>7} {'GFLOP/clip':>10} {'GFLOP/s':>8}"
    ]
    for name, own in results.items():
        ms, clips, faster, gigaflops, speed = own.values()
        lines.append(
            f"{name:30} {ms:8.1f} {clips:8.2f} {faster:6.2f}x {gigaflops:10.2f} {speed:8.1f}"
        )
    return "\n".join(lines)


def machine() -> dict[str, str | int]:
    return {
        "device": device_name(),
        "devices": jax.device_count(),
        "cores": os.cpu_count(),
        "jax": jax.__version__,
    }


if __name__ == "__main__":
    main()
