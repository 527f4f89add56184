"""`--mode=preflight`: whether a run compiles and fits, on a machine without an accelerator.

    python -m fluxvit_jax.main --mode=preflight --config=configs/k400.py:base \
        --config.preflight.topology=v5e:4x4,cpu:8,current

For each topology the config's training step and evaluation programs are compiled with shapes in
place of arrays, and read: memory, work, exchanges between devices, and for TPUs an estimated time.
With the cost of reading a clip on this machine that gives the load of a host, and with the schedule
the hours of the run. It prints a summary; `preflight.json` has every number.
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from fluxvit_jax.data.clip_cost import ClipCost, clip_cost
from fluxvit_jax.data.splits import count_classes
from fluxvit_jax.distributed import atomic, storage
from fluxvit_jax.distributed.mesh import clip_shards, make_mesh
from fluxvit_jax.errors import UserError
from fluxvit_jax.evaluation.settings import Setting, settings_of
from fluxvit_jax.objectives.base import check_objective, objective_class
from fluxvit_jax.preflight.compiler import topology
from fluxvit_jax.preflight.compiler.estimate import METHOD
from fluxvit_jax.preflight.compiler.topology import Topology
from fluxvit_jax.preflight.largest_batch import largest_batch
from fluxvit_jax.preflight.programs import evaluation_report, training_report
from fluxvit_jax.preflight.target import TRAIN, Target, announced, evaluation_name
from fluxvit_jax.preflight.text import clip_text, text_of
from fluxvit_jax.training.setup import check_batch_size, run_length
from fluxvit_jax.training.train_state import check_params_divide

REPORT = "preflight.json"

Report = dict[str, Any]


def run(config: ConfigDict, workdir: str | os.PathLike = ".") -> int:
    """Compiles for every topology of `config.preflight.topology`; prints and writes the results.

    Returns the exit status: 0 if everything fits on each of them, else 1.

    Raises UserError: an unknown topology, no libtpu, a folder that cannot be written.
    """
    check_objective(config)
    config = count_classes(config)
    folder = storage.path_of(workdir)
    storage.make_folder(folder)
    requested = topology.parse(config.preflight.topology)
    opened = topology.open_devices(requested)
    with announced("measuring what reading a clip takes"):
        objective = objective_class(config)
        clip = clip_cost(config, objective.open_training, objective.text_arrays(config))
    print(clip_text(dataclasses.asdict(clip)))
    topologies: dict[str, Report] = {}
    report = {
        "versions": _versions(),
        "clip": dataclasses.asdict(clip),
        "method": METHOD,
        "topologies": topologies,
    }
    path = folder / REPORT

    def tell(name: str, checked: Report) -> None:
        before = f"{text_of(name, topologies[name])}\n" if name in topologies else ""
        topologies[name] = dict(checked)
        atomic.write(path, json.dumps(report, indent=1) + "\n")
        print(text_of(name, checked).removeprefix(before), flush=True)

    for where, devices in zip(requested, opened, strict=True):
        try:
            checked = check(config, where, devices, clip, tell=functools.partial(tell, where.name))
        except UserError as error:  # about this topology only
            checked = {"fits": False, "error": str(error)}
        tell(where.name, checked)
    print(f"\n{METHOD}\nwritten to {path}")
    return 0 if all(checked["fits"] for checked in topologies.values()) else 1


def _versions() -> dict[str, str]:
    versions = {}
    for name in ("jax", "libtpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def check(
    config: ConfigDict,
    where: Topology,
    devices: Sequence[jax.Device],
    clip: ClipCost,
    settings: Sequence[Setting] | None = None,
    tell: Callable[[Report], None] = lambda report: None,
) -> Report:
    """The report of one topology.

    settings: of the evaluation; by default those of `config`, none where no classifier is trained.
    tell: is given the report before the search for the largest batch, which compiles the training
    step several times.

    Raises UserError where the config does not fit the topology.
    """
    target = Target(config, where, make_mesh(config, devices))
    check_params_divide(config, target.mesh)
    check_batch_size(config, clip_shards(target.mesh))
    training = target.compile_training(config)
    programs = {TRAIN: training_report(target, training)}
    report: Report = {
        "fits": training.fits,
        "devices": len(devices),
        "device": devices[0].device_kind,
        "hosts": topology.hosts(devices),
        "mesh": dict(target.mesh.shape),
        "batch_size": config.train.batch_size,
        "clips_a_device": config.train.batch_size / len(devices),
        "programs": programs,
    }
    if settings is None:
        settings = settings_of(config) if objective_class(config).labelled else ()
    for setting in dict.fromkeys(settings):
        evaluation = evaluation_report(target, setting, target.compile_evaluation(setting))
        programs[evaluation_name(setting)] = evaluation
        report["fits"] &= evaluation["fits"]
    if training.time is not None:
        report["reading"] = _reading(target, training.time.seconds, clip)
        report["schedule"] = _schedule(target, training.time.seconds, clip)
    if (
        config.preflight.find_max_batch_size
        and training.available is not None
        and not training.failure
    ):
        tell(report)
        report["largest_batch"] = largest_batch(target, training)
    return report


def _reading(target: Target, step_seconds: float, clip: ClipCost) -> Report:
    """The load of reading on each host, if the devices are never to wait."""
    clips = target.config.train.batch_size / step_seconds / topology.hosts(target.devices)
    return {
        "clips_per_second_a_host": clips,
        "cores_a_host": clips * clip.cpu_seconds,
        "cores_there_are": target.where.known_chip.host_cores,
        "bytes_per_second_a_host": clips * clip.bytes if clip.bytes else None,
    }


def _schedule(target: Target, step_seconds: float, clip: ClipCost) -> Report:
    """Hours of the training steps alone; None where the number of videos is not known."""
    config = target.config
    videos = clip.videos or config.preflight.videos
    if not videos:
        return {"videos": None, "steps": None, "hours": None, "chip_hours": None}
    steps = run_length(config, videos).total
    hours = steps * step_seconds / 3600
    return {
        "videos": videos,
        "steps": steps,
        "hours": hours,
        "chip_hours": hours * len(target.devices),
    }
