"""Which training a small set of videos deserves: the rows behind configs/custom.py:tiny.

    python -m benchmarks.recipe_study --out=runs/recipes --train=train.csv --validation=val.csv \
        --root=VIDEOS [--seeds=1]

Every row is configs/custom.py:tiny with its flags, trained on four fifths of the training clips of
each class and asked about the rest, at each of its budgets. A seed also changes what is left out.
The row with the highest mean over budgets and seeds, and the first row, are then trained on all
training clips and asked about the validation clips, which choose nothing. Written are choosing.md
and study.md, with 95 % intervals over clips. Finished runs are kept, so the study can be stopped
and started again.
"""

import dataclasses
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks import study
from fluxvit_jax.config.loading import load_config

LEFT_OUT = 5  # one of so many training clips of a class chooses
RECIPE = "configs/custom.py:tiny"


class Row(NamedTuple):
    """flags: of the config, in place of the recipe's."""

    name: str
    flags: tuple[str, ...]


SHORT = ("train.epochs=30", "train.warmup_epochs=2.0", "eval.every_epochs=30")
LONG = ("train.epochs=60", "train.warmup_epochs=4.0", "eval.every_epochs=60")
WEAK = ("data.augment.scale=(0.75,1.0)", "data.augment.ratio=(0.9,1.111)")  # the demo's crops
STRONG = ("data.augment.scale=(0.4,1.0)", "data.augment.ratio=(0.75,1.33)")
RANDAUGMENT = ("data.augment.randaugment=rand-m7-n2-mstd0.5-inc1",)
MIXING = ("train.mixup=0.8", "train.cutmix=1.0", "train.label_smoothing=0.1")
RANDOM, GIVEN = ("train.init_from=",), ("train.init_from=builtin://ti",)
ROWS = (
    Row("30 epochs", SHORT + WEAK + RANDOM),
    Row("60 epochs", LONG + WEAK + RANDOM),
    Row("60 epochs, strong crops", LONG + STRONG + RANDOM),
    Row("60 epochs, RandAugment", LONG + WEAK + RANDAUGMENT + RANDOM),
    Row("60 epochs, mixup and CutMix", LONG + WEAK + MIXING + RANDOM),
    Row("30 epochs, the demo's weights", SHORT + WEAK + GIVEN),
    Row("60 epochs, the demo's weights", LONG + WEAK + GIVEN),
    Row("60 epochs, strong crops, the demo's weights", LONG + STRONG + GIVEN),
    Row("60 epochs, RandAugment, the demo's weights", LONG + WEAK + RANDAUGMENT + GIVEN),
)

Found = dict[str, list[study.Right]]  # row -> of each seed


def main() -> int:
    parser = study.parser_of("recipe_study", __doc__, "runs/recipes", "of path,label")
    options = parser.parse_args()
    clips = study.clips_of(options)
    found: Found = defaultdict(list)
    for seed in range(options.seeds):
        part = split(clips, seed, options.out)
        for row in ROWS:
            found[row.name].append(measured(row, seed, part, options.out, "choosing"))
            write(found, options.out / "choosing.md")
    best = max(ROWS, key=lambda row: mean(found[row.name]))
    print(f"chosen: {best.name}", flush=True)
    reported: Found = defaultdict(list)
    for seed in range(options.seeds):
        for row in dict.fromkeys([ROWS[0], best]):
            reported[row.name].append(measured(row, seed, clips, options.out, "reporting"))
            write(reported, options.out / "study.md")
    for name in ("choosing.md", "study.md"):
        print((options.out / name).read_text())
    return 0


def split(clips: study.Clips, seed: int, out: Path) -> study.Clips:
    """The training clips as two lists: a fifth of each class, another one by seed, to choose on."""
    rng = np.random.default_rng(seed)
    parts: dict[str, list[tuple[str, str]]] = {"train": [], "choose": []}
    for label, own in clips.paths_by_label().items():
        order, count = rng.permutation(own).tolist(), max(1, len(own) // LEFT_OUT)
        parts["choose"] += [(path, label) for path in order[:count]]
        parts["train"] += [(path, label) for path in order[count:]]
    paths = {name: out / f"{name}-{seed}.csv" for name in parts}
    for name, rows in parts.items():
        study.write_list(paths[name], rows)
    return dataclasses.replace(clips, train=paths["train"], validation=paths["choose"], own=True)


def measured(row: Row, seed: int, clips: study.Clips, out: Path, part: str) -> study.Right:
    """Which clips to choose or report on a row classifies correctly after training."""
    flags = [f"--config.{flag}" for flag in row.flags]
    flags += [*clips.flags(), f"--config.seed={seed}"]
    folder = row.name.replace(", ", "-").replace(" ", "_").replace("'", "")
    workdir = out / f"{part}-{folder}-{seed}"
    study.train(workdir, RECIPE, *flags)
    return study.right_clips(workdir, load_config(RECIPE, flags).eval.settings)


def mean(seeds: Sequence[study.Right]) -> float:
    """Accuracy over all budgets and seeds."""
    return float(np.mean([own.mean() for right in seeds for own in right.values()]))


def write(found: Found, path: Path) -> None:
    """A row's accuracy at its budgets, from many tokens to few, and their mean."""
    lines = []
    for name, seeds in found.items():
        budgets = sorted(seeds[0], reverse=True)
        texts = [f"{n}: {study.mean_text([own[n] for own in seeds])}" for n in budgets]
        lines.append([name, *texts, f"{100 * mean(seeds):.1f}", str(len(seeds))])
    heads = ["%", *(f"budget {n}" for n in range(1, len(lines[0]) - 2)), "mean", "seeds"]
    study.write_table(path, heads, lines)


if __name__ == "__main__":
    sys.exit(main())
