"""Our side of `benchmarks.gpu`: the step that training runs, and the programs of evaluation."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from benchmarks.gpu_case import Case, Side, clips_of, dtype_on, make_config, training_name
from fluxvit_jax.checkpoints.weights import read_weights
from fluxvit_jax.config.grids import admissible_grids
from fluxvit_jax.config.network import model_config
from fluxvit_jax.convert import config_json, official_names, weight_files
from fluxvit_jax.data.patches import patchify
from fluxvit_jax.distributed import partition_rules
from fluxvit_jax.distributed.compilation_cache import keep_programs
from fluxvit_jax.distributed.devices import device_name
from fluxvit_jax.distributed.mesh import device_put_global, make_mesh, platform_of, shard_batch
from fluxvit_jax.evaluation.settings import Setting
from fluxvit_jax.evaluation.view_programs import predictor
from fluxvit_jax.models import fluxvit
from fluxvit_jax.preflight.compiler.memory import memory_of
from fluxvit_jax.training.optimizer import make_optimizer
from fluxvit_jax.training.train_state import abstract_params, initial_state
from fluxvit_jax.training.train_step import device_batch, make_objective, make_train_step

Made = dict[str, tuple[jax.stages.Compiled, Callable[[], dict[str, Any]]]]


def side(case: Case) -> Side:
    """The compiled programs, with weights of their own making that are left in `case.weights`."""
    keep_programs("")  # memory of compiling is given back, as in all commands
    device = jax.devices()[0]
    dtype = dtype_on(case, device.platform)
    config = make_config(case, dtype)
    write_weights(config, case.weights)
    mesh = make_mesh(config, [device])
    make = training if case.task == "training" else inference
    made = make(config, case, mesh)
    about = {
        "device": device_name(device),
        "platform": device.platform,
        "dtype": dtype,
        "jax": jax.__version__,
        "attention": model_config(config, device.platform).attention,
    }
    return Side(
        about,
        {name: run for name, (_, run) in made.items()},
        wait=jax.block_until_ready,
        fetch=np.asarray,
        peak=lambda name: memory_of(made[name][0]).used,
    )


def write_weights(config: ConfigDict, folder: str) -> None:
    """Random weights in which every part matters: LayerScale is 1, where it would start at 1e-5."""
    model = replace(model_config(config), layer_scale=1.0)
    params = jax.jit(lambda: fluxvit.init_params(model, jax.random.key(0)))()
    state = official_names.to_official(jax.tree.map(np.asarray, params))
    weight_files.write(weight_files.Pretrained(state, config_json.from_run_config(config)), folder)


def training(config: ConfigDict, case: Case, mesh: Mesh) -> Made:
    """The training step; each call goes on from the state of the one before."""
    config.train.init_from = case.weights
    optimizer = make_optimizer(config, 1000, abstract_params(config))
    objective = make_objective(config, admissible_grids(config), platform_of(mesh))
    video, labels = clips_of(case, config.model.classes)
    batch = {
        "patches": np.stack([patchify(clip) for clip in video]),
        "grid": np.tile(np.int32(case.grid), (case.batch, 1)),
        "label": labels,
        "failure": np.full(case.batch, ""),
    }
    clips = shard_batch(device_batch(batch), mesh)
    state = initial_state(config, optimizer, mesh)
    step = make_train_step(config, objective, optimizer, mesh).lower(state, {}, clips).compile()

    def run() -> dict[str, Any]:
        nonlocal state
        state, measured = step(state, {}, clips)
        return {name: measured[name] for name in ("loss", "gradient_norm")}

    return {training_name(case): (step, run)}


def inference(config: ConfigDict, case: Case, mesh: Mesh) -> Made:
    """The program of each budget that evaluation runs, with the head trained at it."""
    params = read_weights(case.weights).params(np.float32)
    params = device_put_global(params, partition_rules.shardings(params, mesh))
    model = model_config(config, platform_of(mesh))
    video, _ = clips_of(case, model.classes)
    start = {
        "total": np.zeros((case.batch, model.classes), np.float32),
        "patches": np.stack([patchify(clip) for clip in video]),
        "video": np.arange(case.batch, dtype=np.int32),
    }
    given = (params, *shard_batch(start, mesh).values(), np.int32(0))

    def program(budget: int, head: int) -> tuple:
        jitted = predictor(model, Setting(budget, case.grid, head), 0, mesh, multi_label=False)
        compiled = jitted.lower(*given).compile()
        return compiled, lambda: {"probabilities": compiled(*given)}

    return {str(budget): program(budget, head) for head, budget in enumerate(case.budgets)}
