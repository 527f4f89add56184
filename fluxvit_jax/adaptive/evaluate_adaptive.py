"""`--mode=evaluate --config.eval.cascade=...`: accuracy and mean cost of an adaptive budget.

That is a cascade, or with `eval.adaptive=motion` a rule of motion. Videos that go on are packed
into full batches, so the videos a second are those of a server that is never short of videos. How
many go on differs by host, so each host runs its own videos on its own devices.
"""

import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from fluxvit_jax.adaptive import planner as adaptive_planner
from fluxvit_jax.adaptive.cascade import Cascade, check_steps
from fluxvit_jax.adaptive.motion import MotionRule
from fluxvit_jax.adaptive.motion_scores import scorer
from fluxvit_jax.adaptive.packing import (
    Finished,
    PackedCascade,
    PackedRule,
    Video,
    setting_of,
)
from fluxvit_jax.config.network import model_config
from fluxvit_jax.data.sources import Source
from fluxvit_jax.data.views import views_of
from fluxvit_jax.distributed import partition_rules
from fluxvit_jax.distributed.console import say
from fluxvit_jax.distributed.hosts import raise_on_all_hosts
from fluxvit_jax.distributed.mesh import (
    device_put_global,
    gather,
    host_count,
    host_index,
    local_row_indices,
    mesh_over,
    platform_of,
    round_up_to_shards,
)
from fluxvit_jax.distributed.watchdog import Watchdog
from fluxvit_jax.errors import UserError
from fluxvit_jax.evaluation import evaluate, zero_shot
from fluxvit_jax.evaluation.accuracy import (
    Kept,
    calibrations,
    cross_entropy,
    likeliest,
    top_accuracies,
)
from fluxvit_jax.evaluation.evaluate import Evaluation
from fluxvit_jax.evaluation.evaluate_mode import opened_validation, report_name, tell
from fluxvit_jax.evaluation.settings import Setting, tokens_kept
from fluxvit_jax.evaluation.trained_weights import Weights
from fluxvit_jax.evaluation.unreadable import check_some_readable, first_of, warn_of_failures
from fluxvit_jax.grids import Grid
from fluxvit_jax.models import fluxvit
from fluxvit_jax.models.flops import gflops
from fluxvit_jax.token_optimization import planner

Adaptive = Cascade | MotionRule


class AdaptiveEvaluation(Evaluation):
    """An evaluation whose table shows the steps of a cascade, or the cells of a rule of motion."""

    def table(self) -> str:
        """A line for each step, and one for all."""
        name = self.report["task"]
        own = self.report["budgets"][name]
        lines = ["step  budget  frames  resolution  head  views  answer here"]
        for number, step in enumerate(self.report[name]["steps"], 1):
            lines.append(
                f"{number:>4}  {step['budget']:>6}  {step['frames']:>6}  {step['resolution']:>7} px"
                f"  {step['head']:>4}  {step['views'] or 'all':>5}  "
                f"{own['answered'][number - 1]:>11.1%}"
            )
        lines.append(
            f"top-1 {own['top1']:.2%}, ECE {own['calibration']['ece']:.2%}; on average "
            f"{own['average_gflops']:.4g} GFLOPs, {own['average_tokens']:.4g} tokens; "
            f"{self.report['videos_per_second']:.4g} videos a second"
        )
        return "\n".join(lines)


def name_of(adaptive: Adaptive) -> str:
    """The task in a report, and what is in place of a budget there."""
    return "cascade" if isinstance(adaptive, Cascade) else "motion"


def run_weights(config: ConfigDict, loaded: Weights, folder: epath.Path) -> int:
    """Evaluates `eval.cascade` on `data.validation`, as `evaluate_mode.run_weights` does.

    Returns the exit status, 0. Raises UserError: as there, there is no such cascade or rule, or it
    is of other weights.
    """
    with raise_on_all_hosts():
        adaptive = chosen(config, loaded, folder)
    source, mesh, names = opened_validation(config, loaded)
    say(f"evaluating {loaded.origin} on {len(source)} videos: {adaptive}")
    with Watchdog(config.log.watchdog_seconds, folder) as watchdog:
        evaluation = evaluate_adaptive(
            adaptive, loaded.params, config, source, mesh, watchdog.alive
        )
    settings = [setting_of(step) for step in adaptive.steps]
    described = json.dumps(adaptive.to_json())
    name = report_name(config, source, settings, loaded, described)
    tell(evaluation, name, config, loaded, folder, names)
    return 0


