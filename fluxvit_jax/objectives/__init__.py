"""What a model is trained for: a loss each, with its gradients and what is measured of it."""

from typing import Protocol


class Objective(Protocol):
    """What a training step asks of a loss."""

    def gradients(self, params: dict, frozen: dict, batch: dict) -> tuple[dict, dict]:
        """Gradients, a tree like `params` in float32, and metrics, float32 scalars, "loss" of them.

        frozen: parameters that are not trained, if there are any; batch: patches uint8 [B, P, 588],
        grid int32 [B, 3], label int32 [B], and key [B], by which all is drawn that is random about
        a clip, so that it does not depend on how a batch is cut.
        """
