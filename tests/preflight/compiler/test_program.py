"""Whole programs, compiled afresh for devices that are not there."""

import importlib.util

import pytest

from fluxvit_jax.preflight.compiler.chips import CHIPS
from tests.preflight.compiler import programs
from tests.preflight.compiler.programs import LAYERS, B, C

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)
WHERE = ["cpu", pytest.param("tpu", marks=[pytest.mark.tpu_compiler, needs_libtpu])]


@pytest.fixture(scope="module")
def compiled():
    """What was read of the programs for a kind of device, each kind once."""
    found = {}

    def get(where: str) -> dict:
        found[where] = found.get(where) or programs.run(where)
        return found[where]

    return get


@pytest.mark.parametrize("where", WHERE)
def test_flops_of_one_device(compiled, where):
    found = {name: program["work"] for name, program in compiled(where).items()}
    assert found["scan"]["flops"] == LAYERS * 2 * B * C * C
    assert found["scan"]["attention_flops"] == 0
    two_products = 2 * 2 * (B // 8) * 4 * 64 * 64 * 32
    assert found["attention"]["flops"] == two_products
    assert found["attention"]["attention_flops"] == two_products
    gradient = found["attention_gradient"]
    assert gradient["flops"] == gradient["attention_flops"] == 3 * two_products
    assert all(work["unknown_loops"] == 0 for work in found.values() if work)


@pytest.mark.parametrize("where", WHERE)
def test_exchanges_between_devices(compiled, where):
    found = compiled(where)["exchanges"]["work"]["collectives"]
    whole = 512 * 128 * 4
    assert [(one["kind"], one["bytes"], one["times"]) for one in found] == [
        ("all-reduce", whole, 3),
        ("all-gather", whole, 1),
        ("reduce-scatter", whole, 1),
        ("all-gather", whole, 1),
        ("collective-permute", whole, 1),
        ("all-to-all", whole, 1),
    ]
    assert all(len(one["group"]) == 8 for one in found if one["kind"] != "collective-permute")
    assert compiled(where)["scan"]["work"]["collectives"] == []


@pytest.mark.parametrize("where", WHERE)
def test_memory(compiled, where):
    scan = compiled(where)["scan"]
    assert scan["fits"] and scan["shortage"] is None and scan["failure"] == ""
    assert scan["memory"]["arguments"] == (B * C + LAYERS * C * C) * 4
    assert scan["memory"]["outputs"] == B * C * 4
    assert scan["seconds"] > 0 and scan["cpu_seconds"] > 0


def test_other_compilers_tell_no_cycles(compiled):
    assert all(program["time"] is None for program in compiled("cpu").values())


@pytest.mark.tpu_compiler
@needs_libtpu
def test_cycles_of_kernels(compiled):
    found = compiled("tpu")
    once, twice, looped = (found[f"kernel{name}"]["work"] for name in ("", "_twice", "_looped"))
    assert once["unknown_kernels"] == twice["unknown_kernels"] == looped["unknown_kernels"] == 0
    assert [sum(work["kernels"].values()) for work in (once, twice, looped)] == [1, 2, 6]
    # 2 heads x 2 x 2 steps, each two products of 512 x 512 x 64, of which v5e does 128 x 128 x 4 a
    # cycle: no kernel can be faster, and this one is not many times slower.
    least = 2 * 2 * 2 * 2 * 512 * 512 * 64 // (128 * 128 * 4)
    assert least < once["kernel_cycles"] < 10 * least
    assert twice["kernel_cycles"] == 2 * once["kernel_cycles"]
    assert looped["kernel_cycles"] == 6 * once["kernel_cycles"]
    time = found["kernel_looped"]["time"]
    assert 0 < time["kernels"] < time["computing"] and time["exchanging"] == 0


@pytest.mark.tpu_compiler
@needs_libtpu
def test_exchanges_take_time(compiled):
    assert compiled("tpu")["exchanges"]["time"]["exchanging"] > 0


@pytest.mark.tpu_compiler
@needs_libtpu
def test_a_program_that_does_not_fit(compiled):
    found = compiled("tpu")["too_large"]
    assert not found["fits"] and found["work"] is None
    assert found["shortage"] == {"needed": 128 * 2**30, "available": CHIPS["v5e"].memory}
