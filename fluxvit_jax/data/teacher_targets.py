"""Cached teacher targets: computed once by `--mode=cache`, then read together with the clips.

It pays off where grids, frames and crops repeat (`data.sampling_period_epochs`) and one or several
runs see each clip many times. A folder has

    lessons-00000-of-00009.array_record ...   one record per sample of the plan, in its order
    cache.json                                 the plan, the teacher, and the arrays in a record

and serves only runs of that plan.
"""

import dataclasses
import math
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from etils import epath
from ml_collections import ConfigDict

from fluxvit_jax.config.fields import REQUIRED, config_difference
from fluxvit_jax.data.sources import Source
from fluxvit_jax.distributed import storage
from fluxvit_jax.errors import UserError

ABOUT = "cache.json"

# Arrays that a batch has in addition if the teacher's targets are cached.
CACHED = ("teacher_index", "teacher_attention", "teacher_pooled", "teacher_middle")

Arrays = dict[str, np.ndarray]
Fields = dict[str, tuple[tuple[int, ...], str]]  # name -> shape and dtype of one clip's array


def plan_of(config: ConfigDict, source: Source) -> dict[str, Any]:
    """Everything that determines the clips and the teacher's targets for them."""
    data, model, distill = config.data, config.model, config.distill.to_dict()
    teacher = ("network", "frames", "resolution", "gelu", "tokens", "teacher_blocks")
    return {
        "videos": source.fingerprint,
        "seed": config.seed,
        "data": {
            "grids": data.grids.to_dict(),
            "augment": data.augment.to_dict(),
            "clips_per_grid": data.clips_per_grid,
            "repeated_aug": data.repeated_aug,
            "sampling_period_epochs": data.sampling_period_epochs,
        },
        "model": {"cls": model.cls, "dtype": model.dtype, "selector": model.selector.to_dict()},
        "distill": {name: distill[name] for name in teacher},
    }


def shard_name(number: int, count: int) -> str:
    return f"lessons-{number:05d}-of-{count:05d}.array_record"


def record_size(fields: Fields) -> int:
    """Bytes of the record of one clip."""
    return sum(_size(*field) for field in fields.values())


def pack(targets: Mapping[str, np.ndarray], fields: Fields) -> bytes:
    """The record of one clip."""
    return b"".join(np.ascontiguousarray(targets[name]).tobytes() for name in fields)


@dataclasses.dataclass
class CachedTargets:
    """A finished cache: `read` returns the arrays of samples by their numbers in the plan."""

    paths: list[str]
    fields: Fields

    def read(self, samples: np.ndarray) -> Arrays:
        """Arrays [n, ...] of the fields. Raises UserError where a shard is damaged."""
        try:
            records = self._records.__getitems__([int(sample) for sample in samples])
        except (RuntimeError, IndexError, ValueError) as error:  # array_record's errors
            raise UserError(f"{self.paths[0]} and others: cannot be read: {error}") from error
        clips = [self._unpack(record) for record in records]
        return {name: np.stack([clip[name] for clip in clips]) for name in self.fields}

    @property
    def bytes_a_clip(self) -> int:
        return record_size(self.fields)

    def __getstate__(self) -> dict[str, Any]:
        """Without open files, for worker processes."""
        return {"paths": self.paths, "fields": self.fields}

    @cached_property
    def _records(self) -> ArrayRecordDataSource:
        return ArrayRecordDataSource(self.paths)

    def _unpack(self, record: bytes) -> Arrays:
        if len(record) != self.bytes_a_clip:
            raise ValueError(f"a record of {len(record)} bytes, not {self.bytes_a_clip}")
        arrays, start = {}, 0
        for name, (shape, dtype) in self.fields.items():
            end = start + _size(shape, dtype)
            arrays[name] = np.frombuffer(record[start:end], dtype).reshape(shape)
            start = end
        return arrays


def open_cached_targets(config: ConfigDict, source: Source) -> CachedTargets | None:
    """The cache that `distill.cache` names; None if it names none.

    Raises UserError: the cache is missing, unfinished, damaged, or of another plan.
    """
    if not config.distill.cache:
        return None
    folder = storage.path_of(config.distill.cache)
    about = read_about(folder)
    if about is not None:
        check_plan(folder, about, plan_of(config, source))
        check_teacher(folder, about, config)
    if about is None or not about["finished"]:
        raise UserError(
            f"config.distill.cache: {folder} holds no finished cache; make one with --mode=cache"
        )
    paths = [folder / shard_name(number, about["shards"]) for number in range(about["shards"])]
    for path in paths:
        if not path.exists():
            raise UserError(f"{path} is missing")
    fields = {name: (tuple(shape), dtype) for name, (shape, dtype) in about["fields"].items()}
    return CachedTargets([str(path) for path in paths], fields)


def read_about(folder: epath.Path) -> dict[str, Any] | None:
    """The content of `cache.json`; None if there is none. Raises UserError if it is damaged."""
    path = folder / ABOUT
    try:
        return storage.parse_json(path.read_text()) if path.exists() else None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def cached_teacher(config: ConfigDict) -> str:
    """The fingerprint of the teacher that made the cache that `distill.cache` names.

    Empty for a cache of an earlier version, which does not say.

    Raises UserError: there is no cache, or it is damaged.
    """
    about = read_about(storage.path_of(config.distill.cache))
    if about is None:
        raise UserError(f"config.distill.cache: {config.distill.cache} holds no cache")
    return about.get("fingerprint", "")


def check_plan(folder: epath.Path, about: Mapping[str, Any], plan: Mapping[str, Any]) -> None:
    """Raises UserError if a cache was made with another plan."""
    if differs := config_difference(about["plan"], plan):
        raise UserError(f"{folder} was made with another plan ({'; '.join(differs)})")


def check_teacher(folder: epath.Path, about: Mapping[str, Any], config: ConfigDict) -> None:
    """Raises UserError if a cache was made by another teacher than `config.distill.teacher`."""
    teacher = config.distill.teacher
    if teacher not in ("", REQUIRED, about["teacher"]):
        raise UserError(
            f"{folder} was made by the teacher {about['teacher']}, not {teacher}; to take it all "
            "the same, name none: --config.distill.teacher="
        )


def _size(shape: tuple[int, ...], dtype: str) -> int:
    return math.prod(shape) * np.dtype(dtype).itemsize
