"""Validation on the way of a run: when it is due, what it found, whether to stop early."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from fluxvit_jax.checkpoints.checkpointer import BEST
from fluxvit_jax.checkpoints.workdir import metrics_by_step
from fluxvit_jax.data.supervised_workers import Quarantine
from fluxvit_jax.distributed.console import say
from fluxvit_jax.distributed.hosts import compute_on_host0
from fluxvit_jax.distributed.watchdog import Watchdog
from fluxvit_jax.evaluation import answer_loss
from fluxvit_jax.evaluation.answer_loss import AnswerLoss
from fluxvit_jax.evaluation.evaluate import Evaluation, evaluate
from fluxvit_jax.evaluation.retrieve import Retrieval, measure
from fluxvit_jax.evaluation.settings import settings_of
from fluxvit_jax.objectives.base import objective_class
from fluxvit_jax.training.kept_patches import KeptPatches
from fluxvit_jax.training.metrics import Metrics, Progress
from fluxvit_jax.training.setup import Setup

Tree = dict[str, Any]

VALIDATION = "validation"  # split of the metrics


class Validation:
    """Evaluations of a run on its validation videos, if it has any. All hosts call each method.

    The early stop follows from the accuracies in the workdir's metrics, so it needs no state.

    Attributes:
        pending: whether the run was interrupted before the validation of its first step was done.
    """

    def __init__(self, setup: Setup, metrics: Metrics, watchdog: Watchdog, start: int):
        config, workdir = setup.config, setup.workdir
        self._setup = setup
        self._metrics = metrics
        self._watchdog = watchdog
        self._measure = objective_class(config).measure(config)
        self._metric = f"{self._measure.start}{config.eval.settings[0][0]}"
        self._pictures: KeptPatches | None = None
        self._patience = setup.schedule.steps_per_epoch * config.train.early_stopping_epochs
        found = compute_on_host0(lambda: metrics_by_step(workdir, VALIDATION))
        self._history: list[tuple[int, float]] = [
            (step, line[self._metric])
            for step, line in found
            if step <= start and line.get(self._metric) is not None
        ]
        self.pending = self.due(start) and start not in dict(found)

    def due(self, step: int) -> bool:
        """Whether the model is evaluated after this step."""
        return self._setup.data.validation is not None and self._setup.schedule.evaluates_at(step)

    def reason_to_stop(self) -> str:
        """Why training should stop early; "" to go on."""
        return early_stop(self._history, self._patience, self._metric, self._measure.falls)

    def quality_of(self, step: int) -> dict[str, float]:
        """What ranks the checkpoint of a step; empty if it was not evaluated, or in vain."""
        value = dict(self._history).get(step)
        if value is None:
            return {}
        return {BEST: -value if self._measure.falls else value}

    def run(
        self,
        step: int,
        state: Tree,
        progress: Progress,
        interrupted: Callable[[], bool],
        quarantine: Quarantine,
    ) -> None:
        """Evaluates the model (its average, if kept), unless `interrupted` ends that.

        quarantine: see `pipeline.evaluation_batches`.

        Raises NothingReadableError if no video can be read.
        """
        params = state["ema"] if "ema" in state else state["params"]
        self._watchdog.pause()  # until the first batch: it has to be compiled
        if self._pictures is None:
            say(f"step {step}: the first evaluation, whose programs are compiled now")
        with progress.paused():
            evaluation = self._validate(params, interrupted, quarantine)
        self._watchdog.pause()  # the pictures have to be compiled as well
        if evaluation is None:
            return
        scalars = evaluation.scalars()
        self._metrics.write(step, VALIDATION, scalars)
        failed = {failure["id"]: failure["reason"] for failure in evaluation.report["failures"]}
        self._metrics.write_pictures(step, VALIDATION, self._kept_patches(failed).pictures(params))
        say(f"step {step}: {', '.join(f'{k} {v:.4g}' for k, v in evaluation.told().items())}")
        if warning := evaluation.report["warning"]:
            say(f"warning: step {step}: {warning}")
        value = scalars[self._metric]
        if not math.isfinite(value):
            say(f"warning: step {step}: {self._metric} is {value}, so it ranks no checkpoint")
            return
        self._history.append((step, value))

    def _validate(
        self, params: Tree, interrupted: Callable[[], bool], quarantine: Quarantine
    ) -> Evaluation | Retrieval | AnswerLoss | None:
        """Accuracy, retrieval, or the loss of answers; None if `interrupted` ended it."""
        setup, alive = self._setup, self._watchdog.alive
        config, mesh, videos = setup.config, setup.mesh, setup.data.validation
        assert videos is not None
        if self._measure.validation == "accuracy":
            return evaluate(
                params, config, videos, mesh, interrupted, quarantine=quarantine, after_batch=alive
            )
        params = setup.frozen | params
        if self._measure.validation == "answer_loss":
            return answer_loss.measure(params, config, videos, mesh, alive, interrupted, quarantine)
        assert setup.data.pairs is not None
        pairs, settings = setup.data.pairs, settings_of(config)
        return measure(params, config, pairs, settings, mesh, alive, interrupted, quarantine)

    def _kept_patches(self, failed: Quarantine) -> KeptPatches:
        """Made at the first validation. failed: the reason for each video that failed in it."""
        if self._pictures is None:
            videos = self._setup.data.validation
            assert videos is not None
            self._pictures = KeptPatches(self._setup.config, videos, self._setup.mesh, failed)
        return self._pictures


def early_stop(
    validations: Sequence[tuple[int, float]], patience: int, metric: str, falls: bool = False
) -> str:
    """The reason to stop training early; "" to go on.

    validations: step and accuracy of each, in order; patience: steps without a better one, 0 for no
    early stop; metric: its name for the reason; falls: whether less of it is better.
    """
    if not patience or not validations:
        return ""
    sign = -1 if falls else 1
    best_step, best = max(validations, key=lambda one: (sign * one[1], -one[0]))
    if validations[-1][0] - best_step < patience:
        return ""
    moved = "fallen below" if falls else "risen above"
    return f"because {metric} has not {moved} {best:.4g} since step {best_step}"
