"""Which measured cell to run within a limit: `fluxvit_jax.plan`.

A cell is one way to run a network: a method ("select", "plain" or "merge"), a token budget, a grid
and a head. `--mode=search` measures many of them and leaves `search/report.json` in the workdir.
Planning looks up, and interpolates nothing. A device that the report has no timings of is measured
first, once: that needs the weights, all else here the standard library and NumPy only, since a
server imports this module as well.
"""

import hashlib
import json
import math
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fluxvit_jax import storage
from fluxvit_jax.budgets import Grid
from fluxvit_jax.convert import names
from fluxvit_jax.errors import UserError

if TYPE_CHECKING:
    from fluxvit_jax import costs
    from fluxvit_jax.pretrained import PretrainedModel

FOLDER = "search"  # in a workdir
REPORT = "report.json"
VERSION = 1  # of the report's layout
UNITS = {"milliseconds": "ms", "gflops": "GFLOPs", "tokens": "tokens"}
METHODS = ("select", "plain", "merge")
NUMBERS = ("budget", "tokens", "frames", "resolution", "head", "gflops")  # of every cell

Report = dict[str, Any]
Cells = Mapping[str, Mapping[str, Any]]


class Limit(NamedTuple):
    """The most that a clip may cost. kind: one of `UNITS`."""

    kind: str
    value: float


class Plan(NamedTuple):
    """A cell and what is known of it; `str` of it says so in a sentence or two.

    cell: its name in the report; budget: what the network is asked for, of which `tokens` are kept.
    milliseconds: one clip alone on `device`, median; None where no device was asked about.
    gflops: 1e9 multiply-accumulates of a clip, those of all tokens of the grid counted.
    top1, top1_interval: share of the videos that the search chose on, and its 95 % interval.
    behind, behind_interval: by how much the most accurate cell of the report is better, likewise
        in shares. Intervals are None where the report has none.
    """

    cell: str
    method: str
    budget: int
    tokens: int
    frames: int
    resolution: int
    head: int
    milliseconds: float | None
    gflops: float
    top1: float
    top1_interval: tuple[float, float] | None
    behind: float
    behind_interval: tuple[float, float] | None
    limit: Limit
    device: str | None
    why: str

    def __str__(self) -> str:
        return self.why


def plan(
    report: str | os.PathLike | Mapping[str, Any],
    *,
    milliseconds: float | None = None,
    gflops: float | None = None,
    tokens: int | None = None,
    device: str | None = None,
    merging: bool = True,
) -> Plan:
    """The most accurate cell that costs no more than a limit. Give one of the three limits.

    By top-1 on the videos that the search chose on; of equal cells the one that is cheaper in what
    is limited, then in gflops, then the first by name. A cell that the search stopped early, so
    that it was measured on fewer videos, is planned only where no other fits: it was stopped for
    being worse.

    Args:
        report: a workdir that was searched, its `search` folder or report.json, or the report.
        milliseconds: of one clip alone, median, the network only; on a device that the report has
            no timings of, the cells worth it are measured first, which takes a minute.
        gflops: 1e9 multiply-accumulates, those of all tokens of the grid counted.
        tokens: kept.
        device: whose timings: the name, or a part of it that no other in the report has; by
            default this machine's. With another limit, timings are shown if it is given.
        merging: False leaves out cells that merge tokens.

    Raises:
        UserError: there is no such report, device or limit, or no cell fits; the line then names
            the cheapest.

    >>> best = fluxvit_jax.plan("runs/k400_small", milliseconds=8)
    >>> print(best)
    >>> out = model(clip, tokens=best.budget, head=best.head)  # best.frames of best.resolution px
    """
    limit = _limit(milliseconds=milliseconds, gflops=gflops, tokens=tokens)
    known = _check(report, "the report") if isinstance(report, Mapping) else read_report(report)
    if device is not None:
        device = _known_device(known, device)
    elif limit.kind == "milliseconds":
        from fluxvit_jax import devices

        device = devices.device_name()
        if device not in known["devices"]:
            if isinstance(report, Mapping):
                raise UserError(_unmeasured("the report", known, device))
            known = measure_device(report)
    return _choose(known, limit, device, merging)


