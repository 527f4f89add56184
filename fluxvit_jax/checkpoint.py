"""Checkpoints: written by Orbax in the background, believed only if their checksums agree.

A step lies in `WORKDIR/checkpoints/STEP/` as Orbax items: `state` (the training state), `data`
(position of the data iterator), `config`, `metrics`. Orbax writes into a temporary folder and
renames it at the end. Just before the rename we put `checksums.json` in: size and SHA-256 of
every file of the items. So a step appears together with its checksums or not at all, and a kill
at any moment leaves the steps before it as they were. Orbax itself restores a flipped bit without
a word, which is why nothing here reads a step before its checksums were compared.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from ml_collections import ConfigDict
from orbax.checkpoint import checkpoint_managers

from fluxvit_jax import distributed
from fluxvit_jax.convert.names import describe_faults
from fluxvit_jax.errors import UserError

Tree = Any

FOLDER = "checkpoints"
CHECKSUMS = "checksums.json"
BEST = "top1"  # the metric that chooses the best step: validation accuracy
NOTHING, ALL_DAMAGED = -1, -2  # instead of a step


class Checkpoints:
    """The checkpoints of one training run; every process of the run makes one.

    A context manager: leaving it waits for the save under way.

    Args:
        workdir: folder of the run.
        keep: so many of the latest steps are kept, and besides them the best.
        every: steps between two saves, for `due`.
    """

    def __init__(self, workdir: str | epath.Path, keep: int, every: int):
        self._folder = _absolute(workdir) / FOLDER
        self._keep = keep
        self._every = every
        self._saving: int | None = None  # the step that Orbax writes or has written last
        self._manager: ocp.CheckpointManager | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def due(self, step: int) -> bool:
        """Whether it is time to save."""
        return step % self._every == 0

    def save(
        self,
        step: int,
        state: Tree,
        data_state: Mapping[str, Any],
        config: ConfigDict | Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Start saving `step`; returns once the arrays are copied, so `state` may be donated.

        Waits first for the save before, should that still run. A step that is there already is
        left as it is, so give `metrics` with the first save of a step.

        Args:
            step: optimiser steps taken.
            state: {"params", "opt_state", "step"[, "ema"]}, a tree of arrays.
            data_state: JSON-able position of the data iterator.
            config: the run's configuration.
            metrics: validation results; "top1" decides which step is the best.

        Raises:
            UserError: this or the previous save could not be written.
        """
        self.wait()
        manager = self._open()
        if distributed.first_host(step in manager.all_steps()):
            return
        self._saving = step
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            data=ocp.args.JsonSave(dict(data_state)),
            config=ocp.args.JsonSave(_plain(config)),
        )
        numbers = {name: float(value) for name, value in (metrics or {}).items()}
        with self._write_errors():
            manager.save(step, args=items, metrics=numbers, force=True)

    def restore_latest(self, abstract_state: Tree) -> tuple[int, Tree, dict[str, Any]] | None:
        """The newest intact step, or None in a workdir without any.

        Damaged steps that are newer are set aside as `STEP.damaged`, with one warning each.

        Args:
            abstract_state: the state as `jax.ShapeDtypeStruct`s; where these have shardings, the
                arrays are restored to them, else to the default device.

        Returns:
            step, state, data_state.

        Raises:
            UserError: every step is damaged; or the step is of another model, with the tensors
                that differ.
        """
        self.close()  # Orbax's list of steps is read anew after damaged ones were set aside
        step = distributed.from_first_host(self._newest_intact)
        if step == NOTHING:
            return None
        if step == ALL_DAMAGED:
            raise UserError(
                f"no checkpoint in {self._folder} is intact; to start over, use another workdir "
                "or delete that folder"
            )
        source = self._folder / str(step)
        distributed.check_shared(source)
        check_fit(_stored(source), abstract_state, source)
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
            placed = jax.tree.map(_placed, abstract_state)
            state = reader.restore(source / "state", args=ocp.args.StandardRestore(placed))
        return step, state, _read_json(source / "data")

    def wait(self) -> None:
        """Until the save under way, if any, is on disk with its checksums.

        Raises:
            UserError: it could not be written.
        """
        if self._manager is not None:
            with self._write_errors():
                self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait, then let go. A later call opens everything anew."""
        self.wait()
        if self._manager is not None:
            self._manager.close()
            self._manager = None

    def _open(self) -> ocp.CheckpointManager:
        """Orbax's manager, made late: it deletes what an interrupted save has left behind."""
        if self._manager is None:
            keep = checkpoint_managers.AnyPreservationPolicy(
                [
                    checkpoint_managers.LatestN(self._keep),
                    checkpoint_managers.BestN(
                        get_metric_fn=_quality, n=1, keep_checkpoints_without_metrics=False
                    ),
                ]
            )
            options = ocp.CheckpointManagerOptions(
                preservation_policy=keep,
                best_fn=_quality,  # without it, metrics are not stored
                cleanup_tmp_directories=True,
                async_options=ocp.options.AsyncOptions(
                    post_finalization_callback=self._add_checksums
                ),
            )
            self._manager = ocp.CheckpointManager(self._folder, options=options)
        return self._manager

    def _add_checksums(self) -> None:
        """Called by Orbax on the first process: all is written, the step not yet renamed."""
        unfinished = list(self._folder.glob(f"{self._saving}.orbax-checkpoint-tmp*"))
        # Object stores cannot rename: there Orbax writes in place and adds a marker at the end.
        write_checksums(unfinished[0] if unfinished else self._folder / str(self._saving))

    def _newest_intact(self) -> int:
        """The newest good step, after setting aside what is damaged and newer."""
        damaged = {}
        for step in sorted(_steps(self._folder), reverse=True):
            fault = find_fault(self._folder / str(step))
            if fault is None:
                break
            damaged[step] = fault
        else:
            return ALL_DAMAGED if damaged else NOTHING
        for bad, fault in damaged.items():
            path = self._folder / str(bad)
            logging.warning(
                "checkpoint %s is damaged: %s; going on from step %d", path, fault, step
            )
            aside = self._folder / f"{bad}.damaged"
            if aside.exists():
                aside.rmtree()
            path.rename(aside)
        return step

    @contextmanager
    def _write_errors(self) -> Iterator[None]:
        """What a full or vanished disk raises, in one line."""
        try:
            yield
        except (OSError, ValueError) as error:
            reason = (str(error).splitlines() or [repr(error)])[0]
            raise UserError(
                f"checkpoint {self._folder / str(self._saving)} could not be written: {reason}"
            ) from error


