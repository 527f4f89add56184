"""Asynchronous Orbax checkpoints with SHA-256 checksums that are verified before a restore.

A step is the folder `WORKDIR/checkpoints/STEP/` of Orbax items: `state` (the training state),
`data` (position of the data iterator), `config`, `metrics`. Orbax writes into a temporary folder
and renames it at the end. Just before the rename we add `checksums.json`: size and SHA-256 of every
file of the items. So a step appears together with its checksums or not at all, and a kill at any
moment leaves earlier steps intact. Orbax itself restores flipped bits silently, so no function here
reads a step before its checksums are verified.
"""

import hashlib
import json
import logging as python_logging
import math
import os
import re
import sys
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

from fluxvit_jax.config import versions
from fluxvit_jax.convert.official_names import describe_faults
from fluxvit_jax.distributed import atomic, storage
from fluxvit_jax.distributed.hosts import broadcast_from_host0, check_shared, compute_on_host0
from fluxvit_jax.errors import UserError

Tree = Any

FOLDER = "checkpoints"
CHECKSUMS = "checksums.json"
METRICS = "metrics"  # Orbax's item, and the file in it
# The metric that chooses the best step: validation accuracy, or in its place mAP, or a loss with a
# minus.
BEST = "top1"
NO_CHECKPOINT, ALL_DAMAGED = -1, -2  # instead of a step