def chosen(config: ConfigDict, loaded: Weights, folder: epath.Path) -> Adaptive:
    """What `eval.cascade` names. Raises UserError: as `run_weights`."""
    text, views = config.eval.cascade, views_of(config)
    adaptive: Adaptive
    report: planner.Report | None
    of_motion = config.eval.adaptive == "motion"
    find = adaptive_planner.chosen_rule if of_motion else adaptive_planner.chosen
    adaptive, report, source = find(text, config.eval.plan, folder)
    if report is not None:
        planner.check_weights(report, fluxvit.network_params(loaded.params), source)
        if report["views"] != str(views):
            say(f"warning: {source}: was found on views of {report['views']}, not of {views}")
    if (most := max(step.views for step in adaptive.steps)) > views.count:
        raise UserError(
            f"config.eval.cascade={text}: looks at {most} views, and eval.clips x eval.crops has "
            f"{views.count}"
        )
    check_steps(adaptive.steps, model_config(config), f"config.eval.cascade={text}")
    return adaptive


def evaluate_adaptive(
    adaptive: Adaptive,
    params: dict,
    config: ConfigDict,
    source: Source,
    mesh: Mesh,
    after_batch: Callable[[], None] = lambda: None,
) -> AdaptiveEvaluation:
    """Accuracy and cost on the videos of `source`; arguments as in `evaluate.evaluate`.

    Raises UserError: none can be read, or as `evaluate.evaluate`.
    """
    start = time.perf_counter()
    videos, finished = _run(adaptive, params, config, source, mesh, after_batch)
    seconds = max(gather([time.perf_counter() - start]))
    for one in finished:
        videos[one.number] |= _answer(one, videos[one.number]["label"])
    of_all = evaluate.by_number(videos.values())
    check_some_readable(config, source, of_all)
    report = _report(adaptive, config, source, of_all, len(source) / seconds)
    (calibrated,) = calibrations(_kept(finished, config.model.classes), of_all)
    report["budgets"][name_of(adaptive)]["calibration"] = calibrated
    predictions = _predictions(name_of(adaptive), of_all)
    return AdaptiveEvaluation(report, predictions, config.model.classes)


def _run(
    adaptive: Adaptive,
    params: dict,
    config: ConfigDict,
    source: Source,
    mesh: Mesh,
    after_batch: Callable[[], None],
) -> tuple[dict[int, dict[str, Any]], list[Finished]]:
    """This host's videos by number, and the answers to those that can be read."""
    # The grids by frames and pixels; which budget stands beside them does not matter here.
    grids = {step.grid: setting_of(step) for step in adaptive.steps}
    if isinstance(adaptive, MotionRule) and adaptive.grid not in grids:
        grids[adaptive.grid] = Setting(1, Grid.square(*adaptive.grid), 0)
    packed = _packed(adaptive, params, config, mesh)
    videos: dict[int, dict[str, Any]] = {}
    finished: list[Finished] = []

    def take(batch: dict[str, np.ndarray]) -> None:
        ready = []
        for row, number in enumerate(batch["video"].tolist()):
            if number < 0:
                continue
            videos[number] = {
                "number": number,
                "host": host_index(),
                "id": str(batch["id"][row]),
                "label": int(batch["label"][row]),
                "failure": str(batch["failure"][row]),
            }
            if not videos[number]["failure"]:
                # Copies: the memory of a batch is used again.
                patches = {own: batch[f"patches{k}"][row].copy() for k, own in enumerate(grids)}
                ready.append(Video(number, patches))
        finished.extend(packed.add(ready))

    settings = list(grids.values())
    evaluate.for_each_batch(
        take, config, source, settings, mesh, lambda: False, None, after_batch, "evaluating"
    )
    return videos, finished + packed.finish()


def _answer(one: Finished, label: int) -> dict[str, Any]:
    """What the hosts tell each other of an answer, as `evaluate` has it for its one "budget"."""
    probabilities = one.probabilities[None]
    return {
        "top": likeliest(probabilities),
        "loss": cross_entropy(probabilities, np.array([label])),
        "step": int(one.step),
    }


