"""A CPU's training and inference, next to the same network in plain PyTorch.

    python -m benchmarks.cpu [--variant=S] [--frames=8] [--resolution=224] [--budgets=2048,1024,512]
        [--training=1024] [--batch=2] [--kernels=chunked,xla] [--rounds=5] [--dtype=float32]
        [--compiler=eager] [--out=FILE.json]

Both sides are those of `benchmarks.gpu`, here with one clip at each of `--budgets`, and with a
training step of `--batch` clips at `--training`; ours once with each attention kernel. Each has a
process of its own for each task. First all answer once, and where they differ by more than rounding
nothing is timed. Then they run in turn, round after round.

Given are medians over the rounds: CPU time, of all threads, and its ratio to PyTorch's in the same
round; and the largest resident memory of the process during a call. CPU time leaves out what else
the machine does, but not threads that wait for work by spinning, as PyTorch's do: on a busy machine
run it on one core (`taskset -c 0`).
"""

import argparse
import contextlib
import importlib.util
import json
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from benchmarks import gpu
from benchmarks.gpu_case import Case, make_config, training_name
from fluxvit_jax.config.variants import VARIANTS
from fluxvit_jax.errors import ArgumentParser, UserError
from fluxvit_jax.grids import Grid
from fluxvit_jax.models import attention

PYTORCH = "pytorch"


class Called(NamedTuple):
    """CPU and wall seconds of one call, its answer, and the peak of resident memory in bytes."""

    cpu: float
    wall: float
    answer: dict[str, np.ndarray]
    peak: int


def main(arguments: list[str] | None = None) -> int:
    try:
        options = parse(arguments)
        results = compare(options)
    except UserError as error:
        print(f"benchmarks.cpu: {error}", file=sys.stderr)
        return 2
    if options.out:
        options.out.write_text(json.dumps(results, indent=2) + "\n")
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Raises UserError for options that are wrong."""
    parser = ArgumentParser(prog="benchmarks.cpu", description=__doc__.splitlines()[0])
    parser.add_argument("--variant", default="S", choices=VARIANTS)
    parser.add_argument("--frames", type=int, default=8, help="of a clip")
    parser.add_argument("--resolution", type=int, default=224, help="of a clip, pixels")
    parser.add_argument("--budgets", default="2048,1024,512", help="of inference, largest first")
    parser.add_argument("--training", default="1024", help="budgets of training, largest first")
    parser.add_argument("--batch", type=int, default=2, help="clips of a training step")
    parser.add_argument("--kernels", default="chunked,xla", help="of our attention")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="float32", choices=gpu.TOLERANCE)
    parser.add_argument("--compiler", default="eager", help="backend of torch.compile")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    if unknown := set(options.kernels.split(",")) - {"auto", *attention.KERNELS}:
        raise UserError(f"--kernels: {min(unknown)!r} is none of {', '.join(attention.KERNELS)}")
    if importlib.util.find_spec("torch") is None:
        raise UserError("PyTorch is not installed, and ours is compared with it: pip install torch")
    for case in cases(options, "").values():
        make_config(case, "float32")
    return options


def cases(options: argparse.Namespace, weights: str) -> dict[str, Case]:
    """Inference and training, by name."""
    grid = Grid.square(options.frames, options.resolution)

    def case(task: str, budgets: str, batch: int) -> Case:
        kept = tuple(map(int, budgets.split(",")))
        return Case(
            task, options.variant, grid, kept, batch, options.dtype, options.compiler, weights
        )

    return {
        "inference": case("inference", options.budgets, 1),
        "training": case("training", options.training, options.batch),
    }


def compare(options: argparse.Namespace) -> dict[str, dict]:
    """Runs and prints all: {task and tokens: {contender: its medians}}."""
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for task, case in cases(options, folder).items():
            found = measure(case, options)
            print(f"\n{task}: {case.batch} clips, {options.dtype}\n{table(found)}", flush=True)
            results |= {f"{task}, {tokens}": own for tokens, own in found.items()}
    return results


def measure(case: Case, options: argparse.Namespace) -> dict[str, dict[str, dict[str, float]]]:
    """Medians by tokens and contender. Raises RuntimeError where answers differ."""
    kernels = options.kernels.split(",")
    programs = [training_name(case)] if case.task == "training" else list(map(str, case.budgets))
    with contextlib.ExitStack() as stack:
        processes = {name: stack.enter_context(gpu.own_process()) for name in (*kernels, PYTORCH)}
        for name, process in processes.items():  # ours first: it writes the weights
            theirs = name == PYTORCH
            side, own_case = (name, case) if theirs else ("ours", case._replace(attention=name))
            about = process.submit(gpu.prepare, side, own_case).result()
            print(f"{name}: {', '.join(f'{key} {value}' for key, value in about.items())}")
        rounds = {(tokens, name): [] for tokens in programs for name in processes}
        contenders = list(rounds)
        for number in tqdm(range(1 + options.rounds), desc=case.task, leave=False):
            turn = number % len(contenders)
            for tokens, name in contenders[turn:] + contenders[:turn]:
                rounds[tokens, name].append(processes[name].submit(call, tokens).result())
            if number == 0:
                check(rounds, options.dtype)
    return {
        tokens: {name: summary(rounds[tokens, name], rounds[tokens, PYTORCH]) for name in processes}
        for tokens in programs
    }


def check(rounds: dict[tuple[str, str], list[Called]], dtype: str) -> None:
    """Prints how far ours are from PyTorch's. Raises RuntimeError if that is not rounding."""
    for (tokens, name), calls in rounds.items():
        if name == PYTORCH:
            continue
        apart = gpu.difference(calls[0].answer, rounds[tokens, PYTORCH][0].answer)
        said = ", ".join(f"{what} {distance:.1e}" for what, distance in apart.items())
        print(f"{tokens} tokens: {name} differs from {PYTORCH} by {said}", flush=True)
        if not max(apart.values()) < gpu.TOLERANCE[dtype]:
            raise RuntimeError(f"that is more than the {gpu.TOLERANCE[dtype]} of rounding")


def call(program: str) -> Called:
    """One call in the process of a contender."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    wall, cpu = time.perf_counter(), time.process_time()
    answer = gpu.call(program, 1).answer
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    [peak] = re.findall(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return Called(cpu, wall, answer, 1024 * int(peak))


def summary(own: list[Called], theirs: list[Called]) -> dict[str, float]:
    """The first call compiled."""
    pairs = zip(own[1:], theirs[1:], strict=True)
    return {
        "cpu_milliseconds": 1e3 * statistics.median(called.cpu for called in own[1:]),
        "wall_milliseconds": 1e3 * statistics.median(called.wall for called in own[1:]),
        "times_faster": statistics.median(them.cpu / us.cpu for us, them in pairs),
        "peak_gib": max(called.peak for called in own[1:]) / 2**30,
    }


def table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    lines = [f"{'tokens':>8} {'':10} {'CPU ms':>8} {'wall ms':>8} {'faster':>7} {'GiB':>6}"]
    for tokens, contenders in results.items():
        for name, own in contenders.items():
            cpu, wall, faster, peak = own.values()
            lines.append(f"{tokens:>8} {name:10} {cpu:8.0f} {wall:8.0f} {faster:6.2f}x {peak:6.2f}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
