"""A GPU's training and inference throughput, next to the same network in plain PyTorch.

    python -m benchmarks.gpu [--variants=S,B] [--batch=8] [--budgets=3072,2048,1024] [--frames=16]
        [--resolution=224] [--rounds=5] [--calls=10] [--dtype=bfloat16]
        [--compiler=inductor] [--out=FILE.json]

Ours is what training and evaluation run, with attention by cuDNN, in bfloat16 and with the blocks
unrolled (--config.model.scan=false). PyTorch is the network of `fluxvit_jax.convert.torch_fluxvit`
under `torch.compile`, as one graph, with `scaled_dot_product_attention`, in bfloat16 by autocast.
Both have one GPU, the same weights, in float32, the same uint8 pixels, which lie on the device, and
no augmentation, drop path or average.

- Training: a Flux-Multi step. The budgets run one after another, each with selection, cross entropy
  and, but the largest, alignment; their gradients are added; AdamW (in PyTorch the fused one).
- Inference: class probabilities of one view of each clip, at each budget.

First both answer once, and how far they differ is printed: the logits, or the loss and the norm of
the gradients; where that is more than rounding, nothing is timed. Then all contenders run in turn,
round after round, each round starting with another: a call ahead, then --calls of them in a row,
until the device is done. Given are medians over the rounds, of the time and of each round's ratio.
Model FLOPs are counted as in `benchmarks.step`. Memory is the peak on the device: of ours what the
compiled program takes, of PyTorch `max_memory_allocated`.

Each of the two has a process of its own, which waits while the other one runs; so neither takes
the other's memory, and JAX allocates as it needs (XLA_PYTHON_CLIENT_PREALLOCATE=false). PyTorch's
compiler needs a C compiler; TORCHINDUCTOR_MAX_AUTOTUNE=1 has it try more kernels. Without a GPU
both run on the CPU, in float32: small sizes try this program itself, and mean nothing else
(`benchmarks.peers` compares CPUs).

The network of torch_fluxvit.py trains as it is. `gpu_torch` adds two things, both in its favour:
the blocks' input is rounded to bfloat16, as ours is, where autocast would leave the residual stream
in float32; and float32 products may use TF32, as JAX's do. One difference is left: it embeds all
patches in each pass, with gradients, where ours chooses first and then embeds those that are kept.
"""

import argparse
import importlib
import importlib.util
import json
import multiprocessing
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from benchmarks.gpu_case import Case, Side, make_config, training_name
from fluxvit_jax.config.network import model_config
from fluxvit_jax.config.variants import VARIANTS
from fluxvit_jax.errors import ArgumentParser, UserError
from fluxvit_jax.grids import PATCH, Grid

TASKS = ("training", "inference")
MAKERS = {"ours": "benchmarks.gpu_jax:side", "pytorch": "benchmarks.gpu_torch:side"}
TOLERANCE = {"float32": 1e-3, "bfloat16": 2e-2}  # of the first answers, relative
TOO_LARGE = ("RESOURCE_EXHAUSTED", "out of memory")  # in what JAX and PyTorch raise


class Called(NamedTuple):
    """Seconds of one call, the last answer, and the peak of memory in bytes."""

    seconds: float
    answer: dict[str, np.ndarray]
    peak: int | None


