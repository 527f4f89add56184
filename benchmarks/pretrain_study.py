"""Does pre-training help: the demo's clips, a tenth of the labels, several seeds.

    python -m benchmarks.pretrain_study --out=demo/pretrain_study [--clips=demo/clips] [--seeds=3]

The teacher is a run of configs/demo.py:multi, trained with all labels. Students of the same size
learn from it on all clips without labels (configs/demo_pretrain.py), on flexible grids or on one,
and are then fine-tuned with a tenth of the labels by the demo's recipe, as is a network that starts
from scratch. A seed changes which tenth it is as well. Finished runs are kept, so the study can be
stopped and started again. About 15 minutes a seed on two idle cores, and 5 for the teacher.
"""

import argparse
import csv
import json
import sys
from pathlib import Path
from typing import NamedTuple

from benchmarks.demo import data_flags, run
from benchmarks.demo_study import mean_and_range

LABELLED = 10  # one in so many clips of each class
EPOCHS = 60  # of fine-tuning: 900 steps of 16 clips


class Row(NamedTuple):
    """grids: that the student is pre-trained on, "" for none; method: of configs/demo.py."""

    name: str
    grids: str
    method: str


ROWS = (
    Row("From scratch, fixed grid", "", "fixed"),
    Row("From scratch, Flux-Multi", "", "multi"),
    Row("Pre-trained on a fixed grid, then fixed grid", "fixed", "fixed"),
    Row("Pre-trained on a fixed grid, then Flux-Multi", "fixed", "multi"),
    Row("Flux-UMT, then Flux-Multi", "flexible", "multi"),
)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pretrain_study", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--out", type=Path, default=Path("demo/pretrain_study"), help="of the runs")
    parser.add_argument("--clips", type=Path, default=Path("demo/clips"), help="the demo's clips")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each row (default: 3)")
    options = parser.parse_args()
    run("fluxvit_jax.data.synthetic", f"--out={options.clips}")
    teacher = options.out / "teacher"
    train(teacher, "configs/demo.py:multi", *data_flags(options.clips))
    results: dict[str, list[dict[str, float]]] = {row.name: [] for row in ROWS}
    for seed in range(options.seeds):
        for row in ROWS:
            results[row.name].append(accuracy(row, seed, teacher, options))
            report(results, accuracies(teacher), options.out)
    print((options.out / "study.md").read_text())
    return 0


def train(workdir: Path, recipe: str, *arguments: str) -> None:
    """Trains unless that is done; a run that was cut off goes on."""
    if not (workdir / "finished").exists():
        run("fluxvit_jax.main", f"--config={recipe}", f"--workdir={workdir}", *arguments)
        (workdir / "finished").touch()


def accuracy(row: Row, seed: int, teacher: Path, options: argparse.Namespace) -> dict[str, float]:
    """Trains a row with a seed; its top-1 (%) at each budget."""
    start = ""
    if row.grids:
        start = str(options.out / f"pretrained-{row.grids}-{seed}")
        train(
            Path(start),
            f"configs/demo_pretrain.py:{row.grids},seed={seed}",
            f"--config.data.train={options.clips / 'train.csv'}",
            f"--config.data.root={options.clips}",
            f"--config.distill.teacher={teacher}",
        )
    workdir = options.out / f"{row.method}-{row.grids or 'scratch'}-{seed}"
    train(
        workdir,
        f"configs/demo.py:{row.method},seed={seed}",
        *data_flags(options.clips),
        f"--config.data.train={labelled(options, seed)}",
        f"--config.train.init_from={start}",
        f"--config.train.epochs={EPOCHS}",
        f"--config.eval.every_epochs={EPOCHS}",
        "--config.train.warmup_epochs=3",
    )
    return accuracies(workdir)


def labelled(options: argparse.Namespace, seed: int) -> Path:
    """A list of every `LABELLED`th clip of each class, from another one on for each seed."""
    with open(options.clips / "train.csv", newline="") as file:
        header, *rows = csv.reader(file)
    chosen = []
    for label in sorted({row[1] for row in rows}):
        chosen += [row for row in rows if row[1] == label][seed % LABELLED :: LABELLED]
    path = options.out / f"labelled-{seed}.csv"
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([header, *chosen])
    return path


def accuracies(workdir: Path) -> dict[str, float]:
    """Top-1 (%) by budget after a run's last step."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    last = [line for line in lines if line["split"] == "validation"][-1]
    found = {name.removeprefix("top1_"): last[name] for name in last if name.startswith("top1_")}
    return {budget: 100 * value for budget, value in found.items()}


def report(
    results: dict[str, list[dict[str, float]]], teacher: dict[str, float], out: Path
) -> None:
    """Writes study.md: mean and range over the seeds."""
    budgets = list(teacher)
    lines = [
        "| | " + " | ".join(f"{b} tokens" for b in budgets) + " | seeds |",
        "|---" * (len(budgets) + 2) + "|",
        "| The teacher, all labels | "
        + " | ".join(f"{teacher[b]:.1f}" for b in budgets)
        + " | 1 |",
    ]
    for name, seeds in results.items():
        if seeds:
            cells = [mean_and_range([own[b] for own in seeds]) for b in budgets]
            lines.append(f"| {name} | {' | '.join(cells)} | {len(seeds)} |")
    (out / "study.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
