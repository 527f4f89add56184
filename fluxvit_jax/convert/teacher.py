"""Weights of InternVideo2's vision encoder, the teacher: official files in, our files out.

Read are the files of stage 1 (flat names) and stage 2 (under `vision_encoder.`, beside a text
encoder), `.pth` or `.safetensors`, and what `write` leaves: a folder or a `.safetensors` file. What
those files hold for their own training, decoders and tables of positions for them, is left out as
the official loader does; all else that is missing, unexpected or of the wrong shape is refused.
"""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from fluxvit_jax.config.fields import FIELDS as CONFIG_FIELDS
from fluxvit_jax.convert import adapt, official_names, weight_files
from fluxvit_jax.convert.official_names import INTERNVIDEO2
from fluxvit_jax.errors import UserError
from fluxvit_jax.grids import Grid
from fluxvit_jax.models.internvideo2 import InternVideo2Config

MODEL_TYPE = "internvideo2"
STAGE_2 = "vision_encoder."
# What the classes of stage 1 and 2 have for their training alone.
FOR_TRAINING = (
    *("clip_decoder", "final_clip_decoder", "clip_pos_embed", "clip_img_pos_embed"),
    *("img_pos_embed", "mae_decoder", "mae_pos_embed"),
)
SIZES = ("width", "depth", "heads", "hidden", "frames", "rows", "columns")
POOL = ("pool_width", "pool_heads")
FIELDS = (*SIZES, *POOL, "gelu")
# (width, depth): attention heads of a block, of the pooling. Official 1B and 6B, at 224 px.
RELEASED = {(1408, 40): (16, 16), (3200, 48): (25, 16)}
RELEASED_SIDE = 16  # patches


class Teacher(NamedTuple):
    """state: official name -> array, in the dtype of the file; notes: what was left out."""

    state: dict[str, np.ndarray]
    config: InternVideo2Config
    notes: tuple[str, ...] = ()

    def params(self, dtype: np.dtype | type | None = None) -> dict[str, Any]:
        """Our nested parameter tree, in another dtype if one is given."""
        tree = official_names.from_official(self.state, self.config.heads, INTERNVIDEO2)
        return jax.tree.map(lambda x: np.asarray(x, dtype), tree)


def read(
    source: str | os.PathLike,
    config: Mapping[str, Any] | None = None,
    allow_unexpected: Sequence[str] = (),
) -> Teacher:
    """The teacher in `source`.

    Args:
        config: fields of `InternVideo2Config` that go before those of `source`; needed where the
            weights are of no released size: heads, pool_heads, frames, rows, columns.
        allow_unexpected: official names, or beginnings up to a dot, of tensors to leave out.

    Raises:
        UserError: there are no such weights; they are damaged, not those of an InternVideo2, or
            their network cannot be told.
    """
    tensors, embedded = weight_files.read_tensors(source)
    state, notes = _own(tensors), []
    for name in official_names.unexpected(state, INTERNVIDEO2):
        if weight_files.is_named(name, (*FOR_TRAINING, *allow_unexpected)):
            del state[name]
            notes.append(f"{source}: {name} is left out")
    if outside := len(tensors) - len(state) - len(notes):
        notes.append(f"{source}: {outside} tensors outside {STAGE_2[:-1]} are left out")
    try:
        official_names.check(state, INTERNVIDEO2)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    return Teacher(state, _described(state, {**embedded, **(config or {})}, source), tuple(notes))


