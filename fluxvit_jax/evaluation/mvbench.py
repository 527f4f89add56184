"""MVBench: questions about videos with up to five options, and three rules to score answers.

A task is a file TASK.json, a list of {"video": path, "question": text, "candidates": texts,
"answer": one of them}, with "start" and "end" in seconds for a part of a video. The public data set
has the twenty of `FOLDERS` with 200 questions each.

The two official rules differ, and neither is strict: that of VideoChat2 takes an empty answer, "("
or ")" for right, that of lmms-eval leaves empty answers out and takes the article "a" for an
option. Reports have both beside ours. Source: Ask-Anything, video_chat2/mvbench.ipynb, and
VideoChat-Flash, lmms_eval/tasks/mvbench/utils.py.
"""

import math
import os
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from fluxvit_jax.config.fields import MVBENCH_PROMPTS
from fluxvit_jax.data.annotations import path_inside
from fluxvit_jax.data.list_rows import text_of
from fluxvit_jax.data.sources import Seconds
from fluxvit_jax.distributed import storage
from fluxvit_jax.errors import UserError
from fluxvit_jax.reports.confidence_intervals import share_interval

Report = dict[str, Any]

# Where the videos of a task are, below the folder of all videos.
FOLDERS = {
    "action_sequence": "star/Charades_v1_480",
    "action_prediction": "star/Charades_v1_480",
    "action_antonym": "ssv2_video",
    "fine_grained_action": "Moments_in_Time_Raw/videos",
    "unexpected_action": "FunQA_test/test",
    "object_existence": "clevrer/video_validation",
    "object_interaction": "star/Charades_v1_480",
    "object_shuffle": "perception/videos",
    "moving_direction": "clevrer/video_validation",
    "action_localization": "sta/sta_video",
    "scene_transition": "scene_qa/video",
    "action_count": "perception/videos",
    "moving_count": "clevrer/video_validation",
    "moving_attribute": "clevrer/video_validation",
    "state_change": "perception/videos",
    "fine_grained_pose": "nturgbd",
    "character_order": "perception/videos",
    "egocentric_navigation": "vlnqa",
    "episodic_reasoning": "tvqa/frames_fps3_hq",
    "counterfactual_inference": "clevrer/video_validation",
}
LETTERS = string.ascii_uppercase  # of the options
FORMS = MVBENCH_PROMPTS
RULES = ("strict", *FORMS)
NEW_TOKENS = {"videochat2": 100, "lmms_eval": 16}  # the longest answer; both are greedy

INSTRUCTION = (
    "Carefully watch the video and pay attention to the cause and sequence of events, the detail "
    "and movement of objects, and the action and pose of persons. Based on your observations, "
    "select the best option that accurately addresses the question.\n"
)
REQUEST = "\nOnly give the best option."

# Where an answer has the letter of an option, the most certain first: at its beginning, in
# brackets, which may stay open, or as a capital that stands alone. An "A" before a word other than
# "is" is the article.
CHOICES = (
    re.compile(r"^\W*([A-Za-z])(?:[.):,](?!\w)|\W*\Z)"),
    re.compile(r"\(\s*([A-Za-z])\s*(?:\)|\Z)"),
    re.compile(r"(?<![\w'\u2019])(?!A (?!is\b)[a-z])([A-Z])(?![\w'\u2019])"),
)
# lmms-eval takes these for spaces, or deletes those that a space is beside.
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A question about a video. number: in its file, from 0; answer: number of a candidate."""

    task: str
    number: int
    video: str  # path
    text: str
    candidates: tuple[str, ...]
    answer: int
    seconds: Seconds | None = None  # None: the whole video
    frame_rate: float | None = None  # of a folder of frames, 00001.jpg and so on; None: a video


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """A model's answer to a question. failure: why the video could not be read."""

    question: Question
    prediction: str = ""
    failure: str = ""


class Prompt(NamedTuple):
    """What a model is asked, and how its answer begins, which it goes on from."""

    text: str
    answer_start: str


def read_questions(
    path: storage.PathLike, root: storage.PathLike | None = None, tasks: Sequence[str] = ()
) -> tuple[Question, ...]:
    """The questions of a folder of tasks, TASK.json each, or of a single file.

    Args:
      path: the folder or file.
      root: folder of all videos, which has those of `FOLDERS`; the videos of other tasks are
        relative to it. By default `video` beside the folder of tasks, as in the public data set.
      tasks: names of tasks, if not all.

    Raises UserError: no such file, folder, task or folder of videos; with the file and the number
    of the entry, a question that is not as above.
    """
    location = storage.path_of(path)
    is_folder = storage.is_folder(location)
    files = _files(location, tasks) if is_folder else [location]
    folder = location if is_folder else location.parent
    base = storage.path_of(root) if root else folder.parent / "video"
    found: list[Question] = []
    for file in files:
        videos = base / FOLDERS.get(file.stem, "")
        if not storage.is_folder(videos):
            raise UserError(
                f"{videos}: no such folder; it is where the videos of {file.stem} should be"
            )
        absolute = os.fspath(videos) if storage.is_remote(videos) else os.path.abspath(videos)
        found += _questions(file, absolute)
    return tuple(found)


