"""Retrieval between videos and texts at every token budget: `--mode=evaluate` of Flux-CLIP.

A report has plain scores and dual softmax side by side, in both directions, with 95 % intervals,
and says what it is of: split, number of videos and texts, texts that were cut. A video that cannot
be read stays in the gallery, and is never found.
"""

import hashlib
import json
import os
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from fluxvit_jax.checkpoints import checkpointer
from fluxvit_jax.checkpoints.weights import EVALUATION
from fluxvit_jax.config.fields import REQUIRED
from fluxvit_jax.config.network import model_config
from fluxvit_jax.data.retrieval_set import RetrievalSet, read_retrieval_set
from fluxvit_jax.data.sources import Example, FileSource, digest
from fluxvit_jax.data.supervised_workers import Quarantine
from fluxvit_jax.data.tokenizer import CONTEXT, token_count
from fluxvit_jax.data.views import views_of
from fluxvit_jax.distributed import atomic, storage
from fluxvit_jax.distributed.console import say
from fluxvit_jax.distributed.hosts import raise_on_all_hosts
from fluxvit_jax.distributed.mesh import host_index, make_mesh
from fluxvit_jax.distributed.watchdog import Watchdog
from fluxvit_jax.errors import UserError
from fluxvit_jax.evaluation import retrieval, vectors
from fluxvit_jax.evaluation.evaluate_mode import report_words
from fluxvit_jax.evaluation.finite import check_measured
from fluxvit_jax.evaluation.settings import Setting, planned_or_given, tokens_kept
from fluxvit_jax.evaluation.unreadable import (
    NothingReadableError,
    describe_failures,
    warn_of_failures,
)
from fluxvit_jax.evaluation.vectors import VideoVectors
from fluxvit_jax.grids import PATCH
from fluxvit_jax.objectives import flux_clip_weights
from fluxvit_jax.objectives.flux_clip import TEMPERATURE
from fluxvit_jax.objectives.flux_clip_weights import ClipWeights

KINDS = {"plain": "plain", "dual_softmax": "dual softmax"}
DIRECTIONS = {"text_to_video": "text to video", "video_to_text": "video to text"}

Report = dict[str, Any]


def run(config: ConfigDict, workdir: str) -> int:
    """Evaluates a run on the pairs of `data.validation`; prints a table and writes the report.

    Returns the exit status, 0. Raises UserError: no such run, no or another number of pairs, not
    one video that can be read, weights that give no finite numbers.
    """
    folder = storage.path_of(workdir)
    with raise_on_all_hosts():
        pairs = read_pairs(config)
        weights = read_weights(config, folder)
        mesh = make_mesh(config)
    videos, texts = len(pairs.videos), len(pairs.texts)
    say(f"retrieval by {weights.origin} between {videos} videos and {texts} texts")
    with Watchdog(config.log.watchdog_seconds, folder) as watchdog:
        report = evaluate(config, weights, pairs, mesh, watchdog)
    if host_index() == 0:
        name = report_name(config, report, outside_source(config, folder))
        write(report, table(report), notes(report), folder, name)
    return 0


def write(report: Report, table: str, notes: Sequence[str], folder: epath.Path, name: str) -> None:
    """Prints a table and notes, and writes the report into a workdir."""
    print(table)  # before what may fail
    path = folder / EVALUATION / f"{name}.json"
    storage.make_folder(path.parent)
    atomic.write(path, json.dumps(report, indent=1) + "\n")
    print("\n".join([*notes, f"written to {path}"]))


def read_weights(config: ConfigDict, workdir: epath.Path) -> ClipWeights:
    """The weights of the workdir's run, or those that `train.init_from` names, which is the origin.

    Raises UserError: there are none, or they are not of Flux-CLIP.
    """
    outside = outside_source(config, workdir)
    found = flux_clip_weights.read(outside or workdir, config.clip.text_encoder)
    return found._replace(origin=outside) if outside else found


def outside_source(config: ConfigDict, workdir: epath.Path) -> str:
    """`train.init_from` if the weights to evaluate are there; "" if they are the workdir's own."""
    given = config.train.init_from
    has_run = (workdir / checkpointer.FOLDER).exists() or given in ("", REQUIRED)
    return "" if has_run else given


