"""Products of 16-bit numbers for CPUs: the same numbers, by instructions that XLA has."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fluxvit_jax.models import blocks, products


@pytest.mark.parametrize(
    ("subscripts", "shapes"),
    [("bnc,cd->bnd", ((2, 5, 8), (8, 3))), ("bnhk,hkc->bnc", ((2, 5, 2, 4), (2, 4, 6)))],
)
def test_equals_float32_but_for_rounding(subscripts, shapes):
    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in shapes)

    def both(einsum, *operands):
        result, vjp = jax.vjp(lambda *operands: einsum(subscripts, *operands), *operands)
        return result, *vjp(jnp.ones_like(result))

    ours = both(products.einsum, a, b)
    exact = both(jnp.einsum, a.astype(jnp.float32), b.astype(jnp.float32))
    for x, y in zip(ours, exact, strict=True):
        assert x.dtype == jnp.bfloat16
        np.testing.assert_allclose(x.astype(jnp.float32), y, rtol=2**-8, atol=2**-8)


@pytest.mark.parametrize("float32_products", [False, True])
def test_products_of_a_block_for_cpus_give_float32(float32_products):
    config = blocks.BlockConfig(
        48, 3, 96, "chunked", dtype=jnp.bfloat16, float32_products=float32_products
    )
    graph, state = nnx.split(jax.eval_shape(lambda: blocks.Block(config, nnx.Rngs(0))))

    def loss(state, x):
        return jnp.sum(nnx.merge(graph, state)(x, None, 0.0, None), dtype=jnp.float32)

    x = jax.ShapeDtypeStruct((2, 200, 48), jnp.bfloat16)
    text = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(state, x).as_text()
    results = set(re.findall(r"stablehlo\.dot_general.*-> tensor<.*x(\w+)>", text))
    assert results == ({"f32"} if float32_products else {"f32", "bf16"})
