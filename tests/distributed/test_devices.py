"""One name for a device, wherever its timings are kept."""

import re
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from fluxvit_jax.distributed import devices
from fluxvit_jax.errors import UserError


def test_too_little_memory_is_said_and_other_errors_are_not_hidden():
    with pytest.raises(UserError, match="too much"), devices.enough_memory("too much"):
        jnp.zeros(2**50, jnp.uint8).block_until_ready()
    with pytest.raises(TypeError), devices.enough_memory("too much"):
        jnp.zeros("a")


def test_an_accelerator_is_called_what_it_calls_itself():
    chip = SimpleNamespace(platform="gpu", device_kind="NVIDIA H100 80GB HBM3")
    assert devices.device_name(chip) == "NVIDIA H100 80GB HBM3"


def test_a_processor_is_called_as_the_system_lists_it():
    """Its device kind is "cpu" whatever it is, and timings of two must not be mixed."""
    name = devices.device_name(jax.devices("cpu")[0])
    processor, is_cpu, rest = name.partition(" (cpu)")
    assert is_cpu and not rest and processor.strip() == processor != ""
    listed = re.search(r"^model name\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    if listed:  # ARM's list has none
        assert processor.split() == listed[1].split()


def test_processor(tmp_path):
    listing = tmp_path / "cpuinfo"
    listing.write_text("processor\t: 0\nmodel name\t: Some  CPU @ 2.00GHz\nmodel name\t: Other\n")
    assert devices._processor(listing) == "Some CPU @ 2.00GHz"
    listing.write_text("processor\t: 0\nCPU architecture: 8\n")  # as ARM's
    unlisted = devices._processor(listing)
    assert unlisted and unlisted == devices._processor(tmp_path / "missing")
