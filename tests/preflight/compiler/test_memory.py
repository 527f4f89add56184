"""Memory of programs, and what the compiler says where it does not do."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fluxvit_jax.preflight.compiler.memory import Shortage, shortage, tree_bytes

GIB = 2**30


@pytest.mark.parametrize(
    ("message", "needed", "available"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (24.00G) exceeds available HBM (15.75G).",
            24 * GIB,
            15.75 * GIB,
        ),
        (
            "E1000: CompileTimeHbmOom: XLA:TPU compile permanent error. 21.81G exceeds available "
            "HBM (15.75G)",
            21.81 * GIB,
            15.75 * GIB,
        ),
        ("Ran out of memory. Used 900.5M of 0.5G hbm.", 900.5 * 2**20, GIB / 2),
    ],
)
def test_a_program_that_does_not_fit(message, needed, available):
    assert shortage(message) == Shortage(round(needed), round(available))


def test_other_failures_are_no_shortage():
    assert shortage("INVALID_ARGUMENT: something else") is None
    vmem = "Ran out of memory in memory space vmem: size 17.28M and limit 16.00M exceeded"
    assert shortage(f"RESOURCE_EXHAUSTED: {vmem}") is None


def test_bytes_of_a_tree_on_one_device():
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    own = NamedSharding(mesh, PartitionSpec("data"))
    tree = {
        "a": jax.ShapeDtypeStruct((8, 3), np.float32, sharding=own),
        "b": (np.zeros(5, np.uint8), jax.ShapeDtypeStruct((), np.int32)),
    }
    assert tree_bytes(tree) == 8 * 3 * 4 + 5 + 4
    assert tree_bytes(()) == 0
