"""Does pre-training help where few clips have labels: on the demo's clips or your own.

    python -m benchmarks.pretrain_study --out=demo/pretrain_study [--clips=demo/clips] [--seeds=3]
    python -m benchmarks.pretrain_study --out=runs/pretrain_study --train=train.csv \
        --validation=val.csv --root=VIDEOS --classes=classes.txt --labels=5,10 --teacher=demo/multi

The teacher is a run of configs/demo.py:multi, by default one that is trained here with all labels.
Students of the same size learn from it on all clips without labels (configs/demo_pretrain.py), on
flexible grids or on one, and are then fine-tuned with a few labels by the demo's recipe, as is a
network that starts from scratch. A seed changes which clips are labeled as well. Finished runs are
kept, so the study can be stopped and started again. About 15 minutes a seed and number of labels on
two idle cores, and 5 for the teacher.
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

from benchmarks import study
from fluxvit_jax.recipes import demo, demo_pretrain

LABELS = (20,)  # of each class; the demo's clips are ten times as many
SEEN = 14_400  # labeled clips in fine-tuning: 60 epochs of a tenth of the demo's
WARMUP = 1 / 20  # of fine-tuning


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
    parser = study.parser_of("pretrain_study", __doc__, "demo/pretrain_study", "of path,label")
    parser.add_argument(
        "--labels", type=numbers, default=LABELS, help="labeled clips of a class, such as 5,10"
    )
    parser.add_argument("--teacher", type=Path, help="a run of configs/demo.py, of any clips")
    options = parser.parse_args()
    clips = study.clips_of(options)
    if options.teacher is None:
        options.teacher = options.out / "teacher"
        schedule = clips.schedule(demo.get_config())
        study.train(options.teacher, "configs/demo.py:multi", *clips.flags(), *schedule)
    found: dict[tuple[int, str], list[study.Right]] = {}
    for seed in range(options.seeds):
        for labels in options.labels:
            for row in ROWS:
                right = measured(row, labels, seed, clips, options)
                found.setdefault((labels, row.name), []).append(right)
                write(found, options.out)
    print((options.out / "study.md").read_text())
    return 0


def numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def measured(
    row: Row, labels: int, seed: int, clips: study.Clips, options: argparse.Namespace
) -> study.Right:
    """Which validation clips a row classifies correctly, trained with a seed and few labels."""
    start = ""
    if row.grids:
        start = str(options.out / f"pretrained-{row.grids}-{seed}")
        study.train(
            Path(start),
            f"configs/demo_pretrain.py:{row.grids},seed={seed}",
            f"--config.data.train={clips.train}",
            f"--config.data.root={clips.root}",
            f"--config.distill.teacher={options.teacher}",
            *clips.schedule(demo_pretrain.get_config()),
        )
    workdir = options.out / f"{row.method}-{row.grids or 'scratch'}-{labels}-{seed}"
    path, labeled = write_labeled(clips, labels, seed, options.out)
    epochs = max(1, round(SEEN / labeled))
    study.train(
        workdir,
        f"configs/demo.py:{row.method},seed={seed}",
        *clips.flags(),
        f"--config.data.train={path}",
        f"--config.train.init_from={start}",
        f"--config.train.epochs={epochs}",
        f"--config.eval.every_epochs={epochs}",
        f"--config.train.warmup_epochs={WARMUP * epochs:.3g}",
    )
    return study.right_clips(workdir, demo.get_config(row.method).eval.settings)


def write_labeled(clips: study.Clips, labels: int, seed: int, out: Path) -> tuple[Path, int]:
    """A list of so many clips of each class, other ones for each seed; with how many they are."""
    chosen = []
    for label, own in clips.paths_by_label().items():
        step = max(1, len(own) // labels)
        chosen += [(path, label) for path in own[seed % step :: step][:labels]]
    path = out / f"labeled-{labels}-{seed}.csv"
    study.write_list(path, chosen)
    return path, len(chosen)


def write(found: dict[tuple[int, str], list[study.Right]], out: Path) -> None:
    """Writes study.md."""
    heads = ["%", "labels of a class", *(f"{budget} tokens" for budget in demo.BUDGETS), "seeds"]
    rows = []
    for (labels, name), seeds in sorted(found.items(), key=lambda item: item[0][0]):
        cells = [study.mean_text([own[budget] for own in seeds]) for budget in demo.BUDGETS]
        rows.append([name, str(labels), *cells, str(len(seeds))])
    study.write_table(out / "study.md", heads, rows)


if __name__ == "__main__":
    sys.exit(main())
