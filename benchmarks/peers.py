"""Ours next to its peers on a CPU: training, inference, exported programs, and reading videos.

    python -m benchmarks.peers [--peers=official,torch_fluxvit,torch.compile,onnxruntime]
        [--official=CHECKOUT] [--variant=S] [--frames=8] [--resolution=224]
        [--budgets=2048,1024,512] [--training=1024] [--batch=2] [--kernels=auto] [--rounds=5]
        [--dtype=float32] [--decode] [--out=FILE.json]

Ours is what evaluation and training run, once with each attention kernel of `--kernels`, and the
program of `--mode=export`. Peers, all with the same weights and videos:

- official: the paper's code, of a checkout of its repository (`--official`), with plain attention,
  since flash-attn has no CPU build;
- torch_fluxvit: the file of plain PyTorch that `convert` writes, with scaled_dot_product_attention;
- torch.compile: the same through PyTorch's compiler, which needs a C++ compiler;
- onnxruntime: the same through `torch.onnx` (pip install onnx onnxscript onnxruntime).

One that is not there is said and left out. Inference has one clip at each of `--budgets`, training
`--batch` clips at `--training`. Each contender has a process of its own for each task. First all
answer once, and where they differ from ours by more than rounding nothing is timed. Then they run
in turn, round after round.

Given are medians over the rounds: CPU time, of all threads, and how many times faster than that
ours is in the same round; model FLOPs of that time, in percent of the highest rate of a matrix
product of 2048 x 2048 in JAX and PyTorch, measured here; and the largest resident memory of the
process during a call. CPU time leaves out what else the machine does, but not threads that wait for
work by spinning, as PyTorch's do: on a busy machine run it on one core (`taskset -c 0`).
`--decode` adds what `benchmarks.decode` finds, of reading videos next to decord and torchcodec.
"""

import argparse
import contextlib
import importlib.util
import json
import re
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from benchmarks import decode, gpu
from benchmarks.gpu_case import Case, make_config, training_name
from fluxvit_jax.config.variants import VARIANTS
from fluxvit_jax.errors import ArgumentParser, UserError
from fluxvit_jax.grids import Grid
from fluxvit_jax.models import attention

EXPORTED = "exported"
MATRIX = 2048  # rows and columns of the product that is the machine's best


class Peer(NamedTuple):
    """maker: of its side, see `gpu.prepare`; needs: modules; compiler: of PyTorch's programs."""

    maker: str
    needs: tuple[str, ...] = ("torch",)
    compiler: str = ""
    trains: bool = True


PEERS = {
    "official": Peer("benchmarks.peers_official:side"),
    "torch_fluxvit": Peer("benchmarks.gpu_torch:side"),
    "torch.compile": Peer("benchmarks.gpu_torch:side", compiler="inductor"),
    "onnxruntime": Peer(
        "benchmarks.peers_exported:onnx_side",
        needs=("torch", "onnx", "onnxscript", "onnxruntime"),
        trains=False,
    ),
}


class Called(NamedTuple):
    """CPU and wall seconds of one call, its answer, and the peak of resident memory in bytes."""

    cpu: float
    wall: float
    answer: dict[str, np.ndarray]
    peak: int


