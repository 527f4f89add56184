"""The space that the videos and texts of Flux-CLIP share: vectors, and classes by their names."""

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from fluxvit_jax.convert.clip_parts import ClipParts
from fluxvit_jax.data import captions
from fluxvit_jax.errors import UserError
from fluxvit_jax.evaluation import zero_shot
from fluxvit_jax.evaluation.finite import check_finite
from fluxvit_jax.evaluation.zero_shot import CLASSIFIER, PROMPTS
from fluxvit_jax.models.text_encoder import TextEncoderConfig, unit_vectors

TEXTS_AT_ONCE = 64


class SharedSpace:
    """What maps clip vectors and texts into one space of D channels.

    dtype: of the computation. Compiles once for each number of videos, and for numbers of texts
    that are powers of two.
    """

    def __init__(self, parts: ClipParts, dtype: str):
        network = replace(parts.network, dtype=dtype)
        self.parts = parts._replace(
            head=jax.device_put(parts.head),
            text_encoder=jax.device_put(parts.text_encoder),
            network=network,
        )

    @property
    def temperature(self) -> float:
        """By which cosines are divided before a softmax."""
        return self.parts.temperature

    def vectors_of_pooled(self, pooled: jax.Array) -> np.ndarray:
        """Unit vectors float32 [B, D] of clip vectors [B, pool_width]."""
        return np.asarray(project(self.parts.head, pooled, self.parts.network.dtype))

    def vectors_of_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors float32 [T, D] of texts, which are cleaned as in training.

        Warns of texts that are cut, as longer than the encoder reads.

        Raises UserError: a text is not UTF-8, or vectors are no finite numbers.
        """
        _check_encoding(texts)
        ids = captions.tokenize_cleaned(texts)
        parts = [
            self._encode(ids[first : first + TEXTS_AT_ONCE])
            for first in range(0, len(ids), TEXTS_AT_ONCE)
        ]
        vectors = np.concatenate([np.zeros((0, self.parts.network.out), np.float32), *parts])
        check_finite(vectors)
        return vectors

    def _encode(self, ids: np.ndarray) -> np.ndarray:
        padding = (1 << (len(ids) - 1).bit_length()) - len(ids)
        padded = np.pad(ids, ((0, padding), (0, 0)))
        found = encode_texts(self.parts.text_encoder, padded, self.parts.network)
        return np.asarray(found)[: len(ids)]

    def classifier(
        self, names: Sequence[str], prompts: Sequence[str] | None = None
    ) -> "TextClassifier":
        """A classifier of classes that have names alone.

        prompts: texts with {} for a name, by default the official 16.

        Raises UserError: no names, empty or repeated ones, or a prompt without one {}.
        """
        prompts = PROMPTS if prompts is None else prompts
        _check_names(names)
        for prompt in prompts:
            zero_shot.check_prompt(prompt)
        if not prompts:
            raise UserError("no prompts given: name at least one, such as 'a video of {}'")
        texts = self.vectors_of_texts([prompt.format(name) for name in names for prompt in prompts])
        made = zero_shot.classifier(self.parts.head, self.temperature, texts, len(prompts))
        return TextClassifier(tuple(names), made[CLASSIFIER], self.parts.network.dtype)


class TextClassifier:
    """Scores of classes by texts, in place of a trained classifier's.

    names: of the classes; params: what `zero_shot.classifier` makes.
    """

    def __init__(self, names: tuple[str, ...], params: dict[str, Any], dtype: str):
        self.names = names
        self._params, self._dtype = params, dtype

    def logits(self, pooled: jax.Array) -> jax.Array:
        """float32 [B, K], cosines over the temperature, of clip vectors [B, pool_width]."""
        return _classify(self._params, pooled, self._dtype)


def _check_encoding(texts: Sequence[str]) -> None:
    """Raises UserError for a text of a command line or a file name that is not UTF-8."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{text!a}: is not UTF-8; give the text in UTF-8") from error


def _check_names(names: Sequence[str]) -> None:
    if isinstance(names, str):
        raise UserError(f"{names!r}: names of classes are a list, such as ['{names}']")
    if not names:
        raise UserError("no names of classes given")
    cleaned = [captions.clean(name) for name in names]
    for name, text in zip(names, cleaned, strict=True):
        if not text:
            raise UserError(f"{name!r} is no name of a class: nothing of it is left to read")
        if cleaned.count(text) > 1:
            raise UserError(f"{name!r} is named twice among the classes")


@functools.partial(jax.jit, static_argnames="network")
def encode_texts(params: dict, ids: jax.Array, network: TextEncoderConfig) -> jax.Array:
    """Unit vectors [B, D] of texts, ids int32 [B, 77], by a text encoder's parameters."""
    return unit_vectors(network, params, ids)


@functools.partial(jax.jit, static_argnames="dtype")
def project(head: dict, pooled: jax.Array, dtype: str) -> jax.Array:
    """Unit vectors [B, D] of clip vectors [B, pool_width], by a head's parameters."""
    return zero_shot.to_text(head, pooled, dtype)


@functools.partial(jax.jit, static_argnames="dtype")
def _classify(params: dict, pooled: jax.Array, dtype: str) -> jax.Array:
    return zero_shot.logits(params, pooled, dtype)