def read_pairs(config: ConfigDict) -> RetrievalSet:
    """The videos and texts of `data.validation`.

    Raises UserError: there are none, or not as many as `eval.videos` and `eval.texts` say.
    """
    if not config.data.validation:
        raise UserError(
            "no pairs to evaluate on: add --config.data.validation=LIST, JSON or CSV of videos "
            "and captions"
        )
    root = root_of(config, config.data.validation)
    pairs = read_retrieval_set(config.data.validation, root, config.eval.paragraphs)
    for what, expected, found in _counts(config, pairs):
        if expected not in (0, found) and not config.eval.allow_missing:
            raise UserError(
                f"{config.data.validation}: has {found} {what}, and the set has {expected} "
                f"(config.eval.{what}), so it is another split; --config.eval.allow_missing=True "
                "takes it all the same, and the report says so"
            )
    return pairs


def root_of(config: ConfigDict, path: str) -> str:
    """The folder that the paths of a list are relative to: `data.root`, or that of the list."""
    return config.data.root or os.path.dirname(os.path.abspath(path))


def _counts(config: ConfigDict, pairs: RetrievalSet) -> list[tuple[str, int, int]]:
    return [
        ("videos", config.eval.videos, len(pairs.videos)),
        ("texts", config.eval.texts, len(pairs.texts)),
    ]


def evaluate(
    config: ConfigDict, weights: ClipWeights, pairs: RetrievalSet, mesh: Mesh, watchdog: Watchdog
) -> Report:
    """The report of a set of pairs.

    Raises NothingReadableError if no video can be read, UserError if the weights give no finite
    numbers.
    """
    own = with_evaluation(config, weights.config)
    settings = planned_or_given(own, weights.params)
    embedded = embed_pairs(weights.params, own, pairs, settings, mesh, watchdog.alive)
    assert embedded is not None  # nothing stops it
    check_measured(embedded.texts, weights.origin, "for the texts")
    for setting, videos in zip(settings, embedded.videos.by_setting, strict=True):
        check_measured(videos, weights.origin, f"at budget {setting.budget}")
    found = compare(embedded, own, pairs, settings)
    return {
        "task": "retrieval",
        **about_run(config, weights),
        "videos": len(pairs.videos),
        "texts": len(pairs.texts),
        "expected": {what: number for what, number, _ in _counts(config, pairs) if number},
        "pairs": digest([*pairs.videos, *pairs.texts, str(pairs.texts_of)]),
        "paragraphs": config.eval.paragraphs,
        "cut_texts": sum(token_count(text) > CONTEXT for text in pairs.texts),
        "dual_temperature": config.eval.dual_temperature,
        **found.report,
    }


class Retrieval(NamedTuple):
    """Results of retrieval. report: {"budgets", "failures", "warning"}, as in `run`'s file."""

    report: Report

    def scalars(self) -> dict[str, float]:
        """{"t2v_r1_1024": .., "v2t_r1_1024": .., ..., "failed": ..}: R@1 by plain scores."""
        names = {"t2v_r1": "text_to_video", "v2t_r1": "video_to_text"}
        budgets = self.report["budgets"].items()
        return {
            f"{name}_{budget}": row["plain"][direction]["recall"]["1"]
            for budget, row in budgets
            for name, direction in names.items()
        } | {"failed": len(self.report["failures"])}

    def told(self) -> dict[str, float]:
        """The scalars that people are told."""
        return self.scalars()


def measure(
    params: dict,
    config: ConfigDict,
    pairs: RetrievalSet,
    settings: Sequence[Setting],
    mesh: Mesh,
    after_batch: Callable[[], None] = lambda: None,
    stop: Callable[[], bool] = lambda: False,
    quarantine: Quarantine | None = None,
) -> Retrieval | None:
    """Retrieval between videos and texts at each of `settings`; None if `stop` ended it.

    What is no finite number is found last. Arguments and errors: as of `embed_pairs`.
    """
    embedded = embed_pairs(params, config, pairs, settings, mesh, after_batch, stop, quarantine)
    return compare(embedded, config, pairs, settings) if embedded else None


class PairVectors(NamedTuple):
    """Unit vectors of a set of pairs. texts: float32 [T, D]; videos: at each setting."""

    texts: np.ndarray
    videos: VideoVectors