def _limit(**asked: float | None) -> Limit:
    given = [Limit(kind, value) for kind, value in asked.items() if value is not None]
    if len(given) != 1:
        raise UserError(f"a plan needs one limit, of {', '.join(UNITS)}; {len(given)} are given")
    if not (math.isfinite(given[0].value) and given[0].value > 0):
        raise UserError(f"{given[0].kind}={given[0].value}: a limit is a number above 0")
    return given[0]


def _choose(report: Report, limit: Limit, device: str | None, merging: bool) -> Plan:
    costs = {
        name: cost
        for name, cell in _measured(report["cells"], merging).items()
        if (cost := _cost(report, name, limit.kind, device)) is not None
    }
    if not costs:
        where = f" timed on {device}" if limit.kind == "milliseconds" else ""
        raise UserError(f"the report has no cells{where}; let --mode=search finish")
    cells = {name: report["cells"][name] for name in costs}
    whole, stopped = _by_certainty(cells)
    name = best_within(whole, costs, limit.value) or best_within(stopped, costs, limit.value)
    if name is None:
        cheapest = min(costs, key=lambda name: (costs[name], name))
        raise UserError(
            f"no cell is within {_amount(limit.kind, limit.value, device)}; the cheapest, "
            f"{cheapest}, takes {_amount(limit.kind, costs[cheapest])}"
        )
    return _describe(report, name, costs, limit, device)


def best_within(cells: Cells, costs: Mapping[str, float], limit: float) -> str | None:
    """The cell with the highest top-1 that costs `limit` at most; None if all cost more.

    cells: {name: {"top1" or "choose": {"top1"}, "gflops"}}. Of equal ones the cheapest, then the
    one of fewest gflops, then the first by name.
    """
    fitting = [name for name in cells if costs[name] <= limit]
    return min(fitting, key=lambda name: _rank(cells, costs, name), default=None)


def _rank(cells: Cells, costs: Mapping[str, float], name: str) -> tuple:
    return -_top1(cells[name]), costs[name], cells[name]["gflops"], name


def _top1(cell: Mapping[str, Any]) -> float:
    return cell.get("choose", cell)["top1"]


def _measured(cells: Cells, merging: bool = True) -> dict[str, Mapping[str, Any]]:
    """Those whose accuracy is known: in an unfinished search some are not yet."""
    return {
        name: cell
        for name, cell in cells.items()
        if cell.get("choose") and (merging or cell["method"] != "merge")
    }


def _by_certainty(cells: Cells) -> tuple[Cells, Cells]:
    """Cells measured on as many videos as any, and those that were stopped earlier."""
    videos = {name: cell["choose"].get("videos", 0) for name, cell in cells.items()}
    most = max(videos.values(), default=0)
    whole = {name: cell for name, cell in cells.items() if videos[name] == most}
    return whole, {name: cell for name, cell in cells.items() if name not in whole}


def _cost(report: Report, name: str, kind: str, device: str | None) -> float | None:
    """What a cell costs; None where that was not measured."""
    if kind != "milliseconds":
        return report["cells"][name][kind]
    return report["devices"].get(device, {}).get("cells", {}).get(name, {}).get("milliseconds")


