"""The demo, `make demo`: writes the clips, trains, evaluates at every budget, draws the result.

    python -m benchmarks.demo --out=demo

Two models of one size see the same number of clips: Flux-Multi, and one trained the ordinary way
(a fixed grid, every token). What is finished is kept: started again, the demo goes on where it
stopped. `--train`, `--validation` and `--epochs` make it shorter. Needs the packages of the extra
`demo`.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

import fluxvit_jax
from fluxvit_jax.data.clips import read_clip
from fluxvit_jax.data.decoding import Video
from fluxvit_jax.deploy.page import fade
from fluxvit_jax.deploy.pretrained import PretrainedModel

TITLES = {"multi": "Flux-Multi", "fixed": "Fixed grid, no selection"}
SHOWN = ("pan_right", "object_over_still", "rotate_clockwise")  # a clip of each is drawn


def main() -> int:
    options = parse()
    out, clips = options.out, options.out / "clips"
    begin = time.monotonic()
    amounts = {"train": options.train, "validation": options.validation}
    given = [f"--{split}={number}" for split, number in amounts.items() if number]
    run("fluxvit_jax.data.synthetic", f"--out={clips}", *given)
    shorter = [f"--config.train.epochs={options.epochs}"] if options.epochs else []
    for mode in ("train", "evaluate"):
        for method in TITLES:
            run(
                "fluxvit_jax.main",
                f"--config=configs/demo.py:{method}",
                f"--workdir={out / method}",
                f"--mode={mode}",
                *data_flags(clips),
                *shorter,
            )
    reports = {method: read_report(out / method) for method in TITLES}
    print(table(reports))
    draw(reports, out / "multi", clips, out / "demo.png")
    print(f"picture: {out / 'demo.png'}")
    print(f"all of it took {(time.monotonic() - begin) / 60:.1f} minutes")
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.demo", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder (default: demo)")
    parser.add_argument("--train", type=int, help="clips to train on (default: the data set's)")
    parser.add_argument("--validation", type=int, help="clips to evaluate on (the data set's)")
    parser.add_argument("--epochs", type=int, help="of training (default: the recipe's)")
    return parser.parse_args()


def run(module: str, *arguments: str) -> None:
    """Runs a module as a user would; ends the demo with its status if it fails."""
    command = [sys.executable, "-m", module, *arguments]
    print("$ python", *command[1:], flush=True)
    begin = time.monotonic()
    status = None
    with subprocess.Popen(command) as process:
        while status is None:
            try:
                status = process.wait()
            except KeyboardInterrupt:  # the module has it as well, saves its work and ends
                continue
    if status:
        sys.exit(status)
    print(f"  {time.monotonic() - begin:.0f} s", flush=True)


def data_flags(clips: Path) -> list[str]:
    return [
        f"--config.data.train={clips / 'train.csv'}",
        f"--config.data.validation={clips / 'validation.csv'}",
        f"--config.data.root={clips}",
        f"--config.data.class_names={clips / 'classes.txt'}",
    ]


def read_report(workdir: Path) -> dict:
    """The latest report of an evaluation."""
    reports = (workdir / "evaluation").glob("*.json")
    return json.loads(max(reports, key=lambda path: path.stat().st_mtime_ns).read_text())


def table(reports: dict[str, dict]) -> str:
    """Top-1 of each model at each budget, and the grid it was asked on."""
    budgets = list(reports["multi"]["budgets"])
    width = max(map(len, TITLES.values()))
    lines = ["", f"{'top-1 on unseen clips at':{width}}" + "".join(f"{b:>18}" for b in budgets)]
    for method, report in reports.items():
        cells = (
            f"{own['top1']:.1%} ({own['frames']} x {own['resolution']})"
            for own in report["budgets"].values()
        )
        lines.append(f"{TITLES[method]:{width}}" + "".join(f"{cell:>18}" for cell in cells))
    full, quarter = (reports["multi"]["budgets"][b]["top1"] for b in (budgets[0], budgets[-1]))
    lines.append(
        f"Flux-Multi at {budgets[-1]} of {budgets[0]} tokens: {100 * (quarter - full):+.1f} points"
    )
    return "\n".join(lines)


def draw(reports: dict[str, dict], workdir: Path, clips: Path, path: Path) -> None:
    """Accuracy against tokens, and strips of frames in which only kept patches have colour."""
    budgets = [int(budget) for budget in reports["multi"]["budgets"]]
    figure = plt.figure(figsize=(12, 8.5), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1, 1.5))
    axes = above.subplots()
    for method, report in reports.items():
        top1 = [100 * own["top1"] for own in report["budgets"].values()]
        axes.plot(budgets, top1, "o-", label=TITLES[method])
    axes.set_xscale("log", base=2)
    axes.set_xticks(budgets, budgets)
    axes.set(xlabel="tokens", ylabel="top-1 on unseen clips (%)", ylim=(0, 100))
    axes.legend()
    axes.grid(alpha=0.3)
    rows = below.subplots(len(SHOWN) * len(budgets), 1)
    model = fluxvit_jax.from_pretrained(workdir)
    strips = [strip for motion in SHOWN for strip in kept_strips(model, clips, motion, budgets)]
    longest = max(strip.shape[1] for strip in strips)
    labels = [f"{motion}\n{budget} tokens" for motion in SHOWN for budget in budgets]
    for row, strip, label in zip(rows, strips, labels, strict=True):
        white = [(0, 0), (0, longest - strip.shape[1]), (0, 0)]
        row.imshow(np.pad(strip, white, constant_values=255))
        row.set_axis_off()
        row.text(-8, strip.shape[0] / 2, label, ha="right", va="center", fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def kept_strips(
    model: PretrainedModel, clips: Path, motion: str, budgets: list[int]
) -> list[np.ndarray]:
    """Frames of the first validation clip of a motion, side by side, once for each budget."""
    strips = []
    for budget, frames, resolution in model.config.asked(budgets):
        with Video(sorted((clips / "validation" / motion).glob("*.mp4"))[0]) as video:
            clip = read_clip(video, frames, resolution).frames
        shown = fade(clip, model.select(clip, budget)[0])
        gap = np.full((resolution, 3, 3), 255, np.uint8)
        strips.append(np.concatenate([side for frame in shown for side in (frame, gap)], axis=1))
    return strips


if __name__ == "__main__":
    sys.exit(main())
