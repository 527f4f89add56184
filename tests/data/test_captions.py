"""Captions against those that the official code cleans."""

import json

import pytest

from fluxvit_jax.data.caption_lists import open_captions
from fluxvit_jax.data.captions import clean
from tests.models.golden import GOLDEN

CASES = json.loads((GOLDEN / "clip/pretext_cases.json").read_text())["cases"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: ascii(case["text"])[:30])
def test_golden_captions(case):
    assert clean(case["text"]) == case["out"]


def test_captions_of_one_word_stay(tmp_path):
    """The official code leaves them out without a word."""
    path = tmp_path / "list.csv"
    path.write_text("path,caption\na.mp4,Dogs!\nb.mp4,Two dogs run.\n")
    assert [example.captions for example in open_captions(path).examples] == [
        ("dogs",),
        ("two dogs run",),
    ]
