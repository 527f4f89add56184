"""MVBench's questions, asked of a video chat of random weights."""

import json
import shutil

import cv2
import numpy as np
import pytest

from fluxvit_jax.data.decoding import DecodeError
from fluxvit_jax.deploy.chat import load_chat
from fluxvit_jax.errors import UserError
from fluxvit_jax.evaluation import mvbench, tasks
from fluxvit_jax.evaluation.mvbench_clips import QuestionClips, read_middles
from tests import hosts, tiny
from tests.models.chat_golden import write_stage1_folder

EVALUATED = shutil.ignore_patterns("evaluation")
SETTINGS = ((24, 4, 42), (12, 2, 42))


@pytest.fixture(scope="module")
def questions(tiny_data, tmp_path_factory):
    """A folder of two tasks; a video of the second is damaged, one question is of a part.

    Questions are of several lengths, and more than a batch.
    """
    folder = tmp_path_factory.mktemp("mvbench")
    entry = {"question": "What is it?", "candidates": ["red", "green"], "answer": "green"}
    own = {
        "colors": [{**entry, "video": f"{n}.mp4"} for n in range(2)],
        "parts": [
            {**entry, "video": "2.mp4", "start": 0.1, "end": 0.4, "question": "What? " * 9},
            {**entry, "video": tiny.BAD},
            {**entry, "video": "3.mp4", "candidates": ["red", "green", "blue", "a fourth one"]},
        ],
    }
    for task, entries in own.items():
        (folder / f"{task}.json").write_text(json.dumps(entries))
    return folder


@pytest.fixture(scope="module")
def config(tiny_data, questions, tmp_path_factory):
    captions = tiny.write_captions(tiny_data, tmp_path_factory.mktemp("captions"))
    llm = write_stage1_folder(tmp_path_factory.mktemp("llm"))
    config = tiny.make_chat(captions, tiny_data, llm, eval__settings=SETTINGS, eval__batch_size=3)
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
        assert (overall["questions"], overall["failed"]) == (5, 1)
        assert overall["strict"]["counted"] == 5
        assert [failure["task"] for failure in row["failures"]] == ["parts"]
    assert "at 24 tokens" in out and "1 questions are about videos that cannot be read" in out
    # What was cut off is asked again.
    (file,) = (workdir / "evaluation").glob("*-answers.jsonl")
    rows = file.read_text().splitlines()
    file.write_text("\n".join([*rows[:2], rows[2][:20]]))
    assert tasks.run(config, str(workdir)) == 0
    assert "2 answers are in" in capsys.readouterr().out
    assert report_of(workdir) == first


def test_no_answer_is_lost_whatever_it_holds(config, workdir, tmp_path, capsys, monkeypatch):
    """Nor the first one after a kill; some characters end a line for Python, and not in a file."""
    own = shutil.copytree(workdir, tmp_path / "run", ignore=EVALUATED)
    given = mvbench.prediction_of
    monkeypatch.setattr(mvbench, "prediction_of", lambda *asked: f"{given(*asked)}\u2028 \x85")
    assert tasks.run(config, str(own)) == 0
    first = report_of(own)
    (file,) = (own / "evaluation").glob("*-answers.jsonl")
    file.write_bytes(file.read_bytes()[:-20])  # a kill
    for kept in (7, 8):  # of ten; two are about a video that cannot be read, and asked again
        capsys.readouterr()
        assert tasks.run(config, str(own)) == 0
        assert f"{kept} answers are in" in capsys.readouterr().out
        assert report_of(own) == first


def test_another_precision_has_answers_of_its_own(config, workdir, tmp_path):
    own = shutil.copytree(workdir, tmp_path / "run", ignore=EVALUATED)
    for dtype in ("float32", "bfloat16"):
        other = config.copy_and_resolve_references()
        other.model.dtype, other.eval.settings = dtype, SETTINGS[1:]
        assert tasks.run(other, str(own)) == 0
    assert len(list((own / "evaluation").glob("*-answers.jsonl"))) == 2
    reports = [json.loads(path.read_text()) for path in (own / "evaluation").glob("*.json")]
    assert {report["dtype"] for report in reports} == {"float32", "bfloat16"}


def answers_of(workdir):
    """{(tokens, task, number): prediction} of the file of answers."""
    (file,) = (workdir / "evaluation").glob("*-answers.jsonl")
    rows = map(json.loads, file.read_text().splitlines())
    return {(row["tokens"], row["task"], row["number"]): row["prediction"] for row in rows}


@pytest.fixture(scope="module")
def one_by_one(config, workdir, questions):
    """The same by a chat about each video."""
    chat, found = load_chat(workdir), {}
    for tokens, frames, side in SETTINGS:
        asked = mvbench.read_questions(questions, config.data.root)
        clips = QuestionClips(questions=asked, frames=frames, side=side, squeeze=False)
        for number, question in enumerate(asked):
            item, prompt = clips[number], mvbench.prompt_of(question, "videochat2")
            answer = ""
            if not item["failure"][0]:
                generated = chat.about(item["clip"][0], tokens).ask(
                    prompt.text, mvbench.NEW_TOKENS["videochat2"], prompt.answer_start
                )
                answer = mvbench.prediction_of(generated, "videochat2")
            found[tokens, question.task, question.number] = answer
    return found


def test_answers_of_a_batch_are_those_of_questions_one_by_one(
    config, workdir, one_by_one, tmp_path
):
    own = shutil.copytree(workdir, tmp_path / "run", ignore=EVALUATED)
    assert tasks.run(config, str(own)) == 0
    assert len(set(one_by_one.values())) > 4
    assert answers_of(own) == one_by_one


ON_MESH = """
import json, sys
from ml_collections import ConfigDict
from fluxvit_jax.evaluation import tasks

config = ConfigDict(json.loads(sys.argv[1]))
config.parallel.mesh.update(data=2, fsdp=2, tensor=2)
sys.exit(tasks.run(config, sys.argv[2]))
"""


@pytest.mark.slow
def test_devices_change_no_answer(config, workdir, one_by_one, compiled, tmp_path):
    """Eight devices split the questions, the language model and its heads."""
    own = shutil.copytree(workdir, tmp_path / "run", ignore=EVALUATED)
    (ended,) = hosts.run(
        *(tmp_path, compiled, json.dumps(config.to_dict()), str(own)),
        code=ON_MESH,
        devices=8,
        flags=False,
        folders=[tiny.ROOT],
        environments=[{}],
    )
    assert ended.status == 0, ended.err
    assert answers_of(own) == one_by_one


def test_the_frames_are_the_official_ones_of_videos_and_folders(tiny_data, tmp_path):
    question = mvbench.Question(
        task="t", number=0, video=str(tmp_path / "frames"), text="?", candidates=("a",), answer=0,
        frame_rate=3.0,
    )  # fmt: skip
    with pytest.raises(DecodeError, match="is no folder of frames"):
        read_middles(question, 4)
    (tmp_path / "frames").mkdir()
    for number in range(1, 9):
        pixels = np.full((16, 16, 3), 20 * number, np.uint8)
        cv2.imwrite(str(tmp_path / "frames" / f"{number:05}.jpg"), pixels)
    found = read_middles(question, 4).frames
    numbers = mvbench.segment_middles(8, 4, 3.0, None, 1)
    np.testing.assert_allclose(found[:, 0, 0, 0], 20 * numbers, atol=2)


def test_no_questions_is_one_line(config, workdir):
    other = config.copy_and_resolve_references()
    other.data.validation = ""
    with pytest.raises(UserError, match=r"no questions: add --config\.data.validation=FOLDER"):
        tasks.run(other, str(workdir))
