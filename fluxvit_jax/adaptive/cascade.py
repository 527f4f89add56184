"""Cascades: every video is asked at a small budget, and asked again at a larger one if in doubt.

A cascade is an ordered list of steps and a rule of confidence. Each step's probabilities, at their
temperature, join the average of the steps before. A video stops at the first step whose confidence
reaches the step's threshold, and the average is its answer. This module needs NumPy only: servers
run cascades too.
"""

import itertools
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fluxvit_jax.distributed import storage
from fluxvit_jax.errors import UserError
from fluxvit_jax.evaluation.calibration import at_temperature
from fluxvit_jax.grids import PATCH, Grid
from fluxvit_jax.reports.wording import count

if TYPE_CHECKING:
    from fluxvit_jax.models.fluxvit import FluxViTConfig

CONFIDENCES = ("probability", "margin", "entropy", "agreement")


Size = tuple[int, int]  # of a grid: frames and pixels


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One pass of a cascade.

    budget, frames, resolution, head: as of a cell of a search that merges no tokens.
    views: how many of a video's views are looked at, from the middle one on; 0: all.
    temperature: divides the logits.
    weight: of this step's probabilities in the average, against all steps before: 1 is this step
        alone, 1/2 in the second step and 1/3 in the third is the mean of all.
    threshold: the least confidence with which a video stops here; None in the last step.
    cell: its name in the report of the search that found it; "" in a cascade written by hand.
    """

    budget: int
    frames: int
    resolution: int
    head: int
    views: int = 0
    temperature: float = 1.0
    weight: float = 1.0
    threshold: float | None = None
    cell: str = ""

    @property
    def grid(self) -> Size:
        """Frames and pixels."""
        return self.frames, self.resolution

    def goes_on(self, earlier: "Step") -> bool:
        """Whether it looks at further views by the very cell of the step before."""
        return (earlier.budget, *earlier.grid, earlier.head) == (self.budget, *self.grid, self.head)

    def covers(self, later: "Step") -> bool:
        """Whether it ranks the patches of every view that a later step looks at."""
        return self.grid == later.grid and (not self.views or 0 < later.views <= self.views)

    def __str__(self) -> str:
        views = f", {count(self.views, 'view')}" if self.views else ""
        return f"{self.budget} tokens ({self.frames} x {self.resolution} px{views})"


class Pass(NamedTuple):
    """How a step is run.

    start, stop: of the views that are looked at; those before `start` the step before has seen.
    ranked_budget: rank the patches for so many tokens, and keep that for a later step; 0: do not.
    takes_ranking: patches were ranked by an earlier step. later_grids: those of the steps to come.
    """

    step: Step
    start: int
    stop: int
    ranked_budget: int
    takes_ranking: bool
    later_grids: frozenset[Size]


class Answers(NamedTuple):
    """What a cascade says of n videos.

    probabilities: float [n, C]; step: int [n], the number of the step that each stopped at, from 0.
    """

    probabilities: np.ndarray
    step: np.ndarray

    @property
    def logits(self) -> np.ndarray:
        """Scores whose softmax is `probabilities`: float [n, C]."""
        return np.log(np.maximum(self.probabilities, np.finfo(np.float32).tiny))


@dataclass(frozen=True, slots=True)
class Cascade:
    """Steps and the rule of confidence, one of `CONFIDENCES`.

    "probability": the largest; "margin": the largest less the second, if there is one; "entropy":
    1 - entropy / log of the number of classes; "agreement": the largest where the step's own answer
    is that of the average before, else 0 (the first step has nothing to agree with: the largest).
    """

    steps: tuple[Step, ...]
    confidence: str = "probability"

    def __str__(self) -> str:
        words = [
            f"{step}, on below {self.confidence} {step.threshold:.3g}"
            if step.threshold is not None
            else str(step)
            for step in self.steps
        ]
        return "; then ".join(words)

    def join(
        self, number: int, probabilities: np.ndarray, before: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The average with a step's probabilities [n, C], and which videos stop: bool [n].

        before: the average of the steps before, [n, C]; None in the first.
        """
        step = self.steps[number]
        own = at_temperature(probabilities, step.temperature)
        average = averaged(own, before, step.weight)
        if step.threshold is None:
            return average, np.ones(len(average), bool)
        return average, confidence(self.confidence, average, own, before) >= step.threshold

    def run(self, videos: int, ask: Callable[[int, np.ndarray], np.ndarray]) -> Answers:
        """Asks step after step about the videos that go on.

        ask: (number of the step, numbers of the videos int [m]) -> probabilities [m, C].
        """
        going_on = np.arange(videos)
        answer: np.ndarray | None = None
        stopped_at = np.zeros(videos, int)
        for number in range(len(self.steps)):
            probabilities = ask(number, going_on)
            average, stops = self.join(
                number, probabilities, None if answer is None else answer[going_on]
            )
            if answer is None:
                answer = np.zeros((videos, average.shape[1]), average.dtype)
            answer[going_on], stopped_at[going_on] = average, number
            going_on = going_on[~stops]
            if not len(going_on):
                break
        assert answer is not None  # there is a first step
        return Answers(answer, stopped_at)

    def passes(self, views: int, shares_ranking: bool) -> list[Pass]:
        """How each step is run on videos of so many views.

        shares_ranking: where several steps look at one grid, the first ranks its patches for all:
        smaller budgets keep the first of them.
        """
        found = []
        for number, step in enumerate(self.steps):
            earlier, later = self.steps[:number], self.steps[number + 1 :]
            goes_on = bool(earlier) and step.goes_on(earlier[-1])
            ranked = shares_ranking and any(one.covers(step) for one in earlier)
            covered = [one for one in later if step.covers(one)]
            ranks = shares_ranking and bool(covered) and not ranked
            found.append(
                Pass(
                    step=step,
                    start=earlier[-1].views if goes_on else 0,
                    stop=step.views or views,
                    ranked_budget=max(one.budget for one in [step, *covered]) if ranks else 0,
                    takes_ranking=ranked and not goes_on,
                    later_grids=frozenset(one.grid for one in later),
                )
            )
        return found

    def added_views(self, views: int) -> list[int]:
        """How many views each step looks at that the one before has not, of videos of `views`."""
        return [own.stop - own.start for own in self.passes(views, shares_ranking=False)]

    def to_json(self) -> dict[str, Any]:
        """{"confidence", "steps": [{fields of `Step`}]}."""
        return {"confidence": self.confidence, "steps": [asdict(step) for step in self.steps]}


