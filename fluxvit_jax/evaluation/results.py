"""Results of an evaluation, counted from its files: by budget, by class, and by pair of classes."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from etils import epath

from fluxvit_jax.data.class_names import numbered
from fluxvit_jax.distributed import storage
from fluxvit_jax.errors import UserError

SUFFIX = ".predictions.jsonl"
TOP = 5  # classes that a prediction names
UNREAD = -1  # in place of the class predicted for a video that could not be read


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """Results of an evaluation of n videos.

    report: the content of `NAME.json`, empty if that is missing; class_names: of all classes;
    ids: of the videos; labels: int [n]; tops: budget -> [[class, probability], ...] of each video,
    likeliest first, empty for a video that could not be read. The first budget is the main one, by
    which training ranks its checkpoints.
    """

    report: dict[str, Any]
    class_names: tuple[str, ...]
    ids: list[str]
    labels: np.ndarray
    tops: dict[str, list[list[tuple[int, float]]]]

    @property
    def main(self) -> str:
        """The main budget."""
        return next(iter(self.tops))

    def predicted(self, budget: str) -> np.ndarray:
        """The likeliest class of each video, or UNREAD: int [n]."""
        return np.array([top[0][0] if top else UNREAD for top in self.tops[budget]])

    def right(self, budget: str, first: int = 1) -> np.ndarray:
        """Whether the label is among the `first` likeliest classes of each video: bool [n]."""
        pairs = zip(self.labels.tolist(), self.tops[budget], strict=True)
        return np.array([label in [c for c, _ in top[:first]] for label, top in pairs])

    def videos_of_class(self) -> np.ndarray:
        """Number of videos of each class: int [C]."""
        return np.bincount(self.labels, minlength=len(self.class_names))

    def right_of_class(self, budget: str) -> np.ndarray:
        """Number of correctly classified videos of each class: int [C]."""
        right = self.labels[self.right(budget)]
        return np.bincount(right, minlength=len(self.class_names))

    def confusion(self, budget: str) -> np.ndarray:
        """Videos by class and predicted class: int [C, C + 1], the last column of unread ones."""
        C = len(self.class_names)
        matrix = np.zeros((C, C + 1), np.int64)
        np.add.at(matrix, (self.labels, self.predicted(budget)), 1)  # UNREAD is the last column
        return matrix


def confused_pairs(confusion: np.ndarray, most: int) -> list[tuple[int, int, int]]:
    """(class, class taken for it, videos) of the `most` frequent confusions, the largest first.

    confusion: int [C, C + 1]; of equal numbers of videos the larger share of its class comes first.
    """
    classes = len(confusion)
    wrong = confusion[:, :classes] * (1 - np.eye(classes, dtype=np.int64))
    own, taken = np.nonzero(wrong)
    share = wrong[own, taken] / confusion.sum(1)[own]
    order = np.lexsort((taken, own, -share, -wrong[own, taken]))[:most]
    return [(int(own[i]), int(taken[i]), int(wrong[own[i], taken[i]])) for i in order]


def confidently_wrong(results: Results, budget: str, most: int) -> list[int]:
    """Numbers of the wrongly classified videos, the most probable mistakes first."""
    tops = results.tops[budget]
    wrong = [i for i in np.flatnonzero(~results.right(budget)).tolist() if tops[i]]
    return sorted(wrong, key=lambda i: (-tops[i][0][1], i))[:most]


def read(predictions: storage.PathLike) -> Results:
    """The results in `NAME.predictions.jsonl`, and in `NAME.json` beside it if that is there.

    Raises UserError if the file cannot be read, or is none of predictions.
    """
    path = storage.path_of(predictions)
    report, lines = read_report(path), _lines(path)
    if any("labels" in line for line in lines):
        raise UserError(
            f"{path}: has several labels a video, whose measures are in the report that is missing "
            "beside it: evaluate again"
        )
    try:
        read = [line["predictions"] for line in lines if "predictions" in line]
        tops = {
            budget: [line.get("predictions", {}).get(budget, []) for line in lines]
            for budget in (read[0] if read else {})
        }
        labels = np.array([line["label"] for line in lines], np.int64)
        names = report.get("class_names") or _numbered(labels, read)
        ids = [line["id"] for line in lines]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: is no file of predictions: {error!r}") from error
    if not tops:
        raise UserError(f"{path}: has no prediction")
    return Results(report=report, class_names=tuple(names), ids=ids, labels=labels, tops=tops)


def read_report(predictions: epath.Path) -> dict[str, Any]:
    """The report `NAME.json` beside `NAME.predictions.jsonl`, empty if it is missing.

    Raises UserError if it cannot be read, or `predictions` has another name.
    """
    if not predictions.name.endswith(SUFFIX):
        raise UserError(f"{predictions}: is no file of predictions, NAME{SUFFIX}")
    path = predictions.with_name(predictions.name.removesuffix(SUFFIX) + ".json")
    try:
        with storage.errors(path):
            report = storage.parse_json(path.read_text()) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: is no report of an evaluation: {error!r}") from error
    if not isinstance(report, dict):
        raise UserError(f"{path}: is no report of an evaluation")
    return report


def _lines(path: epath.Path) -> list[dict[str, Any]]:
    try:
        with storage.errors(path):
            text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    lines = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            lines.append(storage.parse_json(line))
        except ValueError as error:
            raise UserError(f"{path}, line {number}: no JSON: {error}") from error
    return lines


def _numbered(labels: np.ndarray, read: list[dict]) -> list[str]:
    """Names "class 0" and so on, as many as the largest class that occurs needs."""
    predicted = [c for line in read for top in line.values() for c, _ in top]
    return list(numbered(max([*labels.tolist(), *predicted]) + 1))
