"""Flux-CLIP on the demo's clips: retrieval on unseen photographs, several seeds.

    python -m benchmarks.clip_study --out=demo/clip_study [--clips=demo/clips] [--seeds=3]

For each seed, two networks of one size are trained on the demo's classes: Flux-Multi, and one the
ordinary way (a fixed grid, every token). From each of them Flux-CLIP learns from captions
(configs/demo_clip.py), with a text encoder from scratch. Retrieval is measured at three budgets: on
a plain grid of just as many tokens, and, of Flux-Multi, on the demo's grids with selection ("+TO").
Finished runs are kept, so the study can be stopped and started again. About half an hour a seed on
two idle cores, estimated.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.demo import data_flags, run
from benchmarks.demo_study import mean_and_range
from benchmarks.pretrain_study import train
from fluxvit_jax.recipes import demo

MEASURES = {"text_to_video": "Text to video", "video_to_text": "Video to text"}


class Row(NamedTuple):
    """method: of configs/demo.py and configs/demo_clip.py; settings: it is evaluated on."""

    name: str
    method: str
    settings: tuple[tuple[int, int, int], ...]


ROWS = (
    Row("From a fixed grid, plain grids", "fixed", demo.FIXED_SETTINGS),
    Row("From Flux-Multi, plain grids", "multi", demo.FIXED_SETTINGS),
    Row("From Flux-Multi, + TO", "multi", demo.FLUX_SETTINGS),
)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.clip_study", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--out", type=Path, default=Path("demo/clip_study"), help="of the runs")
    parser.add_argument("--clips", type=Path, default=Path("demo/clips"), help="the demo's clips")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each row (default: 3)")
    options = parser.parse_args()
    run("fluxvit_jax.data.synthetic", f"--out={options.clips}")
    results: dict[str, list[dict[str, Any]]] = {row.name: [] for row in ROWS}
    for seed in range(options.seeds):
        for row in ROWS:
            results[row.name].append(measured(row, seed, options))
            report(results, options.out)
    print((options.out / "study.md").read_text())
    return 0


def measured(row: Row, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """The report of retrieval of a row with a seed, trained unless that is done."""
    classes, clip = (options.out / f"{kind}-{row.method}-{seed}" for kind in ("classes", "clip"))
    train(classes, f"configs/demo.py:{row.method},seed={seed}", *data_flags(options.clips))
    pairs = f"--config.data.validation={options.clips / 'validation_captions.json'}"
    train(
        clip,
        f"configs/demo_clip.py:{row.method},seed={seed}",
        f"--config.data.train={options.clips / 'train_captions.json'}",
        f"--config.data.root={options.clips}",
        f"--config.train.init_from={classes}",
        pairs,
    )
    # A plain grid is of its budget, so that every token is kept.
    settings = f"--config.eval.settings={row.settings!r}".replace(" ", "")
    run("fluxvit_jax.main", "--mode=evaluate", f"--workdir={clip}", settings, pairs)
    wanted = [list(setting) for setting in row.settings]
    for path in (clip / "evaluation").glob("*-retrieval-*.json"):
        found = json.loads(path.read_text())
        if settings_of(found) == wanted:
            return found
    raise SystemExit(f"{clip}: no report of {wanted}")


def settings_of(report: dict[str, Any]) -> list[list[int]]:
    """Budget, frames and pixels of each row of a report."""
    budgets = report["budgets"].items()
    return [[int(budget), own["frames"], own["resolution"]] for budget, own in budgets]


def report(results: dict[str, list[dict[str, Any]]], out: Path) -> None:
    """Writes study.md: R@1 (%), plain and dual softmax, mean and range over the seeds."""
    budgets = [str(budget) for budget in demo.BUDGETS]
    heads = [f"{budget} tokens" for budget in budgets]
    lines = [
        f"| R@1 (%) | Scores | {' | '.join(heads)} | seeds |",
        "|---" * (len(heads) + 3) + "|",
    ]
    for direction, words in MEASURES.items():
        for kind, score in (("plain", "plain"), ("dual_softmax", "dual softmax")):
            for name, reports in results.items():
                if not reports:
                    continue
                cells = [
                    mean_and_range(
                        [100 * own["budgets"][b][kind][direction]["recall"]["1"] for own in reports]
                    )
                    for b in budgets
                ]
                cell = f"{words}. {name}"
                lines.append(f"| {cell} | {score} | {' | '.join(cells)} | {len(reports)} |")
    out.mkdir(parents=True, exist_ok=True)
    (out / "study.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
