"""Answers that are no finite numbers: NaN has no likeliest class, no rank, and measures nothing."""

import numpy as np
from numpy.typing import ArrayLike

from fluxvit_jax.errors import UserError

DAMAGED = (
    "the network's answers are no finite numbers: its weights are damaged, or too large for the "
    "dtype"
)


def check_finite(numbers: ArrayLike, otherwise: str = DAMAGED) -> None:
    """Raises a UserError with the text `otherwise` unless all numbers are finite."""
    if not np.isfinite(numbers).all():
        raise UserError(otherwise)


def check_measured(numbers: ArrayLike, weights: str, where: str) -> None:
    """Raises UserError unless all numbers of a measurement are finite.

    numbers: answers, of any shape; weights: the name of those that gave them; where: what they were
    asked, such as "at budget 1024".
    """
    check_finite(
        numbers,
        f"{weights}: these weights give no finite numbers {where}, so nothing is measured; "
        "take other weights, or where bfloat16 is too coarse --config.model.dtype=float32",
    )
