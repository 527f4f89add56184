"""Every attention kernel computes what the plain one does, alone and in the network."""

import json
import sys
import textwrap
from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from fluxvit_jax.models import attention, blocks, chunked_attention, fluxvit, padded_sequence
from fluxvit_jax.models.token_selection import GridLimits
from tests import limited, tiny

ON_TPU = ("pallas", "splash")
# Of the largest number of an array.
TOLERANCE = {"float32": 2e-5, "float16": 1e-2, "bfloat16": 3e-2}


@pytest.fixture(autouse=True)
def at_any_size(monkeypatch):
    """Splash attention without a TPU, chunks where plain attention would do."""
    monkeypatch.setattr(attention, "INTERPRET_SPLASH", True)
    monkeypatch.setattr(chunked_attention, "FEWEST", 0)


def close(ours, plain, dtype="float32"):
    for a, b in zip(*map(jax.tree.leaves, (ours, plain)), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE[dtype] * np.abs(b).max())


# --- Which kernel


@pytest.mark.parametrize(
    ("platform", "dtype", "head_size", "kernel"),
    [
        ("cpu", "bfloat16", 64, "chunked"),
        ("tpu", "bfloat16", 64, "pallas"),
        ("tpu", "float32", 64, "pallas"),
        ("gpu", "bfloat16", 64, "cudnn"),
        ("cuda", "float16", 128, "cudnn"),
        ("cuda", "float32", 64, "xla"),
        ("cuda", "bfloat16", 20, "xla"),
        ("cuda", "bfloat16", 256, "xla"),
        ("rocm", "bfloat16", 64, "xla"),
    ],
)
def test_auto(platform, dtype, head_size, kernel):
    assert attention.choose("auto", platform, dtype, head_size) == kernel


@pytest.mark.parametrize("kernel", attention.KERNELS)
def test_an_explicit_choice(kernel):
    platform = {"xla": "cpu", "chunked": "cpu", "cudnn": "cuda"}.get(kernel, "tpu")
    assert attention.choose(kernel, platform, "bfloat16", 64) == kernel


@pytest.mark.parametrize(
    ("kind", "platform", "dtype", "head_size", "message"),
    [
        ("flash", "tpu", "bfloat16", 64, "'flash' is none of auto, xla, chunked, pallas, splash"),
        ("splash", "cpu", "bfloat16", 64, "'splash' is for tpu, not for cpu"),
        ("pallas", "cuda", "bfloat16", 64, "'pallas' is for tpu, not for cuda"),
        ("cudnn", "tpu", "bfloat16", 64, "'cudnn' is for gpu, not for tpu"),
        ("cudnn", "gpu", "float32", 64, "not float32 and heads of 64"),
        ("cudnn", "gpu", "bfloat16", 20, "not bfloat16 and heads of 20"),
    ],
)
def test_an_impossible_choice(kind, platform, dtype, head_size, message):
    with pytest.raises(ValueError, match=message):
        attention.choose(kind, platform, dtype, head_size)


# --- Alone


def make_inputs(tokens: int, dtype: str, kernel: str = "xla", heads: int = 3, K: int = 16):
    """q, k and v of two clips, padded with noise to the kernel's length; scales of q and k."""
    length = padded_sequence.length_for(tokens, kernel)
    rng = np.random.default_rng(0)
    real = rng.normal(size=(3, 2, tokens, heads, K))
    noise = np.random.default_rng(1).normal(size=(3, 2, length - tokens, heads, K))
    qkv = jnp.asarray(np.concatenate([real, noise], axis=2), dtype)
    qkv = qkv.transpose(0, 1, 3, 4, 2) if kernel in ON_TPU else qkv
    scales = (jnp.asarray(rng.normal(1, 0.5, heads * K), jnp.float32) for _ in range(2))
    return qkv, *scales, jnp.asarray(rng.normal(size=(2, tokens, heads, K)), dtype)


def attend(tokens: int, lengths: tuple[int, ...] | None, dtype: str, kernel: str):
    """What clips attend to, [2, tokens, heads, K], and the gradients of q, k, v and the scales."""
    *inputs, gradient = make_inputs(tokens, dtype, kernel)
    valid = jnp.arange(tokens) < jnp.asarray(lengths or (tokens, tokens))[:, None]
    if lengths is None and padded_sequence.length_for(tokens, kernel) > tokens:
        lengths = (tokens, tokens)
    lengths = None if lengths is None else jnp.asarray(lengths, jnp.int32)

    def run(qkv, q_scale, k_scale):
        attended = attention.attend(qkv, q_scale, k_scale, kernel, lengths)
        attended = attended.transpose(0, 3, 1, 2) if kernel in ON_TPU else attended
        # Places past the length mean nothing.
        return attended[:, :tokens] * valid[..., None, None].astype(dtype)

    @jax.jit
    def both(gradient, *inputs):
        attended, vjp = jax.vjp(run, *inputs)
        return attended, vjp(gradient)

    attended, (dqkv, *dscales) = both(gradient, *inputs)
    dqkv = dqkv.transpose(0, 1, 4, 2, 3) if kernel in ON_TPU else dqkv
    return attended, list(dqkv[:, :, :tokens]), dscales, dqkv[:, :, tokens:]


