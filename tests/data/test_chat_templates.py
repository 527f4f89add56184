"""Ids and labels of conversations and prompts, against those of VideoChat-Flash."""

import json

import numpy as np
import pytest

from fluxvit_jax.data.chat_templates import (
    IGNORED,
    VIDEO,
    Turn,
    encode_conversation,
    follow_up_ids,
    has_video,
    prompt_ids,
    read_turns,
    time_message,
)
from fluxvit_jax.data.chat_tokenizer import ChatTokenizer
from fluxvit_jax.errors import UserError
from tests.models.golden import GOLDEN

GOLDEN_PROMPTS = json.loads((GOLDEN / "chat/prompts.json").read_text())
CASES = GOLDEN_PROMPTS["cases"]
TEMPLATES = {"plain": "plain", "qwen_2": "qwen"}
# What we say where the official code fails an assertion.
REFUSED = {
    "two_turns": "the conversation has 4 turns, the plain template takes 2",
    "gpt_first": "the conversation has 3 turns, the plain template takes 2",
    "text_only": "the conversation has no <image>, where the video goes",
}
QUESTION = {"from": "human", "value": "<image>\nWhat is the person doing?"}
ANSWER = {"from": "gpt", "value": "Cooking."}


@pytest.fixture(scope="module")
def tokenizer() -> ChatTokenizer:
    return ChatTokenizer(GOLDEN / "chat")


def encoded(case: dict, tokenizer: ChatTokenizer, labels: str) -> tuple[np.ndarray, np.ndarray]:
    return encode_conversation(
        case["conversations"],
        tokenizer,
        TEMPLATES[case["template"]],
        labels,
        case["time_message"],
    )


def text_of(ids: np.ndarray, tokenizer: ChatTokenizer) -> str:
    """The text of ids, with the marker for the video."""
    parts = np.split(ids, np.flatnonzero(ids == VIDEO))
    first, *others = [tokenizer.decode(own[own != VIDEO], skip_special=False) for own in parts]
    return "<image>".join([first, *others])


def spans(labels: np.ndarray) -> list[tuple[int, int]]:
    """The first label of each run of those that count, and the one after its last."""
    counted = np.diff((labels != IGNORED).astype(int), prepend=0, append=0)
    return list(
        zip(np.flatnonzero(counted == 1), np.flatnonzero(counted == -1), strict=True),
    )


@pytest.mark.parametrize("name", [name for name in CASES if "error" not in CASES[name]])
def test_golden_ids_and_official_labels(tokenizer, name):
    case = CASES[name]
    ids, labels = encoded(case, tokenizer, "official")
    assert ids.dtype == labels.dtype == np.int32
    assert ids.tolist() == case["input_ids"] and labels.tolist() == case["labels"]
    assert text_of(ids, tokenizer) == case["text"]
    assert spans(labels) == [(span["start"], span["end"]) for span in case["labelled"]]


@pytest.mark.parametrize(
    "name", [name for name in CASES if CASES[name].get("error", "").startswith("Assertion")]
)
def test_what_fails_an_official_assertion_is_refused_in_a_line(tokenizer, name):
    with pytest.raises(UserError) as raised:
        encoded(CASES[name], tokenizer, "official")
    assert str(raised.value) == REFUSED[name.split(".")[1]]


@pytest.mark.parametrize("template", TEMPLATES)
def test_other_names_of_the_keys_which_the_official_code_cannot_read(tokenizer, template):
    case = CASES[f"{template}.odd_role"]
    assert "KeyError" in case["error"]
    turns = [{"from": "human", "value": "<image>\nHi"}, {"from": "gpt", "value": "Hi."}]
    expected = encoded(case | {"conversations": turns}, tokenizer, "official")
    assert np.array_equal(encoded(case, tokenizer, "official"), expected)


