"""Optimiser groups and schedules against the official code; AdamW against a plain reading."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fluxvit_jax.config.fields import default_config
from fluxvit_jax.convert.official_names import from_official, to_official
from fluxvit_jax.training.optimizer import (
    decay_mask,
    ema_update,
    layer_ids,
    learning_rate_scales,
    learning_rates,
    make_optimizer,
    schedule,
)

GOLDEN = Path(__file__).parents[1] / "golden"
CASE = json.loads((GOLDEN / "optim_case.json").read_text())


@pytest.fixture(scope="module")
def params() -> dict:
    with np.load(GOLDEN / "tiny_state.npz") as file:
        return from_official(dict(file), heads=3)


def by_official_name(tree: dict, params: dict) -> dict[str, float]:
    """A tree of numbers broadcast to the parameters, under the official names."""
    full = jax.tree.map(lambda x, p: np.broadcast_to(np.asarray(x), p.shape), tree, params)
    values = {name: np.unique(tensor) for name, tensor in to_official(full).items()}
    assert all(len(value) == 1 for value in values.values())
    return {name: value.item() for name, value in values.items()}


def test_groups_equal_the_official(params):
    golden = CASE["param_groups_tiny"]["params"]
    ids = by_official_name(layer_ids(params), params)
    scales = by_official_name(learning_rate_scales(params, 0.75), params)
    decayed = by_official_name(decay_mask(params), params)
    assert ids == {name: group["layer_id"] for name, group in golden.items()}
    assert scales == {name: group["lr_scale"] for name, group in golden.items()}
    assert decayed == {name: group["weight_decay"] > 0 for name, group in golden.items()}


def test_without_layer_decay(params):
    golden = CASE["param_groups_tiny_no_layer_decay"]
    decayed = by_official_name(decay_mask(params), params)
    assert {name for name in decayed if decayed[name]} == set(golden["decay_params"])
    assert set(by_official_name(learning_rate_scales(params, 1.0), params).values()) == {1.0}


@pytest.mark.parametrize("case", CASE["cosine_scheduler"], ids=lambda case: str(case["kwargs"]))
def test_schedule_equals_the_official(case):
    kwargs = case["kwargs"]
    per_epoch = kwargs["niter_per_ep"]
    warmup_steps = kwargs.get("warmup_steps", int(kwargs.get("warmup_epochs", 0) * per_epoch))
    got = schedule(
        kwargs["base_value"],
        kwargs["final_value"],
        kwargs.get("start_warmup_value", 0),
        kwargs["epochs"] * per_epoch,
        warmup_steps,
    )
    np.testing.assert_allclose(got, case["values"], rtol=1e-14, atol=0)


def test_schedule_of_warmup_alone():
    np.testing.assert_allclose(schedule(1.0, 0.0, 0.0, 3, 9), [0, 0.5, 1])


def small_config():
    config = default_config()
    config.optim.learning_rate = 0.01
    config.optim.layer_decay = 0.75
    config.optim.weight_decay = 0.05
    config.optim.eps = 1e-6
    config.optim.clip_norm = 1.0
    config.train.epochs = 2
    config.train.warmup_epochs = 1
    return config


def test_more_epochs_leave_the_warmup_as_it_is():
    config = default_config("Ti")
    config.train.warmup_epochs = 0.7
    for steps in (10, 90):  # of an epoch
        for epochs in range(1, 30):
            config.train.epochs = epochs
            rates = learning_rates(config, steps * epochs)
            assert int(np.argmax(rates)) + 1 == round(0.7 * steps)


def test_adamw_step_by_step(params):
    """Five steps against AdamW written out in float64, each official tensor in its group."""
    config, steps = small_config(), 6
    optimizer = make_optimizer(config, steps, params)
    rates = learning_rates(config, steps)
    np.testing.assert_allclose(rates[:4], [1e-6, (0.01 + 1e-6) / 2, 0.01, 0.01])

    state, now = optimizer.init(params), jax.tree.map(jnp.asarray, params)
    update = jax.jit(optimizer.update)
    groups = CASE["param_groups_tiny"]["params"]
    expected = {name: x.astype(np.float64) for name, x in to_official(params).items()}
    first = {name: np.zeros_like(x) for name, x in expected.items()}
    second = {name: np.zeros_like(x) for name, x in expected.items()}
    rng = np.random.default_rng(0)
    for step in range(5):
        size = 10.0 if step % 2 else 1e-3  # clipped, not clipped
        grads = jax.tree.map(
            lambda x, size=size: rng.normal(0, size, x.shape).astype(np.float32), params
        )
        updates, state = update(grads, state, now)
        now = optax.apply_updates(now, updates)

        official = {name: x.astype(np.float64) for name, x in to_official(grads).items()}
        norm = np.sqrt(sum(np.sum(g**2) for g in official.values()))
        assert (norm > 1) == bool(step % 2)
        for name, grad in official.items():
            grad = grad * min(1, 1 / norm)
            rate = rates[step] * groups[name]["lr_scale"]
            first[name] = 0.9 * first[name] + 0.1 * grad
            second[name] = 0.999 * second[name] + 0.001 * grad**2
            root = np.sqrt(second[name] / (1 - 0.999 ** (step + 1))) + 1e-6
            expected[name] *= 1 - rate * groups[name]["weight_decay"]
            expected[name] -= rate * first[name] / (1 - 0.9 ** (step + 1)) / root
    for name, tensor in to_official(now).items():
        np.testing.assert_allclose(tensor, expected[name], rtol=1e-4, atol=1e-6, err_msg=name)


def test_optimizer_from_shapes_alone(params):
    """Sharded initialisation knows only shapes; the state's structure is the same."""
    shapes = jax.eval_shape(lambda: params)
    optimizer = make_optimizer(small_config(), 6, shapes)
    abstract = jax.eval_shape(optimizer.init, shapes)
    assert jax.tree.structure(abstract) == jax.tree.structure(optimizer.init(params))


def test_moving_average():
    average, params = {"a": jnp.array([1.0, 2.0])}, {"a": jnp.array([3.0, 2.0])}
    np.testing.assert_allclose(ema_update(average, params, 0.75)["a"], [1.5, 2.0])
