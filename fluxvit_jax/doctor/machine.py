"""Checks of the machine: versions, devices, attention kernels and shared memory."""

import contextlib
import glob
import importlib.util
import os
import platform
import shutil
from collections.abc import Callable
from importlib import metadata
from typing import Any

from fluxvit_jax.doctor.outcome import FailedError, NotHereError, Place
from fluxvit_jax.main import ACCELERATORS

PACKAGE = "fluxvit_jax"
LEAST_SHARED_MB = 1024  # of batches on their way to training at 3072 tokens
SIZE = 512  # of a product of matrices
LENGTHS, HEADS, CHANNELS = (512, 300), 2, 64  # of attention: tokens of two clips
# Of the largest number, for 32 and for 16 bits; as in the tests, but on any device.
TOLERANCE = {4: 1e-3, 2: 3e-2}


def versions(_: Place) -> str:
    """Whether the installed packages are those that this one asks for."""
    import av
    import flax
    import jax
    from flax import nnx  # noqa: F401 - imports only with a jax of its own age

    found = {"Python": platform.python_version(), "jax": jax.__version__, "flax": flax.__version__}
    codec = ".".join(map(str, av.library_versions["libavcodec"]))
    told = ", ".join(f"{name} {version}" for name, version in found.items())
    told += f", PyAV {av.__version__} (libavcodec {codec})"
    if wrong := _wrong_requirements():
        raise FailedError(f"{told}; {', '.join(wrong)}", "pip install -r requirements.txt")
    return told


def _wrong_requirements() -> list[str]:
    """What the package asks for and is missing or of another version; extras do not count."""
    try:
        lines = metadata.requires(PACKAGE) or []
    except metadata.PackageNotFoundError:  # it runs from a clone that is not installed
        return []
    if importlib.util.find_spec("packaging") is None:
        return []
    from packaging.requirements import Requirement

    wrong = []
    for requirement in map(Requirement, lines):
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            version = "none"
        if version == "none" or not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} is {version} and not {requirement.specifier}")
    return wrong


def devices(_: Place) -> str:
    """Whether JAX sees the devices of this machine, and each multiplies right."""
    import jax
    import numpy as np

    from fluxvit_jax.distributed.devices import device_name

    found = jax.local_devices()
    there = [path for pattern in ACCELERATORS for path in glob.glob(pattern)]
    if found[0].platform == "cpu" and there and "JAX_PLATFORMS" not in os.environ:
        raise FailedError(
            f"{there[0]} is there, and JAX sees the CPU only",
            "pip install -e '.[cuda]' for NVIDIA GPUs, or jax[tpu]; see docs/install.md",
        )
    a, b = np.random.default_rng(0).normal(size=(2, SIZE, SIZE)).astype(np.float32)
    right = a.astype(np.float64) @ b
    for device in found:
        with jax.default_device(device), jax.default_matmul_precision("highest"):
            off = np.abs(np.asarray(jax.numpy.matmul(a, b)) - right).max() / np.abs(right).max()
        if not off < TOLERANCE[4]:
            raise FailedError(
                f"{device}: a product of matrices is off by {off:.1e} of its largest number",
                "update the driver; if that does not help, the device is broken",
            )
    memory = (found[0].memory_stats() or {}).get("bytes_limit") or _main_memory()
    return f"{len(found)} x {device_name(found[0])}, {memory / 2**30:.1f} GiB"


def _main_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def attention(_: Place) -> str:
    """Whether each attention kernel of this platform computes what the plain one does."""
    import jax

    from fluxvit_jax.models.attention import KERNELS, choose

    platform = jax.devices()[0].platform
    dtype = "float32" if platform == "cpu" else "bfloat16"
    off: dict[str, float] = {}
    for kernel in KERNELS:
        with contextlib.suppress(ValueError):  # for another platform
            choose(kernel, platform, dtype, CHANNELS)
            off[kernel] = _difference(kernel, dtype)
    numbers = ", ".join(f"{kernel} {by:.0e}" for kernel, by in off.items())
    detail = f"{dtype}, output and gradients off by, of their largest number: {numbers}"
    limit = TOLERANCE[jax.numpy.dtype(dtype).itemsize]
    wrong = [kernel for kernel, by in off.items() if not by < limit]
    right = [kernel for kernel in off if kernel not in wrong]
    if wrong:
        cure = f"--config.model.attention={right[0]}" if right else "another jax, or driver"
        raise FailedError(f"{', '.join(wrong)} is wrong; {detail}", cure)
    return detail


