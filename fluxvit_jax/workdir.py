"""What a training run writes into its workdir besides checkpoints and metrics.

`config.json`, by which the workdir belongs to one run, and `bad_clips.jsonl`.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from fluxvit_jax import atomic, parallel
from fluxvit_jax.config import config_difference
from fluxvit_jax.errors import UserError
from fluxvit_jax.metrics import FILE as METRICS

CONFIG = "config.json"
BAD_CLIPS = "bad_clips.jsonl"


def check_workdir(workdir: Path, config: ConfigDict) -> None:
    """Raises UserError if the workdir belongs to a run of another config."""
    path = workdir / CONFIG
    if not path.exists():
        return
    try:
        before = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if difference := config_difference(before, config.to_dict()):
        raise UserError(
            f"{workdir} belongs to a run of another config ({'; '.join(difference)}); "
            "use another workdir"
        )


def write_config(workdir: Path, config: ConfigDict) -> None:
    """Writes `config.json` of a new run; that of an old one stays."""
    path = workdir / CONFIG
    if parallel.host_index() == 0 and not path.exists():
        workdir.mkdir(parents=True, exist_ok=True)
        atomic.write(path, json.dumps(config.to_dict(), indent=1) + "\n")


def noted(workdir: Path, step: int, split: str) -> bool:
    """Whether `metrics.jsonl` has a line of a split at a step."""
    lines = _json_lines(workdir / METRICS)
    return any(line["step"] == step and line["split"] == split for line in lines)


class BadClips:
    """The training videos that could not be read, each once: `bad_clips.jsonl` of a workdir.

    A line is {"step": of the first batch that wanted it, "id", "reason"}. Each host has its own
    file; those after the first are numbered.
    """

    def __init__(self, workdir: Path, step: int):
        """Forgets what comes after `step`: a resumed run meets it again."""
        host = parallel.host_index()
        self._path = workdir / (f"host{host}_{BAD_CLIPS}" if host else BAD_CLIPS)
        known = [line for line in _json_lines(self._path) if line["step"] <= step]
        if self._path.exists():
            atomic.write(self._path, "".join(json.dumps(line) + "\n" for line in known))
        self._known = {line["id"] for line in known}

    def note(self, step: int, failures: np.ndarray) -> None:
        """failures: str [b]; "" or a line "id: reason" for each video that failed."""
        for line in (line for text in failures for line in text.splitlines()):
            name, _, reason = line.partition(": ")
            if name not in self._known:
                self._known.add(name)
                with self._path.open("a") as file:
                    file.write(json.dumps({"step": step, "id": name, "reason": reason}) + "\n")


def _json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; one cut short by a kill is left out, as is no file."""
    lines = path.read_text().splitlines() if path.exists() else []
    objects = []
    for line in lines:
        try:
            objects.append(json.loads(line))
        except ValueError:
            continue
    return objects
