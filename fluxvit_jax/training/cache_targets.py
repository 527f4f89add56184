"""Cache of the teacher's targets for every clip of a plan: `--mode=cache`.

    python -m fluxvit_jax.main --mode=cache --config=configs/pretrain.py:base,data=mixture.csv \
        --config.data.sampling_period_epochs=1 --config.distill.teacher=teacher \
        --config.distill.cache=DIR

`data.teacher_targets` describes the files. Several hosts share the shards. Finished shards stay, so
that an interrupted run resumes.
"""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from jax.sharding import Mesh
from jax.stages import Wrapped
from ml_collections import ConfigDict
from tqdm import tqdm

from fluxvit_jax.config.grids import admissible_grids
from fluxvit_jax.convert import official_names
from fluxvit_jax.data.pipeline import plan_groups, train_batches, training_source
from fluxvit_jax.data.sources import Source
from fluxvit_jax.data.supervised_workers import Quarantine
from fluxvit_jax.data.teacher_targets import (
    ABOUT,
    check_plan,
    check_teacher,
    pack,
    plan_of,
    read_about,
    record_size,
    shard_name,
)
from fluxvit_jax.distributed import atomic, storage
from fluxvit_jax.distributed.console import progress_bar, say
from fluxvit_jax.distributed.hosts import barrier, raise_on_all_hosts
from fluxvit_jax.distributed.mesh import (
    batch_sharding,
    compiler_options,
    host_count,
    host_index,
    make_mesh,
    platform_of,
    shard_batch,
    traced_on_mesh,
)
from fluxvit_jax.distributed.watchdog import Watchdog
from fluxvit_jax.errors import UserError
from fluxvit_jax.objectives.base import check_objective, objective_class
from fluxvit_jax.objectives.flux_umt import FluxUMT
from fluxvit_jax.objectives.flux_umt_teacher import (
    abstract_teacher,
    check_teacher_named,
    put_teacher,
    read_teacher,
    target_fields,
)
from fluxvit_jax.training.train_step import make_objective

SHARD_BYTES = 200 << 20  # approximate size of a shard


def run(config: ConfigDict, _: str | None = None) -> int:
    """Writes the cache `config.distill.cache`; returns the exit status, 0.

    Raises UserError: no teacher, no plan, a folder with the cache of another plan or teacher, a
    full disk.
    """
    _check(config)
    with storage.write_errors(config.distill.cache):
        return _run(config)


def _run(config: ConfigDict) -> int:
    folder = Path(config.distill.cache)
    with raise_on_all_hosts():
        source = training_source(config, labelled=False)
        plan, groups = plan_of(config, source), plan_groups(config, source)
        if not groups:
            raise UserError(
                f"config.data.sampling_period_epochs: {config.data.sampling_period_epochs} epochs "
                f"of {len(source)} videos make no group of {config.data.clips_per_grid} clips"
            )
        if (before := read_about(storage.path_of(folder))) is not None:
            check_plan(storage.path_of(folder), before, plan)
            check_teacher(storage.path_of(folder), before, config)
            if before["finished"]:
                say(f"{folder} is finished: {before['samples']} samples")
                return 0
        teacher = read_teacher(config)
        fingerprint = official_names.fingerprint(teacher)
        if before is not None and before.get("fingerprint", fingerprint) != fingerprint:
            raise UserError(
                f"{folder} was begun with other weights than those that {config.distill.teacher} "
                "holds now; put them back, or name another folder"
            )
        folder.mkdir(parents=True, exist_ok=True)
    writer = _Writer(config, source, folder, groups, teacher)
    about = {
        "finished": False,
        "plan": plan,
        "teacher": config.distill.teacher,
        "fingerprint": fingerprint,
        "samples": groups * config.data.clips_per_grid,
        "shards": writer.shards,
        "fields": target_fields(config),
    }
    _write_about(folder, about)  # before the first shard, so that shards belong to one plan only
    with Watchdog(config.log.watchdog_seconds, folder) as watchdog:
        writer.write_missing(watchdog)
    barrier()
    _write_about(folder, about | {"finished": True})
    say(f"{about['samples']} samples in {writer.shards} shards written to {folder}")
    return 0


