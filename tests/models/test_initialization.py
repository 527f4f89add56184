"""What a network starts from and what it takes in, against the numbers of the official code."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from fluxvit_jax.models import fluxvit

# Kernels of tens of thousands of numbers, so that their deviation is known to a percent.
CONFIG = fluxvit.FluxViTConfig(
    width=96, depth=4, heads=3, frames=4, rows=3, columns=3, classes=200, pool_width=96,
    pool_heads=4,
)  # fmt: skip


def leaves(config: fluxvit.FluxViTConfig) -> dict[str, np.ndarray]:
    """Fresh parameters by path."""
    tree = fluxvit.init_params(config, jax.random.key(0))
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf, np.float64)
        for path, leaf in flat
    }


@pytest.fixture(scope="module")
def fresh() -> dict[str, np.ndarray]:
    return leaves(CONFIG)


def test_kernels_start_with_a_deviation_of_a_fiftieth(fresh):
    """All but the two of a block that its depth scales down; and CLS."""
    kernels = {path: x for path, x in fresh.items() if path.endswith("kernel")}
    assert len(kernels) == 11
    for path, kernel in kernels.items():
        if path not in ("blocks/attn/proj/kernel", "blocks/mlp/fc2/kernel"):
            assert kernel.std() == pytest.approx(0.02, rel=0.03), path
            assert abs(kernel.mean()) < 0.001, path
    assert fresh["cls_token"].std() == pytest.approx(0.02, rel=0.3)


@pytest.mark.parametrize("name", ["attn/proj", "mlp/fc2"])
def test_the_last_layers_of_a_branch_start_smaller_with_depth(fresh, name):
    """Divided by sqrt(2 i) in block i, from 1."""
    kernels = fresh[f"blocks/{name}/kernel"]
    expected = [0.02 / 2**0.5, 0.02 / 4**0.5, 0.02 / 6**0.5, 0.02 / 8**0.5]
    np.testing.assert_allclose(kernels.std(axis=(1, 2)), expected, rtol=0.03)


def test_no_two_members_of_a_stack_start_alike(fresh):
    for path in ("blocks/attn/qkv/kernel", "pool/k/kernel", "heads/kernel", "align/head/kernel"):
        first, second = fresh[path][:2]
        assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.05, path


def test_everything_else_starts_as_a_constant(fresh):
    """Biases 0, norms 1, LayerScale 1e-5, both position convolutions the identity."""
    for path, leaf in fresh.items():
        name = path.split("/")[-1]
        if name == "bias":
            assert not leaf.any(), path
        elif name == "scale":
            assert (leaf == 1).all(), path
        elif name == "gamma":
            np.testing.assert_allclose(leaf, 1e-5, rtol=1e-6, err_msg=path)


def test_the_deviation_of_kernels_is_a_choice(fresh):
    """It scales every kernel, those that depth scales down too, and nothing else."""
    wide = leaves(replace(CONFIG, kernel_std=0.1))
    for path, leaf in fresh.items():
        factor = 5 if path.endswith("kernel") else 1
        np.testing.assert_allclose(wide[path], factor * leaf, rtol=1e-5, err_msg=path)


def test_starts_of_layer_scale_and_of_the_global_positions_are_choices():
    given = leaves(replace(CONFIG, layer_scale=0.3, position_scale=0.25))
    for name in ("ls1", "ls2"):
        np.testing.assert_allclose(given[f"blocks/{name}/gamma"], 0.3, rtol=1e-6)
    np.testing.assert_allclose(given["gpe/scale"], 0.25)
    assert (given["blocks/attn/lpe/scale"] == 1).all()


def test_pixels_are_normalised_by_the_mean_and_deviation_of_imagenet():
    patches = np.tile(np.uint8([0, 124, 255]), (1, 196))  # red, green, blue of each pixel
    found = np.asarray(fluxvit.normalize(patches)).reshape(196, 3)
    red, green, blue = -0.485 / 0.229, (124 / 255 - 0.456) / 0.224, (1 - 0.406) / 0.225
    np.testing.assert_allclose(found, np.tile([red, green, blue], (196, 1)), rtol=1e-5)
