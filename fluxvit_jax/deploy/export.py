"""`--mode=export`: one folder that a server runs with JAX and NumPy alone, at every token budget.

It holds the weights once, a StableHLO program for each budget, and a manifest. A program takes the
weights and a batch of any size; it is lowered for CPU, CUDA and TPU. `fluxvit_jax.load_exported`
reads the folder. Weights that were searched are exported on the grids that the search chose, and
the manifest says how accurate they are, so that a server can be asked by time as well. Of Flux-CLIP
there are two programs more, which map clip vectors and texts into one space.
"""

import dataclasses
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from fluxvit_jax.convert import official_names
from fluxvit_jax.convert.config_json import (
    PretrainedConfig,
    Setting,
    check_sizes,
    describe_assumption,
    to_json,
)
from fluxvit_jax.deploy import export_space
from fluxvit_jax.deploy.exported import MANIFEST, VERSION, WEIGHTS
from fluxvit_jax.deploy.pretrained import PretrainedModel, forward, from_pretrained
from fluxvit_jax.distributed import checksums
from fluxvit_jax.errors import UserError
from fluxvit_jax.grids import PATCH, Grid, nearest_head
from fluxvit_jax.models.fluxvit import MEAN, PATCH_VALUES, STD, FluxViTConfig
from fluxvit_jax.token_optimization import planner

PLATFORMS = ("cpu", "cuda", "tpu")