def _hide_save_errors() -> None:
    """Hides the tracebacks of a save that fails: the same is raised, as one line.

    Orbax logs each of its threads and operations, asyncio each task that Orbax leaves behind, and
    TensorStore prints what its own threads cannot hand back to a loop that Orbax has closed.
    """
    python_logging.getLogger("absl").addFilter(
        lambda record: record.levelno < python_logging.ERROR or "/orbax/" not in record.pathname
    )
    python_logging.getLogger("asyncio").addFilter(
        lambda record: "exception was never retrieved" not in record.getMessage()
    )
    show = sys.unraisablehook

    def show_others(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            show(unraisable)

    sys.unraisablehook = show_others


_hide_save_errors()


class Checkpoints:
    """Context manager of a run's checkpoints, on every host; leaving it waits for a pending save.

    Args:
        workdir: folder of the run.
        keep: number of the latest steps to keep, in addition to the best one.
        every: steps between two saves, for `due`.
    """

    def __init__(self, workdir: str | epath.Path, keep: int, every: int):
        self._folder = _absolute(workdir) / FOLDER
        self._keep = keep
        self._every = every
        self._saving: int | None = None  # the step that Orbax writes or wrote last
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
    ) -> None:
        """Starts to save `step`; returns once the arrays are copied, so `state` may be donated.

        First waits for a pending save. A step that exists already is left as it is. `rate` adds
        what its validation finds.

        Args:
            step: optimizer steps taken.
            state: {"params", "opt_state", "step"[, "ema"]}, a tree of arrays.
            data_state: position of the data iterator, JSON values. The number of the step is
              added, by which one that was renamed is found out.
            config: the run's configuration.

        Raises:
            UserError: this or the previous save could not be written.
        """
        self.wait()
        manager = self._open()
        if broadcast_from_host0(step in manager.all_steps()):
            return
        self._saving = step
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            data=ocp.args.JsonSave({**data_state, "step": step}),
            config=ocp.args.JsonSave(versions.stamp(_plain(config))),
        )
        with self._write_errors():
            manager.save(step, args=items, metrics={}, force=True)

    def restore_latest(self, abstract_state: Tree) -> tuple[int, Tree, dict[str, Any]] | None:
        """The newest intact step, or None in a workdir without any.

        Newer steps that are damaged are renamed to `STEP.damaged`, with one warning each.

        Args:
            abstract_state: the state as `jax.ShapeDtypeStruct`s; arrays are restored to their
                shardings, or to the default device without one.

        Returns:
            step, state, data_state.

        Raises:
            UserError: every step is damaged; or the step is of another model, with the tensors
                that differ.
        """
        self.close()  # so that Orbax lists the steps again after damaged ones are renamed
        step = compute_on_host0(self._newest_intact)
        if step == NO_CHECKPOINT:
            return None
        if step == ALL_DAMAGED:
            raise UserError(
                f"no checkpoint in {self._folder} is intact; to start over, use another workdir "
                "or delete that folder"
            )
        source = self._folder / str(step)
        check_shared(source)
        check_fit(_stored(source), abstract_state, source)
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
            target = jax.tree.map(_with_sharding, abstract_state)
            state = reader.restore(source / "state", args=ocp.args.StandardRestore(target))
        return step, state, _read_json(source / "data")

    def rate(self, step: int, metrics: Mapping[str, float]) -> None:
        """Gives a saved step the results of its validation, unless it has some.

        metrics: numbers by name; "top1" decides which step is the best. One that was the best goes
        with the next save.

        A kill at any moment leaves the step intact: its checksums are rewritten without the file,
        then the file, then the checksums with it. Raises UserError: it could not be written.
        """
        self.close()  # Orbax reads the metrics when it opens the steps

        def rewrite() -> None:
            folder = self._folder / str(step)
            if _quality_of(folder) > -math.inf:
                return
            path = folder / METRICS / METRICS
            own = str(path.relative_to(folder))
            checksums = storage.parse_json((folder / CHECKSUMS).read_text())
            checksums.pop(own, None)
            _write_json(folder / CHECKSUMS, checksums)
            path.parent.mkdir(exist_ok=True)
            _write_json(path, {name: float(value) for name, value in metrics.items()})
            _write_json(folder / CHECKSUMS, checksums | {own: _checksum(path)})

        self._saving = step
        with self._write_errors():
            compute_on_host0(rewrite)

    def set_aside(self, last_good: int) -> str:
        """Renames the newest of several steps to `STEP.nonfinite`, unless it is before `last_good`.

        All hosts call it. Returns the new path, or "" if nothing is renamed.
        """
        self.close()

        def rename() -> str:
            steps = sorted(_steps(self._folder))
            if len(steps) < 2 or steps[-1] < last_good:
                return ""
            return os.fspath(self._rename(steps[-1], "nonfinite"))

        return compute_on_host0(rename)

    def wait(self) -> None:
        """Returns once a pending save is on disk with its checksums.

        Raises:
            UserError: it could not be written.
        """
        if self._manager is not None:
            with self._write_errors():
                self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then closes Orbax's manager. A later call opens a new one."""
        self.wait()
        if self._manager is not None:
            self._manager.close()
            self._manager = None

    def _open(self) -> ocp.CheckpointManager:
        """Orbax's manager, made on first use, because it deletes files of interrupted saves."""
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
        """Orbax's callback on host 0, after all files are written and before the rename."""
        unfinished = list(self._folder.glob(f"{self._saving}.orbax-checkpoint-tmp*"))
        # Object stores cannot rename. There Orbax writes in place and adds a marker at the end.
        write_checksums(unfinished[0] if unfinished else self._folder / str(self._saving))

    def _newest_intact(self) -> int:
        """The newest intact step, after newer ones, all damaged, are renamed."""
        damaged = {}
        for step in sorted(_steps(self._folder), reverse=True):
            fault = find_fault(self._folder / str(step))
            if fault is None:
                break
            damaged[step] = fault
        else:
            return ALL_DAMAGED if damaged else NO_CHECKPOINT
        for bad, fault in damaged.items():
            path = self._folder / str(bad)
            logging.warning(
                "checkpoint %s is damaged: %s; going on from step %d", path, fault, step
            )
            self._rename(bad, "damaged")
        return step

    def _rename(self, step: int, suffix: str) -> epath.Path:
        """Renames a step so that it is none any more, in place of an earlier one of that name."""
        renamed = self._folder / f"{step}.{suffix}"
        if renamed.exists():
            renamed.rmtree()
        return (self._folder / str(step)).rename(renamed)

    @contextmanager
    def _write_errors(self) -> Iterator[None]:
        """A context that turns errors of a full or missing disk into a UserError of one line."""
        try:
            yield
        except (OSError, ValueError) as error:
            reason = (str(getattr(error, "strerror", "") or error).splitlines() or [repr(error)])[0]
            if code := re.search(r"os_error_code='(\d+)'", reason):  # TensorStore's, after paths
                reason = os.strerror(int(code[1]))
            raise UserError(
                f"checkpoint {self._folder / str(self._saving)} could not be written: {reason}; "
                "those before are intact"
            ) from error


