"""Drawing tokens, decoders, distances and gradients against the official distillation code."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fluxvit_jax.convert import names
from fluxvit_jax.convert.names import DECODERS, INTERNVIDEO2
from fluxvit_jax.models import fluxvit, layers, selection
from fluxvit_jax.models.decoders import Decoders, DecodersConfig
from fluxvit_jax.models.fluxvit import nnx
from fluxvit_jax.models.internvideo2 import InternVideo2, InternVideo2Config
from fluxvit_jax.models.layers import l2_normalise
from fluxvit_jax.models.selection import Selection
from fluxvit_jax.objectives.distillation import distance
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
        names.from_official(rest, 4, INTERNVIDEO2),
        names.from_official(own, of=DECODERS),
    )


def models(weights: tuple[dict, dict], gelu: str) -> tuple[InternVideo2, Decoders]:
    config = InternVideo2Config(**STUDENT, gelu=gelu)
    makers = (partial(InternVideo2, config), partial(Decoders, DECODED))
    graphs = (layers.structure(make) for make in makers)
    return tuple(fluxvit.merge(graph, own) for graph, own in zip(graphs, weights, strict=True))


def answer(weights, patches, index, after=LAST, gelu="erf"):
    """What the student and its decoders make of the kept patches: middle, pooled, final."""
    student, decoders = models(weights, gelu)
    kept = Selection(index, None)
    position, own = (network.position(GRID, index, LIMITS) for network in (student, decoders))
    found = student.features(fluxvit.take(patches, kept), position, kept, after)
    middle = decoders.compare(found.middle, own, found.middle, lambda decoded, _: decoded)
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
        middle, final = l2_normalise(middle), l2_normalise(final)
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
        order = selection.draw(STORED[f"{id}.attn"], STORED[f"{id}.exp_noise"])
        np.testing.assert_array_equal(order, STORED[f"{id}.importance"])
        index = order[:, : case["visible_without_cls"]]
    else:
        index = visible(STORED[f"{id}.mask"])
    rows = np.pad(1 + np.asarray(index), ((0, 0), (1, 0)))  # CLS first
    seen = jnp.take_along_axis(teacher.middle, rows[None, ..., None], axis=2)
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
    ours = names.to_official(student, INTERNVIDEO2) | names.to_official(decoders, DECODERS)
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
    order = np.asarray(selection.draw(np.broadcast_to(attention, noise.shape), noise))
    share = attention / attention.sum()
    for first in range(3):
        drawn = order[:, 0] == first
        assert drawn.mean() == pytest.approx(share[first], abs=0.01)
        for second in set(range(3)) - {first}:
            expected = share[second] / (1 - share[first])
            assert (order[drawn, 1] == second).mean() == pytest.approx(expected, abs=0.02)
    plain = selection.draw(attention[None], np.ones((1, 3), np.float32))
    np.testing.assert_array_equal(plain, [[2, 1, 0]])
