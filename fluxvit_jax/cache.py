"""Computes what a teacher makes of every clip of a plan: `--mode=cache`; see `data.lessons`.

    python -m fluxvit_jax.main --mode=cache --config=configs/pretrain.py:base,data=mixture.csv \
        --config.distill.teacher=teacher --config.data.plan_epochs=1 --config.distill.cache=DIR

Several hosts share the shards; finished ones are kept, so that a run that was cut off goes on.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path

import jax
from array_record.python.array_record_module import ArrayRecordWriter
from jax.sharding import Mesh
from ml_collections import ConfigDict

from fluxvit_jax import atomic, distill, distributed, parallel, storage
from fluxvit_jax.config import admissible_grids, is_distillation
from fluxvit_jax.data.annotations import Source
from fluxvit_jax.data.lessons import (
    ABOUT,
    check_plan,
    check_teacher,
    pack,
    plan_groups,
    plan_of,
    read_about,
    record_size,
    shard_name,
)
from fluxvit_jax.data.pipeline import train_batches, training_source
from fluxvit_jax.errors import UserError
from fluxvit_jax.evaluate import progress_bar
from fluxvit_jax.step import make_objective

SHARD_BYTES = 200 << 20  # about


def run(config: ConfigDict, _: str | None = None) -> int:
    """Writes the cache of `config.distill.cache`; returns the exit status, 0.

    Raises UserError: no teacher or plan to make it of, or a folder with a cache of another plan.
    """
    _check(config)
    folder = Path(config.distill.cache)
    with distributed.together():
        source = training_source(config)
        plan, groups = plan_of(config, source), plan_groups(config, source)
        if not groups:
            raise UserError(
                f"config.data.plan_epochs: {config.data.plan_epochs} epochs of {len(source)} "
                f"videos make no group of {config.data.grid_group} clips"
            )
        if (before := read_about(storage.path_of(folder))) is not None:
            check_plan(storage.path_of(folder), before, plan)
            check_teacher(storage.path_of(folder), before, config)
            if before["finished"]:
                parallel.say(f"{folder} is finished: {before['samples']} samples")
                return 0
        folder.mkdir(parents=True, exist_ok=True)
    writer = _Writer(config, source, folder, groups)
    about = {
        "finished": False,
        "plan": plan,
        "teacher": config.distill.teacher,
        "samples": groups * config.data.grid_group,
        "shards": writer.shards,
        "fields": distill.lesson_fields(config),
    }
    _note(folder, about)  # before the first shard, or one of another plan might be taken for ours
    writer.write_missing()
    distributed.meet()
    _note(folder, about | {"finished": True})
    parallel.say(f"{about['samples']} samples in {writer.shards} shards written to {folder}")
    return 0


def _note(folder: Path, about: dict) -> None:
    if parallel.host_index() == 0:
        atomic.write(folder / ABOUT, json.dumps(about, indent=1) + "\n")
    distributed.meet()


def _check(config: ConfigDict) -> None:
    if not is_distillation(config) or not config.distill.cache:
        raise UserError(
            "nothing to cache: take a recipe of distillation, such as configs/pretrain.py, and add "
            "--config.distill.cache=DIR"
        )
    if not config.data.train:
        raise UserError("no training data: add --config.data.train=LIST")
    distill.check_teacher_named(config)
    if storage.is_remote(config.distill.cache):
        raise UserError(f"{config.distill.cache}: a cache is written to a disk; copy it then")


class _Writer:
    """This host's shards of a cache, each of `steps` batches of the plan."""

    def __init__(self, config: ConfigDict, source: Source, folder: Path, groups: int):
        self._config, self._source, self._folder = config, source, folder
        self._samples = groups * config.data.grid_group
        self._fields = distill.lesson_fields(config)
        batch = config.train.batch_size
        self._steps = max(1, SHARD_BYTES // (record_size(self._fields) * batch))
        self.shards = -(-self._samples // (self._steps * batch))

    def write_missing(self) -> None:
        own = range(parallel.host_index(), self.shards, parallel.host_count())
        paths = {number: self._folder / shard_name(number, self.shards) for number in own}
        missing = [number for number, path in paths.items() if not path.exists()]
        if not missing:
            return
        mesh = parallel.make_mesh(self._config, jax.local_devices())
        frozen = distill.load_teacher(self._config, mesh)
        see = teacher_program(self._config, mesh)
        total = len(own) * self._steps
        with progress_bar(total, desc="caching", unit="batch") as bar:
            bar.update((len(own) - len(missing)) * self._steps)
            for number in missing:
                self._write(number, paths[number], lambda batch: see(frozen, batch), mesh, bar)

    def _write(self, number: int, path: Path, see: Callable, mesh: Mesh, bar) -> None:
        config = self._config
        first = number * self._steps
        left = min(
            self._steps * config.train.batch_size, self._samples - first * config.train.batch_size
        )
        unfinished = path.with_name(f".{path.name}.unfinished")
        writer = ArrayRecordWriter(str(unfinished), "group_size:1,uncompressed")
        try:
            with train_batches(config, self._source, start_step=first) as batches:
                while left > 0:
                    batch = next(batches)
                    placed = {name: batch[name] for name in ("patches", "grid")}
                    lesson = jax.device_get(see(parallel.put(placed, mesh)))
                    for row in range(min(left, config.train.batch_size)):
                        writer.write(pack({k: x[row] for k, x in lesson.items()}, self._fields))
                    left -= config.train.batch_size
                    bar.update(1)
        finally:
            writer.close()
        os.replace(unfinished, path)


def teacher_program(config: ConfigDict, mesh: Mesh) -> Callable:
    """(frozen, {"patches", "grid"}) -> the arrays of `distill.lesson_fields`, [B, ...]."""
    objective = make_objective(config, admissible_grids(config), parallel.platform_of(mesh))
    everywhere = jax.tree.map(lambda x: x.sharding, distill.abstract_teacher(config, mesh))
    cut = parallel.by_clip(mesh)
    return jax.jit(
        parallel.on_mesh(objective.cached_lesson, mesh),
        in_shardings=(everywhere, cut),
        out_shardings=cut,
        compiler_options=parallel.compiler_options(mesh),
    )