def find_step(path: str | epath.Path) -> epath.Path:
    """The folder of the step to read weights from, chosen by host 0.

    Args:
        path: a workdir (its best step, or the latest if none was evaluated; damaged ones are
            skipped with a warning), or the folder of one step.

    Raises:
        UserError: no checkpoint there, or none that is intact.
    """
    return epath.Path(compute_on_host0(lambda: os.fspath(_find_step(path))))


def _find_step(path: str | epath.Path) -> epath.Path:
    candidates = _candidates(_absolute(path))
    if not candidates:
        raise UserError(f"no checkpoint in {path}")
    faults: dict[epath.Path, str] = {}
    for candidate in candidates:
        fault = find_fault(candidate)
        if fault is None:
            for step, reason in faults.items():
                logging.warning("checkpoint %s is damaged: %s; reading %s", step, reason, candidate)
            return candidate
        faults[candidate] = fault
    raise UserError(f"checkpoint {candidates[0]} is damaged: {faults[candidates[0]]}")


def has_step(path: str | epath.Path) -> bool:
    """Whether `find_step` finds a step in a path, intact or not; host 0 looks."""
    return compute_on_host0(lambda: bool(_candidates(_absolute(path))))


def _candidates(path: epath.Path) -> list[epath.Path]:
    """The step that a path is, or the steps in it, the best first."""
    if path.name.isdigit() and (path / "state").exists():
        return [path]
    folder = path / FOLDER if (path / FOLDER).exists() else path
    ranked = sorted(_steps(folder), key=lambda step: (_quality_of(folder / str(step)), step))
    return [folder / str(step) for step in reversed(ranked)]


def best_step(workdir: str | epath.Path) -> int | None:
    """The step of a workdir that did best in validation; None if none was evaluated.

    It is not verified.
    """
    folder = _absolute(workdir) / FOLDER
    ranked = [(_quality_of(folder / str(step)), step) for step in _steps(folder)]
    quality, step = max(ranked, default=(-math.inf, 0))
    return step if quality > -math.inf else None


class RestoredCheckpoint(NamedTuple):
    """Parameters and configuration of a step, and the step's folder.

    class_names: one for each class of the classifier, or none if the run did not know them.
    frozen: checksums, by name, of weights that the run used and did not train.
    """

    step: epath.Path
    params: dict[str, Any]
    config: dict[str, Any]
    class_names: tuple[str, ...]
    frozen: dict[str, str]


def restore(path: str | epath.Path) -> RestoredCheckpoint:
    """The parameters (their moving average if the run kept one) and the config of their run.

    All checksums are verified once. `path` is as for `find_step`; tuples of the config are lists.

    Raises:
        UserError: no checkpoint there, none that is intact, or one of a later version.
    """
    step = find_step(path)
    config = versions.unstamp(_read_json(step / "config"), step / "config")
    data = _read_json(step / "data")
    names, frozen = data.get("class_names") or (), data.get("frozen") or {}
    return RestoredCheckpoint(step, _read_params(step), config, tuple(names), frozen)


