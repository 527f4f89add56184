"""Finds the moments of an index that are the most similar to words."""

from typing import NamedTuple

import numpy as np

from fluxvit_jax.data import captions
from fluxvit_jax.deploy.pretrained import PretrainedModel
from fluxvit_jax.errors import UserError
from fluxvit_jax.find.index_file import Index, Moment, flattened


class Found(NamedTuple):
    """A moment of a video, path relative to the index's folder, and its cosine with the words."""

    cosine: float
    file: str
    moment: Moment


def search(model: PretrainedModel, index: Index, words: str, top: int) -> list[Found]:
    """The `top` moments of an index by their cosines with `words`, most similar first.

    Of windows of a video that overlap, only the most similar one is found. Words of more than 77
    tokens are cut, with a warning.

    index: of the same model. Raises UserError if no words are left when they are cleaned.
    """
    if not captions.clean(words):
        raise UserError(f"{words!r}: there are no words to look for")
    (vector,) = model.encode_text(words)
    vectors, places = flattened(index)
    if not places:
        return []
    cosines = vectors @ vector
    found: list[Found] = []
    for number in np.argsort(-cosines, kind="stable"):
        if len(found) == top:
            break
        file, moment = places[number]
        if not any(file == own.file and _overlap(moment, own.moment) for own in found):
            found.append(Found(float(cosines[number]), file, moment))
    return found


def _overlap(one: Moment, other: Moment) -> bool:
    return one.start < other.end and other.start < one.end
