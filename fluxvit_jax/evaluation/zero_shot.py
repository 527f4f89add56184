"""Classes by their names: scores of videos against prompts, and multiple choice.

Source: InternVideo2, multi_modality, dataset/text_prompt.py (the 16 prompts that its evaluation
uses, which are ActionCLIP's), tasks_clip/retrieval_utils.py, retrieval_mc.py.
"""

from collections.abc import Sequence

import numpy as np
from scipy.special import softmax

from fluxvit_jax.data import captions
from fluxvit_jax.evaluation.retrieval import similarities

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