def restore_params(path: str | epath.Path, average: bool = True) -> dict[str, Any]:
    """The parameters of a checkpoint, as numpy arrays in a nested dict.

    Only the parameters are read, after all checksums are verified. `check_fit` tells whether they
    fit a model.

    Args:
        path: as for `find_step`.
        average: take the moving average of the parameters if the run kept one.

    Raises:
        UserError: no checkpoint there, or none that is intact.
    """
    return _read_params(find_step(path), average)


def _read_params(step: epath.Path, average: bool = True) -> dict[str, Any]:
    stored = _stored(step)
    name = "ema" if average and "ema" in stored else "params"
    target = {name: stored[name]}
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), target)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        restored = reader.restore(
            step / "state",
            args=ocp.args.PyTreeRestore(item=target, restore_args=as_numpy, partial_restore=True),
        )
    return restored[name]


def check_fit(found: Tree, expected: Tree, source: str | epath.Path) -> None:
    """Raises UserError, with the tensors that differ, unless both trees have the same tensors.

    Args:
        found: the tensors of `source`; leaves with shape and dtype.
        expected: those of the model; leaves with shape and dtype.
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
    """Writes size and SHA-256 of every file of the step's items into `checksums.json`.

    Orbax's own two files at the top are not covered: it rewrites them when it commits, and they
    hold nothing of the training state.
    """
    files = {
        str(path.relative_to(step)): _checksum(path)
        for item in step.iterdir()
        if item.is_dir()
        for path in _files(item)
    }
    _write_json(step / CHECKSUMS, files)


def find_fault(step: epath.Path) -> str | None:
    """The first fault of a step's files, in a few words; None if they are intact."""
    if not (step / CHECKSUMS).exists():
        return f"it has no {CHECKSUMS}"
    try:
        files = storage.parse_json((step / CHECKSUMS).read_text())
        for name, expected in files.items():
            path = step / name
            if not path.exists():
                return f"{name} is missing"
            found = _checksum(path)
            if found["bytes"] != expected["bytes"]:
                return f"{name} has {found['bytes']} bytes instead of {expected['bytes']}"
            if found["sha256"] != expected["sha256"]:
                return f"the checksum of {name} differs"
        if files and (stored := _read_json(step / "data")["step"]) != int(step.name):
            return f"it is step {stored}, renamed"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"it cannot be read: {error}"
    return None if files else f"{CHECKSUMS} is empty"


def _files(folder: epath.Path) -> Iterator[epath.Path]:
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            yield from _files(path)
        else:
            yield path


def _checksum(path: epath.Path) -> dict[str, Any]:
    """Size and SHA-256 of a file. `path.stat` would fail for a user without a name."""
    with path.open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "bytes": file.tell()}


def _steps(folder: epath.Path) -> list[int]:
    if not storage.is_folder(folder):
        return []
    names = [path.name for path in folder.iterdir() if path.name.isdigit()]
    # In a bucket Orbax writes in place, and a step counts only with its marker.
    return [int(name) for name in names if ocp.utils.is_checkpoint_finalized(folder / name)]


def _quality(metrics: Mapping[str, float]) -> float:
    return metrics.get(BEST, -math.inf)


def _quality_of(step: epath.Path) -> float:
    """Metric for ranking steps before they are verified; one that cannot be read comes last."""
    try:
        return _quality(_read_json(step / METRICS, METRICS))
    except (OSError, ValueError, AttributeError):
        return -math.inf


def _write_json(path: epath.Path, content: Mapping[str, Any]) -> None:
    atomic.write(path, json.dumps(content, indent=1, sort_keys=True))


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


def _with_sharding(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """The leaf with its sharding, or the default device if it has none."""
    sharding = getattr(leaf, "sharding", None)
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _plain(config: ConfigDict | Mapping[str, Any]) -> dict[str, Any]:
    return config.to_dict() if isinstance(config, ConfigDict) else dict(config)


def _absolute(path: str | epath.Path) -> epath.Path:
    path = epath.Path(path)
    return path if path.is_absolute() else path.absolute()
