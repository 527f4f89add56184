"""Makes the index of a folder of videos, or goes on with one."""

import os
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from fluxvit_jax.data.annotations import videos_below
from fluxvit_jax.deploy.pretrained import PretrainedModel
from fluxvit_jax.distributed import storage
from fluxvit_jax.distributed.console import progress_bar
from fluxvit_jax.errors import UserError
from fluxvit_jax.find import index_file
from fluxvit_jax.find.index_file import UNKNOWN, Index, Moment, Settings, Version
from fluxvit_jax.find.moment_reader import Part, read_parts

FLUSH_SECONDS = 30.0  # at most so much work is lost when the program is killed
SEPARATOR = " at "  # between the name of a file and the seconds of a window that failed


class Options(NamedTuple):
    """How an index is made; workers, clip_seconds: as in `moment_reader.read_parts`."""

    batch_size: int = 8
    workers: int = 0
    clip_seconds: float = 120.0


def make(
    model: PretrainedModel, videos: str, out: Path, settings: Settings, options: Options
) -> Index:
    """Indexes the videos below a folder into the file `out`, and returns the index.

    An index in `out` goes on: its videos stay, those that have changed or could not be read are
    read again, those that are not in the folder any more are taken out.

    Raises UserError: no videos, an index of other settings or another folder in `out`, not one
    video that can be read, or as `read_parts`. What was found until then stays.
    """
    folder = storage.path_of(videos)
    if not storage.is_folder(folder):
        raise UserError(f"{videos}: no such folder")
    paths = {path.relative_to(folder).as_posix(): str(path) for path in videos_below(folder)}
    if not paths:
        raise UserError(f"{videos}: holds no videos")
    place = videos if storage.is_remote(videos) else os.path.abspath(videos)
    index = _begun(out, settings, place, {name: _version(path) for name, path in paths.items()})
    # Some parts of a video may be there, and others have failed.
    todo = [name for name in paths if name not in index.moments or name in index.failures]
    todo.sort(key=lambda name: name in index.failures)  # those that failed before come last
    if done := len(paths) - len(todo):
        print(f"{out}: {done} of {len(paths)} videos are in it already")
    run = _Run(model, index, todo, out, options.batch_size)
    parts = read_parts(
        [paths[name] for name in todo], settings, options.workers, options.clip_seconds
    )
    try:
        with progress_bar(len(paths), desc="indexing", unit="video", initial=done) as bar:
            for number, part in parts:
                run.add(number, part)
                bar.update(run.finished_since())
            run.embed_rest()
    finally:
        run.save()
    if not index.moments:
        name, reason = next(iter(index.failures.items()))
        raise UserError(
            f"{videos}: not one of its {len(paths)} videos can be read; "
            f"{storage.display_name(name)}: {reason}"
        )
    return index


def _version(path: str) -> Version:
    """The version of a file; unknown where it cannot be told, or only by asking a bucket."""
    if storage.is_remote(path):
        return UNKNOWN
    try:
        found = os.stat(path)
    except OSError:  # its reader says why
        return UNKNOWN
    return Version(found.st_size, found.st_mtime_ns)


def _begun(out: Path, settings: Settings, folder: str, present: dict[str, Version]) -> Index:
    """The index to go on with, of videos that are present as they were; empty without a file."""
    index = Index(settings, folder, versions=present)
    if not out.exists():
        return index
    before = index_file.load(out)
    if before.folder != folder and os.path.exists(before.folder):  # else it was moved
        raise UserError(f"{out}: is an index of {before.folder}; name another --out, or delete it")
    if difference := settings.difference(before.settings):
        raise UserError(f"{out}: is an index {difference}; name another --out, or delete it")
    for name, moments in before.moments.items():
        if name in present and before.versions.get(name, UNKNOWN) in (UNKNOWN, present[name]):
            index.moments[name], index.vectors[name] = moments, before.vectors[name]
    index.failures = {
        name: reason
        for name, reason in before.failures.items()
        if name in present or name.rpartition(SEPARATOR)[0] in present
    }
    return index


