"""`fluxvit_jax.plan`: the best cell or cascade of a search within a limit on its cost.

A limit on the *average* cost of a video may be met by a cascade: easy videos stop early. Where a
single cell is as good, it is in the report as a cascade of one step. Accuracies are those that the
search measured; nothing is interpolated.
"""

import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

import numpy as np

from fluxvit_jax.adaptive import cascade as cascades
from fluxvit_jax.adaptive import motion
from fluxvit_jax.adaptive.cascade import Cascade, Step
from fluxvit_jax.adaptive.motion import MotionRule
from fluxvit_jax.errors import UserError
from fluxvit_jax.token_optimization import planner
from fluxvit_jax.token_optimization.planner import Limit, Plan, Report


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CascadePlan:
    """A cascade with its cost and accuracy; `str` describes it in a few sentences.

    name: of the cascade in the report.
    gflops, milliseconds: what each step costs a video that reaches it, all of the step's views; the
        sum is the worst case. milliseconds is None where no device was given.
    average_gflops, average_milliseconds: mean of the videos that the search chose on.
    reached: the share of those that reach each step.
    top1, top1_interval, split: as in `Plan`; chose: the accuracy on the videos that the search
        chose on; credited: what of it cascades are compared by, see `fitting.credit`.
    over: on the reporting split, {"cell", "top1", "interval"}: by how much it is more accurate than
        the best cell for as many GFLOPs; None where that is not known.
    """

    name: str
    cascade: Cascade
    gflops: tuple[float, ...]
    milliseconds: tuple[float, ...] | None
    average_gflops: float
    average_milliseconds: float | None
    reached: tuple[float, ...]
    top1: float
    top1_interval: tuple[float, float] | None
    split: str
    chose: float
    credited: float
    over: Mapping[str, Any] | None
    limits: tuple[Limit, ...]
    device: str | None
    why: str = ""

    def __str__(self) -> str:
        return self.why

    def cost(self, kind: str) -> float | None:
        """A cost by its name: an average, or "gflops" and "milliseconds" of the worst case."""
        found = getattr(self, kind)
        return sum(found) if isinstance(found, tuple) else found


@overload
def plan(
    report: str | os.PathLike | Mapping[str, Any],
    *,
    milliseconds: float | None = ...,
    gflops: float | None = ...,
    tokens: int | None = ...,
    device: str | None = ...,
    merging: bool = ...,
) -> Plan: ...
@overload
def plan(
    report: str | os.PathLike | Mapping[str, Any],
    *,
    milliseconds: float | None = ...,
    gflops: float | None = ...,
    average_milliseconds: float | None = ...,
    average_gflops: float | None = ...,
    device: str | None = ...,
    views: bool = ...,
) -> CascadePlan: ...
def plan(
    report: str | os.PathLike | Mapping[str, Any],
    *,
    milliseconds: float | None = None,
    gflops: float | None = None,
    tokens: int | None = None,
    average_milliseconds: float | None = None,
    average_gflops: float | None = None,
    device: str | None = None,
    merging: bool = True,
    views: bool = False,
) -> Plan | CascadePlan:
    """The most accurate cell, or cascade, that costs no more than a limit.

    With one of `milliseconds`, `gflops` and `tokens` alone it is a cell: see `planner.plan`. With
    `average_milliseconds` or `average_gflops` it is a cascade whose mean cost of a video is within
    the limit; `milliseconds` and `gflops` beside it limit the worst case. Accuracy is that on the
    videos that the search chose on, of a cascade less a standard error, since the best of thousands
    of thresholds is flattered; ties go to the cheaper.

    Args:
        report: a workdir that was searched, its `search` folder or report.json, or the report.
        device: name of the device with the timings, or a part of it; by default this machine's.
        merging: of cells; cascades have no cells that merge tokens.
        views: whether a cascade may look at several views of a video, as --mode=evaluate can; by
            default at one, as `run_cascade`, --mode=predict and servers do.

    Raises:
        UserError: there is no such report, device or limit, the report has no cascades, or nothing
            is within the limits; the line then names the cheapest.

    >>> best = fluxvit_jax.plan("runs/k400_small", average_milliseconds=8)
    >>> print(best)
    >>> answers = model.run_cascade("a.mp4", best.cascade)
    """
    averages = {
        "average_milliseconds": average_milliseconds,
        "average_gflops": average_gflops,
    }
    if all(value is None for value in averages.values()):
        return planner.plan(
            report,
            milliseconds=milliseconds,
            gflops=gflops,
            tokens=tokens,
            device=device,
            merging=merging,
        )
    if None not in averages.values() or tokens is not None:
        raise UserError(
            "an average limit is of milliseconds or of gflops; beside it only milliseconds and "
            "gflops may be given, as limits of the worst case"
        )
    worst = {"milliseconds": milliseconds, "gflops": gflops}
    given = {kind: value for kind, value in (averages | worst).items() if value is not None}
    return plan_cascade(report, given, device, views)


