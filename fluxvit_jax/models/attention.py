"""Self-attention by the kernel that suits the device; every one computes the same function.

    xla      `jax.nn.dot_product_attention`, anywhere; the only one with a bias
    pallas   our own kernels for TPU, `pallas_attention`
    splash   JAX's kernels for TPU
    cudnn    flash attention on NVIDIA GPUs, for 16-bit numbers

Real tokens are a prefix of each clip's sequence, so a mask is one number a clip, its length. What
places past it come to is finite and means nothing.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
)
from jax.sharding import PartitionSpec

from fluxvit_jax.models import norms, pallas_attention, placement, sequence

Kernel = Literal["xla", "pallas", "splash", "cudnn"]
KERNELS: tuple[str, ...] = get_args(Kernel)

INTERPRET_SPLASH = False  # for tests on CPU; unlike ours, JAX's kernels cannot tell the platform

PLATFORM = {"pallas": ("tpu",), "splash": ("tpu",), "cudnn": ("gpu", "cuda")}
CUDNN_HEAD_LIMIT = 128  # before Hopper; from then on 256


class Order(NamedTuple):
    """The order in which a kernel wants the axes of q, k and v, so that no one transposes them.

    project: tokens [B, N, C] and the kernel [C, 3, heads, K] to q, k and v; join: heads and the
    output kernel [heads, K, C] to tokens; heads, channels, tokens: which axes of q these are.
    """

    project: str
    join: str
    heads: int
    channels: int
    tokens: int

    def of_channel(self, parameter: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """A parameter of each channel, [C], to multiply q, k or v of a shape by: 4 axes."""
        return jnp.expand_dims(parameter.reshape(shape[self.heads], -1), (0, self.tokens))

    def normalise(self, x: jax.Array, scale: jax.Array) -> jax.Array:
        """q or k normalised over the whole width, all heads together; scale: [C]."""
        scale = self.of_channel(scale, x.shape)
        return norms.rms_norm(x, scale, (self.heads, self.channels))


TOKENS_FIRST = Order("bnc,cjhk->jbnhk", "bnhk,hkc->bnc", heads=2, channels=3, tokens=1)
# Heads are narrower than the 128 lanes of a TPU's registers: with tokens in the lanes these are
# full, and nothing is padded in memory.
TOKENS_LAST = Order("bnc,cjhk->jbhkn", "bhkn,hkc->bnc", heads=1, channels=2, tokens=3)


def order(kernel: str) -> Order:
    """The order of axes that a kernel wants."""
    return TOKENS_LAST if kernel in ("pallas", "splash") else TOKENS_FIRST


def choose(kind: str, platform: str, dtype: str, head_size: int) -> str:
    """The kernel for a platform, which need not be the one that this process runs on.

    kind: one of KERNELS or "auto"; platform: "cpu", "tpu", "gpu" or "cuda"; dtype: of q, k and v.

    Raises ValueError for a kernel that is unknown, or that the platform, the dtype or the head size
    rules out.
    """
    small = jnp.dtype(dtype).itemsize == 2 and head_size % 8 == 0 and head_size <= CUDNN_HEAD_LIMIT
    if kind == "auto":
        fits = {"tpu": "pallas", "gpu": "cudnn" if small else "xla"}
        return fits.get("gpu" if platform == "cuda" else platform, "xla")
    if kind not in KERNELS:
        raise ValueError(f"attention {kind!r} is none of auto, {', '.join(KERNELS)}")
    if platform not in PLATFORM.get(kind, (platform,)):
        raise ValueError(f"attention {kind!r} is for {PLATFORM[kind][0]}, not for {platform}")
    if kind == "cudnn" and not small:
        raise ValueError(
            f"attention 'cudnn' takes bfloat16 or float16 and heads of a multiple of 8 channels up "
            f"to {CUDNN_HEAD_LIMIT}, not {dtype} and heads of {head_size}"
        )
    return kind


@jax.named_scope("attention")
def attend(
    qkv: jax.Array,
    q_scale: jax.Array,
    k_scale: jax.Array,
    kernel: str,
    lengths: jax.Array | None = None,
    bias: jax.Array | None = None,
) -> jax.Array:
    """Softmax attention of each head, with q and k normalised over the whole width before.

    qkv: [3, B, ...] in the order of `order(kernel)`; q_scale, k_scale: float32 [C], by which the
    normalised are multiplied. lengths: int32 [B], how many places at the front of each clip are
    attended to; None: all. bias: added to the logits, float32 [B, 1, 1, N]; xla only.
    Returns the attended values in the order of v.
    """
    if kernel == "pallas":
        return _pallas(qkv, q_scale, k_scale, lengths)
    q, k, v = qkv
    q, k = (order(kernel).normalise(x, scale) for x, scale in ((q, q_scale), (k, k_scale)))
    if kernel == "splash":
        return _by_device(_splash, (q, k, v), lengths)
    if kernel == "cudnn":
        return jax.nn.dot_product_attention(
            q, k, v, key_value_seq_lengths=lengths, implementation="cudnn"
        )
    mask = None
    if lengths is not None:
        mask = (jnp.arange(k.shape[1])[None] < lengths[:, None])[:, None, None]
    return jax.nn.dot_product_attention(q, k, v, bias, mask)


@jax.custom_vjp
def _pallas(
    qkv: jax.Array, q_scale: jax.Array, k_scale: jax.Array, lengths: jax.Array | None
) -> jax.Array:
    """Our kernels, which normalise q and k themselves: their normalised forms are never written."""
    return _pallas_forward(qkv, q_scale, k_scale, lengths)[0]


def _pallas_forward(qkv, q_scale, k_scale, lengths):
    scale = jnp.stack([TOKENS_LAST.of_channel(x, qkv.shape[1:]) for x in (q_scale, k_scale)])
    inputs = pallas_attention.Normalised(qkv, norms.rms_gain(qkv[:2], (2, 3)), scale)
    found = _by_device(pallas_attention.forward, inputs, lengths)
    return found[0], (inputs, lengths, *found)


def _pallas_backward(kept, gradient):
    inputs, lengths, *found = kept
    *normalised, dv = _by_device(pallas_attention.backward, inputs, lengths, *found, gradient)
    # The rest of the way for x * gain * scale, where gain depends on x.
    dqkv, dscales = [], []
    for n, d in enumerate(normalised):
        unit = inputs.qkv[n].astype(jnp.float32) * inputs.gain[n]
        dscales.append(jnp.sum(d * unit, axis=(0, 3)).ravel())
        d = d * inputs.scale[n]
        d = inputs.gain[n] * (d - unit * jnp.mean(d * unit, axis=(1, 2), keepdims=True))
        dqkv.append(d.astype(dv.dtype))
    return jnp.stack([*dqkv, dv]), *dscales, None


_pallas.defvjp(_pallas_forward, _pallas_backward)


def _by_device(kernel: Callable, inputs: tuple, *others: jax.Array | None) -> Any:
    """A Pallas kernel on each device's own clips and heads.

    All arrays are [..., B, heads, K, N], but with an axis of size 1 where they do not vary, or
    lengths, [B]. The results are [B, heads, ., N], cut as the first of the inputs is.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = placement.open_axes(mesh)
    if not axes:
        return kernel(inputs, *others)

    def spec(x: jax.Array) -> PartitionSpec:
        if x.ndim == 1:
            return PartitionSpec(placement.clip_axes(mesh, len(x)))
        clips, heads = x.shape[-4:-2]
        by_clip = None if clips == 1 else placement.clip_axes(mesh, clips)
        by_head = None if heads == 1 else placement.head_axis(mesh, heads)
        return PartitionSpec(*[None] * (x.ndim - 4), by_clip, by_head, None, None)

    # The partitioner cannot look into a Pallas kernel: it would gather everything before it.
    in_specs = jax.tree.map(spec, (inputs, *others))
    out_specs = PartitionSpec(*spec(jax.tree.leaves(inputs)[0])[-4:])
    return jax.shard_map(
        kernel,
        axis_names=placement.open_axes(mesh),
        in_specs=in_specs,
        out_specs=out_specs,
        check_vma=False,
    )(inputs, *others)