plain_attend = cache(partial(attend, dtype="float32", kernel="xla"))
CASES = [(256, None), (257, None), (101, (101, 1)), (1408, (1300, 57))]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kernel", [*ON_TPU, "chunked"])
@pytest.mark.parametrize(("tokens", "lengths"), CASES)
def test_equals_the_plain_one(kernel, tokens, lengths, dtype):
    *ours, tail = attend(tokens, lengths, dtype, kernel)
    *plain, _ = plain_attend(tokens, lengths)
    close(ours, plain, dtype)
    assert not np.any(tail)  # the padding gets no gradient


@pytest.mark.parametrize("lengths", [None, (37, 9)])
def test_chunks_with_a_bias(lengths, monkeypatch):
    monkeypatch.setattr(chunked_attention, "CHUNK", 16)  # rows of 19, 38 with padding
    *inputs, gradient = make_inputs(37, "float32")
    bias = jnp.asarray(np.random.default_rng(2).normal(size=(2, 1, 1, 37)), jnp.float32)
    valid = jnp.arange(37) < jnp.asarray(lengths or (37, 37))[:, None]
    lengths = None if lengths is None else jnp.asarray(lengths, jnp.int32)

    def both(kernel: str) -> tuple:
        attended, vjp = jax.vjp(
            lambda *inputs: attention.attend(*inputs[:-1], kernel, lengths, inputs[-1]),
            *inputs,
            bias,
        )
        return jnp.where(valid[..., None, None], attended, 0), vjp(
            jnp.where(valid[..., None, None], gradient, 0)
        )

    close(both("chunked"), both("xla"))


def test_few_tokens_need_no_chunks(monkeypatch):
    monkeypatch.setattr(chunked_attention, "FEWEST", 128)
    assert "stablehlo.while" not in lowered("chunked", "cpu", 128, masked=True)
    assert "stablehlo.while" in lowered("chunked", "cpu", 129, masked=True)


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(("tokens", "lengths"), CASES)
def test_cudnn_equals_the_plain_one(tokens, lengths, dtype):
    with jax.default_matmul_precision("highest"):
        *plain, _ = attend(tokens, lengths, "float32", "xla")
    *ours, _ = attend(tokens, lengths, dtype, "cudnn")
    close(ours, plain, dtype)


@pytest.mark.parametrize("lengths", [None, (17, 9)])
def test_xla_equals_the_formula(lengths):
    qkv, q_scale, k_scale, _ = make_inputs(17, "float32")
    q, k, v = np.asarray(qkv, np.float64)

    def normed(x, scale):
        return x / np.sqrt(np.mean(x**2, (2, 3), keepdims=True) + 1e-6) * scale.reshape(3, 16)

    scores = np.einsum("bnhk,bmhk->bhnm", normed(q, q_scale), normed(k, k_scale)) / 4
    if lengths:
        scores[
            np.broadcast_to(np.arange(17) >= np.array(lengths)[:, None, None, None], scores.shape)
        ] = -1e9
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    expected = np.einsum("bhnm,bmhk->bnhk", shares / shares.sum(-1, keepdims=True), v)
    lengths = None if lengths is None else jnp.asarray(lengths, jnp.int32)
    ours = attention.attend(qkv, q_scale, k_scale, "xla", lengths)
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", ["chunked", "pallas"])
def test_large_scores_do_not_overflow(kernel):
    qkv, *scales, _ = make_inputs(256, "float32", kernel)
    ours = attention.attend(qkv, *(300 * scale for scale in scales), kernel)
    assert np.isfinite(ours).all()


def lowered(kernel: str, platform: str, tokens: int, masked: bool) -> str:
    """The program for a platform that is not here, forward and backward."""
    heads = (3, 64, tokens) if kernel in ON_TPU else (tokens, 3, 64)
    qkv = jax.ShapeDtypeStruct((3, 2, *heads), jnp.bfloat16)
    scale = jax.ShapeDtypeStruct((192,), jnp.float32)
    lengths = jax.ShapeDtypeStruct((2,), jnp.int32) if masked else None

    def loss(qkv, q_scale, k_scale, lengths):
        attended = attention.attend(qkv, q_scale, k_scale, kernel, lengths)
        return jnp.sum(attended.astype(jnp.float32))

    program = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(qkv, scale, scale, lengths)
    return program.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("masked", [False, True])
