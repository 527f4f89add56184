"""Answers that are no finite numbers, of which nothing is measured: NaN is no class and no rank."""

import numpy as np

from fluxvit_jax.errors import UserError


def check_finite(numbers: np.ndarray | float, weights: str, where: str) -> None:
    """Raises UserError unless all numbers are finite.

    numbers: answers, of any shape; weights: the name of those that gave them; where: what they were
    asked, such as "at budget 1024".
    """
    if not np.isfinite(numbers).all():
        raise UserError(
            f"{weights}: these weights give no finite numbers {where}, so nothing is measured; "
            "take other weights, or where bfloat16 is too coarse --config.model.dtype=float32"
        )
