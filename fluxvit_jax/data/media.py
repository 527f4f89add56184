"""Steps of videos and steps of images, in turn by their shares."""

import math
from typing import NamedTuple


class Turn(NamedTuple):
    """images: whether a step shows images; before: earlier steps of the same medium."""

    images: bool
    before: int


def turn_of_step(step: int, image_share: float) -> Turn:
    """What a step, from 0, shows. Any run of steps has both shares to within one step.

    The official code shuffles the steps of an epoch; here a step depends on its number alone.
    """
    before, after = (math.floor(number * image_share) for number in (step, step + 1))
    return Turn(True, before) if after > before else Turn(False, step - before)
