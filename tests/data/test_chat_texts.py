"""Ids and labels of a batch, against golden conversations."""

import json

import numpy as np
import pytest

from fluxvit_jax.data.annotations import Record
from fluxvit_jax.data.chat_templates import IGNORED, VIDEO, read_turns
from fluxvit_jax.data.chat_texts import ChatTexts
from fluxvit_jax.errors import UserError
from tests.models.chat_golden import CHAT, write_stage1_folder

CASES = json.loads((CHAT / "prompts.json").read_text())["cases"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(write_stage1_folder(tmp_path_factory.mktemp("llm")))


def records(*names):
    return [
        Record(name, 0, "", conversation=read_turns(CASES[name]["conversations"])) for name in names
    ]


def arrays(texts, own):
    return texts(own, np.arange(len(own)), 0)


@pytest.mark.parametrize("template, names", [
    ("plain", ("plain.caption", "plain.question")),
    ("qwen", ("qwen_2.two_turns", "qwen_2.question")),
])  # fmt: skip
def test_texts_are_padded_on_the_right(folder, template, names):
    found = arrays(ChatTexts(folder, template, "official", 100), records(*names))
    for row, name in enumerate(names):
        ids, labels = (np.array(CASES[name][key]) for key in ("input_ids", "labels"))
        assert found["place"][row] == np.flatnonzero(ids == VIDEO)[0]
        real = ids != VIDEO
        np.testing.assert_array_equal(found["text"][row, : len(ids)][real], ids[real])
        np.testing.assert_array_equal(found["labels"][row, : len(ids)], labels)
        assert (found["labels"][row, len(ids) :] == IGNORED).all()


def test_long_texts_are_cut_with_a_word(folder, caplog):
    own = records("qwen_2.question")
    whole = arrays(ChatTexts(folder, "qwen", "answers", 100), own)
    count, place = (whole["labels"] != IGNORED).sum(), int(whole["place"][0])
    cut = arrays(ChatTexts(folder, "qwen", "answers", 62), own)
    assert 0 < (cut["labels"] != IGNORED).sum() < count
    assert f"which leaves {(cut['labels'] != IGNORED).sum()} of {count} labels" in caplog.text
    none = arrays(ChatTexts(folder, "qwen", "official", place), own)  # before the video
    assert (none["labels"] == IGNORED).all() and none["place"][0] == 0


def test_a_length_that_leaves_no_answer_is_refused(folder):
    own = records("qwen_2.question")
    ChatTexts(folder, "qwen", "answers", 100).check(own)
    with pytest.raises(UserError, match="of 20 tokens, no answer is left of the first 1 conver"):
        ChatTexts(folder, "qwen", "answers", 20).check(own)
