"""Numbers as text."""

import math
from collections.abc import Sequence


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def interval(ends: Sequence[float] | None) -> str:
    """The ends of an interval of shares, in percent."""
    return f"{100 * ends[0]:.1f} to {percent(ends[1])}" if ends else ""


def points(difference: float, sign: str = "+") -> str:
    """A difference of two shares in points of a percent."""
    return f"{100 * difference:{sign}z.1f}".replace("-", "&minus;")


def number(value: float | None) -> str:
    """Three significant digits, or all digits before the point."""
    if value is None:
        return "&ndash;"
    if not math.isfinite(value):
        return f"{value}"
    before = math.floor(math.log10(abs(value))) + 1 if value else 1
    return f"{value:,.{max(0, 3 - before)}f}"


def count(total: int, noun: str) -> str:
    return f"{total:,} {noun}{'' if total == 1 else 's'}"
