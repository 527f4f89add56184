"""Time of one block, forward and backward, on a TPU, as its compiler estimates it.

    python -m benchmarks.block [--variant=B] [--topology=v5e:2x2] [--clips=4] [--tokens=3072,2048]
        [--kernels=pallas,splash,xla] [--remat=none,names,full] [--out=FILE.json]

No TPU is needed, but libtpu. `--tokens` counts CLS; where a kernel wants a longer sequence, it is
padded and masked. MFU is model FLOPs, those of the real tokens without recomputation, over the
chip's peak for that time. `METHOD` in fluxvit_jax/preflight/compiler/estimate.py says how the time
is found.
"""

import argparse
import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import SingleDeviceSharding

from fluxvit_jax.config.variants import VARIANTS, Variant
from fluxvit_jax.models import attention, blocks, padded_sequence
from fluxvit_jax.preflight.compiler import program, topology
from fluxvit_jax.preflight.compiler.estimate import METHOD

REMAT = ("none", "names", "full")


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    [wanted] = topology.parse(options.topology)
    device = topology.open_devices([wanted])[0][0]
    variant, rows = VARIANTS[options.variant], []
    tokens = [int(count) for count in options.tokens.split(",")]
    cases = itertools.product(tokens, options.kernels.split(","), options.remat.split(","))
    print(f"{'tokens':>6} {'length':>6} {'kernel':>7} {'remat':>5} {'ms':>7} {'MFU':>6} {'MB':>6}")
    for count, kernel, remat in cases:
        lowered = lower(variant, options.clips, count, kernel, remat, device)
        found = program.compile_for(lowered, wanted, [device])
        row = {
            "tokens": count,
            "length": padded_sequence.length_for(count, kernel),
            "kernel": kernel,
            "remat": remat,
        }
        if found.time is None:
            print(*row.values(), found.failure or f"does not fit: {found.shortage}")
            continue
        flops = options.clips * model_flops(variant, count)
        row["milliseconds"] = 1e3 * found.time.seconds
        row["mfu"] = flops / found.time.seconds / wanted.chip.peak
        row["temporary_megabytes"] = found.memory.temporaries / 1e6
        rows.append(row)
        print(
            f"{count:6} {row['length']:6} {kernel:>7} {remat:>5} {row['milliseconds']:7.2f} "
            f"{row['mfu']:6.3f} {row['temporary_megabytes']:6.0f}",
            flush=True,
        )
    print(METHOD)
    if options.out:
        report = {
            "variant": options.variant,
            "topology": wanted.name,
            "clips": options.clips,
            "blocks": rows,
        }
        options.out.write_text(json.dumps(report, indent=2) + "\n")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Estimated time of one block on a TPU.")
    parser.add_argument("--variant", default="B", choices=VARIANTS)
    parser.add_argument("--topology", default="v5e:2x2", help="whose chip, such as v5e:2x2")
    parser.add_argument("--clips", type=int, default=4, help="on the chip")
    parser.add_argument("--tokens", default="3072", help="of a clip, with commas between")
    parser.add_argument("--kernels", default="pallas,splash", help="with commas between")
    parser.add_argument("--remat", default="names", help="of none, names, full")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    for name, known in (("kernels", attention.KERNELS), ("remat", REMAT)):
        if unknown := set(getattr(options, name).split(",")) - set(known):
            parser.error(f"--{name}: {', '.join(unknown)} is none of {', '.join(known)}")
    return options


def lower(
    variant: Variant, clips: int, tokens: int, kernel: str, remat: str, device: jax.Device
) -> jax.stages.Lowered:
    """The program that runs a block of a network on a device and finds all gradients."""
    places = padded_sequence.padded_sequence(tokens - 1, kernel)
    graph = None

    def make() -> dict:
        nonlocal graph
        config = blocks.BlockConfig(
            width=variant.width,
            heads=variant.heads,
            hidden=4 * variant.width,
            kernel=kernel,
            dtype=jnp.bfloat16,
            recompute=remat == "names",
        )
        block = blocks.Block(config, nnx.Rngs(0))
        graph, state = nnx.split(block, nnx.Param)
        return nnx.to_pure_dict(state)

    def forward(params: dict, x: jax.Array) -> jax.Array:
        lengths = places.lengths(clips, None)
        return nnx.merge(graph, nnx.State(params))(x, lengths, 0.0, None)

    def step(params: dict, x: jax.Array, gradient: jax.Array) -> tuple:
        run = jax.checkpoint(forward) if remat == "full" else forward
        y, vjp = jax.vjp(run, params, x)
        return y, *vjp(gradient)

    def on_device(shape: tuple[int, ...], dtype: jnp.dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(device))

    params = jax.tree.map(lambda leaf: on_device(leaf.shape, leaf.dtype), jax.eval_shape(make))
    x = on_device((clips, places.length, variant.width), jnp.bfloat16)
    return jax.jit(step).trace(params, x, x).lower(lowering_platforms=("tpu",))


def model_flops(variant: Variant, tokens: int) -> int:
    """Of a block and one clip, forward and backward: its matrix products, attention among them."""
    return 3 * 2 * (12 * variant.width**2 * tokens + 2 * tokens**2 * variant.width)


if __name__ == "__main__":
    main()
