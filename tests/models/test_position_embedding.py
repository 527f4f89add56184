"""Resizing of the position table against PyTorch's, and its initial values against the official."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fluxvit_jax.models import position_embedding
from tests.models import golden

TORCH = golden.arrays("torch_interpolate")  # tests/golden/torch_interpolate.py says how it was made
NATIVE = sorted(int(name.split(".")[1]) for name in TORCH if name.startswith("linear."))
SIZES = TORCH["linear.8"].shape[0]
MATRICES = {"linear": position_embedding.linear_matrix, "cubic": position_embedding.cubic_matrix}
CASES = [(mode, native) for mode in MATRICES for native in NATIVE]


def matrices(mode: str, native: int, sizes) -> list[np.ndarray]:
    """The matrices of all sizes by one program, cut to the size: [size, native] each."""
    compiled = jax.jit(lambda size: MATRICES[mode](size, native, SIZES))
    made = [np.asarray(compiled(jnp.int32(size)))[:size] for size in sizes]
    assert compiled._cache_size() == 1
    return made


@pytest.mark.parametrize(("mode", "native"), CASES)
def test_matrices_are_those_of_torch(mode, native):
    sizes = range(1, SIZES + 1)
    for size, ours in zip(sizes, matrices(mode, native, sizes), strict=True):
        np.testing.assert_allclose(ours, TORCH[f"{mode}.{native}"][size - 1, :size], atol=5e-6)


@pytest.mark.parametrize(("mode", "native"), CASES)
def test_rows_sum_to_one_and_the_native_size_is_the_identity(mode, native):
    for ours in matrices(mode, native, range(1, SIZES + 1, 5)):
        np.testing.assert_allclose(ours.sum(axis=1), 1, atol=1e-6)
    np.testing.assert_array_equal(matrices(mode, native, [native])[0], np.eye(native))


def test_a_table_on_other_grids():
    """Linear in time and bicubic in space, by one program, and unaltered on its own grid."""
    table, limits = TORCH["table"], (13, 9, 9)
    resize = jax.jit(lambda grid: position_embedding.resize_table(table, grid, limits))
    for name in TORCH:
        if name.startswith("table."):
            T, H, W = (int(side) for side in name.removeprefix("table.").split("x"))
            ours = resize(jnp.asarray((T, H, W)))[:T, :H, :W]
            np.testing.assert_allclose(ours, TORCH[name], rtol=1e-5, atol=1e-5)
    T, H, W, _ = table.shape
    np.testing.assert_array_equal(resize(jnp.asarray((T, H, W)))[:T, :H, :W], table)
    assert resize._cache_size() == 1


@pytest.mark.parametrize(
    ("name", "sides", "width"),
    [
        ("tiny", (8, 4, 4), 48),
        ("held", (12, 6, 6), 64),
        ("small", (24, 18, 18), 384),
        ("base", (32, 20, 20), 768),
    ],
)
def test_initial_table_is_the_official_one(name, sides, width):
    """Ours from float64 angles, theirs from float32 ones, which are off by up to 1e-6."""
    official = golden.arrays("pos_embed_init")
    ours = position_embedding.sincos_table(*sides, width)
    assert ours.dtype == np.float32 and ours.shape == (1 + np.prod(sides), width)
    if f"{name}.pos_embed" in official:
        np.testing.assert_allclose(ours, official[f"{name}.pos_embed"][0], atol=2e-6)
    else:
        rows = official[f"{name}.rows"]
        np.testing.assert_allclose(ours[rows], official[f"{name}.pos_embed_rows"], atol=2e-6)


def test_a_width_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="multiple of 16, not 40"):
        position_embedding.sincos_table(2, 2, 2, 40)
