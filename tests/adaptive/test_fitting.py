"""The search for cascades against brute force over everything that it may choose."""

import itertools
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from fluxvit_jax.adaptive import fitting
from fluxvit_jax.adaptive.cascade import CONFIDENCES, Cascade, Step
from fluxvit_jax.adaptive.fitting import Entry

VIDEOS, CLASSES = 9, 3
THRESHOLDS = [*np.linspace(0, 1, 23).tolist(), 2.0]


def make_entries(seed: int) -> tuple[list[Entry], np.ndarray]:
    """Three cells, the dearer the better, the last two of one grid, and the labels."""
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, CLASSES, VIDEOS)
    entries = []
    for number, (budget, frames, cost) in enumerate([(8, 4, 1.0), (16, 6, 2.5), (32, 6, 6.0)]):
        scores = draw.normal(size=(VIDEOS, CLASSES))
        scores[np.arange(VIDEOS), labels] += 0.3 + 0.8 * number
        odds = np.exp(scores)
        step = Step(
            budget=budget,
            frames=frames,
            resolution=28,
            head=0,
            temperature=0.8 + 0.3 * number,
            cell=f"cell-{number}",
        )
        probabilities = (odds / odds.sum(axis=1, keepdims=True)).astype(np.float32)
        entries.append(Entry(step=step, probabilities=probabilities, cost=cost, shared=0.5))
    return entries, labels


def measure(cascade: Cascade, entries: list[Entry], labels: np.ndarray) -> tuple[float, float]:
    """Mean cost and accuracy of a cascade, by running it."""
    by_name = {entry.step.cell: entry for entry in entries}
    own = [by_name[step.cell] for step in cascade.steps]
    answers = cascade.run(len(labels), lambda number, videos: own[number].probabilities[videos])
    grids = [step.grid for step in cascade.steps]
    costs = [e.cost - e.shared * (e.step.grid in grids[:k]) for k, e in enumerate(own)]
    right = (answers.probabilities.argmax(axis=1) == labels).mean()
    return float(np.cumsum(costs)[answers.step].mean()), float(right)


def all_cascades(entries: list[Entry]) -> Iterator[Cascade]:
    """All with one or two steps over a lattice of thresholds."""
    for entry in entries:
        yield Cascade((replace(entry.step, temperature=1.0),))
    for first, last in itertools.combinations(entries, 2):
        for kind, weight, t in itertools.product(CONFIDENCES, (1.0, 0.5), THRESHOLDS):
            steps = replace(first.step, threshold=t), replace(last.step, weight=weight)
            yield Cascade(steps, kind)


@pytest.mark.parametrize("seed", range(4))
def test_nothing_beats_the_front_and_it_keeps_what_it_promises(seed):
    entries, labels = make_entries(seed)
    found = fitting.front(entries, labels, max_steps=2)
    for one in found:
        assert measure(one.cascade, entries, labels) == pytest.approx((one.cost, one.right))
    tried = [measure(cascade, entries, labels) for cascade in all_cascades(entries)]
    for cost, right in tried:
        assert any(one.cost <= cost + 1e-9 and one.right >= right - 1e-9 for one in found)
    for earlier, later in itertools.pairwise(found):
        assert earlier.cost < later.cost and earlier.right < later.right


def test_three_steps_are_swept_over_both_thresholds():
    """Every pair of thresholds of one rule, run one by one: the same front."""
    entries, labels = make_entries(12)
    found = fitting.front(entries, labels, max_steps=3, confidences=["margin"])
    assert any(len(one.cascade.steps) == 3 for one in found)
    for one in found:
        assert measure(one.cascade, entries, labels) == pytest.approx((one.cost, one.right))
    for first, second in itertools.product(THRESHOLDS, THRESHOLDS):
        steps = (
            replace(entries[0].step, threshold=first),
            replace(entries[1].step, weight=0.5, threshold=second),
            replace(entries[2].step, weight=1 / 3),
        )
        cost, right = measure(Cascade(steps, "margin"), entries, labels)
        assert any(one.cost <= cost + 1e-9 and one.right >= right - 1e-9 for one in found)


