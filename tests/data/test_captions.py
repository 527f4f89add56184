"""Captions against those that the official code cleans."""

import json

import pytest

from fluxvit_jax.data.captions import clean
from tests.models.golden import GOLDEN

CASES = json.loads((GOLDEN / "clip/pretext_cases.json").read_text())["cases"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: ascii(case["text"])[:30])
def test_golden_captions(case):
    assert clean(case["text"]) == case["out"]
