"""Multiple choice at every token budget: which of a video's texts describes it.

A file is a JSON list of {"video": path, "option": texts, "answer": number, or a list of 0 and 1},
as of SSv2-MC, measured by accuracy, and Charades-MC, by mAP over the options, which are the same
for all videos, in any order. A video that cannot be read is wrong, or not found.

Source: InternVideo2, multi_modality, tasks_clip/retrieval_mc.py and retrieval_mc2.py. There an
option that no video has counts 0 in the mean; here it does not count. Reports have both.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from fluxvit_jax.data.caption_lists import cleaned, entries, strings
from fluxvit_jax.data.sources import digest
from fluxvit_jax.data.views import views_of
from fluxvit_jax.distributed import storage
from fluxvit_jax.distributed.console import say
from fluxvit_jax.distributed.hosts import raise_on_all_hosts
from fluxvit_jax.distributed.mesh import host_index, make_mesh
from fluxvit_jax.distributed.watchdog import Watchdog
from fluxvit_jax.errors import UserError
from fluxvit_jax.evaluation import average_precision, retrieve, vectors
from fluxvit_jax.evaluation.evaluate_mode import report_words
from fluxvit_jax.evaluation.finite import check_measured
from fluxvit_jax.evaluation.settings import Setting, planned_or_given
from fluxvit_jax.evaluation.zero_shot import option_shares
from fluxvit_jax.objectives.flux_clip import TEMPERATURE
from fluxvit_jax.reports.confidence_intervals import mean_interval

Report = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Questions:
    """videos: paths; options: cleaned texts, as many for each; right: bool [videos, options].

    several: whether a video may have several right options. Then the options of all videos are the
    same, in one order.
    """

    videos: tuple[str, ...]
    options: tuple[tuple[str, ...], ...]
    right: np.ndarray
    several: bool


def read_questions(path: str, root: str = "") -> Questions:
    """The questions that a file lists.

    Raises UserError: no such file; no list of this form; another number of options; where several
    may be right, other options, or none that is right.
    """
    videos: list[str] = []
    options: list[tuple[str, ...]] = []
    right: list[np.ndarray] = []
    several = False
    places: list[str] = []
    for where, entry in entries(storage.path_of(path)):
        video, answer = entry.get("video"), entry.get("answer")
        if not isinstance(video, str):
            raise UserError(f'{where}: names no file: "video" is missing')
        texts = cleaned(strings(entry.get("option"), f"{where}: option"), where)
        if options and len(texts) != len(options[0]):
            raise UserError(f"{where}: {len(texts)} options where others have {len(options[0])}")
        several |= isinstance(answer, list)
        videos.append(os.path.join(root, video))
        options.append(texts)
        right.append(_right_options(answer, len(texts), where))
        places.append(where)
    if not videos:
        raise UserError(f"{path}: there are no questions in it")
    if several:
        orders = [
            _order_of(texts, options[0], at) for texts, at in zip(options, places, strict=True)
        ]
        right = [own[order] for own, order in zip(right, orders, strict=True)]
        options = [options[0]] * len(videos)
        if not np.any(right):
            raise UserError(f"{path}: no option of any question is right; mend its answers")
    return Questions(
        videos=tuple(videos), options=tuple(options), right=np.stack(right), several=several
    )


def _right_options(answer: Any, options: int, where: str) -> np.ndarray:
    """Which options an answer names, a number or a list of 0 and 1: bool [options].

    Raises UserError if it is neither. where: the entry, for the message.
    """
    right = np.zeros(options, bool)
    if type(answer) is int and 0 <= answer < options:
        right[answer] = True
    elif (
        isinstance(answer, list)
        and len(answer) == options
        and all(type(own) is int and own in (0, 1) for own in answer)
    ):
        right[:] = answer
    else:
        raise UserError(
            f"{where}: the answer {answer} is no number of an option, nor a list of 0 and 1"
        )
    return right


def _order_of(texts: Sequence[str], first: Sequence[str], where: str) -> np.ndarray:
    """Where the texts of the first question are among those of another one: int [options].

    Each option has an average precision, so those of all videos are the same. Raises UserError if
    they are not. where: the entry, for the message.
    """
    if sorted(texts) != sorted(first):
        raise UserError(
            f"{where}: its options are not those of the first question; where the answers are "
            "lists of 0 and 1, all videos have the same options"
        )
    order = np.empty(len(first), int)
    order[np.argsort(first, kind="stable")] = np.argsort(texts, kind="stable")
    return order


def run(config: ConfigDict, workdir: str) -> int:
    """Evaluates a run on the questions of `data.validation`; prints a table, writes the report.

    Returns the exit status, 0. Raises UserError: no such run, no questions, no video to be read,
    weights that give no finite numbers.
    """
    folder = storage.path_of(workdir)
    with raise_on_all_hosts():
        if not config.data.validation:
            raise UserError("no questions: add --config.data.validation=LIST, a JSON file")
        root = retrieve.root_of(config, config.data.validation)
        questions = read_questions(config.data.validation, root)
        weights = retrieve.read_weights(config, folder)
        mesh = make_mesh(config)
    say(f"multiple choice by {weights.origin}: {len(questions.videos)} questions")
    with Watchdog(config.log.watchdog_seconds, folder) as watchdog:
        own = retrieve.with_evaluation(config, weights.config)
        texts = sorted({text for texts in questions.options for text in texts})
        number = {text: n for n, text in enumerate(texts)}
        by_text = vectors.of_texts(weights.params, own, texts, mesh)
        watchdog.alive()
        settings = planned_or_given(own, weights.params)
        found = retrieve.embed_videos(
            own, weights.params, settings, questions.videos, mesh, watchdog.alive
        )
    assert found is not None  # nothing stops it
    options = by_text[np.array([[number[text] for text in own] for own in questions.options])]
    temperature = float(weights.params[TEMPERATURE])
    budgets = {}
    for setting, videos in zip(settings, found.by_setting, strict=True):
        shares = option_shares(videos, options, temperature)
        check_measured(shares, weights.origin, f"at budget {setting.budget}")
        measured = measures(shares, questions, list(found.failures))
        budgets[str(setting.budget)] = retrieve.about_setting(own, setting) | measured
    report = {
        "task": "multiple_choice",
        **retrieve.about_run(config, weights),
        "videos": len(questions.videos),
        "options": len(questions.options[0]),
        "budgets": budgets,
        **retrieve.about_failures(config, questions.videos, found.failures),
    }
    if host_index() == 0:
        model = retrieve.about_model(config, retrieve.outside_source(config, folder))
        digits = _digits(own, settings, questions, model)
        name = f"{report_words(config.data.validation)}-multiple_choice-{digits}"
        retrieve.write(report, table(report), retrieve.failure_notes(report), folder, name)
    return 0


def measures(shares: np.ndarray, questions: Questions, failed: Sequence[int]) -> Report:
    """Accuracy, or mAP of questions with several right options, of probabilities [V, K]."""
    read = np.ones(len(shares), bool)
    read[list(failed)] = False
    if not questions.several:
        hits = questions.right[np.arange(len(shares)), shares.argmax(axis=1)] & read
        return {"accuracy": float(hits.mean()), "interval": list(mean_interval(hits))}
    missed = questions.right[~read].sum(axis=0)
    precisions = average_precision.of_classes(shares[read], questions.right[read], missed)
    return {
        "map": average_precision.mean(precisions),
        "official_map": float(np.mean([own or 0.0 for own in precisions])),
        "ap": precisions,
    }


def table(report: Report) -> str:
    """A table with a line for each budget."""
    several = "map" in next(iter(report["budgets"].values()))
    head = "mAP  official" if several else "accuracy (95 %)"
    lines = [f"{'budget':>6}  {'frames':>6}  {'pixels':>6}  {head}"]
    for budget, row in report["budgets"].items():
        if several:
            measure = f"{row['map']:.1%}  {row['official_map']:.1%}"
        else:
            low, high = row["interval"]
            measure = f"{row['accuracy']:.1%} ({100 * low:.1f}..{100 * high:.1f})"
        lines.append(f"{budget:>6}  {row['frames']:>6}  {row['resolution']:>6}  {measure}")
    return "\n".join(lines)


def _digits(
    config: ConfigDict, settings: Sequence[Setting], questions: Questions, model: Sequence[Any]
) -> str:
    """A hash of what tells reports of a list apart. model: as `retrieve.about_model` tells."""
    asked = [str(questions.options), str(questions.right.tolist()), *questions.videos]
    return digest([f"{settings} {views_of(config)} {model}", *asked])[:8]
