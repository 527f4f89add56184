"""Rules of motion: what a score is, and the search for thresholds against brute force."""

import itertools
import math

import jax
import numpy as np
import pytest

from fluxvit_jax.adaptive import motion, planner
from fluxvit_jax.adaptive.cascade import Step
from fluxvit_jax.adaptive.motion import MotionRule
from fluxvit_jax.adaptive.motion_scores import scorer
from fluxvit_jax.config.network import model_config
from fluxvit_jax.data.patches import patchify
from fluxvit_jax.distributed.mesh import make_mesh
from fluxvit_jax.errors import UserError
from fluxvit_jax.grids import Grid
from fluxvit_jax.models import fluxvit
from tests import tiny

VIDEOS = 11
STEPS = [Step(budget=b, frames=4, resolution=28, head=0, cell=f"c{b}") for b in (8, 16, 32)]
COSTS = [1.0, 2.5, 6.0]


def test_routes():
    rule = MotionRule(tuple(STEPS), (0.5, 0.7), True, (4, 28))
    scores = np.array([0.1, 0.6, 0.9, 0.5])
    assert rule.route(scores).tolist() == [0, 1, 2, 1]
    falling = MotionRule(tuple(STEPS), (0.5, 0.7), False, (4, 28))
    assert falling.route(scores).tolist() == [2, 1, 0, 1]
    assert motion.from_json(rule.to_json()) == rule
    with pytest.raises(UserError, match="rule of motion in the report is damaged"):
        motion.from_json({"steps": [{}]})


def test_a_step_that_was_not_timed_is_above_every_limit_even_if_no_clip_takes_it():
    cells = {cell: {"gflops": 1.0, "milliseconds": 2.0} for cell in ("c8", "c16")}
    report = {"cells": cells, "devices": {"cpu": {"cells": {"c8": cells["c8"]}}}}
    rule = {
        "steps": [{"cell": "c8"}, {"cell": "c16"}],
        "choose": {"shares": [1.0, 0.0], "average_gflops": 1.0},
    }
    costs = planner._rule_costs(report, rule, "cpu")
    assert costs["average_milliseconds"] == costs["milliseconds"] == math.inf
    assert costs["average_gflops"] == costs["gflops"] == 1.0


@pytest.mark.parametrize("seed", range(3))
def test_nothing_beats_the_front_and_it_keeps_what_it_promises(seed):
    draw = np.random.default_rng(seed)
    scores = draw.random(VIDEOS)
    right = [draw.random(VIDEOS) < share for share in (0.4, 0.6, 0.8)]

    def measure(rule: MotionRule) -> tuple[float, float]:
        own = [STEPS.index(step) for step in rule.steps]
        cells = np.array(own)[rule.route(scores)]
        hits = np.array(right)[cells, np.arange(VIDEOS)]
        return float(np.array(COSTS)[cells].mean()), float(hits.mean())

    found = motion.front(STEPS, COSTS, right, scores, (4, 28))
    assert found
    for one in found:
        assert measure(one.rule) == pytest.approx((one.cost, one.right))
    edges = np.linspace(-0.01, 1.01, 25)
    for count in (2, 3):
        for cells in itertools.combinations(STEPS, count):
            for thresholds in itertools.combinations(edges, count - 1):
                for rising in (True, False):
                    rule = MotionRule(cells, thresholds, rising, (4, 28))
                    if len(set(rule.route(scores))) < count:
                        continue  # some cell is asked nothing
                    cost, share = measure(rule)
                    assert any(
                        one.cost <= cost + 1e-9 and one.right >= share - 1e-9 for one in found
                    )


def test_rules_are_credited_with_less_than_their_accuracy():
    scores, cells = np.arange(40.0), STEPS[:2]
    right = [scores < 36, scores >= 4]  # less motion is for the first cell, more for the second

    def found(threshold: float, cost: float) -> motion.FoundRule:
        rule = MotionRule(tuple(cells), (threshold,), True, (4, 28))
        answers = np.where(scores < threshold, right[0], right[1])
        return motion.FoundRule(rule=rule, cost=cost, right=float(answers.mean()))

    rules = [found(0.5, 1.0), found(20.0, 1.5), found(3.5, 2.0)]
    kept = motion.credited(rules, cells, right, scores)
    assert [one.cost for one in kept] == [1.0, 1.5]
    gain = np.arange(40) < 4  # over the best cell
    assert kept[1].right == pytest.approx(1.0 - gain.std(ddof=1) / 40**0.5)


def test_the_score_is_how_much_moves(tiny_data):
    """Nothing in a still clip; twice as many moving patches score twice as much."""
    config = tiny.make_config(tiny_data)
    model, mesh, grid = model_config(config), make_mesh(config), Grid.square(4, 42)
    params = fluxvit.init_params(model, jax.random.key(0))
    score = scorer(model, grid, params, 0, mesh)
    still = np.broadcast_to(
        np.random.default_rng(0).integers(0, 256, (1, 42, 42, 3), np.uint8), (4, 42, 42, 3)
    ).copy()
    noise = np.random.default_rng(1).integers(0, 256, (4, 42, 42, 3), np.uint8)
    row, rows = still.copy(), still.copy()
    row[:, :14], rows[:, :28] = noise[:, :14], noise[:, :28]
    found = score(np.stack([patchify(clip) for clip in (still, row, rows, noise)]))
    assert found[0] == pytest.approx(0, abs=1e-6)
    assert found[1] < found[2] < found[3]
    assert found[3] == pytest.approx(3 * found[1], rel=0.3)
