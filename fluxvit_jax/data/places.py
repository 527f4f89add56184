"""Where a recipe finds its data, and where its run goes, unless the command line says."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from fluxvit_jax.distributed import storage

VARIABLE = "FLUXVIT_DATA"  # of the environment: the folder that holds the data sets
# Lists, or folders of class folders.
TRAIN = ("train.csv", "train")
VALIDATION = ("validation.csv", "val.csv", "validation", "val")


def data_folder(name: str) -> str:
    """The folder of a data set: `data/NAME`, or `NAME` in the folder that `VARIABLE` names."""
    return os.path.join(os.environ.get(VARIABLE) or "data", name)


def find(name: str, choices: Sequence[str]) -> str:
    """The path of the first of `choices` that is in the folder of a data set; "" if none is."""
    paths = [os.path.join(data_folder(name), choice) for choice in choices]
    for path in paths:
        with storage.errors(path):
            if storage.path_of(path).exists():
                return path
    return ""


def name_of(recipe: str) -> str:
    """The data set of "FILE:ARGUMENT": "k400" of configs/k400.py:base."""
    return _words(recipe)[0]


def workdir_of(recipe: str) -> str:
    """The workdir of "FILE:ARGUMENT": "runs/k400-base" of configs/k400.py:base."""
    return os.path.join("runs", re.sub(r"[^\w.]+", "-", "-".join(_words(recipe))).strip("-."))


def _words(recipe: str) -> list[str]:
    """The name of a recipe and the parts of its argument.

    configs/finetune.py:k400,small is configs/k400.py:small by another name.
    """
    path, _, argument = recipe.partition(":")
    words = [Path(path).stem, *filter(None, argument.split(","))]
    return words[1:] if words[0] == "finetune" and words[1:] else words
