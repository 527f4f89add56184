"""Captions as the official code cleans them, in training and evaluation (`pre_text`).

Source: InternVideo2, multi_modality, dataset/utils.py.
"""

import re

_DELETED = re.compile(r"[,.'!?\"()*#:;~]")
_JOINTS = str.maketrans("-/", "  ")


def clean(caption: str) -> str:
    """Lower case, without punctuation, with single spaces.

    A single tab or line break inside stays, as do curly quotes and other symbols.
    """
    text = _DELETED.sub("", caption.lower()).translate(_JOINTS).replace("<person>", "person")
    return re.sub(r"\s{2,}", " ", text).rstrip("\n").strip(" ")
