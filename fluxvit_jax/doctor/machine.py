"""Checks of the machine: versions, devices, attention kernels and shared memory."""

import contextlib
import glob
import importlib.util
import os
import platform
import shutil
from importlib import metadata

from fluxvit_jax.doctor.outcome import FailedError, NotHereError, Place
from fluxvit_jax.main import ACCELERATORS

PACKAGE = "fluxvit_jax"
LEAST_SHARED_MB = 1024  # of batches on their way to training at 3072 tokens
SIZE = 512  # of a product of matrices
TOLERANCE = 1e-3  # of the largest number in a product
HEAD_SIZE = 64


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
        if not off < TOLERANCE:
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
    from fluxvit_jax.models.attention_check import difference, tolerance

    platform = jax.devices()[0].platform
    dtype = "float32" if platform == "cpu" else "bfloat16"
    off: dict[str, float] = {}
    for kernel in KERNELS:
        with contextlib.suppress(ValueError):  # for another platform
            choose(kernel, platform, dtype, HEAD_SIZE)
            off[kernel] = difference(kernel, dtype, HEAD_SIZE)
    numbers = ", ".join(f"{kernel} {by:.0e}" for kernel, by in off.items())
    detail = f"{dtype}, output and gradients off by, of their largest number: {numbers}"
    wrong = [kernel for kernel, by in off.items() if not by < tolerance(dtype)]
    right = [kernel for kernel in off if kernel not in wrong]
    if wrong:
        cure = f"--config.model.attention={right[0]}" if right else "another jax, or driver"
        raise FailedError(f"{', '.join(wrong)} is wrong; {detail}", cure)
    return detail


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
