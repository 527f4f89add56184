"""`eval.task=mvbench`: a video chat's answers to questions with options, at every token budget.

Frames, prompts and rules are the official ones (`mvbench`). Answers are kept as they come, so an
evaluation that was stopped goes on with those that it lacks.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict
from tqdm import tqdm

from fluxvit_jax.config.fields import REQUIRED
from fluxvit_jax.data.annotations import digest
from fluxvit_jax.data.augmentation import resize_clip
from fluxvit_jax.data.clips import middle_square
from fluxvit_jax.data.decoding import DecodeError, Video
from fluxvit_jax.data.images import open_clip
from fluxvit_jax.deploy.chat import Chat
from fluxvit_jax.distributed import storage
from fluxvit_jax.distributed.watchdog import Watchdog
from fluxvit_jax.errors import UserError
from fluxvit_jax.evaluation import mvbench, retrieve
from fluxvit_jax.evaluation.evaluate import report_words
from fluxvit_jax.evaluation.mvbench import Answer, Question
from fluxvit_jax.objectives import flux_chat_weights

Setting = tuple[int, int, int]  # tokens, frames, pixels
Report = dict[str, Any]


class Key(NamedTuple):
    """Which answer it is: the setting's, to a question of a task."""

    tokens: int
    frames: int
    resolution: int
    task: str
    number: int


def run(config: ConfigDict, workdir: str) -> int:
    """Asks the questions of `data.validation`; prints tables, writes the report.

    Returns the exit status, 0.

    Raises UserError: no run of video chat, no questions, several hosts.
    """
    if jax.process_count() > 1:
        raise UserError("config.eval.task: mvbench runs on one host")
    if not config.data.validation:
        raise UserError(
            "no questions: add --config.data.validation=FOLDER with MVBench's TASK.json files, and "
            "--config.data.root=FOLDER with its videos"
        )
    folder = storage.path_of(workdir)
    questions = mvbench.read_questions(config.data.validation, config.data.root or None)
    llm = "" if config.chat.llm == REQUIRED else config.chat.llm
    weights = flux_chat_weights.read(folder, llm, config.model.dtype)
    chat = Chat(weights, config.model.dtype)
    settings = [tuple(setting) for setting in config.eval.settings]
    form, squeeze = config.eval.prompt, config.eval.resize == "squeeze"
    about = {
        "checkpoint": weights.projection.origin,
        "language_model": os.path.basename(os.path.normpath(weights.llm_folder)),
        "language_model_fingerprint": weights.llm_fingerprint,
        "data": config.data.validation,
        "questions": digest(str(question) for question in questions),
        "prompt": form,
        "resize": config.eval.resize,
    }
    digits = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:8]
    words = f"{report_words(config.data.validation)}-mvbench"
    answers_file = folder / retrieve.FOLDER / f"{words}-{digits}-answers.jsonl"
    storage.make_folder(answers_file.parent)
    with Watchdog(config.log.watchdog_seconds, folder) as watchdog:
        kept = _kept(answers_file, questions)
        todo = [
            (setting, question)
            for question in questions
            for setting in settings
            if _key(setting, question) not in kept
        ]
        if len(todo) < len(questions) * len(settings):
            print(f"{len(kept)} answers are in {answers_file}; {len(todo)} are to be given")
        with open(answers_file, "a") as file:
            for setting, question in tqdm(todo, desc="answering", disable=None):
                answer = ask(chat, question, setting, form, squeeze)
                kept[_key(setting, question)] = answer
                file.write(json.dumps(_row(setting, answer), ensure_ascii=False) + "\n")
                file.flush()
                watchdog.alive()
    budgets = {
        str(setting[0]): {"frames": setting[1], "resolution": setting[2]}
        | mvbench.summarize([kept[_key(setting, question)] for question in questions])
        for setting in settings
    }
    own = hashlib.sha256(json.dumps([digits, settings]).encode()).hexdigest()[:8]
    report = {"task": "mvbench", **about, "answers": answers_file.name, "budgets": budgets}
    tables = [f"at {budget} tokens\n{mvbench.table(row)}" for budget, row in budgets.items()]
    retrieve.write(report, "\n\n".join(tables), list(_notes(budgets)), folder, f"{words}-{own}")
    return 0


def ask(chat: Chat, question: Question, setting: Setting, form: str, squeeze: bool) -> Answer:
    """A chat's answer at (tokens, frames, pixels), or why the video could not be read."""
    tokens, frames, resolution = setting
    try:
        pixels = read_middles(question, frames)
    except DecodeError as error:
        return Answer(question=question, failure=error.reason)
    if squeeze:
        clip = resize_clip(pixels, resolution, resolution, cv2.INTER_CUBIC)
    else:
        clip = middle_square(pixels, resolution)
    prompt = mvbench.prompt_of(question, form)
    generated = chat.about(clip, tokens).ask(
        prompt.text, mvbench.NEW_TOKENS[form], prompt.answer_start
    )
    return Answer(question=question, prediction=mvbench.prediction_of(generated, form))


def read_middles(question: Question, frames: int) -> np.ndarray:
    """The official frames of a question's video: uint8 [frames, height, width, 3].

    Raises DecodeError.
    """
    if question.frame_rate:
        return _read_folder(question, frames)
    with open_clip(question.video) as video:
        rate = video.frame_rate if isinstance(video, Video) else None
        if not rate and question.seconds:
            raise DecodeError(
                question.video, "names no frame rate, and a part of it is asked about"
            )
        numbers = mvbench.segment_middles(len(video) - 1, frames, rate or 1.0, question.seconds)
        return video.read(numbers)


def _read_folder(question: Question, frames: int) -> np.ndarray:
    """The same of a folder of frames, 00001.jpg and so on."""
    assert question.frame_rate is not None
    folder = Path(question.video)
    last = len(list(folder.glob("*.jpg"))) if folder.is_dir() else 0
    if not last:
        raise DecodeError(question.video, "is no folder of frames, 00001.jpg and so on")
    numbers = mvbench.segment_middles(last, frames, question.frame_rate, question.seconds, 1)
    found = []
    for number in numbers:
        pixels = cv2.imread(str(folder / f"{number:05}.jpg"))
        if pixels is None:
            raise DecodeError(question.video, f"its frame {number:05}.jpg cannot be read")
        found.append(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB))
    return np.stack(found)


def _key(setting: Setting, question: Question) -> Key:
    return Key(*setting, question.task, question.number)


def _row(setting: Setting, answer: Answer) -> Report:
    """A line of the file of answers."""
    return _key(setting, answer.question)._asdict() | {
        "prediction": answer.prediction,
        "failure": answer.failure,
    }


def _kept(path: epath.Path, questions: Sequence[Question]) -> dict[Key, Answer]:
    """The answers of an evaluation that was stopped; videos that failed are tried again."""
    by_number = {(question.task, question.number): question for question in questions}
    found: dict[Key, Answer] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            row = storage.parse_json(line)
            key = Key(**{name: row[name] for name in Key._fields})
            if not row["failure"]:
                question = by_number[key.task, key.number]
                found[key] = Answer(question=question, prediction=row["prediction"])
        except (ValueError, KeyError, TypeError):
            continue  # the end of a line that a kill cut off; its question is asked again
    return found


def _notes(budgets: dict[str, Report]) -> Iterator[str]:
    """A line about videos that could not be read, if there are any."""
    failures: Sequence[Report] = next(iter(budgets.values()))["failures"]
    if failures:
        first = failures[0]
        yield (
            f"{len(failures)} questions are about videos that cannot be read, and count as wrong; "
            f"the first: {first['id']}: {first['reason']}"
        )
