"""Ids and labels of a batch, against golden conversations."""

import json

import numpy as np
import pytest

from fluxvit_jax.config.grids import admissible_grids
from fluxvit_jax.data.captions import ClipTimes
from fluxvit_jax.data.chat_templates import IGNORED, VIDEO, read_turns
from fluxvit_jax.data.chat_texts import NO_TOKEN, TIME_TOKENS, ChatTexts
from fluxvit_jax.data.chat_tokenizer import ChatTokenizer
from fluxvit_jax.data.decoding import Video
from fluxvit_jax.data.frame_sampling import train_frames
from fluxvit_jax.data.grid_sampling import grid_of_group
from fluxvit_jax.data.pipeline import train_batches
from fluxvit_jax.data.random_streams import stream_rng
from fluxvit_jax.data.sources import Example, FileSource, Record
from fluxvit_jax.errors import UserError
from tests import tiny
from tests.models.chat_golden import CHAT, write_stage1_folder

TIMES = ClipTimes(2.5, np.array([0.0, 1.2, 2.4]))
CASES = json.loads((CHAT / "prompts.json").read_text())["cases"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(write_stage1_folder(tmp_path_factory.mktemp("llm")))


def records(*names):
    return [
        Record(name, 0, "", conversation=read_turns(CASES[name]["conversations"])) for name in names
    ]


def arrays(texts, own):
    return texts(own, np.arange(len(own)), 0, [TIMES] * len(own))


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


def test_a_conversation_tells_the_length_of_its_video(folder):
    own = records("qwen_2.question")
    plain = arrays(ChatTexts(folder, "qwen", "answers", 200), own)
    told = ChatTexts(folder, "qwen", "answers", 200, time_message=True)
    tokenizer = ChatTokenizer(folder)
    message = "The video lasts for 2.50 seconds, and 3 frames are uniformly sampled from it. "
    assert message in tokenizer.decode(arrays(told, own)["text"][0])
    assert message not in tokenizer.decode(plain["text"][0])
    unknown = told(own, np.arange(1), 0, [ClipTimes(0.0, np.zeros(3))])
    np.testing.assert_array_equal(unknown["text"], plain["text"])


def test_times_of_frames_are_texts(folder):
    texts = ChatTexts(folder, "qwen", "answers", 100, frames=4)
    tokenizer = ChatTokenizer(folder)
    times = [TIMES, ClipTimes(0.0, np.zeros(3))]
    found = texts(records("qwen_2.question") * 2, np.arange(2), 0, times)["times"]
    assert found.shape == (2, 4, TIME_TOKENS)
    said = [tokenizer.decode(ids[ids != NO_TOKEN]) for ids in found[0]]
    assert said == ["0.0s", "1.2s", "2.4s", ""]
    assert (found[1] == NO_TOKEN).all()
    assert len(tokenizer.encode("99999.9s")) <= TIME_TOKENS


def test_times_are_those_of_the_frames_that_training_shows(tiny_data):
    """Of a part of a video, from its beginning."""
    seen = []

    def texts(records, samples, seed, times):
        seen.extend(zip(samples, times, strict=True))
        return {}

    source = FileSource([Example("0", 0, str(tiny_data / "0.mp4"), seconds=(0.1, 0.4))])
    config = tiny.make_config(tiny_data)
    next(train_batches(config, source, texts=texts))
    with Video(tiny_data / "0.mp4") as video:
        rate = video.frame_rate
    frames = int((0.4 - 0.1) * rate)
    assert len(seen) == config.train.batch_size
    for sample, times in seen:
        grid = grid_of_group(admissible_grids(config), config.seed, int(sample) // 2)
        numbers = train_frames(frames, grid.frames, stream_rng(config.seed, int(sample)))
        assert times.seconds == pytest.approx(frames / rate)
        np.testing.assert_allclose(times.frames, numbers / rate)


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
