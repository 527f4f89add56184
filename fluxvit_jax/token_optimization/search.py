"""`--mode=search`: Token Optimization, the best grid for each token budget.

All candidates (see `candidates`) are evaluated on the choosing split, and the best of each budget
then on the reporting split, so that the reported number is not the one chosen for being high. A
chunk of videos is decoded once and evaluated by all candidates before the next chunk: the table
exists after the first chunk and becomes more certain with each. Then each candidate's cost on this
device is measured, and cascades are found in what the candidates said (`cascades`). Results are on
disk at once (`results_log`, `probability_store`), and a stopped search resumes.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict
from tqdm import tqdm

from fluxvit_jax.checkpoints.workdir_lock import WorkdirLock
from fluxvit_jax.config.fields import upgraded
from fluxvit_jax.config.network import model_config
from fluxvit_jax.convert import official_names
from fluxvit_jax.data.sources import held_out_part, labels_of, shuffled
from fluxvit_jax.data.splits import check_same_videos, shared_videos
from fluxvit_jax.data.views import views_of
from fluxvit_jax.distributed import devices, storage
from fluxvit_jax.distributed.console import progress_bar, say
from fluxvit_jax.distributed.hosts import compute_on_host0, raise_on_all_hosts
from fluxvit_jax.distributed.mesh import (
    gather,
    host_index,
    local_row_indices,
    make_mesh,
    round_up_to_shards,
)
from fluxvit_jax.distributed.watchdog import Watchdog
from fluxvit_jax.errors import UserError
from fluxvit_jax.evaluation import retrieve, tasks, trained_weights, zero_shot
from fluxvit_jax.evaluation.finite import check_measured
from fluxvit_jax.evaluation.settings import tokens_kept
from fluxvit_jax.evaluation.trained_weights import (
    Weights,
    check_class_names,
    open_named,
    with_classes,
)
from fluxvit_jax.evaluation.unreadable import NothingReadableError, check_readable, warn_of_failures
from fluxvit_jax.models import fluxvit
from fluxvit_jax.models.flops import gflops
from fluxvit_jax.reports.wording import count
from fluxvit_jax.token_optimization import cascades, latency, pairs, planner, report
from fluxvit_jax.token_optimization.candidate_evaluator import CandidateEvaluator
from fluxvit_jax.token_optimization.candidates import Candidate, candidates, stages, top_half
from fluxvit_jax.token_optimization.frame_reader import DecodedVideo, FrameReader, Task
from fluxvit_jax.token_optimization.pairs import Split
from fluxvit_jax.token_optimization.probability_store import ProbabilityStore
from fluxvit_jax.token_optimization.results_log import (
    CHOOSE,
    FAILED,
    REPORT,
    TOP1,
    ResultsLog,
    accuracy,
    best,
    choice,
    difference,
    gain,
)

FOLDER = "search"
WRITE_SECONDS = 60  # between two reports of an unfinished search
MOTION = "motion"  # in place of a cell: scores of how much moves
NAMES = {CHOOSE: "Choosing split", REPORT: "Reporting split"}


def run(config: ConfigDict, workdir: str) -> int:
    """Searches the best grids for a workdir's best checkpoint; returns the exit status, 0.

    Writes `search/report.html`, `.json`, `.csv` and `.png`, and resumes from what is there.

    Raises UserError: no data, none that can be read, no checkpoint, no candidates, or results of
    something else in the folder.
    """
    if config.train.multi_label:
        raise UserError(
            "config.train.multi_label: a search ranks by top-1, which takes one label a video; "
            "choose eval.settings by --mode=evaluate instead"
        )
    path = storage.path_of(workdir)
    config, weights = load_weights(config, path)
    with raise_on_all_hosts():
        if tasks.task_of(config) == "retrieval":
            config, weights, splits, notes = pairs.splits_of(config, weights)
        else:
            splits, notes = splits_of(config, weights)
        for split in splits:
            check_readable(split.source, split.data, config)
    check_same_videos(**{split.name: split.source for split in splits})
    for note in notes:
        say(f"warning: {note}")
    folder = path / FOLDER
    with (
        Watchdog(config.log.watchdog_seconds, path) as watchdog,
        WorkdirLock(folder),
        Search(config, weights, splits, notes, folder, watchdog) as search,
    ):
        search.choose()
        search.report()
        search.measure_costs()
        search.find_cascades()
        summary = search.write()
    if host_index() == 0:
        print(table(summary))
        print(f"written to {folder / 'report.html'}")
        for warning in search.warnings():
            print(f"warning: {warning}")
    return 0


def load_weights(config: ConfigDict, workdir: epath.Path) -> tuple[ConfigDict, Weights]:
    """The weights to search for, and the config of their network with what it is measured on.

    Raises UserError: there are none, or they do not fit the task.
    """
    match tasks.task_of(config):
        case "retrieval":
            found = retrieve.read_weights(config, workdir)
            own = retrieve.with_evaluation(config, found.config)
            return own, Weights(found.params, found.origin, own.to_dict())
        case "zero_shot":
            return tasks.zero_shot_weights(config, workdir)
        case "multiple_choice" | "mvbench" as task:
            raise UserError(
                f"config.eval.task: a search ranks by top-1 or by retrieval, not {task}"
            )
    weights = trained_weights.load_weights(config, workdir)
    return with_classes(config, weights.params), weights


# ---------------------------------------------------------------------------------------------
# The choosing and the reporting split


def splits_of(config: ConfigDict, weights: Weights) -> tuple[list[Split], list[str]]:
    """The choosing and the reporting split, and notes for readers of their numbers.

    Raises UserError: data are missing, cannot be read, or name other classes than the weights.
    """
    if not config.data.validation:
        raise UserError("no data to report on: add --config.data.validation=LIST")
    validation = open_named(config, "data.validation", weights)
    training = open_named(config, "data.train", weights) if config.data.train else None
    sources = {"data.train": training, "data.validation": validation}
    if config.search.split:
        listed = open_named(config, "search.split", weights)
        words = config.search.split
        choosing = shuffled(listed)
        sources["search.split"] = listed
    elif training is None:
        raise UserError("nothing to choose on: add --config.search.split=LIST or data.train")
    else:
        listed, words = training, config.data.train
        choosing = held_out_part(listed, config.data.holdout_fraction or 1.0)
    check_class_names(config, weights, sources)
    if not len(validation) or not len(choosing):
        raise UserError("there are no videos to choose or to report on")
    if config.search.videos:
        choosing = choosing.first(config.search.videos)
    if len(choosing) < len(listed):
        words = f"{len(choosing)} of {len(listed)} videos, {words}"
    notes = []
    if not config.search.split and not _held_out(config, weights.trained):
        notes.append(
            "The cells are chosen on videos that training may have seen; train with "
            "data.holdout_fraction, or name others with --config.search.split=LIST."
        )
    if listed.fingerprint == validation.fingerprint:
        notes.append("The cells are chosen on the list that is reported, so gains are flattered.")
    elif shared := shared_videos(choosing, validation):
        notes.append(f"{shared} videos that chose the cells are in the list that is reported.")
    if training is not None and (shared := shared_videos(training, validation)):
        notes.append(f"{shared} of {len(validation)} reported videos are in the training list.")
    splits = [Split(CHOOSE, choosing, words), Split(REPORT, validation, config.data.validation)]
    return splits, notes


def _held_out(config: ConfigDict, trained: dict | None) -> bool:
    """Whether training held out the same part of its list that the config holds out."""
    before = upgraded(trained or {}).get("data", {}).get("holdout_fraction")
    return config.data.holdout_fraction > 0 and before == config.data.holdout_fraction


# ---------------------------------------------------------------------------------------------
# The search


class Search:
    """A search in progress: its candidates, splits and results. Use it with `with`."""

    def __init__(
        self,
        config: ConfigDict,
        weights: Weights,
        splits: Sequence[Split],
        notes: Sequence[str],
        folder: epath.Path,
        watchdog: Watchdog,
    ):
        """Starts a search, or resumes the one in the folder.

        Raises UserError: there are no candidates, or the folder holds results of something else.
        """
        self._config, self._weights, self._notes, self._folder = config, weights, notes, folder
        self._watchdog = watchdog
        self._mesh = make_mesh(config)
        self._chunk = round_up_to_shards(config.eval.batch_size, self._mesh)  # over all hosts
        self._model = model_config(config)
        self._candidates = candidates(config, self._model)
        self._budgets = sorted(set(config.search.budgets), reverse=True)
        self._splits = {split.name: split for split in splits}
        self._fingerprint = official_names.fingerprint(fluxvit.network_params(weights.params))
        self._views = str(views_of(config))
        # Of the fewest tokens: how much moves is told before the first cell is asked.
        self._motion_grid = min((c.grid for c in self._candidates), key=lambda grid: grid.tokens)
        self._work = {
            c.name: gflops(c.network(self._model), c.grid, c.budget) for c in self._candidates
        }
        about = {
            "weights": self._fingerprint,
            "network": repr(self._model),
            "views": self._views,
            **{f"split to {split.name} on": split.source.fingerprint for split in splits},
        }
        if classifier := zero_shot.classifier_in(weights.params):
            about["texts"] = official_names.fingerprint(classifier)
        self._results = ResultsLog(folder, about)
        self._probabilities = ProbabilityStore(folder, keeps=not self._results.is_empty)
        self._cascades: dict[str, Any] = {}
        self._motion_rules: dict[str, Any] = {}
        self._earlier_costs = compute_on_host0(self._read_earlier_costs)
        self._num_compared = 0  # videos of the choosing split that all remaining candidates share
        self._dropped: dict[str, int] = {}  # candidate -> videos after which it was dropped
        self._finished = False
        self._written = time.monotonic()

    def __enter__(self) -> "Search":
        return self

    def __exit__(self, *_: object) -> None:
        self._results.close()
        self._close_evaluator()

    @cached_property
    def _evaluator(self) -> CandidateEvaluator:
        """Made when the first chunk needs it: a finished search puts no weights on the devices."""
        return CandidateEvaluator(
            self._config,
            fluxvit.network_params(self._weights.params)
            | zero_shot.classifier_in(self._weights.params),
            self._mesh,
            self._watchdog.pause,
        )

    def _close_evaluator(self) -> None:
        if "_evaluator" in vars(self):
            self._evaluator.close()
            del self._evaluator

    def choose(self) -> None:
        """Evaluates candidates on the choosing split; halving drops the worse half in between."""
        split, remaining = self._splits[CHOOSE], self._candidates
        for end in stages(len(split.source), self._chunk, self._config.search.strategy):
            if self._num_compared:
                top1 = {candidate.name: self._top1(candidate) for candidate in remaining}
                better = top_half(remaining, top1, self._budgets)
                dropped = {c.name for c in remaining} - {c.name for c in better}
                self._dropped |= dict.fromkeys(sorted(dropped), self._num_compared)
                remaining = better
            self._evaluate(split, remaining, self._num_compared, end)
            self._num_compared = end
        self._check_read(split)

    def report(self) -> None:
        """Evaluates the chosen candidates, and those of cascades, on the reporting split."""
        split = self._splits[REPORT]
        chosen = self._chosen() | {c.name: c for c in self._members()}
        self._evaluate(split, list(chosen.values()), 0, len(split.source))
        self._check_read(split)

    def _chosen(self) -> dict[str, Candidate]:
        """The candidates that the budgets chose, by name."""
        return {
            candidate.name: candidate
            for budget in self._budgets
            for candidate in self._choice(budget).values()
            if candidate
        }

    def measure_costs(self) -> None:
        """Measures the cost on this device of each candidate that was not dropped."""
        self._close_evaluator()  # its weights and programs leave the device
        self._watchdog.pause()
        if host_index() != 0:
            return
        device, batch = devices.device_name(), self._config.search.timed_batch
        known = self._results.costs(device, batch)
        by_program = {c.program: c for c in self._candidates if c.name not in self._dropped}
        missing = [c for program, c in by_program.items() if program not in known]
        passes = [
            latency.ForwardPass(c.network(self._model), c.grid, c.budget, c.head) for c in missing
        ]
        too_much = (
            f"the device's memory does not hold {batch} clips in each of {latency.INTERLEAVED} "
            "cells; lower --config.search.timed_batch, and what was found stays"
        )
        bar = progress_bar(len(missing), desc="timing", unit="cell")
        with bar, devices.enough_memory(too_much):
            params = fluxvit.network_params(self._weights.params)
            costs = latency.measure(params, passes, batch)
            for candidate, cost in zip(missing, costs, strict=True):
                self._results.add_cost(device, batch, candidate.program, asdict(cost))
                bar.update()
                self._watchdog.alive()
                self._write_now_and_then()
        self._watchdog.pause()

    def find_cascades(self) -> None:
        """Finds cascades of cells on the choosing split, and tells how they do on the other.

        And rules of motion, likewise.
        """
        self._finished = True
        cells = self._members()
        if host_index() != 0 or not cells:
            return
        say(f"finding cascades in what {count(len(cells), 'cell')} said")
        tables = {name: self._table(split, cells) for name, split in self._splits.items()}
        costs = {c.name: (self._work[c.name].all, self._work[c.name].selection) for c in cells}
        self._cascades = cascades.describe_all(
            cells, tables, views_of(self._config).counts, costs, self._config.search.cascade_steps
        )
        scores = {name: self._motion(split) for name, split in self._splits.items()}
        self._motion_rules = cascades.describe_motion(
            cells, tables, scores, self._motion_grid, views_of(self._config).count, costs
        )

    def _motion(self, split: Split) -> np.ndarray:
        """The scores of the readable videos of a split: float [n]."""
        videos = len(split.source)
        found = self._probabilities.read(split.name, MOTION, videos)[:, 0, 0]
        return found[self._readable(split)]

    def _readable(self, split: Split) -> np.ndarray:
        failed = self._results.failures(split.name)
        return np.array([number for number in range(len(split.source)) if number not in failed])

    def _members(self) -> list[Candidate]:
        """The candidates that cascades are made of."""
        if not any(map(self._keeps_probabilities, self._candidates)):
            return []
        complete = [
            candidate
            for candidate in self._candidates
            if candidate.name not in self._dropped and self._keeps_probabilities(candidate)
        ]
        return cascades.members(
            complete,
            {c.name: self._top1(c) for c in complete},
            {c.name: self._work[c.name].all for c in complete},
            self._chosen(),
        )

    def _keeps_probabilities(self, candidate: Candidate) -> bool:
        """Whether cascades may need them; retrieval has no classes for all videos."""
        own = self._config.search.cascade_steps > 1 and candidate.method != "merge"
        return own and tasks.task_of(self._config) != "retrieval"

    def _table(self, split: Split, cells: Sequence[Candidate]) -> cascades.Table:
        """What cells said of the readable videos of a split."""
        videos, failed = len(split.source), self._results.failures(split.name)
        read = self._readable(split)
        labels = split.source.labels or [split.source[n].label for n in range(videos)]
        return cascades.Table(
            probabilities={
                cell.name: self._probabilities.read(split.name, cell.name, videos)[read]
                for cell in cells
            },
            labels=np.array([labels_of(labels[number])[0] for number in read]),
            failed=len(failed),
        )

    def write(self) -> dict[str, Any]:
        """Writes the report as far as it goes, and returns it."""
        summary = self.summary()
        if host_index() == 0:
            report.write(summary, self._folder)
            self._written = time.monotonic()
        return summary

    def summary(self) -> dict[str, Any]:
        """The content of `report.json`, as far as it is known."""
        unfinished = ["The search is not finished: numbers are missing and may change."]
        grids = [candidate.grid for candidate in self._candidates]
        top = best(self._candidates, self._results, self._num_compared)
        return {
            "version": planner.VERSION,
            "checkpoint": self._weights.origin,
            "fingerprint": self._fingerprint,
            "network": self._config.model.variant,
            "dtype": self._model.dtype,
            "views": self._views,
            "view_count": views_of(self._config).count,
            "budgets": self._budgets,
            "frames": sorted({grid.frames for grid in grids}),
            "resolutions": sorted({grid.resolution for grid in grids}),
            **{name: self._describe_split(split) for name, split in self._splits.items()},
            "notes": [*([] if self._finished else unfinished), *self._notes, *self.warnings()],
            "cells": {c.name: self._describe_candidate(c, top) for c in self._candidates},
            "chosen": {str(budget): self._describe_choice(budget) for budget in self._budgets},
            "skipped": [{"cell": name, "videos": n} for name, n in self._dropped.items()],
            "devices": self._describe_costs(),
            "cascades": self._cascades,
            "motion": self._motion_rules,
        }

    def warnings(self) -> list[str]:
        """A line for each split with too many unreadable videos."""
        warnings = []
        for split in self._splits.values():
            failures = self._results.failures(split.name)
            if not failures:
                continue
            number, reason = min(failures.items())
            first = f"{split.source[number].id}: {reason}"
            warning = warn_of_failures(self._config, len(failures), len(split.source), first)
            if warning:
                again = f"to read them again, remove the workdir's folder {FOLDER!r}"
                warnings.append(f"{NAMES[split.name]}: {warning}; {again}.")
        return warnings

    def _check_read(self, split: Split) -> None:
        """Raises UserError if no video could be read: all candidates would be equal, at 0 %."""
        failures = self._results.failures(split.name)
        if len(failures) == len(split.source):
            first = split.source[0]
            raise NothingReadableError(split.data, len(failures), first, failures[0])

    def _choice(self, budget: int) -> dict[str, Candidate | None]:
        return choice(self._candidates, budget, self._results, self._num_compared)

    def _top1(self, candidate: Candidate) -> float:
        """Accuracy on the videos that all remaining candidates were evaluated on."""
        outcomes = self._results.outcomes(CHOOSE, candidate.name)[: self._num_compared]
        return outcomes.count(TOP1) / self._num_compared

    def _write_now_and_then(self) -> None:
        if time.monotonic() - self._written > WRITE_SECONDS:
            self.write()

    def _evaluate(
        self, split: Split, remaining: Sequence[Candidate], start: int, stop: int
    ) -> None:
        """Evaluates candidates on videos `start` to `stop` of a split, but for known results."""
        chunks = {
            first: [c for c in remaining if not self._has(split, first, c)]
            for first in range(start, stop, self._chunk)
        }
        pending = [
            (first, missing)
            for first, missing in chunks.items()
            if missing or self._lacks_motion(split, first)
        ]
        if not pending:
            return
        self._evaluator.keep_programs(remaining)
        total = len(chunks) * sum(self._work[c.name].all for c in remaining)
        bar = progress_bar(
            total,  # work, so that the time left holds for candidates of any size
            initial=total - sum(self._work[c.name].all for _, missing in pending for c in missing),
            desc={CHOOSE: "choosing", REPORT: "reporting"}[split.name],
            bar_format="{desc} {percentage:3.0f}% |{bar:20}| {elapsed}, {remaining} left{postfix}",
        )
        local = len(self._local_numbers(0))
        with bar, FrameReader(self._config, split.source, local) as reader:
            reader.start(self._tasks(split, *pending[0]))
            for (first, missing), following in zip(pending, [*pending[1:], None], strict=True):
                bar.set_postfix_str(f"{first} of {stop} videos are done", refresh=False)
                if split.name == CHOOSE:
                    self._num_compared = first
                videos = [reader.take(task) for task in self._tasks(split, first, missing)]
                if following:  # is read while the devices work on this chunk
                    reader.start(self._tasks(split, *following))
                self._evaluate_chunk(split, first, missing, videos, reader, bar)

    def _has(self, split: Split, first: int, candidate: Candidate) -> bool:
        """Whether all is known of the chunk of videos that begins with number `first`."""
        chunk = (split.name, first, self._end(split, first), candidate.name)
        if not self._results.has(*chunk):
            return False
        return not self._keeps_probabilities(candidate) or self._probabilities.has(*chunk)

    def _end(self, split: Split, first: int) -> int:
        """Number after the last video of the chunk that begins with number `first`."""
        return min(first + self._chunk, len(split.source))

    def _local_numbers(self, first: int) -> list[int]:
        """This host's videos of the chunk that begins with number `first`."""
        return [first + int(row) for row in local_row_indices(self._mesh, self._chunk)]

    def _lacks_motion(self, split: Split, first: int) -> bool:
        """Whether the videos of a chunk need scores of motion, as cascades need probabilities."""
        wanted = any(map(self._keeps_probabilities, self._candidates))
        end = self._end(split, first)
        return wanted and not self._probabilities.has(split.name, first, end, MOTION)

    def _tasks(self, split: Split, first: int, missing: Sequence[Candidate]) -> list[Task]:
        """The reading of this host's part of a chunk for the candidates, and for its motion."""
        motion = (self._motion_grid,) if self._lacks_motion(split, first) else ()
        grids = tuple(dict.fromkeys([*(candidate.grid for candidate in missing), *motion]))
        return [(number, grids, 0) for number in self._local_numbers(first)]

    def _evaluate_chunk(
        self,
        split: Split,
        first: int,
        missing: Sequence[Candidate],
        videos: Sequence[DecodedVideo],
        reader: FrameReader,
        bar: tqdm,
    ) -> None:
        """Evaluates candidates on the chunk of videos that begins with number `first`.

        Raises UserError if the weights give no finite numbers.
        """
        numbers = self._local_numbers(first)
        failures = [[n, v.failure] for n, v in zip(numbers, videos, strict=True) if v.failure]
        self._results.add_failures(split.name, dict(gather(failures)))
        if self._lacks_motion(split, first):
            scores = self._evaluator.motion(videos, self._motion_grid, reader)
            self._keep(split, first, MOTION, videos, scores[:, None, None])
        if not missing:
            return
        for candidate, local, found in self._evaluator.evaluate(videos, missing, reader):
            # Nothing is known beyond the last video, so there may be fewer outcomes than numbers.
            read = [row for row, outcome in enumerate(local) if outcome != FAILED]
            check_measured(found[read], self._weights.origin, f"in cell {candidate.name}")
            outcomes = dict(gather(list(zip(numbers, local, strict=False))))
            text = "".join(outcomes[number] for number in sorted(outcomes))
            if self._keeps_probabilities(candidate):
                self._keep(split, first, candidate.name, videos, found)
            self._results.add_outcomes(split.name, first, candidate.name, text)
            bar.update(self._work[candidate.name].all)
            self._watchdog.alive()
            self._write_now_and_then()

    def _keep(
        self,
        split: Split,
        first: int,
        name: str,
        videos: Sequence[DecodedVideo],
        local: np.ndarray,
    ) -> None:
        """Keeps what was found of a chunk; local: [b, ...], of this host's videos."""
        rows = zip((video.number for video in videos), local.tolist(), strict=True)
        by_number = dict(gather([[number, row] for number, row in rows if number >= 0]))
        found = np.array([by_number[number] for number in sorted(by_number)], np.float32)
        self._probabilities.add(split.name, first, name, found)

    def _describe_split(self, split: Split) -> dict[str, Any]:
        return {
            "data": split.data,
            "videos": len(split.source),
            "failed": len(self._results.failures(split.name)),
            "fingerprint": split.source.fingerprint,
        }

    def _describe_candidate(self, candidate: Candidate, top: Candidate | None) -> dict[str, Any]:
        outcomes = {split: self._results.outcomes(split, candidate.name) for split in self._splits}
        tokens, grid = candidate.budget, candidate.grid
        if candidate.method == "select":
            tokens = tokens_kept(self._model, grid, candidate.budget)
        described = {
            "method": candidate.method,
            "budget": candidate.budget,
            "tokens": tokens,
            "frames": grid.frames,
            "resolution": grid.resolution,
            "head": candidate.head,
            "gflops": self._work[candidate.name].all,
            "gflops_kept": self._work[candidate.name].kept,
            **{split: accuracy(text) for split, text in outcomes.items() if text},
        }
        if top and outcomes[CHOOSE]:
            of_top = self._results.outcomes(CHOOSE, top.name)
            described["behind"] = difference(of_top, outcomes[CHOOSE])
        return described

    def _describe_choice(self, budget: int) -> dict[str, Any]:
        chosen = self._choice(budget)
        return {
            **{method: c.name if c else None for method, c in chosen.items()},
            "gain": gain(chosen["select"], chosen["plain"], self._results),
            "over_merge": gain(chosen["select"], chosen["merge"], self._results),
        }

    def _describe_costs(self) -> dict[str, Any]:
        """Known costs by device and candidate, including those of an earlier report."""
        device, batch = devices.device_name(), self._config.search.timed_batch
        known = self._results.costs(device, batch)
        cells = {c.name: known[c.program] for c in self._candidates if c.program in known}
        return self._earlier_costs | ({device: {"batch": batch, "cells": cells}} if cells else {})

    def _read_earlier_costs(self) -> dict[str, Any]:
        """Costs by device in the folder's report, if it is of these weights."""
        if not (self._folder / planner.REPORT).exists():
            return {}
        earlier = planner.read_report(self._folder)
        return earlier["devices"] if earlier.get("fingerprint") == self._fingerprint else {}


def table(summary: dict[str, Any]) -> str:
    """Plain | TO at each budget on the reporting split, in columns."""
    lines = [f"budget  {'plain':>22}  {'TO':>22}  gain, 95 %"]
    for budget, chosen in summary["chosen"].items():
        plain, select = (_side(summary["cells"].get(chosen[name])) for name in ("plain", "select"))
        gained = "-"
        if chosen["gain"]:
            low, high = chosen["gain"]["interval"]
            gained = f"{chosen['gain']['top1']:+.1%}, {low:+.1%} to {high:+.1%}"
        lines.append(f"{budget:>6}  {plain:>22}  {select:>22}  {gained}")
    return "\n".join(lines)


def _side(cell: dict[str, Any] | None) -> str:
    if cell is None or REPORT not in cell:
        return "-"
    return f"{cell[REPORT]['top1']:.2%} ({cell['frames']} x {cell['resolution']} px)"
