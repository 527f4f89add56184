"""Types of annotations that are wider at run time than for a static check.

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
