"""The teacher against numbers that the official InternVideo2 code produced."""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fluxvit_jax.convert import official_names
from fluxvit_jax.convert.official_names import INTERNVIDEO2
from fluxvit_jax.errors import UserError
from fluxvit_jax.models import blocks, fluxvit, internvideo2
from fluxvit_jax.models.blocks import l2_normalize
from fluxvit_jax.models.internvideo2 import InternVideo2Config
from fluxvit_jax.models.token_selection import Selection
from tests.models import golden

ABOUT = golden.manifest("internvideo2/teacher_cases")
CASES = {case["id"]: case for case in ABOUT["cases"]}
STORED = golden.arrays("internvideo2/teacher_cases")
PREFIX = "vision_encoder."
TINY = InternVideo2Config(
    width=48, depth=6, heads=4, hidden=209, frames=4, rows=4, columns=4, pool_width=64,
    pool_heads=6, gelu="erf", dtype="float32",
)  # fmt: skip


@cache
def state() -> dict[str, np.ndarray]:
    """What of the stage-2 file is the teacher's."""
    stored = golden.arrays("internvideo2/teacher_state")
    own = {n: x for n, x in stored.items() if n.startswith(PREFIX) and n not in ABOUT["dropped"]}
    return {name.removeprefix(PREFIX): x for name, x in own.items()}


@cache
def params() -> dict:
    return official_names.from_official(state(), TINY.heads, INTERNVIDEO2)


def network(weights: dict | None = None, **changes) -> internvideo2.InternVideo2:
    config = replace(TINY, **changes)
    graph = blocks.graphdef(partial(internvideo2.InternVideo2, config))
    return fluxvit.from_params(graph, weights or params())


@partial(jax.jit, static_argnames=("sides", "capacity", "after", "gelu"))
def run(patches, index, sides, capacity, after, gelu="erf"):
    """All features of clips on one grid, of which the patches at `index` are kept."""
    kept = Selection(index, None)
    grid = jnp.asarray([sides], jnp.int32)
    limits = golden.limits_of(sides, capacity)
    model = network(gelu=gelu)
    position = model.position(grid, index, limits)
    return model.features(fluxvit.gather_tokens(patches, kept), position, kept, after)


def features(case: dict, capacity: tuple[int, int, int] = (1, 1, 1)) -> fluxvit.Features:
    """Of a case, in a program for grids up to `capacity`."""
    patches, sides = golden.patches_of(STORED[f"{case['video']}.x"])
    index = np.broadcast_to(np.arange(patches.shape[1]), patches.shape[:2])
    gelu = case["gelu"].split()[0]
    found = run(patches, index, sides, capacity, tuple(case["layers_in_output_order"]), gelu)
    if case["clip_norm_type"] == "l2":
        return found._replace(
            hidden_states=l2_normalize(found.hidden_states), pooled=l2_normalize(found.pooled)
        )
    return found


@pytest.mark.parametrize("id", CASES)
def test_features(id):
    found, outputs = features(CASES[id]), CASES[id]["outputs"]
    for name, own in zip(("middle", "final", "attn"), found, strict=True):
        if name in outputs:
            official = STORED[outputs[name]]
            scale = max(1.0, np.abs(official).max())  # 1 but for what is not normalised
            np.testing.assert_allclose(own, official, rtol=0, atol=5e-6 * scale, err_msg=name)


def test_a_program_for_larger_grids():
    case = CASES["t3"]
    for own, other in zip(features(case, (8, 6, 6)), features(case), strict=True):
        np.testing.assert_allclose(own, other, rtol=0, atol=1e-5)


def test_the_position_table():
    silent = {
        name: jax.tree.map(np.zeros_like, params()[name]) for name in ("cls_token", "patch_embed")
    }
    model = network(params() | silent)

    @partial(jax.jit, static_argnums=0)
    def embedded(sides):
        places = int(np.prod(sides))
        grid, limits = jnp.asarray([sides], jnp.int32), golden.limits_of(sides)
        position = model.position(grid, jnp.arange(places)[None], limits)
        return model.embed(jnp.zeros((1, 1 + places, fluxvit.PATCH_VALUES)), position)

    for video in ABOUT["videos"].values():
        _, sides = golden.patches_of(STORED[video["x"]])
        np.testing.assert_allclose(embedded(sides), STORED[video["pos_embed"]], rtol=0, atol=3e-5)