@pytest.mark.parametrize("name", [name for name in CASES if "labels" in CASES[name]])
def test_labels_of_answers_are_their_content_and_end(tokenizer, name):
    case = CASES[name]
    ids, labels = encoded(case, tokenizer, "answers")
    assert ids.tolist() == case["input_ids"]
    end = "\n" if case["template"] == "plain" else "<|im_end|>"
    turns = case["after_preprocess_multimodal"]
    answers = [turn["value"] + end for turn in turns[1:] if turn["from"] == "gpt"]
    found = [tokenizer.decode(labels[slice(*s)], skip_special=False) for s in spans(labels)]
    assert found == answers
    assert (labels[labels != IGNORED] == ids[labels != IGNORED]).all()


def test_an_answer_that_begins_with_a_newline_has_it_labeled(tokenizer):
    turns = [QUESTION, {"from": "gpt", "value": "\n\nCooking."}]
    ids, labels = encode_conversation(turns, tokenizer, "qwen")
    whole = text_of(ids, tokenizer)
    assert whole.endswith("assistant\n\n\nCooking.<|im_end|>\n")
    found = tokenizer.decode(labels[labels != IGNORED], skip_special=False)
    assert found.endswith("\nCooking.<|im_end|>") and "assistant" not in found


@pytest.mark.parametrize(
    "question", ["<video>\nHi there", "Hi there <video>", "Hi there\n<image>", "<image>\nHi there"]
)
def test_the_marker_goes_first_and_has_two_names(tokenizer, question):
    turns = [{"role": "user", "content": question}, Turn("assistant", "Hi.")]
    ids, _ = encode_conversation(turns, tokenizer, "qwen")
    assert "user\n<image>\nHi there<|im_end|>" in text_of(ids, tokenizer)
    assert has_video(read_turns(turns))


def test_beside_the_marker_the_other_one_is_a_word(tokenizer):
    turns = [Turn("user", "<image>\nHTML?"), Turn("assistant", "<video></video>")]
    ids, labels = encode_conversation(turns, tokenizer, "qwen")
    assert (ids == VIDEO).sum() == 1 and labels[ids == VIDEO] == IGNORED
    assert "<video></video><|im_end|>" in tokenizer.decode(labels[labels > 0], skip_special=False)
    assert not has_video([Turn("user", "HTML?"), turns[1]])


@pytest.mark.parametrize("template", ["plain", "qwen"])
def test_what_the_official_code_deletes(tokenizer, template):
    noise = "QA_GT_caption_based_noisy"
    noisy = [QUESTION, {"from": "gpt", "value": f"Cook{noise}ing."}]
    expected = encode_conversation([QUESTION, ANSWER], tokenizer, template)
    assert np.array_equal(encode_conversation(noisy, tokenizer, template), expected)


@pytest.mark.parametrize(
    ("turns", "template", "message"),
    [
        ([QUESTION], "qwen", "has no answer to learn: all labels would be ignored"),
        ([ANSWER, QUESTION], "qwen", "has no answer to learn: all labels would be ignored"),
        ([], "qwen", "has no answer to learn"),
        ([], "plain", "has 0 turns, the plain template takes 2"),
        ([ANSWER, QUESTION], "plain", "takes a question of the user, then an answer"),
        ([QUESTION, ANSWER, QUESTION, ANSWER], "qwen", "has 2 <image>; it can be about one"),
        ([{"from": "human", "value": "<image><image>"}, ANSWER], "plain", "has 2 <image>"),
        (
            [QUESTION, {"from": "gpt", "value": "See <image>"}],
            "qwen",
            "an answer of the conversation has <image>, which belongs in a question",
        ),
        ([QUESTION, {"from": "tool", "value": ""}], "qwen", "turn 2 of the conversation is by 't"),
        ([QUESTION, {"from": ["gpt"], "value": ""}], "qwen", "turn 2 of the conversation is by ["),
        ([QUESTION, {"from": "gpt", "value": 3}], "qwen", 'turn 2 of the conversation is not {"f'),
        ([QUESTION, {"from": "gpt"}], "qwen", "turn 2 of the conversation is not"),
        (["Hello"], "qwen", "turn 1 of the conversation is not"),
    ],
)
@pytest.mark.parametrize("labels", ["answers", "official"])
def test_errors_are_one_line(tokenizer, turns, template, labels, message):
    with pytest.raises(UserError) as raised:
        encode_conversation(turns, tokenizer, template, labels)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_wrong_names_are_errors_of_the_caller(tokenizer):
    with pytest.raises(ValueError, match="template: 'qwen_2' is none of plain, qwen"):
        encode_conversation([QUESTION, ANSWER], tokenizer, "qwen_2")
    with pytest.raises(ValueError, match="labels: 'all' is none of answers, official"):
        encode_conversation([QUESTION, ANSWER], tokenizer, "qwen", "all")