def plan_cascade(
    report: str | os.PathLike | Mapping[str, Any],
    given: Mapping[str, float],
    device: str | None = None,
    views: bool = False,
) -> CascadePlan:
    """As `plan`, with limits by the names of its arguments, that of an average first."""
    limits = [Limit(kind, value) for kind, value in given.items()]
    for limit in limits:
        planner.check_limit(limit)
    timed = any(limit.kind.endswith("milliseconds") for limit in limits)
    known, device = planner.with_timings(report, device, timed)
    return choose(known, limits, device, views)


def choose(report: Report, limits: Sequence[Limit], device: str | None, views: bool) -> CascadePlan:
    """As `plan`, of a report that was read, and by the timings of a device that it knows.

    limits: the first is one of an average.
    """
    costs = {own: _costs(own, limits) for own in plans(report, limits, device, views)}
    timed = {own: cost for own, cost in costs.items() if cost}
    if not timed:
        raise UserError(f"the report has no cells timed on {device}; let --mode=search finish")
    fitting = [
        own
        for own, cost in timed.items()
        if all(one <= limit.value for one, limit in zip(cost, limits, strict=True))
    ]
    if not fitting:
        cheapest = min(timed, key=lambda own: (timed[own][0], own.name))
        words = [_cost_words(limit.kind, limit.value) for limit in limits]
        takes = [
            _cost_words(limit.kind, cost)
            for limit, cost in zip(limits, timed[cheapest], strict=True)
        ]
        raise UserError(
            f"no cascade is within {' and '.join(words)}; the cheapest, "
            f"{cheapest.name}, takes {' and '.join(takes)}"
        )
    best = min(fitting, key=lambda own: (-own.credited, timed[own][0], own.average_gflops))
    return replace(best, why=" ".join([*_sentences(best), *report["notes"]]))


def _costs(own: CascadePlan, limits: Sequence[Limit]) -> list[float]:
    """The limited costs; empty where one is not known."""
    costs = [own.cost(limit.kind) for limit in limits]
    return [cost for cost in costs if cost is not None] if None not in costs else []


def plans(
    report: Report, limits: Sequence[Limit], device: str | None, several_views: bool
) -> list[CascadePlan]:
    """The cascades of a report.

    several_views: as `views` in `plan`; without them those that look at one view only.

    Raises UserError: the report has no cascades, or one is damaged.
    """
    if not report["cascades"]:
        raise UserError(
            "the report has no cascades: it is of an older search, or of one that is not finished "
            "or had search.cascade_steps=1; run --mode=search again, which evaluates the cells "
            "whose probabilities it lacks"
        )
    views = report.get("view_count", 1)
    found = [
        _of_cascade(report, name, own, views, limits, device)
        for name, own in report["cascades"].items()
        if several_views or max(step["views"] or views for step in own["steps"]) == 1
    ]
    if not found:
        raise UserError(
            f"the report's cascades all look at several of the {views} views of a video; search "
            "with --config.eval.clips=1 --config.eval.crops=1, or evaluate one with eval.cascade"
        )
    return found