def _splash(heads: tuple[jax.Array, ...], lengths: jax.Array | None) -> jax.Array:
    """JAX's splash attention. q, k, v and the result: [B, heads, K, N]."""
    q, k, v = heads
    K, N = q.shape[2:]
    kernel = _splash_kernel(q.shape[1], N)
    q, k, v = (x.swapaxes(-1, -2) for x in (q * jnp.asarray(K**-0.5, q.dtype), k, v))
    if lengths is None:
        return jax.vmap(kernel)(q, k, v).swapaxes(-1, -2)
    # The tail is a segment of its own: it attends to itself, so that no row of scores is empty.
    segment = (jnp.arange(N)[None] < lengths[:, None]).astype(jnp.int32)
    segments = splash_attention_kernel.SegmentIds(segment, segment)
    return jax.vmap(kernel)(q, k, v, segments).swapaxes(-1, -2)


def _splash_kernel(heads: int, N: int) -> Callable[..., jax.Array]:
    """The kernel for one clip: q, k, v [heads, N, K] and segments int32 [N] -> [heads, N, K]."""
    side = sequence.tile(N)
    layout = splash_attention_kernel.QKVLayout.SEQ_MINOR
    sizes = splash_attention_kernel.BlockSizes(
        block_q=side,
        block_kv=side,
        block_q_dkv=side,
        block_kv_dkv=side,
        block_q_dq=side,
        block_kv_dq=side,
        q_layout=layout,
        k_layout=layout,
        v_layout=layout,
    )
    full = splash_attention_mask.FullMask((N, N))
    return splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([full] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        interpret=INTERPRET_SPLASH,
    )
