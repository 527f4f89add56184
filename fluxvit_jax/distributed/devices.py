"""Device name and out-of-memory errors. It imports only JAX, so that a server can use it."""

import contextlib
import platform
from collections.abc import Iterator
from pathlib import Path

import jax

from fluxvit_jax.errors import UserError


@contextlib.contextmanager
def enough_memory(otherwise: str) -> Iterator[None]:
    """Raises a UserError with the text `otherwise` if the code inside runs out of memory."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(otherwise) from error


def device_name(device: jax.Device | None = None) -> str:
    """Name that goes with timings: "NVIDIA H100 80GB HBM3", or "<processor> (cpu)".

    device: JAX's first one by default.
    """
    device = device or jax.devices()[0]
    return device.device_kind if device.platform != "cpu" else f"{_processor()} (cpu)"


def _processor(listing: Path = Path("/proc/cpuinfo")) -> str:
    """Name of the processor from Linux; elsewhere, and on ARM, from Python's `platform`."""
    lines = listing.read_text().splitlines() if listing.exists() else []
    names = [line.partition(":")[2] for line in lines if line.startswith("model name")]
    # Makers pad these names with spaces.
    return " ".join(names[0].split()) if names else platform.processor() or platform.machine()
