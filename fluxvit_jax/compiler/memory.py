"""What a compiled program holds of a device's memory, or by how much it is too large."""

import re
from typing import Any, NamedTuple

import jax
import numpy as np

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"\(?([\d.]+)([KMGT]?)i?B?\)?"
_FAILURES = (
    rf"{_SIZE} exceeds available HBM {_SIZE}",
    rf"Used {_SIZE} of {_SIZE} hbm",
)


class Memory(NamedTuple):
    """Bytes on one device, as the compiler lays them out (with padding of tiles).

    arguments: what the program is given; outputs: what it makes, less what takes an argument's
    place; temporaries: activations and all else that lives while it runs; code: the program.
    """

    arguments: int
    outputs: int
    temporaries: int
    code: int

    @property
    def used(self) -> int:
        return sum(self)


class Shortage(NamedTuple):
    """A program that does not fit: bytes that it would take, and those there are."""

    needed: int
    available: int


def memory_of(compiled: Any) -> Memory:
    """The memory of what `jax.stages.Lowered.compile` returns."""
    analysis = compiled.memory_analysis()
    return Memory(
        analysis.argument_size_in_bytes,
        analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
        analysis.temp_size_in_bytes,
        analysis.generated_code_size_in_bytes,
    )


def shortage(message: str) -> Shortage | None:
    """What the compiler says of a program that does not fit; None if it says something else.

    >>> shortage("... for HLO temporaries (24.00G) exceeds available HBM (15.75G).")
    >>> shortage("CompileTimeHbmOom: ... 21.81G exceeds available HBM (15.75G)")
    """
    for pattern in _FAILURES:
        if match := re.search(pattern, message):
            needed, available = match.groups()[:2], match.groups()[2:]
            return Shortage(*(round(float(n) * _UNITS[unit]) for n, unit in (needed, available)))
    return None


def tree_bytes(tree: Any) -> int:
    """Bytes that arrays take on one device, by their shapes and shardings, without padding.

    tree: of arrays or `jax.ShapeDtypeStruct`; those without a sharding lie on one device.
    """

    def one(leaf: Any) -> int:
        sharding = getattr(leaf, "sharding", None)
        shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
        return int(np.prod(shape)) * np.dtype(leaf.dtype).itemsize

    return sum(map(one, jax.tree.leaves(tree)))


def available(device: jax.Device) -> int | None:
    """Bytes that programs can use of a device that is there; None where it does not tell."""
    stats = device.memory_stats() if device.platform != "cpu" else None
    return (stats or {}).get("bytes_limit")
