"""What is reported of each compiled program, and what the model itself needs."""

from typing import Any, NamedTuple

from ml_collections import ConfigDict

from fluxvit_jax import distill
from fluxvit_jax.compiler.memory import tree_bytes
from fluxvit_jax.compiler.program import Program
from fluxvit_jax.config import admissible_grids, asks_teacher, is_distillation, model_config
from fluxvit_jax.costs import GIGA, decoders_gflops, features_gflops, gflops
from fluxvit_jax.evaluate import Setting
from fluxvit_jax.models import sequence
from fluxvit_jax.models.fluxvit import FluxViTConfig
from fluxvit_jax.models.internvideo2 import InternVideo2Config
from fluxvit_jax.preflight.target import Target
from fluxvit_jax.step import abstract_batch

BACKWARD = 3  # a training step is worth so many forward passes
MULTIPLY_ADD = 2  # FLOPs
SMALL = 64 * 1024  # bytes: exchanges of metrics and the like, where gradients are megabytes

Report = dict[str, Any]


class ModelFlops(NamedTuple):
    """FLOPs of a training step a clip, all budgets filled, without recomputation."""

    all: float
    attention: float


def model_flops(config: ConfigDict) -> ModelFlops:
    """By the formulas of `costs`: products of matrices, forward and twice that backward.

    Of a teacher that is asked forward only, of the patches that it sees.
    """
    model, grid = model_config(config), max(admissible_grids(config), key=lambda g: g.tokens)
    total = attention = 0.0
    for budget in config.train.budgets:
        total += gflops(model, grid, budget).kept * GIGA
        attention += _attention_work(model, sequence.patch_budget(budget, model.cls))
    if not is_distillation(config):
        return ModelFlops(*(BACKWARD * MULTIPLY_ADD * work for work in (total, attention)))
    seen, *students = (
        sequence.patch_budget(n, model.cls) for n in (config.distill.tokens, *config.train.budgets)
    )
    decoders = distill.decoders_config(config)
    total += sum(decoders_gflops(decoders, patches) for patches in students) * GIGA
    total, attention = BACKWARD * total, BACKWARD * attention
    if asks_teacher(config):
        teacher = distill.teacher_config(config)
        total += features_gflops(teacher, seen) * GIGA
        attention += _attention_work(teacher, seen)
    return ModelFlops(MULTIPLY_ADD * total, MULTIPLY_ADD * attention)


def _attention_work(model: FluxViTConfig | InternVideo2Config, patches: int) -> int:
    return model.depth * 2 * (patches + 1) ** 2 * model.width


def training_report(target: Target, program: Program) -> Report:
    config = target.config
    batch = abstract_batch(config, admissible_grids(config), target.mesh)
    state = target.state
    parts = {
        "parameters": tree_bytes(state["params"]),
        "moments": tree_bytes(state["opt_state"]),
        "average": tree_bytes(state.get("ema", ())),
        "teacher": tree_bytes(target.frozen),
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
        if is_distillation(config):
            work = program.work
            share = work.teacher_cycles / (work.cycles + work.kernel_cycles)
            report["estimate"]["teacher_share"] = share
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


def evaluation_report(target: Target, setting: Setting, program: Program) -> Report:
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
