"""What the studies share: their clips, runs that are trained once, and intervals over clips."""

import argparse
import csv
import dataclasses
import hashlib
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from benchmarks.demo import data_flags, run
from fluxvit_jax.config.fields import FIELDS, flatten
from fluxvit_jax.data.annotations import open_source
from fluxvit_jax.data.caption_lists import open_captions
from fluxvit_jax.data.class_names import KnownNames
from fluxvit_jax.errors import UserError
from fluxvit_jax.evaluation import results
from fluxvit_jax.recipes import demo
from fluxvit_jax.reports.confidence_intervals import Interval, mean_interval

DEMO_CLIPS = 2400  # that `data.synthetic` writes to train on

PATHS = ("data.train", "data.validation", "data.root", "data.class_names")  # of a machine

Setting = tuple[int, int, int]  # budget, frames, pixels
Right = dict[int, np.ndarray]  # budget -> whether each validation clip is classified correctly


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clips:
    """The lists of clips of a study.

    classes: file with their names; None for those that are labels of the lists. captioned: whether
    the lists are of captions. own: whether these are other clips than the demo's, for which recipes
    are made.
    """

    train: Path
    validation: Path
    root: Path
    classes: Path | None
    captioned: bool = False
    own: bool

    def flags(self) -> list[str]:
        """Flags of the data, for configs/demo.py and others for its clips."""
        if not self.own:
            return data_flags(self.root)
        return [
            f"--config.data.train={self.train}",
            f"--config.data.validation={self.validation}",
            f"--config.data.root={self.root}",
            f"--config.data.class_names={self.classes or ''}",
            "--config.model.classes=0",
        ]

    def schedule(self, config: ConfigDict) -> list[str]:
        """Flags for as many steps as a recipe takes of the demo's clips, evaluated at the end."""
        if not self.own:
            return []
        open_list = open_captions if self.captioned else open_source
        longer = DEMO_CLIPS / len(open_list(self.train, self.root))
        epochs = max(1, round(config.train.epochs * longer))
        return [
            f"--config.train.epochs={epochs}",
            f"--config.train.warmup_epochs={config.train.warmup_epochs * longer:.3g}",
            f"--config.eval.every_epochs={epochs}",
        ]

    def validation_labels(self) -> np.ndarray:
        """int [clips], numbered as in training."""
        names = open_source(self.train, self.root).class_names
        known = KnownNames(names, f"{self.train}") if names else None
        return np.array(open_source(self.validation, self.root, known=known).labels)

    def paths_by_label(self) -> dict[str, list[str]]:
        """The training clips of each class, by its name or number as lists have it."""
        source = open_source(self.train, self.root)
        names, paths = source.class_names, {}
        for label in sorted(set(source.labels)):
            own = [example.id for example in source.examples if example.label == label]
            paths[names[label] if names else str(label)] = own
        return paths


class Results:
    """What runs found of each validation clip: a file with a line of JSON for each run.

    A run that the file holds, of the same clips and config, need not be trained again. So a study
    can go on elsewhere, by several processes too, and be published without its clips.
    """

    def __init__(self, path: Path | None, clips: Clips):
        """path: of the file, which may be new; None: nothing is kept."""
        self._path, self._clips = path, _fingerprint(clips)
        self._lines = path.read_text().splitlines() if path and path.exists() else []

    def find(self, run: str, config: ConfigDict) -> Right | None:
        """What a run found; None if the file does not know."""
        wanted = self._key(run, config)
        for line in map(json.loads, self._lines):
            if all(line[name] == value for name, value in wanted.items()):
                right = line["right"].items()
                return {int(budget): np.array([*own]) == "1" for budget, own in right}
        return None

    def add(self, run: str, config: ConfigDict, right: Right) -> None:
        """Appends a line."""
        if self._path is None:
            return
        found = {
            str(budget): "".join("01"[int(one)] for one in own) for budget, own in right.items()
        }
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a") as file:
            file.write(json.dumps(self._key(run, config) | {"right": found}) + "\n")

    def _key(self, run: str, config: ConfigDict) -> dict[str, Any]:
        """What tells a run: its name, the clips, and what its config sets of the data, network,
        training and evaluation.
        """
        fields = {
            name: value
            for name, value in flatten(json.loads(config.to_json_best_effort())).items()
            if name.split(".")[0] in ("data", "eval", "model", "optim", "train")
            and name not in PATHS
            and value != json.loads(json.dumps(FIELDS[name].default))
        }
        return {"run": run, "clips": self._clips, "config": fields}


