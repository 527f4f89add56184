"""Self-attention kernels for each kind of device; all compute the same function.

    xla      `jax.nn.dot_product_attention`, anywhere
    chunked  ours in plain JAX, anywhere, made for CPUs, `chunked_attention`
    pallas   our own kernels for TPU, `pallas_attention`
    splash   JAX's kernels for TPU
    cudnn    flash attention on NVIDIA GPUs, for 16-bit numbers

Real tokens are a prefix of each clip's sequence, so the mask is one number per clip, its length.
Outputs past the length are finite and meaningless.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
)
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from fluxvit_jax.models import (
    chunked_attention,
    norms,
    padded_sequence,
    pallas_attention,
    sharding_constraints,
)
from fluxvit_jax.models.arrays import Array, Size

Kernel = Literal["xla", "chunked", "pallas", "splash", "cudnn"]
KERNELS: tuple[str, ...] = get_args(Kernel)

MASKED = -1e30  # bias of a masked key, finite so that differences are not NaN
INTERPRET_SPLASH = False  # for tests on CPU; unlike ours, JAX's kernels cannot tell the platform

BEST = {"cpu": ("chunked",), "tpu": ("pallas", "splash"), "gpu": ("cudnn",)}  # then "xla"
# Kernels, with sizes of heads, that compute wrong here: see `distributed.kernel_check`.
REFUSED: set[tuple[str, int]] = set()
PLATFORM = {"pallas": ("tpu",), "splash": ("tpu",), "cudnn": ("gpu", "cuda")}
CUDNN_HEAD_LIMIT = 128  # before Hopper; from then on 256


@dataclass(frozen=True, slots=True, kw_only=True)
class QKVLayout:
    """Axis layout (BNHD or BHDN) in which an attention kernel takes q, k and v.

    Writing and reading this layout directly avoids transposes. projection: the einsum of tokens
    [B, N, C] and the kernel [C, 3, heads, D] that makes q, k and v; output: the einsum of heads and
    the output kernel [heads, D, C] that makes tokens; heads, channels, tokens: axes of q.
    """

    projection: str
    output: str
    heads: int
    channels: int
    tokens: int

    def per_channel(
        self, parameter: Float[Array, " C"], shape: tuple[Size, ...]
    ) -> Float[Array, "1 _ _ _"]:
        """A parameter of each channel, [C], with the four axes of q, k or v of shape `shape`."""
        return jnp.expand_dims(parameter.reshape(shape[self.heads], -1), (0, self.tokens))

    def normalize(
        self, x: Float[Array, "*shape"], scale: Float[Array, " C"]
    ) -> Float[Array, "*shape"]:
        """RMSNorm of q or k over the whole width, all heads together; scale: [C]."""
        return norms.rms_norm(x, self.per_channel(scale, x.shape), (self.heads, self.channels))


# Channels of a head are `k` in einsums: they contract in alphabetical order, and with `d` before
# `h` sums would be rounded differently.
BNHD = QKVLayout(
    projection="bnc,cjhk->jbnhk", output="bnhk,hkc->bnc", heads=2, channels=3, tokens=1
)
# Heads are narrower than the 128 lanes of a TPU's registers: with tokens in the lanes these are
# full, and nothing is padded in memory.
BHDN = QKVLayout(
    projection="bnc,cjhk->jbhkn", output="bhkn,hkc->bnc", heads=1, channels=2, tokens=3
)


def qkv_layout(kernel: str) -> QKVLayout:
    """The axis layout that a kernel takes."""
    return BHDN if kernel in ("pallas", "splash") else BNHD


def with_bias(kernel: str) -> str:
    """The kernel itself if it takes a bias, or else "xla"."""
    return kernel if kernel in ("xla", "chunked") else "xla"


def choose(kind: str, platform: str, dtype: DTypeLike, head_size: int) -> str:
    """The kernel for a platform, which may differ from the one that this process runs on.

    kind: one of KERNELS or "auto"; platform: "cpu", "tpu", "gpu" or "cuda"; dtype: of q, k and v.

    Raises ValueError for a kernel that is unknown or that does not support the platform, the dtype
    or the head size.
    """
    small = jnp.dtype(dtype).itemsize == 2 and head_size % 8 == 0 and head_size <= CUDNN_HEAD_LIMIT
    if kind == "auto":
        for kernel in BEST.get("gpu" if platform == "cuda" else platform, ()):
            if (kernel != "cudnn" or small) and (kernel, head_size) not in REFUSED:
                return kernel
        return "xla"
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
    qkv: Float[Array, "3 B *axes"],
    q_scale: Float[Array, " C"],
    k_scale: Float[Array, " C"],
    kernel: str,
    lengths: Int[Array, " B"] | None = None,
    bias: Float[Array, "B 1 1 N"] | None = None,
) -> Float[Array, "B *axes"]:
    """Softmax attention of each head, after RMSNorm of q and k over the whole width.

    qkv: [3, B, ...] in the layout `qkv_layout(kernel)`; q_scale, k_scale: float32 [C], scales of
    the norms. lengths: int32 [B], tokens at the front of each clip that are attended to; None: all.
    bias: added to the logits, float32 [B, 1, 1, N], for kernels of `with_bias`.
    Returns the attention output in the layout of v.
    """
    if kernel == "pallas":
        return _pallas(qkv, q_scale, k_scale, lengths)
    q, k, v = qkv
    layout = qkv_layout(kernel)
    q, k = layout.normalize(q, q_scale), layout.normalize(k, k_scale)
    if kernel == "splash":
        return _per_shard(_splash, (q, k, v), lengths)
    if kernel == "cudnn":
        return jax.nn.dot_product_attention(
            q, k, v, key_value_seq_lengths=lengths, implementation="cudnn"
        )
    if kernel == "chunked" and k.shape[1] > chunked_attention.FEWEST:
        return _chunked(q, k, v, _masked(bias, lengths, k.shape[1]))
    mask = None
    if lengths is not None:
        mask = (jnp.arange(k.shape[1])[None] < lengths[:, None])[:, None, None]
    return jax.nn.dot_product_attention(q, k, v, bias, mask)


def _masked(
    bias: Float[Array, "B 1 1 N"] | None, lengths: Int[Array, " B"] | None, N: int
) -> Float[Array, "B 1 1 N"] | None:
    """A bias that also masks the keys past each clip's length."""
    if lengths is None:
        return bias
    real = (jnp.arange(N) < lengths[:, None])[:, None, None]
    return jnp.where(real, 0.0 if bias is None else bias, MASKED)


