"""Matrix products of 16-bit numbers for CPUs.

XLA uses a CPU's bfloat16 instructions only where the result of a product is float32. Otherwise it
converts both operands to float32 first, and the product takes twice as long (AMD EPYC, AVX-512).
"""

from functools import partial

import jax
import jax.numpy as jnp


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def einsum(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Einsum of two arrays of one dtype, computed as float32 and rounded, as are its gradients.

    subscripts: each index is in two of the three terms or in all, as in "bnc,cd->bnd".
    """
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32).astype(a.dtype)


def _forward(subscripts: str, a: jax.Array, b: jax.Array) -> tuple[jax.Array, tuple]:
    return einsum(subscripts, a, b), (a, b)


def _backward(subscripts: str, operands: tuple, gradient: jax.Array) -> tuple[jax.Array, ...]:
    a, b = operands
    terms, result = subscripts.split("->")
    first, second = terms.split(",")
    return (
        einsum(f"{result},{second}->{first}", gradient, b),
        einsum(f"{first},{result}->{second}", a, gradient),
    )


einsum.defvjp(_forward, _backward)
