"""The Flux-Multi loss, its terms and its gradients against the official training code."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fluxvit_jax.convert import names
from fluxvit_jax.models import fluxvit
from fluxvit_jax.models.layers import l2_normalise
from fluxvit_jax.objectives.supervised import Supervised
from tests.models import golden

CASES = golden.manifest("loss_case")["cases"]


class Prepared(Supervised):
    """The objective on clips and soft targets that are already prepared, as the case has them."""

    def _augmented(self, batch, keys):
        return batch["patches"], batch["targets"]


@pytest.mark.parametrize(
    ("case", "padding", "scan"),
    [(case, padding, True) for case in CASES for padding in (0, 30)] + [(CASES[0], 0, False)],
    ids=lambda value: value["id"] if isinstance(value, dict) else str(value),
)
def test_loss_and_gradients(case, padding, scan):
    model = replace(golden.TINY, scan=scan)
    stored = golden.arrays("loss_case")
    video = stored[f"{case['id']}.x"]
    patches, grid = golden.batch(video, case["total_tokens"] + padding)
    objective = Prepared(
        graph=fluxvit.structure(model),
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
    params = fluxvit.for_passes(golden.tiny_params(), model)
    gradients, metrics = jax.jit(objective.gradients)(params, {}, batch)

    def close(ours, official):
        np.testing.assert_allclose(ours, official, rtol=1e-5)

    close(metrics["loss"], case["loss_f64"])
    for i, budget in enumerate(case["budgets"]):
        close(metrics[f"ce_{budget}"], case["ce"][i])
        if i:
            close(metrics[f"align_{budget}"], case["align"][i - 1])

    ours = names.to_official(fluxvit.stack_layers(gradients))
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


@pytest.mark.parametrize("scan", [True, False])
def test_what_the_passes_read(scan):
    """Kernels of the blocks in the compute dtype, layers apart where they are not scanned."""
    params = golden.tiny_params()
    model = replace(golden.TINY, scan=scan, dtype="bfloat16")
    found = fluxvit.for_passes(params, model)
    for path, leaf in jax.tree_util.tree_leaves_with_path(found):
        kernel = path[0].key == "blocks" and path[-1 if scan else -2].key == "kernel"
        assert leaf.dtype == (jnp.bfloat16 if kernel else jnp.float32), path
    assert isinstance(found["blocks"]["mlp"]["fc1"]["kernel"], jax.Array if scan else tuple)
    again = fluxvit.stack_layers(found)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    for own, other in zip(jax.tree.leaves(again), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(own, other, rtol=2**-8)


def test_an_exact_budget_needs_one_sort():
    """Three budgets of one selection are what three selections give."""
    video = golden.arrays("loss_case")["c1.x"]
    patches, grid = golden.batch(video)
    objective = Supervised(
        graph=fluxvit.structure(golden.TINY),
        limits=golden.limits_of(tuple(grid[0].tolist())),
        budgets=(24, 17, 8),
        classes=10,
        group=3,
    )
    model = golden.tiny_model(rounding="exact")
    shared = objective._selections(golden.tiny_params(), patches, grid, None)
    for budget, kept in zip(objective.budgets, shared, strict=True):
        alone = model.select(patches, grid, budget, objective.limits)
        same = jnp.sort(kept.index[:, :budget]) == jnp.sort(alone.index)
        assert bool(same.all())


def test_the_order_of_the_budgets_does_not_matter():
    """Their gradients, added in turn, are those of the sum of all losses, smallest budget first."""
    video = golden.arrays("loss_case")["c1.x"]
    patches, grid = golden.batch(video)
    objective = Prepared(
        graph=fluxvit.structure(golden.TINY),
        limits=golden.limits_of(tuple(grid[0].tolist())),
        budgets=(24, 17, 8),
        classes=10,
        group=3,
    )
    targets = jax.nn.one_hot(jnp.arange(len(video)), 10)
    keys = jax.random.split(jax.random.key(0), len(video))
    batch = {"patches": patches, "grid": grid, "targets": targets, "key": keys}
    params = golden.tiny_params()

    def loss(params):
        selections = objective._selections(params, patches, grid, None)
        model = fluxvit.merge(objective.graph, params)

        def one(head, anchor):
            kept = selections[head]
            position = model.position(grid[:1], kept.index, objective.limits)
            chosen = fluxvit.take(patches, kept)
            return objective._pass(params, position, chosen, targets, kept, head, anchor, None)

        pooled = one(0, None)[1][1]
        anchor = jax.lax.stop_gradient(l2_normalise(pooled))
        return one(2, anchor)[0] + one(1, anchor)[0] + one(0, None)[0]

    together = jax.jit(jax.grad(loss))(params)
    in_turn, _ = jax.jit(objective.gradients)(params, {}, batch)
    for own, other in zip(jax.tree.leaves(in_turn), jax.tree.leaves(together), strict=True):
        np.testing.assert_allclose(own, other, rtol=1e-4, atol=1e-6)
