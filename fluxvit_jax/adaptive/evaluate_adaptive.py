"""`--mode=evaluate --config.eval.cascade=...`: accuracy and mean cost of an adaptive budget.

That is a cascade, or with `eval.adaptive=motion` a rule of motion. Videos that go on are packed
into full batches, so the videos a second are those of a server that is never short of videos.
"""

import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from fluxvit_jax.adaptive import planner as adaptive_planner
from fluxvit_jax.adaptive.cascade import Cascade
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
from fluxvit_jax.data.annotations import Source
from fluxvit_jax.data.views import views_of
from fluxvit_jax.distributed import partition_rules
from fluxvit_jax.distributed.mesh import (
    device_put_global,
    host_count,
    platform_of,
    round_up_to_shards,
    say,
)
from fluxvit_jax.distributed.watchdog import Watchdog
from fluxvit_jax.errors import UserError
from fluxvit_jax.evaluation import calibration, evaluate, zero_shot
from fluxvit_jax.evaluation.evaluate import Evaluation, Setting, Weights
from fluxvit_jax.evaluation.results import TOP
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
    """Evaluates `eval.cascade` on `data.validation`, as `evaluate.run_weights` does.

    Returns the exit status, 0. Raises UserError: as there, there is no such cascade or rule, it is
    of other weights, or there are several hosts.
    """
    if host_count() > 1:
        raise UserError("config.eval.cascade: is evaluated on one host; start one process")
    adaptive = chosen(config, loaded, folder)
    source, mesh, names = evaluate.opened_validation(config, loaded)
    say(f"evaluating {loaded.origin} on {len(source)} videos: {adaptive}")
    with Watchdog(config.log.watchdog_seconds, folder) as watchdog:
        evaluation = evaluate_adaptive(
            adaptive, loaded.params, config, source, mesh, watchdog.alive
        )
    settings = [setting_of(step) for step in adaptive.steps]
    described = json.dumps(adaptive.to_json())
    name = evaluate.report_name(config, source, settings, loaded, described)
    evaluate.tell(evaluation, name, config, loaded, folder, names)
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
    for step in adaptive.steps:
        if step.head >= len(config.train.budgets):
            raise UserError(f"config.eval.cascade={text}: the network has no head {step.head}")
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
    params = fluxvit.network_params(params) | zero_shot.classifier_in(params)
    params = device_put_global(params, partition_rules.shardings(params, mesh, zero_shot.RULES))
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
            failure = str(batch["failure"][row])
            about = {"id": str(batch["id"][row]), "label": int(batch["label"][row])}
            videos[number] = about | {"failure": failure}
            if not failure:
                # Copies: the memory of a batch is used again.
                patches = {own: batch[f"patches{k}"][row].copy() for k, own in enumerate(grids)}
                ready.append(Video(number, patches))
        finished.extend(packed.add(ready))

    start = time.perf_counter()
    evaluate.for_each_batch(
        take,
        config,
        source,
        list(grids.values()),
        mesh,
        lambda: False,
        None,
        after_batch,
        "evaluating",
    )
    finished += packed.finish()
    seconds = time.perf_counter() - start
    if not finished:
        data = config.data.validation
        raise evaluate.NothingReadableError(data, len(source), source[0], videos[0]["failure"])
    return AdaptiveEvaluation(
        _report(adaptive, config, source, videos, finished, len(source) / seconds),
        _predictions(name_of(adaptive), videos, finished),
        config.model.classes,
    )


def _packed(
    adaptive: Adaptive, params: dict, config: ConfigDict, mesh: Mesh
) -> PackedCascade | PackedRule:
    model, views = model_config(config, platform_of(mesh)), views_of(config).count
    batch = round_up_to_shards(config.eval.batch_size, mesh)

    def packed(cascade: Cascade) -> PackedCascade:
        return PackedCascade(cascade, model, params, batch, views, config.seed, mesh)

    if isinstance(adaptive, Cascade):
        return packed(adaptive)
    score = scorer(model, Grid.square(*adaptive.grid), params, config.seed, mesh)
    cells = [packed(Cascade((step,))) for step in adaptive.steps]
    return PackedRule(adaptive, score, cells, batch)


def _report(
    adaptive: Adaptive,
    config: ConfigDict,
    source: Source,
    videos: dict[int, dict[str, Any]],
    finished: Sequence[Finished],
    videos_per_second: float,
) -> dict[str, Any]:
    probabilities = np.stack([one.probabilities for one in finished])
    labels = np.array([videos[one.number]["label"] for one in finished])
    ranked = np.argsort(-probabilities, axis=1, kind="stable")
    steps = np.array([one.step for one in finished])
    costs, tokens = costs_until(adaptive, config)
    failures = [
        {"id": own["id"], "reason": own["failure"]}
        for _, own in sorted(videos.items())
        if own["failure"]
    ]
    top = [(ranked[:, :first] == labels[:, None]).any(axis=1).sum() for first in (1, TOP)]
    row = {
        "top1": float(top[0] / len(videos)),
        "top5": float(top[1] / len(videos)),
        "loss": float(np.mean(evaluate.cross_entropy(probabilities, labels))),
        "decoded": len(finished),
        "failed": len(failures),
        "answered": [float((steps == number).mean()) for number in range(len(adaptive.steps))],
        "average_gflops": float(np.mean(costs[steps])),
        "average_tokens": float(np.mean(tokens[steps])),
        "calibration": calibration.measure(probabilities, labels),
    }
    return {
        "task": name_of(adaptive),
        "dataset": {"videos": len(source), "fingerprint": source.fingerprint},
        "views": str(views_of(config)),
        name_of(adaptive): adaptive.to_json(),
        "budgets": {name_of(adaptive): row},
        "videos_per_second": videos_per_second,
        "failures": failures,
        "warning": evaluate.warn_of_failures(
            config, len(failures), len(videos), evaluate.first_of(failures)
        ),
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
            tokens.append(added * evaluate.tokens_kept(model, grid, budget))
        return np.cumsum(costs), np.cumsum(tokens)
    settings = [setting_of(step) for step in adaptive.steps]
    grid = Grid.square(*adaptive.grid)
    score = [0.0 if own.grid == grid else gflops(model, grid, 1).selection for own in settings]
    work = [views * gflops(model, own.grid, own.budget).all for own in settings]
    return (
        np.add(score, work),
        np.array([views * evaluate.tokens_kept(model, own.grid, own.budget) for own in settings]),
    )


def _predictions(
    name: str, videos: dict[int, dict[str, Any]], finished: Sequence[Finished]
) -> list[dict[str, Any]]:
    """As those of an evaluation, with the number of the "step" that answers, from 1."""
    answers = {one.number: one for one in finished}
    rows = []
    for number, own in sorted(videos.items()):
        about = {"id": own["id"], "label": own["label"]}
        if own["failure"]:
            rows.append(about | {"failure": own["failure"]})
            continue
        answer = answers[number]
        (top,) = evaluate.likeliest(answer.probabilities[None])
        rows.append(about | {"step": answer.step + 1, "predictions": {name: top}})
    return rows
