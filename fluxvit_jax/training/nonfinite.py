"""Steps whose loss or gradient is not a finite number: they change nothing and are counted."""

import math
from collections.abc import Mapping
from typing import Any

from fluxvit_jax.checkpoints.checkpointer import Checkpoints
from fluxvit_jax.distributed.console import say
from fluxvit_jax.errors import UserError

SAVED = "skipped_steps"  # key of `NonfiniteSteps.state` in a checkpoint


class NonfiniteSteps:
    """Counts the steps that `train_step` skipped, and ends a run in which too many follow.

    Attributes:
        total: skipped steps of the run.
        in_row: skipped steps since the last good one.
    """

    def __init__(self, most: int, restored: Mapping[str, Any], checkpoints: Checkpoints):
        """most: `train.max_nonfinite`; restored: what a checkpoint holds of it, or nothing."""
        self._most = most
        self._checkpoints = checkpoints
        self.total, self.in_row = restored.get(SAVED, (0, 0))

    def note(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Counts `step` if it was skipped. Raises UserError if it is one too many in a row."""
        if not scalars["skipped"]:
            self.in_row = 0
            return
        self.total += 1
        self.in_row += 1
        names = ("loss", "gradient_norm", "update_norm")
        name = next(name for name in names if not math.isfinite(scalars[name]))
        what = f"step {step}: the {name.replace('_', ' ')} is {scalars[name]}"
        if self.in_row >= self._most:
            last_good = step - self.in_row
            # Its weights are finite and gave no finite loss since, so a run must not go on from it.
            aside = self._checkpoints.set_aside(last_good)
            raise UserError(
                f"{what}, as in {self.in_row} steps in a row (config.train.max_nonfinite="
                f"{self._most}); the last good step was {last_good}"
                + (f", whose checkpoint is now {aside}" if aside else "")
                + "; the same command with a lower --config.optim.learning_rate goes on from the "
                "latest checkpoint"
            )
        say(
            f"warning: {what}; the step is skipped and changes nothing ({self.in_row} in a row, "
            f"{self.total} in the run)"
        )

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return {SAVED: [self.total, self.in_row]}
