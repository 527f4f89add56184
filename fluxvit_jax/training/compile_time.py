"""How long a program will take to compile, told before it is compiled."""

from typing import Any

# Seconds for each operation of a training step as it is lowered: on two idle cores of an AMD EPYC a
# step of FluxViT-Ti has 7,600 (one budget) or 11,900 operations (three) and took 23 and 49 s of
# CPU, one of S in a scan 13,300 and 71 s; for TPU, whose compiler is another, 209 s (docs, Many
# devices). Processors, and unrolled blocks, make it up to twice as long or half. None is known of
# GPUs.
SECONDS_PER_OPERATION = {"cpu": 0.005, "tpu": 0.015}


def describe_compile_time(lowered: Any, platform: str) -> str:
    """Such as "about 40 s": the time to compile a `jax.stages.Lowered` that is not in the cache."""
    if platform not in SECONDS_PER_OPERATION:
        return "a large network takes minutes"
    module = lowered.compiler_ir("stablehlo").operation
    seconds = count_operations(module) * SECONDS_PER_OPERATION[platform]
    if seconds >= 90:
        return f"about {seconds / 60:.0f} min"
    return f"about {max(10, round(seconds, -1)):.0f} s"


def count_operations(operation: Any) -> int:
    """The number of operations within an MLIR operation, and itself."""
    inner = (own for region in operation.regions for block in region for own in block)
    return 1 + sum(count_operations(own.operation) for own in inner)
