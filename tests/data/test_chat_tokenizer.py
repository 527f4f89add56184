"""Ids and texts of a language model's tokenizer, against those of Hugging Face transformers."""

import json
import pickle
import shutil
import sys

import numpy as np
import pytest

from fluxvit_jax.data.chat_tokenizer import ChatTokenizer
from fluxvit_jax.errors import UserError
from tests.models.golden import GOLDEN

CHAT = GOLDEN / "chat"
CASES = json.loads((CHAT / "prompts.json").read_text())["tokenizer"]


@pytest.fixture(scope="module")
def tokenizer() -> ChatTokenizer:
    return ChatTokenizer(CHAT)


@pytest.fixture
def folder(tmp_path):
    """A folder of a model, of which only the tokenizer is there."""
    shutil.copy(CHAT / "tokenizer.json", tmp_path)
    return tmp_path


@pytest.mark.parametrize("text", CASES["encode"], ids=ascii)
def test_golden_ids_and_texts(tokenizer, text):
    case = CASES["encode"][text]
    assert tokenizer.encode(text) == case["ids"]
    assert tokenizer.decode(case["ids"], skip_special=False) == case["decoded"]
    assert tokenizer.decode(case["ids"]) == case["decoded_without_special"]


def test_special_tokens_and_size(tokenizer):
    found = {"<|im_start|>": tokenizer.im_start, "<|im_end|>": tokenizer.im_end}
    assert found | {"<|endoftext|>": tokenizer.padding} == CASES["ids"]
    assert tokenizer.size == CASES["size"]
    assert tokenizer.end_tokens == (tokenizer.im_end,)
    with pytest.raises(UserError, match=r"tokenizer.json: lacks the token <\|eot_id\|>"):
        tokenizer.id_of("<|eot_id|>")


def test_it_travels_to_workers(tokenizer):
    other = pickle.loads(pickle.dumps(tokenizer))
    text = "<|im_start|>user\nnaïve 😀"
    assert other.encode(text) == tokenizer.encode(text)
    assert other.end_tokens == tokenizer.end_tokens and other.size == tokenizer.size


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"config.json": {"eos_token_id": 360}}, (360, 362)),
        ({"config.json": {"eos_token_id": None}}, (362,)),
        ({"config.json": {}, "generation_config.json": {"eos_token_id": [362, 360]}}, (362, 360)),
        # What generation asks for comes before the network's own.
        (
            {"config.json": {"eos_token_id": 1}, "generation_config.json": {"eos_token_id": 360}},
            (360, 362),
        ),
        (
            {"config.json": {"eos_token_id": 7}, "generation_config.json": {"top_p": 0.8}},
            (7, 362),
        ),
    ],
)
def test_end_tokens_of_the_configs(folder, files, expected):
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    assert ChatTokenizer(folder).end_tokens == expected


@pytest.mark.parametrize("text", CASES["encode"], ids=ascii)
def test_streamed_pieces_are_whole_characters_and_make_up_the_text(tokenizer, text):
    ids = tokenizer.encode(text)
    pieces = list(tokenizer.stream(iter(np.array(ids, np.int32))))
    assert "".join(pieces) == tokenizer.decode(ids)
    assert all(pieces) and "\ufffd" not in "".join(pieces)


def test_characters_of_several_tokens_wait_for_their_last(tokenizer):
    ids = tokenizer.encode("é😀.")
    assert list(tokenizer.stream(ids)) == ["é", "😀", "."]
    # An answer cut inside a character, and bytes that are no character, keep their marks.
    for broken in (ids[:-2], [*ids[:1], *ids], ids[2:5] * 2):
        assert "".join(tokenizer.stream(broken)) == tokenizer.decode(broken)
    assert list(tokenizer.stream([])) == []


def test_pieces_come_at_once(tokenizer):
    """A piece is out before the next token is asked for."""
    asked = []

    def ids():
        for number in tokenizer.encode("the video"):
            asked.append(number)
            yield number

    stream = tokenizer.stream(ids())
    assert next(stream) == tokenizer.decode(asked) and len(asked) == 1


def test_odd_ids_and_texts_do_not_stop_it(tokenizer):
    assert tokenizer.decode([39, tokenizer.size + 100]) == "H"
    assert tokenizer.encode("a\ud800b") == tokenizer.encode("a?b")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", None, "tokenizer.json: no such file; name the folder of a model"),
        ("tokenizer.json", "{", "tokenizer.json: is damaged, or no tokenizer: EOF while parsing"),
        ("tokenizer.json", "[1]", "tokenizer.json: is damaged, or no tokenizer: "),
        ("config.json", "{", "config.json: no JSON: "),
        ("config.json", '{"eos_token_id": "x"}', "eos_token_id=x is no token, nor a list of"),
        ("config.json", '{"eos_token_id": [1, -2]}', "is no token, nor a list of tokens"),
    ],
)
def test_errors_are_one_line(folder, name, content, message):
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(content)
    with pytest.raises(UserError) as raised:
        ChatTokenizer(folder)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_a_tokenizer_of_another_family(folder):
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"] = []
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"lacks the token <\|im_start\|>; is this a chat model"):
        ChatTokenizer(folder)


def test_without_the_package_it_says_what_to_type(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match=r"tokenizers: pip install 'fluxvit_jax\[chat\]'"):
        ChatTokenizer(CHAT)


def test_a_model_that_thinks_is_kept_from_it(tmp_path):
    """By an empty thought, as Qwen3's own template has it."""
    values = json.loads((CHAT / "tokenizer.json").read_text())
    assert ChatTokenizer(CHAT).no_thoughts == ""
    last = dict(values["added_tokens"][-1])
    values["added_tokens"].append(last | {"id": last["id"] + 1, "content": "<think>"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    assert ChatTokenizer(tmp_path).no_thoughts == "<think>\n\n</think>\n\n"
