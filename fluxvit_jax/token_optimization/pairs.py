"""What a search chooses and reports on, and how it does for retrieval between videos and texts."""

import os
from dataclasses import dataclass

from ml_collections import ConfigDict

from fluxvit_jax.data.retrieval_set import RetrievalSet, read_retrieval_set
from fluxvit_jax.data.sources import Example, FileSource, Source, shuffled
from fluxvit_jax.distributed.mesh import make_mesh
from fluxvit_jax.errors import UserError
from fluxvit_jax.evaluation import retrieve, vectors, zero_shot
from fluxvit_jax.evaluation.trained_weights import Weights
from fluxvit_jax.objectives.flux_clip import HEAD, TEMPERATURE
from fluxvit_jax.token_optimization.results_log import CHOOSE, REPORT


@dataclass(frozen=True, slots=True)
class Split:
    """Videos to evaluate candidates on. data: what they are, in words."""

    name: str
    source: Source
    data: str


def splits_of(
    config: ConfigDict, weights: Weights
) -> tuple[ConfigDict, Weights, list[Split], list[str]]:
    """The splits of a search for retrieval, whose classes are the texts of both lists.

    A candidate is measured by the share of videos whose first text is a right one: video to text
    R@1, of plain scores. It is told of each video alone, as a search needs; text to video is not.

    Returns the config and the weights with these classes, and notes for readers.

    Raises UserError: data are missing, or cannot be read.
    """
    if not config.search.split:
        raise UserError("nothing to choose on: add --config.search.split=PAIRS")
    lists = {CHOOSE: config.search.split, REPORT: config.data.validation}
    reported = retrieve.read_pairs(config)
    root = retrieve.root_of(config, config.search.split)
    chosen_on = read_retrieval_set(config.search.split, root, config.eval.paragraphs)
    texts = list(dict.fromkeys([*chosen_on.texts, *reported.texts]))
    number = {text: n for n, text in enumerate(texts)}
    own = config.copy_and_resolve_references()
    own.model.classes = len(texts)
    found = vectors.of_texts(weights.params, config, texts, make_mesh(config))
    head, temperature = weights.params[HEAD], float(weights.params[TEMPERATURE])
    classifier = zero_shot.classifier(head, temperature, found, prompts=1)
    choosing = shuffled(_source(chosen_on, number))
    if config.search.videos:
        choosing = choosing.first(config.search.videos)
    splits = [
        Split(CHOOSE, choosing, lists[CHOOSE]),
        Split(REPORT, _source(reported, number), lists[REPORT]),
    ]
    notes = [
        f"Top-1 and top-5 are R@1 and R@5 from video to text, among {len(texts)} texts of both "
        "lists; --mode=evaluate with eval.plan measures the chosen cells both ways."
    ]
    if shared := len(set(chosen_on.videos) & set(reported.videos)):
        notes.append(f"{shared} videos that chose the cells are in the list that is reported.")
    return own, weights._replace(params=weights.params | classifier), splits, notes


def _source(pairs: RetrievalSet, number: dict[str, int]) -> FileSource:
    """The videos of pairs, labelled by the numbers of their texts."""
    labels = [tuple(sorted({number[pairs.texts[text]] for text in own})) for own in pairs.texts_of]
    return FileSource(
        [
            Example(os.path.basename(video), label, video)
            for video, label in zip(pairs.videos, labels, strict=True)
        ]
    )
