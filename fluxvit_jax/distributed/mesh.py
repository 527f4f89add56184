"""Device mesh, global arrays and messages between hosts.

The mesh has three axes. A batch is split by clip over `data` and `fsdp`. Parameters and optimizer
state are split over `fsdp` as well, and gathered where they are used. Attention heads and hidden
units are split over `tensor`, whose devices see the same clips. `partition_rules` says which axis
of which parameter is split.
"""

import functools
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import distributed as jax_distributed  # no public name for what it knows
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from fluxvit_jax.errors import UserError
from fluxvit_jax.models.sharding_constraints import CLIP_AXES

AXES = ("data", "fsdp", "tensor")
FOREVER = 10**12  # milliseconds
# By default the TPU compiler gathers parameters split over `fsdp` piece by piece inside the matrix
# products that read them. The pieces are narrower than the matrix unit: for L on 16 v5e chips it
# estimates 1.5 s a step that way, and 0.7 s if parameters are gathered beforehand.
COMPILER_OPTIONS = {"tpu": {"xla_jf_spmd_threshold_for_windowed_einsum_mib": 10**6}}
_gather_ids = itertools.count()  # of this process; all hosts call `gather` in the same order


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


def mesh_over(axis: str, devices: Sequence[jax.Device]) -> Mesh:
    """All devices along one axis: "data" has copies of the parameters, "fsdp" splits one."""
    shape = tuple(len(devices) if name == axis else 1 for name in AXES)
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def mesh_shape(config: ConfigDict, devices: int) -> tuple[int, int, int]:
    """The sides of the mesh over `devices` devices; a side of -1 takes all that are left.

    Raises UserError if the product of the sides is not the number of devices.
    """
    sides = [config.parallel.mesh[axis] for axis in AXES]
    given_sides = "config.parallel.mesh: " + " x ".join(
        f"{axis}={side}" for axis, side in zip(AXES, sides, strict=True)
    )
    given = math.prod(side for side in sides if side != -1)
    if -1 not in sides:
        if given != devices:
            raise UserError(
                f"{given_sides} is of {given} devices, and there are {devices}; "
                "leave one side -1 to have it follow"
            )
        data, fsdp, tensor = sides
        return data, fsdp, tensor
    if devices % given:
        nearest = max(d for d in range(1, devices + 1) if devices % d == 0 and d <= given)
        raise UserError(
            f"{given_sides} does not divide the {devices} devices there are; sides whose product "
            f"is {nearest} would"
        )
    data, fsdp, tensor = (devices // given if side == -1 else side for side in sides)
    return data, fsdp, tensor


def platform_of(mesh: Mesh) -> str:
    """The platform of the mesh's devices: "cpu", "gpu" or "tpu".

    In a pre-flight it is not the platform of this program.
    """
    return mesh.devices.flat[0].platform


def compiler_options(mesh: Mesh) -> dict[str, Any] | None:
    """Options of `jax.jit` for programs that run on the mesh."""
    return COMPILER_OPTIONS.get(platform_of(mesh))


def clip_shards(mesh: Mesh) -> int:
    """Number of shards of a batch."""
    return math.prod(mesh.shape[axis] for axis in CLIP_AXES)


def round_up_to_shards(clips: int, mesh: Mesh) -> int:
    """The smallest multiple of `clip_shards` that is at least `clips`."""
    shards = clip_shards(mesh)
    return math.ceil(clips / shards) * shards


def traced_on_mesh(function: Callable, mesh: Mesh) -> Callable:
    """The function, traced with the mesh that `models.sharding_constraints` reads as context."""

    @functools.wraps(function)
    def on_this_mesh(*arguments: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*arguments)

    return on_this_mesh


def data_parallel_mean(function: Callable, mesh: Mesh) -> Callable:
    """`function(params, clips)`, a mean over clips, computed per `data` shard and averaged.

    Under shard_map its float32 results are averaged once, at the end. Under automatic partitioning
    XLA would all-reduce the bfloat16 gradients of every budget separately. The `fsdp` axis stays
    automatic (reduce-scatter). With `tensor` > 1 everything is automatic, because the TPU compiler
    of libtpu 0.0.42 fails an assertion on shard_map, a Pallas kernel and three axes together.

    clips: arrays [B, ...].
    """
    if mesh.shape["tensor"] > 1 or mesh.shape["data"] == 1:
        return function

    def mean_over_shards(params: Any, clips: Any) -> Any:
        return jax.lax.pmean(function(params, clips), "data")

    return jax.shard_map(
        mean_over_shards,
        mesh=mesh.abstract_mesh,
        axis_names={axis for axis in AXES if axis == "data" or mesh.shape[axis] == 1},
        in_specs=(PartitionSpec(), PartitionSpec("data")),
        out_specs=PartitionSpec(),
        check_vma=False,
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding of an array that every device has in full."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of an array [B, ...] that is split by clip."""
    return NamedSharding(mesh, PartitionSpec(CLIP_AXES))


# ---------------------------------------------------------------------------------------------
# Arrays


def local_row_indices(mesh: Mesh, rows: int) -> np.ndarray:
    """The rows of a global batch [rows, ...] on this host's devices, int64, ascending.

    Hosts whose devices see the same clips (`tensor` across hosts) have the same rows. `rows` is a
    multiple of `clip_shards`.
    """
    indices = batch_sharding(mesh).addressable_devices_indices_map((rows,)).values()
    return np.unique(np.concatenate([np.arange(rows)[index] for index in indices]))


def shard_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This host's rows of a batch, arrays [b, ...], as part of the global arrays [B, ...]."""
    return {name: _put(array, mesh) for name, array in batch.items()}


def _put(array: np.ndarray, mesh: Mesh) -> jax.Array:
    shards = clip_shards(mesh)
    local_shards = local_row_indices(mesh, shards)  # with one row a shard, rows are shards
    rows = len(array) // len(local_shards)  # of a shard

    def shard(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        start = np.searchsorted(local_shards, (index[0].start or 0) // rows) * rows
        return array[start : start + rows]

    shape = (shards * rows, *array.shape[1:])
    return jax.make_array_from_callback(shape, batch_sharding(mesh), shard)


def put_rows(array: np.ndarray, mesh: Mesh) -> jax.Array:
    """An array [B, ...] of the only host, split by row if its rows divide, else on every device."""
    divides = len(array) % clip_shards(mesh) == 0
    return jax.device_put(array, batch_sharding(mesh) if divides else replicated(mesh))


def local_rows(array: jax.Array) -> np.ndarray:
    """This host's rows [b, ...], `local_row_indices`, of a global array [B, ...] split by clip."""
    shards = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
    return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])


def global_max(values: jax.Array, mesh: Mesh) -> jax.Array:
    """The maximum of values [B] that are split by clip, over all devices of the mesh.

    Hosts whose devices see the same clips (`tensor` across hosts) may have put in other values.
    """

    def max_over_devices(shard: jax.Array) -> jax.Array:
        return jax.lax.pmax(jnp.max(shard), AXES)

    return jax.shard_map(
        max_over_devices,
        mesh=mesh,
        in_specs=PartitionSpec(CLIP_AXES),
        out_specs=PartitionSpec(),
        check_vma=False,  # otherwise values replicated over an axis count as equal along it
    )(values)


def device_put_global(tree: Any, shardings: Any) -> Any:
    """Global arrays of a tree of arrays that every host has in full.

    Arrays that have the right sharding already stay as they are.
    """

    def put(array: Any, sharding: NamedSharding) -> jax.Array:
        if isinstance(array, jax.Array) and array.sharding == sharding:
            return array
        full = np.asarray(array)
        return jax.make_array_from_callback(full.shape, sharding, lambda index: full[index])

    return jax.tree.map(put, tree, shardings)


# ---------------------------------------------------------------------------------------------
# Hosts


def host_index() -> int:
    """The number of this process; process 0 writes the files of a run."""
    return jax.process_index()


def host_count() -> int:
    """The number of processes that run this program."""
    return jax.process_count()


def coordination_client() -> Any:
    """The client of JAX's coordination service, if there are several hosts."""
    return jax_distributed.global_state.client


def coordinator_address() -> str:
    """ "ADDRESS:PORT" of JAX's coordination service, if there are several hosts."""
    return jax_distributed.global_state.coordinator_address or ""


def gather(items: Sequence[Any]) -> list[Any]:
    """The concatenated lists of all hosts, on every host. Items are JSON values.

    It uses the coordination service, because collectives of devices time out when a host keeps the
    others waiting, some after half a minute.
    """
    if host_count() == 1:
        return list(items)
    number, client = next(_gather_ids), coordination_client()
    client.key_value_set_bytes(_key(number) + str(host_index()), json.dumps(list(items)).encode())
    client.wait_at_barrier(_key(number), FOREVER)
    if number:  # every host has read the last call's entry, as it has reached this call
        client.key_value_delete(_key(number - 1) + str(host_index()))
    entries = client.key_value_dir_get_bytes(_key(number))
    by_host = {int(key.rpartition("/")[2]): text for key, text in entries}
    return [item for host in sorted(by_host) for item in json.loads(by_host[host])]


def sum_over_hosts(values: np.ndarray) -> np.ndarray:
    """The sum of an array of every host, on every host; see `gather`."""
    return np.sum(gather([values.tolist()]), axis=0)


def _key(number: int) -> str:
    return f"fluxvit_jax/gathering/{number}/"
