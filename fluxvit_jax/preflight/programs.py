"""Reports of compiled programs, and the FLOPs of the model itself."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ml_collections import ConfigDict

from fluxvit_jax.config.grids import admissible_grids
from fluxvit_jax.config.network import freezing, model_config
from fluxvit_jax.evaluation.settings import Setting
from fluxvit_jax.models import padded_sequence
from fluxvit_jax.models.flops import GIGA, attention_macs, frozen_macs, gflops
from fluxvit_jax.objectives.base import objective_class
from fluxvit_jax.preflight.compiler.collectives import Collective
from fluxvit_jax.preflight.compiler.memory import tree_bytes
from fluxvit_jax.preflight.compiler.program import Program
from fluxvit_jax.preflight.target import Target
from fluxvit_jax.training.train_step import abstract_batch

STEP_PASSES = 3  # a training step takes the FLOPs of three forward passes
MULTIPLY_ADD = 2  # FLOPs
SMALL = 64 * 1024  # bytes: exchanges of metrics and the like; gradients are megabytes

Report = dict[str, Any]


@dataclass(frozen=True, slots=True)
class ModelFlops:
    """FLOPs of a training step per clip, all budgets filled, without recomputation."""

    all: float
    attention: float


def model_flops(config: ConfigDict) -> ModelFlops:
    """By the formulas of `models.flops`: matrix products, forward and twice that backward.

    Of the largest step, where steps differ.
    Frozen networks, and what `train.freeze` freezes, run forward only.
    """
    model, grid = model_config(config), max(admissible_grids(config), key=lambda g: g.tokens)
    part = freezing(config)
    blocks = model.depth if "blocks" in part.names else part.blocks
    trained, frozen, frozen_attention = objective_class(config).extra_macs(config)
    total = attention = 0.0
    for budget in objective_class(config).step_budgets(config):
        patches = padded_sequence.patch_budget(budget, model.cls)
        total += gflops(model, grid, budget).kept * GIGA
        attention += attention_macs(model, patches)
        if part.names:
            forward_only = frozen_macs(model, patches, blocks, "pool" in part.names)
            attention_only = attention_macs(model, patches) * blocks / model.depth
            total, frozen = total - forward_only, frozen + forward_only
            attention -= attention_only
            frozen_attention += attention_only
    total = STEP_PASSES * (total + trained) + frozen
    attention = STEP_PASSES * attention + frozen_attention
    return ModelFlops(MULTIPLY_ADD * total, MULTIPLY_ADD * attention)


def training_report(target: Target, program: Program) -> Report:
    """The report of the training step."""
    config = target.config
    batch = abstract_batch(config, admissible_grids(config), target.mesh)
    state = target.state
    parts = {
        "parameters": tree_bytes(state["params"]),
        "moments": tree_bytes(state["opt_state"]),
        "average": tree_bytes(state.get("ema", ())),
        "frozen weights": tree_bytes(target.frozen),
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
        if target.frozen:
            work = program.work
            share = work.frozen_cycles / (work.cycles + work.kernel_cycles)
            report["estimate"]["frozen_share"] = share
    return report


def _program_report(program: Program, parts: dict[str, int]) -> Report:
    """The part that all programs report; parts: bytes of its arguments on a device, by name."""
    memory = _memory(program, parts)
    report: Report = {
        "fits": program.fits and (not program.available or memory["used"] <= program.available),
        "failure": program.failure,
        "compile_seconds": program.seconds,
        "compile_cpu_seconds": program.cpu_seconds,
        "memory": memory,
    }
    work = program.work
    if work is None:
        return report
    report["exchanges"] = _exchanges(work.collectives)
    if program.time is not None:
        report["estimate"] = {
            "seconds": program.time.seconds,
            **asdict(program.time),
            "not_counted": work.untimed | {"kernels": work.unknown_kernels},
            "loops_counted_once": work.unknown_loops,
        }
    return report


def _memory(program: Program, parts: dict[str, int]) -> Report:
    """Bytes on a device; "used" is None for a program that cannot be compiled.

    Arguments are padded on the device, which their shapes do not show. Arguments that a program
    does not use, such as other budgets' heads in evaluation, occupy memory all the same.
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


def _exchanges(collectives: Sequence[Collective]) -> Report:
    """By kind, per run and device: counts of large and small exchanges, bytes of the large ones."""
    report: dict[str, dict[str, int]] = {}
    for exchange in collectives:
        entry = report.setdefault(exchange.kind, {"count": 0, "bytes": 0, "small": 0, "devices": 0})
        if exchange.bytes < SMALL:
            entry["small"] += exchange.times
        else:
            entry["count"] += exchange.times
            entry["bytes"] += exchange.times * exchange.bytes
        entry["devices"] = max(entry["devices"], len(exchange.group))
    return report


def evaluation_report(target: Target, setting: Setting, program: Program) -> Report:
    """The report of an evaluation program, beside which a training run keeps its whole state."""
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
