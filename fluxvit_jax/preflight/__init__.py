"""Would a run compile, fit and make sense: `--mode=preflight`, on a machine without accelerator.

    python -m fluxvit_jax.main --mode=preflight --config=configs/k400.py:base \
        --config.preflight.topology=v5e:4x4,cpu:8,current

For each topology the training step and the evaluation programs that the config would run are
compiled, with shapes in place of arrays, and read: memory, work, exchanges between devices, and for
TPUs a time. With what reading a clip costs on this machine that makes the load of a host, and with
the schedule the hours of the run. Printed is a summary; `preflight.json` has every number.
"""

import contextlib
import importlib.metadata
import json
import os
from collections.abc import Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from fluxvit_jax import atomic, parallel, sharding, storage
from fluxvit_jax.compiler import topology
from fluxvit_jax.compiler.estimate import METHOD
from fluxvit_jax.compiler.topology import Topology
from fluxvit_jax.config import is_distillation
from fluxvit_jax.data.load import ClipCost, clip_cost
from fluxvit_jax.errors import UserError
from fluxvit_jax.evaluate import Setting, settings_of
from fluxvit_jax.preflight.largest_batch import largest_batch
from fluxvit_jax.preflight.programs import evaluation_report, training_report
from fluxvit_jax.preflight.target import TRAIN, Target, announced, evaluation_name
from fluxvit_jax.preflight.text import clip_text, text_of
from fluxvit_jax.state import abstract_params
from fluxvit_jax.train import check_batch_size, run_length

REPORT = "preflight.json"

Report = dict[str, Any]


def run(config: ConfigDict, workdir: str | os.PathLike = ".") -> int:
    """Compiles for every topology of `config.preflight.topology`; prints and writes what came out.

    Returns the exit status: 0 if everything fits on each of them, else 1.

    Raises UserError: an unknown topology, no libtpu, a folder that cannot be written.
    """
    folder = storage.path_of(workdir)
    storage.make_folder(folder)
    wanted = topology.parse(config.preflight.topology)
    found = topology.open_devices(wanted)
    with announced("measuring what reading a clip takes"):
        clip = clip_cost(config)
    print(clip_text(clip._asdict()))
    report = {
        "versions": _versions(),
        "clip": clip._asdict(),
        "method": METHOD,
        "topologies": {},
    }
    for one, devices in zip(wanted, found, strict=True):
        try:
            own = check(config, one, devices, clip)
        except UserError as error:  # about this topology: the others go on
            own = {"fits": False, "error": str(error)}
        report["topologies"][one.name] = own
        print(text_of(one.name, own), flush=True)
    path = folder / REPORT
    atomic.write(path, json.dumps(report, indent=1) + "\n")
    print(f"\n{METHOD}\nwritten to {path}")
    return 0 if all(own["fits"] for own in report["topologies"].values()) else 1


def _versions() -> dict[str, str | None]:
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
) -> Report:
    """What is found for one topology.

    settings: of the evaluation; by default those of `config`, none where no classifier is trained.

    Raises UserError where the config does not go with it.
    """
    target = Target(config, where, parallel.make_mesh(config, devices))
    sharding.check(config, abstract_params(config), target.mesh)
    check_batch_size(config, parallel.clip_shards(target.mesh))
    training = target.compile_training(config)
    report = {
        "fits": training.fits,
        "devices": len(devices),
        "device": devices[0].device_kind,
        "hosts": topology.hosts(devices),
        "mesh": dict(target.mesh.shape),
        "batch_size": config.train.batch_size,
        "clips_a_device": config.train.batch_size / len(devices),
        "programs": {TRAIN: training_report(target, training)},
    }
    if settings is None:
        settings = () if is_distillation(config) else settings_of(config)
    for setting in dict.fromkeys(settings):
        evaluation = target.compile_evaluation(setting)
        own = evaluation_report(target, setting, evaluation)
        report["programs"][evaluation_name(setting)] = own
        report["fits"] &= own["fits"]
    if config.preflight.bisect and training.available is not None and not training.failure:
        report["largest_batch"] = largest_batch(target, training)
    if training.time is not None:
        report["reading"] = _reading(target, training.time.seconds, clip)
        report["schedule"] = _schedule(target, training.time.seconds, clip)
    return report


def _reading(target: Target, step_seconds: float, clip: ClipCost) -> Report:
    """What each host has to read so that the devices never wait."""
    clips = target.config.train.batch_size / step_seconds / topology.hosts(target.devices)
    return {
        "clips_per_second_a_host": clips,
        "cores_a_host": clips * clip.cpu_seconds,
        "cores_there_are": target.where.chip.host_cores,
        "bytes_per_second_a_host": clips * clip.bytes if clip.bytes else None,
    }


def _schedule(target: Target, step_seconds: float, clip: ClipCost) -> Report:
    """Hours of training alone; None where the number of videos is not known."""
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
