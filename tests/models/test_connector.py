"""The connector against numbers of the official code."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange

from fluxvit_jax.models import blocks, fluxvit
from fluxvit_jax.models.connector import (
    Connector,
    Merged,
    by_frame,
    in_order,
    merge,
    merge_plan,
    nearest_frame,
)
from tests.models.chat_golden import CHAT

CASES = json.loads((CHAT / "connector.json").read_text())
ARRAYS = np.load(CHAT / "connector.npz")


def arrays(name):
    return {n.removeprefix(name): ARRAYS[n] for n in ARRAYS.files if n.startswith(name)}


def close(found, expected, tolerance=2e-6):
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


def golden_params() -> dict:
    return {
        ours: {"kernel": ARRAYS[f"weights.{name}.weight"].T, "bias": ARRAYS[f"weights.{name}.bias"]}
        for ours, name in (("fc1", "mlp.0"), ("fc2", "mlp.2"))
    }


@pytest.mark.parametrize("name", CASES["merge"])
def test_golden_merging(name):
    case, golden = CASES["merge"][name], arrays(f"merge.{name}.")
    assert merge_plan(case["tokens"], case["keep"]) == case["r"]

    @jax.jit
    def run(x):
        return merge(x, case["keep"], case["heads"])

    merged, back = jax.vjp(lambda x: run(x).tokens, jnp.asarray(golden["x"]))
    close(merged, golden["y"])
    close(back(jnp.asarray(golden["cotangent"]))[0], golden["dx"])
    last = f"step{len(case['r']) - 1}.size"
    np.testing.assert_array_equal(run(golden["x"]).sizes, golden[last])


@pytest.mark.parametrize("name", CASES["forward"])
def test_golden_forward_and_gradients(name):
    case, golden = CASES["forward"][name], arrays(f"forward.{name}.")
    graph = blocks.graphdef(partial(Connector, case["width"], case["hidden"], jnp.float32))
    groups, keep = case.get("groups", len(golden["x"])), golden["y"].shape[1]

    @jax.jit
    def run(params, x):
        x = rearrange(x, "(g f) n c -> g (f n) c", g=groups)
        return fluxvit.from_params(graph, params)(merge(x, keep, case["heads"]).tokens)

    found, back = jax.vjp(run, golden_params(), jnp.asarray(golden["x"]))
    close(found, golden["y"])
    gradients, d_x = back(jnp.asarray(golden["cotangent"]))
    close(d_x, golden["dx"])
    for ours, name in (("fc1", "mlp.0"), ("fc2", "mlp.2")):
        close(gradients[ours]["kernel"].T, golden[f"d.{name}.weight"])
        close(gradients[ours]["bias"], golden[f"d.{name}.bias"])


def test_golden_plans():
    for sizes, plan in CASES["plans"].items():
        assert merge_plan(*map(int, sizes.split("->"))) == plan


def test_tokens_in_the_order_that_they_had():
    x = jax.random.normal(jax.random.key(0), (2, 40, 16))
    merged = merge(x, 25, 2)
    ordered = in_order(merged)
    assert not (np.diff(merged.position) > 0).all()  # the official order is another
    assert (np.diff(ordered.position) > 0).all()
    own = np.argsort(merged.position, axis=1)
    np.testing.assert_array_equal(
        ordered.tokens, np.take_along_axis(np.asarray(merged.tokens), own[..., None], 1)
    )
    halved = merge(x, 10, 2)
    np.testing.assert_array_equal(in_order(halved).tokens, halved.tokens)


def test_merged_tokens_have_their_mean_frame():
    """As a channel does; they come in the order of the frames that are nearest to the means."""
    frame = jnp.repeat(jnp.arange(5), 8)[None]
    x = jax.random.normal(jax.random.key(3), (1, 40, 16)).at[0, :, 0].set(frame[0])
    merged = merge(x, 15, 2, frame)
    close(merged.frame, merged.tokens[..., 0])
    assert (merged.frame % 1 > 0).any()
    ordered = by_frame(merged)
    nearest = np.floor(np.asarray(merged.frame)[0] + 0.5)
    own = np.lexsort((merged.position[0], nearest))
    np.testing.assert_array_equal(nearest_frame(ordered)[0], nearest[own])
    np.testing.assert_array_equal(ordered.tokens[0], np.asarray(merged.tokens)[0, own])


def test_what_merges_is_alike():
    """Pairs of equal tokens become one of size 2, and sizes count what each stands for."""
    x = jnp.repeat(jax.random.normal(jax.random.key(1), (1, 8, 16)), 2, axis=1)
    merged: Merged = merge(x, 8, 4)
    np.testing.assert_array_equal(merged.sizes, np.full((1, 8), 2))
    close(merged.tokens, x[:, ::2])


def test_similarities_are_of_full_precision():
    """Accelerators otherwise multiply float32 as bfloat16, in which many are equal."""
    traced = jax.make_jaxpr(lambda tokens: merge(tokens, 4, 1).tokens)(jnp.ones((1, 8, 64)))
    (product,) = [e for e in traced.jaxpr.eqns if e.primitive is jax.lax.dot_general_p]
    assert set(product.params["precision"]) == {jax.lax.Precision.HIGHEST}


def test_a_token_of_zeros_does_no_harm():
    """Official: its similarity is not a number, and with it all that is merged."""
    x = jax.random.normal(jax.random.key(2), (1, 12, 16)).at[0, 3].set(0)
    assert jnp.isfinite(merge(x, 5, 4).tokens).all()


def test_more_tokens_than_there_are_is_refused():
    with pytest.raises(ValueError, match="12 tokens cannot be merged into 13"):
        merge(jnp.ones((1, 12, 4)), 13, 1)
