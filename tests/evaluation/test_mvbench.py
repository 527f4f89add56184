"""MVBench's prompts, scores and frames, against those of the official code; our own rule."""

import json

import numpy as np
import pytest

from fluxvit_jax.errors import UserError
from fluxvit_jax.evaluation import mvbench
from fluxvit_jax.evaluation.mvbench import Answer, Question
from fluxvit_jax.reports.confidence_intervals import share_interval
from tests.models.golden import GOLDEN

CASES = json.loads((GOLDEN / "chat/mvbench.json").read_text())
ITEM = CASES["questions"][0]["item"]


def question(item: dict = ITEM, **changes) -> Question:
    own = {
        **{"task": "some", "number": 0, "video": item["video"], "text": item["question"]},
        **{"candidates": tuple(item["candidates"])},
        **{"answer": item["candidates"].index(item["answer"])},
    }
    return Question(**own | changes)


def write(folder, items, task: str = "some"):
    (folder / "json").mkdir(exist_ok=True)
    (folder / "video").mkdir(exist_ok=True)
    path = folder / f"json/{task}.json"
    path.write_text(items if isinstance(items, str) else json.dumps(items))
    return path


@pytest.mark.parametrize("case", CASES["questions"], ids=lambda case: case["item"]["video"])
def test_golden_prompts(case):
    asked = question(case["item"])
    text, start = mvbench.prompt_of(asked, "videochat2")
    system, rest = text.split("\n", 1)
    assert rest == case["videochat2_question"] + "\nOnly give the best option."
    assert system.startswith("Carefully watch the video and pay attention") and start.endswith("(")
    assert mvbench.prompt_of(asked, "lmms_eval") == (case["lmms_eval_question"], "")
    assert mvbench.right_answer(asked) == case["videochat2_answer"]


@pytest.mark.parametrize("case", CASES["scores"], ids=lambda case: ascii(case["prediction"]))
def test_golden_scores(case):
    prediction, answer = case["prediction"], case["answer"]
    assert mvbench.right_by_videochat2(prediction, answer) == case["videochat2"]
    assert mvbench.right_by_lmms_eval(prediction, answer[1]) == case["lmms_eval"]


@pytest.mark.parametrize("case", CASES["frames"])
def test_golden_frames(case):
    found = mvbench.segment_middles(
        case["last_frame"], case["segments"], case["fps"], case["bounds"] and tuple(case["bounds"])
    )
    assert found.dtype == np.int64 and found.tolist() == case["indices"]


def test_frames_stay_inside_the_video():
    found = mvbench.segment_middles(100, 4, 25.0, (10.0, 12.0))
    assert found.tolist() == [100] * 4
    # A folder of 30 frames, from number 1, at 3 frames a second.
    found = mvbench.segment_middles(30, 4, 3.0, (0.0, 38.32), first_frame=1)
    assert found.tolist() == [4, 11, 18, 26] and found.min() >= 1


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ("(B) The dog ran.", 1), ("(B)", 1), ("B", 1), ("b", 1), ("B.", 1), (" (B)", 1),
        ("(b) the dog ran", 1), ("B)", 1), ("C. Nothing", 2), ("(C", 2), ("B: the dog", 1),
        ("Best option: (B)", 1), ("The answer is (B).", 1), ("A dog ran (B)", 1), ("\n(B)\n", 1),
        ("I think it is a B", 1), ("Option A", 0), ("A is right", 0), ("**B**", 1),
        ("(B) and not (A)", 1), ("The answer is ( b )", 1), ("Answer: C", 2), ("A", 0), ("a", 0),
        # No letter of an option.
        ("", None), (")", None), ("(", None), ("(BC)", None), ("The dog ran.", None), ("D", None),
        ("A cup fell.", None), ("a cup fell", None), ("It's a cup", None), ("(e.g. this)", None),
        ("I don't know", None), ("B's", None), ("U.F.O.", None), ("i.e. the dog", None),
    ],
)  # fmt: skip
def test_choices(prediction, expected):
    assert mvbench.choice(prediction, options=3) == expected


def test_predictions_are_the_official_parts_of_what_is_generated():
    assert mvbench.prediction_of(" B) The dog ran.\nBecause it", "videochat2") == "(B) The dog ran."
    assert mvbench.prediction_of("", "videochat2") == "("
    assert mvbench.prediction_of(" B.\nBecause ", "lmms_eval") == "B.\nBecause"


