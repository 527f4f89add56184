"""Class names: those of public data sets, which ship in `labels/`, and of files.

Names are compared without regard to case, blanks, underscores and hyphens.
"""

import difflib
import json
import os
import re
import unicodedata
from collections.abc import Sequence
from functools import cache
from importlib import resources

from fluxvit_jax.errors import UserError

# Data sets whose names ship, as `config.data.class_names` and `--class_names` call them.
DATASETS = {
    "k400": "Kinetics-400",
    "k600": "Kinetics-600",
    "k700": "Kinetics-700",
    "k710": "Kinetics-710",
    "ssv2": "Something-Something V2",
    "ucf101": "UCF101",
    "hmdb51": "HMDB51",
    "mit": "Moments in Time",
}
# The data sets of the official files of weights, which hold no names, by the number of classes.
OF_OFFICIAL_WEIGHTS = {400: "k400", 710: "k710"}
PARTS_OF_K710 = ("k400", "k600", "k700")


@cache
def of_dataset(name: str) -> tuple[str, ...]:
    """The class names of one of `DATASETS`, in the order of its labels."""
    return tuple(_read(f"{name}.txt").splitlines())


@cache
def labels_in_k710(name: str) -> tuple[int, ...]:
    """For each class of one of `PARTS_OF_K710`, its label in Kinetics-710.

    By the official table, since some of the classes bear another name there.
    """
    return tuple(json.loads(_read(f"k710_to_{name}.json")))


def dataset_of(names: Sequence[str]) -> str | None:
    """The one of `DATASETS` that has these names in this order; None if none has."""
    wanted = list(map(normalized, names))
    return next((d for d in DATASETS if wanted == list(map(normalized, of_dataset(d)))), None)


def normalized(name: str) -> str:
    """What of a name counts when names are compared."""
    # File systems of macOS write an accent as a letter of its own.
    composed = unicodedata.normalize("NFC", name.strip())
    return " ".join(re.split(r"[\s_-]+", composed)).casefold()


class KnownNames:
    """Class names in the order of their labels, to look labels up by name.

    origin: where they are from, for errors.
    """

    def __init__(self, names: Sequence[str], origin: str):
        self.names = tuple(names)
        self.origin = origin
        self._labels = {normalized(name): label for label, name in enumerate(self.names)}
        self._labels |= {name: label for label, name in enumerate(self.names)}

    def __contains__(self, name: str) -> bool:
        return name in self._labels or normalized(name) in self._labels

    def label(self, name: str, where: str) -> int:
        """The label of a class. Raises UserError, which begins with `where`, if there is none."""
        if name not in self:
            raise UserError(
                f"{where}: class {name!r} is none of the {len(self.names)} of {self.origin}"
                f"{did_you_mean(name, self.names)}"
            )
        return self._labels[name if name in self._labels else normalized(name)]


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """ "; did you mean 'NAME'?" with the one of `known` that is alike; "" if none is."""
    spelled = {normalized(one): one for one in known}
    close = difflib.get_close_matches(normalized(name), spelled, 1)
    return f"; did you mean {spelled[close[0]]!r}?" if close else ""


def numbered(classes: int) -> tuple[str, ...]:
    """Names of classes that have none: "class 0", "class 1" and so on."""
    return tuple(f"class {i}" for i in range(classes))


def is_dataset(path: str | os.PathLike) -> bool:
    """Whether a text names one of `DATASETS`, not a file."""
    return os.fspath(path) in DATASETS


def _read(file: str) -> str:
    return (resources.files("fluxvit_jax.data") / "labels" / file).read_text("utf-8")
