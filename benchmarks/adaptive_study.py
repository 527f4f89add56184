"""Token Optimization, merging and adaptive budgets over several seeds: docs/adaptive.md.

    python -m benchmarks.adaptive_study --out=demo/adaptive [--clips=demo/clips] [--seeds=3]
    python -m benchmarks.adaptive_study --out=runs/adaptive --train=train.csv \
        --validation=val.csv --root=VIDEOS --classes=classes.txt

For each seed, Flux-Multi of the demo is trained and searched, one view a video. Of the demo, 480
other clips of the training photographs choose; of clips of your own, a fifth of the training clips,
which is left out of training. The validation clips report. Compared at the cost of the best single
cell (TO) with 128, 64 and 32 tokens, in tokens (of merging those that are left), GFLOPs and
measured milliseconds: the best plain grid, the best merging of tokens, the best single cell, the
best cascade and the best rule of motion whose mean cost is no higher, all passes of a cascade
counted. Nothing is chosen on what is reported. Intervals (95 %) are over clips, those of
differences paired and drawn together for all seeds. Finished runs and searches are kept. About 15
minutes a seed on two idle cores.
"""

import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks import study
from benchmarks.demo import run
from fluxvit_jax.adaptive import cascade as cascades
from fluxvit_jax.adaptive import motion
from fluxvit_jax.distributed import checksums, storage
from fluxvit_jax.recipes import demo
from fluxvit_jax.token_optimization.planner import read_report
from fluxvit_jax.token_optimization.probability_store import ProbabilityStore
from fluxvit_jax.token_optimization.results_log import FILE as RESULTS
from fluxvit_jax.token_optimization.results_log import REPORT, TOP1

BUDGETS = (128, 64, 32)
KINDS = {"tokens": "tokens", "gflops": "GFLOPs", "milliseconds": "ms"}
ROWS = {
    "plain": "Plain grid",
    "merge": "Merging",
    "select": "TO: one cell",
    "cascade": "Cascade",
    "motion": "Rule of motion",
}
CHOOSING = 480  # clips of the demo
HELD_OUT = 0.2  # of one's own training clips


class Choice(NamedTuple):
    """What was chosen within a cost: its name, cost, and which reported clips are right."""

    name: str
    cost: float
    right: np.ndarray


Found = dict[str, dict[int, dict[str, Choice | None]]]  # cost -> budget -> row -> what was chosen


def main() -> int:
    parser = study.parser_of("adaptive_study", __doc__, "demo/adaptive", "of path,label")
    options = parser.parse_args()
    clips = study.clips_of(options)
    labels = clips.validation_labels()
    found = []
    for seed in range(options.seeds):
        found.append(measured(searched(options.out, clips, seed), labels))
        write(found, options.out)
    draw(read_report(options.out / "seed-0"), options.out / "adaptive.png")
    print((options.out / "study.md").read_text())
    return 0


def searched(out: Path, clips: study.Clips, seed: int) -> Path:
    """The workdir of a seed, trained and searched."""
    workdir, recipe = out / f"seed-{seed}", f"configs/demo.py:multi,seed={seed}"
    flags = clips.flags() + clips.schedule(demo.get_config())
    search = ["--config.eval.clips=1", "--config.eval.crops=1", "--config.search.merging=true"]
    if clips.own:
        flags.append(f"--config.data.holdout_fraction={HELD_OUT}")
    else:
        amounts = (f"--train={CHOOSING}", "--validation=12")
        run("fluxvit_jax.data.synthetic", f"--out={out / 'choose'}", "--seed=7", *amounts)
        search.append(f"--config.search.split={out / 'choose' / 'train'}")
    study.train(workdir, recipe, *flags)
    run(
        "fluxvit_jax.main",
        f"--config={recipe}",
        f"--workdir={workdir}",
        "--mode=search",
        *flags,
        *search,
    )
    return workdir


def measured(workdir: Path, labels: np.ndarray) -> Found:
    """kind of cost -> budget -> row -> what was chosen for as much as TO's cell costs."""
    report, right = read_report(workdir), right_of_cells(workdir)
    store = ProbabilityStore(storage.path_of(str(workdir)) / "search")

    def said(cell: str) -> np.ndarray:
        return store.read(REPORT, cell, len(labels))[:, -1]

    scores = said("motion")[:, 0]
    found: Found = {}
    for kind in KINDS:
        costs = cell_costs(report, kind)
        ways = {
            row: single_cells(report, costs, right, row) for row in ("plain", "merge", "select")
        }
        ways["cascade"] = of_cascades(report, costs, said, labels, kind)
        ways["motion"] = of_rules(report, costs, said, labels, scores, kind) | ways["select"]
        found[kind] = {
            budget: {
                row: best(ways[row], costs[report["chosen"][str(budget)]["select"]]) for row in ROWS
            }
            for budget in BUDGETS
        }
    return found


