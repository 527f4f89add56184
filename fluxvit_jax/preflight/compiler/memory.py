"""Device memory of a compiled program, or by how much the program is too large."""

import re
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"\(?([\d.]+)([KMGT]?)i?B?\)?"
_FAILURES = (
    rf"{_SIZE} exceeds available HBM {_SIZE}",
    rf"Used {_SIZE} of {_SIZE} hbm",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes on one device, as the compiler lays them out (with padding of tiles).

    outputs: without those that alias an argument; temporaries: activations and all else that lives
    while the program runs; code: the program itself.
    """

    arguments: int
    outputs: int
    temporaries: int
    code: int

    @property
    def used(self) -> int:
        return self.arguments + self.outputs + self.temporaries + self.code


@dataclass(frozen=True, slots=True)
class Shortage:
    """Bytes that a program which does not fit needs, and those available."""

    needed: int
    available: int


def memory_of(compiled: Any) -> Memory:
    """Memory of a `jax.stages.Compiled`."""
    analysis = compiled.memory_analysis()
    return Memory(
        arguments=analysis.argument_size_in_bytes,
        outputs=analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
        temporaries=analysis.temp_size_in_bytes,
        code=analysis.generated_code_size_in_bytes,
    )


def shortage(message: str) -> Shortage | None:
    """The shortage in the compiler's message about a program; None if it is about something else.

    >>> shortage("... for HLO temporaries (24.00G) exceeds available HBM (15.75G).")
    >>> shortage("CompileTimeHbmOom: ... 21.81G exceeds available HBM (15.75G)")
    """
    for pattern in _FAILURES:
        if match := re.search(pattern, message):
            needed, needed_unit, available, available_unit = match.groups()
            return Shortage(
                round(float(needed) * _UNITS[needed_unit]),
                round(float(available) * _UNITS[available_unit]),
            )
    return None


def tree_bytes(tree: Any) -> int:
    """Bytes that arrays take on one device, by their shapes and shardings, without padding.

    tree: of arrays or `jax.ShapeDtypeStruct`; those without a sharding lie on one device.
    """

    def leaf_bytes(leaf: Any) -> int:
        sharding = getattr(leaf, "sharding", None)
        shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
        return int(np.prod(shape)) * np.dtype(leaf.dtype).itemsize

    return sum(map(leaf_bytes, jax.tree.leaves(tree)))


def available(device: jax.Device) -> int | None:
    """Bytes that programs can use on a real device; None where they are unknown."""
    stats = device.memory_stats() if device.platform != "cpu" else None
    return (stats or {}).get("bytes_limit")
