"""Drawing tokens, decoders, distances and gradients against the official distillation code."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fluxvit_jax.config.grids import admissible_grids
from fluxvit_jax.config.network import model_config
from fluxvit_jax.convert import official_names
from fluxvit_jax.convert.official_names import DECODERS, INTERNVIDEO2
from fluxvit_jax.grids import bounds
from fluxvit_jax.models import blocks, fluxvit, token_selection
from fluxvit_jax.models.blocks import l2_normalize
from fluxvit_jax.models.decoders import Decoders, DecodersConfig
from fluxvit_jax.models.fluxvit import nnx
from fluxvit_jax.models.internvideo2 import InternVideo2, InternVideo2Config
from fluxvit_jax.models.token_selection import GridLimits, Selection
from fluxvit_jax.objectives.flux_umt import FluxUMT, distance
from fluxvit_jax.objectives.flux_umt_teacher import make_network, target_fields, teacher_config
from fluxvit_jax.training.train_state import abstract_params
from tests import tiny
from tests.models import golden, test_internvideo2

ABOUT = golden.manifest("internvideo2/distill_cases")
STORED = golden.arrays("internvideo2/distill_cases")
# One that drops CLS, which no student ever does, is left out.
CASES = {case["id"]: case for case in ABOUT["cases"] if case["id"] != "d4"}
LOSSES = {case["id"]: case for case in ABOUT["loss_cases"]}
SIDES = (8, 4, 4)
LIMITS = golden.limits_of(SIDES)
GRID = jnp.asarray([SIDES], jnp.int32)
LAST = (1, 2, 3)  # blocks of the student that are compared
STUDENT = {
    "width": 32, "depth": 4, "heads": 4, "hidden": 128, "frames": 8, "rows": 4, "columns": 4,
    "pool_width": 40, "pool_heads": 8, "dtype": "float32",
}  # fmt: skip
DECODED = DecodersConfig(3, 32, 40, 48, 64, *SIDES)


@cache
def params() -> tuple[dict, dict]:
    """Of the student and of its decoders."""
    state = golden.arrays("internvideo2/distill_state")
    own = {name: x for name, x in state.items() if "clip_pos_embed" in name or "_decoder" in name}
    rest = {name: x for name, x in state.items() if name not in own}
    return (
        official_names.from_official(rest, 4, INTERNVIDEO2),
        official_names.from_official(own, of=DECODERS),
    )


def models(weights: tuple[dict, dict], gelu: str) -> tuple[InternVideo2, Decoders]:
    config = InternVideo2Config(**STUDENT, gelu=gelu)
    makers = (partial(InternVideo2, config), partial(Decoders, DECODED))
    graphs = (blocks.graphdef(make) for make in makers)
    return tuple(
        fluxvit.from_params(graph, own) for graph, own in zip(graphs, weights, strict=True)
    )


def answer(weights, patches, index, after=LAST, gelu="erf"):
    """What the student and its decoders make of the kept patches: middle, pooled, final."""
    student, decoders = models(weights, gelu)
    kept = Selection(index, None)
    position, own = (network.position(GRID, index, LIMITS) for network in (student, decoders))
    found = student.features(fluxvit.gather_tokens(patches, kept), position, kept, after)
    middle = decoders.compare(
        found.hidden_states, own, found.hidden_states, lambda decoded, _: decoded
    )
    return middle, found.pooled, decoders.pooled(found.pooled)


def visible(mask: np.ndarray) -> np.ndarray:
    """The kept places of a mask with CLS, in raster order: [B, N]."""
    return np.stack([np.flatnonzero(~row[1:]) for row in mask])


@pytest.mark.parametrize("id", CASES)
def test_the_student(id):
    case = CASES[id]
    patches, _ = golden.patches_of(STORED[case["x"]])
    index, after = visible(STORED[case["mask"]]), tuple(case["layers_in_output_order"])
    run = jax.jit(answer, static_argnames=("after", "gelu"))
    middle, pooled, final = run(params(), patches, index, after, case["gelu_blocks"].split()[0])
    if case["options"]["clip_norm_type"] == "l2":
        middle, final = l2_normalize(middle), l2_normalize(final)
    found = {"middle": middle, "pooled": pooled, "final": final}
    for name, own in found.items():
        if f"{id}.{name}" in case["outputs"]:
            official = STORED[f"{id}.{name}"]
            scale = max(1.0, np.abs(official).max())
            np.testing.assert_allclose(own, official, rtol=0, atol=1e-5 * scale, err_msg=name)


def test_the_constant_in_the_decoders_norm():
    _, decoders = models(params(), "erf")
    first = jax.tree.map(lambda leaf: leaf[0], nnx.split(decoders.tokens.norm)[1])
    norm = nnx.merge(nnx.split(decoders.tokens.norm)[0], first)
    official = STORED["eps.dec_norm"]
    np.testing.assert_allclose(norm(STORED["eps.dec_x"]), official, rtol=0, atol=1e-5)


@pytest.mark.parametrize("id", LOSSES)
def test_losses_and_gradients(id):
    """From the clip to the gradients: teacher, drawing, student, decoders, distances."""
    case = LOSSES[id]
    patches, _ = golden.patches_of(STORED[f"{id}.x"])
    everything = np.broadcast_to(np.arange(128), patches.shape[:2])
    teacher = test_internvideo2.run(patches, everything, SIDES, SIDES, (2, 4, 5))
    if case["mask_type"] == "attention":
        np.testing.assert_allclose(teacher.attention, STORED[f"{id}.attn"], rtol=0, atol=1e-5)
        order = token_selection.gumbel_top_k(STORED[f"{id}.attn"], STORED[f"{id}.exp_noise"])
        np.testing.assert_array_equal(order, STORED[f"{id}.importance"])
        index = order[:, : case["visible_without_cls"]]
    else:
        index = visible(STORED[f"{id}.mask"])
    rows = np.pad(1 + np.asarray(index), ((0, 0), (1, 0)))  # CLS first
    seen = jnp.take_along_axis(teacher.hidden_states, rows[None, ..., None], axis=2)
    ratios = case["clip_loss_ratio"] if case["distill_final_features"] else (1, 0)

    @jax.jit
    def loss(weights):
        middle, _, final = answer(weights, patches, index)
        terms = distance(middle, seen), distance(final, teacher.pooled)
        return ratios[0] * terms[0] + ratios[1] * terms[1], terms

    (total, terms), gradients = jax.value_and_grad(loss, has_aux=True)(params())
    assert total == pytest.approx(case["loss_f64"], rel=1e-5)
    assert terms[0] == pytest.approx(case["loss_middle_f64"], rel=1e-5)
    if ratios[1]:
        assert terms[1] == pytest.approx(case["loss_final_f64"], rel=1e-5)
    student, decoders = (jax.tree.map(np.asarray, own) for own in gradients)
    ours = official_names.to_official(student, INTERNVIDEO2) | official_names.to_official(
        decoders, DECODERS
    )
    for name, length in case["all_grad_l2"].items():
        if name not in case["zero_grad_params"]:
            found = np.linalg.norm(ours[name].astype(np.float64))
            assert found == pytest.approx(length, rel=1e-5), name
    for name in case["params_without_grad"]:
        assert not ours[name].any(), name
    for name in case["grads_saved"]:
        official = STORED[f"{id}.grad.{name}"]
        error = np.linalg.norm(ours[name] - official)
        assert error <= 1e-5 * np.linalg.norm(official), name


def test_drawing_is_in_proportion_to_attention():
    """Of three tokens with attention 1, 2 and 5: the first two that are drawn, by many draws."""
    attention = np.array([1.0, 2.0, 5.0], np.float32)
    noise = np.random.default_rng(0).exponential(size=(40_000, 3)).astype(np.float32)
    order = np.asarray(token_selection.gumbel_top_k(np.broadcast_to(attention, noise.shape), noise))
    share = attention / attention.sum()
    for first in range(3):
        drawn = order[:, 0] == first
        assert drawn.mean() == pytest.approx(share[first], abs=0.01)
        for second in set(range(3)) - {first}:
            expected = share[second] / (1 - share[first])
            assert (order[drawn, 1] == second).mean() == pytest.approx(expected, abs=0.02)
    plain = token_selection.gumbel_top_k(attention[None], np.ones((1, 3), np.float32))
    np.testing.assert_array_equal(plain, [[2, 1, 0]])


# --- The whole objective


@cache
def objective(**changes) -> FluxUMT:
    config = pretraining(**changes)
    grids = admissible_grids(config)
    limits = GridLimits(*bounds(grids), min(grid.tokens for grid in grids))
    return FluxUMT.from_config(config, limits, "cpu")


@cache
def pretraining(**changes):
    """The tests' recipe of distillation, with drop path off unless asked for."""
    return tiny.make_pretraining("", "", **{"model__drop_path": 0.0} | changes)