def test_cudnn_is_called(masked, monkeypatch):
    # The version is asked of the library itself, which is not here.
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    text = lowered("cudnn", "cuda", 264, masked)
    assert text.count("__cudnn$fmhaSoftmax(") == text.count("__cudnn$fmhaSoftmaxBackward(") == 1
    assert ("PADDING" in text) == masked


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kernel", ON_TPU)
def test_pallas_is_compiled_on_tpu(kernel, masked, monkeypatch):
    monkeypatch.setattr(attention, "INTERPRET_SPLASH", False)
    text = lowered(kernel, "tpu", 256, masked)
    assert text.count("@tpu_custom_call(") == {"pallas": 2, "splash": 3}[kernel]


# --- In the network

GRID = (4, 4, 4)
SMALL = fluxvit.FluxViTConfig(
    width=48, depth=2, heads=3, frames=4, rows=4, columns=4, classes=10, budgets=2, pool_width=64,
    pool_heads=4, layer_scale=0.3, drop_path=0.2,
)  # fmt: skip
GRIDS = jnp.asarray([(4, 4, 4), (2, 4, 3), (4, 4, 4), (3, 4, 3)])  # one has fewer than 40 patches


@cache
def params() -> dict:
    def shaken(leaf):
        return leaf + 0.1 * jax.random.normal(jax.random.key(leaf.size), leaf.shape)

    make = jax.jit(lambda key: jax.tree.map(shaken, fluxvit.init_params(SMALL, key)))
    return make(jax.random.key(0))


@cache
def answer(**changes):
    """Class scores and gradients of everything, in training."""
    graph = fluxvit.graphdef(replace(SMALL, **changes))
    limits = GridLimits(*GRID, 24)

    def loss(params, patches):
        model, keys = fluxvit.from_params(graph, params), jax.random.split(jax.random.key(3), 4)
        kept = model.select(patches, GRIDS, 40, limits)
        position = model.position(GRIDS, kept.token_index, limits)
        tokens = model.encode(fluxvit.gather_tokens(patches, kept), position, kept, keys)
        scores = model.classify(model.pool_tokens(tokens, kept, 1), 1)
        return jnp.sum(jnp.sin(scores)), (scores, tokens)

    patches = jax.random.normal(jax.random.key(1), (4, 64, fluxvit.PATCH_VALUES))
    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (_, (scores, tokens)), gradients = run(params(), patches)
    return (scores, tokens), gradients


def close_gradients(ours, plain, dtype):
    """Leaves that cancel to nothing are measured by the largest gradient of all."""
    most = max(np.abs(leaf).max() for leaf in jax.tree.leaves(plain))
    for a, b in zip(*map(jax.tree.leaves, (ours, plain)), strict=True):
        atol = 2 * TOLERANCE[dtype] * max(np.abs(b).max(), 1e-3 * most)
        np.testing.assert_allclose(a, b, rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("cls", "changes"),
    [
        ("outside", {"remat": "names"}),
        ("outside", {"remat": "full"}),
        ("outside", {"attention": "chunked", "remat": "names"}),
        ("outside", {"attention": "splash", "remat": "names"}),
        ("outside", {"attention": "pallas", "remat": "names", "scan": False}),
        ("inside", {"attention": "pallas"}),
        ("inside", {"attention": "splash"}),
    ],
    ids=str,
)
def test_the_network_is_the_same(cls, changes):
    ours, ours_gradients = answer(cls=cls, **changes)
    plain, gradients = answer(cls=cls)
    assert ours[1].shape == (4, 40 + (cls == "outside"), 48)
    valid = np.arange(ours[1].shape[1])[:, None] < np.asarray([64, 24, 64, 36])[:, None, None]
    close((ours[0], ours[1] * valid), (plain[0], plain[1] * valid))
    close_gradients(ours_gradients, gradients, "float32")


@pytest.mark.parametrize(
    "changes",
    [
        {"attention": "pallas", "remat": "names"},
        {"attention": "chunked", "float32_products": True},
    ],
    ids=str,
)
def test_the_network_in_bfloat16(changes):
    """About as far from float32 as the plain kernel is."""
    exact, _ = answer()
    ours, _ = answer(dtype="bfloat16", **changes)
    plain, _ = answer(dtype="bfloat16")
    ours, plain = (np.abs(scores[0] - exact[0]).max() for scores in (ours, plain))
    assert ours < 2 * plain + 1e-3


