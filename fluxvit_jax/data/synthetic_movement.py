"""The numbers that the courses of a synthetic clip are made of."""

from typing import NamedTuple

import numpy as np

# The moment, as a share of the clip, at which print and object lie alike in all classes. If it were
# always the middle, the first and the last frame would reveal the class of 3 to 5 % more clips.
CENTRAL = (0.35, 0.65)
# Of a movement, over the clip: short sides of the frame, degrees, and magnification.
DISTANCE, DEGREES, MAGNIFICATION = (0.45, 0.75), (70, 120), (1.7, 2.4)


class Movement(NamedTuple):
    """What a clip's courses are made of, whatever its motion; angles are clockwise from the right.

    central: share of the clip at which print and object lie alike in all classes; distance: in
    short sides of the frame, over the clip; heading, other_heading, slant: radians; degrees: of a
    rotation over the clip; magnification: of a zoom over the clip; corner: share of the clip after
    which the print stops, or turns round.
    """

    central: float
    distance: float
    heading: float
    other_heading: float
    slant: float
    degrees: float
    magnification: float
    corner: float


def draw_movement(rng: np.random.Generator) -> Movement:
    """The first that is drawn for a clip's frames."""
    central, distance = rng.uniform(*CENTRAL), rng.uniform(*DISTANCE)
    heading = rng.uniform(-np.pi, np.pi)
    other_heading = heading + rng.uniform(0.6, 1.4) * np.pi  # never near the first
    return Movement(
        central=central,
        distance=distance,
        heading=heading,
        other_heading=other_heading,
        slant=rng.uniform(-0.2, 0.2),
        degrees=rng.uniform(*DEGREES),
        magnification=rng.uniform(*MAGNIFICATION),
        corner=rng.uniform(0.42, 0.58),
    )
