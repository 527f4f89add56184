"""Flux-CLIP on the demo's clips or your own: retrieval by words, several seeds.

    python -m benchmarks.clip_study --out=demo/clip_study [--clips=demo/clips] [--seeds=3]
    python -m benchmarks.clip_study --out=runs/clip_study --train=train.json --validation=val.json \
        --root=VIDEOS --networks=runs/study

For each seed, two networks of one size are trained on the demo's classes: Flux-Multi, and one the
ordinary way (a fixed grid, every token); --networks takes those of a benchmarks.method_study. From
each of them Flux-CLIP learns from captions (configs/demo_clip.py), with a text encoder from
scratch. Retrieval is measured at three budgets: on a plain grid of just as many tokens, and, of
Flux-Multi, on the demo's grids with selection ("+TO"). Finished runs are kept, so the study can be
stopped and started again. About half an hour a seed on two idle cores, estimated.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import study
from benchmarks.demo import run
from fluxvit_jax.recipes import demo, demo_clip

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
    parser = study.parser_of("clip_study", __doc__, "demo/clip_study", "of captions, JSON or CSV")
    parser.add_argument("--networks", type=Path, help="--out of a benchmarks.method_study")
    options = parser.parse_args()
    if options.train and not options.networks:
        sys.exit("clips of your own need --networks: captions tell no classes to train on")
    clips = study.clips_of(options, captioned=True)
    results: dict[str, list[dict[str, Any]]] = {row.name: [] for row in ROWS}
    for seed in range(options.seeds):
        for row in ROWS:
            results[row.name].append(measured(row, seed, clips, options))
            report(results, options.out)
    print((options.out / "study.md").read_text())
    return 0


def trained_network(
    method: str, seed: int, clips: study.Clips, options: argparse.Namespace
) -> Path:
    """The workdir of a classifier: one of `options.networks`, or trained here."""
    workdir = (options.networks or options.out) / f"{method}-seed-{seed}"
    if not options.networks:
        study.train(workdir, f"configs/demo.py:{method},seed={seed}", *clips.flags())
    elif not (workdir / "finished").exists():
        sys.exit(f"{workdir}: no finished run; start benchmarks.method_study again")
    return workdir


def captions(clips: study.Clips) -> tuple[Path, Path]:
    """The lists of captions to train on and to report on."""
    if clips.own:
        return clips.train, clips.validation
    return clips.root / "train_captions.json", clips.root / "validation_captions.json"


def measured(
    row: Row, seed: int, clips: study.Clips, options: argparse.Namespace
) -> dict[str, Any]:
    """The report of retrieval of a row with a seed, trained unless that is done."""
    network = trained_network(row.method, seed, clips, options)
    training, validation = captions(clips)
    pairs = f"--config.data.validation={validation}"
    clip = options.out / f"clip-{row.method}-{seed}"
    study.train(
        clip,
        f"configs/demo_clip.py:{row.method},seed={seed}",
        f"--config.data.train={training}",
        f"--config.data.root={clips.root}",
        f"--config.train.init_from={network}",
        *clips.schedule(demo_clip.get_config(row.method)),
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
                    study.mean_and_range(
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