def prompt_of(question: Question, form: str) -> Prompt:
    """The official prompt, of `FORMS`, of a question."""
    options = "\n".join(
        f"({letter}) {text}" for letter, text in zip(LETTERS, question.candidates, strict=False)
    )
    if form == "lmms_eval":
        return Prompt(f"Question: {question.text}\nOption:\n{options}\n{REQUEST}", "")
    asked = f"Question: {question.text}\nOptions:\n{options}".rstrip()
    return Prompt(f"{INSTRUCTION}{asked}{REQUEST}", "Best option:(")


def prediction_of(generated: str, form: str) -> str:
    """The answer that is scored, by what a model generated after a prompt of `FORMS`."""
    text = generated.strip()
    return text if form == "lmms_eval" else f"({text.split(chr(10))[0]}"


def right_answer(question: Question) -> str:
    """The right answer with its letter: (B) The dog ran."""
    return f"({LETTERS[question.answer]}) {question.candidates[question.answer]}"


def choice(prediction: str, options: int) -> int | None:
    """The number of the option that an answer names, by its letter; None if it names none.

    It is the letter that the answer begins with, or else the first in brackets, or else the first
    capital that stands alone.
    """
    for pattern in CHOICES:
        for match in pattern.finditer(prediction):
            number = LETTERS.index(match[1].upper())
            if number < options:
                return number
    return None


def right_by_videochat2(prediction: str, answer: str) -> bool:
    """VideoChat2's rule; answer: as `right_answer` gives it."""
    predicted, option = prediction.lower().split(" ")[0], answer.lower().split(" ")[0]
    return predicted.replace(".", "") in option or option in predicted


def right_by_lmms_eval(prediction: str, letter: str) -> bool:
    """lmms-eval's rule; letter: that of the right option. Empty answers do not count there."""
    return _lmms_eval_answer(prediction) == _lmms_eval_answer(letter)


def segment_middles(
    last_frame: int,
    segments: int,
    frame_rate: float,
    seconds: Seconds | None = None,
    first_frame: int = 0,
) -> np.ndarray:
    """VideoChat2's frames, the middles of segments of a video or a part: int64 [segments].

    Frames after the last one, which a part behind the end would have, are the last one.

    first_frame, last_frame: numbers of the frames of the whole; folders of frames begin with 1.
    """
    first, last = first_frame, last_frame
    if seconds:  # halves are rounded to even in the official code, too
        first = max(first, round(seconds[0] * frame_rate))
        last = min(last, round(seconds[1] * frame_rate))
    size = (last - first) / segments
    middles = (first + size / 2 + np.round(size * np.arange(segments))).astype(np.int64)
    return np.clip(middles, first_frame, last_frame)


def summarize(answers: Sequence[Answer]) -> Report:
    """Accuracies of each task and overall, by each of `RULES`, with 95 % intervals (Wilson).

    Videos that could not be read are wrong by every rule. Empty answers leave the denominator of
    lmms-eval's rule, as they do in its code.

    Raises ValueError: no answers.
    """
    if not answers:
        raise ValueError("no answers")
    tasks = dict.fromkeys(answer.question.task for answer in answers)
    return {
        "tasks": {
            task: _measures([answer for answer in answers if answer.question.task == task])
            for task in tasks
        },
        "overall": _measures(answers),
        "failures": [
            {
                "task": answer.question.task,
                "number": answer.question.number,
                "id": answer.question.video,
                "reason": answer.failure,
            }
            for answer in answers
            if answer.failure
        ],
    }


def table(report: Report) -> str:
    """A table with a line for each task."""
    rows = {**report["tasks"], "overall": report["overall"]}
    width = max(map(len, rows))
    lines = [f"{'task':<{width}}  questions  failed  unclear  {'  '.join(RULES)}  chance"]
    for name, row in rows.items():
        shares = "  ".join(f"{row[rule]['accuracy']:>{len(rule)}.1%}" for rule in RULES)
        lines.append(
            f"{name:<{width}}  {row['questions']:>9}  {row['failed']:>6}  {row['unclear']:>7}  "
            f"{shares}  {row['chance']:>6.1%}"
        )
    return "\n".join(lines)


def _files(folder: epath.Path, tasks: Sequence[str]) -> list[epath.Path]:
    """The files of tasks in a folder, sorted by name, or as `tasks` has them."""
    with storage.errors(folder):
        files = {file.stem: file for file in folder.iterdir() if file.suffix == ".json"}
    if not files:
        raise UserError(f"{folder}: holds no tasks, which are files TASK.json")
    if unknown := [task for task in tasks if task not in files]:
        raise UserError(f"{folder}: has no task {unknown[0]}; it has {', '.join(sorted(files))}")
    return [files[task] for task in tasks or sorted(files)]