@jax.custom_vjp
def _chunked(
    q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None
) -> Float[Array, "B N heads D"]:
    """Attention in chunks of queries. q, k and v: [B, N, heads, D], q and k normalized."""
    return _chunked_forward(q, k, v, bias)[0]


def _chunked_forward(
    q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None
) -> tuple[jax.Array, tuple]:
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    inputs = chunked_attention.Inputs(q, k, v, bias)
    attended, log_sums = _per_shard(chunked_attention.forward, inputs)
    return attended.swapaxes(1, 2), (inputs, attended, log_sums)


def _chunked_backward(residuals: tuple, gradient: jax.Array) -> tuple[jax.Array | None, ...]:
    *dqkv, dbias = _per_shard(chunked_attention.backward, *residuals, gradient.swapaxes(1, 2))
    dbias = None if dbias is None else jnp.sum(dbias, axis=1, keepdims=True)
    return *(x.swapaxes(1, 2) for x in dqkv), dbias


_chunked.defvjp(_chunked_forward, _chunked_backward)


@jax.custom_vjp
def _pallas(
    qkv: jax.Array, q_scale: jax.Array, k_scale: jax.Array, lengths: jax.Array | None
) -> jax.Array:
    """Our kernels, which normalize q and k themselves, so that these are not written to memory."""
    return _pallas_forward(qkv, q_scale, k_scale, lengths)[0]


