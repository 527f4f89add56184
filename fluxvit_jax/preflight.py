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
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from fluxvit_jax import atomic, optim, parallel, sharding, storage
from fluxvit_jax.budgets import PATCH
from fluxvit_jax.compiler import topology
from fluxvit_jax.compiler.estimate import METHOD
from fluxvit_jax.compiler.memory import tree_bytes
from fluxvit_jax.compiler.program import Program, compile_for
from fluxvit_jax.compiler.topology import Topology
from fluxvit_jax.config import admissible_grids, model_config
from fluxvit_jax.costs import GIGA, gflops
from fluxvit_jax.data.load import ClipCost, clip_cost
from fluxvit_jax.errors import UserError
from fluxvit_jax.evaluate import Setting, predictor, settings_of, tokens_kept
from fluxvit_jax.models.fluxvit import PATCH_VALUES
from fluxvit_jax.preflight_text import clip_text, text_of
from fluxvit_jax.state import abstract_params, abstract_state
from fluxvit_jax.step import abstract_batch, make_objective, make_train_step
from fluxvit_jax.train import check_batch_size, run_length

REPORT = "preflight.json"
TRAIN = "training step"
BACKWARD = 3  # a training step is worth so many forward passes
MULTIPLY_ADD = 2  # FLOPs
PROBES = 4  # compiles at most, in search of the largest batch
GROWTH = 8  # of the batch from one to the next, at most
SMALL = 64 * 1024  # bytes: exchanges of metrics and the like, where gradients are megabytes
UNKNOWN_STEPS = 1000  # of a schedule whose length is not known; no program depends on it

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
    with _announced("measuring what reading a clip takes"):
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

    settings: of the evaluation; by default those of `config`.

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
        "programs": {TRAIN: _training_report(target, training)},
    }
    for setting in dict.fromkeys(settings_of(config) if settings is None else settings):
        evaluation = target.compile_evaluation(setting)
        own = _evaluation_report(target, setting, evaluation)
        report["programs"][_name(setting)] = own
        report["fits"] &= own["fits"]
    if config.preflight.bisect and training.available is not None and not training.failure:
        report["largest_batch"] = _largest_batch(target, training)
    if training.time is not None:
        report["reading"] = _reading(target, training.time.seconds, clip)
        report["schedule"] = _schedule(target, training.time.seconds, clip)
    return report


# ---------------------------------------------------------------------------------------------
# Compiling


class Target:
    """What a config's programs are compiled for."""

    def __init__(self, config: ConfigDict, where: Topology, mesh: Mesh):
        self.config = config
        self.where = where
        self.mesh = mesh
        self.devices = list(mesh.devices.flat)
        # Schedules of other lengths make the same program.
        self.optimizer = optim.make_optimizer(config, UNKNOWN_STEPS, abstract_params(config))
        self.state = abstract_state(config, self.optimizer, mesh)
        self.params = self.state["params"]

    @property
    def unit(self) -> int:
        """A batch has a multiple of so many clips."""
        config = self.config
        return config.data.grid_group * config.train.accumulate * parallel.clip_shards(self.mesh)

    def compile_training(self, config: ConfigDict) -> Program:
        """The training step of `config`, which is this one with another batch size."""
        with self._announced(f"{TRAIN}, {config.train.batch_size} clips"):
            grids = admissible_grids(config)
            objective = make_objective(config, grids, parallel.platform_of(self.mesh))
            step = make_train_step(config, objective, self.optimizer, self.mesh)
            lowered = step.lower(self.state, abstract_batch(config, grids, self.mesh))
            return compile_for(lowered, self.where, self.devices)

    def compile_evaluation(self, setting: Setting) -> Program:
        """One view of a batch of videos, as `evaluate` runs it."""
        config, mesh = self.config, self.mesh
        with self._announced(_name(setting)):
            model = model_config(config, parallel.platform_of(mesh))
            program = predictor(model, setting, config.seed, mesh)
            view = jax.ShapeDtypeStruct((), np.int32, sharding=parallel.replicated(mesh))
            lowered = program.lower(self.params, *self.evaluation_arrays(setting), view)
            return compile_for(lowered, self.where, self.devices)

    def evaluation_arrays(self, setting: Setting) -> list[jax.ShapeDtypeStruct]:
        """Probabilities so far, patches and numbers of a batch of videos."""
        B, P, cut = self.evaluation_batch, setting.grid.tokens, parallel.by_clip(self.mesh)
        return [
            jax.ShapeDtypeStruct((B, self.config.model.classes), np.float32, sharding=cut),
            jax.ShapeDtypeStruct((B, P, PATCH_VALUES), np.uint8, sharding=cut),
            jax.ShapeDtypeStruct((B,), np.int32, sharding=cut),
        ]

    @property
    def peak(self) -> float:
        """FLOP/s of all devices, of a TPU by name."""
        return self.where.chip.peak * len(self.devices)

    @property
    def evaluation_batch(self) -> int:
        """Videos at once: `eval.batch_size`, filled up to what the mesh divides."""
        return parallel.filled(self.config.eval.batch_size, self.mesh)

    def _announced(self, what: str) -> contextlib.AbstractContextManager:
        return _announced(f"{self.where.name}: compiling the {what}")