def right_of_cells(workdir: Path) -> dict[str, np.ndarray]:
    """Which reported clips each cell classifies correctly, bool [clips]."""
    outcomes: dict[str, dict[int, str]] = defaultdict(dict)
    for line in checksums.read_lines(storage.path_of(str(workdir / "search" / RESULTS))):
        if line.get("split") == REPORT and "found" in line:
            outcomes[line["cell"]][line["first"]] = line["found"]
    return {
        cell: np.array(list("".join(text for _, text in sorted(chunks.items())))) == TOP1
        for cell, chunks in outcomes.items()
    }


# name -> (cost, credited top-1 on the choosing split, which reported clips are right)
Ways = dict[str, tuple[float, float, Callable[[], np.ndarray]]]


def best(ways: Ways, limit: float) -> Choice | None:
    """The most accurate on the choosing split that costs no more; ties to the cheaper."""
    fitting = {name: own for name, own in ways.items() if own[0] <= limit * (1 + 1e-9)}
    if not fitting:
        return None
    name = min(fitting, key=lambda name: (-fitting[name][1], fitting[name][0]))
    return Choice(name, fitting[name][0], fitting[name][2]())


def cell_costs(report: Mapping[str, Any], kind: str) -> dict[str, float]:
    """Tokens, GFLOPs, or milliseconds on the device that the search timed, of each cell."""
    if kind != "milliseconds":
        return {name: cell[kind] for name, cell in report["cells"].items()}
    (table,) = report["devices"].values()
    return {name: own["milliseconds"] for name, own in table["cells"].items()}


def single_cells(
    report: Mapping[str, Any],
    costs: Mapping[str, float],
    right: Mapping[str, np.ndarray],
    method: str,
) -> Ways:
    """Cells that were evaluated on both splits."""
    return {
        name: (costs[name], cell["choose"]["top1"], lambda n=name: right[n])
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
        cascade = cascades.from_json(own, name)

        def right(cascade: cascades.Cascade = cascade) -> np.ndarray:
            tables = [said(step.cell) for step in cascade.steps]
            answers = cascade.run(len(labels), lambda number, clips: tables[number][clips])
            return answers.probabilities.argmax(axis=1) == labels

        ways[name] = mean_cost(own, "reached", costs, kind), own["choose"]["credited"], right
    return ways


def of_rules(
    report: Mapping[str, Any],
    costs: Mapping[str, float],
    said: Callable[[str], np.ndarray],
    labels: np.ndarray,
    scores: np.ndarray,
    kind: str,
) -> Ways:
    """Rules, besides single cells. Times are those of the cells alone, in favor of the rule."""
    ways: Ways = {}
    for name, own in report["motion"].items():
        rule = motion.from_json(own)

        def right(rule: motion.MotionRule = rule) -> np.ndarray:
            routed = rule.route(scores)
            tables = np.stack([said(step.cell).argmax(axis=1) == labels for step in rule.steps])
            return tables[routed, np.arange(len(labels))]

        ways[name] = mean_cost(own, "shares", costs, kind), own["choose"]["credited"], right
    return ways


def mean_cost(own: Mapping[str, Any], shares: str, costs: Mapping[str, float], kind: str) -> float:
    """Of a cascade or rule in a report; shares: of the videos that each of its cells is asked."""
    if kind == "gflops":  # what steps share is taken off
        return own["choose"]["average_gflops"]
    return float(np.dot(own["choose"][shares], [costs[step["cell"]] for step in own["steps"]]))


def write(found: list[Found], out: Path) -> None:
    """Writes study.md and study.json: means over the seeds, differences from TO's single cell."""
    lines, numbers = [], []
    for kind, unit in KINDS.items():
        lines += [f"| At the {unit} of TO with | " + " | ".join(ROWS.values()) + " | seeds |"]
        lines += ["|---" * (len(ROWS) + 2) + "|"]
        for budget in BUDGETS:
            cells = []
            for row in ROWS:
                pairs = [(seed[kind][budget][row], seed[kind][budget]["select"]) for seed in found]
                if not all(choice for choice, _ in pairs):
                    cells.append("none so cheap")
                    continue
                choices, bases = zip(*pairs, strict=True)
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
        cost = mean_cost(own, "reached", costs, "milliseconds")
        ways[name] = cost, own["choose"]["credited"]
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


def cell_text(choices: Sequence[Choice], bases: Sequence[Choice], unit: str, row: str) -> str:
    """Such as "93.1 % at 0.38 ms; +1.2 (0.1 to 2.4)"."""
    accuracy = 100 * statistics.mean(own.right.mean() for own in choices)
    text = f"{accuracy:.1f} % at {statistics.mean(own.cost for own in choices):.3g} {unit}"
    if row == "select":
        return text
    pairs = zip(choices, bases, strict=True)
    mean, (low, high) = study.mean_over(
        [own.right.astype(float) - base.right for own, base in pairs]
    )
    return f"{text}; {mean:+.1f} ({low:.1f} to {high:.1f})"


if __name__ == "__main__":
    sys.exit(main())
