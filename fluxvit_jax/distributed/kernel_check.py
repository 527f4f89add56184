"""The proof of the attention kernels that a run would use, on its own devices."""

import logging
from collections.abc import Iterable

import jax
from ml_collections import ConfigDict

from fluxvit_jax.config.network import choose_attention
from fluxvit_jax.distributed.console import say
from fluxvit_jax.distributed.devices import device_name
from fluxvit_jax.distributed.mesh import gather
from fluxvit_jax.errors import UserError
from fluxvit_jax.models import attention, attention_check


def check_kernels(config: ConfigDict, head_sizes: Iterable[int]) -> None:
    """Compares kernels with the formula, and has `auto` leave out one that computes wrong.

    Takes a second or two on an accelerator; on CPUs, where the tests ran, nothing is compared. All
    hosts must call it, and leave out the same ones.

    head_sizes: channels of a head, of every network in the run.

    Raises UserError if the kernel that the config names computes wrong.
    """
    if (platform := jax.default_backend()) != "cpu":
        prove_kernels(config, head_sizes, platform)


def prove_kernels(config: ConfigDict, head_sizes: Iterable[int], platform: str) -> None:
    """`check_kernels` on any platform."""
    for size in head_sizes:
        while (kernel := choose_attention(config, platform, size)) != "xla":
            if not (fault := _fault(kernel, config.model.dtype, size)):
                break
            where = f"attention kernel {kernel} {fault} on {device_name()}"
            if config.model.attention != "auto":
                raise UserError(f"{where}; --config.model.attention=auto leaves it out")
            attention.REFUSED.add((kernel, size))
            say(f"{where}: {choose_attention(config, platform, size)} takes its place")


def _fault(kernel: str, dtype: str, head_size: int) -> str:
    """What is wrong with a kernel on any host, or ""."""
    try:
        off = attention_check.difference(kernel, dtype, head_size)
        right = off < attention_check.tolerance(dtype)
        fault = "" if right else f"is off by {off:.0e} of the largest number"
    except Exception as error:  # of XLA, Mosaic, Triton or cuDNN, each of its own kind
        logging.debug("%s", kernel, exc_info=True)
        fault = (
            f"fails ({str(error).splitlines()[0][:100] if str(error) else type(error).__name__})"
        )
    return next(filter(None, gather([fault])), "")