def test_a_report_has_three_rules_side_by_side():
    one, other = question(), question(task="other", number=3, candidates=("a", "b"), answer=0)
    predictions = ["(B) The dog ran.", "", "The answer is (B).", "(C)", "It is the dog"]
    answers = [Answer(question=one, prediction=text) for text in predictions]
    answers.append(Answer(question=one, failure="truncated"))
    answers.append(Answer(question=other, prediction="A"))
    report = mvbench.summarize(answers)
    assert list(report["tasks"]) == ["some", "other"]
    some = report["tasks"]["some"]
    assert (some["questions"], some["failed"], some["unclear"]) == (6, 1, 2)
    assert some["chance"] == pytest.approx(1 / 3)
    # The empty answer is right for VideoChat2 and does not count for lmms-eval; the video that
    # cannot be read, which has no answer either, is wrong for both.
    counts = {rule: (some[rule]["right"], some[rule]["counted"]) for rule in mvbench.RULES}
    assert counts == {"strict": (2, 6), "videochat2": (2, 6), "lmms_eval": (2, 5)}
    overall = report["overall"]
    assert overall["strict"]["accuracy"] == 3 / 7 and overall["lmms_eval"]["accuracy"] == 3 / 6
    assert overall["strict"]["interval"] == list(share_interval(3, 7))
    assert overall["questions"] == 7 and report["failures"] == [
        {"task": "some", "number": 0, "id": "a.mp4", "reason": "truncated"}
    ]
    assert json.loads(json.dumps(report)) == report
    lines = mvbench.table(report).split("\n")
    assert len(lines) == 4 and len({len(line) for line in lines}) == 1
    assert lines[-1].split() == ["overall", *["7", "1", "2", "42.9%", "42.9%", "50.0%", "35.7%"]]


def test_reports_of_nothing():
    with pytest.raises(ValueError, match="no answers"):
        mvbench.summarize([])
    empty = mvbench.summarize([Answer(question=question())])["overall"]
    assert empty["lmms_eval"] == {
        **{"right": 0, "counted": 0, "accuracy": 0.0, "interval": [0.0, 1.0]}
    }


def test_tasks_of_a_folder(tmp_path):
    part = ITEM | {"start": 1.5, "end": 9, "accurate_start": 2.0}
    frames = ITEM | {"video": "clip_14", "fps": 3, "subtitle": "..", "start": 0.0, "end": 4.0}
    write(tmp_path, [ITEM, part], "moving_count")
    write(tmp_path, [frames], "episodic_reasoning")
    write(tmp_path, [ITEM], "mine")
    (tmp_path / "json/readme.txt").write_text("")
    videos = tmp_path / "video"
    for task in ("moving_count", "episodic_reasoning"):
        (videos / mvbench.FOLDERS[task]).mkdir(parents=True)
    found = mvbench.read_questions(tmp_path / "json")
    assert [(q.task, q.number) for q in found] == [
        ("episodic_reasoning", 0), ("mine", 0), ("moving_count", 0), ("moving_count", 1),
    ]  # fmt: skip
    folder, mine, whole, segment = found
    assert folder.video == str(videos / "tvqa/frames_fps3_hq/clip_14") and folder.frame_rate == 3
    assert mine.video == str(videos / "a.mp4") and mine.frame_rate is None
    assert whole.video == str(videos / "clevrer/video_validation/a.mp4") and whole.seconds is None
    assert segment.seconds == (1.5, 9.0) and segment.answer == 1
    assert segment.candidates == tuple(ITEM["candidates"])
    chosen = mvbench.read_questions(tmp_path / "json", videos, ["moving_count", "mine"])
    assert [q.task for q in chosen] == ["moving_count", "moving_count", "mine"]
    assert mvbench.read_questions(tmp_path / "json/mine.json", tmp_path)[0].video == str(
        tmp_path / "a.mp4"
    )


def test_the_public_data_set_has_twenty_tasks():
    assert len(mvbench.FOLDERS) == 20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"video": None}, "video is missing, or no text"),
        ({"video": "../a.mp4"}, "path '../a.mp4' is not inside the root"),
        ({"question": 3}, "question is missing, or no text"),
        ({"candidates": "ab"}, "candidates is no list of texts"),
        ({"candidates": ["The dog ran.", 3]}, "candidates is no list of texts"),
        ({"candidates": ["x"] * 27}, "has 27 candidates, and there are 26 letters"),
        ({"answer": "the dog"}, "the answer 'the dog' is none of the candidates"),
        ({"start": 3}, "start=3 and end=None are no part of a video"),
        ({"start": 3, "end": "x"}, "start=3 and end=x are no part of a video"),
        ({"start": 3, "end": 3}, "start=3 and end=3 are no part of a video"),
        ({"fps": 0}, "fps=0 is no number above 0"),
    ],
)
def test_errors_name_the_file_and_the_entry(tmp_path, change, message):
    path = write(tmp_path, [ITEM, ITEM | change])
    with pytest.raises(UserError) as raised:
        mvbench.read_questions(path)
    assert str(raised.value).startswith(f"{path}: entry 1: {message}")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "some.json: no JSON: "),
        ("[]", "some.json: is no list of "),
        ("[3]", "some.json: entry 0: is not "),
    ],
)
def test_errors_of_files(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        mvbench.read_questions(write(tmp_path, content))


def test_errors_of_folders(tmp_path):
    write(tmp_path, [ITEM], "moving_count")
    with pytest.raises(UserError, match=r"video/clevrer/video_validation: no such folder; it is"):
        mvbench.read_questions(tmp_path / "json")
    with pytest.raises(UserError, match=r"json: has no task moving; it has moving_count"):
        mvbench.read_questions(tmp_path / "json", tasks=["moving"])
    with pytest.raises(UserError, match=r"video: holds no tasks, which are files TASK\.json"):
        mvbench.read_questions(tmp_path / "video")
    with pytest.raises(UserError, match=r"none\.json: no such file"):
        mvbench.read_questions(tmp_path / "json/none.json")
