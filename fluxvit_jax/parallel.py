"""Many devices as one: the mesh, and where batches and parameters lie on it.

The axis `data` runs over all devices of all hosts. A batch is cut along it, clip by clip, and
every device holds all parameters.
"""

import json
import sys
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

DATA = "data"


def data_mesh() -> Mesh:
    """All devices in a row."""
    # make_mesh defaults to Explicit axes, which refuse to reshape what is cut along them.
    return jax.make_mesh((jax.device_count(),), (DATA,), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """All of an array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def by_clip(mesh: Mesh) -> NamedSharding:
    """An array [B, ...] cut along its first axis."""
    return NamedSharding(mesh, PartitionSpec(DATA))


def put(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This host's part of a batch, arrays [b, ...], as part of the global arrays [B, ...]."""
    return {
        name: jax.make_array_from_process_local_data(by_clip(mesh), array)
        for name, array in batch.items()
    }


def local_rows(array: jax.Array, mesh: Mesh) -> np.ndarray:
    """This host's part [b, ...] of a global array [B, ...] that is cut by clip."""
    spec = PartitionSpec(DATA)
    return np.asarray(multihost_utils.global_array_to_host_local_array(array, mesh, spec))


def host_index() -> int:
    """Which process this is; process 0 writes what is written once."""
    return jax.process_index()


def host_count() -> int:
    """How many processes run this program."""
    return jax.process_count()


def gather(items: list[Any]) -> list[Any]:
    """The lists of all hosts one behind another, on each of them. Items are of JSON's kinds."""
    if host_count() == 1:
        return items
    text = np.frombuffer(json.dumps(items).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(len(text)))
    padded = np.pad(text, (0, int(lengths.max()) - len(text)))
    texts = multihost_utils.process_allgather(padded)
    return [
        item
        for length, own in zip(lengths, texts, strict=True)
        for item in json.loads(own[:length].tobytes())
    ]


def say(message: str) -> None:
    """A line on stderr, by the first process only."""
    if host_index() == 0:
        print(message, file=sys.stderr, flush=True)