def _write_about(folder: Path, about: dict[str, Any]) -> None:
    if host_index() == 0:
        atomic.write(folder / ABOUT, json.dumps(about, indent=1) + "\n")
    barrier()


def _check(config: ConfigDict) -> None:
    if objective_class(config) is not FluxUMT or not config.distill.cache:
        raise UserError(
            "nothing to cache: take a recipe of distillation, such as configs/pretrain.py, and add "
            "--config.distill.cache=DIR"
        )
    check_objective(config)
    if not config.data.train:
        raise UserError("no training data: add --config.data.train=LIST")
    check_teacher_named(config)
    if storage.is_remote(config.distill.cache):
        raise UserError(f"{config.distill.cache}: a cache is written to a disk; copy it then")


class _Writer:
    """This host's shards of a cache, each of `steps` batches of the plan."""

    def __init__(
        self,
        config: ConfigDict,
        source: Source,
        folder: Path,
        groups: int,
        teacher: dict[str, Any],
    ):
        """groups: of the plan; teacher: its parameters."""
        self._config, self._source, self._folder = config, source, folder
        self._teacher = teacher
        self._samples = groups * config.data.clips_per_grid
        self._quarantine: Quarantine = {}  # clips that hung or crashed their reader
        self._fields = target_fields(config)
        batch = config.train.batch_size
        self._steps = max(1, SHARD_BYTES // (record_size(self._fields) * batch))
        self.shards = math.ceil(self._samples / (self._steps * batch))

    def write_missing(self, watchdog: Watchdog) -> None:
        local_shards = range(host_index(), self.shards, host_count())
        paths = {number: self._folder / shard_name(number, self.shards) for number in local_shards}
        missing = [number for number, path in paths.items() if not path.exists()]
        if not missing:
            return
        mesh = make_mesh(self._config, jax.local_devices())
        frozen = put_teacher(self._teacher, self._config, mesh, FluxUMT.partition_rules)
        program = teacher_program(self._config, mesh)

        def targets_of(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            inputs = {name: batch[name] for name in ("patches", "grid")}
            targets = jax.device_get(program(frozen, shard_batch(inputs, mesh)))
            watchdog.alive()
            return targets

        total = len(local_shards) * self._steps
        with progress_bar(total, desc="caching", unit="batch") as bar:
            bar.update((len(local_shards) - len(missing)) * self._steps)
            for number in missing:
                self._write(number, paths[number], targets_of, bar)

    def _write(
        self,
        number: int,
        path: Path,
        targets_of: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]],
        bar: tqdm,
    ) -> None:
        config = self._config
        first = number * self._steps
        left = min(
            self._steps * config.train.batch_size, self._samples - first * config.train.batch_size
        )
        unfinished = path.with_name(f".{path.name}.unfinished")
        writer = ArrayRecordWriter(str(unfinished), "group_size:1,uncompressed")
        try:
            with train_batches(
                config, self._source, start_step=first, quarantine=self._quarantine
            ) as batches:
                while left > 0:
                    targets = targets_of(next(batches))
                    for row in range(min(left, config.train.batch_size)):
                        writer.write(pack({k: x[row] for k, x in targets.items()}, self._fields))
                    left -= config.train.batch_size
                    bar.update(1)
        finally:
            writer.close()
        os.replace(unfinished, path)


def teacher_program(config: ConfigDict, mesh: Mesh) -> Wrapped:
    """The jitted program (frozen, {"patches", "grid"}) -> arrays of `target_fields`, [B, ...]."""
    objective = make_objective(config, admissible_grids(config), platform_of(mesh))
    assert isinstance(objective, FluxUMT)
    frozen_shardings = jax.tree.map(
        lambda x: x.sharding, abstract_teacher(config, mesh, FluxUMT.partition_rules)
    )
    by_clip = batch_sharding(mesh)
    return jax.jit(
        traced_on_mesh(objective.targets_to_cache, mesh),
        in_shardings=(frozen_shardings, by_clip),
        out_shardings=by_clip,
        compiler_options=compiler_options(mesh),
    )