def _own(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The vision encoder's tensors without what goes before their names."""
    dotted = {f".{name}": tensor for name, tensor in tensors.items()}
    inside = {name: x for name, x in dotted.items() if f".{STAGE_2}" in name}
    if inside:
        return {name.partition(f".{STAGE_2}")[2]: x for name, x in inside.items()}
    return {name.removeprefix("module."): x for name, x in tensors.items()}


def _described(
    state: Mapping[str, np.ndarray], given: Mapping[str, Any], source: str | os.PathLike
) -> InternVideo2Config:
    _check_given(given, source)
    told = {
        "width": state["cls_token"].shape[-1],
        "depth": sum(name.endswith(".ls1.gamma") for name in state),
        "hidden": len(state["blocks.0.mlp.fc1.bias"]),
        "pool_width": len(state["clip_projector.cross_attn.proj.bias"]),
    }
    if wrong := [name for name in told if given.get(name, told[name]) != told[name]]:
        listed = ", ".join(f"{name} is {told[name]}, not {given[name]}" for name in wrong)
        raise UserError(f"{source}: its config contradicts its weights: {listed}")
    places = state["pos_embed"].shape[1] - 1
    fields = {**_of_released_size(told, places), **told}
    fields |= {name: given[name] for name in FIELDS if name in given}
    if untold := [name for name in (*SIZES, *POOL) if name not in fields]:
        raise UserError(
            f"{source}: the weights do not tell {', '.join(untold)}; name a config.json that does: "
            "--config=FILE"
        )
    config = InternVideo2Config(**fields)
    for heads in ("heads", "pool_heads"):
        if config.width % fields[heads]:
            raise UserError(
                f"{source}: the width {config.width} does not divide into {fields[heads]} {heads}"
            )
    if places != config.frames * config.rows * config.columns:
        raise UserError(
            f"{source}: its position table has {places} places, not {config.frames} x "
            f"{config.rows} x {config.columns}"
        )
    return config


def _check_given(given: Mapping[str, Any], source: str | os.PathLike) -> None:
    if unknown := [name for name in given if name not in (*FIELDS, "model_type")]:
        raise UserError(f"{source}: its config has an unknown field {unknown[0]!r}")
    if given.get("model_type", MODEL_TYPE) != MODEL_TYPE:
        raise UserError(f"{source}: it is a {given['model_type']}, not an {MODEL_TYPE}")
    for name in (*SIZES, *POOL):
        if name in given and (type(given[name]) is not int or given[name] < 1):
            raise UserError(f"{source}: its config says {name} {given[name]!r}, no number from 1")
    if given.get("gelu", "tanh") not in CONFIG_FIELDS["model.gelu"].choices:
        raise UserError(f"{source}: its config says gelu {given['gelu']!r}, none of tanh, erf")


def _of_released_size(told: Mapping[str, int], places: int) -> dict[str, int]:
    heads = RELEASED.get((told["width"], told["depth"]))
    if heads is None:
        return {}
    return {
        "heads": heads[0],
        "pool_heads": heads[1],
        "frames": places // RELEASED_SIDE**2,
        "rows": RELEASED_SIDE,
        "columns": RELEASED_SIDE,
    }


def resize_grid(teacher: Teacher, grid: Grid) -> Teacher:
    """The position table on another grid, as the official loader of stage 2 resizes it."""
    config = teacher.config
    native = Grid(config.frames, config.rows, config.columns)
    table = adapt.resize_positions(teacher.state["pos_embed"][0], native, grid)
    return teacher._replace(
        state=teacher.state | {"pos_embed": table[None]},
        config=dataclasses.replace(config, **grid._asdict()),
    )


def write(teacher: Teacher, target: str | os.PathLike) -> None:
    """Writes a folder with config.json and model.safetensors, or a `.safetensors` file.

    Raises UserError: another form is asked for, or the place cannot be written, or is a workdir.
    """
    target = weight_files.place(target)
    if target.suffix in weight_files.PTH:
        raise UserError(f"{target}: a teacher is written as .safetensors or as a folder")
    content = {"model_type": MODEL_TYPE} | {name: getattr(teacher.config, name) for name in FIELDS}
    try:
        if target.suffix == ".safetensors":
            target.parent.mkdir(parents=True, exist_ok=True)
            weight_files.write_tensors(teacher.state, {"config": content}, target)
        else:
            target.mkdir(parents=True, exist_ok=True)
            weight_files.write_tensors(
                teacher.state, {"config": content}, target / weight_files.WEIGHTS
            )
            text = json.dumps(content, indent=2) + "\n"
            weight_files.replace(target / weight_files.CONFIG, lambda path: path.write_text(text))
    except OSError as error:
        raise UserError(f"{target}: cannot be written: {error.strerror or error}") from error
