"""Types of annotations that are wider at run time than for a static check, and rows by an index.

Array: outside of jit, JAX functions take NumPy arrays too.
Size: in an export, the number of clips is a symbol.
"""

from typing import TYPE_CHECKING, Any

import jax
import numpy as np

if TYPE_CHECKING:
    from jax import Array as Array

    Size = int
else:
    Size = Any
    Array = jax.Array | np.ndarray


def take_rows(x: jax.Array, index: jax.Array) -> jax.Array:
    """x[b, index[b, k]], [B, K, ...]: of x [B, N, ...] what an index, int32 [B, K], names."""
    return jax.vmap(lambda row, at: row[at])(x, index)
