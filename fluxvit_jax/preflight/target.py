"""A config's programs, compiled for the devices of a topology."""

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from typing import cast

import jax
import numpy as np
from jax.sharding import Mesh
from jax.stages import Wrapped
from ml_collections import ConfigDict

from fluxvit_jax.config.grids import admissible_grids
from fluxvit_jax.config.network import model_config
from fluxvit_jax.distributed.mesh import (
    batch_sharding,
    clip_shards,
    platform_of,
    replicated,
    round_up_to_shards,
)
from fluxvit_jax.evaluation.settings import Setting
from fluxvit_jax.evaluation.view_programs import predictor
from fluxvit_jax.grids import PATCH
from fluxvit_jax.models import fluxvit
from fluxvit_jax.models.fluxvit import PATCH_VALUES
from fluxvit_jax.objectives.base import objective_class
from fluxvit_jax.preflight.compiler.program import Program, compile_for
from fluxvit_jax.preflight.compiler.topology import Topology
from fluxvit_jax.training.optimizer import make_optimizer
from fluxvit_jax.training.train_state import abstract_params, abstract_state
from fluxvit_jax.training.train_step import abstract_batch, make_objective, make_train_step

TRAIN = "training step"
UNKNOWN_STEPS = 1000  # schedules of all lengths make the same program


class Target:
    """A config with the devices to compile its programs for, and shapes of its arrays."""

    def __init__(self, config: ConfigDict, where: Topology, mesh: Mesh):
        self.config = config
        self.where = where
        self.mesh = mesh
        self.devices = list(mesh.devices.flat)
        self.optimizer = make_optimizer(config, UNKNOWN_STEPS, abstract_params(config))
        self.state = abstract_state(config, self.optimizer, mesh)
        self.params = fluxvit.network_params(self.state["params"])
        self.frozen = objective_class(config).abstract_frozen(config, mesh)

    @property
    def unit(self) -> int:
        """Clips that a batch is a multiple of."""
        config = self.config
        return config.data.clips_per_grid * config.train.grad_accum_steps * clip_shards(self.mesh)

    def compile_training(self, config: ConfigDict) -> Program:
        """The training step of `config`, which may differ from this one in the batch size.

        Where steps differ, it is the largest one.
        """
        with self._announced(f"{TRAIN}, {config.train.batch_size} clips"):
            grids = admissible_grids(config)
            objective, *_ = make_objective(config, grids, platform_of(self.mesh)).turns().values()
            step = cast(Wrapped, make_train_step(config, objective, self.optimizer, self.mesh))
            batch = abstract_batch(config, grids, self.mesh)
            lowered = step.lower(self.state, self.frozen, batch)
            return compile_for(lowered, self.where, self.devices)

    def compile_evaluation(self, setting: Setting) -> Program:
        """One view of a batch of videos, as `evaluate` runs it."""
        config, mesh = self.config, self.mesh
        with self._announced(evaluation_name(setting)):
            model = model_config(config, platform_of(mesh))
            several = config.train.multi_label
            made = predictor(model, setting, config.seed, mesh, multi_label=several)
            program = cast(Wrapped, made)
            view = jax.ShapeDtypeStruct((), np.int32, sharding=replicated(mesh))
            lowered = program.lower(self.params, *self.evaluation_arrays(setting), view)
            return compile_for(lowered, self.where, self.devices)

    def evaluation_arrays(self, setting: Setting) -> list[jax.ShapeDtypeStruct]:
        """Probabilities so far, patches and numbers of a batch of videos."""
        B, P, cut = self.evaluation_batch, setting.grid.tokens, batch_sharding(self.mesh)
        return [
            jax.ShapeDtypeStruct((B, self.config.model.classes), np.float32, sharding=cut),
            jax.ShapeDtypeStruct((B, P, PATCH_VALUES), np.uint8, sharding=cut),
            jax.ShapeDtypeStruct((B,), np.int32, sharding=cut),
        ]

    @property
    def peak(self) -> float:
        """FLOP/s of all devices of a TPU by name."""
        return self.where.known_chip.peak * len(self.devices)

    @property
    def evaluation_batch(self) -> int:
        """Videos per batch: `eval.batch_size`, rounded up to what the mesh divides."""
        return round_up_to_shards(self.config.eval.batch_size, self.mesh)

    def _announced(self, what: str) -> contextlib.AbstractContextManager:
        return announced(f"{self.where.name}: compiling the {what}")


def evaluation_name(setting: Setting) -> str:
    """The name of its program in reports."""
    size = f"{setting.grid.frames} x {setting.grid.rows * PATCH} px"
    return f"evaluation, {setting.budget} tokens of {size}"


@contextlib.contextmanager
def announced(what: str) -> Iterator[None]:
    """Prints `what` and the elapsed time while it runs: a compiler may take minutes."""
    start, done, terminal = time.monotonic(), threading.Event(), sys.stderr.isatty()

    def report_elapsed() -> None:
        while not done.wait(1 if terminal else 60):
            begin, end = ("\r", "") if terminal else ("", "\n")
            elapsed = time.monotonic() - start
            print(f"{begin}{what}: {elapsed:.0f} s so far", end=end, file=sys.stderr, flush=True)

    print(what, end="" if terminal else "\n", file=sys.stderr, flush=True)
    thread = threading.Thread(target=report_elapsed, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        taken = f"{what}: {time.monotonic() - start:.0f} s"
        print(f"\r{taken}{' ' * 7}" if terminal else taken, file=sys.stderr, flush=True)
