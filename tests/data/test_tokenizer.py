"""Ids of texts, against those of the official tokenizer."""

import hashlib
import json
import sys

import numpy as np
import pytest

from fluxvit_jax.data import tokenizer
from fluxvit_jax.errors import UserError
from tests.models.golden import GOLDEN

CASES = json.loads((GOLDEN / "clip/tokenizer_cases.json").read_text())


def test_the_vocabulary_is_the_original():
    found = hashlib.sha256(tokenizer.VOCABULARY.read_bytes()).hexdigest()
    assert found == CASES["vocab"]["sha256"]
    assert "OpenAI" in (tokenizer.VOCABULARY.parent / "LICENSE").read_text()
    sizes = CASES["sot"], CASES["eot"], CASES["pad"], CASES["vocab_size"]
    assert sizes == (tokenizer.START, tokenizer.END, tokenizer.PADDING, tokenizer.END + 1)


@pytest.mark.parametrize(("context", "field"), [(77, "ids"), (32, "ids32"), (8, "ids8")])
def test_golden_ids(context, field):
    cases = [case for case in CASES["cases"] if field in case]
    assert len(cases) > 5
    found = tokenizer.tokenize([case["text"] for case in cases], context)
    assert found.dtype == np.int32
    for case, row in zip(cases, found, strict=True):
        expected = case[field] + [tokenizer.PADDING] * (context - len(case[field]))
        assert row.tolist() == expected, case["text"]


def test_a_long_text_is_cut_and_its_tokens_are_counted():
    text = "cat " * 100
    assert tokenizer.token_count(text) == 102 and tokenizer.token_count("cat") == 3
    [row] = tokenizer.tokenize([text])
    assert len(row) == 77 and row[-1] == tokenizer.END and (row != tokenizer.PADDING).all()


def test_without_the_package_it_says_what_to_type(monkeypatch):
    monkeypatch.setitem(sys.modules, "ftfy", None)
    tokenizer._tokenizer.cache_clear()
    with pytest.raises(
        UserError, match=r"need the package ftfy: pip install 'fluxvit_jax\[clip\]'"
    ):
        tokenizer.tokenize(["a cat"])
