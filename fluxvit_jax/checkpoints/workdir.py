"""Files of a workdir besides checkpoints and metrics.

`config.json`, which ties the workdir to one run, `classes.txt` and `bad_clips.jsonl`.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from fluxvit_jax.config import versions
from fluxvit_jax.config.fields import config_difference
from fluxvit_jax.distributed import atomic, checksums, storage
from fluxvit_jax.distributed.console import say
from fluxvit_jax.distributed.hosts import compute_on_host0
from fluxvit_jax.distributed.mesh import gather, host_index
from fluxvit_jax.errors import UserError

CONFIG = "config.json"
CLASS_NAMES = "classes.txt"
METRICS = "metrics.jsonl"
BAD_CLIPS = "bad_clips.jsonl"
TOLD_CLIPS = 5  # unreadable videos of a run that are said as they are met
# All that a run, its evaluations and its search may leave in a workdir.
OF_A_RUN = (
    CONFIG, CLASS_NAMES, METRICS, BAD_CLIPS, "checkpoints", "tensorboard", "evaluation", "search",
    "profile", "wandb_id.txt", "goodput.json",
)  # fmt: skip


def check_workdir(workdir: epath.Path, config: ConfigDict) -> None:
    """Raises UserError if the workdir belongs to a run of another config, or is out of reach.

    Or if a later version has written it, with fields that this one does not know.
    """
    storage.check(workdir)
    before = read_config(workdir)
    if before is None:
        return
    if difference := config_difference(before, config.to_dict()):
        raise UserError(
            f"{workdir} belongs to a run of another config ({'; '.join(difference)}); "
            "use another workdir"
        )


def read_config(workdir: epath.Path) -> dict[str, Any] | None:
    """The config of the run in a workdir, a nested dict; None if there is no run.

    Raises UserError for a file that cannot be read, or with fields that this version does not know.
    """
    path = workdir / CONFIG
    try:
        with storage.errors(path):
            if not path.exists():
                return None
            text = path.read_text()
        content = storage.parse_json(text)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    return versions.unstamp(content, path)


def write_config(workdir: epath.Path, config: ConfigDict) -> None:
    """Writes `config.json`, also over that of an earlier start, since data may have moved.

    Raises UserError if the workdir cannot be written.
    """
    content = versions.stamp(config.to_dict())
    _write(workdir / CONFIG, json.dumps(content, indent=1) + "\n")


def write_class_names(workdir: epath.Path, names: Sequence[str] | None) -> None:
    """Writes `classes.txt` for people: one name per line, in the order of the labels.

    Programs read the names from the checkpoints. Raises UserError as `write_config` does.
    """
    if names:
        _write(workdir / CLASS_NAMES, "\n".join(names) + "\n")


def _write(path: epath.Path, text: str) -> None:
    if host_index() != 0:
        return
    try:
        storage.make_folder(path.parent)
        atomic.write(path, text)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error


def set_run_aside(workdir: epath.Path) -> epath.Path | None:
    """Moves what a run has left into a new folder `WORKDIR/earlier-N`; None if there is nothing.

    Raises UserError for a bucket, whose objects cannot be moved, and if it cannot be written.
    """
    if storage.is_remote(workdir):
        raise UserError(f"{workdir}: --fresh is for folders of this machine; use another workdir")
    left = [workdir / name for name in OF_A_RUN if (workdir / name).exists()]
    if not left:
        return None
    number = 1
    while (folder := workdir / f"earlier-{number}").exists():
        number += 1
    try:
        folder.mkdir()
        for path in left:
            path.rename(folder / path.name)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}") from error
    return folder


def last_logged_step(workdir: epath.Path) -> int:
    """The last step in `metrics.jsonl`; 0 if there is none."""
    return max((line["step"] for line in checksums.read_lines(workdir / METRICS)), default=0)


def metrics_by_step(workdir: epath.Path, split: str) -> list[tuple[int, dict[str, Any]]]:
    """(step, line) of `metrics.jsonl` for each line of a split."""
    lines = checksums.read_lines(workdir / METRICS)
    return [(line["step"], line) for line in lines if line["split"] == split]


class BadClips:
    """List of unreadable training videos, each once: `bad_clips.jsonl` of a workdir.

    The first ones of a run are also said. A line is {"step": of its first batch, "id", "reason"}.
    One with "skip": true is of a video that hung or crashed its reader. A resumed run does not try
    it again; to have it tried, remove the line. Host 0 writes those of all hosts. Close it; `save`
    is that of `atomic.LineFile`.

    Attributes:
        quarantine: the reasons of the videos to skip, by id; whoever reads videos adds to it.
    """

    def __init__(self, workdir: epath.Path, step: int):
        """Removes lines after `step`, but for videos to skip: a resumed run writes them again."""
        self._path = workdir / BAD_CLIPS
        self._new: list[dict[str, Any]] = []  # of this host, since the last `write`
        self._file: atomic.LineFile | None = None
        known = compute_on_host0(lambda: self._read(step))
        self._known = {line["id"] for line in known}
        self.quarantine = {line["id"]: line["reason"] for line in known if line.get("skip") is True}

    def _read(self, step: int) -> list[dict[str, Any]]:
        """The lines that stay; damaged ones are dropped."""
        lines = [
            line
            for line in checksums.read_lines(self._path)
            if isinstance(line.get("step"), int)
            and all(isinstance(line.get(name), str) for name in ("id", "reason"))
        ]
        kept = [line for line in lines if line.get("skip") is True or line["step"] <= step]
        if self._path.exists():
            checksums.write_lines(self._path, kept)
        return kept

    def note(self, step: int, failures: np.ndarray) -> None:
        """Adds the failures of a batch, str [b]: "" or a line "id: reason" for each video."""
        for line in (line for text in failures for line in text.splitlines()):
            skipped = next((id for id in self.quarantine if line.startswith(f"{id}: ")), None)
            name = skipped or line.partition(": ")[0]
            reason = line.removeprefix(f"{name}: ")
            skip = {"skip": True} if skipped else {}
            self._new.append({"step": step, "id": name, "reason": reason, **skip})

    def write(self) -> None:
        """Appends the new lines to the file; all hosts call it."""
        new, self._new = gather(self._new), []
        for line in sorted(new, key=lambda line: line["step"]):
            if host_index() == 0 and line["id"] not in self._known:
                self._known.add(line["id"])
                self._file = self._file or atomic.LineFile(self._path)
                self._file.add(checksums.to_line(line))
                self._tell(line)

    def _tell(self, line: dict[str, Any]) -> None:
        listed = len(self._known)
        if listed <= TOLD_CLIPS and not line.get("skip"):  # whoever skipped it has said so
            say(f"cannot read {line['id']}, trains on another clip instead: {line['reason']}")
        if listed == TOLD_CLIPS:
            say(f"further clips that cannot be read are only listed, in {self._path}")

    @property
    def summary(self) -> str:
        """How many videos are listed, and where; "" if none. Of host 0."""
        number = len(self._known)
        videos = "1 training video" if number == 1 else f"{number} training videos"
        return f"{videos} could not be read: {self._path}" if number else ""

    def save(self) -> None:
        if self._file is not None:
            self._file.save()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
