"""The text encoder against numbers of the official code, and its weights in and out."""

import json
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fluxvit_jax.convert.official_names import from_official, to_official
from fluxvit_jax.convert.text_encoder_names import PREFIX, TEXT_ENCODER, text_state
from fluxvit_jax.errors import UserError
from fluxvit_jax.models.blocks import unstack
from fluxvit_jax.models.text_encoder import TextEncoder, TextEncoderConfig
from tests.models.golden import GOLDEN

CASES = json.loads((GOLDEN / "clip/text_cases.json").read_text())
ARRAYS = np.load(GOLDEN / "clip/text_cases.npz")
STATE = dict(np.load(GOLDEN / "clip/text_state.npz"))
MANIFEST = json.loads((GOLDEN / "clip/manifest.json").read_text())["text_encoder_mobileclip_b"]
TINY = TextEncoderConfig(width=48, depth=3, heads=4, hidden=192, vocabulary=640, out=40)


def of_state(state: dict) -> TextEncoder:
    model = nnx.eval_shape(lambda: TextEncoder(TINY, nnx.Rngs(0)))
    params = from_official(text_state(state), of=TEXT_ENCODER)
    nnx.update(model, nnx.State(jax.tree.map(jnp.asarray, params)))
    return model


@cache
def tiny() -> TextEncoder:
    return of_state(STATE)


def close(found, expected) -> None:
    """To the tolerance that the golden numbers come with."""
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("case", CASES["cases"], ids=lambda case: case["name"])
def test_golden_vectors(case):
    scale = case.get("scale_embeddings", 1.0)
    embeddings = "embedding_layer", "positional_embedding"
    state = {n: x * scale if any(e in n for e in embeddings) else x for n, x in STATE.items()}
    model = tiny() if scale == 1 else of_state(state)
    close(nnx.jit(lambda m, ids: m(ids))(model, ARRAYS[case["ids"]]), ARRAYS[case["out"]])


@pytest.mark.parametrize("name", ["plain", "len32"])
def test_traces(name):
    model, ids = tiny(), ARRAYS[f"{name}.ids"][:1]
    trace = {key: ARRAYS[f"{name}.trace.{key}"] for key in ("embed", "block0", "all_tokens")}

    @jax.jit
    def traced(ids):
        x = model.embed(ids)
        return {
            "embed": x,
            "block0": unstack(model.blocks, 0)(x),
            "all_tokens": model.tokens(ids),
        }

    for key, found in traced(ids).items():
        close(found[0], trace[key].reshape(found[0].shape))


def test_weights_go_out_as_they_came_in():
    params = from_official(text_state(STATE), of=TEXT_ENCODER)
    out = {PREFIX + name: x for name, x in to_official(params, TEXT_ENCODER).items()}
    assert out.keys() == STATE.keys()
    for name, tensor in STATE.items():
        np.testing.assert_array_equal(out[name], tensor)


def test_all_names_and_shapes_of_the_released_encoder():
    shapes = {name: np.broadcast_to(np.float32(0), shape) for name, shape in MANIFEST.items()}
    others = {"image_encoder.x": np.zeros(1), "logit_scale": np.zeros(())}
    params = from_official(text_state(shapes | others), of=TEXT_ENCODER)
    ours = nnx.eval_shape(lambda: TextEncoder(TextEncoderConfig(), nnx.Rngs(0)))
    expected = jax.tree.map(lambda x: x.shape, nnx.to_pure_dict(nnx.state(ours, nnx.Param)))
    assert jax.tree.map(lambda x: x.shape, params) == expected


def open_clip_names(state: dict) -> dict:
    """A state as open_clip writes it."""
    found = {}
    renamed = {
        "embedding_layer.weight": "token_embedding.weight",
        "projection_layer": "text_projection",
        "final_layer_norm.": "ln_final.",
        "pre_norm_mha.0.": "ln_1.",
        "pre_norm_mha.1.qkv_proj.": "attn.in_proj_",
        "pre_norm_mha.1.out_proj.": "attn.out_proj.",
        "pre_norm_ffn.0.": "ln_2.",
        "pre_norm_ffn.1.": "mlp.c_fc.",
        "pre_norm_ffn.4.": "mlp.c_proj.",
        "transformer.": "transformer.resblocks.",
    }
    for name, tensor in state.items():
        name = name.removeprefix(PREFIX)
        if name == "positional_embedding.pos_embed.pos_embed":
            name, tensor = "positional_embedding", tensor[0, 0]
        for ours, theirs in renamed.items():
            name = name.replace(ours, theirs)
        found[f"text.{name}"] = tensor
    return found


def test_weights_of_open_clip():
    state = open_clip_names(STATE) | {"visual.conv1": np.zeros(1), "logit_scale": np.zeros(())}
    ids = ARRAYS["plain.ids"]
    run = nnx.jit(lambda model, ids: model(ids))
    np.testing.assert_array_equal(run(of_state(state), ids), run(tiny(), ids))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop(PREFIX + "projection_layer"), "missing: projection_layer"),
        (lambda s: s.update({PREFIX + "extra": np.zeros(1)}), "unexpected: extra"),
        (
            lambda s: s.update({PREFIX + "final_layer_norm.bias": np.zeros(3)}),
            r"wrong shape: final_layer_norm.bias \(3,\) instead of \(48,\)",
        ),
    ],
)
def test_other_weights_are_refused(change, message):
    state = dict(STATE)
    change(state)
    with pytest.raises(UserError, match=f"not the weights of a CLIP text encoder; {message}"):
        of_state(state)
