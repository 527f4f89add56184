"""Many devices as one: the mesh, where batches lie on it, and what hosts tell each other.

The mesh has three axes. A batch is cut clip by clip along `data` and `fsdp`. Parameters, and what
the optimiser keeps of them, are cut along `fsdp` as well, and gathered where they are used; heads
and hidden units are cut along `tensor`, whose devices see the same clips. Which parameter is cut
where, `sharding` says.
"""

import functools
import itertools
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import distributed as jax_distributed  # its client has no public name
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from fluxvit_jax.errors import UserError
from fluxvit_jax.models.placement import CLIP_AXES

AXES = ("data", "fsdp", "tensor")
FOREVER = 10**12  # milliseconds
# Left to itself, the TPU compiler gathers what lies cut along `fsdp` piece by piece inside the
# products that read it. The pieces are narrower than the matrix unit: of L on 16 chips of v5e it
# estimates 1.5 s for a step so, 0.7 s where parameters are gathered before.
COMPILER_OPTIONS = {"tpu": {"xla_jf_spmd_threshold_for_windowed_einsum_mib": 10**6}}
_gatherings = itertools.count()  # of this process; all hosts gather the same times


# ---------------------------------------------------------------------------------------------
# The mesh


def make_mesh(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The devices as `config.parallel.mesh` arranges them; by default all devices of all hosts.

    Raises UserError if they cannot be arranged so.
    """
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(config, len(devices))
    # make_mesh defaults to Explicit axes, which refuse to reshape what is cut along them.
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def mesh_shape(config: ConfigDict, devices: int) -> tuple[int, int, int]:
    """The sides of the mesh, with the one that is -1 as all that is left of so many devices.

    Raises UserError if the sides do not make up all devices.
    """
    sides = [config.parallel.mesh[axis] for axis in AXES]
    asked = "config.parallel.mesh: " + " x ".join(
        f"{axis}={side}" for axis, side in zip(AXES, sides, strict=True)
    )
    given = math.prod(side for side in sides if side != -1)
    if -1 not in sides:
        if given != devices:
            raise UserError(
                f"{asked} is of {given} devices, and there are {devices}; "
                "leave one side -1 to have it follow"
            )
        return tuple(sides)
    if devices % given:
        nearest = max(d for d in range(1, devices + 1) if devices % d == 0 and d <= given)
        raise UserError(
            f"{asked} does not divide the {devices} devices there are; sides whose product is "
            f"{nearest} would"
        )
    return tuple(devices // given if side == -1 else side for side in sides)


def platform_of(mesh: Mesh) -> str:
    """What its devices are: "cpu", "gpu", "tpu"; not always what this program runs on."""
    return mesh.devices.flat[0].platform


def compiler_options(mesh: Mesh) -> dict[str, Any] | None:
    """For `jax.jit` of a program that runs on it."""
    return COMPILER_OPTIONS.get(platform_of(mesh))


def clip_shards(mesh: Mesh) -> int:
    """Parts that a batch is cut into."""
    return math.prod(mesh.shape[axis] for axis in CLIP_AXES)


def filled(clips: int, mesh: Mesh) -> int:
    """So many clips, and those that it takes to give every part of the batch as many."""
    shards = clip_shards(mesh)
    return -(-clips // shards) * shards


def on_mesh(function: Callable, mesh: Mesh) -> Callable:
    """The function, traced where the network finds this mesh (see `models.placement`)."""

    @functools.wraps(function)
    def on_this_mesh(*arguments: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*arguments)

    return on_this_mesh


def mean_over_data(function: Callable, mesh: Mesh) -> Callable:
    """`function(params, clips)`, a mean over clips, of each part of the batch along `data`.

    Its float32 results are averaged once, at the end. Left to the partitioner, each of a step's
    passes would add up its gradients over all devices, and in the numbers of the matrix products,
    bfloat16. Along `fsdp` they are, with the scattering of the gradients. With `tensor` all is left
    to it: the TPU compiler of libtpu 0.0.42 fails an assertion where parts of a program, all three
    axes and a Pallas kernel meet.

    clips: arrays [B, ...].
    """
    if mesh.shape["tensor"] > 1 or mesh.shape["data"] == 1:
        return function

    def of_own_clips(params: Any, clips: Any) -> Any:
        return jax.lax.pmean(function(params, clips), "data")

    return jax.shard_map(
        of_own_clips,
        mesh=mesh.abstract_mesh,
        axis_names={axis for axis in AXES if axis == "data" or mesh.shape[axis] == 1},
        in_specs=(PartitionSpec(), PartitionSpec("data")),
        out_specs=PartitionSpec(),
        check_vma=False,
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """All of an array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def by_clip(mesh: Mesh) -> NamedSharding:
    """An array [B, ...] cut along its first axis."""
    return NamedSharding(mesh, PartitionSpec(CLIP_AXES))


# ---------------------------------------------------------------------------------------------
# Arrays


def own_rows(mesh: Mesh, rows: int) -> np.ndarray:
    """The rows of a global batch [rows, ...] that this host's devices hold, int64, ascending.

    Hosts whose devices see the same clips (`tensor` across hosts) have the same rows. `rows` is a
    multiple of `clip_shards`.
    """
    places = by_clip(mesh).addressable_devices_indices_map((rows,)).values()
    return np.unique(np.concatenate([np.arange(rows)[place] for place in places]))


def put(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This host's rows of a batch, arrays [b, ...], as part of the global arrays [B, ...]."""
    return {name: _put(array, mesh) for name, array in batch.items()}


def _put(array: np.ndarray, mesh: Mesh) -> jax.Array:
    shards = clip_shards(mesh)
    own = own_rows(mesh, shards)  # of as many rows as shards: which shards are here
    each = len(array) // len(own)

    def shard(index: tuple[slice, ...]) -> np.ndarray:
        start = np.searchsorted(own, (index[0].start or 0) // each) * each
        return array[start : start + each]

    shape = (shards * each, *array.shape[1:])
    return jax.make_array_from_callback(shape, by_clip(mesh), shard)


def local_rows(array: jax.Array) -> np.ndarray:
    """This host's rows [b, ...] of a global array [B, ...] that is cut by clip; see `own_rows`."""
    shards = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
    return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])


def highest(values: jax.Array, mesh: Mesh) -> jax.Array:
    """The highest of values [B] that are cut by clip, as any device of the mesh has them.

    Devices that see the same clips may be of hosts that put other values there.
    """

    def highest_of_all(own: jax.Array) -> jax.Array:
        return jax.lax.pmax(jnp.max(own), AXES)

    return jax.shard_map(
        highest_of_all,
        mesh=mesh,
        in_specs=PartitionSpec(CLIP_AXES),
        out_specs=PartitionSpec(),
        check_vma=False,  # or what is cut along no axis counts as the same along it
    )(values)


def place(tree: Any, shardings: Any) -> Any:
    """Arrays that every host has whole, laid out over the devices; what lies right stays."""

    def placed(array: Any, sharding: NamedSharding) -> jax.Array:
        if isinstance(array, jax.Array) and array.sharding == sharding:
            return array
        whole = np.asarray(array)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    return jax.tree.map(placed, tree, shardings)


# ---------------------------------------------------------------------------------------------
# Hosts


def host_index() -> int:
    """Which process this is; process 0 writes what is written once."""
    return jax.process_index()


def host_count() -> int:
    """How many processes run this program."""
    return jax.process_count()


def coordinator() -> Any:
    """The client of JAX's coordination service, if there are several hosts."""
    return jax_distributed.global_state.client


def gather(items: Sequence[Any]) -> list[Any]:
    """The lists of all hosts one behind another, on each of them. Items are of JSON's kinds.

    By way of the coordination service: collectives of devices give up where a host keeps the others
    waiting, some after half a minute.
    """
    if host_count() == 1:
        return list(items)
    number, client = next(_gatherings), coordinator()
    client.key_value_set_bytes(_key(number) + str(host_index()), json.dumps(list(items)).encode())
    client.wait_at_barrier(_key(number), FOREVER)
    if number:  # all have read it, or they would not be here
        client.key_value_delete(_key(number - 1) + str(host_index()))
    found = client.key_value_dir_get_bytes(_key(number))
    by_host = {int(key.rpartition("/")[2]): text for key, text in found}
    return [item for host in sorted(by_host) for item in json.loads(by_host[host])]


def _key(number: int) -> str:
    return f"fluxvit_jax/gathering/{number}/"


def say(message: str) -> None:
    """A line on stderr, by the first process only."""
    if host_index() == 0:
        print(message, file=sys.stderr, flush=True)