def main(arguments: list[str] | None = None) -> int:
    try:
        options = parse(arguments)
        report = compare(options)
    except UserError as error:
        print(f"benchmarks.gpu: {error}", file=sys.stderr)
        return 2
    given = sys.argv[1:] if arguments is None else arguments
    report = {"command": shlex.join(["python", "-m", "benchmarks.gpu", *given])} | report
    print(f"\n{report['command']}")
    for name in ("ours", "pytorch"):
        print(", ".join(f"{key} {value}" for key, value in report[name].items()))
    if options.out:
        options.out.write_text(json.dumps(report, indent=2) + "\n")
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Raises UserError for options that are wrong."""
    parser = ArgumentParser(prog="benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--variants", default="S,B", help="networks, with commas between")
    parser.add_argument("--batch", type=int, default=8, help="clips")
    parser.add_argument("--budgets", default="3072,2048,1024", help="tokens, largest first")
    parser.add_argument("--frames", type=int, default=16, help="of a clip")
    parser.add_argument("--resolution", type=int, default=224, help="of a clip, pixels")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", type=int, default=10, help="in a row, each round")
    parser.add_argument(
        "--dtype",
        default="",
        choices=TOLERANCE,
        help="of the computation (default: bfloat16 on a GPU, float32 on a CPU)",
    )
    parser.add_argument("--compiler", default="inductor", help="backend of torch.compile")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    if not all(budget.isdecimal() for budget in options.budgets.split(",")):
        raise UserError(f"--budgets={options.budgets}: not numbers, such as 3072,2048,1024")
    for name in ("frames", "resolution", "batch", "rounds", "calls"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name}={getattr(options, name)}: must be above 0")
    if options.resolution % PATCH:
        raise UserError(f"--resolution={options.resolution}: no multiple of {PATCH}")
    if unknown := set(options.variants.split(",")) - VARIANTS.keys():
        raise UserError(f"--variants: {min(unknown)!r} is none of {', '.join(VARIANTS)}")
    for case in cases(options, ""):
        make_config(case, "float32")
    return options


def cases(options: argparse.Namespace, weights: str) -> list[Case]:
    budgets = tuple(map(int, options.budgets.split(",")))
    grid = Grid.square(options.frames, options.resolution)
    return [
        Case(task, variant, grid, budgets, options.batch, options.dtype, options.compiler, weights)
        for variant in options.variants.split(",")
        for task in TASKS
    ]


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Runs all; the report. Raises UserError where PyTorch is missing."""
    if importlib.util.find_spec("torch") is None:
        raise UserError("PyTorch is not installed, and ours is compared with it: pip install torch")
    # Read by JAX when it starts, so it has to be there before its process is.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    results, about = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for case in cases(options, folder):
            title = f"{case.variant} {case.task}"
            with own_process() as ours, own_process() as theirs:
                sides = {"ours": ours, "pytorch": theirs}
                about = begin(sides, case)
                results[title] = measure(sides, case, options, title, about["ours"]["dtype"])
            print(
                f"\n{title}: {case.batch} clips of {case.grid.tokens} tokens, "
                f"{about['ours']['dtype']}\n{table(results[title])}",
                flush=True,
            )
    return about | {
        "clips": options.batch,
        "grid": list(case.grid),
        "tokens": case.grid.tokens,
        "rounds": options.rounds,
        "calls": options.calls,
        "results": results,
    }


# ---------------------------------------------------------------------------------------------
# The process that measures; it leaves the GPU alone


@contextmanager
def own_process() -> Iterator[ProcessPoolExecutor]:
    """A fresh process that does one thing after another, and ends afterwards."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        yield pool


def begin(sides: dict[str, ProcessPoolExecutor], case: Case) -> dict[str, dict[str, str]]:
    """Compiles ours, sets up PyTorch; what is to be reported of each.

    Raises UserError if they are on different devices.
    """
    about = {
        name: sides[name].submit(prepare, maker, case).result() for name, maker in MAKERS.items()
    }
    ours, theirs = (about[name]["platform"] for name in ("ours", "pytorch"))
    if ours != theirs:
        raise UserError(
            f"JAX runs on the {ours} and PyTorch on the {theirs}: install of each the build for "
            "this machine's GPU, or hide the GPU by CUDA_VISIBLE_DEVICES= and JAX_PLATFORMS=cpu"
        )
    return about


def measure(
    sides: dict[str, ProcessPoolExecutor],
    case: Case,
    options: argparse.Namespace,
    title: str,
    dtype: str,
) -> dict[str, dict]:
    """Of each program: both sides' medians, how far they differ, and their last answers."""
    flops = gigaflops(case)
    contenders = [(name, side) for name in flops for side in sides]

    def run(contender: tuple[str, str], calls: int) -> Called:
        name, side = contender
        return sides[side].submit(call, name, calls).result()

    first = {contender: run(contender, 1).answer for contender in contenders}
    apart = {name: difference(first[name, "ours"], first[name, "pytorch"]) for name in flops}
    for name, own in apart.items():
        said = ", ".join(f"{what} {distance:.1e}" for what, distance in own.items())
        print(f"{title}, {name} tokens: ours and PyTorch differ by {said}", flush=True)
        if not max(own.values()) < TOLERANCE[dtype]:
            raise RuntimeError(f"that is more than the {TOLERANCE[dtype]} of {dtype}")
    rounds = {contender: [] for contender in contenders}
    for number in tqdm(range(options.rounds), desc=title, leave=False):
        turn = number % len(contenders)
        for contender in contenders[turn:] + contenders[:turn]:
            run(contender, 1)  # clocks rise only under load
            rounds[contender].append(run(contender, options.calls))
    return {
        name: {side: summary(rounds[name, side], flops[name], case.batch) for side in sides}
        | {
            "times_faster": statistics.median(
                theirs.seconds / ours.seconds
                for ours, theirs in zip(rounds[name, "ours"], rounds[name, "pytorch"], strict=True)
            ),
            "first_difference": apart[name],
        }
        for name in flops
    }


