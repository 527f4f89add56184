"""What a training run writes into its workdir besides checkpoints and metrics.

`config.json`, by which the workdir belongs to one run, and `bad_clips.jsonl`.
"""

import json
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from fluxvit_jax import atomic, parallel, storage
from fluxvit_jax.config import config_difference
from fluxvit_jax.errors import UserError
from fluxvit_jax.metrics import FILE as METRICS

CONFIG = "config.json"
BAD_CLIPS = "bad_clips.jsonl"


def check_workdir(workdir: epath.Path, config: ConfigDict) -> None:
    """Raises UserError if the workdir belongs to a run of another config, or is out of reach."""
    storage.check(workdir)
    path = workdir / CONFIG
    try:
        with storage.errors(path):
            if not path.exists():
                return
            text = path.read_text()
        before = json.loads(text)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if difference := config_difference(before, config.to_dict()):
        raise UserError(
            f"{workdir} belongs to a run of another config ({'; '.join(difference)}); "
            "use another workdir"
        )


def write_config(workdir: epath.Path, config: ConfigDict) -> None:
    """Writes `config.json` of a new run; that of an old one stays.

    Raises UserError if the workdir cannot be written.
    """
    path = workdir / CONFIG
    if parallel.host_index() != 0 or path.exists():
        return
    try:
        storage.make_folder(workdir)
        atomic.write(path, json.dumps(config.to_dict(), indent=1) + "\n")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error


def noted(workdir: epath.Path, step: int, split: str) -> bool:
    """Whether `metrics.jsonl` has a line of a split at a step."""
    lines = _json_lines(workdir / METRICS)
    return any(line["step"] == step and line["split"] == split for line in lines)


class BadClips:
    """The training videos that could not be read, each once: `bad_clips.jsonl` of a workdir.

    A line is {"step": of the first batch that wanted it, "id", "reason"}. Host 0 writes what all
    have noted. Close it; `save` is that of `atomic.LineFile`.
    """

    def __init__(self, workdir: epath.Path, step: int):
        """Forgets what comes after `step`: a resumed run meets it again."""
        self._path = workdir / BAD_CLIPS
        self._known: set[str] = set()
        self._noted: list[dict[str, Any]] = []  # by this host, since the last `write`
        self._file: atomic.LineFile | None = None
        if parallel.host_index() == 0:
            known = [line for line in _json_lines(self._path) if line["step"] <= step]
            if self._path.exists():
                atomic.write(self._path, "".join(json.dumps(line) + "\n" for line in known))
            self._known = {line["id"] for line in known}

    def note(self, step: int, failures: np.ndarray) -> None:
        """failures: str [b]; "" or a line "id: reason" for each video that failed."""
        for line in (line for text in failures for line in text.splitlines()):
            name, _, reason = line.partition(": ")
            self._noted.append({"step": step, "id": name, "reason": reason})

    def write(self) -> None:
        """Adds to the file what is new; all hosts call it."""
        noted, self._noted = parallel.gather(self._noted), []
        for line in sorted(noted, key=lambda line: line["step"]):
            if parallel.host_index() == 0 and line["id"] not in self._known:
                self._known.add(line["id"])
                self._file = self._file or atomic.LineFile(self._path)
                self._file.add(json.dumps(line))

    def save(self) -> None:
        if self._file is not None:
            self._file.save()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _json_lines(path: epath.Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; one cut short by a kill is left out, as is no file."""
    with storage.errors(path):
        lines = path.read_text().splitlines() if path.exists() else []
    objects = []
    for line in lines:
        try:
            objects.append(json.loads(line))
        except ValueError:
            continue
    return objects