def _pallas_forward(
    qkv: jax.Array, q_scale: jax.Array, k_scale: jax.Array, lengths: jax.Array | None
) -> tuple[jax.Array, tuple]:
    scale = jnp.stack([BHDN.per_channel(x, qkv.shape[1:]) for x in (q_scale, k_scale)])
    inputs = pallas_attention.NormalizedQKV(qkv, norms.rms_gain(qkv[:2], (2, 3)), scale)
    attended, log_sums = _per_shard(pallas_attention.forward, inputs, lengths)
    return attended, (inputs, lengths, attended, log_sums)


def _pallas_backward(residuals: tuple, gradient: jax.Array) -> tuple[jax.Array | None, ...]:
    inputs, lengths, attended, log_sums = residuals
    *dnormalized, dv = _per_shard(
        pallas_attention.backward, inputs, lengths, attended, log_sums, gradient
    )
    # Backward through x * gain * scale, where gain depends on x.
    dqkv, dscales = [], []
    for n, d in enumerate(dnormalized):
        unit = inputs.qkv[n].astype(jnp.float32) * inputs.gain[n]
        dscales.append(jnp.sum(d * unit, axis=(0, 3)).ravel())
        d = d * inputs.scale[n]
        d = inputs.gain[n] * (d - unit * jnp.mean(d * unit, axis=(1, 2), keepdims=True))
        dqkv.append(d.astype(dv.dtype))
    return jnp.stack([*dqkv, dv]), *dscales, None


_pallas.defvjp(_pallas_forward, _pallas_backward)


def _per_shard(kernel: Callable, inputs: tuple, *others: jax.Array | None) -> Any:
    """The outputs of a kernel that runs on each device's clips and heads under shard_map.

    Arrays are [..., B, heads, ., .], with size 1 on axes along which they do not vary, or lengths,
    [B]. Outputs are [B, heads, ., .], sharded as the first of the inputs.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = sharding_constraints.open_axes(mesh)
    if not axes:
        return kernel(inputs, *others)

    def spec(x: jax.Array) -> PartitionSpec:
        if x.ndim == 1:
            return PartitionSpec(sharding_constraints.clip_axes(mesh, len(x)))
        clips, heads = x.shape[-4:-2]
        by_clip = None if clips == 1 else sharding_constraints.clip_axes(mesh, clips)
        by_head = None if heads == 1 else sharding_constraints.head_axis(mesh, heads)
        return PartitionSpec(*[None] * (x.ndim - 4), by_clip, by_head, None, None)

    # XLA cannot partition a Pallas kernel or a loop over heads: it would gather all inputs.
    in_specs = jax.tree.map(spec, (inputs, *others))
    out_specs = PartitionSpec(*spec(jax.tree.leaves(inputs)[0])[-4:])
    return jax.shard_map(
        kernel,
        axis_names=axes,
        in_specs=in_specs,
        out_specs=out_specs,
        check_vma=False,
    )(inputs, *others)


def _splash(heads: tuple[jax.Array, ...], lengths: jax.Array | None) -> jax.Array:
    """JAX's splash attention. q, k, v and the result: [B, heads, D, N]."""
    q, k, v = heads
    D, N = q.shape[2:]
    kernel = _splash_kernel(q.shape[1], N)
    q, k, v = (x.swapaxes(-1, -2) for x in (q * jnp.asarray(D**-0.5, q.dtype), k, v))
    if lengths is None:
        return jax.vmap(kernel)(q, k, v).swapaxes(-1, -2)
    # The padding is a separate segment: it attends to itself, so that no row of scores is empty.
    segment = (jnp.arange(N)[None] < lengths[:, None]).astype(jnp.int32)
    segments = splash_attention_kernel.SegmentIds(segment, segment)
    return jax.vmap(kernel)(q, k, v, segments).swapaxes(-1, -2)


def _splash_kernel(heads: int, N: int) -> Callable[..., jax.Array]:
    """The kernel for one clip: q, k, v [heads, N, D] and segments int32 [N] -> [heads, N, D]."""
    side = padded_sequence.tile(N)
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
