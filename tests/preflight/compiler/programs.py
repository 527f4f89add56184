"""Small programs compiled for devices that are not there, in a process of their own.

    python -m tests.preflight.compiler.programs cpu|tpu

prints what was read of each as one JSON object, {name: ...}. A process of its own, since devices
can't be chosen any more once JAX has started.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from fluxvit_jax.preflight.compiler import topology
from fluxvit_jax.preflight.compiler.program import Program, compile_for
from tests import limited

ROOT = Path(__file__).parents[3]
TOPOLOGIES = {"cpu": "cpu:8", "tpu": "v5e:2x4"}
LAYERS, B, C = 5, 16, 128  # of the scanned products


def run(where: str) -> dict[str, Any]:
    """What such a process prints."""
    process = limited.run(
        [sys.executable, "-m", "tests.preflight.compiler.programs", where],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "", "XLA_FLAGS": ""},
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


def main(where: str) -> None:
    (target,) = topology.parse(TOPOLOGIES[where])
    (devices,) = topology.open_devices([target])
    import jax
    import numpy as np

    mesh = jax.sharding.Mesh(np.array(devices), ("data",))
    read = partial(compile_for, topology=target, devices=devices)
    programs = common_programs(mesh, read)
    if where == "tpu":
        programs |= tpu_programs(mesh, read)
    print(json.dumps({name: as_json(program) for name, program in programs.items()}))


def as_json(program: Program) -> dict[str, Any]:
    return dataclasses.asdict(program) | {"fits": program.fits}


def common_programs(mesh, read: Callable) -> dict[str, Program]:
    """Products with and without a loop, attention, and an exchange of each kind."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    cut, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())

    def shape(sharding, *sides):
        return jax.ShapeDtypeStruct(sides, jnp.float32, sharding=sharding)

    def scanned(x, kernels):
        return jax.lax.scan(lambda x, kernel: (jax.nn.relu(x @ kernel), None), x, kernels)[0]

    def attended(q, k, v):
        with jax.named_scope("attention"):
            scores = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k))
            return jnp.einsum("bhqk,bkhd->bqhd", scores, v)

    def loss(q, k, v):
        return jnp.sum(attended(q, k, v) ** 2)

    def exchanged(x):
        """x: float32 [512, 128], the part of one device."""

        def trip(x, _):
            return jax.lax.psum(x, "data") * 0.1, None

        x = jax.lax.scan(trip, x, length=3)[0]
        x = x * jax.lax.all_gather(x[:64], "data", tiled=True)
        x = jax.lax.all_gather(jax.lax.psum_scatter(x, "data", tiled=True), "data", tiled=True)
        x = jax.lax.ppermute(x, "data", [(i, (i + 1) % 8) for i in range(8)])
        x = jax.lax.all_to_all(x, "data", 0, 1, tiled=True)
        return x

    each = jax.shard_map(
        exchanged, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False
    )
    tokens = shape(cut, B, 64, 4, 32)
    return {
        "scan": read(jax.jit(scanned).lower(shape(cut, 8 * B, C), shape(whole, LAYERS, C, C))),
        "attention": read(jax.jit(attended).lower(tokens, tokens, tokens)),
        "attention_gradient": read(
            jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(tokens, tokens, tokens)
        ),
        "exchanges": read(jax.jit(each).lower(shape(cut, 8 * 512, 128))),
    }


def tpu_programs(mesh, read: Callable) -> dict[str, Program]:
    """A Pallas kernel in a loop and outside of it; a program that does not fit."""
    import jax
    import jax.numpy as jnp
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    heads, tokens, size, blocks = 2, 1024, 64, 512
    kernel = splash.make_splash_mha_single_device(
        masks.MultiHeadMask([masks.FullMask((tokens, tokens))] * heads),
        block_sizes=splash.BlockSizes(block_q=blocks, block_kv=blocks, block_kv_compute=blocks),
    )
    attend = jax.shard_map(
        jax.vmap(kernel), mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False
    )
    cut = NamedSharding(mesh, P("data"))
    x = jax.ShapeDtypeStruct((8, heads, tokens, size), jnp.bfloat16, sharding=cut)
    large = jax.ShapeDtypeStruct((8, 2**34), jnp.float32, sharding=cut)  # 64 GiB each

    def looped(x):
        return jax.lax.scan(lambda x, _: (attend(x, x, x), None), x, length=6)[0]

    return {
        "kernel": read(jax.jit(attend).lower(x, x, x)),
        "kernel_twice": read(jax.jit(lambda x: attend(attend(x, x, x), x, x)).lower(x)),
        "kernel_looped": read(jax.jit(looped).lower(x)),
        "too_large": read(jax.jit(lambda x: x + 1).lower(large)),
    }


if __name__ == "__main__":
    main(sys.argv[1])
