"""Adaptive budgets on the demo's clips, over several seeds: docs/adaptive.md.

    python -m benchmarks.adaptive_study --out=demo/adaptive [--clips=demo/clips] [--seeds=3]

For each seed, Flux-Multi of the demo is trained and searched, one view a video: 480 clips of the
training photographs choose, the validation clips report. Compared at the cost of the best single
cell (TO) with 128, 64 and 32 tokens, in GFLOPs and in measured milliseconds: the best plain grid,
the best single cell, the best cascade and the best rule of motion whose mean cost is no higher.
Nothing is chosen on what is reported. Intervals (95 %) are over clips, those of differences paired
and drawn together for all seeds. Finished runs and searches are kept. About 15 minutes a seed on
two idle cores.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.demo import data_flags, run
from fluxvit_jax.adaptive import cascade as cascades
from fluxvit_jax.adaptive import motion
from fluxvit_jax.data.annotations import open_source
from fluxvit_jax.distributed import storage
from fluxvit_jax.reports.confidence_intervals import mean_interval
from fluxvit_jax.token_optimization.planner import read_report
from fluxvit_jax.token_optimization.probability_store import ProbabilityStore

BUDGETS = (128, 64, 32)
KINDS = {"gflops": "GFLOPs", "milliseconds": "ms"}
ROWS = {
    "plain": "Plain grid",
    "select": "TO: one cell",
    "cascade": "Cascade",
    "motion": "Rule of motion",
}
CHOOSING = 480  # clips


class Choice(NamedTuple):
    """What was chosen within a cost: its name, cost, and which reported clips are right."""

    name: str
    cost: float
    right: np.ndarray


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.adaptive_study", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--out", type=Path, default=Path("demo/adaptive"), help="folder of the runs"
    )
    parser.add_argument("--clips", type=Path, default=Path("demo/clips"), help="the demo's clips")
    parser.add_argument("--seeds", type=int, default=3, help="trainings (default: 3)")
    options = parser.parse_args()
    run("fluxvit_jax.data.synthetic", f"--out={options.clips}")
    choosing = options.out / "choose"
    amounts = (f"--train={CHOOSING}", "--validation=12")
    run("fluxvit_jax.data.synthetic", f"--out={choosing}", "--seed=7", *amounts)
    found = []
    for seed in range(options.seeds):
        found.append(study(searched(options, choosing, seed), options.clips))
        write(found, options.out)
    draw(read_report(options.out / "seed-0"), options.out / "adaptive.png")
    print((options.out / "study.md").read_text())
    return 0


def searched(options: argparse.Namespace, choosing: Path, seed: int) -> Path:
    """The workdir of a seed, trained and searched."""
    workdir = options.out / f"seed-{seed}"
    common = [f"--config=configs/demo.py:multi,seed={seed}", f"--workdir={workdir}"]
    common += data_flags(options.clips)
    run("fluxvit_jax.main", *common)
    views = ("--config.eval.clips=1", "--config.eval.crops=1")
    split = f"--config.search.split={choosing / 'train'}"
    run("fluxvit_jax.main", *common, "--mode=search", split, *views)
    return workdir


def study(workdir: Path, clips: Path) -> dict[str, dict[int, dict[str, Choice]]]:
    """kind of cost -> budget -> row -> what was chosen for as much as TO's cell costs."""
    report = read_report(workdir)
    source = open_source(str(clips / "validation.csv"), str(clips))
    labels = np.array([source[number].label for number in range(len(source))])
    store = ProbabilityStore(storage.path_of(str(workdir)) / "search")

    def said(cell: str) -> np.ndarray:
        return store.read("report", cell, len(labels))[:, -1]

    scores = said("motion")[:, 0]
    found: dict[str, dict[int, dict[str, Choice]]] = {}
    for kind in KINDS:
        costs = cell_costs(report, kind)
        ways = {
            "plain": single_cells(report, costs, said, labels, "plain"),
            "select": single_cells(report, costs, said, labels, "select"),
            "cascade": of_cascades(report, costs, said, labels, kind),
            "motion": of_rules(report, costs, said, labels, scores, kind),
        }
        found[kind] = {
            budget: {
                row: best(way, costs[report["chosen"][str(budget)]["select"]])
                for row, way in ways.items()
            }
            for budget in BUDGETS
        }
    return found


# name -> (cost, top-1 on the choosing split, which reported clips are right)
Ways = dict[str, tuple[float, float, Callable[[], np.ndarray]]]


def best(ways: Ways, limit: float) -> Choice:
    """The most accurate on the choosing split that costs no more; ties to the cheaper."""
    fitting = {name: own for name, own in ways.items() if own[0] <= limit * (1 + 1e-9)}
    name = min(fitting, key=lambda name: (-fitting[name][1], fitting[name][0]))
    return Choice(name, fitting[name][0], fitting[name][2]())


def cell_costs(report: Mapping[str, Any], kind: str) -> dict[str, float]:
    """GFLOPs, or milliseconds on the device that the search timed, of each cell."""
    if kind == "gflops":
        return {name: cell["gflops"] for name, cell in report["cells"].items()}
    (table,) = report["devices"].values()
    return {name: own["milliseconds"] for name, own in table["cells"].items()}


def single_cells(
    report: Mapping[str, Any],
    costs: Mapping[str, float],
    said: Callable[[str], np.ndarray],
    labels: np.ndarray,
    method: str,
) -> Ways:
    """Cells that were evaluated on both splits."""
    return {
        name: (costs[name], cell["choose"]["top1"], lambda n=name: said(n).argmax(axis=1) == labels)
        for name, cell in report["cells"].items()
        if cell["method"] == method and "report" in cell and name in costs
    }