class _Begun:
    """A video of which parts have come; rows: of the vectors of its moments, by their start."""

    def __init__(self, parts: int):
        self.left = parts
        self.waiting = 0  # moments that are still to be embedded
        self.rows: dict[Moment, np.ndarray] = {}
        self.failed: dict[str, str] = {}


class _Run:
    """What an index has still to hear from its videos."""

    def __init__(
        self, model: PretrainedModel, index: Index, names: Sequence[str], out: Path, batch_size: int
    ):
        self._model, self._index, self._names, self._out = model, index, names, out
        self._batch_size = batch_size
        self._failed_before: dict[str, list[str]] = defaultdict(list)  # by the name of the video
        for failure in index.failures:
            for name in (failure, failure.rpartition(SEPARATOR)[0]):  # of it whole, of a window
                self._failed_before[name].append(failure)
        self._begun: dict[int, _Begun] = {}
        self._clips: list[tuple[int, Moment, np.ndarray]] = []  # that wait for a full batch
        self._saved_at = time.monotonic()
        self._finished = 0

    def add(self, number: int, part: Part) -> None:
        """Takes a part, embeds what fills a batch, and saves now and then."""
        begun = self._begun.setdefault(number, _Begun(part.parts))
        begun.left -= 1
        name = self._names[number]
        if part.failure:
            begun.failed[name] = part.failure
        for moment, reason in part.failed.items():
            begun.failed[f"{name}{SEPARATOR}{moment.start:.1f} to {moment.end:.1f} s"] = reason
        begun.waiting += len(part.clips)
        self._clips += [
            (number, moment, clip) for moment, clip in zip(part.moments, part.clips, strict=True)
        ]
        while len(self._clips) >= self._batch_size:
            self._embed()
        self._finish(number)
        if time.monotonic() - self._saved_at >= FLUSH_SECONDS:
            self.save()

    def embed_rest(self) -> None:
        """Embeds the last clips, which fill no batch."""
        while self._clips:
            self._embed()

    def finished_since(self) -> int:
        """How many videos were finished since the last call."""
        finished, self._finished = self._finished, 0
        return finished

    def save(self) -> None:
        """Writes the index. Raises UserError if it cannot be written."""
        try:
            index_file.save(self._index, self._out)
        except OSError as error:
            raise UserError(f"--out={self._out}: cannot be written: {error.strerror}") from error
        self._saved_at = time.monotonic()

    def _embed(self) -> None:
        """Embeds a batch, which is filled up with the last clip: programs are for one size."""
        batch = self._clips[: self._batch_size]
        del self._clips[: self._batch_size]
        clips = [clip for _, _, clip in batch]
        clips += clips[-1:] * (self._batch_size - len(clips))
        vectors = self._model.encode_video(np.stack(clips), self._index.settings.tokens)
        for (number, moment, _), vector in zip(batch, vectors, strict=False):
            self._begun[number].rows[moment] = vector
            self._begun[number].waiting -= 1
        for number in {number for number, _, _ in batch}:
            self._finish(number)

    def _finish(self, number: int) -> None:
        """Puts a video into the index once all of its moments are embedded."""
        begun = self._begun.get(number)
        if begun is None or begun.left or begun.waiting:
            return
        del self._begun[number]
        name = self._names[number]
        for before in self._failed_before.pop(name, ()):
            self._index.failures.pop(before, None)
        self._index.failures |= begun.failed
        for failure, reason in begun.failed.items():
            _say(f"{failure}: {reason}")
        if begun.rows:
            moments = sorted(begun.rows)
            self._index.moments[name] = moments
            self._index.vectors[name] = np.stack([begun.rows[moment] for moment in moments])
        self._finished += 1


def _say(line: str) -> None:
    tqdm.write(storage.display_name(line), file=sys.stderr)