def test_few_cuts_stay_on_the_safe_side():
    """With fewer thresholds the front promises no more than it holds."""
    entries, labels = make_entries(3)
    whole = fitting.front(entries, labels, max_steps=3)
    few = fitting.front(entries, labels, max_steps=3, max_cuts=3)
    for one in few:
        assert measure(one.cascade, entries, labels) == pytest.approx((one.cost, one.right))
        assert any(own.cost <= one.cost + 1e-9 and own.right >= one.right - 1e-9 for own in whole)


def test_views_of_one_cell_cost_only_what_is_new():
    step = Step(budget=8, frames=4, resolution=28, head=0, cell="a")
    none = np.zeros((0, CLASSES), np.float32)
    entries = [
        Entry(step=replace(step, views=views), probabilities=none, cost=cost, shared=0.1)
        for views, cost in ((1, 1.0), (4, 4.0), (0, 12.0))
    ]
    assert fitting.costs_of(entries) == [1, 3, 8]


def test_steps_rise_in_cost_and_do_not_fall_in_budget():
    """The dearest cell has the fewest tokens, of a large grid: nothing follows or precedes it."""
    entries, labels = make_entries(0)
    entries[0] = replace(entries[0], cost=9.0)
    for one in fitting.front(entries, labels):
        costs = [{e.step.cell: e.cost for e in entries}[s.cell] for s in one.cascade.steps]
        assert costs == sorted(costs)
        assert "cell-0" not in [s.cell for s in one.cascade.steps] or len(costs) == 1


def two_cells(first_right: list[bool], last_right: list[bool], sure: list[bool]):
    """A cheap and a dear cell with known answers, and one as cheap as a cascade of them."""
    labels = np.zeros(len(sure), int)

    def entry(name: str, right: list[bool], cost: float, sure: list[bool]) -> Entry:
        own = np.where(sure, 0.9, 0.6)
        table = np.stack([np.where(right, own, 1 - own), np.where(right, 1 - own, own)], axis=1)
        step = Step(budget=8, frames=4, resolution=28, head=0, cell=name)
        return Entry(step=step, probabilities=table.astype(np.float32), cost=cost)

    return [entry("cheap", first_right, 1.0, sure), entry("dear", last_right, 3.0, sure)], labels


@pytest.mark.parametrize(("gained", "stays"), [(1, False), (3, True)])
def test_a_cascade_that_is_hardly_better_than_a_cell_does_not_stay(gained, stays):
    """Of 40 videos each cell misses some that the other knows, and a cascade knows them all.

    It gains one over the better cell, no more than a standard error, or three.
    """
    doubtful = [number < 4 for number in range(40)]
    dear_misses = [4 <= number < 4 + gained for number in range(40)]
    first, last = ([not one for one in own] for own in (doubtful, dear_misses))
    entries, labels = two_cells(first, last, first)
    found = fitting.front(entries, labels, confidences=["probability"])
    assert found[-1].right == 1.0 and len(found[-1].steps) == 2
    entries[1] = replace(entries[1], cost=found[-1].cost)  # level in cost with the cascade
    kept = fitting.credited(found, entries, labels)
    assert any(len(one.steps) == 2 for one in kept) == stays
    if not stays:  # the dear cell, which the cascade had beaten, is back
        assert [one.steps[0].cell for one in kept] == ["cheap", "dear"]


def test_credit_is_accuracy_less_a_standard_error_of_the_paired_difference():
    best, other = np.arange(10) < 8, np.arange(10) < 5
    right = np.arange(10) < 9
    assert fitting.credit(right, [other, best]) == pytest.approx(0.9 - 0.1)
    assert fitting.credit(best, [other, best]) == 0.8


def test_single_cells_stay():
    entries, labels = make_entries(0)
    singles = fitting.front(entries, labels, max_steps=1)
    assert fitting.credited(singles, entries, labels) == singles