def averaged(own: np.ndarray, before: np.ndarray | None, weight: float) -> np.ndarray:
    """The average of a step's probabilities [n, C] and those before; see `Step.weight`."""
    if before is None or weight == 1:
        return own
    return before + weight * (own - before)


def confidence(
    kind: str, average: np.ndarray, own: np.ndarray, before: np.ndarray | None
) -> np.ndarray:
    """How sure an average [n, C] is, float [n], 0 to 1: see `Cascade`.

    own: the step's probabilities; before: the average without them.
    """
    if kind == "entropy":
        logs = np.log(np.maximum(average, np.finfo(np.float32).tiny))
        return 1 + (average * logs).sum(axis=1) / math.log(max(average.shape[1], 2))
    largest = average.max(axis=1)
    if kind == "margin" and average.shape[1] > 1:
        return largest - np.partition(average, -2, axis=1)[:, -2]
    if kind == "agreement" and before is not None:
        return np.where(own.argmax(axis=1) == before.argmax(axis=1), largest, 0.0)
    return largest


def check_steps(steps: Sequence[Step], model: "FluxViTConfig", source: str) -> None:
    """Raises UserError, which begins with `source`, for a step that a network cannot run."""
    for number, step in enumerate(steps, 1):
        if problem := _problem(step, model):
            raise UserError(f"{source}: step {number}: {problem}")


