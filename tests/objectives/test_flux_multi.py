"""The Flux-Multi loss, its terms and its gradients against the official training code."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fluxvit_jax.config.grids import admissible_grids
from fluxvit_jax.config.network import model_config
from fluxvit_jax.convert import official_names
from fluxvit_jax.models import fluxvit
from fluxvit_jax.models.token_selection import GridLimits
from fluxvit_jax.objectives.flux_multi import (
    FluxMulti,
    binary_cross_entropy,
    cross_entropy,
    smooth_l1,
)
from fluxvit_jax.training.train_step import make_objective
from tests import tiny
from tests.models import golden

CASES = golden.manifest("loss_case")["cases"]


class Prepared(FluxMulti):
    """The objective on clips and soft targets that are already prepared, as the case has them."""

    def _augmented(self, batch, keys):
        return batch["patches"], batch["targets"]


@pytest.mark.parametrize(
    ("case", "padding", "scan"),
    [(case, 30, True) for case in CASES] + [(CASES[0], 0, False)],
    ids=lambda value: value["id"] if isinstance(value, dict) else str(value),
)
def test_loss_and_gradients(case, padding, scan):
    """The gradients of three budgets, added in turn, are those of the sum of all losses."""
    model = replace(golden.TINY, scan=scan)
    stored = golden.arrays("loss_case")
    video = stored[f"{case['id']}.x"]
    patches, grid = golden.batch(video, case["total_tokens"] + padding)
    objective = Prepared(
        graph=fluxvit.graphdef(model),
        limits=golden.limits_of(tuple(grid[0].tolist())),
        budgets=tuple(case["budgets"]),
        classes=10,
        group=len(video),
        rounding="official",
    )
    batch = {
        "patches": patches,
        "grid": grid,
        "targets": stored[f"{case['id']}.targets"],
        "key": jax.random.split(jax.random.key(0), len(video)),
    }
    params = fluxvit.prepare_params(golden.tiny_params(), model)
    gradients, metrics = jax.jit(objective.value_and_grad)(params, {}, batch)

    def close(ours, official):
        np.testing.assert_allclose(ours, official, rtol=1e-5)

    close(metrics["loss"], case["loss_f64"])
    for i, budget in enumerate(case["budgets"]):
        close(metrics[f"ce_{budget}"], case["ce"][i])
        if i:
            close(metrics[f"align_{budget}"], case["align"][i - 1])

    ours = official_names.to_official(fluxvit.stack_layers(gradients))
    norm = np.sqrt(sum(float(np.sum(np.square(g, dtype=np.float64))) for g in ours.values()))
    close(norm, case["grad_global_l2_f64"])
    for name, length in case["all_grad_l2"].items():
        if name not in case["zero_grad_params"]:
            close(np.linalg.norm(ours[name].astype(np.float64)), length)
    for name in case["grads_saved"]:
        official = stored[f"{case['id']}.grad.{name}"]
        if name not in case["zero_grad_params"]:
            error = np.linalg.norm(ours[name].reshape(official.shape) - official)
            assert error <= 1e-5 * np.linalg.norm(official), name


def test_class_weights():
    """Against the formula in NumPy; a weight of 2 for all doubles the official cross entropy."""
    rng = np.random.default_rng(0)
    logits, weights = rng.normal(size=(6, 4)), rng.uniform(0.2, 3, 4)
    targets = rng.dirichlet(np.ones(4), 6)  # as mixup leaves them
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    expected = -(weights * targets * log_p).sum(axis=1).mean()
    own = cross_entropy(jnp.asarray(logits), jnp.asarray(targets), tuple(weights.tolist()))
    np.testing.assert_allclose(own, expected, rtol=1e-5)

    case, stored = CASES[0], golden.arrays("loss_case")
    video = stored[f"{case['id']}.x"]
    patches, grid = golden.batch(video, case["total_tokens"])
    objective = Prepared(
        graph=fluxvit.graphdef(golden.TINY),
        limits=golden.limits_of(tuple(grid[0].tolist())),
        budgets=tuple(case["budgets"][:1]),
        classes=10,
        group=len(video),
        rounding="official",
    ).weighted([2.0] * 10)
    batch = {"patches": patches, "grid": grid, "targets": stored[f"{case['id']}.targets"]}
    batch["key"] = jax.random.split(jax.random.key(0), len(video))
    params = fluxvit.prepare_params(golden.tiny_params(), golden.TINY)
    _, metrics = jax.jit(objective.value_and_grad)(params, {}, batch)
    np.testing.assert_allclose(metrics["loss"], 2 * case["ce"][0], rtol=1e-5)


def test_binary_cross_entropy():
    """Against optax and by hand, with mixed targets and logits that saturate."""
    assert binary_cross_entropy(jnp.zeros((3, 5)), jnp.ones((3, 5))) == pytest.approx(np.log(2))
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(0, 3, (6, 4)), rng.uniform(size=(6, 4))
    logits[0, :2], targets[0, :2] = (200, -200), (0, 0)
    logits, targets = jnp.asarray(logits), jnp.asarray(targets)
    value, gradient = jax.value_and_grad(binary_cross_entropy)(logits, targets)
    expected = optax.sigmoid_binary_cross_entropy(logits, targets).mean()
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    by_hand = (jax.nn.sigmoid(logits) - targets) / logits.size
    np.testing.assert_allclose(gradient, by_hand, rtol=1e-5, atol=1e-9)


def test_several_labels_are_mixed():
    """Each clip's targets with those of its mirror, at a share that the pair has in common."""
    config = tiny.make_config(
        "", train__multi_label=True, train__label_smoothing=0.0, train__random_erasing=0.0,
        train__cutmix=0.0, train__mixup_probability=1.0,
    )  # fmt: skip
    objective = make_objective(config, admissible_grids(config), "cpu")
    labels = np.array([[1, 1, 0, 0], [0, 1, 0, 1]], np.uint8)
    batch = {
        "patches": jnp.zeros((2, 99, fluxvit.PATCH_VALUES), jnp.uint8),
        "grid": jnp.tile(jnp.int32([11, 3, 3]), (2, 1)),
        "label": jnp.asarray(labels),
    }
    _, targets = jax.jit(objective._augmented)(batch, jax.random.split(jax.random.key(1), 2))
    share = float(targets[0, 0])
    assert 0.001 < share < 0.999
    np.testing.assert_allclose(targets, share * labels + (1 - share) * labels[::-1], rtol=1e-6)


