"""The parts of the chat study that take no training."""

import json

import numpy as np
import pytest
from flax import nnx

from benchmarks import chat_decoder, chat_study
from fluxvit_jax.config.checks import validate
from fluxvit_jax.config.loading import read_recipe
from fluxvit_jax.convert import language_model_files
from fluxvit_jax.data.chat_templates import IGNORED, encode_conversation, prompt_ids
from fluxvit_jax.data.chat_tokenizer import ChatTokenizer
from fluxvit_jax.data.conversations import open_conversations
from fluxvit_jax.models import fluxvit
from fluxvit_jax.models.language_model import LanguageModel
from fluxvit_jax.objectives.base import objective_class
from fluxvit_jax.objectives.flux_chat import FluxChat
from tests import tiny

CAPTIONS = {
    "a.mp4": [
        "a picture moves left and stops fast",
        "a photograph slides left and then stands still quickly",
        "fast a picture slides left and then stands still",
    ],
    "b.mp4": ["a picture grows slowly", "a photograph comes closer at a slow pace"],
    "c.mp4": ["a picture turns clockwise fast", "a photograph rotates clockwise quickly"],
}
ANSWERS = [texts[0] for texts in CAPTIONS.values()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A decoder after two steps."""
    folder = tmp_path_factory.mktemp("decoder")
    chat_decoder.write_decoder(folder, chat_study.QUESTION, ANSWERS, steps=2)
    return folder


def test_the_tokenizer_takes_every_text(folder):
    tokenizer = ChatTokenizer(folder)
    assert len({tokenizer.im_start, tokenizer.im_end, tokenizer.padding}) == 3
    assert len(tokenizer.encode("\n")) == 1
    assert len(tokenizer.encode("<|im_end|>\n")) == 2
    for text in ("a picture grows slowly", "1.23 s, \u00fc\n\U0001f600"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_decoder_is_a_folder_that_chat_reads(folder):
    config = language_model_files.read_config(folder)
    assert config == chat_decoder.decoder_config(ChatTokenizer(folder).size)
    params = language_model_files.read(folder, language_model_files.shapes(config))
    start = fluxvit.split(LanguageModel(config, nnx.Rngs(0)))[1]
    assert not np.array_equal(params["token_embed"], start["token_embed"])  # it has learned


def test_texts_are_what_a_chat_asks(folder):
    tokenizer = ChatTokenizer(folder)
    rng = np.random.default_rng(0)
    texts = chat_decoder.draw_texts(rng, tokenizer, chat_study.QUESTION, ANSWERS)
    end = prompt_ids([], chat_study.QUESTION, tokenizer)[-6:]
    for ids, labels in zip(*texts, strict=True):
        answer = ids[labels != IGNORED]
        assert tokenizer.decode(answer) in ANSWERS and answer[-1] == tokenizer.im_end
        first = int(np.argmax(labels != IGNORED))
        np.testing.assert_array_equal(ids[first - len(end) : first], end)
        assert {*ids[first + len(answer) :]} <= {tokenizer.padding}


def test_lists_are_conversations_with_the_caption_as_the_answer(folder, tmp_path):
    path = tmp_path / "conversations.json"
    path.write_text(json.dumps(chat_study.conversations_of(CAPTIONS)))
    source = open_conversations(path, tmp_path)
    tokenizer = ChatTokenizer(folder)
    for number, (video, texts) in enumerate(CAPTIONS.items()):
        record = source[number]
        assert record.id.endswith(video)
        _, labels = encode_conversation(record.conversation, tokenizer, "qwen")
        assert tokenizer.decode(labels[labels != IGNORED]) == texts[0]


@pytest.mark.parametrize("method", ["multi", "fixed"])
def test_the_recipe_is_one_of_video_chat(folder, method):
    config = read_recipe(f"{tiny.ROOT / 'configs' / 'demo_chat.py'}:{method},seed=3")
    config.chat.llm, config.train.init_from = str(folder), "demo/multi"
    validate(config)
    objective = objective_class(config)
    objective.check_for_training(config)
    assert objective is FluxChat and config.seed == 3
    assert config.train.budgets == ((128, 64, 32) if method == "multi" else (128,))
    assert [budget for budget, *_ in config.eval.settings] == [128, 64, 32]


def test_scores_of_answers():
    answers = {
        "a.mp4": "a picture moves right and stops fast",
        "b.mp4": " a picture grows slowly",
        "c.mp4": "a ball clockwise",
    }
    expected = {
        "whole answer": [False, True, False],
        "event": [True, True, False],
        "direction": [False, True],  # nothing grows in a direction
        "speed": [True, True, False],
    }
    for part, right in expected.items():
        assert chat_study.hits(answers, CAPTIONS, part) == right
    assert set(expected) == set(chat_study.PARTS)
    training = CAPTIONS | {"d.mp4": ["a picture grows slowly"], "e.mp4": ["a picture grows fast"]}
    chances = [chat_study.chance(training, CAPTIONS, part) for part in expected]
    assert chances == pytest.approx([1 / 3, 1 / 3, 1 / 2, 2 / 3])


def test_the_table_compares_the_methods_clip_by_clip(tmp_path, monkeypatch):
    true = {video: texts[0] for video, texts in CAPTIONS.items()}
    wrong = true | {"a.mp4": true["b.mp4"]}
    monkeypatch.setattr(chat_study, "captions_of", lambda clips, split: CAPTIONS)
    budgets = [str(budget) for budget in chat_study.demo.BUDGETS]
    answers = {
        "fixed grid": [dict.fromkeys(budgets, wrong)],
        "Flux-Multi": [dict.fromkeys(budgets, true)],
    }
    options = chat_study.argparse.Namespace(out=tmp_path, clips=tmp_path)
    chat_study.report(answers, options)
    table = (tmp_path / "study.md").read_text()
    assert "| whole answer | fixed grid | 66.7 (" in table
    assert "| whole answer | difference: Flux-Multi | +33.3 (+0.0 to +100.0)" in table