def _name(setting: Setting) -> str:
    size = f"{setting.grid.frames} x {setting.grid.rows * PATCH} px"
    return f"evaluation, {setting.budget} tokens of {size}"


@contextlib.contextmanager
def _announced(what: str) -> Iterator[None]:
    """Says what takes long and, as it goes on, for how long: minutes pass in a compiler."""
    start, done, terminal = time.monotonic(), threading.Event(), sys.stderr.isatty()

    def tell() -> None:
        while not done.wait(1 if terminal else 60):
            begin, end = ("\r", "") if terminal else ("", "\n")
            elapsed = time.monotonic() - start
            print(f"{begin}{what}: {elapsed:.0f} s so far", end=end, file=sys.stderr, flush=True)

    print(what, end="" if terminal else "\n", file=sys.stderr, flush=True)
    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        taken = f"{what}: {time.monotonic() - start:.0f} s"
        print(f"\r{taken}{' ' * 7}" if terminal else taken, file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------
# The training step


class ModelFlops(NamedTuple):
    """FLOPs of a training step a clip, all budgets filled, without recomputation."""

    all: float
    attention: float


def model_flops(config: ConfigDict) -> ModelFlops:
    """By the formulas of `costs`: products of matrices, forward and twice that backward."""
    model, grid = model_config(config), max(admissible_grids(config), key=lambda g: g.tokens)
    total = attention = 0.0
    for budget in config.train.budgets:
        total += gflops(model, grid, budget).kept * GIGA
        tokens = tokens_kept(model, grid, budget) + (model.cls == "outside")
        attention += model.depth * 2 * tokens**2 * model.width
    return ModelFlops(*(BACKWARD * MULTIPLY_ADD * work for work in (total, attention)))


def _training_report(target: Target, program: Program) -> Report:
    config = target.config
    batch = abstract_batch(config, admissible_grids(config), target.mesh)
    state = target.state
    parts = {
        "parameters": tree_bytes(state["params"]),
        "moments": tree_bytes(state["opt_state"]),
        "average": tree_bytes(state.get("ema", ())),
        "batch": tree_bytes(batch),
    }
    report = _program_report(program, parts)
    if program.work is None:
        return report
    clips = config.train.batch_size
    model, devices = model_flops(config), len(target.devices)
    outside = (program.work.flops - program.work.attention_flops) * devices
    report["flops"] = {
        "compiled": program.work.flops * devices,
        "compiled_outside_attention": outside,
        "kernels": program.work.kernels,
        "model": clips * model.all,
        "model_outside_attention": clips * (model.all - model.attention),
        "outside_attention_ratio": outside / (clips * (model.all - model.attention)),
    }
    if program.time is not None:
        report["estimate"]["clips_per_second"] = clips / program.time.seconds
        report["estimate"]["mfu"] = clips * model.all / (program.time.seconds * target.peak)
    return report


def _program_report(program: Program, parts: dict[str, int]) -> Report:
    """What is said of every program; parts: bytes of its arguments on a device, by name."""
    memory = _memory(program, parts)
    report = {
        "fits": program.fits and (not program.available or memory["used"] <= program.available),
        "failure": program.failure,
        "compile_seconds": program.seconds,
        "compile_cpu_seconds": program.cpu_seconds,
        "memory": memory,
    }
    if program.work is not None:
        report["exchanges"] = _exchanges(program)
    if program.time is not None:
        work = program.work
        report["estimate"] = {
            "seconds": program.time.seconds,
            **program.time._asdict(),
            "not_counted": work.untimed | {"kernels": work.unknown_kernels},
            "loops_counted_once": work.unknown_loops,
        }
    return report


def _memory(program: Program, parts: dict[str, int]) -> Report:
    """Bytes on a device; "used" is None for a program that cannot be compiled.

    Arguments lie padded there, which their shapes do not tell. Those that a program has no use for,
    as evaluation has none for other budgets' heads, lie there all the same.
    """
    memory, used = program.memory, program.shortage and program.shortage.needed
    if memory is not None:
        parts = parts | {
            "padding": max(0, memory.arguments - sum(parts.values())),
            "results": memory.outputs,
            "activations and temporaries": memory.temporaries,
            "program": memory.code,
        }
        used = sum(parts.values())
    shown = {name: size for name, size in parts.items() if size}
    return {"available": program.available, "used": used, "parts": shown}


def _exchanges(program: Program) -> Report:
    """By kind, of a run and device: how many of arrays and of small things, bytes of the former."""
    report = {}
    for one in program.work.collectives:
        own = report.setdefault(one.kind, {"count": 0, "bytes": 0, "small": 0, "devices": 0})
        small = one.bytes < SMALL
        own["small" if small else "count"] += one.times
        own["bytes"] += 0 if small else one.times * one.bytes
        own["devices"] = max(own["devices"], len(one.group))
    return report


def _evaluation_report(target: Target, setting: Setting, program: Program) -> Report:
    """In a training run the rest of the training state stays where it is meanwhile."""
    arrays = tree_bytes(target.evaluation_arrays(setting))
    report = _program_report(program, {"parameters": tree_bytes(target.params), "batch": arrays})
    memory = report["memory"]
    if memory["used"] is not None:
        rest = tree_bytes(target.state) - tree_bytes(target.params)
        memory["beside_training"] = memory["used"] + rest
        if program.available is not None:
            report["fits"] &= memory["beside_training"] <= program.available
    if program.time is not None:
        report["estimate"]["clips_per_second"] = target.evaluation_batch / program.time.seconds
    return report


# ---------------------------------------------------------------------------------------------
# The largest batch


class Tried(NamedTuple):
    """A batch of so many units that was compiled, and the bytes that it needs."""

    units: int
    needed: int
    fits: bool


def search_largest(
    first: Tried, fixed: int, available: int, compile_units: Callable[[int], Tried]
) -> list[Tried]:
    """All that was tried in search of the largest batch that fits; `first` is known already.

    Memory grows about linearly with the batch, so a line through what is known says what to try
    next, at most `GROWTH` times what fits, and compiling says whether it is so. It ends when the
    next larger batch failed, or would not fit by that line.

    fixed: bytes that do not depend on the batch, about.
    """
    tried = [first]
    for _ in range(PROBES):
        largest = max((one.units for one in tried if one.fits), default=0)
        failing = min((one.units for one in tried if not one.fits), default=math.inf)
        guess = min(_fitting_units(tried, fixed, available), failing - 1)
        guess = min(guess, GROWTH * largest) if largest else max(guess, 1)
        if not largest < guess < failing:
            break
        tried.append(compile_units(guess))
    return tried


def _fitting_units(tried: Sequence[Tried], fixed: int, available: int) -> int:
    """How many units fit by the line through the two batches nearest to what is available."""
    known = {0: fixed} | {one.units: one.needed for one in tried}
    near = sorted(known, key=lambda units: abs(known[units] - available))[:2]
    (a, at_a), (b, at_b) = ((units, known[units]) for units in near)
    slope = max((at_b - at_a) / (b - a), 1.0)
    return math.floor(a + (available - at_a) / slope)


def _largest_batch(target: Target, training: Program) -> Report:
    config, unit = target.config, target.unit
    programs = {config.train.batch_size // unit: training}

    def compile_units(units: int) -> Tried:
        if units not in programs:
            own = config.copy_and_resolve_references()
            own.train.batch_size = units * unit
            programs[units] = target.compile_training(own)
        program = programs[units]
        # What fails for another reason counts as just too large.
        return Tried(units, _needed(program) or training.available + 1, program.fits)

    state = tree_bytes(target.state)
    first = compile_units(config.train.batch_size // unit)
    tried = search_largest(first, state, training.available, compile_units)
    largest = max((one.units for one in tried if one.fits), default=0)
    failing = min((one.units for one in tried if not one.fits), default=None)
    report = {
        "batch_size": largest * unit,
        "clips_a_device": largest * unit / len(target.devices),
        "fails_at": failing and failing * unit,
        "tried": [(one.units * unit, one.needed, one.fits) for one in sorted(tried)],
    }
    if not largest:
        return report
    program = programs[largest]
    report["used"] = program.memory.used
    if program.time is not None:
        flops = largest * unit * model_flops(config).all
        report["mfu"] = flops / (program.time.seconds * target.peak)
    return report


def _needed(program: Program) -> int | None:
    """Bytes on a device, be there so many or not; None for what cannot be compiled."""
    if program.shortage is not None:
        return program.shortage.needed
    return program.memory.used if program.memory is not None else None


# ---------------------------------------------------------------------------------------------
# The run


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