@cache
def trained() -> tuple[dict, dict]:
    """Student with decoders, and teacher, with weights large enough to matter."""
    config = pretraining()
    shapes = abstract_params(config)
    teacher = teacher_config(config)
    make = make_network(teacher, nnx.Rngs(0))
    rng = np.random.default_rng(0)

    def plus_noise(leaf):
        return jnp.asarray(np.asarray(leaf) + np.float32(rng.normal(0, 0.1, leaf.shape)))

    student = fluxvit.init_params(model_config(config), jax.random.key(0))
    student |= FluxUMT.init_params(config, jax.random.key(1))
    assert jax.tree.structure(student) == jax.tree.structure(shapes)
    frozen = jax.tree.map(plus_noise, nnx.to_pure_dict(nnx.state(make, nnx.Param)))
    return jax.tree.map(plus_noise, student), frozen


@cache
def clips() -> dict:
    """Two groups of two clips on different grids."""
    rng = np.random.default_rng(1)
    grids = np.repeat(np.int32([(8, 2, 3), (11, 3, 3)]), 2, axis=0)
    patches = rng.integers(0, 256, (4, 99, fluxvit.PATCH_VALUES), dtype=np.uint8)
    patches[:2, 48:] = 0
    keys = jax.random.split(jax.random.key(5), 4)
    return {"patches": patches, "grid": grids, "label": np.zeros(4, np.int32), "key": keys}