@pytest.mark.parametrize("scan", [True, False])
def test_what_the_passes_read(scan):
    """Kernels of the blocks in the compute dtype, layers apart where they are not scanned."""
    params = golden.tiny_params()
    model = replace(golden.TINY, scan=scan, dtype="bfloat16")
    found = fluxvit.prepare_params(params, model)
    for path, leaf in jax.tree_util.tree_leaves_with_path(found):
        kernel = path[0].key == "blocks" and path[-1 if scan else -2].key == "kernel"
        assert leaf.dtype == (jnp.bfloat16 if kernel else jnp.float32), path
    assert isinstance(found["blocks"]["mlp"]["fc1"]["kernel"], jax.Array if scan else tuple)
    again = fluxvit.stack_layers(found)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    for own, other in zip(jax.tree.leaves(again), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(own, other, rtol=2**-8)


def three_budgets(kind: type[FluxMulti], grid) -> FluxMulti:
    """The objective for the clips of one grid of `golden.batch`."""
    return kind(
        graph=fluxvit.graphdef(golden.TINY),
        limits=golden.limits_of(tuple(grid[0].tolist())),
        budgets=(24, 17, 8),
        classes=10,
        group=3,
    )


def test_an_exact_budget_needs_one_sort():
    """Three budgets of one selection are what three selections give."""
    video = golden.arrays("loss_case")["c1.x"]
    patches, grid = golden.batch(video)
    objective = three_budgets(FluxMulti, grid)
    model = golden.tiny_model(rounding="exact")

    @jax.jit
    def both_ways(patches):
        shared = objective._selections(golden.tiny_params(), patches, grid, None)
        each = [model.select(patches, grid, n, objective.limits) for n in objective.budgets]
        return shared, each

    for budget, kept, alone in zip(objective.budgets, *both_ways(patches), strict=True):
        same = jnp.sort(kept.token_index[:, :budget]) == jnp.sort(alone.token_index)
        assert bool(same.all())


@pytest.mark.slow
def test_the_weight_of_the_alignment():
    """It multiplies the distance of the smaller budget's vector, in loss, metric and gradient."""
    quiet = dict.fromkeys(
        ("train__mixup", "train__cutmix", "train__random_erasing", "model__drop_path"), 0.0
    )
    rng = np.random.default_rng(0)
    batch = {
        "patches": rng.integers(0, 256, (2, 99, fluxvit.PATCH_VALUES), dtype=np.uint8),
        "grid": np.tile(np.int32([11, 3, 3]), (2, 1)),
        "label": np.int32([1, 2]),
        "key": jax.random.split(jax.random.key(0), 2),
    }
    model = model_config(tiny.make_config("", **quiet))
    params = fluxvit.init_params(model, jax.random.key(0))
    shape = params["align"]["head"]["kernel"].shape
    params["align"]["head"]["kernel"] = rng.normal(size=shape).astype(np.float32)

    def run(weight: float):
        config = tiny.make_config("", train__align_weight=weight, **quiet)
        objective = make_objective(config, admissible_grids(config), "cpu")
        return jax.jit(objective.value_and_grad)(params, {}, batch)

    def term(projector):
        network = fluxvit.from_params(fluxvit.graphdef(model), params | {"align": projector})
        patches, limits = fluxvit.normalize(batch["patches"]), GridLimits(11, 3, 3, 99)
        large, small = (
            network(patches, batch["grid"], budget, head, limits)[1]
            for head, budget in enumerate((24, 12))
        )
        apart = network.project(small, 0) - large / jnp.linalg.norm(large, axis=1, keepdims=True)
        return jnp.mean(jnp.where(abs(apart) < 1, apart**2 / 2, abs(apart) - 0.5))

    expected, gradient = jax.jit(jax.value_and_grad(term))(params["align"])
    (_, without), (gradients, twice) = run(0.0), run(2.0)
    assert expected > 1e-3 and "align_12" not in without
    assert twice["align_12"] == pytest.approx(2 * float(expected), rel=1e-4)
    assert twice["loss"] - without["loss"] == pytest.approx(2 * float(expected), rel=1e-2)
    for own, single in zip(*map(jax.tree.leaves, (gradients["align"], gradient)), strict=True):
        np.testing.assert_allclose(own, 2 * single, rtol=1e-3, atol=1e-7)


def test_smooth_l1():
    """Half the square up to 1, from there on a line that goes on as steeply."""
    distances = jnp.array([[0.0, 0.5, 1.0], [-3.0, 2.0, -0.2]])
    expected = (0 + 0.125 + 0.5 + 2.5 + 1.5 + 0.02) / 6
    assert smooth_l1(distances, jnp.zeros((2, 3))) == pytest.approx(expected, rel=1e-6)
    assert smooth_l1(distances + 4, jnp.full((2, 3), 4.0)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_every_budget_drops_paths_of_its_own(rate):
    """Two budgets that keep all tokens, with equal heads: only drop path tells them apart."""
    config = replace(golden.TINY, drop_path=rate, layer_scale=1.0)
    params = fluxvit.init_params(config, jax.random.key(0))
    for branch in ("pool", "heads"):
        params[branch] = jax.tree.map(lambda x: jnp.stack([x[0]] * 3), params[branch])
    objective = FluxMulti(
        graph=fluxvit.graphdef(config),
        limits=GridLimits(4, 2, 2, 16),
        budgets=(24, 20),
        classes=10,
        group=1,
        drop_path=rate > 0,
    )
    rng = np.random.default_rng(0)
    batch = {
        "patches": rng.integers(0, 256, (2, 16, fluxvit.PATCH_VALUES), dtype=np.uint8),
        "grid": np.tile(np.int32([4, 2, 2]), (2, 1)),
        "label": np.int32([3, 7]),
        "key": jax.random.split(jax.random.key(0), 2),
    }
    _, metrics = jax.jit(objective.value_and_grad)(params, {}, batch)
    apart = abs(metrics["ce_24"] - metrics["ce_20"])
    assert apart > 1e-4 if rate else apart < 1e-6