def chosen(text: str, *reports: str | os.PathLike | None) -> tuple[Cascade, Report | None, str]:
    """The cascade that `eval.cascade` or a flag names, and the report that it is of, with its path.

    text: path of a .json file, which is of no report; name of a cascade or cell in a report; or
    limits of `plan`, such as "average_gflops=40,milliseconds=20". reports: the first that is there
    is taken.

    Raises UserError: there is no such cascade, file or report.
    """
    if text.endswith(".json"):
        return cascades.read(text), None, text
    file = planner.find_report(*reports)
    if file is None:
        raise UserError(
            f"a cascade ({text}) is of a search, and there is none; run --mode=search, name its "
            "report with --config.eval.plan=REPORT, or give a cascade in a .json file"
        )
    if "=" in text:
        best = plan_cascade(file, _limits_in(text), views=True)
        print(best, file=sys.stderr, flush=True)
        return best.cascade, planner.read_report(file), str(file)
    report = planner.read_report(file)
    return named(report, text, str(file)), report, str(file)


def chosen_rule(text: str, *reports: str | os.PathLike | None) -> tuple[MotionRule, Report, str]:
    """The rule of motion that `eval.cascade` names, the report that it is of, and its path.

    text: a name in the report, or limits as for `chosen`, of which those of the worst case are that
    of the dearest cell. Times are those of the cells alone.

    Raises UserError: there is no such rule or report.
    """
    file = planner.find_report(*reports)
    if file is None:
        raise UserError(f"eval.adaptive=motion ({text}): there is no search; run --mode=search")
    limits = _limits_in(text) if "=" in text else {}
    timed = any("milliseconds" in kind for kind in limits)
    report, device = planner.with_timings(file, None, timed)
    rules = report.get("motion") or {}
    if not rules or (not limits and text not in rules):
        raise UserError(
            f"{file}: has no rule of motion {text!r}; there are {', '.join(rules) or 'none'}"
        )
    if not limits:
        return motion.from_json(rules[text]), report, str(file)
    costs = {name: _rule_costs(report, own, device) for name, own in rules.items()}
    fitting = [
        name
        for name, own in costs.items()
        if all(own[kind] <= limit for kind, limit in limits.items())
    ]
    if not fitting:
        kind = next(iter(limits))
        cheapest = min(costs.values(), key=lambda own: own[kind])[kind]
        raise UserError(
            f"{file}: no rule of motion is within {text}; the cheapest takes "
            f"{_cost_words(kind, cheapest)}"
        )
    best = max(fitting, key=lambda name: rules[name]["choose"]["credited"])
    say = planner.amount("gflops", costs[best]["average_gflops"])
    split, accuracy = planner.accuracy_of(rules[best])
    words = planner.accuracy_words(split, accuracy["top1"], accuracy["top1_interval"])
    print(f"{best}: on average {say}; {words}.", file=sys.stderr, flush=True)
    return motion.from_json(rules[best]), report, str(file)


def _rule_costs(report: Report, own: Mapping[str, Any], device: str | None) -> dict[str, float]:
    """What limits are compared with, by their names; what was not timed is above every limit."""
    views, shares = report.get("view_count", 1), own["choose"]["shares"]
    times = [planner.cost_of(report, s["cell"], "milliseconds", device) for s in own["steps"]]
    known = [views * time if time is not None else math.inf for time in times]
    average = math.inf if None in times else float(np.dot(shares, known))
    work = [views * report["cells"][step["cell"]]["gflops"] for step in own["steps"]]
    return {
        "average_gflops": own["choose"]["average_gflops"],
        "gflops": max(work),
        "average_milliseconds": average,
        "milliseconds": max(known),
    }


