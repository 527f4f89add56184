"""Methods and selectors compared on the demo's clips over several seeds: docs/benchmarks.md.

    python -m benchmarks.demo_study --out=demo/study [--clips=demo/clips] [--seeds=3]

Rows: the ordinary way (fixed grid, every token), Flux-Single, Flux-Multi without and with alignment
(all three with the group-dynamic selector), the other selectors, and flexible grids without any.
Each row is trained as the demo is, with each seed; every budget takes the best of a few grids, as
table 1 of the paper does. Finished runs are kept, so the study can be stopped and started again.
About 5 minutes a run on two idle cores.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

from benchmarks.demo import data_flags, read_report, run

BUDGETS = (128, 64, 32)
# Rows of the table: what follows `configs/demo.py:`.
ROWS = {
    "Fixed grid, no selection": "fixed",
    "Flux-Single": "single",
    "Flux-Multi, no alignment": "multi,align=0",
    "Flux-Multi": "multi",
    "Flux-Multi, selector dynamic L2": "multi,selector=dynamic_l2",
    "Flux-Multi, selector tube": "multi,selector=tube",
    "Flux-Multi, selector random": "multi,selector=random",
    "Flux-Single, selector none": "single,selector=none",
}
UNSELECTED = ("fixed", "single,selector=none")
# Grids (frames, pixels) tried at each budget. Without selection a grid must not exceed the budget.
FLUX_GRIDS = [{b: (frames, 56) for b in BUDGETS} for frames in (7, 10, 12)]
FIXED_GRIDS = [
    {128: (8, 56), 64: (4, 56), 32: (2, 56)},
    {128: (14, 42), 64: (7, 42), 32: (3, 42)},
    {128: (5, 70), 64: (16, 28), 32: (8, 28)},
]


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.demo_study", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--out", type=Path, default=Path("demo/study"), help="folder of the runs")
    parser.add_argument("--clips", type=Path, default=Path("demo/clips"), help="the demo's clips")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each row (default: 3)")
    options = parser.parse_args()
    run("fluxvit_jax.data.synthetic", f"--out={options.clips}")
    results: dict[str, list[dict[int, float]]] = {name: [] for name in ROWS}
    for seed in range(options.seeds):
        for name, recipe in ROWS.items():
            results[name].append(accuracy(recipe, seed, options))
            report(results, options.out)
    print((options.out / "study.md").read_text())
    return 0


def accuracy(recipe: str, seed: int, options: argparse.Namespace) -> dict[int, float]:
    """Trains a row with a seed; its best top-1 (%) at each budget."""
    workdir = options.out / f"{recipe.replace(',', '-').replace('=', '-')}-seed-{seed}"
    common = [f"--config=configs/demo.py:{recipe},seed={seed}", f"--workdir={workdir}"]
    common += data_flags(options.clips)
    finished = workdir / "best.json"
    if not finished.exists():
        run("fluxvit_jax.main", *common)
        best: dict[str, float] = {}
        for grids in FIXED_GRIDS if recipe in UNSELECTED else FLUX_GRIDS:
            settings = tuple((budget, *grid) for budget, grid in grids.items())
            run(
                "fluxvit_jax.main", *common, "--mode=evaluate", f"--config.eval.settings={settings}"
            )
            found = read_report(workdir)["budgets"]
            best |= {b: max(best.get(b, 0.0), 100 * own["top1"]) for b, own in found.items()}
        finished.write_text(json.dumps(best))
    return {int(b): value for b, value in json.loads(finished.read_text()).items()}


def report(results: dict[str, list[dict[int, float]]], out: Path) -> None:
    """Writes study.md: mean and range over the seeds."""
    lines = ["| | " + " | ".join(f"{b} tokens" for b in BUDGETS) + " | seeds |"]
    lines.append("|---" * (len(BUDGETS) + 2) + "|")
    for name, seeds in results.items():
        if seeds:
            cells = [mean_and_range([own[b] for own in seeds]) for b in BUDGETS]
            lines.append(f"| {name} | {' | '.join(cells)} | {len(seeds)} |")
    out.mkdir(parents=True, exist_ok=True)
    (out / "study.md").write_text("\n".join(lines) + "\n")


def mean_and_range(values: list[float]) -> str:
    return f"{statistics.mean(values):.1f} ({min(values):.1f}-{max(values):.1f})"


if __name__ == "__main__":
    sys.exit(main())