def find_step(path: str | epath.Path) -> epath.Path:
    """The folder of the step to read weights from, as host 0 finds it.

    Args:
        path: a workdir (then its best step, or where no step was evaluated the latest; damaged
            ones are passed over with a warning), or the folder of one step.

    Raises:
        UserError: no checkpoint there, or none that is intact.
    """
    return epath.Path(distributed.from_first_host(lambda: os.fspath(_find_step(path))))


def _find_step(path: str | epath.Path) -> epath.Path:
    path = _absolute(path)
    if path.name.isdigit() and (path / "state").exists():
        candidates = [path]
    else:
        folder = path / FOLDER if (path / FOLDER).exists() else path
        ranked = sorted(_steps(folder), key=lambda step: (_quality_of(folder / str(step)), step))
        candidates = [folder / str(step) for step in reversed(ranked)]
    if not candidates:
        raise UserError(f"no checkpoint in {path}")
    faults = {}
    for candidate in candidates:
        fault = find_fault(candidate)
        if fault is None:
            for step, reason in faults.items():
                logging.warning("checkpoint %s is damaged: %s; reading %s", step, reason, candidate)
            return candidate
        faults[candidate] = fault
    raise UserError(f"checkpoint {candidates[0]} is damaged: {faults[candidates[0]]}")


class Trained(NamedTuple):
    """What `restore` finds: the folder of the step, its parameters and its configuration."""

    step: epath.Path
    params: dict[str, Any]
    config: dict[str, Any]


def restore(path: str | epath.Path) -> Trained:
    """The parameters (their moving average where the run kept one) and what they were trained with.

    All checksums are compared, once. `path` is as for `find_step`; tuples of the config are lists.

    Raises:
        UserError: no checkpoint there, or none that is intact.
    """
    step = find_step(path)
    return Trained(step, _read_params(step), _read_json(step / "config"))


def restore_params(path: str | epath.Path, average: bool = True) -> dict[str, Any]:
    """The parameters of a checkpoint, as numpy arrays in a nested dict.

    Nothing but the parameters is read (and all checksums compared); whether they fit a model,
    `check_fit` tells.

    Args:
        path: as for `find_step`.
        average: the moving average where the run kept one, else the parameters themselves.

    Raises:
        UserError: no checkpoint there, or none that is intact.
    """
    return _read_params(find_step(path), average)