def test_the_constants_in_norms():
    """With inputs so small that they show."""
    model = network()

    @jax.jit
    def parts(x):
        first = blocks.unstack(model.blocks, 0)
        return {
            "rmsnorm": first.norm1(x),
            "layernorm": model.pool.norm_q(x),
            "block0": first(x, None, 0.0, None),
            "pool": model.pool(x, None),
            "pool_attn": model.pool.weights(x, None)[:, None],
        }

    for name, own in parts(STORED["eps.x"]).items():
        official = STORED[f"eps.{name}"]
        np.testing.assert_allclose(own, official, rtol=0, atol=1e-5 * np.abs(official).max())


def test_a_part_of_the_tokens():
    """What is kept has the features of a clip that has no other patches, in any order."""
    patches, sides = golden.patches_of(STORED["v1_8x56.x"])
    rng = np.random.default_rng(0)
    index = np.stack([rng.permutation(np.prod(sides))[:40] for _ in patches])
    found = run(patches, index, sides, sides, (2, 5))
    assert found.hidden_states.shape == (2, 2, 41, 48) and found.attention.shape == (2, 40)
    assert (found.attention.sum(axis=1) < 1).all()
    other = run(patches, index[:, ::-1], sides, sides, (2, 5))
    back = other.hidden_states[:, :, [0, *range(40, 0, -1)]]
    np.testing.assert_allclose(found.hidden_states, back, rtol=0, atol=1e-4)
    np.testing.assert_allclose(found.pooled, other.pooled, rtol=0, atol=1e-5)
    np.testing.assert_allclose(found.attention, other.attention[:, ::-1], rtol=0, atol=1e-6)


def test_padding_of_clips_counts_for_nothing():
    patches, sides = golden.patches_of(STORED["v0_4x56.x"])
    index = np.broadcast_to(np.arange(64), (2, 64))
    valid = np.arange(64)[None] < np.array([[64], [50]])
    kept = Selection(jnp.asarray(index), jnp.asarray(valid))
    model, limits = network(), golden.limits_of(sides)

    @jax.jit
    def features(patches):
        position = model.position(jnp.asarray([sides]), kept.token_index, limits)
        return model.features(fluxvit.gather_tokens(patches, kept), position, kept, (5,))

    masked = features(patches)
    alone = run(patches[1:], index[1:, :50], sides, sides, (5,))
    np.testing.assert_allclose(masked.pooled[1:], alone.pooled, rtol=0, atol=1e-5)
    np.testing.assert_allclose(masked.attention[1, :50], alone.attention[0], rtol=0, atol=1e-6)
    assert (masked.attention[1, 50:] == 0).all()
    np.testing.assert_allclose(
        masked.hidden_states[0, 1, :51], alone.hidden_states[0, 0], rtol=0, atol=1e-4
    )


def test_official_names():
    again = official_names.to_official(params(), INTERNVIDEO2)
    assert again.keys() == state().keys()
    for name, tensor in state().items():
        np.testing.assert_array_equal(again[name], tensor)
    with pytest.raises(UserError, match="not the weights of an InternVideo2 vision encoder; miss"):
        official_names.from_official({"cls_token": np.zeros((1, 1, 48))}, 4, INTERNVIDEO2)
    with pytest.raises(UserError, match="not the weights of a FluxViT"):
        official_names.from_official(state(), 4)


def test_the_names_and_shapes_of_1b():
    shapes = golden.manifest("internvideo2/manifest")["teacher_1B"]["shapes"]
    full = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
    official_names.check(full, INTERNVIDEO2)
    config = InternVideo2Config(frames=8)
    made = jax.eval_shape(
        lambda: fluxvit.split(internvideo2.InternVideo2(config, fluxvit.nnx.Rngs(0)))[1]
    )
    ours = {path: leaf.shape for path, leaf in official_names.flatten(made)}
    sizes = {"blocks": config.depth}
    for leaf in INTERNVIDEO2.leaves:
        official = leaf.layout.to_ours(full[INTERNVIDEO2.names(leaf, sizes)[0]], config.heads).shape
        stacked = (config.depth,) if leaf.branch == "blocks" else ()
        assert ours[leaf.path] == stacked + official, leaf.path
    assert len(ours) == len(INTERNVIDEO2.leaves)
    assert sum(np.prod(shape) for shape in ours.values()) == 1_020_708_608