def _describe(
    report: Report, name: str, costs: Mapping[str, float], limit: Limit, device: str | None
) -> Plan:
    cell = report["cells"][name]
    whole, _ = _by_certainty(_measured(report["cells"]))
    best = best_within(whole, {name: 0.0 for name in whole}, 0.0)
    behind = cell.get("behind") or {"top1": _top1(whole[best]) - _top1(cell)}
    planned = Plan(
        cell=name,
        **{key: cell[key] for key in ("method", *NUMBERS)},
        milliseconds=_cost(report, name, "milliseconds", device),
        top1=_top1(cell),
        top1_interval=_interval(cell["choose"].get("top1_interval")),
        behind=behind["top1"],
        behind_interval=_interval(behind.get("interval")),
        limit=limit,
        device=device,
        why="",
    )
    sentences = [_what(planned, best), *_next(whole, costs, planned)]
    if name not in whole:
        videos = cell["choose"].get("videos", "few")
        sentences.append(f"The search stopped it early: it was measured on {videos} videos only.")
    return planned._replace(why=" ".join(sentences))


def _interval(pair: Iterable[float] | None) -> tuple[float, float] | None:
    return None if pair is None else tuple(pair)


def _what(planned: Plan, best: str) -> str:
    """The sentence about the cell, its cost and its accuracy."""
    p = planned
    patches = Grid.square(p.frames, p.resolution).tokens
    done = {"select": "keeps", "plain": "runs", "merge": "merges down to"}[p.method]
    costs = [_amount("gflops", p.gflops)]
    if p.milliseconds is not None:
        costs.insert(0, _amount("milliseconds", p.milliseconds, p.device))
    standing = "no cell is more accurate"
    if p.behind > 0:
        standing = (
            f"{100 * p.behind:.1f} points{_spread(p.behind_interval)} behind {best}, the best"
        )
    return (
        f"{p.cell} {done} {p.tokens} of {patches} tokens ({p.frames} frames of {p.resolution} px, "
        f"head {p.head}): {', '.join(costs)}, within {_amount(*p.limit)}; top-1 {p.top1:.1%}"
        f"{_spread(p.top1_interval)}, {standing}."
    )


def _next(whole: Cells, costs: Mapping[str, float], planned: Plan) -> list[str]:
    """A sentence about the cheapest cell that is more accurate, if any: it did not fit."""
    better = [name for name in whole if name in costs and _top1(whole[name]) > planned.top1]
    if not better:
        return []
    name = min(better, key=lambda name: (costs[name], _rank(whole, costs, name)))
    return [
        f"The next that is more accurate, {name} with {_top1(whole[name]):.1%}, takes "
        f"{_amount(planned.limit.kind, costs[name])}."
    ]


def _spread(interval: tuple[float, float] | None) -> str:
    """An interval of shares in percent."""
    return f" ({100 * interval[0]:.1f} to {100 * interval[1]:.1f})" if interval else ""


def _amount(kind: str, value: float, device: str | None = None) -> str:
    """Such as "8 ms on NVIDIA H100", "32.4 GFLOPs", "1024 tokens"."""
    number = f"{value:.0f}" if kind == "tokens" else f"{value:.4g}"
    where = f" on {device}" if device and kind == "milliseconds" else ""
    return f"{number} {UNITS[kind]}{where}"


def _known_device(report: Report, wanted: str) -> str:
    """The name of a device of the report, of which `wanted` may be a part."""
    devices = report["devices"]
    found = [name for name in devices if wanted.lower() in name.lower()]
    if wanted in devices:
        return wanted
    if len(found) != 1:
        what = "is part of several" if found else "is none"
        raise UserError(f"device {wanted!r} {what} of those that were measured: {_list(devices)}")
    return found[0]


def _list(devices: Iterable[str]) -> str:
    return ", ".join(devices) or "no device"


# ---------------------------------------------------------------------------------------------
# The report


def find_report(*paths: str | os.PathLike | None) -> Path | None:
    """The report.json that the first of `paths` is or holds that has one.

    A path may be the file, its folder, a workdir with `search/report.json`, or a checkpoint of one.
    """
    for text in filter(None, paths):
        path = storage.path_of(text) if storage.is_remote(text) else Path(text)
        if path.is_file() and path.suffix == ".json":
            return path
        folders = [path, path / FOLDER]
        if path.name.isdigit():
            folders.append(path.parent.parent / FOLDER)
        if found := [folder / REPORT for folder in folders if (folder / REPORT).is_file()]:
            return found[0]
    return None


