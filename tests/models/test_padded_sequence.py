"""How long sequences are: that no kernel gets a length that it is slow at, and who pays for CLS."""

import jax.numpy as jnp
import numpy as np
import pytest

from fluxvit_jax.models import padded_sequence
from fluxvit_jax.models.attention import KERNELS


@pytest.mark.parametrize(
    ("tokens", "length", "tile"),
    [
        (3072, 3072, 1024),
        (2048, 2048, 1024),
        (1024, 1024, 1024),
        (3073, 3200, 640),
        (2049, 2304, 768),  # not 2176, 17 x 128
        (1025, 1152, 384),
        (6144, 6144, 1024),
        (513, 640, 640),
        (37, 128, 128),
        (1, 128, 128),
    ],
)
@pytest.mark.parametrize("kernel", ["pallas", "splash"])
def test_lengths_for_tpu(kernel, tokens, length, tile):
    assert padded_sequence.length_for(tokens, kernel) == length
    assert padded_sequence.tile(length) == tile


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_length(kernel):
    most = {"xla": 0, "chunked": 0, "cudnn": 7}.get(kernel, 127 + 3 * 128)
    for tokens in range(1, 6500, 7):
        length = padded_sequence.length_for(tokens, kernel)
        assert tokens <= length <= tokens + most
        if kernel in ("pallas", "splash"):
            tile = padded_sequence.tile(length)
            assert length % tile == 0 and tile % 128 == 0 and tile >= min(length, 384)
        if kernel == "cudnn":
            assert length % 8 == 0


@pytest.mark.parametrize("budget", [1024, 2048, 3072])
@pytest.mark.parametrize("kernel", KERNELS)
def test_cls_inside_costs_nothing(kernel, budget):
    places = padded_sequence.padded_sequence(padded_sequence.patch_budget(budget, "inside"), kernel)
    assert (places.tokens, places.length) == (budget, budget)
    assert places.lengths(2, None) is None
    x = jnp.ones((2, budget, 3))
    assert places.pad(x).shape == places.unpad(x).shape == x.shape


def test_cls_outside_is_padded_and_masked():
    places = padded_sequence.padded_sequence(
        padded_sequence.patch_budget(2048, "outside"), "pallas"
    )
    assert (places.tokens, places.length) == (2049, 2304)
    np.testing.assert_array_equal(places.lengths(2, None), [2049, 2049])
    x = jnp.ones((2, 2049, 3))
    padded = places.pad(x)
    np.testing.assert_array_equal(padded.sum((1, 2)), [3 * 2049] * 2)
    np.testing.assert_array_equal(places.unpad(padded), x)


def test_clips_with_fewer_patches():
    valid = jnp.asarray([[True] * 5 + [False] * 3, [True] * 8])
    for kernel in KERNELS:
        np.testing.assert_array_equal(
            padded_sequence.padded_sequence(8, kernel).lengths(2, valid), [6, 9]
        )