def _questions(file: epath.Path, videos: str) -> list[Question]:
    try:
        entries = storage.parse_json(text_of(file))
    except ValueError as error:
        raise UserError(f"{file}: no JSON: {error}") from error
    if not isinstance(entries, list) or not entries:
        raise UserError(f'{file}: is no list of {{"video": .., "question": .., "candidates": ..}}')
    return [_question(file, number, entry, videos) for number, entry in enumerate(entries)]


def _question(file: epath.Path, number: int, entry: Any, videos: str) -> Question:
    where = f"{file}: entry {number}"
    if not isinstance(entry, dict):
        raise UserError(f'{where}: is not {{"video": .., "question": .., "candidates": ..}}')
    for field in ("video", "question"):
        if not isinstance(entry.get(field), str):
            raise UserError(f"{where}: {field} is missing, or no text")
    candidates, answer = entry.get("candidates"), entry.get("answer")
    if not isinstance(candidates, list) or not all(isinstance(own, str) for own in candidates):
        raise UserError(f"{where}: candidates is no list of texts")
    if len(candidates) > len(LETTERS):
        raise UserError(f"{where}: has {len(candidates)} candidates, and there are 26 letters")
    if answer not in candidates:
        raise UserError(f"{where}: the answer {answer!r} is none of the candidates")
    return Question(
        task=file.stem,
        number=number,
        video=os.path.join(videos, path_inside(where, entry["video"], videos)),
        text=entry["question"],
        candidates=tuple(candidates),
        answer=candidates.index(answer),
        seconds=_seconds(where, entry),
        frame_rate=_frame_rate(where, entry),
    )


def _seconds(where: str, entry: Mapping[str, Any]) -> Seconds | None:
    if "start" not in entry and "end" not in entry:
        return None
    start, end = _number(entry.get("start")), _number(entry.get("end"))
    if not 0 <= start < end < math.inf:
        raise UserError(
            f"{where}: start={entry.get('start')} and end={entry.get('end')} are no part of a "
            "video: two numbers of seconds that rise"
        )
    return start, end


def _frame_rate(where: str, entry: Mapping[str, Any]) -> float | None:
    """Frames per second of a folder of frames."""
    if "fps" not in entry:
        return None
    rate = _number(entry["fps"])
    if not rate > 0:
        raise UserError(f"{where}: fps={entry['fps']} is no number above 0")
    return rate


def _number(value: Any) -> float:
    """A number of a JSON file; nan for anything else, which no comparison holds for."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number else math.nan


def _lmms_eval_answer(text: str) -> str:
    """The letter that lmms-eval finds in an answer, or what is left of the answer."""
    if match := re.match(r"([A-E])\.\s*(.+)$", text.strip(), re.IGNORECASE):
        return match[1].upper()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    has_thousands = re.search(r"\d,\d", text)
    cleaned = text
    for mark in PUNCTUATION:
        is_deleted = has_thousands or f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if is_deleted else " ")
    # 32: the official code passes a flag of this value where the count goes.
    cleaned = re.sub(r"\.(?!\d)", "", cleaned, count=32)
    cleaned = cleaned.strip("'").strip('"').strip(")").strip("(").strip().lower()
    match = re.search(r"\b([a-e])\b", cleaned)
    return match[1].upper() if match else cleaned


def _measures(answers: Sequence[Answer]) -> Report:
    """Counts of answers, and the accuracy by each rule."""
    read = [answer for answer in answers if not answer.failure]
    choices = [choice(answer.prediction, len(answer.question.candidates)) for answer in read]
    hits = {
        "strict": sum(c == a.question.answer for c, a in zip(choices, read, strict=True)),
        "videochat2": sum(
            right_by_videochat2(answer.prediction, right_answer(answer.question)) for answer in read
        ),
        "lmms_eval": sum(
            right_by_lmms_eval(answer.prediction, LETTERS[answer.question.answer])
            for answer in read
            if answer.prediction
        ),
    }
    empty = sum(not answer.prediction for answer in read)
    counted = {"lmms_eval": len(answers) - empty}
    return {
        "questions": len(answers),
        "failed": len(answers) - len(read),
        "unclear": choices.count(None),
        "chance": float(np.mean([1 / len(answer.question.candidates) for answer in answers])),
        **{rule: _share(hits[rule], counted.get(rule, len(answers))) for rule in RULES},
    }


def _share(right: int, counted: int) -> Report:
    return {
        "right": right,
        "counted": counted,
        "accuracy": right / counted if counted else 0.0,
        "interval": list(share_interval(right, counted)) if counted else [0.0, 1.0],
    }