def plainly(own: FluxUMT, params: dict, frozen: dict, clip: dict) -> jax.Array:
    """The loss of one clip as the definition says it, each student on its own."""
    grid, patches = clip["grid"], fluxvit.normalize(clip["patches"])
    teacher = fluxvit.from_params(own.teacher, frozen)
    kept = token_selection.select(teacher.patch_embed(patches), grid, own.tokens, own.limits)
    seen = teacher.features(
        fluxvit.gather_tokens(patches, kept),
        teacher.position(grid, kept.token_index, own.limits),
        kept,
        tuple(block for _, block in own.pairs),
    )
    noise = jax.random.exponential(jax.random.split(clip["key"][0], 3)[1], (1, own.tokens))
    order = jnp.argsort(-seen.attention / noise, axis=1)
    student = fluxvit.from_params(own.student, {k: v for k, v in params.items() if k != "decoders"})
    decoders = fluxvit.from_params(own.decoders, params["decoders"])
    total = 0.0
    for head, n in enumerate(own.budgets):
        index = jnp.take_along_axis(kept.token_index, order[:, :n], axis=1)
        visible = Selection(index, None)
        found = student.features(
            fluxvit.gather_tokens(patches, visible),
            student.position(grid, index, own.limits),
            visible,
            tuple(block for block, _ in own.pairs),
            head,
        )
        rows = jnp.concatenate([jnp.zeros((1, 1), int), 1 + order[:, :n]], axis=1)
        targets = jnp.take_along_axis(seen.hidden_states, rows[None, ..., None], axis=2)
        position = decoders.position(grid, index, own.limits)
        decoded = decoders.compare(found.hidden_states, position, targets, lambda x, _: x)
        cosines = jnp.sum(l2_normalize(decoded) * l2_normalize(targets), axis=-1)
        pooled = decoders.pooled(found.pooled)
        final = jnp.sum(l2_normalize(pooled) * l2_normalize(seen.pooled), axis=-1)
        total += own.layer_weight * (2 - 2 * cosines.mean())
        total += own.pooled_weight * (2 - 2 * final.mean())
    return total


WEIGHTED = {"distill__feature_loss_weight": 0.5, "distill__clip_loss_weight": 2.0}


@cache
def step() -> tuple[dict, dict]:
    """Gradients and metrics of a batch."""
    run = jax.jit(objective(**WEIGHTED).value_and_grad)
    return run(*trained(), clips())


def test_the_loss_and_gradients_are_those_of_the_definition():
    own, (params, frozen), (gradients, metrics) = objective(**WEIGHTED), trained(), step()
    plain = jax.jit(jax.value_and_grad(partial(plainly, own)))
    alone = [
        plain(params, frozen, jax.tree.map(lambda x, i=i: x[i : i + 1], clips())) for i in range(4)
    ]
    loss, expected = jax.tree.map(lambda *each: sum(each) / 4, *alone)
    assert metrics["loss"] == pytest.approx(float(loss), rel=1e-5)
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    for found, wanted in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=2e-3, atol=2e-5 * scale)
    untrained = [gradients[name] for name in ("heads", "align", "fc_norm")]
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(untrained))