@pytest.mark.parametrize("remat", ["none", "names"])
def test_what_a_block_keeps(remat):
    """10 numbers of a channel and token for the backward pass where it recomputes."""
    B, N, C = 2, 256, 48
    config = blocks.BlockConfig(
        C, 3, 4 * C, "pallas", layer_scale=1.0, dtype=jnp.bfloat16, recompute=remat == "names"
    )
    block = blocks.Block(config, fluxvit.nnx.Rngs(0))
    graph, state = fluxvit.nnx.split(block)

    def kept(state, x):
        forward = lambda state, x: fluxvit.nnx.merge(graph, state)(x, None, 0.0, None)  # noqa: E731
        return jax.vjp(forward, state, x)[1]

    x = jax.ShapeDtypeStruct((B, N, C), jnp.bfloat16)
    arrays = jax.tree.leaves(jax.eval_shape(kept, state, x))
    large = [a for a in arrays if a.size >= B * N * C]
    numbers = sum(a.size for a in large) / (B * N * C)
    if remat == "names":
        assert numbers == 10
        assert all(a.dtype == jnp.bfloat16 for a in large)
    else:
        assert numbers > 15


# --- On several devices


@pytest.mark.slow
def test_devices_change_nothing(compiled):
    """Clips over two axes of the mesh and heads over the third, against one device."""
    program = textwrap.dedent(
        """
        import json
        import jax
        import numpy as np
        from jax.sharding import AxisType, NamedSharding, PartitionSpec
        from fluxvit_jax.models import attention, chunked_attention, fluxvit
        from fluxvit_jax.models import sharding_constraints as placement
        from fluxvit_jax.models.token_selection import GridLimits, Selection

        attention.INTERPRET_SPLASH = True
        chunked_attention.FEWEST, chunked_attention.CHUNK = 0, 16
        axes = (*placement.CLIP_AXES, placement.HEAD_AXIS)
        one, eight = (
            jax.make_mesh(
                (side,) * 3, axes, axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[: side**3]
            )
            for side in (1, 2)
        )
        numbers = []
        kernels = [(eight, kernel) for kernel in ("xla", "chunked", "pallas", "splash")]
        for mesh, kernel in [(one, "xla"), *kernels]:
            config = fluxvit.FluxViTConfig(
                width=32, depth=2, heads=2, frames=4, rows=4, columns=4, classes=5, budgets=1,
                pool_width=32, pool_heads=2, layer_scale=0.5, remat="names", attention=kernel,
            )
            graph, limits = fluxvit.graphdef(config), GridLimits(4, 4, 4, 64)
            grids = np.tile(np.int32([4, 4, 4]), (4, 1))

            def loss(params, patches):
                model = fluxvit.from_params(graph, params)
                kept = model.select(patches, grids, 33, limits)
                position = model.position(grids, kept.token_index, limits)
                tokens = model.encode(fluxvit.gather_tokens(patches, kept), position, kept)
                return (model.pool_tokens(tokens, kept, 0) ** 2).sum()

            with jax.set_mesh(mesh):
                params = fluxvit.init_params(config, jax.random.key(0))
                patches = jax.random.normal(jax.random.key(1), (4, 64, 588))
                cut = NamedSharding(mesh, PartitionSpec(placement.CLIP_AXES))
                value, gradients = jax.jit(jax.value_and_grad(loss))(
                    params, jax.device_put(patches, cut)
                )
                norms = [float((leaf ** 2).sum()) for leaf in jax.tree.leaves(gradients)]
            numbers.append([float(value), *norms])

        def alone(qkv, scale):
            return (attention.attend(qkv, scale, scale, "chunked") ** 2).sum()

        cut = PartitionSpec(None, placement.CLIP_AXES, None, placement.HEAD_AXIS)
        qkv = jax.ShapeDtypeStruct((3, 4, 33, 2, 16), "float32", sharding=NamedSharding(mesh, cut))
        whole = NamedSharding(mesh, PartitionSpec())
        scale = jax.ShapeDtypeStruct((32,), "float32", sharding=whole)
        with jax.set_mesh(mesh):
            text = jax.jit(jax.grad(alone)).lower(qkv, scale).compile().as_text()
        print(json.dumps([numbers, "all-gather" in text or "all-to-all" in text]))
        """
    )
    done = limited.run([sys.executable, "-c", program], env=tiny.environment(compiled, 8))
    assert done.returncode == 0, done.stderr
    numbers, moved = json.loads(done.stdout)
    assert not moved  # clips and heads stay where they are
    one, *eight = np.array(numbers)
    for own in eight:  # of each kernel; on one device they are compared above
        np.testing.assert_allclose(own, one, rtol=1e-4, atol=1e-4 * one.max())
