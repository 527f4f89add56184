"""`fluxvit_jax.plan`: the best measured cell of a search within a cost limit.

A cell is one way to run a network: a method ("select", "plain" or "merge"), a token budget, a grid
and a head. `--mode=search` measures many of them and leaves `search/report.json` in the workdir.
Planning only looks cells up and never interpolates. A device without timings in the report is
measured once; that needs the weights. The rest of this module imports only the standard library
and NumPy, since a server imports it as well, so JAX and what uses it are imported in functions.
"""

import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxvit_jax.convert import official_names
from fluxvit_jax.distributed import storage
from fluxvit_jax.errors import UserError
from fluxvit_jax.grids import Grid

if TYPE_CHECKING:
    from fluxvit_jax.deploy.pretrained import PretrainedModel
    from fluxvit_jax.token_optimization import latency

FOLDER = "search"  # in a workdir
REPORT = "report.json"
VERSION = 1  # of the report's layout
UNITS = {"milliseconds": "ms", "gflops": "GFLOPs", "tokens": "tokens"}
METHODS = ("select", "plain", "merge")
NUMBERS = ("budget", "tokens", "frames", "resolution", "head", "gflops")  # of every cell
CHOSE = "on the videos that chose it"  # of an accuracy that is biased upwards by the choice

Report = dict[str, Any]
Cells = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Limit:
    """The highest cost of a clip. kind: one of `UNITS`."""

    kind: str
    value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A cell with its cost and accuracy; `str` describes it in a few sentences.

    These end with the report's notes, which readers of its accuracies must know.

    cell: its name in the report; budget: the one to run the network with; `tokens` of it are kept.
    milliseconds: one clip alone on `device`, median; None where no device was given.
    gflops: 1e9 multiply-accumulates of a clip, including those of tokens that are not kept.
    top1, top1_interval: share of the videos of a split, and its 95 % interval.
    split: "report" where the cell was evaluated on the reporting split; else "choose": then `top1`
        is of the videos that the search chose on, and biased upwards by the choice.
    behind, behind_interval: by how much the most accurate cell of the report is better on the
        videos that the search chose on, likewise in shares. Intervals are None where the report
        has none.
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
    split: str
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

    Accuracy is that on the videos that the search chose on; ties go to the cell that is cheaper by
    the limited cost, then to fewer gflops, then to the first by name. A cell that the search
    stopped early, so that it was measured on fewer videos, is planned only where no other fits: it
    was stopped for being worse.

    Args:
        report: a workdir that was searched, its `search` folder or report.json, or the report.
        milliseconds: of one clip alone, median, the network only; on a device that the report has
            no timings of, the cells worth measuring are measured first, which takes a minute.
        gflops: 1e9 multiply-accumulates, including those of tokens that are not kept.
        tokens: number of kept tokens.
        device: name of the device with the timings, or a part of it that is unique in the report;
            by default this machine's. With another limit, timings are shown if it is given.
        merging: False leaves out cells that merge tokens.

    Raises:
        UserError: there is no such report, device or limit, or no cell fits; the line then names
            the cheapest.

    >>> best = fluxvit_jax.plan("runs/k400_small", milliseconds=8)
    >>> print(best)
    >>> out = model(clip, tokens=best.budget, head=best.head)  # best.frames of best.resolution px
    """
    limit = _limit(milliseconds=milliseconds, gflops=gflops, tokens=tokens)
    known, device = with_timings(report, device, limit.kind == "milliseconds")
    return _choose(known, limit, device, merging)


def with_timings(
    report: str | os.PathLike | Mapping[str, Any], device: str | None, timed: bool
) -> tuple[Report, str | None]:
    """The report, and the device whose timings are meant: if `timed`, by default this machine's.

    Arguments as in `plan`. A device that the report does not know is measured.

    Raises UserError: there is no such report or device.
    """
    known = _check(report, "the report") if isinstance(report, Mapping) else read_report(report)
    if device is not None:
        return known, _known_device(known, device)
    if not timed:
        return known, None
    from fluxvit_jax.distributed import devices

    device = devices.device_name()
    if device not in known["devices"]:
        if isinstance(report, Mapping):
            raise UserError(_unmeasured("the report", known, device))
        known = measure_device(report)
    return known, device


def _limit(**limits: float | None) -> Limit:
    given = [Limit(kind, value) for kind, value in limits.items() if value is not None]
    if len(given) != 1:
        raise UserError(f"a plan needs one limit, of {', '.join(UNITS)}; {len(given)} are given")
    check_limit(given[0])
    return given[0]


def check_limit(limit: Limit) -> None:
    """Raises UserError unless it is a number above 0."""
    if not (math.isfinite(limit.value) and limit.value > 0):
        raise UserError(f"{limit.kind}={limit.value}: a limit is a number above 0")


def _choose(report: Report, limit: Limit, device: str | None, merging: bool) -> Plan:
    costs = {
        name: cost
        for name, cell in measured(report["cells"], merging).items()
        if (cost := cost_of(report, name, limit.kind, device)) is not None
    }
    if not costs:
        where = f" timed on {device}" if limit.kind == "milliseconds" else ""
        raise UserError(f"the report has no cells{where}; let --mode=search finish")
    cells = {name: report["cells"][name] for name in costs}
    complete, stopped = by_certainty(cells)
    name = best_within(complete, costs, limit.value) or best_within(stopped, costs, limit.value)
    if name is None:
        cheapest = min(costs, key=lambda name: (costs[name], name))
        raise UserError(
            f"no cell is within {amount(limit.kind, limit.value, device)}; the cheapest, "
            f"{cheapest}, takes {amount(limit.kind, costs[cheapest])}"
        )
    return _describe(report, name, costs, limit, device)


def best_within(cells: Cells, costs: Mapping[str, float], limit: float) -> str | None:
    """The cell with the highest top-1 that costs `limit` at most; None if all cost more.

    cells: {name: {"top1" or "choose": {"top1"}, "gflops"}}. Ties go to the lowest cost, then to the
    fewest gflops, then to the first by name.
    """
    fitting = [name for name in cells if costs[name] <= limit]
    return min(fitting, key=lambda name: _rank(cells, costs, name), default=None)


def _rank(cells: Cells, costs: Mapping[str, float], name: str) -> tuple[float, float, float, str]:
    return -_top1(cells[name]), costs[name], cells[name]["gflops"], name


def _top1(cell: Mapping[str, Any]) -> float:
    """The accuracy that cells are compared by; `accuracy_of` is the one that is shown."""
    return cell.get("choose", cell)["top1"]


def accuracy_of(cell: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """The name of the split whose accuracy is shown, and that accuracy.

    The reporting split, "report", where it has been evaluated, else the choosing split, "choose".
    """
    split = "report" if cell.get("report") else "choose"
    return split, cell[split]


def accuracy_words(split: str, top1: float, interval: Sequence[float] | None = None) -> str:
    """An accuracy and its split in words."""
    words = "on the reporting split" if split == "report" else CHOSE
    return f"top-1 {top1:.1%}{spread(interval)} {words}"


def measured(cells: Cells, merging: bool = True) -> dict[str, Mapping[str, Any]]:
    """The cells with a known accuracy: an unfinished search has others too."""
    return {
        name: cell
        for name, cell in cells.items()
        if cell.get("choose") and (merging or cell["method"] != "merge")
    }


def by_certainty(cells: Cells) -> tuple[Cells, Cells]:
    """The cells measured on all videos, and those that were stopped earlier."""
    videos = {name: cell["choose"].get("videos", 0) for name, cell in cells.items()}
    most = max(videos.values(), default=0)
    complete = {name: cell for name, cell in cells.items() if videos[name] == most}
    return complete, {name: cell for name, cell in cells.items() if name not in complete}


def cost_of(report: Report, name: str, kind: str, device: str | None) -> float | None:
    """The cost of a cell; None where it was not measured."""
    if kind != "milliseconds":
        return report["cells"][name][kind]
    return report["devices"].get(device, {}).get("cells", {}).get(name, {}).get("milliseconds")


def _describe(
    report: Report, name: str, costs: Mapping[str, float], limit: Limit, device: str | None
) -> Plan:
    cell = report["cells"][name]
    complete, _ = by_certainty(measured(report["cells"]))
    best = best_within(complete, dict.fromkeys(complete, 0.0), 0.0)
    assert best is not None  # some cell is complete where any is measured
    behind = cell.get("behind") or {"top1": _top1(complete[best]) - _top1(cell)}
    split, accuracy = accuracy_of(cell)
    planned = Plan(
        cell=name,
        method=cell["method"],
        budget=cell["budget"],
        tokens=cell["tokens"],
        frames=cell["frames"],
        resolution=cell["resolution"],
        head=cell["head"],
        gflops=cell["gflops"],
        milliseconds=cost_of(report, name, "milliseconds", device),
        top1=accuracy["top1"],
        top1_interval=_interval(accuracy.get("top1_interval")),
        split=split,
        behind=behind["top1"],
        behind_interval=_interval(behind.get("interval")),
        limit=limit,
        device=device,
        why="",
    )
    sentences = [_cell_sentence(planned, best), *_next_sentence(complete, costs, cell, limit)]
    if name not in complete:
        videos = cell["choose"].get("videos", "few")
        sentences.append(f"The search stopped it early: it was measured on {videos} videos only.")
    sentences += report["notes"]
    return replace(planned, why=" ".join(sentences))


def _interval(pair: Sequence[float] | None) -> tuple[float, float] | None:
    if pair is None:
        return None
    low, high = pair
    return low, high


def _cell_sentence(p: Plan, best: str) -> str:
    """The sentence about the cell, its cost and its accuracy."""
    patches = Grid.square(p.frames, p.resolution).tokens
    verb = {"select": "keeps", "plain": "runs", "merge": "merges down to"}[p.method]
    costs = [amount("gflops", p.gflops)]
    if p.milliseconds is not None:
        costs.insert(0, amount("milliseconds", p.milliseconds, p.device))
    accuracy = accuracy_words(p.split, p.top1, p.top1_interval)
    if p.split != "choose":
        accuracy += f"; {CHOSE}"  # where cells are compared
    standing = "no cell is more accurate"
    if p.behind > 0:
        standing = f"{100 * p.behind:.1f} points{spread(p.behind_interval)} behind {best}, the best"
    return (
        f"{p.cell} {verb} {p.tokens} of {patches} tokens ({p.frames} frames of {p.resolution} px, "
        f"head {p.head}): {', '.join(costs)}, within {amount(p.limit.kind, p.limit.value)}; "
        f"{accuracy}, {standing}."
    )


def _next_sentence(
    complete: Cells, costs: Mapping[str, float], planned: Mapping[str, Any], limit: Limit
) -> list[str]:
    """A sentence about the cheapest more accurate cell, if any: it was above the limit."""
    better = [name for name in complete if name in costs and _top1(complete[name]) > _top1(planned)]
    if not better:
        return []
    name = min(better, key=lambda name: (costs[name], _rank(complete, costs, name)))
    split, accuracy = accuracy_of(complete[name])
    return [
        f"The next that is more accurate there, {name}, takes "
        f"{amount(limit.kind, costs[name])} and has {accuracy_words(split, accuracy['top1'])}."
    ]


def spread(interval: Sequence[float] | None) -> str:
    """An interval of shares in percent."""
    return f" ({100 * interval[0]:.1f} to {100 * interval[1]:.1f})" if interval else ""


def amount(kind: str, value: float, device: str | None = None) -> str:
    """Such as "8 ms on NVIDIA H100", "32.4 GFLOPs", "1024 tokens"."""
    number = f"{value:.0f}" if kind == "tokens" else f"{value:.4g}"
    where = f" on {device}" if device and kind == "milliseconds" else ""
    return f"{number} {UNITS[kind]}{where}"


def _known_device(report: Report, device: str) -> str:
    """The full name of a device of the report; `device` may be a part of it."""
    devices = report["devices"]
    if device in devices:
        return device
    matching = [name for name in devices if device.lower() in name.lower()]
    if len(matching) != 1:
        problem = "is part of several" if matching else "is none"
        raise UserError(
            f"device {device!r} {problem} of those that were measured: {_list(devices)}"
        )
    return matching[0]


def _list(devices: Iterable[str]) -> str:
    return ", ".join(devices) or "no device"


# ---------------------------------------------------------------------------------------------
# The report


def find_report(*paths: str | os.PathLike | None) -> Path | None:
    """The report.json of the first of `paths` that has one, else None.

    A path may be the file, its folder, a workdir with `search/report.json`, or a checkpoint of one.
    """
    for text in paths:
        if not text:
            continue
        path = storage.path_of(text) if storage.is_remote(text) else Path(text)
        if path.is_file() and path.suffix == ".json":
            return path
        folders = [path, path / FOLDER]
        if path.name.isdigit():
            folders.append(path.parent.parent / FOLDER)
        for file in (folder / REPORT for folder in folders):
            if file.is_file():
                return file
    return None


def read_report(path: str | os.PathLike) -> Report:
    """The report of a search, with empty "chosen", "devices" and "cascades" where it has none.

    Args:
        path: as for `find_report`.

    Raises:
        UserError: there is none, or it is damaged or of another version.
    """
    return _read_file(_existing_report(path))


def _existing_report(path: str | os.PathLike) -> Path:
    file = find_report(path)
    if file is None:
        raise UserError(f"{path}: no report of a search is there; make one with --mode=search")
    return file


def _read_file(file: Path) -> Report:
    try:
        report = storage.parse_json(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{file}: cannot be read as a report: {error}; run --mode=search again"
        ) from error
    return _check(report, str(file))


def _check(report: Any, source: str) -> Report:
    """The report with its optional parts filled in. Raises UserError if it is not a report."""
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
    default = {"chosen": {}, "devices": {}, "dtype": "float32", "notes": [], "cascades": {}}
    return {**report, **{name: report.get(name) or value for name, value in default.items()}}


def _is_cell(cell: Any) -> bool:
    if not isinstance(cell, Mapping) or cell.get("method") not in METHODS:
        return False
    splits = [cell.get(split) or {"top1": 0} for split in ("choose", "report")]
    numbers = [cell.get(key) for key in NUMBERS]
    numbers += [split.get("top1") if isinstance(split, Mapping) else None for split in splits]
    return all(isinstance(number, int | float) for number in numbers)


def chosen_cells(report: Report | None) -> list[dict[str, Any]]:
    """The cell with selection that a search chose for each budget, where it chose one."""
    if not report:
        return []
    names = (choice.get("select") for choice in report["chosen"].values())
    return [report["cells"][name] for name in names if name]


def find_cell(report: Report, budget: int, frames: int, resolution: int, head: int) -> str | None:
    """The completely measured cell of a network that runs at a setting without merging tokens."""
    setting = {"budget": budget, "frames": frames, "resolution": resolution, "head": head}
    complete, _ = by_certainty(measured(report["cells"]))
    for name, cell in complete.items():
        if cell["method"] != "merge" and all(cell[key] == setting[key] for key in setting):
            return name
    return None


def check_weights(report: Report, params: Mapping[str, Any], source: str | os.PathLike) -> None:
    """Raises UserError unless the report is of these weights. source: the report, for the line."""
    if report.get("fingerprint") != official_names.fingerprint(params):
        raise UserError(
            f"{source}: its report is of other weights ({report.get('checkpoint', 'unknown')}); "
            "name those with --checkpoint, or run --mode=search again"
        )


# ---------------------------------------------------------------------------------------------
# Timings of a device that the report does not know


def measure_device(path: str | os.PathLike, model: "PretrainedModel | None" = None) -> Report:
    """Times the cells worth measuring on this machine's device, and adds that to the report.

    Those are the Pareto front of top-1 and gflops, both of all cells and of the cells that do not
    merge tokens, and those of cascades. They run one clip at a time, in the dtype of the search.
    The report is rewritten at the end, each of its files whole or not at all.

    Args:
        path: as for `find_report`.
        model: the network of the report; by default it is read from the report's workdir.

    Returns:
        the report with the new timings under "devices".

    Raises:
        UserError: there is no report, or no network, or it is not the report's.
    """
    from tqdm import tqdm

    from fluxvit_jax.distributed import devices
    from fluxvit_jax.token_optimization import latency

    file = _existing_report(path)
    report = _read_file(file)
    model = model or _network_of(file, report)
    check_weights(report, model.params, file)
    model = as_searched(model, report)
    device = devices.device_name()
    names = _worth_measuring(report)
    passes = [_forward_pass(model, report["cells"][name]) for name in names]
    # One clip at a time is what plans are about; a batch would double the time.
    costs = latency.measure(model.params, passes, batch=1)
    timed = zip(names, costs, strict=True)
    cells: dict[str, dict[str, float]] = {}
    for name, cost in tqdm(timed, f"measuring {device}", len(names), unit="cell", disable=None):
        cells |= dict.fromkeys(_same_program(report["cells"], name), asdict(cost))
    return _save_timings(file, device, {"batch": 1, "cells": cells})


def _worth_measuring(report: Report) -> list[str]:
    """Names of the cells to time, the cheapest first."""
    cells, worth = report["cells"], set()
    for merging in (True, False):
        complete, _ = by_certainty(measured(cells, merging))
        worth.update(_front(complete))
    worth |= {step["cell"] for own in report["cascades"].values() for step in own["steps"]}
    return sorted(worth, key=lambda name: (cells[name]["gflops"], name))


def _front(cells: Cells) -> list[str]:
    """The cells that are more accurate than all others with at most as many gflops."""
    front, most = [], -math.inf
    for name in sorted(cells, key=lambda n: (cells[n]["gflops"], -_top1(cells[n]), n)):
        if _top1(cells[name]) > most:
            front.append(name)
            most = _top1(cells[name])
    return front


def _same_program(cells: Cells, name: str) -> list[str]:
    """The cells that differ from this one in the head only, so that they take the same time."""

    def program(cell: Mapping[str, Any]) -> tuple[bool, int, int, int]:
        return cell["method"] == "merge", cell["budget"], cell["frames"], cell["resolution"]

    return [other for other in cells if program(cells[other]) == program(cells[name])]


def _forward_pass(model: "PretrainedModel", cell: Mapping[str, Any]) -> "latency.ForwardPass":
    from fluxvit_jax.token_optimization import latency
    from fluxvit_jax.token_optimization.candidates import Candidate

    grid = Grid.square(cell["frames"], cell["resolution"])
    candidate = Candidate(cell["method"], cell["budget"], grid, cell["head"])
    network = candidate.network(model.config.model)
    return latency.ForwardPass(network, grid, candidate.budget, candidate.head)


def as_searched(model: "PretrainedModel", report: Report) -> "PretrainedModel":
    """The network in the dtype of its search."""
    from fluxvit_jax.deploy.pretrained import PretrainedModel

    network = replace(model.config.model, dtype=report["dtype"])
    changed = replace(model.config, model=network)
    return PretrainedModel(model.params, changed, model.evaluations, model.space)


def _unmeasured(source: str | os.PathLike, report: Report, device: str) -> str:
    return (
        f"{source}: has timings of {_list(report['devices'])}, not of {device}; name one of those "
        "as device, or, to measure this one, plan with the workdir that holds the weights as well"
    )


def _network_of(file: Path, report: Report) -> "PretrainedModel":
    """The network in the workdir of a report."""
    from fluxvit_jax.deploy.pretrained import from_pretrained
    from fluxvit_jax.distributed import devices

    workdir = file.parent.parent
    here = any((workdir / name).exists() for name in ("checkpoints", "model.safetensors"))
    if file.parent.name != FOLDER or not here:
        raise UserError(_unmeasured(file, report, devices.device_name()))
    return from_pretrained(workdir)


def _save_timings(file: Path, device: str, timings: Mapping[str, Any]) -> Report:
    """The current report with a device's timings, which are also written into the file."""
    from fluxvit_jax.token_optimization.report import write

    report = _read_file(file)  # again: a search may have continued in the meantime
    report = {**report, "devices": {**report["devices"], device: timings}}
    try:
        write(report, file.parent)
    except UserError as error:
        print(f"{error}; the timings may be lost", file=sys.stderr)
    return report
