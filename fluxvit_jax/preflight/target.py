"""What a config's programs are compiled for, and compiling them."""

import contextlib
import sys
import threading
import time
from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from fluxvit_jax import optim, parallel
from fluxvit_jax.budgets import PATCH
from fluxvit_jax.compiler.program import Program, compile_for
from fluxvit_jax.compiler.topology import Topology
from fluxvit_jax.config import admissible_grids, model_config
from fluxvit_jax.evaluate import Setting, predictor
from fluxvit_jax.models.fluxvit import PATCH_VALUES
from fluxvit_jax.state import abstract_frozen, abstract_params, abstract_state
from fluxvit_jax.step import abstract_batch, make_objective, make_train_step

TRAIN = "training step"
UNKNOWN_STEPS = 1000  # of a schedule whose length is not known; no program depends on it


class Target:
    """What a config's programs are compiled for."""

    def __init__(self, config: ConfigDict, where: Topology, mesh: Mesh):
        self.config = config
        self.where = where
        self.mesh = mesh
        self.devices = list(mesh.devices.flat)
        # Schedules of other lengths make the same program.
        self.optimizer = optim.make_optimizer(config, UNKNOWN_STEPS, abstract_params(config))
        self.state = abstract_state(config, self.optimizer, mesh)
        self.params = self.state["params"]
        self.frozen = abstract_frozen(config, mesh)

    @property
    def unit(self) -> int:
        """A batch has a multiple of so many clips."""
        config = self.config
        return config.data.grid_group * config.train.accumulate * parallel.clip_shards(self.mesh)

    def compile_training(self, config: ConfigDict) -> Program:
        """The training step of `config`, which is this one with another batch size."""
        with self._announced(f"{TRAIN}, {config.train.batch_size} clips"):
            grids = admissible_grids(config)
            objective = make_objective(config, grids, parallel.platform_of(self.mesh))
            step = make_train_step(config, objective, self.optimizer, self.mesh)
            batch = abstract_batch(config, grids, self.mesh)
            lowered = step.lower(self.state, self.frozen, batch)
            return compile_for(lowered, self.where, self.devices)

    def compile_evaluation(self, setting: Setting) -> Program:
        """One view of a batch of videos, as `evaluate` runs it."""
        config, mesh = self.config, self.mesh
        with self._announced(evaluation_name(setting)):
            model = model_config(config, parallel.platform_of(mesh))
            program = predictor(model, setting, config.seed, mesh)
            view = jax.ShapeDtypeStruct((), np.int32, sharding=parallel.replicated(mesh))
            lowered = program.lower(self.params, *self.evaluation_arrays(setting), view)
            return compile_for(lowered, self.where, self.devices)

    def evaluation_arrays(self, setting: Setting) -> list[jax.ShapeDtypeStruct]:
        """Probabilities so far, patches and numbers of a batch of videos."""
        B, P, cut = self.evaluation_batch, setting.grid.tokens, parallel.by_clip(self.mesh)
        return [
            jax.ShapeDtypeStruct((B, self.config.model.classes), np.float32, sharding=cut),
            jax.ShapeDtypeStruct((B, P, PATCH_VALUES), np.uint8, sharding=cut),
            jax.ShapeDtypeStruct((B,), np.int32, sharding=cut),
        ]

    @property
    def peak(self) -> float:
        """FLOP/s of all devices, of a TPU by name."""
        return self.where.chip.peak * len(self.devices)

    @property
    def evaluation_batch(self) -> int:
        """Videos at once: `eval.batch_size`, filled up to what the mesh divides."""
        return parallel.filled(self.config.eval.batch_size, self.mesh)

    def _announced(self, what: str) -> contextlib.AbstractContextManager:
        return announced(f"{self.where.name}: compiling the {what}")


def evaluation_name(setting: Setting) -> str:
    """Of its program, in reports."""
    size = f"{setting.grid.frames} x {setting.grid.rows * PATCH} px"
    return f"evaluation, {setting.budget} tokens of {size}"


@contextlib.contextmanager
def announced(what: str) -> Iterator[None]:
    """Says what takes long and, as it goes on, for how long: minutes pass in a compiler."""
    start, done, terminal = time.monotonic(), threading.Event(), sys.stderr.isatty()

    def tell() -> None:
        while not done.wait(1 if terminal else 60):
            begin, end = ("\r", "") if terminal else ("", "\n")
            elapsed = time.monotonic() - start
            print(f"{begin}{what}: {elapsed:.0f} s so far", end=end, file=sys.stderr, flush=True)

    print(what, end="" if terminal else "\n", file=sys.stderr, flush=True)
    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        taken = f"{what}: {time.monotonic() - start:.0f} s"
        print(f"\r{taken}{' ' * 7}" if terminal else taken, file=sys.stderr, flush=True)
