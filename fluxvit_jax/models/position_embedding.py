"""The learned position table and its resizing to any grid, with the grid as data.

Resizing is separable, linear in time and bicubic in space as in PyTorch's `interpolate` with
`align_corners=False`, so it is three small matrices whose entries follow from the grid in closed
form: one compiled program serves all grids.
"""

import jax
import jax.numpy as jnp
import numpy as np
from einops import repeat
from jaxtyping import Float, Int

from fluxvit_jax.models import padded_sequence
from fluxvit_jax.models.arrays import Array

CUBIC_A = -0.75  # PyTorch's bicubic; jax.image's is -0.5


def sincos_table(
    frames: int, rows: int, columns: int, width: int
) -> Float[np.ndarray, "1+{frames}*{rows}*{columns} {width}"]:
    """The initial position table, float32 [1 + T*H*W, C]; the first row, for CLS, is zero.

    A quarter of the width is temporal and the rest spatial (columns first, then rows), as in
    InternVideo2's 3-D sin-cos table. The width must be a multiple of 16.
    """
    if width % 16:
        raise ValueError(f"a sin-cos table needs a width that is a multiple of 16, not {width}")
    time = _sincos(np.arange(frames), width // 4)
    side = width // 4 * 3 // 2
    row, column = _sincos(np.arange(rows), side), _sincos(np.arange(columns), side)
    axes = {"t": frames, "h": rows, "w": columns}
    table = np.concatenate(
        [
            repeat(time, "t c -> (t h w) c", **axes),
            repeat(column, "w c -> (t h w) c", **axes),
            repeat(row, "h c -> (t h w) c", **axes),
        ],
        axis=-1,
    )
    return np.concatenate([np.zeros((1, width)), table]).astype(np.float32)


def _sincos(position: np.ndarray, width: int) -> np.ndarray:
    """Sines then cosines of `position` at `width` / 2 frequencies: float64 [len, width]."""
    frequency = 10000.0 ** -(np.arange(width // 2) / (width / 2))
    angle = position[:, None] * frequency[None]
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)


def _sources(size: jax.Array, native: int, rows: int) -> jax.Array:
    """Native coordinates of `rows` positions of an axis of `size`: float32 [rows]."""
    index = jnp.arange(rows, dtype=jnp.float32)
    return (index + 0.5) * (native / size.astype(jnp.float32)) - 0.5


def _taps(index: jax.Array, weight: jax.Array, native: int) -> jax.Array:
    """Matrix rows from their taps: index int32, weight float32 [rows, taps] -> [rows, native]."""
    one_hot = jax.nn.one_hot(jnp.clip(index, 0, native - 1), native, dtype=jnp.float32)
    return jnp.einsum("rkn,rk->rn", one_hot, weight, precision=jax.lax.Precision.HIGHEST)


def linear_matrix(size: Int[Array, ""], native: int, rows: int) -> Float[Array, "{rows} {native}"]:
    """Matrix of linear resizing of an axis from `native` to `size`: float32 [rows, native].

    size: int32 scalar, at most `rows`; rows past it are meaningless.
    """
    source = jnp.clip(_sources(size, native, rows), 0, native - 1)
    low = jnp.floor(source)
    fraction = source - low
    index = low.astype(jnp.int32)[:, None] + jnp.arange(2)
    return _taps(index, jnp.stack([1 - fraction, fraction], axis=1), native)


def cubic_matrix(size: Int[Array, ""], native: int, rows: int) -> Float[Array, "{rows} {native}"]:
    """Matrix of bicubic resizing of an axis from `native` to `size`: float32 [rows, native].

    size: int32 scalar, at most `rows`; rows past it are meaningless.
    """
    source = _sources(size, native, rows)
    low = jnp.floor(source)
    distance = jnp.abs((source - low)[:, None] - jnp.arange(-1, 3))  # [rows, 4]
    near = ((CUBIC_A + 2) * distance - (CUBIC_A + 3)) * distance**2 + 1
    far = ((distance - 5) * distance + 8) * distance * CUBIC_A - 4 * CUBIC_A
    index = low.astype(jnp.int32)[:, None] + jnp.arange(-1, 3)
    return _taps(index, jnp.where(distance <= 1, near, far), native)


def resize_table(
    table: Float[Array, "T0 H0 W0 C"], grid: Int[Array, " 3"], limits: tuple[int, int, int]
) -> Float[Array, "T H W C"]:
    """A position table [T0, H0, W0, C] on another grid: float32 [T, H, W, C] = (*limits, C).

    grid: int32 [3], frames, rows, columns, none above `limits`; entries outside are meaningless.
    """
    T0, H0, W0, C = table.shape
    T, H, W = limits
    time = linear_matrix(grid[0], T0, T)
    row, column = cubic_matrix(grid[1], H0, H), cubic_matrix(grid[2], W0, W)
    # Rows and columns in one product: more work than one after the other, under 0.3 % of a training
    # step, but plain matrices, which compile much faster for a TPU.
    frame = (row[:, None, :, None] * column[None, :, None]).reshape(H * W, H0 * W0)
    table = (time @ table.reshape(T0, -1)).reshape(T, H0 * W0, C)
    return jnp.einsum("ps,fsc->fpc", frame, table).reshape(T, H, W, C)


def gather_positions(
    table: Float[Array, "T0 H0 W0 C"],
    grid: Int[Array, "G 3"],
    index: Int[Array, "B N"],
    limits: tuple[int, int, int],
) -> Float[Array, "B N C"]:
    """Position embeddings of patches from the resized table: float32 [B, N, C].

    table: [T0, H0, W0, C]; grid: int32 [G, 3] where G divides B, one grid for each run of B / G
    clips; index: int32 [B, N], patch indices in the order t, h, w. Indices past a grid are padding,
    which is masked, so their embeddings do not matter.
    """
    _, H, W = limits
    tables = jax.vmap(lambda sides: resize_table(table, sides, limits))(grid)
    tables = tables.reshape(grid.shape[0], -1, table.shape[-1])
    grouped = index.reshape(grid.shape[0], -1)
    _, rows, columns = grid[:, :, None].transpose(1, 0, 2)
    t, in_frame = grouped // (rows * columns), grouped % (rows * columns)
    row = (t * H + in_frame // columns) * W + in_frame % columns
    chosen = jnp.take_along_axis(tables, row[..., None], axis=1, mode="clip")
    return chosen.reshape(*index.shape, -1)


def token_positions(
    cls: Float[Array, " C"],
    table: Float[Array, "T0 H0 W0 C"],
    grid: Int[Array, "G 3"],
    index: Int[Array, "B N"],
    limits: tuple[int, int, int],
) -> Float[Array, "B 1+N C"]:
    """Position embeddings of CLS, [C], and of the patches `index`: float32 [B, 1 + N, C].

    table, grid, index, limits: as in `gather_positions`.
    """
    return padded_sequence.set_cls(
        gather_positions(table, grid, padded_sequence.pad_for_cls(index), limits), cls
    )