def _problem(step: Step, model: "FluxViTConfig") -> str:
    """Why a network cannot run a step; "" if it can."""
    if not 0 <= step.head < model.budgets:
        return f"the network has no head {step.head}"
    if step.resolution % PATCH:
        return f"{step.resolution} px is no multiple of {PATCH}"
    patches = step.budget - (model.cls == "inside")
    if patches < 1:
        return f"a budget of {step.budget} tokens leaves no patch"
    tokens = Grid.square(*step.grid).tokens
    if model.selector == "none" and patches < tokens:
        return f"the network selects nothing, and {tokens} patches are too many for {step.budget}"
    return ""


# ---------------------------------------------------------------------------------------------
# Cascades in files


def from_json(described: Any, source: str) -> Cascade:
    """The cascade of `Cascade.to_json`, or one written by hand.

    Raises UserError, which begins with `source`: it is none, a step lacks something, or the steps
    are not in order.
    """
    if not isinstance(described, Mapping) or not isinstance(described.get("steps"), list):
        raise UserError(f'{source}: is no cascade: {{"confidence": ..., "steps": [...]}}')
    kind = described.get("confidence", "probability")
    if kind not in CONFIDENCES:
        raise UserError(f"{source}: confidence is one of {', '.join(CONFIDENCES)}, not {kind!r}")
    if not described["steps"]:
        raise UserError(f"{source}: has no steps")
    steps = [
        _step(own, f"{source}: step {number}", last=number == len(described["steps"]))
        for number, own in enumerate(described["steps"], 1)
    ]
    _check_order(steps, source)
    return Cascade(tuple(steps), kind)


def read(path: str | os.PathLike) -> Cascade:
    """The cascade in a JSON file. Raises UserError: it cannot be read, or as `from_json`."""
    try:
        described = storage.parse_json(storage.path_of(os.fspath(path)).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a cascade: {error}") from error
    return from_json(described, os.fspath(path))


def write(cascade: Cascade, path: str | os.PathLike) -> None:
    """Writes a cascade as a JSON file. Raises OSError."""
    text = json.dumps(cascade.to_json(), indent=1)
    storage.path_of(os.fspath(path)).write_text(text + "\n")


def _step(described: Any, source: str, last: bool) -> Step:
    names = {field.name for field in fields(Step)}
    if not isinstance(described, Mapping):
        raise UserError(f"{source}: is no object with the fields {', '.join(sorted(names))}")
    if unknown := sorted(described.keys() - names):
        raise UserError(
            f"{source}: has no field {unknown[0]!r}; there are {', '.join(sorted(names))}"
        )
    for name in ("budget", "frames", "resolution", "head"):
        if name not in described:
            raise UserError(f"{source}: lacks {name!r}")
    for name, value in described.items():
        if name == "cell":
            continue
        allowed = int if name in ("budget", "frames", "resolution", "head", "views") else float
        least = 0 if name in ("head", "views", "threshold") else 1 if allowed is int else 1e-9
        if value is None and name == "threshold":
            continue
        if isinstance(value, bool) or not isinstance(value, int | allowed) or not value >= least:
            raise UserError(f"{source}: {name} is a number of at least {least}, not {value!r}")
    step = Step(**described)
    if step.resolution % PATCH:
        raise UserError(
            f"{source}: resolution is a multiple of the patch size {PATCH}, not {step.resolution}"
        )
    if step.weight > 1:
        raise UserError(f"{source}: weight is above 0 and at most 1, not {step.weight}")
    if last and step.threshold is not None:
        raise UserError(f"{source}: is the last, where every video stops; take its threshold out")
    if not last and step.threshold is None:
        raise UserError(f"{source}: lacks a threshold, the confidence with which a video stops")
    return step


def _check_order(steps: Sequence[Step], source: str) -> None:
    """Raises UserError unless budgets, or views of one cell, rise from step to step."""
    for number, (step, following) in enumerate(itertools.pairwise(steps), 2):
        more_views = step.views and (following.views == 0 or following.views > step.views)
        if following.goes_on(step) and not more_views:
            raise UserError(f"{source}: step {number} is the one before again")
        if following.budget < step.budget:
            raise UserError(
                f"{source}: steps are out of order: step {number} has {following.budget} tokens, "
                f"fewer than the {step.budget} before it"
            )