def test_what_is_measured():
    """Of each student: the two distances, and the agreement of each pair of layers, -1 to 1."""
    _, metrics = step()
    for n in (24, 8):
        apart = 2 - (metrics[f"agreement_block0_{n}"] + metrics[f"agreement_block1_{n}"])
        assert metrics[f"layers_{n}"] == pytest.approx(float(apart), abs=1e-5)
        pooled = 2 - 2 * metrics[f"agreement_pooled_{n}"]
        assert metrics[f"pooled_{n}"] == pytest.approx(float(pooled), abs=1e-5)
    total = sum(0.5 * metrics[f"layers_{n}"] + 2 * metrics[f"pooled_{n}"] for n in (24, 8))
    assert metrics["loss"] == pytest.approx(float(total), rel=1e-5)


def lesson(batch: dict, **changes):
    own, (params, frozen) = objective(**changes), trained()

    @jax.jit
    def teach(params, frozen, batch):
        keys = jax.vmap(lambda key: jax.random.split(key, 3))(batch["key"])
        grids = batch["grid"].reshape(-1, own.group, 3)[:, 0]
        return own._teacher_targets(params, frozen, batch, grids, keys[:, 0], keys[:, 1])

    return teach(params, frozen, batch)


def test_masks():
    """The same tokens in other orders: by attention, noisily or not, and evenly."""
    found = {
        mask: lesson(clips(), distill__mask=mask)
        for mask in ("attention", "attention_topk", "random")
    }
    kept = [np.sort(own.token_index, axis=1) for own in found.values()]
    assert all((own == kept[0]).all() for own in kept)
    assert all(len(set(row)) == 32 for row in kept[0])
    orders = [np.asarray(own.token_index) for own in found.values()]
    assert not any((a == b).all(axis=1).any() for a in orders for b in orders if a is not b)
    again = lesson(clips(), distill__mask="attention").token_index
    np.testing.assert_array_equal(again, found["attention"].token_index)
    other = lesson(clips() | {"key": jax.random.split(jax.random.key(6), 4)})
    assert not (other.token_index == found["attention"].token_index).all(axis=1).any()
    top = lesson(
        clips() | {"key": jax.random.split(jax.random.key(6), 4)}, distill__mask="attention_topk"
    )
    np.testing.assert_array_equal(top.token_index, found["attention_topk"].token_index)


def test_a_clip_is_taught_alike_in_any_batch():
    whole = lesson(clips())
    half = lesson(jax.tree.map(lambda x: x[2:], clips()))
    np.testing.assert_array_equal(whole.token_index[2:], half.token_index)
    np.testing.assert_allclose(whole.hidden_states[:, 2:], half.hidden_states, rtol=0, atol=1e-4)


def test_the_student_may_score():
    """Then it chooses what the teacher sees, without a gradient."""
    own, (params, _) = objective(distill__selector_features="student"), trained()
    by_student = lesson(clips(), distill__selector_features="student").token_index
    assert (np.sort(by_student, axis=1) != np.sort(lesson(clips()).token_index, axis=1)).any()
    model = fluxvit.from_params(own.student, {k: v for k, v in params.items() if k != "decoders"})

    @jax.jit
    def select(patches, grid):
        return model.select(fluxvit.normalize(patches), grid, 32, own.limits).token_index

    alone = select(clips()["patches"], clips()["grid"])
    np.testing.assert_array_equal(np.sort(by_student, axis=1), np.sort(alone, axis=1))


@pytest.mark.slow
def test_lessons_remembered_are_lessons_given():
    """The same loss from what a cache keeps, in two bytes, as from the teacher."""
    own, (params, frozen) = objective(model__dtype="bfloat16"), trained()
    batch = clips()
    kept = jax.jit(own.targets_to_cache)(
        frozen, {name: batch[name] for name in ("patches", "grid")}
    )
    fields = target_fields(pretraining(model__dtype="bfloat16"))
    assert {name: (x.shape[1:], x.dtype.name) for name, x in kept.items()} == fields
    run = jax.jit(own.value_and_grad)
    _, metrics = run(params, frozen, batch)
    _, remembered = run(params, {}, batch | kept)
    assert remembered["loss"] == pytest.approx(float(metrics["loss"]), rel=1e-2)
