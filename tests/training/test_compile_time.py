"""The time to compile, as it is told before."""

import jax
import jax.numpy as jnp

from fluxvit_jax.training import compile_time


def lowered(layers: int) -> jax.stages.Lowered:
    def network(x):
        def twice(x, _):  # operations within operations
            return jnp.sin(x) + 1.0, None

        for _ in range(layers):
            x = jax.lax.scan(twice, x, None, length=3)[0] * 2.0
        return x

    return jax.jit(network).lower(1.0)


def test_operations_count_with_those_inside_of_others():
    counts = [
        compile_time.count_operations(lowered(layers).compiler_ir("stablehlo").operation)
        for layers in (1, 2, 3)
    ]
    text = lowered(1).as_text()
    assert "stablehlo.sine" in text and "stablehlo.while" in text
    assert counts[1] - counts[0] == counts[2] - counts[1] > 5
    assert counts[0] == 1 + sum(  # the module, and a line for each that has a name
        line.strip().startswith(("%", "func.func", "return", "stablehlo.return", "func.return"))
        for line in text.replace('"', "").splitlines()
    )


def test_it_grows_with_the_program(monkeypatch):
    monkeypatch.setitem(compile_time.SECONDS_PER_OPERATION, "cpu", 1.0)
    assert compile_time.describe_compile_time(lowered(1), "cpu") == "about 20 s"
    assert compile_time.describe_compile_time(lowered(20), "cpu").endswith(" min")
    assert "minutes" in compile_time.describe_compile_time(lowered(1), "gpu")