def _kept(finished: Sequence[Finished], classes: int) -> Kept:
    """The answers of this host, which may have none."""
    tables = np.array([one.probabilities for one in finished]).reshape(len(finished), classes)
    return Kept([np.array([one.number for one in finished], np.int64)], [[tables]])


def _packed(
    adaptive: Adaptive, params: dict, config: ConfigDict, mesh: Mesh
) -> PackedCascade | PackedRule:
    """mesh: of all hosts, whose rows of a batch this host runs on its own devices."""
    batch = round_up_to_shards(config.eval.batch_size, mesh)
    rows = len(local_row_indices(mesh, batch))
    if host_count() > 1:
        mesh = mesh_over("data", jax.local_devices())
    params = fluxvit.network_params(params) | zero_shot.classifier_in(params)
    params = device_put_global(params, partition_rules.shardings(params, mesh, zero_shot.RULES))
    model, views = model_config(config, platform_of(mesh)), views_of(config).count
    rows = round_up_to_shards(rows, mesh)

    def packed(cascade: Cascade) -> PackedCascade:
        return PackedCascade(cascade, model, params, rows, views, config.seed, mesh)

    if isinstance(adaptive, Cascade):
        return packed(adaptive)
    score = scorer(model, Grid.square(*adaptive.grid), params, config.seed, mesh)
    cells = [packed(Cascade((step,))) for step in adaptive.steps]
    return PackedRule(adaptive, score, cells, rows)


def _report(
    adaptive: Adaptive,
    config: ConfigDict,
    source: Source,
    videos: Sequence[dict[str, Any]],
    videos_per_second: float,
) -> dict[str, Any]:
    read = [video for video in videos if not video["failure"]]
    failures = [{"id": v["id"], "reason": v["failure"]} for v in videos if v["failure"]]
    costs, tokens = costs_until(adaptive, config)
    steps = np.array([video["step"] for video in read])

    row = {
        **top_accuracies(config.model.classes, videos, 0),
        "loss": float(np.mean([video["loss"][0] for video in read])),
        "decoded": len(read),
        "failed": len(failures),
        "answered": [float((steps == number).mean()) for number in range(len(adaptive.steps))],
        "average_gflops": float(np.mean(costs[steps])),
        "average_tokens": float(np.mean(tokens[steps])),
    }
    return {
        "task": name_of(adaptive),
        "dataset": {"videos": len(source), "fingerprint": source.fingerprint},
        "views": str(views_of(config)),
        name_of(adaptive): adaptive.to_json(),
        "budgets": {name_of(adaptive): row},
        "videos_per_second": videos_per_second,
        "failures": failures,
        "warning": warn_of_failures(config, len(failures), len(videos), first_of(failures)),
    }


def costs_until(adaptive: Adaptive, config: ConfigDict) -> tuple[np.ndarray, np.ndarray]:
    """GFLOPs and tokens of a video by the step that answers, all its views counted: float [steps].

    Of a cascade with those of the steps before, of a rule of motion with those of the score.
    """
    model, views = model_config(config), views_of(config).count
    if isinstance(adaptive, Cascade):
        costs, tokens = [], []
        for own in adaptive.passes(views, shares_ranking=model.rounding == "exact"):
            budget, grid, _ = setting_of(own.step)
            cost, added = gflops(model, grid, budget), own.stop - own.start
            costs.append(added * (cost.all - (cost.selection if own.takes_ranking else 0.0)))
            tokens.append(added * tokens_kept(model, grid, budget))
        return np.cumsum(costs), np.cumsum(tokens)
    settings = [setting_of(step) for step in adaptive.steps]
    grid = Grid.square(*adaptive.grid)
    score = [0.0 if own.grid == grid else gflops(model, grid, 1).selection for own in settings]
    work = [views * gflops(model, own.grid, own.budget).all for own in settings]
    return (
        np.add(score, work),
        np.array([views * tokens_kept(model, own.grid, own.budget) for own in settings]),
    )


def _predictions(name: str, videos: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """As those of an evaluation, with the number of the "step" that answers, from 1."""
    rows = []
    for video in videos:
        about = {"id": video["id"], "label": video["label"]}
        if video["failure"]:
            rows.append(about | {"failure": video["failure"]})
        else:
            rows.append(about | {"step": video["step"] + 1, "predictions": {name: video["top"][0]}})
    return rows