def _fingerprint(clips: Clips) -> str:
    """A checksum of the names and labels of clips, of the lists to train and to report on."""
    lists = [open_source(path, clips.root) for path in (clips.train, clips.validation)]
    content = [
        [source.ids, [source.class_names[n] if source.class_names else n for n in source.labels]]
        for source in lists
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def write_list(path: Path, clips: Sequence[tuple[str, str]]) -> None:
    """Writes a list of (path, label)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("path", "label"), *clips])


def parser_of(name: str, doc: str, out: str, lists: str) -> argparse.ArgumentParser:
    """A parser of a study's command line. doc: its module's; lists: what its lists hold."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}", description=doc.splitlines()[0]
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path(out), help="folder of the runs (default: %(default)s)")
    add("--seeds", type=int, default=3, help="runs of each row (default: %(default)s)")
    add("--clips", type=Path, default=Path("demo/clips"), help="the demo's clips (%(default)s)")
    own = parser.add_argument_group("clips of your own, in place of the demo's")
    own.add_argument("--train", type=Path, metavar="LIST", help=lists)
    own.add_argument("--validation", type=Path, metavar="LIST", help="other ones, to report on")
    own.add_argument("--root", type=Path, metavar="DIR", help="what the paths are relative to")
    own.add_argument("--classes", type=Path, metavar="FILE", help="names, in the labels' order")
    return parser


def clips_of(options: argparse.Namespace, captioned: bool = False) -> Clips:
    """The clips that a command line names; those of the demo are made."""
    if not (options.train or options.validation):
        run("fluxvit_jax.data.synthetic", f"--out={options.clips}")
        clips = options.clips
        return Clips(
            train=clips / "train.csv",
            validation=clips / "validation.csv",
            root=clips,
            classes=clips / "classes.txt",
            own=False,
        )
    if not (options.train and options.validation):
        sys.exit("--train and --validation belong together")
    clips = Clips(
        train=options.train,
        validation=options.validation,
        root=options.root or options.train.parent,
        classes=options.classes,
        captioned=captioned,
        own=True,
    )
    try:
        clips.schedule(demo.get_config())
        if not captioned:
            clips.validation_labels()
    except UserError as error:
        sys.exit(f"error: {error}")
    return clips


def train(workdir: Path, recipe: str, *arguments: str) -> None:
    """Trains unless that is done; a run that was cut off goes on."""
    if not (workdir / "finished").exists():
        run("fluxvit_jax.main", f"--config={recipe}", f"--workdir={workdir}", *arguments)
        (workdir / "finished").touch()


def right_clips(workdir: Path, settings: Sequence[Setting]) -> Right:
    """Which validation clips a run classifies correctly at each budget, asked only once."""
    path = workdir / "right.npz"
    wanted = np.array(settings)
    if path.exists():
        with np.load(path) as kept:
            if np.array_equal(kept["settings"], wanted):
                return {budget: kept[str(budget)] for budget, *_ in settings}
    flag = f"--config.eval.settings={tuple(settings)!r}".replace(" ", "")
    run("fluxvit_jax.main", "--mode=evaluate", f"--workdir={workdir}", flag)
    newest = max(
        (workdir / "evaluation").glob(f"*{results.SUFFIX}"), key=lambda p: p.stat().st_mtime_ns
    )
    found = results.read(newest)
    right = {budget: found.right(str(budget)) for budget, *_ in settings}
    np.savez(path, settings=wanted, **{str(budget): own for budget, own in right.items()})
    return right


def mean_over(seeds: Sequence[np.ndarray]) -> tuple[float, Interval]:
    """The mean of values [clips] of several seeds in percent, and its interval over clips."""
    values = np.concatenate(seeds).astype(float) * 100
    clips = np.concatenate([np.arange(len(own)) for own in seeds])
    return float(values.mean()), mean_interval(values, clips)


def mean_text(seeds: Sequence[np.ndarray]) -> str:
    """Such as "72.4 (66.1-78.2)": percent."""
    mean, (low, high) = mean_over(seeds)
    return f"{mean:.1f} ({low:.1f}-{high:.1f})"


def difference_text(better: Sequence[np.ndarray], worse: Sequence[np.ndarray]) -> str:
    """Such as "yes: +3.1 (0.2 to 6.0)": whether a row is better, and by how many points.

    Compared clip by clip and seed by seed; "open" where the interval holds 0.
    """
    pairs = zip(better, worse, strict=True)
    mean, (low, high) = mean_over([a.astype(float) - b for a, b in pairs])
    answer = "yes" if low > 0 else "no" if high < 0 else "open"
    return f"{answer}: {mean:+.1f} ({low:.1f} to {high:.1f})"


def mean_and_range(values: Sequence[float]) -> str:
    """Such as "72.4 (70.1-74.0)": over seeds, of what has no value a clip."""
    return f"{statistics.mean(values):.1f} ({min(values):.1f}-{max(values):.1f})"


def write_table(path: Path, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Writes a table of Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"| {' | '.join(line)} |\n" for line in lines))
