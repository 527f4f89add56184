"""One name for a device, wherever its timings are kept."""

import jax
import jax.numpy as jnp
import pytest

from fluxvit_jax import devices
from fluxvit_jax.errors import UserError


def test_too_little_memory_is_said_and_other_errors_are_not_hidden():
    with pytest.raises(UserError, match="too much"), devices.enough_memory("too much"):
        jnp.zeros(2**50, jnp.uint8).block_until_ready()
    with pytest.raises(TypeError), devices.enough_memory("too much"):
        jnp.zeros("a")


def test_device_name():
    device = jax.devices()[0]
    name = devices.device_name()
    assert name == devices.device_name(device) == devices.device_name()
    expected = f"{devices._processor()} (cpu)" if device.platform == "cpu" else device.device_kind
    assert name == expected


def test_processor(tmp_path):
    listing = tmp_path / "cpuinfo"
    listing.write_text("processor\t: 0\nmodel name\t: Some  CPU @ 2.00GHz\nmodel name\t: Other\n")
    assert devices._processor(listing) == "Some CPU @ 2.00GHz"
    listing.write_text("processor\t: 0\nCPU architecture: 8\n")  # as ARM's
    unlisted = devices._processor(listing)
    assert unlisted and unlisted == devices._processor(tmp_path / "missing")