def read_report(path: str | os.PathLike) -> Report:
    """What a search has found, with empty "chosen" and "devices" where it has none yet.

    Args:
        path: as for `find_report`.

    Raises:
        UserError: there is none, or it is damaged or of another version.
    """
    found = find_report(path)
    if found is None:
        raise UserError(f"{path}: no report of a search is there; make one with --mode=search")
    try:
        report = json.loads(found.read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{found}: cannot be read as a report: {error}; run --mode=search again"
        ) from error
    return _check(report, str(found))


def _check(report: Any, source: str) -> Report:
    """The report, its optional parts filled in; UserError if it is none."""
    if not isinstance(report, Mapping) or not isinstance(report.get("cells"), Mapping):
        raise UserError(f"{source}: is no report of a search; name one that --mode=search wrote")
    if report.get("version") != VERSION:
        raise UserError(
            f"{source}: is of version {report.get('version')}, and this reads version {VERSION}; "
            "run --mode=search again"
        )
    for name, cell in report["cells"].items():
        if not _is_cell(cell):
            raise UserError(f"{source}: its cell {name} is damaged; run --mode=search again")
    default = {"chosen": {}, "devices": {}, "dtype": "float32"}
    return {**report, **{name: report.get(name) or value for name, value in default.items()}}


def _is_cell(cell: Any) -> bool:
    if not isinstance(cell, Mapping) or cell.get("method") not in METHODS:
        return False
    choose = cell.get("choose") or {"top1": 0}
    numbers = [cell.get(key) for key in NUMBERS]
    numbers.append(choose.get("top1") if isinstance(choose, Mapping) else None)
    return all(isinstance(number, int | float) for number in numbers)


def chosen_cells(report: Report | None) -> list[dict[str, Any]]:
    """The cell of selection that a search chose for each budget, as far as it did."""
    chosen = report["chosen"].values() if report else ()
    return [report["cells"][own["select"]] for own in chosen if own.get("select")]


def find_cell(report: Report, budget: int, frames: int, resolution: int, head: int) -> str | None:
    """The cell, measured to the end, that a network runs when asked so without merging tokens."""
    asked = {"budget": budget, "frames": frames, "resolution": resolution, "head": head}
    whole, _ = _by_certainty(_measured(report["cells"]))
    return next(
        (
            name
            for name, cell in whole.items()
            if cell["method"] != "merge" and all(cell[key] == asked[key] for key in asked)
        ),
        None,
    )