def main(arguments: list[str] | None = None) -> int:
    try:
        options = parse(arguments)
        report = compare(options)
    except UserError as error:
        print(f"benchmarks.peers: {error}", file=sys.stderr)
        return 2
    if options.decode:
        print()
        report["decode"] = decode.main([])
    if options.out:
        options.out.write_text(json.dumps(report, indent=2) + "\n")
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Raises UserError for options that are wrong."""
    parser = ArgumentParser(prog="benchmarks.peers", description=__doc__.splitlines()[0])
    parser.add_argument("--peers", default=",".join(PEERS), help="whom to compare with")
    parser.add_argument("--official", default="", help="checkout of the official repository")
    parser.add_argument("--variant", default="S", choices=VARIANTS)
    parser.add_argument("--frames", type=int, default=8, help="of a clip")
    parser.add_argument("--resolution", type=int, default=224, help="of a clip, pixels")
    parser.add_argument("--budgets", default="2048,1024,512", help="of inference, largest first")
    parser.add_argument("--training", default="1024", help="budgets of training, largest first")
    parser.add_argument("--batch", type=int, default=2, help="clips of a training step")
    parser.add_argument("--kernels", default="auto", help="of our attention, such as auto,xla")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="float32", choices=gpu.TOLERANCE)
    parser.add_argument("--decode", action="store_true", help="compare readers of videos as well")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    if unknown := set(options.kernels.split(",")) - {"auto", *attention.KERNELS}:
        raise UserError(f"--kernels: {min(unknown)!r} is none of {', '.join(attention.KERNELS)}")
    if unknown := set(filter(None, options.peers.split(","))) - PEERS.keys():
        raise UserError(f"--peers: {min(unknown)!r} is none of {', '.join(PEERS)}")
    if options.official and not Path(options.official, "single_modality/models").is_dir():
        raise UserError(f"--official={options.official}: holds no single_modality/models")
    for case in cases(options, "").values():
        make_config(case, "float32")
    return options


def cases(options: argparse.Namespace, weights: str) -> dict[str, Case]:
    """Inference and training, by name."""
    grid = Grid.square(options.frames, options.resolution)

    def case(task: str, budgets: str, batch: int) -> Case:
        kept = tuple(map(int, budgets.split(",")))
        return Case(
            task, options.variant, grid, kept, batch, options.dtype, "", weights,
            checkout=options.official,
        )  # fmt: skip

    return {
        "inference": case("inference", options.budgets, 1),
        "training": case("training", options.training, options.batch),
    }


def compare(options: argparse.Namespace) -> dict[str, dict]:
    """Runs and prints all: {"machine": ..., "results": {task and tokens: {contender: medians}}}."""
    peers = {
        name: PEERS[name] for name in options.peers.split(",") if name and is_there(name, options)
    }
    report = {"machine": decode.machine(), "results": {}}
    for task, case in cases(options, "").items():
        with tempfile.TemporaryDirectory() as folder:
            found = measure(case._replace(weights=folder), options, peers)
        print(f"\n{task}: {case.batch} clips, {options.dtype}\n{table(found)}", flush=True)
        report["results"] |= {f"{task}, {tokens}": own for tokens, own in found.items()}
    return report


def is_there(name: str, options: argparse.Namespace) -> bool:
    """Whether a peer can be asked; says why not."""
    missing = [module for module in PEERS[name].needs if importlib.util.find_spec(module) is None]
    if missing:
        reason = f"needs pip install {' '.join(missing)}"
    elif name == "official" and not options.official:
        reason = "needs --official=CHECKOUT, a checkout of github.com/OpenGVLab/FluxViT"
    elif name == "torch.compile" and not shutil.which("g++"):
        reason = "needs a C++ compiler, g++"
    else:
        return True
    print(f"{name} is left out: it {reason}", flush=True)
    return False


def contenders_of(case: Case, kernels: list[str], peers: dict[str, Peer]) -> dict[str, tuple]:
    """Maker and case of each by name, ours first: it writes the weights."""
    names = {f"ours ({kernel})" if len(kernels) > 1 else "ours": kernel for kernel in kernels}
    made: dict[str, tuple] = {
        name: (gpu.MAKERS["ours"], case._replace(attention=kernel))
        for name, kernel in names.items()
    }
    if case.task == "inference":
        made[EXPORTED] = ("benchmarks.peers_exported:ours_side", case)
    for name, peer in peers.items():
        if peer.trains or case.task == "inference":
            made[name] = (peer.maker, case._replace(compiler=peer.compiler))
    return made


def measure(
    case: Case, options: argparse.Namespace, peers: dict[str, Peer]
) -> dict[str, dict[str, dict[str, float]]]:
    """Medians by tokens and contender. Raises RuntimeError where answers differ."""
    made = contenders_of(case, options.kernels.split(","), peers)
    ours = next(iter(made))
    flops = gpu.gigaflops(case)
    programs = [training_name(case)] if case.task == "training" else list(map(str, case.budgets))
    best = 0.0  # GFLOP a CPU second
    with contextlib.ExitStack() as stack:
        processes = {name: stack.enter_context(gpu.own_process()) for name in made}
        for name, process in processes.items():
            about = process.submit(gpu.prepare, *made[name]).result()
            print(f"{name}: {', '.join(f'{key} {value}' for key, value in about.items())}")
        rounds = {(tokens, name): [] for tokens in programs for name in processes}
        order = list(rounds)
        for number in tqdm(range(1 + options.rounds), desc=case.task, leave=False):
            turn = number % len(order)
            for tokens, name in order[turn:] + order[:turn]:
                rounds[tokens, name].append(processes[name].submit(call, tokens).result())
            if number == 0:
                check(rounds, ours, options.dtype)
            for name in {*made} & {ours, "torch_fluxvit"}:
                best = max(best, processes[name].submit(product_rate, options.dtype).result())
    return {
        tokens: {
            name: summary(
                rounds[tokens, name], rounds[tokens, ours], case.batch * flops[tokens] / best
            )
            for name in processes
        }
        for tokens in programs
    }


def check(rounds: dict[tuple[str, str], list[Called]], ours: str, dtype: str) -> None:
    """Prints how far the others are from ours. Raises RuntimeError if that is not rounding."""
    for (tokens, name), calls in rounds.items():
        if name == ours:
            continue
        apart = gpu.difference(rounds[tokens, ours][0].answer, calls[0].answer)
        said = ", ".join(f"{what} {distance:.1e}" for what, distance in apart.items())
        print(f"{tokens} tokens: {name} differs from {ours} by {said}", flush=True)
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


def product_rate(dtype: str) -> float:
    """GFLOP a CPU second of a product of two matrices, in the framework of a process."""
    if "torch" in sys.modules:
        import torch

        x = torch.ones(MATRIX, MATRIX, dtype=getattr(torch, dtype))
        multiply = lambda: x @ x  # noqa: E731
    else:
        import jax

        x = jax.numpy.ones((MATRIX, MATRIX), dtype)
        product = jax.jit(lambda x: x @ x)
        multiply = lambda: product(x).block_until_ready()  # noqa: E731
    multiply()
    start = time.process_time()
    multiply()
    return 2e-9 * MATRIX**3 / (time.process_time() - start)


def summary(own: list[Called], ours: list[Called], best_seconds: float) -> dict[str, float]:
    """Without the first call, which compiled. best_seconds: of its FLOPs at the machine's best."""
    pairs = zip(own[1:], ours[1:], strict=True)
    cpu = statistics.median(called.cpu for called in own[1:])
    return {
        "cpu_milliseconds": 1e3 * cpu,
        "wall_milliseconds": 1e3 * statistics.median(called.wall for called in own[1:]),
        "times_faster_is_ours": statistics.median(them.cpu / us.cpu for them, us in pairs),
        "percent_of_peak": 100 * best_seconds / cpu,
        "peak_gib": max(called.peak for called in own[1:]) / 2**30,
    }


def table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    lines = [
        f"{'tokens':>8} {'':16} {'CPU ms':>8} {'wall ms':>8} {'ours faster':>11} {'of peak':>8} "
        f"{'GiB':>6}"
    ]
    for tokens, contenders in results.items():
        for name, own in contenders.items():
            cpu, wall, faster, percent, peak = own.values()
            lines.append(
                f"{tokens:>8} {name:16} {cpu:8.0f} {wall:8.0f} {faster:10.2f}x {percent:7.0f}% "
                f"{peak:6.2f}"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
