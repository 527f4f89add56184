"""Names, shapes and layouts against the official state dicts in tests/golden."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from fluxvit_jax.convert.official_names import (
    DECODERS,
    FLUXVIT,
    INTERNVIDEO2,
    check,
    from_official,
    to_official,
)
from fluxvit_jax.convert.text_encoder_names import TEXT_ENCODER
from fluxvit_jax.errors import UserError

GOLDEN = Path(__file__).parents[1] / "golden"
MANIFEST = json.loads((GOLDEN / "full_manifest.json").read_text())
HEADS = {"fluxvit_small_patch14": 6, "fluxvit_base_patch14": 12}


def tiny_state() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "tiny_state.npz") as file:
        return dict(file)


def random_state(shapes: dict[str, list[int]]) -> dict[str, np.ndarray]:
    """Random bits as float16, NaN payloads included: a copy must keep every one."""
    rng = np.random.default_rng(0)
    return {
        name: rng.integers(0, 2**16, shape, dtype=np.uint16).view(np.float16)
        for name, shape in shapes.items()
    }


def assert_identical(got: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].shape == tensor.shape, name
        assert got[name].dtype == tensor.dtype, name
        assert got[name].tobytes() == tensor.tobytes(), name


@pytest.mark.parametrize("variant", HEADS)
def test_round_trip_of_the_full_models(variant):
    state = random_state(MANIFEST[variant]["keys"])
    params = from_official(state, HEADS[variant])
    assert_identical(to_official(params), state)
    assert params["blocks"]["attn"]["qkv"]["kernel"].shape[-2:] == (HEADS[variant], 64)


def test_round_trip_of_the_tiny_model():
    state = tiny_state()
    assert_identical(to_official(from_official(state, heads=3)), state)


def test_linear_layers_compute_the_same():
    state, rng = tiny_state(), np.random.default_rng(0)
    params = from_official(state, heads=3)
    x = rng.standard_normal((5, 48)).astype(np.float32)
    fc1 = params["blocks"]["mlp"]["fc1"]["kernel"][1]
    np.testing.assert_allclose(
        x @ fc1, x @ state["blocks.1.mlp.fc1.weight"].T, rtol=1e-4, atol=1e-5
    )

    qkv = np.einsum("nc,cqhd->qnhd", x, params["blocks"]["attn"]["qkv"]["kernel"][2])
    official = (x @ state["blocks.2.attn.qkv.weight"].T).reshape(5, 3, 3, 16)
    np.testing.assert_allclose(qkv, official.transpose(1, 0, 2, 3), rtol=1e-4, atol=1e-5)


def test_patch_kernel_gives_the_official_embeddings():
    """Norm, projection, norm in float64 on the golden clip: the order of the 588 values."""
    params = from_official(tiny_state(), heads=3)["patch_embed"]
    with np.load(GOLDEN / "tiny_cases.npz") as file:
        video, expected = file["v0_8x56.x"][0], file["v0_8x56.patch_embed"][0]

    def rms_norm(x, scale):
        return x / np.sqrt(np.mean(x.astype(np.float64) ** 2, -1, keepdims=True) + 1e-6) * scale

    patches = video.reshape(3, 8, 4, 14, 4, 14).transpose(1, 2, 4, 3, 5, 0).reshape(8, 16, 588)
    hidden = rms_norm(patches, params["norm_before"]["scale"])
    hidden = hidden @ params["proj"]["kernel"] + params["proj"]["bias"]
    np.testing.assert_allclose(
        rms_norm(hidden, params["norm"]["scale"]), expected, rtol=1e-5, atol=1e-5
    )


def test_table_names_every_tensor_once():
    paths = [leaf.path for leaf in FLUXVIT.leaves]
    names = [leaf.name for leaf in FLUXVIT.leaves]
    assert len(set(paths)) == len(paths) == len(set(names))


def test_another_classifier_size_is_accepted():
    state = tiny_state()
    for i in range(3):
        state[f"head.{i}.weight"] = np.zeros((7, 64), np.float32)
        state[f"head.{i}.bias"] = np.zeros(7, np.float32)
    assert from_official(state, heads=3)["heads"]["kernel"].shape == (3, 64, 7)


def test_faults_are_named():
    state = tiny_state()
    del state["blocks.1.attn.q_norm.weight"]
    del state["head.2.bias"]
    state["blocks.0.attn.relative_position"] = np.zeros(3)
    state["cls_token"] = np.zeros((1, 1, 50), np.float32)
    with pytest.raises(UserError) as error:
        from_official(state, heads=3)
    message = str(error.value)
    assert "\n" not in message
    assert "missing: blocks.1.attn.q_norm.weight, head.2.bias;" in message
    assert "unexpected: blocks.0.attn.relative_position" in message
    assert message.endswith("wrong shape: cls_token (1, 1, 50) instead of (1, 1, 48)")


def test_a_foreign_state_is_refused_in_one_short_line():
    with pytest.raises(UserError, match=r"missing: .* and \d+ more; unexpected: stem$"):
        from_official({"stem": np.zeros(3)}, heads=3)


def test_heads_must_divide_the_width():
    with pytest.raises(UserError, match="width 48 cannot be split into 5"):
        from_official(tiny_state(), heads=5)


def test_export_refuses_a_tree_that_does_not_fit():
    params = from_official(tiny_state(), heads=3)
    kernel = params["fc_norm"].pop("bias")
    with pytest.raises(UserError, match=r"missing: fc_norm\.bias"):
        to_official(params)
    params["fc_norm"]["bias"] = kernel
    params["patch_embed"]["proj"]["kernel"] = np.zeros((500, 48))
    with pytest.raises(UserError, match=r"wrong shape: patch_embed.proj.kernel \(500, 48\)"):
        to_official(params)
    params = from_official(tiny_state(), heads=3)
    params["pos_embed"] = params["pos_embed"][:, :40]
    with pytest.raises(UserError, match=r"pos_embed \(1, 129, 40\) instead of \(1, 129, 48\)"):
        to_official(params)


def test_stacks_of_different_length_are_refused():
    params = from_official(tiny_state(), heads=3)
    params["heads"] = {name: tensor[:2] for name, tensor in params["heads"].items()}
    with pytest.raises(UserError, match=r"missing: head\.2\.weight, head\.2\.bias$"):
        to_official(params)


@pytest.mark.parametrize("number", ["80000", "3", "9" * 5000])
@pytest.mark.parametrize(
    ("of", "name"),
    [
        (FLUXVIT, "blocks.{}.norm1.weight"),
        (FLUXVIT, "head.{}.bias"),
        (INTERNVIDEO2, "blocks.{}.norm1.weight"),
        (DECODERS, "clip_decoder.{}.norm.bias"),
        (TEXT_ENCODER, "transformer.{}.pre_norm_mha.0.weight"),
    ],
)
def test_a_large_number_in_a_name_is_not_believed(of, name, number):
    """A file of 100 bytes would otherwise take seconds and fill the memory."""
    state = {name.format(number): np.zeros(1, np.float32)}
    assert len(of.all_names(state)) < 200
    with pytest.raises(UserError, match=re.escape(f"unexpected: {name.format(number)}")):
        check(state, of)
