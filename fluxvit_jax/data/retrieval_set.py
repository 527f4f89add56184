"""Videos and texts of a retrieval benchmark, and which belong together.

A file is a JSON list of {"video": path, "caption": text}, as the official code reads, or a CSV of
path,caption. A video may have a list of captions, each a query of its own or, of paragraph sets
such as DiDeMo and ActivityNet, sentences of one; a caption may have a list of videos. A video in
several lines of a CSV is one that has all of their captions; in JSON, as in the official code, each
entry is a video of its own.

Source: InternVideo2, multi_modality, dataset/ret_dataset.py. There a paragraph that is a string and
not a list has its letters joined with spaces; here it stays.
"""

import os
from dataclasses import dataclass

from fluxvit_jax.data.annotations import check_file_name
from fluxvit_jax.data.caption_lists import cleaned, entries, strings
from fluxvit_jax.distributed import storage
from fluxvit_jax.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class RetrievalSet:
    """videos: paths; texts: cleaned; texts_of, videos_of: the right ones of each video and text."""

    videos: tuple[str, ...]
    texts: tuple[str, ...]
    texts_of: tuple[tuple[int, ...], ...]
    videos_of: tuple[tuple[int, ...], ...]


def read_retrieval_set(
    path: storage.PathLike, root: str = "", paragraphs: bool = False
) -> RetrievalSet:
    """The set that a file lists.

    root: folder of the videos, for paths that are not absolute; paragraphs: a list of captions is
    one text, joined with spaces.

    Raises UserError: no such file; no list of this form; an entry without a caption or a video; a
    path that no file can have.
    """
    location = storage.path_of(path)
    videos: list[str] = []
    number_of: dict[str, int] = {}  # of the latest video with a path
    texts: list[str] = []
    texts_of: list[list[int]] = []
    videos_of: list[tuple[int, ...]] = []
    for where, entry in entries(location):
        own_videos = strings(entry.get("video"), f"{where}: video")
        sentences = strings(entry.get("caption"), f"{where}: caption")
        joined = [" ".join(sentences)] if paragraphs else sentences
        own_texts = cleaned(joined, where)
        for video in own_videos:
            check_file_name(where, video)
            if location.suffix != ".csv" or video not in number_of:
                number_of[video] = len(videos)
                videos.append(os.path.join(root, video))
                texts_of.append([])
            texts_of[number_of[video]] += range(len(texts), len(texts) + len(own_texts))
        videos_of += [tuple(number_of[video] for video in own_videos)] * len(own_texts)
        texts += own_texts
    if not videos:
        raise UserError(f"{path}: there are no videos in it")
    return RetrievalSet(
        videos=tuple(videos),
        texts=tuple(texts),
        texts_of=tuple(map(tuple, texts_of)),
        videos_of=tuple(videos_of),
    )