def embed_pairs(
    params: dict,
    config: ConfigDict,
    pairs: RetrievalSet,
    settings: Sequence[Setting],
    mesh: Mesh,
    after_batch: Callable[[], None] = lambda: None,
    stop: Callable[[], bool] = lambda: False,
    quarantine: Quarantine | None = None,
) -> PairVectors | None:
    """The vectors of videos and texts; None if `stop` ended it.

    params: as in `flux_clip_weights`; config: of their network; the rest as in `evaluate.evaluate`.

    Raises NothingReadableError if no video can be read.
    """
    texts = vectors.of_texts(params, config, pairs.texts, mesh)
    after_batch()
    videos = embed_videos(
        config, params, settings, pairs.videos, mesh, after_batch, stop, quarantine
    )
    return PairVectors(texts, videos) if videos else None


def compare(
    embedded: PairVectors, config: ConfigDict, pairs: RetrievalSet, settings: Sequence[Setting]
) -> Retrieval:
    """Retrieval between the vectors of `embed_pairs`, whose arguments the others are."""
    texts, (by_setting, failures) = embedded
    budgets = {
        str(setting.budget): about_setting(config, setting)
        | both_scores(videos, texts, pairs, failures, config.eval.dual_temperature)
        for setting, videos in zip(settings, by_setting, strict=True)
    }
    return Retrieval({"budgets": budgets, **about_failures(config, pairs.videos, failures)})


def embed_videos(
    config: ConfigDict,
    params: dict,
    settings: Sequence[Setting],
    videos: Sequence[str],
    mesh: Mesh,
    after_batch: Callable[[], None] = lambda: None,
    stop: Callable[[], bool] = lambda: False,
    quarantine: Quarantine | None = None,
) -> VideoVectors | None:
    """The vectors of videos, paths; arguments as in `measure`.

    Raises NothingReadableError if no video can be read.
    """
    source = source_of(videos)
    found = vectors.of_videos(params, config, source, settings, mesh, after_batch, stop, quarantine)
    if found is not None and len(found.failures) == len(source):
        first = found.failures[0]
        raise NothingReadableError(config.data.validation, len(source), source[0], first)
    return found


def source_of(videos: Sequence[str]) -> FileSource:
    """Videos of paths, which are their ids as well, without labels."""
    return FileSource([Example(path, 0, path) for path in videos])


def about_setting(own: ConfigDict, setting: Setting) -> Report:
    """What a report tells of a setting."""
    return {
        "frames": setting.grid.frames,
        "resolution": setting.grid.rows * PATCH,
        "tokens": tokens_kept(model_config(own), setting.grid, setting.budget),
        "head": setting.head,
    }


def about_run(config: ConfigDict, weights: ClipWeights) -> Report:
    """What a report tells of its weights and data."""
    return {
        "checkpoint": weights.origin,
        "selector": config.model.selector.to_dict(),
        "dtype": config.model.dtype,
        "dataset": config.eval.dataset or os.path.basename(config.data.validation),
        "data": config.data.validation,
        "views": str(views_of(config)),
        "learned_temperature": float(weights.params[TEMPERATURE]),
    }


def about_failures(config: ConfigDict, videos: Sequence[str], failures: dict[int, str]) -> Report:
    """What a report tells of videos that could not be read."""
    listed = [{"id": videos[number], "reason": reason} for number, reason in failures.items()]
    first = f"{listed[0]['id']}: {listed[0]['reason']}" if listed else ""
    return {
        "failures": listed,
        "warning": warn_of_failures(config, len(listed), len(videos), first),
    }


def about_model(config: ConfigDict, weights: str) -> list[Any]:
    """What tells reports apart that are of the same videos at the same settings.

    weights: as `outside_source` tells.
    """
    return [config.model.selector.to_dict(), config.model.dtype, config.seed, weights]


def with_evaluation(config: ConfigDict, trained: ConfigDict) -> ConfigDict:
    """The config of a trained network, measured as another config says."""
    own = trained.copy_and_resolve_references()
    for section in ("eval", "search", "data", "parallel"):
        own[section] = config[section]
    own.model.selector, own.seed = config.model.selector, config.seed
    own.model.dtype = config.model.dtype
    return own


