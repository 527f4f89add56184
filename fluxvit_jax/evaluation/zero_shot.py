"""Classes by their names: scores of videos against prompts, and multiple choice.

Source: InternVideo2, multi_modality, dataset/text_prompt.py (the 16 prompts that its evaluation
uses, which are ActionCLIP's), tasks_clip/retrieval_utils.py, retrieval_mc.py.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from fluxvit_jax.data import captions
from fluxvit_jax.distributed.partition_rules import Rules
from fluxvit_jax.errors import UserError
from fluxvit_jax.evaluation.retrieval import similarities, softmax, unit
from fluxvit_jax.models import blocks, fluxvit
from fluxvit_jax.models.blocks import l2_normalize
from fluxvit_jax.models.clip_head import ClipHead

CLASSIFIER = "text_classifier"  # name among parameters; see `classifier`
RULES: Rules = ((f"{CLASSIFIER}/.*", PartitionSpec()),)

PROMPTS = (
    "a photo of action {}",
    "a picture of action {}",
    "Human action of {}",
    "{}, an action",
    "{} this is an action",
    "{}, a video of action",
    "Playing action of {}",
    "{}",
    "Playing a kind of action, {}",
    "Doing a kind of action, {}",
    "Look, the human is {}",
    "Can you recognize the action of {}?",
    "Video classification of {}",
    "A video of {}",
    "The man is {}",
    "The woman is {}",
)


def texts_of_classes(classes: Sequence[str], prompts: Sequence[str] = PROMPTS) -> list[str]:
    """The cleaned texts of all classes, all prompts of the first class first."""
    return [captions.clean(prompt.format(name)) for name in classes for prompt in prompts]


def class_scores(videos: np.ndarray, texts: np.ndarray, prompts: int) -> np.ndarray:
    """Scores of classes: float32 [B, K], the mean over its prompts of the cosines.

    The mean of cosines, as in the official code, not the cosine of a mean vector.

    videos: vectors [B, D]; texts: those of `texts_of_classes`, [K * prompts, D].
    """
    found = similarities(videos, texts)
    return found.reshape(len(found), -1, prompts).mean(axis=2)


def option_shares(videos: np.ndarray, options: np.ndarray, temperature: float) -> np.ndarray:
    """Probabilities of a question's options: float32 [B, K], softmax of cosines / temperature.

    videos: [B, D]; options: vectors of each question's options, [B, K, D]; temperature: learned.
    """
    pairs = zip(videos, options, strict=True)
    cosines = np.stack([similarities(video[None], own)[0] for video, own in pairs])
    return softmax(cosines / np.float32(temperature), axis=1)


def classifier(head: dict, temperature: float, texts: np.ndarray, prompts: int) -> dict[str, Any]:
    """Parameters that make a classifier of texts, to go beside the network's.

    Its scores are `class_scores` / temperature: a mean of cosines is the product with a mean of
    unit vectors.

    head: parameters of the head into the space of texts; texts: vectors [K * prompts, D].
    """
    classes = unit(texts).reshape(-1, prompts, texts.shape[1]).mean(axis=1)
    return {CLASSIFIER: {"head": head, "classes": classes, "temperature": np.float32(temperature)}}


def classifier_in(params: dict) -> dict[str, Any]:
    """The part of `params` that `classifier` has made; {} if there is none."""
    return {name: params[name] for name in (CLASSIFIER,) if name in params}


def logits(params: dict, pooled: jax.Array, dtype: str) -> jax.Array:
    """Scores of classes over the temperature, [B, K], from clip vectors [B, pool width].

    params: what `classifier` has made.
    """
    vectors = to_text(params["head"], pooled, dtype)
    cosines = jnp.matmul(vectors, params["classes"].T, precision="highest")
    return cosines / params["temperature"]


def to_text(head: dict, pooled: jax.Array, dtype: str) -> jax.Array:
    """Clip vectors [B, pool width] in the space of texts: unit vectors [B, D]."""
    width, out = head["proj"]["kernel"].shape
    made = blocks.graphdef(lambda rngs: ClipHead(width, out, jnp.dtype(dtype), rngs))
    module: ClipHead = fluxvit.from_params(made, head)
    return l2_normalize(module(pooled))


def check_prompt(prompt: str) -> None:
    """Raises UserError unless a prompt has one place for the class."""
    if prompt.count("{}") != 1 or prompt.count("{") + prompt.count("}") != 2:
        raise UserError(f"{prompt!r}: a prompt has {{}} once, for the class")
