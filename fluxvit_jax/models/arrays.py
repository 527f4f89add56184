"""Types of annotations that are wider at run time than for a static check, rows and zeros.

Array: outside of jit, JAX functions take NumPy arrays too.
Size: in an export, the number of clips is a symbol.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
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


def zeros_of(function: Callable[..., Any], *arguments: Any) -> Any:
    """Zeros of the shapes and dtypes of `function(*arguments)`, which is traced and not run."""
    shapes = jax.eval_shape(function, *arguments)
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