def of_cascades(
    report: Mapping[str, Any],
    costs: Mapping[str, float],
    said: Callable[[str], np.ndarray],
    labels: np.ndarray,
    kind: str,
) -> Ways:
    ways: Ways = {}
    for name, own in report["cascades"].items():
        cascade, reached = cascades.from_json(own, name), own["choose"]["reached"]
        times = [costs[step.cell] for step in cascade.steps]
        cost = (
            own["choose"]["average_gflops"] if kind == "gflops" else float(np.dot(reached, times))
        )

        def right(cascade: cascades.Cascade = cascade) -> np.ndarray:
            tables = [said(step.cell) for step in cascade.steps]
            answers = cascade.run(len(labels), lambda number, clips: tables[number][clips])
            return answers.probabilities.argmax(axis=1) == labels

        ways[name] = cost, own["choose"]["top1"], right
    return ways


def of_rules(
    report: Mapping[str, Any],
    costs: Mapping[str, float],
    said: Callable[[str], np.ndarray],
    labels: np.ndarray,
    scores: np.ndarray,
    kind: str,
) -> Ways:
    """Times are those of the cells alone, in favor of the rule."""
    ways: Ways = {}
    for name, own in report["motion"].items():
        rule, shares = motion.from_json(own), own["choose"]["shares"]
        times = [costs[step.cell] for step in rule.steps]
        cost = own["choose"]["average_gflops"] if kind == "gflops" else float(np.dot(shares, times))

        def right(rule: motion.MotionRule = rule) -> np.ndarray:
            routed = rule.route(scores)
            tables = np.stack([said(step.cell).argmax(axis=1) == labels for step in rule.steps])
            return tables[routed, np.arange(len(labels))]

        ways[name] = cost, own["choose"]["top1"], right
    # A single cell is a rule too.
    return ways | single_cells(report, costs, said, labels, "select")


def write(found: list[dict[str, dict[int, dict[str, Choice]]]], out: Path) -> None:
    """Writes study.md and study.json: means over the seeds, differences from TO's single cell."""
    lines, numbers = [], []
    for kind, unit in KINDS.items():
        lines += [f"| At the {unit} of TO with | " + " | ".join(ROWS.values()) + " | seeds |"]
        lines += ["|---" * (len(ROWS) + 2) + "|"]
        for budget in BUDGETS:
            cells = []
            for row in ROWS:
                choices = [seed[kind][budget][row] for seed in found]
                bases = [seed[kind][budget]["select"] for seed in found]
                cells.append(cell_text(choices, bases, unit, row))
                numbers.append(
                    {
                        "cost": kind,
                        "budget": budget,
                        "row": row,
                        "names": [own.name for own in choices],
                        "costs": [own.cost for own in choices],
                        "top1": [float(own.right.mean()) for own in choices],
                    }
                )
            lines.append(f"| {budget} tokens | {' | '.join(cells)} | {len(found)} |")
        lines.append("")
    out.mkdir(parents=True, exist_ok=True)
    (out / "study.md").write_text("\n".join(lines))
    (out / "study.json").write_text(json.dumps(numbers, indent=1) + "\n")


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Top-1 of the reporting split against mean milliseconds of a clip, of one seed."""
    costs = cell_costs(report, "milliseconds")
    figure, axes = plt.subplots(figsize=(6.4, 4.2), dpi=150)
    for method, marker, color in (("plain", "s", "#c9540a"), ("select", "o", "#3569d4")):
        cells = [
            (costs[name], 100 * cell["report"]["top1"])
            for name, cell in report["cells"].items()
            if cell["method"] == method and "report" in cell and name in costs
        ]
        axes.plot(*zip(*sorted(cells), strict=True), marker, color=color, label=ROWS[method])
    ways = {}
    for name, own in report["cascades"].items():
        times = [costs[step["cell"]] for step in own["steps"]]
        ways[name] = float(np.dot(own["choose"]["reached"], times)), own["choose"]["top1"]
    front, line, most = sorted(ways, key=lambda name: ways[name]), [], -1.0
    for name in front:  # those that a plan may take, by the choosing split
        if ways[name][1] > most:
            most = ways[name][1]
            line.append((ways[name][0], 100 * report["cascades"][name]["report"]["top1"]))
    axes.plot(*zip(*line, strict=True), ".--", color="#0b8a68", label="Cascades")
    axes.set_xscale("log")
    axes.set_xticks([1, 1.5, 2, 3], ["1", "1.5", "2", "3"])
    axes.minorticks_off()
    axes.set_xlabel("milliseconds of a clip, mean, log scale")
    axes.set_ylabel("top-1 of unseen photographs, %")
    axes.grid(axis="y", color="#e3e6ea")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path)


def cell_text(choices: list[Choice], bases: list[Choice], unit: str, row: str) -> str:
    """Such as "93.1 % at 0.38 ms; +1.2 (0.1 to 2.4)"."""
    accuracy = 100 * statistics.mean(own.right.mean() for own in choices)
    text = f"{accuracy:.1f} % at {statistics.mean(own.cost for own in choices):.3g} {unit}"
    if row == "select":
        return text
    pairs = zip(choices, bases, strict=True)
    gains = [own.right.astype(float) - base.right for own, base in pairs]
    clips = np.concatenate([np.arange(len(one)) for one in gains])  # of all seeds together
    low, high = mean_interval(np.concatenate(gains), clips)
    mean = float(np.mean(np.concatenate(gains)))
    return f"{text}; {100 * mean:+.1f} ({100 * low:.1f} to {100 * high:.1f})"


if __name__ == "__main__":
    sys.exit(main())
