"""RandAugment policies, and the timm-style strings that describe them."""

import functools
import re
from typing import NamedTuple

from fluxvit_jax.errors import UserError


class RandAugment(NamedTuple):
    """Number of operations for a clip, and their strength on the scale of 0 to 10."""

    magnitude: float = 10.0
    layers: int = 2
    std: float = 0.0
    increasing: bool = False
    probability: float = 0.5


@functools.lru_cache
def parse_randaugment(text: str) -> RandAugment:
    """Read a timm-style string: "rand-m7-n4-mstd0.5-inc1".

    m: magnitude (10), n: operations a clip (2), mstd: standard deviation of the magnitude (0),
    inc: whether all operations grow with the magnitude (0), p: probability of each (0.5).
    Raises UserError for anything else.
    """
    name, *parts = text.split("-")
    matches = [re.fullmatch(r"(mstd|inc|m|n|p)(\d+(?:\.\d+)?)", part) for part in parts]
    values = {match[1]: float(match[2]) for match in matches if match}
    if name != "rand" or None in matches:
        raise UserError(
            f"randaugment {text!r} is not understood; it reads like rand-m7-n4-mstd0.5-inc1"
        )
    default = RandAugment()
    return RandAugment(
        magnitude=values.get("m", default.magnitude),
        layers=int(values.get("n", default.layers)),
        std=values.get("mstd", default.std),
        increasing=bool(values.get("inc", default.increasing)),
        probability=values.get("p", default.probability),
    )
