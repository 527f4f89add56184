"""`--mode=export`: one folder that a server runs with JAX and NumPy alone, at every token budget.

It holds the weights once, a StableHLO program for each budget, and a manifest. A program takes the
weights and a batch of any size; it is lowered for CPU, CUDA and TPU. `fluxvit_jax.load_exported`
reads the folder.
"""

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from fluxvit_jax.budgets import PATCH, Grid, nearest_head
from fluxvit_jax.convert import names
from fluxvit_jax.convert.config_json import PretrainedConfig, to_json
from fluxvit_jax.errors import UserError
from fluxvit_jax.exported import MANIFEST, VERSION, WEIGHTS, sha256
from fluxvit_jax.models.fluxvit import MEAN, PATCH_VALUES, STD, FluxViTConfig
from fluxvit_jax.pretrained import PretrainedModel, forward, from_pretrained

PLATFORMS = ("cpu", "cuda", "tpu")


def export(model: PretrainedModel, folder: Path, settings: Sequence[tuple[int, int, int]]) -> None:
    """Writes the folder, whole or not at all.

    settings: (budget, frames, resolution in pixels) of each program.

    Raises UserError: a setting that cannot be, or a folder that cannot be written or is not empty.
    """
    check_settings(model.config, settings)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there already; export into another folder")
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        _write(model, unfinished, settings)
        if folder.exists():
            folder.rmdir()
        unfinished.rename(folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror or error}") from error


def _write(model: PretrainedModel, folder: Path, settings: Sequence[tuple[int, int, int]]) -> None:
    params = dict(names.flatten(model.params))
    np.savez(folder / WEIGHTS, **{name: np.asarray(array) for name, array in params.items()})
    budgets = {}
    for budget, frames, resolution in tqdm(settings, "exporting", unit="budget", disable=None):
        grid = Grid(frames, resolution // PATCH, resolution // PATCH)
        head = nearest_head(budget, model.config.head_budgets)
        program = folder / f"{budget}.stablehlo"
        program.write_bytes(lower(model.config.model, params, grid, budget, head))
        budgets[str(budget)] = {
            "program": program.name,
            "frames": frames,
            "resolution": resolution,
            "head": head,
            "sha256": sha256(program),
        }
    manifest = describe(model.config, budgets, sha256(folder / WEIGHTS))
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def lower(
    model: FluxViTConfig, params: dict[str, jax.Array], grid: Grid, budget: int, head: int
) -> bytes:
    """The serialised program of a budget.

    It takes parameters {path: array} and patches uint8 [b, P, 588] for any b, and returns logits
    float32 [b, classes], clip vectors float32 [b, pool_width], and which patches were kept, bool
    [b, P]. The weights are arguments, so none of them is in it.
    """

    def run_flat(flat: dict[str, jax.Array], patches: jax.Array):
        tree: dict[str, Any] = {}
        for path, array in flat.items():
            names.insert(tree, path, array)
        answer, kept = forward(tree, patches, model, grid, budget, head)
        return answer.logits, answer.pooled, kept

    (b,) = jax.export.symbolic_shape("b")
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in params.items()}
    patches = jax.ShapeDtypeStruct((b, grid.tokens, PATCH_VALUES), jnp.uint8)
    exported = jax.export.export(jax.jit(run_flat), platforms=PLATFORMS)(shapes, patches)
    return bytes(exported.serialize())


def describe(
    config: PretrainedConfig, budgets: dict[str, dict[str, Any]], weights_sha256: str
) -> dict[str, Any]:
    """The manifest."""
    return {
        "version": VERSION,
        "jax": jax.__version__,
        "platforms": list(PLATFORMS),
        "network": to_json(dataclasses.replace(config, class_names=())),
        "classes": list(config.class_names),
        "input": {
            "pixels": "uint8 RGB, frames evenly spread, short side scaled, middle square",
            "patch": PATCH,
            "mean": list(MEAN),
            "std": list(STD),
            "normalised": "by the programs",
        },
        "weights": {"file": WEIGHTS, "sha256": weights_sha256},
        "budgets": budgets,
    }


def check_settings(config: PretrainedConfig, settings: Sequence[tuple[int, int, int]]) -> None:
    """Raises UserError for a budget, number of frames or resolution that cannot be."""
    inside = config.model.cls == "inside"
    for budget, frames, resolution in settings:
        what = f"{budget} tokens of {frames} frames of {resolution} px"
        if budget < 1 + inside or frames < 1 or resolution < PATCH or resolution % PATCH:
            raise UserError(f"{what}: a resolution is a multiple of {PATCH}, a budget above 0")
        if (
            config.model.selector == "none"
            and frames * (resolution // PATCH) ** 2 > budget - inside
        ):
            raise UserError(f"{what}: the network selects nothing, so they do not fit the budget")


def run(
    weights: str,
    out: str,
    tokens: Sequence[int] = (),
    network: str = "",
    dtype: str = "float32",
    config: ConfigDict | None = None,
) -> int:
    """Exports weights of any form; returns the exit status, 0.

    Args:
        tokens: budgets, each on the grid of the nearest setting; by default those of the settings.
        network: config.json for what the weights do not tell.
        config: a recipe, if one was given: its evaluation settings hold, not the checkpoint's.

    Raises UserError as `export` and `from_pretrained` do.
    """
    model = from_pretrained(weights, network or None, dtype)
    settings = model.config.asked(tokens, config.eval.settings if config else ())
    export(model, Path(out), settings)
    size = sum(path.stat().st_size for path in Path(out).iterdir()) / 1e6
    print(f"{len(settings)} budgets, {size:.1f} MB; written to {out}")
    return 0
