"""`--mode=search`: Token Optimization, the grid that serves each token budget best.

Every cell (see `cells`) sees the videos of the choosing split; the best of each budget then sees
the reporting split, so that the number reported is not the one that was chosen for being high. A
chunk of videos is decoded once, and all cells see it before the next chunk: the table is there
after the first chunk and grows surer with each. At last each cell's cost on this device is
measured. What is found is on disk at once (`results`), and a search that was stopped goes on.
"""

import time
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import closing
from functools import partial
from typing import Any, NamedTuple

from etils import epath
from ml_collections import ConfigDict
from tqdm import tqdm

from fluxvit_jax import costs, devices, distributed, evaluate, parallel, planner, report, storage
from fluxvit_jax.cells import Cell, better_half, cells_of, stages
from fluxvit_jax.config import model_config
from fluxvit_jax.data.annotations import (
    Source,
    held_out_part,
    open_source,
    shuffled,
)
from fluxvit_jax.errors import UserError
from fluxvit_jax.evaluate import Weights, progress_bar
from fluxvit_jax.results import (
    CHOOSE,
    FIRST,
    REPORT,
    Results,
    accuracy,
    best,
    choice,
    difference,
    gain,
)
from fluxvit_jax.viewer import Shot, Viewer

FOLDER = "search"
WRITE_SECONDS = 60  # between two reports of an unfinished search


def run(config: ConfigDict, workdir: str) -> int:
    """Searches the best grids of a workdir's best checkpoint; returns the exit status, 0.

    Writes `search/report.html`, `.json`, `.csv` and `.png`, and goes on with what is there.

    Raises UserError: no data, no checkpoint, no cells, or results of something else in the way.
    """
    workdir = storage.path_of(workdir)
    weights = evaluate.load_weights(config, workdir)
    with distributed.together():
        splits, notes = splits_of(config, weights.trained)
    distributed.check_same_videos(**{split.name: split.source for split in splits})
    for note in notes:
        parallel.say(f"warning: {note}")
    folder = workdir / FOLDER
    with Search(config, weights, splits, notes, folder) as search:
        search.choose()
        search.report()
        search.measure_costs()
        summary = search.write()
    if parallel.host_index() == 0:
        print(table(summary))
        print(f"written to {folder / 'report.html'}")
    return 0


# ---------------------------------------------------------------------------------------------
# What chooses and what reports


class Split(NamedTuple):
    """Videos that cells see. data: what they are, in words."""

    name: str
    source: Source
    data: str


def splits_of(config: ConfigDict, trained: dict | None) -> tuple[list[Split], list[str]]:
    """The choosing and the reporting split, and what a reader of their numbers must know.

    trained: the config of the run that the weights are from.

    Raises UserError: data are missing or cannot be read.
    """
    if not config.data.validation:
        raise UserError("no data to report on: add --config.data.validation=LIST")
    validation = _open(config, config.data.validation)
    training = _open(config, config.data.train) if config.data.train else None
    if config.search.choose:
        whole, words = _open(config, config.search.choose), config.search.choose
        chosen = shuffled(whole)
    elif training is None:
        raise UserError("nothing to choose on: add --config.search.choose=LIST or data.train")
    else:
        whole, words = training, config.data.train
        chosen = held_out_part(whole, config.data.held_out or 1.0)
    if not len(validation) or not len(chosen):
        raise UserError("there are no videos to choose or to report on")
    if config.search.videos:
        chosen = chosen.first(config.search.videos)
    words = words if len(chosen) == len(whole) else f"{len(chosen)} of {len(whole)} videos, {words}"
    notes = []
    if not config.search.choose and not _held_out(config, trained):
        notes.append(
            "The cells are chosen on videos that training may have seen; train with "
            "data.held_out, or name others with --config.search.choose=LIST."
        )
    if whole.fingerprint == validation.fingerprint:
        notes.append("The cells are chosen on the list that is reported, so gains are flattered.")
    elif shared := _shared(chosen, validation):
        notes.append(f"{shared} videos that chose the cells are in the list that is reported.")
    if training is not None and (shared := _shared(training, validation)):
        notes.append(f"{shared} of {len(validation)} reported videos are in the training list.")
    splits = [Split(CHOOSE, chosen, words), Split(REPORT, validation, config.data.validation)]
    return splits, notes