def gigaflops(case: Case) -> dict[str, float]:
    """The model FLOPs of one clip, by program."""
    from fluxvit_jax.models.flops import gflops

    model = model_config(make_config(case, "float32"))
    forward = {budget: 2 * gflops(model, case.grid, budget).kept for budget in case.budgets}
    if case.task == "training":
        return {training_name(case): 3 * sum(forward.values())}
    return {str(budget): own for budget, own in forward.items()}


def difference(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> dict[str, float]:
    """How far answers are apart, relative to ours: logits up to a constant, and plain numbers."""

    def logits(probabilities: np.ndarray) -> np.ndarray:
        logs = np.log(probabilities)
        return logs - logs.mean(-1, keepdims=True)

    found = {}
    for name in ours:
        a, b = ours[name], theirs[name]
        if name == "probabilities":
            name, a, b = "logits", logits(a), logits(b)
        found[name] = float(np.linalg.norm(a - b) / np.linalg.norm(a))
    return found


def summary(rounds: list[Called], flops: float, batch: int) -> dict[str, Any]:
    seconds = statistics.median(called.seconds for called in rounds)
    peak, last = rounds[-1].peak, rounds[-1].answer
    return {
        "milliseconds": 1e3 * seconds,
        "clips_per_second": batch / seconds,
        "model_gigaflops_per_second": flops * batch / seconds,
        "peak_gib": None if peak is None else peak / 2**30,
        "last": {name: float(x) for name, x in last.items() if x.ndim == 0},
    }


def table(results: dict[str, dict]) -> str:
    head = f"{'ms':>9} {'clips/s':>8} {'GFLOP/s':>8} {'GiB':>6}"
    lines = [f"{'':20} {'ours':>34} {'PyTorch':>35} {'ours':>8}"]
    lines += [f"{'tokens':20} {head}  {head} {'faster':>8}"]
    for name, own in results.items():
        cells = [
            f"{one['milliseconds']:9.1f} {one['clips_per_second']:8.1f} "
            f"{one['model_gigaflops_per_second']:8.0f} "
            f"{'' if one['peak_gib'] is None else format(one['peak_gib'], '.2f'):>6}"
            for one in (own["ours"], own["pytorch"])
        ]
        lines.append(f"{name:20} {'  '.join(cells)} {own['times_faster']:7.2f}x")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------
# The two processes

_own: dict[str, Side] = {}  # of such a process, the one that it is


def prepare(maker: str, case: Case) -> dict[str, str]:
    """Makes this process a side, by "MODULE:FUNCTION"; what it is.

    Raises UserError if memory is short.
    """
    module, _, function = maker.partition(":")
    with enough_memory(module):
        # Here, so that a process imports its own framework and not the other.
        _own["side"] = getattr(importlib.import_module(module), function)(case)
    return _own["side"].about


def call(program: str, calls: int) -> Called:
    """Calls one of the programs so many times in a row. Raises UserError if memory is short."""
    side = _own["side"]
    with enough_memory(program):
        start = time.perf_counter()
        for _ in range(calls):
            answer = side.programs[program]()
        side.wait(answer)
        seconds = (time.perf_counter() - start) / calls
    fetched = {name: side.fetch(array) for name, array in answer.items()}
    return Called(seconds, fetched, side.peak(program))


@contextmanager
def enough_memory(what: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # of which both JAX's and PyTorch's are kinds
        if not any(sign in str(error) for sign in TOO_LARGE):
            raise
        raise UserError(
            f"{what}: the device has too little memory: take a smaller --batch"
        ) from None


if __name__ == "__main__":
    sys.exit(main())
