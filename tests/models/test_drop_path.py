"""Drop path: how often each branch is dropped, by depth, and by how much the others are scaled."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fluxvit_jax.models import blocks, fluxvit
from fluxvit_jax.models.token_selection import Selection

CLIPS = 4000
DEPTH, RATE = 5, 0.4
RATES = (0.0, 0.1, 0.2, 0.3, 0.4)  # a straight line from 0 to RATE


def test_a_branch_is_dropped_at_the_rate_and_else_scaled():
    keys = jax.random.split(jax.random.key(0), 10_000)
    drawn = np.asarray(blocks.drop_path(jnp.float32(0.25), keys)).reshape(2, 10_000)
    assert np.isin(drawn, np.float32([0, 4 / 3])).all()
    # Five deviations of the mean of 10,000 draws, sqrt(1 / 3) each.
    np.testing.assert_allclose(drawn.mean(axis=1), 1, atol=5 * (1 / 3 / 10_000) ** 0.5)
    # The two branches of a block are drawn independently: both are dropped in a sixteenth.
    assert (drawn == 0).all(axis=0).mean() == pytest.approx(1 / 16, abs=0.0125)


def network(scan: bool) -> tuple[fluxvit.FluxViTConfig, dict]:
    """Blocks whose attention adds 1 to channel 0, whose MLP adds 1 to channel 1, and no more."""
    config = fluxvit.FluxViTConfig(
        width=16, depth=DEPTH, heads=2, frames=1, rows=1, columns=2, classes=2, pool_width=16,
        pool_heads=2, layer_scale=1.0, drop_path=RATE, scan=scan,
    )  # fmt: skip
    params = fluxvit.init_params(config, jax.random.key(0))
    blocks = params["blocks"]
    for channel, last in enumerate((blocks["attn"]["proj"], blocks["mlp"]["fc2"])):
        last["kernel"] = jnp.zeros_like(last["kernel"])
        last["bias"] = last["bias"].at[:, channel].set(1)
    return config, params


@pytest.fixture(scope="module", params=[True, False], ids=["scanned", "unrolled"])
def factors(request) -> np.ndarray:
    return branch_factors(*network(request.param))


def branch_factors(config: fluxvit.FluxViTConfig, params: dict) -> np.ndarray:
    """By what each branch was multiplied: [block, branch, clip]."""
    patches = jnp.zeros((CLIPS, 1 + 2, fluxvit.PATCH_VALUES))
    kept = Selection(jnp.broadcast_to(jnp.arange(2), (CLIPS, 2)), None)

    @jax.jit
    def run(params, keys):
        model = fluxvit.from_params(
            fluxvit.graphdef(config), fluxvit.prepare_params(params, config)
        )
        start = jnp.zeros((CLIPS, 1 + 2, 16))
        found = partial(model.features, patches, start, kept, tuple(range(DEPTH)))
        return found(key=keys).hidden_states, model.embed(patches, start)

    middle, start = run(params, jax.random.split(jax.random.key(1), CLIPS))
    states = np.concatenate([start[None], middle])  # [1 + block, clip, token, channel]
    added = np.diff(states, axis=0)
    # All tokens of a clip share its draw.
    np.testing.assert_allclose(added, added[:, :, :1].repeat(3, axis=2), atol=1e-5)
    assert not added[..., 2:].any()
    return added[:, :, 0, :2].transpose(0, 2, 1)


def test_rates_rise_linearly_with_depth(factors):
    assert (np.abs(factors[0] - 1) < 1e-5).all()  # the first block never drops
    for rate, block in zip(RATES, factors, strict=True):
        dropped = np.abs(block) < 1e-5
        np.testing.assert_allclose(block[~dropped], 1 / (1 - rate), rtol=1e-4)
        deviation = (rate * (1 - rate) / CLIPS) ** 0.5
        np.testing.assert_allclose(dropped.mean(axis=1), rate, atol=5 * deviation)


def test_frozen_blocks_drop_nothing():
    config, params = network(scan=False)
    factors = branch_factors(replace(config, frozen_blocks=3), params)
    np.testing.assert_allclose(factors[:3], 1, rtol=1e-4)
    for rate, block in zip(RATES[3:], factors[3:], strict=True):
        np.testing.assert_allclose((np.abs(block) < 1e-5).mean(axis=1), rate, atol=0.05)


def test_blocks_branches_and_clips_are_drawn_independently(factors):
    dropped = (np.abs(factors[1:]) < 1e-5).reshape(-1, CLIPS)  # the first block never drops
    correlation = np.corrcoef(dropped) - np.eye(len(dropped))
    assert np.abs(correlation).max() < 5 / CLIPS**0.5
    assert len(np.unique(dropped, axis=1).T) > 100  # of 256 patterns