def test_golden_time_message():
    messages = {case["time_message"] for case in CASES.values()}
    assert messages == {"", time_message(12.5, 4, training=True)}


def test_golden_prompts(tokenizer):
    message = time_message(12.5, 4, training=False)
    first, second = (GOLDEN_PROMPTS["inference"][name] for name in ("first_turn", "second_turn"))
    ids = prompt_ids([], "What is shown?", tokenizer, message)
    assert ids.dtype == np.int32
    assert ids.tolist() == first["input_ids"] and text_of(ids, tokenizer) == first["prompt"]
    ids = prompt_ids([("What is shown?", "A dog.")], "Where?", tokenizer, message)
    assert ids.tolist() == second["input_ids"] and text_of(ids, tokenizer) == second["prompt"]


@pytest.mark.parametrize("answer", ["A dog.", "  Two dogs,\nthen a cat 😀", ""])
@pytest.mark.parametrize("message", ["", time_message(3, 8, training=False)])
def test_a_follow_up_only_appends(tokenizer, answer, message):
    """The ids of the whole are those read so far, those of the answer, and those added."""
    history = [("What?", answer), ("<image>\nWhere? ", "There.")]
    asked = ["What?", "<image>\nWhere? ", "When?"]
    ids = prompt_ids([], asked[0], tokenizer, message)
    for number, (_, text) in enumerate(history, 1):
        added = follow_up_ids(asked[number], tokenizer)
        ids = np.concatenate([ids, tokenizer.encode(text), added])
        assert np.array_equal(ids, prompt_ids(history[:number], asked[number], tokenizer, message))
    # In one piece the text has the same ids.
    before, after = text_of(ids, tokenizer).split("<image>")
    assert ids.tolist() == [*tokenizer.encode(before), VIDEO, *tokenizer.encode(after)]


def test_prompts_are_what_training_shows(tokenizer):
    turns = [QUESTION, ANSWER, {"from": "human", "value": "Why?"}, ANSWER]
    ids, labels = encode_conversation(turns, tokenizer, "qwen")
    question = QUESTION["value"].removeprefix("<image>\n")
    for history, asked in (([], question), ([(question, "Cooking.")], "Why?")):
        prompt = prompt_ids(history, asked, tokenizer)
        assert np.array_equal(ids[: len(prompt)], prompt)
        assert labels[len(prompt) - 1] == IGNORED != labels[len(prompt)]


@pytest.mark.parametrize("question", ["<image>\nWhat?", "What? <video>", "What?"])
def test_markers_around_a_question_are_left_out(tokenizer, question):
    ids = prompt_ids([], question, tokenizer)
    assert np.array_equal(ids, prompt_ids([], "What?", tokenizer))
    assert (ids == VIDEO).sum() == 1
    asked = follow_up_ids(question, tokenizer)
    assert np.array_equal(asked, follow_up_ids("What?", tokenizer))


def test_markers_inside_a_question_are_words(tokenizer):
    ids = prompt_ids([], "What does <image> do?", tokenizer)
    assert (ids == VIDEO).sum() == 1 and "<image> do" in tokenizer.decode(ids[ids != VIDEO])