def export(
    model: PretrainedModel,
    folder: Path,
    settings: Sequence[Setting],
    report: planner.Report | None = None,
) -> None:
    """Writes the folder, whole or not at all.

    settings: (budget, frames, resolution in pixels) of each program.
    report: of a search of these weights: it names the heads of the cells that it chose, where
        otherwise the one trained at the nearest budget answers, and fills the manifest's "plan".

    Raises UserError: a setting that cannot be, or a folder that cannot be written or is not empty.
    """
    _check_settings(model.config.model, settings)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there already; export into another folder")
    if folder.resolve() == Path.cwd():
        raise UserError(f"{folder} is the current folder; export into another, such as exported")
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # of an export that was killed
    try:
        unfinished.mkdir(parents=True)
        _write(model, unfinished, settings, report)
        if folder.exists():
            folder.rmdir()
        unfinished.rename(folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _write(
    model: PretrainedModel,
    folder: Path,
    settings: Sequence[Setting],
    report: planner.Report | None,
) -> None:
    params = dict(official_names.flatten(model.params))
    arrays: dict[str, Any] = {name: np.asarray(array) for name, array in params.items()}
    np.savez(folder / WEIGHTS, **arrays)
    budgets, heads = {}, {_setting(cell): cell["head"] for cell in planner.chosen_cells(report)}
    for budget, frames, resolution in tqdm(settings, "exporting", unit="budget", disable=None):
        grid = Grid.square(frames, resolution)
        nearest = nearest_head(budget, model.config.head_budgets)
        head = heads.get((budget, frames, resolution), nearest)
        program = folder / f"{budget}.stablehlo"
        program.write_bytes(lower(model.config.model, params, grid, budget, head))
        budgets[str(budget)] = {
            "program": program.name,
            "frames": frames,
            "resolution": resolution,
            "head": head,
            "sha256": checksums.sha256(program),
        }
    manifest = describe(model.config, budgets, checksums.sha256(folder / WEIGHTS))
    if model.space:
        manifest["space"] = export_space.write(model.space, folder, PLATFORMS)
    if report:
        manifest["plan"] = describe_plan(budgets, report)
        manifest["cascades"] = write_cascades(model, params, folder, report, budgets)
    content = json.dumps(checksums.add_checksum(manifest), indent=1)
    (folder / MANIFEST).write_text(content + "\n")


def write_cascades(
    model: PretrainedModel,
    params: dict[str, Any],
    folder: Path,
    report: planner.Report,
    budgets: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    """Writes the programs of cascades that look at one view; what the manifest says of them.

    {"programs": {cell: {"program", "frames", "resolution", "sha256"}}, and what `adaptive.planner`
    reads of a report: "cells", "cascades", "devices", "notes", "view_count"}.

    budgets: what the manifest says of the programs that are there; cells that they are share them.
    """
    there = {
        (int(budget), own["frames"], own["resolution"], own["head"]): own
        for budget, own in budgets.items()
    }
    views = report.get("view_count", 1)
    cascades = {
        name: {key: own[key] for key in own if key != "stopped_by_class"}
        for name, own in report["cascades"].items()
        if max(step["views"] or views for step in own["steps"]) == 1
    }
    names = {step["cell"] for own in cascades.values() for step in own["steps"]}
    cells = {name: report["cells"][name] for name in sorted(names)}
    programs = {}
    for name, cell in tqdm(cells.items(), "exporting", unit="cell", disable=None):
        if own := there.get((*_setting(cell), cell["head"])):
            programs[name] = {key: own[key] for key in own if key != "head"}
            continue
        grid, program = Grid.square(cell["frames"], cell["resolution"]), f"{name}.stablehlo"
        content = lower(model.config.model, params, grid, cell["budget"], cell["head"])
        (folder / program).write_bytes(content)
        size = {key: cell[key] for key in ("frames", "resolution")}
        programs[name] = size | {"program": program, "sha256": checksums.sha256(folder / program)}
    devices = {
        device: {"cells": {name: table["cells"][name] for name in names & table["cells"].keys()}}
        for device, table in report["devices"].items()
    }
    return {
        "programs": programs,
        "cells": cells,
        "cascades": cascades,
        "devices": devices,
        "notes": report["notes"],
        "view_count": views,
    }


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
            official_names.insert(tree, path, array)
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


def describe_plan(budgets: dict[str, dict[str, Any]], report: planner.Report) -> dict[str, Any]:
    """The manifest's "plan": how accurate the programs are by a search, and how fast.

    {"checkpoint", "choose": what it chose on, "report": what it reported on, "notes": what a reader
    of accuracies must know, "programs": {budget: {"cell", "top1", "top1_interval", "split",
    "choose", "behind", "gflops"}}, "devices": {name: {budget: timings}}}; names and units as in the
    report. "split" is what "top1" is of: "report" where the cell was chosen, else "choose", the
    videos that chose; "behind" and "choose", by which programs are compared, are always of these.
    A program that is none of the report's cells is left out.
    """
    programs = {}
    for budget, own in budgets.items():
        asked = (int(budget), own["frames"], own["resolution"], own["head"])
        if name := planner.find_cell(report, *asked):
            cell = report["cells"][name]
            split, accuracy = planner.accuracy_of(cell)
            programs[budget] = {
                "cell": name,
                "top1": accuracy["top1"],
                "top1_interval": accuracy.get("top1_interval"),
                "split": split,
                "choose": cell["choose"],
                "behind": cell.get("behind"),
                "gflops": cell["gflops"],
            }
    devices = {}
    for device, table in report["devices"].items():
        cells = {budget: table["cells"].get(own["cell"]) for budget, own in programs.items()}
        devices[device] = {budget: timings for budget, timings in cells.items() if timings}
    return {
        "checkpoint": report.get("checkpoint"),
        "choose": report.get("choose"),
        "report": report.get("report"),
        "notes": report["notes"],
        "programs": programs,
        "devices": devices,
    }


def _setting(cell: dict[str, Any]) -> Setting:
    return cell["budget"], cell["frames"], cell["resolution"]


def _check_settings(model: FluxViTConfig, settings: Sequence[Setting]) -> None:
    """Raises UserError for a setting that cannot be, for any network or for this one."""
    check_sizes(model, settings)
    inside = model.cls == "inside"
    for budget, frames, resolution in settings:
        tokens = Grid.square(frames, resolution).tokens
        if model.selector == "none" and tokens > budget - inside:
            raise UserError(
                f"{budget} tokens of {frames} frames of {resolution} px: the network selects "
                "nothing, so they do not fit the budget"
            )


def run(
    weights: str,
    out: str,
    tokens: Sequence[int] = (),
    network: str = "",
    dtype: str | None = None,
    config: ConfigDict | None = None,
    searched: str | None = None,
) -> int:
    """Exports weights of any form; returns the exit status, 0.

    Args:
        tokens: budgets, each on the grid of the nearest setting; by default the cells of selection
            that a search of these weights chose, and without one those of the settings.
        network: config.json for what the weights do not tell.
        dtype: of the computation; by default that of the search, and without one float32.
        config: a recipe, if one was given: its evaluation settings hold, not the checkpoint's.
        searched: workdir of the search; where it has none, that of the weights.

    Raises UserError as `export` and `from_pretrained` do, or if the search's report is damaged.
    """
    model = from_pretrained(weights, network or None, dtype or "float32")
    if assumption := describe_assumption(model.config, weights):
        print(f"{assumption}; --network=FILE with their id2label names others", file=sys.stderr)
    settings = model.config.asked(tokens, config.eval.settings if config else ())
    file = planner.find_report(searched, weights)
    if report := _report_of(model, file):
        model = _in_dtype(model, dtype, report)
        if not tokens and (cells := planner.chosen_cells(report)):
            settings = [_setting(cell) for cell in cells]
            print(f"exporting the cells that {file} chose")
    export(model, Path(out), settings, report)
    size = sum(path.stat().st_size for path in Path(out).iterdir()) / 1e6
    print(f"{len(settings)} budgets, {size:.1f} MB; written to {out}")
    return 0


def _report_of(model: PretrainedModel, file: Path | None) -> planner.Report | None:
    """The report of a search, if there is one and it is about these weights."""
    if file is None:
        return None
    report = planner.read_report(file)
    if report.get("fingerprint") != official_names.fingerprint(model.params):
        print(f"{file} is of other weights and left aside")
        return None
    return report


def _in_dtype(model: PretrainedModel, dtype: str | None, report: planner.Report) -> PretrainedModel:
    """The network in the dtype that was asked for, by default in that of its search.

    Timings are taken out of the report if they are of another dtype: servers then time themselves.
    """
    searched = planner.as_searched(model, report)
    if dtype in (None, searched.config.model.dtype):
        return searched
    report["devices"] = {}
    return model
