"""Captions of the demo's clips: what moves, which way and how fast, in several phrasings."""

import math

from fluxvit_jax.data.synthetic_movement import DEGREES, DISTANCE, MAGNIFICATION, Movement

WAYS = ("right", "down", "left", "up")  # clockwise, from angle 0 on
SUBJECTS = ("a picture", "a photograph")
SPEEDS = {True: ("fast", "quickly"), False: ("slowly", "at a slow pace")}

# What happens, in two phrasings, with the way in place of {}.
EVENTS = {
    "object_over_moving": ("moves {} under a red ball", "slides {} and leaves a red ball"),
    "object_over_still": ("stands still and a red ball moves {}", "rests while a ball flies {}"),
    "pan": ("moves {}", "slides {}"),
    "reversal": ("moves {} and comes back", "goes {} and then returns"),
    "rotate": ("turns {}", "rotates {}"),
    "start_stop": ("moves {} and stops", "slides {} and then stands still"),
    "zoom_in": ("grows", "comes closer"),
    "zoom_out": ("shrinks", "goes away"),
}


def of_clip(motion: str, movement: Movement) -> list[str]:
    """The captions of a clip of one of `synthetic.MOTIONS`; equal ones mean equal things."""
    kind = motion.partition("_")[0]
    events = EVENTS[motion if motion in EVENTS else kind]
    way, fast = _way(motion, movement), _is_fast(motion, movement)
    return [
        f"{subject} {event.format(way)} {speed}"
        for subject, event, speed in zip(SUBJECTS, events, SPEEDS[fast], strict=True)
    ] + [f"{SPEEDS[fast][0]} {SUBJECTS[0]} {events[1].format(way)}"]


def _way(motion: str, movement: Movement) -> str:
    """Which way print or object moves on screen: the nearest of `WAYS`, or the sense of a turn."""
    if motion.startswith("rotate"):
        return motion.removeprefix("rotate_")
    if motion.startswith("pan"):  # the camera pans; the picture moves the other way
        name = motion.removeprefix("pan_")
        return WAYS[(WAYS.index(name) + 2) % len(WAYS)]
    angle = movement.other_heading if motion == "object_over_still" else movement.heading
    return WAYS[round(angle / (math.pi / 2)) % len(WAYS)]


def _is_fast(motion: str, movement: Movement) -> bool:
    """Whether a clip moves more than the middle one of its kind."""
    if motion.startswith("rotate"):
        return movement.degrees > sum(DEGREES) / 2
    if motion.startswith("zoom"):
        return movement.magnification > sum(MAGNIFICATION) / 2
    return movement.distance > sum(DISTANCE) / 2
