"""Time and memory of a pre-training step on the device at hand, with its teacher and without.

    python -m benchmarks.distill_step [--student=base] [--teacher=InternVideo2-1B] [--batch=16]
        [--frames=16] [--resolution=224] [--rounds=5] [--out=FILE.json] [--config.FIELD=VALUE ...]

The step of `configs/pretrain.py`, from random weights, on one grid and one device. "asked" runs the
teacher in the step; "cached" is given its answers, as `--mode=cache` keeps them. Both have the same
weights and clips, so their first losses must agree, or nothing is timed. Then they run in turn,
round after round; given are medians. The teacher's share is the part of a step that the cache
saves. Model FLOPs are the pre-flight's, memory is what the compiled program takes. Fields of the
recipe may be set as in a run. On a CPU the computation is in float32: small sizes try this program
itself, and mean nothing else.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from benchmarks.step import Contender, dtype, machine, measure, random_clips, table
from fluxvit_jax.config.grids import admissible_grids
from fluxvit_jax.config.loading import load_config
from fluxvit_jax.distributed.mesh import make_mesh, platform_of, shard_batch
from fluxvit_jax.errors import ArgumentParser, UserError
from fluxvit_jax.grids import Grid
from fluxvit_jax.models import fluxvit
from fluxvit_jax.models.flops import GIGA
from fluxvit_jax.objectives.flux_umt import FluxUMT
from fluxvit_jax.objectives.flux_umt_teacher import make_network, teacher_config
from fluxvit_jax.preflight.compiler.memory import memory_of
from fluxvit_jax.preflight.programs import model_flops
from fluxvit_jax.training import cache_targets
from fluxvit_jax.training.optimizer import make_optimizer
from fluxvit_jax.training.train_state import abstract_params, initial_state
from fluxvit_jax.training.train_step import make_objective, make_train_step

GROUP = 8  # clips that share a grid, unless there are fewer
TOLERANCE = 1e-3  # of the two first losses, relative; both read the same bfloat16 features

Tree = dict[str, Any]


def main(arguments: list[str] | None = None) -> int:
    try:
        options = parse(arguments)
        config = make_config(options)
        report = machine() | {"config": config.to_dict()} | compare(config, options)
    except UserError as error:
        print(f"benchmarks.distill_step: {error}", file=sys.stderr)
        return 2
    if options.out:
        options.out.write_text(json.dumps(report, indent=2) + "\n")
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Raises UserError for options that are wrong."""
    parser = ArgumentParser(
        prog="benchmarks.distill_step",
        description=__doc__.splitlines()[0],
        epilog="--config.FIELD=VALUE sets a field of the recipe.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--student", default="base", help="small, base or large")
    parser.add_argument("--teacher", default="InternVideo2-1B", help="a distill.network")
    parser.add_argument("--batch", type=int, default=16, help="clips")
    parser.add_argument("--frames", type=int, default=16, help="of a clip")
    parser.add_argument("--resolution", type=int, default=224, help="of a clip, pixels")
    parser.add_argument("--rounds", type=int, default=5, help="of a step of each")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options, options.overrides = parser.parse_known_args(arguments)
    for name in ("batch", "frames", "rounds"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name}={getattr(options, name)}: must be above 0")
    return options


def make_config(options: argparse.Namespace) -> ConfigDict:
    """The recipe on one grid. Raises UserError for what cannot be."""
    T, side = options.frames, options.resolution
    tokens = Grid.square(T, side).tokens
    return load_config(
        f"configs/pretrain.py:{options.student}",
        [
            f"--config.model.dtype={dtype()}",
            f"--config.distill.network={options.teacher}",
            f"--config.data.grids.frames={T}",
            f"--config.data.grids.resolutions={side}",
            f"--config.data.grids.tokens=({tokens}, {tokens})",
            f"--config.data.clips_per_grid={min(GROUP, options.batch)}",
            f"--config.train.batch_size={options.batch}",
            *options.overrides,
        ],
    )


def compare(config: ConfigDict, options: argparse.Namespace) -> dict[str, Any]:
    """Checks and times both; prints and returns what was found."""
    mesh = make_mesh(config, jax.local_devices()[:1])
    grid = admissible_grids(config)[0]
    clips = shard_batch(random_clips(config.train.batch_size, grid), mesh)
    teacher = random_teacher(config, mesh)
    steps = {"asked": Step(config, mesh, teacher, clips)}
    with config.unlocked():
        config.distill.cache = "given"
    asked = {name: clips[name] for name in ("patches", "grid")}
    answers = cache_targets.teacher_program(config, mesh)(teacher, asked)
    steps["cached"] = Step(config, mesh, {}, clips | answers)
    first = {name: step.run()["loss"] for name, step in steps.items()}
    said = ", ".join(f"{name} {loss:.6f}" for name, loss in first.items())
    print(f"first losses: {said}", flush=True)
    if not abs(first["asked"] / first["cached"] - 1) < TOLERANCE:
        raise RuntimeError(f"the first losses differ by more than {TOLERANCE}")

    title = f"{options.student} from {options.teacher}"
    contenders = {name: step.contender for name, step in steps.items()}
    results = measure(contenders, options, title)
    share = 1 - 1 / results["cached"]["times_faster"]
    B, (T, _, _) = options.batch, grid
    print(f"\n{title}: {B} clips of {T} x {options.resolution} px, {config.model.dtype}")
    print(table(results))
    gib = {name: step.gib for name, step in steps.items()}
    print(f"GiB: {', '.join(f'{name} {own:.2f}' for name, own in gib.items())}")
    print(f"the teacher's share of a step: {share:.0%}")
    return {"first_losses": first, "teacher_share": share, "gib": gib, "results": results}


class Step:
    """A compiled step that goes on from the state of the one before."""

    def __init__(self, config: ConfigDict, mesh: Mesh, frozen: Tree, clips: Tree):
        optimizer = make_optimizer(config, 1000, abstract_params(config))
        objective = make_objective(config, admissible_grids(config), platform_of(mesh))
        self._state = initial_state(config, optimizer, mesh)
        self._given = frozen, clips
        step = make_train_step(config, objective, optimizer, mesh)
        self._step = step.lower(self._state, *self._given).compile()
        self.gib = memory_of(self._step).used / 2**30
        self.contender = Contender(self.run, model_flops(config).all / GIGA, lambda: 1)

    def run(self) -> dict[str, float]:
        """What the step has measured, once the device is done."""
        self._state, measured = self._step(self._state, *self._given)
        return {name: float(value) for name, value in jax.device_get(measured).items()}


def random_teacher(config: ConfigDict, mesh: Mesh) -> Tree:
    """Weights as a teacher's are loaded, of no meaning."""
    places = FluxUMT.abstract_frozen(config, mesh)

    def make() -> Tree:
        network = make_network(teacher_config(config), nnx.Rngs(0))
        return jax.tree.map(lambda x, own: x.astype(own.dtype), fluxvit.split(network)[1], places)

    return jax.jit(make, out_shardings=jax.tree.map(lambda own: own.sharding, places))()


if __name__ == "__main__":
    sys.exit(main())
