"""`eval.task=mvbench`: a video chat's answers to questions with options, at every token budget.

Frames, prompts and rules are the official ones (`mvbench`). Answers are kept as they come, so an
evaluation that was stopped goes on with those that it lacks.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from fluxvit_jax.checkpoints.weights import EVALUATION
from fluxvit_jax.config.fields import REQUIRED
from fluxvit_jax.data.host_share import HostShare
from fluxvit_jax.data.pipeline import Batches
from fluxvit_jax.data.sources import digest
from fluxvit_jax.data.supervised_workers import Quarantine
from fluxvit_jax.deploy.chat import Chat, FirstQuestion
from fluxvit_jax.distributed import atomic, checksums, storage
from fluxvit_jax.distributed.console import progress_bar
from fluxvit_jax.distributed.devices import enough_memory
from fluxvit_jax.distributed.mesh import make_mesh, round_up_to_shards
from fluxvit_jax.distributed.watchdog import Watchdog
from fluxvit_jax.errors import UserError
from fluxvit_jax.evaluation import mvbench, retrieve
from fluxvit_jax.evaluation.evaluate_mode import report_words
from fluxvit_jax.evaluation.mvbench import Answer, Question
from fluxvit_jax.evaluation.mvbench_clips import QuestionClips
from fluxvit_jax.objectives import flux_chat_weights
from fluxvit_jax.objectives.flux_chat_weights import ChatWeights

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

    Raises UserError: no run of video chat, no questions, several hosts, a batch that does not fit.
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
    mesh = make_mesh(config)
    llm = "" if config.chat.llm == REQUIRED else config.chat.llm
    weights = flux_chat_weights.read(folder, llm, config.model.dtype, mesh)
    settings = [tuple(setting) for setting in config.eval.settings]
    about = _about(config, weights, questions)
    digits = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:8]
    words = f"{report_words(config.data.validation)}-mvbench"
    answers_file = folder / EVALUATION / f"{words}-{digits}-answers.jsonl"
    kept = _take_up(answers_file, questions)
    todo = {
        setting: [question for question in questions if _key(setting, question) not in kept]
        for setting in settings
    }
    left = sum(map(len, todo.values()))
    if left < len(questions) * len(settings):
        print(f"{len(kept)} answers are in {answers_file}; {left} are to be given")
    chat = Chat(weights, config.model.dtype, mesh)
    with Watchdog(config.log.watchdog_seconds, folder) as watchdog:
        kept |= _give(chat, config, todo, answers_file, mesh, watchdog)
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


def _give(
    chat: Chat,
    config: ConfigDict,
    todo: Mapping[Setting, Sequence[Question]],
    path: epath.Path,
    mesh: Mesh,
    watchdog: Watchdog,
) -> dict[Key, Answer]:
    """The answers to the questions of each setting, each in the file as soon as it is given.

    Raises UserError: as `answered`, or the file cannot be written.
    """
    given: dict[Key, Answer] = {}
    with (
        progress_bar(sum(map(len, todo.values())), desc="answering", unit="question") as bar,
        contextlib.closing(atomic.LineFile(path)) as file,
    ):
        for setting, lacking in todo.items():
            for answers in answered(chat, config, setting, lacking, mesh) if lacking else ():
                for answer in answers:
                    given[_key(setting, answer.question)] = answer
                    file.add(checksums.to_line(_row(setting, answer)))
                bar.update(len(answers))
                watchdog.alive()
            watchdog.pause()  # the next setting has to be compiled
    return given


def _about(config: ConfigDict, weights: ChatWeights, questions: Sequence[Question]) -> Report:
    """What the answers depend on, besides the setting."""
    return {
        "checkpoint": weights.projection.origin,
        "dtype": config.model.dtype,
        "language_model": os.path.basename(os.path.normpath(weights.llm_folder)),
        "language_model_fingerprint": weights.llm_fingerprint,
        "data": config.data.validation,
        "questions": digest(str(question) for question in questions),
        "prompt": config.eval.prompt,
        "resize": config.eval.resize,
    }


def answered(
    chat: Chat, config: ConfigDict, setting: Setting, questions: Sequence[Question], mesh: Mesh
) -> Iterator[list[Answer]]:
    """A chat's answers at (tokens, frames, pixels), `eval.batch_size` questions at a time.

    A video that cannot be read has the reason in place of an answer.

    Raises UserError: a question is too long for the language model; a batch does not fit.
    """
    tokens, frames, resolution = setting
    form = config.eval.prompt
    quarantine: Quarantine = {}
    clips = QuestionClips(
        questions=questions,
        frames=frames,
        side=resolution,
        squeeze=config.eval.resize == "squeeze",
        quarantine=quarantine,
    )
    size = round_up_to_shards(config.eval.batch_size, mesh)
    too_large = (
        f"config.eval.batch_size: {size} questions at once are more than the devices' memory "
        "takes; lower it, and the answers so far stay"
    )
    with Batches(
        HostShare(clips, size),
        size,
        config.data.workers,
        frames * resolution**2 * 3,
        clip_seconds=config.data.clip_seconds,
        quarantine=quarantine,
    ) as batches:
        for batch in batches:
            rows = [
                (questions[number], str(failure)) if number >= 0 else None
                for number, failure in zip(batch["number"], batch["failure"], strict=True)
            ]
            asked = [first_question(row[0], form) if row and not row[1] else None for row in rows]
            with enough_memory(too_large):
                texts = chat.ask_each(
                    batch["clip"], asked, tokens, mvbench.NEW_TOKENS[form], list(batch["times"])
                )
            pairs = zip(rows, texts, strict=True)
            yield [_answer(*row, text, form) for row, text in pairs if row]


def first_question(question: Question, form: str) -> FirstQuestion:
    """What a chat is asked, by the official prompt of `mvbench.FORMS`."""
    prompt = mvbench.prompt_of(question, form)
    return FirstQuestion(prompt.text, prompt.answer_start)


def _answer(question: Question, failure: str, text: str | UserError, form: str) -> Answer:
    if failure:
        return Answer(question=question, failure=failure)
    if isinstance(text, UserError):
        raise text
    return Answer(question=question, prediction=mvbench.prediction_of(text, form))


def _key(setting: Setting, question: Question) -> Key:
    return Key(*setting, question.task, question.number)


def _row(setting: Setting, answer: Answer) -> Report:
    """A line of the file of answers, as JSON."""
    return _key(setting, answer.question)._asdict() | {
        "prediction": answer.prediction,
        "failure": answer.failure,
    }


def _take_up(path: epath.Path, questions: Sequence[Question]) -> dict[Key, Answer]:
    """The answers of an evaluation that was stopped, whose file then holds nothing else.

    A question whose video failed, or whose line a kill cut off, is asked again.

    Raises UserError or OSError if the file cannot be read or written.
    """
    by_number = {(question.task, question.number): question for question in questions}
    found: dict[Key, Answer] = {}
    rows = []
    for row in checksums.read_lines(path):
        try:
            key = Key(**{name: row[name] for name in Key._fields})
            question, prediction = by_number[key.task, key.number], row["prediction"]
            failure = row["failure"]
        except (KeyError, TypeError):
            continue  # no answer to these questions
        if not failure:
            found[key] = Answer(question=question, prediction=prediction)
            rows.append(row)
    storage.make_folder(path.parent)
    checksums.write_lines(path, rows)
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