def _read_params(step: epath.Path, average: bool = True) -> dict[str, Any]:
    stored = _stored(step)
    name = "ema" if average and "ema" in stored else "params"
    wanted = {name: stored[name]}
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        restored = reader.restore(
            step / "state",
            args=ocp.args.PyTreeRestore(item=wanted, restore_args=as_numpy, partial_restore=True),
        )
    return restored[name]


def check_fit(found: Tree, expected: Tree, source: str | epath.Path) -> None:
    """UserError unless both trees have the same tensors, naming those that differ.

    Args:
        found: what `source` holds; leaves with shape and dtype.
        expected: what the model wants; leaves with shape and dtype.
        source: file or folder, for the message.
    """
    found, expected = _by_name(found), _by_name(expected)
    different = [
        f"{name} {_describe(found[name])} instead of {_describe(leaf)}"
        for name, leaf in expected.items()
        if name in found and _describe(found[name]) != _describe(leaf)
    ]
    faults = describe_faults(
        {
            "missing": [name for name in expected if name not in found],
            "unexpected": [name for name in found if name not in expected],
            "wrong shape": different,
        }
    )
    if faults:
        raise UserError(f"checkpoint {source} is of another model; {faults}")


def write_checksums(step: epath.Path) -> None:
    """Write size and SHA-256 of every file of the step's items into `checksums.json`.

    Orbax's own two files at the top are not covered: it rewrites them when it commits, and
    nothing of the training state is in them.
    """
    files = {
        str(path.relative_to(step)): _sum_up(path)
        for item in step.iterdir()
        if item.is_dir()
        for path in _files(item)
    }
    (step / CHECKSUMS).write_text(json.dumps(files, indent=1, sort_keys=True))


def find_fault(step: epath.Path) -> str | None:
    """What is wrong with the files of a step, in a few words; None where all is well."""
    if not (step / CHECKSUMS).exists():
        return f"it has no {CHECKSUMS}"
    try:
        files = json.loads((step / CHECKSUMS).read_text())
        for name, expected in files.items():
            path = step / name
            if not path.exists():
                return f"{name} is missing"
            found = _sum_up(path)
            if found["bytes"] != expected["bytes"]:
                return f"{name} has {found['bytes']} bytes instead of {expected['bytes']}"
            if found["sha256"] != expected["sha256"]:
                return f"the checksum of {name} differs"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"it cannot be read: {error}"
    return None if files else f"{CHECKSUMS} is empty"


def _files(folder: epath.Path) -> Iterator[epath.Path]:
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            yield from _files(path)
        else:
            yield path


def _sum_up(path: epath.Path) -> dict[str, Any]:
    """Size and SHA-256 of a file. Not by `path.stat`, which fails where the user has no name."""
    with path.open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "bytes": file.tell()}


def _steps(folder: epath.Path) -> list[int]:
    if not folder.exists():
        return []
    names = [path.name for path in folder.iterdir() if path.name.isdigit()]
    # In a bucket Orbax writes in place: until its marker is there, a step is not.
    return [int(name) for name in names if ocp.utils.is_checkpoint_finalized(folder / name)]


def _quality(metrics: Mapping[str, float]) -> float:
    return metrics.get(BEST, -math.inf)


def _quality_of(step: epath.Path) -> float:
    """For ranking only, before anything is verified; a step that cannot be read comes last."""
    try:
        return _quality(_read_json(step / "metrics", "metrics"))
    except (OSError, ValueError, AttributeError):
        return -math.inf


def _read_json(item: epath.Path, filename: str | None = None) -> dict[str, Any]:
    return ocp.JsonCheckpointHandler(filename).restore(item)


def _stored(step: epath.Path) -> Tree:
    """Shapes and dtypes of the state of a step, without reading the arrays."""
    return ocp.StandardCheckpointHandler().metadata(step / "state").tree


def _by_name(tree: Tree) -> dict[str, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _describe(leaf: Any) -> str:
    return f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"


def _placed(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """The leaf with a sharding: its own, or the default device."""
    sharding = getattr(leaf, "sharding", None)
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _plain(config: ConfigDict | Mapping[str, Any]) -> dict[str, Any]:
    return config.to_dict() if isinstance(config, ConfigDict) else dict(config)


def _absolute(path: str | epath.Path) -> epath.Path:
    path = epath.Path(path)
    return path if path.is_absolute() else path.absolute()
