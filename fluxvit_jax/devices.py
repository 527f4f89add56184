"""What device this is, and what is too much for it. A server imports it: it needs JAX only."""

import contextlib
import platform
from collections.abc import Iterator
from pathlib import Path

import jax

from fluxvit_jax.errors import UserError


@contextlib.contextmanager
def enough_memory(otherwise: str) -> Iterator[None]:
    """Raises UserError, `otherwise`, where what is done inside needs more memory than there is."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(otherwise) from error


def device_name(device: jax.Device | None = None) -> str:
    """What timings belong to: "NVIDIA H100 80GB HBM3", or "<processor> (cpu)".

    device: the first that JAX has by default.
    """
    device = device or jax.devices()[0]
    return device.device_kind if device.platform != "cpu" else f"{_processor()} (cpu)"


def _processor(listing: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name as Linux lists it; elsewhere, or on ARM, what Python knows of it."""
    lines = listing.read_text().splitlines() if listing.exists() else []
    names = [line.partition(":")[2] for line in lines if line.startswith("model name")]
    # Makers pad these names with spaces.
    return " ".join(names[0].split()) if names else platform.processor() or platform.machine()