def both_scores(
    videos: np.ndarray,
    texts: np.ndarray,
    pairs: RetrievalSet,
    failures: Collection[int],
    dual_temperature: float,
) -> Report:
    """{"plain": {"text_to_video": .., "video_to_text": ..}, "dual_softmax": likewise}.

    videos, texts: vectors [V, D] and [T, D]; failures: numbers of videos that were not read.
    """
    failed = np.zeros(len(videos), bool)
    failed[list(failures)] = True
    first_video = np.array([own[0] for own in pairs.videos_of])
    report: Report = {}
    for kind in KINDS:
        to_video = retrieval.similarities(texts, videos)
        to_text = to_video.T
        if kind == "dual_softmax":
            # What was not read takes no share of the softmax over videos.
            asked = np.where(failed[:, None], -np.inf, to_text)
            weight = retrieval.dual_weights(asked, dual_temperature)
            to_video, to_text = retrieval.dual_softmax(to_video, dual_temperature), to_text * weight
        to_video = np.where(failed, -np.inf, to_video)
        to_text = np.where(failed[:, None], -np.inf, to_text)
        report[kind] = {
            # Captions of one video are drawn together for the interval.
            "text_to_video": _recall(to_video, pairs.videos_of, first_video),
            "video_to_text": _recall(to_text, pairs.texts_of, None),
        }
    return report


def _recall(
    scores: np.ndarray, right: Sequence[Sequence[int]], groups: np.ndarray | None
) -> Report:
    found = retrieval.recall(scores, right, groups)
    return {
        "recall": {str(k): share for k, share in found.recall.items()},
        "intervals": {str(k): list(interval) for k, interval in found.intervals.items()},
        "median_rank": found.median_rank,
        "mean_rank": found.mean_rank,
    }


def table(report: Report) -> str:
    """A table with a line for each budget, direction and kind of score."""
    lines = [
        f"{'budget':>6}  {'frames':>6}  {'pixels':>6}  {'direction':<13}  {'scores':<12}"
        f"  {'R@1 (95 %)':>19}  {'R@5':>6}  {'R@10':>6}  {'median':>6}  {'mean':>6}"
    ]
    for budget, row in report["budgets"].items():
        for direction, words in DIRECTIONS.items():
            for kind, name in KINDS.items():
                own = row[kind][direction]
                low, high = own["intervals"]["1"]
                first = f"{own['recall']['1']:.1%} ({100 * low:.1f}..{100 * high:.1f})"
                lines.append(
                    f"{budget:>6}  {row['frames']:>6}  {row['resolution']:>6}  {words:<13}"
                    f"  {name:<12}  {first:>19}  {own['recall']['5']:>6.1%}"
                    f"  {own['recall']['10']:>6.1%}  {own['median_rank']:>6g}"
                    f"  {own['mean_rank']:>6.1f}"
                )
    return "\n".join(lines)


def notes(report: Report) -> list[str]:
    """What to know about the numbers."""
    lines = [
        f"{report['dataset']}: {report['videos']} videos, {report['texts']} texts; dual softmax at "
        f"temperature {report['dual_temperature']:g} over all queries"
    ]
    for what, number in report["expected"].items():
        if number != report[what]:
            lines.append(f"warning: the set has {number} {what}, not {report[what]}")
    if report["cut_texts"]:
        lines.append(
            f"warning: {report['cut_texts']} texts are longer than {CONTEXT} tokens and were cut"
        )
    return lines + failure_notes(report)


def failure_notes(report: Report) -> list[str]:
    """A line about videos that could not be read, if there are any."""
    if report["warning"]:
        return [f"warning: {report['warning']}"]
    failures = report["failures"]
    if not failures:
        return []
    first = f"{failures[0]['id']}: {failures[0]['reason']}"
    return [describe_failures(len(failures), report["videos"], first)]


def report_name(config: ConfigDict, report: Report, weights: str) -> str:
    """The name of a report's file; its digits are a hash of what tells reports apart.

    weights: as `outside_source` tells.
    """
    rows = report["budgets"].items()
    about = {
        "pairs": report["pairs"],
        "views": report["views"],
        "settings": [[budget, row["frames"], row["resolution"]] for budget, row in rows],
        "paragraphs": report["paragraphs"],
        "dual_temperature": report["dual_temperature"],
        "model": about_model(config, weights),
    }
    digits = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:8]
    plan = "plan-" if config.eval.plan else ""
    return f"{report_words(config.data.validation)}-retrieval-{plan}{digits}"
