"""Numbers as they are printed."""

import math

import pytest

from fluxvit_jax.reports.wording import number


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "&ndash;"),
        (0, "0.00"),
        (0.0123, "0.0123"),
        (1.5, "1.50"),
        (-12.34, "-12.3"),
        (123.4, "123"),
        (12345.6, "12,346"),
        (math.nan, "nan"),
        (math.inf, "inf"),
    ],
)
def test_three_digits(value, text):
    assert number(value) == text