def fingerprint(params: Mapping[str, Any]) -> str:
    """SHA-256 of a nested dict of parameters: the paths, shapes and values as float32.

    NumPy and JAX arrays of equal values have the same one, whatever their dtype.
    """
    digest = hashlib.sha256()
    for path, array in sorted(names.flatten(params), key=lambda item: item[0]):
        array = np.asarray(array).astype("<f4")
        digest.update(f"{path} {list(array.shape)}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def check_weights(report: Report, params: Mapping[str, Any], source: str | os.PathLike) -> None:
    """UserError unless the report is about these weights. source: of the report, for the line."""
    if report.get("fingerprint") != fingerprint(params):
        raise UserError(
            f"{source}: its report is of other weights ({report.get('checkpoint', 'unknown')}); "
            "name those with --checkpoint, or run --mode=search again"
        )


# ---------------------------------------------------------------------------------------------
# Timings of a device that the report does not know


def measure_device(path: str | os.PathLike, model: "PretrainedModel | None" = None) -> Report:
    """Times the cells that are worth it on this machine's device, and keeps that in the report.

    Those are the cells that no other beats in both top-1 and gflops, and among the cells that do
    not merge tokens likewise. They run one clip at a time, as `as_searched` has them. The
    report is written anew at the end, each of its files whole or not at all.

    Args:
        path: as for `find_report`.
        model: the network of the report; by default it is read from the report's workdir.

    Returns:
        the report with the new timings under "devices".

    Raises:
        UserError: there is no report, or no network or another one than the report's.
    """
    from tqdm import tqdm

    from fluxvit_jax import costs, devices

    report, file = read_report(path), find_report(path)
    model = model or _network_of(file, report)
    check_weights(report, model.params, file)
    model = as_searched(model, report)
    device, table = devices.device_name(), {}
    cells = _worth_measuring(report["cells"])
    passes = [_pass(model, report["cells"][name]) for name in cells]
    # One clip at a time is what plans are about; a batch would double the time.
    found = zip(cells, costs.measure(model.params, passes, batch=1), strict=True)
    for name, cost in tqdm(found, f"measuring {device}", len(cells), unit="cell", disable=None):
        table |= {same: cost._asdict() for same in _alike(report["cells"], name)}
    return _keep(file, device, {"batch": 1, "cells": table})


def _worth_measuring(cells: Cells) -> list[str]:
    """The cheapest first."""
    worth = set()
    for merging in (True, False):
        whole, _ = _by_certainty(_measured(cells, merging))
        worth.update(_front(whole))
    return sorted(worth, key=lambda name: (cells[name]["gflops"], name))


def _front(cells: Cells) -> list[str]:
    """The cells that are more accurate than every other of as few gflops."""
    front, most = [], -math.inf
    for name in sorted(cells, key=lambda n: (cells[n]["gflops"], -_top1(cells[n]), n)):
        if _top1(cells[name]) > most:
            front.append(name)
            most = _top1(cells[name])
    return front


def _alike(cells: Cells, name: str) -> list[str]:
    """The cells that run the same program, whatever head answers: they take the same time."""

    def program(cell: Mapping[str, Any]) -> list:
        size = [cell[key] for key in ("budget", "frames", "resolution")]
        return [cell["method"] == "merge", *size]

    return [other for other in cells if program(cells[other]) == program(cells[name])]


def _pass(model: "PretrainedModel", cell: Mapping[str, Any]) -> "costs.Pass":
    """How a cell is run."""
    from fluxvit_jax import costs
    from fluxvit_jax.cells import Cell

    grid = Grid.square(cell["frames"], cell["resolution"])
    one = Cell(cell["method"], cell["budget"], grid, cell["head"])
    return costs.Pass(one.network(model.config.model), grid, one.budget, one.head)


def as_searched(model: "PretrainedModel", report: Report) -> "PretrainedModel":
    """The network in the dtype that its search ran it in."""
    from fluxvit_jax.pretrained import PretrainedModel

    network = replace(model.config.model, dtype=report["dtype"])
    return PretrainedModel(model.params, replace(model.config, model=network))


def _unmeasured(source: str | os.PathLike, report: Report, device: str) -> str:
    return (
        f"{source}: has timings of {_list(report['devices'])}, not of {device}; name one of those "
        "as device, or, to measure this one, plan with the workdir that holds the weights as well"
    )


def _network_of(file: Path, report: Report) -> "PretrainedModel":
    """The network in the workdir of a report."""
    from fluxvit_jax import devices
    from fluxvit_jax.pretrained import from_pretrained

    workdir = file.parent.parent
    here = any((workdir / name).exists() for name in ("checkpoints", "model.safetensors"))
    if file.parent.name != FOLDER or not here:
        raise UserError(_unmeasured(file, report, devices.device_name()))
    return from_pretrained(workdir)


def _keep(file: Path, device: str, table: Mapping[str, Any]) -> Report:
    """The report as it is now, with a device's timings, which are written into it."""
    from fluxvit_jax.report import write

    report = read_report(file)  # anew: a search may have gone on meanwhile
    report["devices"] = {**report["devices"], device: table}
    try:
        write(report, file.parent)
    except UserError as error:
        print(f"{error}; the timings may be lost", file=sys.stderr)
    return report