def _limits_in(text: str) -> dict[str, float]:
    """The limits in "average_gflops=40,milliseconds=20"."""
    kinds = ("average_milliseconds", "average_gflops", "milliseconds", "gflops")
    limits: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        kind = name.strip()
        if kind in limits:
            raise UserError(f"{text}: {kind} is there twice")
        try:
            limits[kind] = float(value)
        except ValueError as error:
            raise UserError(f"{text}: {value!r} is no number") from error
        if kind not in kinds:
            raise UserError(f"{text}: {kind!r} is none of {', '.join(kinds)}")
        if not limits[kind] > 0:
            raise UserError(f"{text}: a limit is a number above 0")
    averages = [kind for kind in limits if kind.startswith("average_")]
    if len(averages) != 1:
        raise UserError(f"{text}: needs one of average_milliseconds and average_gflops")
    return {averages[0]: limits.pop(averages[0])} | limits


def named(report: Report, name: str, source: str) -> Cascade:
    """The cascade or cell of a name. Raises UserError: there is none. source: for the line."""
    if own := report["cascades"].get(name):
        return cascades.from_json(own, f"{source}: {name}")
    if (cell := report["cells"].get(name)) and cell["method"] != "merge":
        return Cascade((_step(name, cell),))
    known = ", ".join(report["cascades"]) or "none: run --mode=search"
    raise UserError(f"{source}: has no cascade {name!r}; there are {known}")


def _step(name: str, cell: Mapping[str, Any]) -> Step:
    size = {key: cell[key] for key in ("budget", "frames", "resolution", "head")}
    return Step(**size, cell=name)


def _of_cascade(
    report: Report,
    name: str,
    own: Mapping[str, Any],
    views: int,
    limits: Sequence[Limit],
    device: str | None,
) -> CascadePlan:
    cascade = cascades.from_json(own, f"the report: {name}")
    split, accuracy = planner.accuracy_of(own)
    reached = own["choose"]["reached"]
    times = _step_milliseconds(report, cascade, views, device)
    return CascadePlan(
        name=name,
        cascade=cascade,
        gflops=tuple(own["gflops"]),
        milliseconds=times,
        average_gflops=own["choose"]["average_gflops"],
        average_milliseconds=None if times is None else float(np.dot(reached, times)),
        reached=tuple(reached),
        top1=accuracy["top1"],
        top1_interval=accuracy.get("top1_interval"),
        split=split,
        chose=own["choose"]["top1"],
        credited=own["choose"]["credited"],
        over=own["over"],
        limits=tuple(limits),
        device=device,
    )


def _step_milliseconds(
    report: Report, cascade: Cascade, views: int, device: str | None
) -> tuple[float, ...] | None:
    """What each step takes, all of its views but those that the step before has looked at."""
    times = [planner.cost_of(report, s.cell, "milliseconds", device) for s in cascade.steps]
    if None in times:
        return None
    added = cascade.added_views(views)
    return tuple(time * n for time, n in zip(times, added, strict=True) if time is not None)


def _sentences(p: CascadePlan) -> list[str]:
    average = [planner.amount("gflops", p.average_gflops)]
    worst = [planner.amount("gflops", sum(p.gflops))]
    if p.milliseconds is not None and p.average_milliseconds is not None:
        average.insert(0, planner.amount("milliseconds", p.average_milliseconds, p.device))
        worst.insert(0, planner.amount("milliseconds", sum(p.milliseconds)))
    accuracy = planner.accuracy_words(p.split, p.top1, p.top1_interval)
    if p.split != "choose":
        accuracy += f"; {p.chose:.1%} {planner.CHOSE}"
    words = [
        f"{p.name}: {p.cascade}.",
        f"On average {', '.join(average)}, at worst {', '.join(worst)}; {accuracy}.",
    ]
    if len(p.reached) > 1:
        shares = ", ".join(f"{share:.0%}" for share in p.reached[1:])
        words.append(f"{shares} of the videos go on.")
    if p.over and len(p.reached) > 1:
        gain = f"{100 * p.over['top1']:+.1f} points{planner.spread(p.over['interval'])}"
        words.append(f"Against {p.over['cell']}, the best cell for as many GFLOPs: {gain}.")
    return words


def _cost_words(kind: str, value: float) -> str:
    """Such as "8 ms on average", "20 ms at worst"."""
    average = kind.startswith("average_")
    words = planner.amount(kind.removeprefix("average_"), value)
    return f"{words} on average" if average else f"{words} at worst"
