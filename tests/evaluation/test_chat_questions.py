"""MVBench's questions, asked of a video chat of random weights."""

import json

import cv2
import numpy as np
import pytest

from fluxvit_jax.data.decoding import DecodeError
from fluxvit_jax.deploy.chat import load_chat
from fluxvit_jax.errors import UserError
from fluxvit_jax.evaluation import chat_questions, mvbench, tasks
from tests import tiny
from tests.models.chat_golden import write_stage1_folder

SETTINGS = ((24, 4, 42), (12, 2, 42))


@pytest.fixture(scope="module")
def questions(tiny_data, tmp_path_factory):
    """A folder of two tasks; a video of the second is damaged, one question is of a part."""
    folder = tmp_path_factory.mktemp("mvbench")
    entry = {"question": "What is it?", "candidates": ["red", "green"], "answer": "green"}
    own = {
        "colors": [{**entry, "video": f"{n}.mp4"} for n in range(2)],
        "parts": [
            {**entry, "video": "2.mp4", "start": 0.1, "end": 0.4},
            {**entry, "video": tiny.BAD},
        ],
    }
    for task, entries in own.items():
        (folder / f"{task}.json").write_text(json.dumps(entries))
    return folder


@pytest.fixture(scope="module")
def config(tiny_data, questions, tmp_path_factory):
    captions = tiny.write_captions(tiny_data, tmp_path_factory.mktemp("captions"))
    llm = write_stage1_folder(tmp_path_factory.mktemp("llm"))
    config = tiny.make_chat(captions, tiny_data, llm, eval__settings=SETTINGS)
    config.data.validation, config.data.root = str(questions), str(tiny_data)
    return config


@pytest.fixture(scope="module")
def workdir(config, tmp_path_factory):
    return tiny.write_chat_run(tmp_path_factory.mktemp("chat") / "run", config)


def report_of(workdir):
    (path,) = (workdir / "evaluation").glob("*-mvbench-????????.json")
    return json.loads(path.read_text())


def test_an_evaluation_goes_on_where_it_was_stopped(config, workdir, questions, capsys):
    assert tasks.run(config, str(workdir)) == 0
    first, out = report_of(workdir), capsys.readouterr().out
    assert list(first["budgets"]) == ["24", "12"]
    for row in first["budgets"].values():
        overall = row["overall"]
        assert (overall["questions"], overall["failed"]) == (4, 1)
        assert overall["strict"]["counted"] == 4
        assert [failure["task"] for failure in row["failures"]] == ["parts"]
    assert "at 24 tokens" in out and "1 questions are about videos that cannot be read" in out
    # Each answer is that of the chat alone; what was cut off is asked again.
    chat = load_chat(workdir)
    (file,) = (workdir / "evaluation").glob("*-answers.jsonl")
    rows = file.read_text().splitlines()
    for question in mvbench.read_questions(questions, config.data.root)[:2]:
        answer = chat_questions.ask(chat, question, SETTINGS[1], "videochat2", squeeze=False)
        [kept] = [
            row["prediction"] for row in map(json.loads, rows)
            if (row["tokens"], row["task"], row["number"])
            == (12, question.task, question.number)
        ]  # fmt: skip
        assert answer.prediction == kept
    file.write_text("\n".join([*rows[:2], rows[2][:20]]))
    assert tasks.run(config, str(workdir)) == 0
    assert "2 answers are in" in capsys.readouterr().out
    assert report_of(workdir) == first


def test_the_frames_are_the_official_ones_of_videos_and_folders(tiny_data, tmp_path):
    question = mvbench.Question(
        task="t", number=0, video=str(tmp_path / "frames"), text="?", candidates=("a",), answer=0,
        frame_rate=3.0,
    )  # fmt: skip
    with pytest.raises(DecodeError, match="is no folder of frames"):
        chat_questions.read_middles(question, 4)
    (tmp_path / "frames").mkdir()
    for number in range(1, 9):
        pixels = np.full((16, 16, 3), 20 * number, np.uint8)
        cv2.imwrite(str(tmp_path / "frames" / f"{number:05}.jpg"), pixels)
    found = chat_questions.read_middles(question, 4)
    numbers = mvbench.segment_middles(8, 4, 3.0, None, 1)
    np.testing.assert_allclose(found[:, 0, 0, 0], 20 * numbers, atol=2)


def test_no_questions_is_one_line(config, workdir):
    other = config.copy_and_resolve_references()
    other.data.validation = ""
    with pytest.raises(UserError, match=r"no questions: add --config\.data.validation=FOLDER"):
        tasks.run(other, str(workdir))
