r"""Zero-shot retrieval of Flux-CLIP on public test sets. NOT RUN HERE.

    python -m fluxvit_jax.main --mode=evaluate --config=configs/retrieval.py:msrvtt,base \
        --workdir=runs/clip_base --config.data.validation=msrvtt_1ka.json \
        --config.data.root=msrvtt/videos

Argument: the set (msrvtt, didemo, anet, lsmdc, msvd, custom), then small, base (default) or large.
The list is JSON as InternVideo2's ([{"video": path, "caption": text or texts}]) or CSV of
path,caption; without the flag, test.json or test.csv in data/msrvtt is looked for. Flags of a run's
own config (`--mode=evaluate --workdir=runs/clip_base`) do the same for other sets.

A list with another number of videos or texts than the set has is refused: numbers of different
splits cannot be compared. --config.eval.allow_missing=True takes it, and the report says so.

What the sets are: MSR-VTT's 1k-A split, 1000 videos of ONE caption each (the full split of 2990 x
20 is another benchmark); DiDeMo's test, 1003 videos in VindLU's file (1036 in another one), the
sentences of a video as one paragraph, of its first 30 seconds; ActivityNet's val_1, 4917
paragraphs; LSMDC, 1000; MSVD's test, 670 videos and all their 27,763 captions. Frames and resizing
are those of the official evaluation: the middle of equal segments, squeezed to a square.
"""

from dataclasses import dataclass

from ml_collections import ConfigDict

from fluxvit_jax.data import places
from fluxvit_jax.errors import UserError
from fluxvit_jax.recipes import clip

LISTS = ("test.json", "test.csv")


@dataclass(frozen=True, slots=True, kw_only=True)
class TestSet:
    """name: in reports; videos, texts: how many it has, 0 where any number will do."""

    name: str
    videos: int = 0
    texts: int = 0
    paragraphs: bool = False
    seconds: float = 0.0


SETS = {
    "msrvtt": TestSet(name="MSR-VTT 1k-A", videos=1000, texts=1000),
    "didemo": TestSet(name="DiDeMo test", videos=1003, texts=1003, paragraphs=True, seconds=30.0),
    "anet": TestSet(name="ActivityNet val_1", videos=4917, texts=4917, paragraphs=True),
    "lsmdc": TestSet(name="LSMDC", videos=1000, texts=1000),
    "msvd": TestSet(name="MSVD test", videos=670, texts=27763),
    "custom": TestSet(name=""),
}


def get_config(argument: str = "") -> ConfigDict:
    """The config of "SET,VARIANT". Raises UserError."""
    name, _, options = argument.partition(",")
    if name not in SETS:
        raise UserError(f"the set comes first (msrvtt,base): {name!r} is none of {', '.join(SETS)}")
    config, own = clip.get_config(options), SETS[name]
    config.eval.task = "retrieval"
    config.data.validation = places.find(name, LISTS)
    config.eval.dataset = own.name
    config.eval.videos, config.eval.texts = own.videos, own.texts
    config.eval.paragraphs, config.eval.seconds = own.paragraphs, own.seconds
    return config