def _difference(kernel: str, dtype: str) -> float:
    """The largest difference from the formula in float32, in output and gradients."""
    import jax
    import numpy as np

    with jax.default_matmul_precision("highest"):
        plain = _with_gradients(_formula, dtype, "float32")
    ours = _with_gradients(_kernel(kernel), dtype, dtype)
    return max(
        float(np.abs(a - b).max() / np.abs(b).max())
        for a, b in zip(map(np.float32, ours), map(np.float32, plain), strict=True)
    )


def _with_gradients(attend: Callable, rounded_to: str, dtype: str) -> list:
    """Output [B, N, heads, D] and the gradients of q, k, v and both scales.

    attend: function of qkv [3, B, N, heads, D] in dtype, both scales [heads * D] and the lengths
    [B]; rounded_to: another dtype that the numbers have fit into.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    rng = np.random.default_rng(0)
    lengths = jnp.array(LENGTHS, jnp.int32)
    valid = (np.arange(LENGTHS[0]) < np.array(LENGTHS)[:, None])[..., None, None]
    shape = (3, len(LENGTHS), LENGTHS[0], HEADS, CHANNELS)
    qkv = jnp.asarray(rng.normal(size=shape), rounded_to).astype(dtype)
    weights = jnp.asarray(rng.normal(size=shape[1:]) * valid, jnp.float32)
    scales = [jnp.asarray(rng.normal(1, 0.5, HEADS * CHANNELS), jnp.float32) for _ in range(2)]

    def attended(*inputs: jax.Array) -> jax.Array:
        # Past the length it means nothing.
        return jnp.where(valid, attend(*inputs, lengths), 0).astype(jnp.float32)

    @jax.jit
    def both(*inputs: jax.Array) -> list:
        out, pull_back = jax.vjp(attended, *inputs)
        dqkv, *dscales = pull_back(weights)
        return [out, *dqkv, *dscales]

    return both(qkv, *scales)


def _kernel(kernel: str) -> Callable:
    """A kernel as a function for `_with_gradients`."""
    from fluxvit_jax.models import attention

    tokens_last = attention.qkv_layout(kernel) == attention.BHDN

    def attend(qkv: Any, q_scale: Any, k_scale: Any, lengths: Any) -> Any:
        own = qkv.transpose(0, 1, 3, 4, 2) if tokens_last else qkv
        out = attention.attend(own, q_scale, k_scale, kernel, lengths)
        return out.transpose(0, 3, 1, 2) if tokens_last else out

    return attend


def _formula(qkv: Any, q_scale: Any, k_scale: Any, lengths: Any) -> Any:
    """Attention as it is written: a function for `_with_gradients`."""
    import jax
    import jax.numpy as jnp

    from fluxvit_jax.models.attention import BNHD

    q, k = BNHD.normalize(qkv[0], q_scale), BNHD.normalize(qkv[1], k_scale)
    scores = jnp.einsum("bnhd,bmhd->bhnm", q, k) / CHANNELS**0.5
    real = jnp.arange(LENGTHS[0]) < lengths[:, None]
    shares = jax.nn.softmax(jnp.where(real[:, None, None], scores, -jnp.inf))
    return jnp.einsum("bhnm,bmhd->bnhd", shares, qkv[2])


def memory(_: Place) -> str:
    """Whether shared memory, through which data workers hand over, holds some batches."""
    from fluxvit_jax.data.supervised_workers import SHARED_MEMORY

    if not os.path.isdir(SHARED_MEMORY):
        raise NotHereError(f"no {SHARED_MEMORY}; workers hand over through temporary files")
    total, _used, free = (size >> 20 for size in shutil.disk_usage(SHARED_MEMORY))
    detail = f"{SHARED_MEMORY}: {free} of {total} MB free"
    if free < LEAST_SHARED_MB:
        raise FailedError(
            f"{detail}, and a run at 3072 tokens takes {LEAST_SHARED_MB}",
            "enlarge it (docker run --shm-size=8g), or use fewer --config.data.workers",
        )
    return detail