def _open(config: ConfigDict, data: str) -> Source:
    return open_source(data, config.data.root, config.model.classes)


def _held_out(config: ConfigDict, trained: dict | None) -> bool:
    """Whether the weights were trained without what the config holds out of the training list."""
    before = (trained or {}).get("data", {}).get("held_out")
    return config.data.held_out > 0 and before == config.data.held_out


def _shared(one: Source, other: Source) -> int:
    """How many videos of `other` are in `one`; 0 where only reading them all would tell."""
    ids = [source.ids for source in (one, other)]
    return len(set(ids[0]) & set(ids[1])) if None not in ids else 0


# ---------------------------------------------------------------------------------------------
# The search


class Search:
    """A search under way: what it is about and what it has found. Close it, or use `with`."""

    def __init__(
        self,
        config: ConfigDict,
        weights: Weights,
        splits: Sequence[Split],
        notes: Sequence[str],
        folder: epath.Path,
    ):
        """Begins, or goes on with what the folder holds.

        Raises UserError: there are no cells, or the folder holds results of something else.
        """
        self._config, self._weights, self._notes, self._folder = config, weights, notes, folder
        self._mesh = parallel.make_mesh(config)
        self._model = model_config(config)
        self._cells = cells_of(config, self._model)
        self._budgets = sorted(set(config.search.budgets), reverse=True)
        self._splits = {split.name: split for split in splits}
        self._fingerprint = planner.fingerprint(weights.params)
        self._views = f"{config.eval.clips}x{config.eval.crops}"
        self._work = {cell.name: costs.gflops(*self._pass(cell)[:3]) for cell in self._cells}
        about = {
            "weights": self._fingerprint,
            "network": repr(self._model),
            "views": self._views,
            **{f"split to {split.name} on": split.source.fingerprint for split in splits},
        }
        self._results = Results(folder, about)
        self._others = distributed.from_first_host(self._costs_before)
        self._seen = 0  # videos of the choosing split that all cells have seen
        self._skipped: dict[str, int] = {}  # cells that were dropped, after so many
        self._finished = False
        self._written = time.monotonic()

    def __enter__(self) -> "Search":
        return self

    def __exit__(self, *_: object) -> None:
        self._results.close()

    def choose(self) -> None:
        """All cells see the choosing split; in successive halving, the better half sees more."""
        split, alive = self._splits[CHOOSE], self._cells
        for end in stages(len(split.source), self._chunk(), self._config.search.strategy):
            if self._seen:
                top1 = {cell.name: self._top1(cell) for cell in alive}
                better = better_half(alive, top1, self._budgets)
                dropped = {cell.name for cell in alive} - {cell.name for cell in better}
                self._skipped |= dict.fromkeys(sorted(dropped), self._seen)
                alive = better
            self._see(split, alive, self._seen, end)
            self._seen = end

    def report(self) -> None:
        """The chosen cells see the reporting split."""
        split = self._splits[REPORT]
        chosen = {
            cell.name: cell
            for budget in self._budgets
            for cell in self._choice(budget).values()
            if cell
        }
        self._see(split, list(chosen.values()), 0, len(split.source))

    def measure_costs(self) -> None:
        """The cost on this device of each cell that was not dropped."""
        if parallel.host_index() != 0:
            return
        device, batch = devices.device_name(), self._config.search.timed_batch
        known = self._results.costs(device, batch)
        cells = {cell.program: cell for cell in self._cells if cell.name not in self._skipped}
        missing = [cell for program, cell in cells.items() if program not in known]
        too_much = (
            f"the device's memory does not hold {batch} clips in each of {costs.TOGETHER} cells; "
            "lower --config.search.timed_batch, and what was found stays"
        )
        bar = progress_bar(len(missing), desc="timing", unit="cell")
        with bar, devices.enough_memory(too_much):
            passes = list(map(self._pass, missing))
            found = costs.measure(self._weights.params, passes, batch)
            for cell, cost in zip(missing, found, strict=True):
                self._results.add_cost(device, batch, cell.program, cost._asdict())
                bar.update()
                self._write_now_and_then()
        self._finished = True

    def _pass(self, cell: Cell) -> costs.Pass:
        return costs.Pass(cell.network(self._model), cell.grid, cell.budget, cell.head)

    def write(self) -> dict[str, Any]:
        """Writes the report as far as it goes, and returns it."""
        summary = self.summary()
        if parallel.host_index() == 0:
            report.write(summary, self._folder)
            self._written = time.monotonic()
        return summary

    def summary(self) -> dict[str, Any]:
        """The content of `report.json`, as far as it is known."""
        unfinished = ["The search is not finished: numbers are missing and may change."]
        grids = [cell.grid for cell in self._cells]
        top = best(self._cells, self._results, self._seen)
        return {
            "version": planner.VERSION,
            "checkpoint": self._weights.origin,
            "fingerprint": self._fingerprint,
            "network": self._config.model.variant,
            "dtype": self._model.dtype,
            "views": self._views,
            "budgets": self._budgets,
            "frames": sorted({grid.frames for grid in grids}),
            "resolutions": sorted({grid.resolution for grid in grids}),
            **{name: self._describe_split(split) for name, split in self._splits.items()},
            "notes": [*([] if self._finished else unfinished), *self._notes],
            "cells": {cell.name: self._describe_cell(cell, top) for cell in self._cells},
            "chosen": {str(budget): self._describe_choice(budget) for budget in self._budgets},
            "skipped": [{"cell": name, "videos": n} for name, n in self._skipped.items()],
            "devices": self._describe_costs(),
        }

    def _choice(self, budget: int) -> dict[str, Cell | None]:
        return choice(self._cells, budget, self._results, self._seen)

    def _top1(self, cell: Cell) -> float:
        """Of the videos that all cells have seen."""
        return self._results.found(CHOOSE, cell.name)[: self._seen].count(FIRST) / self._seen

    def _write_now_and_then(self) -> None:
        if time.monotonic() - self._written > WRITE_SECONDS:
            self.write()

    def _chunk(self) -> int:
        """Videos that are decoded at once, over all hosts."""
        return parallel.filled(self._config.eval.batch_size, self._mesh)

    def _see(self, split: Split, cells: Sequence[Cell], start: int, stop: int) -> None:
        """Cells see videos `start` to `stop` of a split, but for what they have seen before."""
        has = partial(self._results.has, split.name)
        chunks = {
            first: [cell for cell in cells if not has(first, cell.name)]
            for first in range(start, stop, self._chunk())
        }
        whole = len(chunks) * sum(self._work[cell.name].all for cell in cells)
        missing = sum(self._work[cell.name].all for own in chunks.values() for cell in own)
        unseen = [(first, own) for first, own in chunks.items() if own]
        if not unseen:
            return
        bar = progress_bar(
            whole,  # work, so that the time left holds for cells of any size
            initial=whole - missing,
            desc={CHOOSE: "choosing", REPORT: "reporting"}[split.name],
            bar_format="{desc} {percentage:3.0f}% |{bar:20}| {elapsed}, {remaining} left{postfix}",
        )
        with bar, closing(Viewer(self._config, self._weights.params, self._mesh)) as viewer:
            ahead = self._read(split, viewer, *unseen[0])
            for (first, own), following in zip(unseen, [*unseen[1:], None], strict=True):
                bar.set_postfix_str(f"{first} of {stop} videos are done", refresh=False)
                if split.name == CHOOSE:
                    self._seen = first
                shots = [future.result() for future in ahead]
                # The next chunk is read while the devices work on this one.
                ahead = self._read(split, viewer, *following) if following else []
                self._see_chunk(split, own, first, shots, viewer, bar)

    def _numbers(self, first: int) -> list[int]:
        """This host's videos of the chunk that begins with number `first`."""
        return [first + int(row) for row in parallel.own_rows(self._mesh, self._chunk())]

    def _read(
        self, split: Split, viewer: Viewer, first: int, cells: Sequence[Cell]
    ) -> list[Future[Shot]]:
        """Begins to read this host's part of a chunk for the cells."""
        numbers = self._numbers(first)
        return viewer.read(
            [split.source[n] if n < len(split.source) else None for n in numbers], cells
        )

    def _see_chunk(
        self,
        split: Split,
        cells: Sequence[Cell],
        first: int,
        shots: Sequence[Shot],
        viewer: Viewer,
        bar: tqdm,
    ) -> None:
        """Cells see the chunk of videos that begins with number `first`."""
        numbers = self._numbers(first)
        failures = [[n, s.failure] for n, s in zip(numbers, shots, strict=True) if s.failure]
        self._results.add_failures(split.name, dict(parallel.gather(failures)))
        for cell, found in viewer.see(shots, numbers, cells):
            marks = dict(parallel.gather(list(zip(numbers, found, strict=False))))
            found = "".join(marks[number] for number in sorted(marks))
            self._results.add_found(split.name, first, cell.name, found)
            bar.update(self._work[cell.name].all)
            self._write_now_and_then()

    def _describe_split(self, split: Split) -> dict[str, Any]:
        return {
            "data": split.data,
            "videos": len(split.source),
            "failed": len(self._results.failures(split.name)),
            "fingerprint": split.source.fingerprint,
        }

    def _describe_cell(self, cell: Cell, top: Cell | None) -> dict[str, Any]:
        found = {split: self._results.found(split, cell.name) for split in self._splits}
        about = {
            "method": cell.method,
            "budget": cell.budget,
            "tokens": evaluate.tokens_kept(self._model, cell.grid, cell.budget)
            if cell.method == "select"
            else cell.budget,
            "frames": cell.grid.frames,
            "resolution": cell.grid.resolution,
            "head": cell.head,
            "gflops": self._work[cell.name].all,
            "gflops_kept": self._work[cell.name].kept,
            **{split: accuracy(text) for split, text in found.items() if text},
        }
        if top and found[CHOOSE]:
            behind = difference(self._results.found(CHOOSE, top.name), found[CHOOSE])
            about["behind"] = behind
        return about

    def _describe_choice(self, budget: int) -> dict[str, Any]:
        chosen = self._choice(budget)
        return {
            **{method: cell.name if cell else None for method, cell in chosen.items()},
            "gain": gain(chosen["select"], chosen["plain"], self._results),
            "over_merge": gain(chosen["select"], chosen["merge"], self._results),
        }

    def _describe_costs(self) -> dict[str, Any]:
        """The costs that are known, by device and cell, those of a report before this one too."""
        device, batch = devices.device_name(), self._config.search.timed_batch
        known = self._results.costs(device, batch)
        cells = {c.name: known[c.program] for c in self._cells if c.program in known}
        return self._others | ({device: {"batch": batch, "cells": cells}} if cells else {})

    def _costs_before(self) -> dict[str, Any]:
        """What the report in the folder says of devices, if it is of these weights."""
        if not (self._folder / planner.REPORT).exists():
            return {}
        before = planner.read_report(self._folder)
        return before["devices"] if before.get("fingerprint") == self._fingerprint else {}


def table(summary: dict[str, Any]) -> str:
    """Plain | TO at each budget on the reporting split, in columns."""
    lines = [f"budget  {'plain':>22}  {'TO':>22}  gain, 95 %"]
    for budget, own in summary["chosen"].items():
        plain, chosen = (_side(summary["cells"].get(own[name])) for name in ("plain", "select"))
        span = "-"
        if own["gain"]:
            low, high = own["gain"]["interval"]
            span = f"{own['gain']['top1']:+.1%}, {low:+.1%} to {high:+.1%}"
        lines.append(f"{budget:>6}  {plain:>22}  {chosen:>22}  {span}")
    return "\n".join(lines)


def _side(cell: dict[str, Any] | None) -> str:
    if cell is None or REPORT not in cell:
        return "-"
    return f"{cell[REPORT]['top1']:.2%} ({cell['frames']} x {cell['resolution']} px)"
