"""Converts the weights of a FluxViT, or of its teacher: python -m fluxvit_jax.convert SOURCE TARGET

SOURCE is a .pth file as the official code or DeepSpeed writes it, a .safetensors file, a folder
with config.json and model.safetensors, or a workdir (its best step) of this program. TARGET is
likewise a .pth file, a .safetensors file or a folder, by its name; --workdir makes it a workdir.
All but workdirs hold the tensors under the official names, in SOURCE's dtype, bit for bit. A folder
also holds the network in plain PyTorch, torch_fluxvit.py, and needs nothing of this program; of
Flux-CLIP it holds clip.safetensors as well, with all that maps videos and texts into one space.

--network=internvideo2 is for the vision encoder of InternVideo2 (1B, 6B): SOURCE is an official
file of stage 1 or stage 2, or what this command made of one; TARGET a folder or .safetensors.

--network=projector is for what video chat has trained: SOURCE is its workdir, TARGET a .bin or
.safetensors file with the projector under the names of VideoChat-Flash's mm_projector.bin.
"""

import argparse
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from fluxvit_jax.checkpoints.weights import read_weights, write_workdir
from fluxvit_jax.convert import adapt, clip_parts, teacher, weight_files
from fluxvit_jax.convert.config_json import describe_assumption
from fluxvit_jax.convert.weight_files import Pretrained
from fluxvit_jax.data.annotations import read_class_names
from fluxvit_jax.data.class_names import PARTS_OF_K710
from fluxvit_jax.errors import ArgumentParser, UserError
from fluxvit_jax.grids import PATCH, Grid
from fluxvit_jax.models.fluxvit import FluxViTConfig
from fluxvit_jax.models.internvideo2 import InternVideo2Config
from fluxvit_jax.objectives import flux_chat_weights, flux_clip_weights

NETWORKS = ("fluxvit", "internvideo2", "projector")


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="python -m fluxvit_jax.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("source", metavar="SOURCE", help="weights to read")
    add("target", metavar="TARGET", help="file or folder to write")
    add("--network", choices=NETWORKS, default="fluxvit", help="whose weights")
    add("--workdir", action="store_true", help="TARGET is a workdir, for --mode=evaluate")
    add("--overwrite", action="store_true", help="TARGET may be there already")
    add(
        "--config",
        metavar="FILE",
        help="config.json with what the weights don't tell (heads, frames, rows, columns, "
        "pool_heads), where they are of no released size, or with what is to be changed in it",
    )
    add(
        "--allow-missing",
        metavar="NAME",
        action="append",
        default=[],
        help="tensors that may be missing and then start afresh, by official name or its "
        "beginning: head, clip_projector.2; may be given again",
    )
    add(
        "--allow-unexpected",
        metavar="NAME",
        action="append",
        default=[],
        help="likewise, tensors to leave out: text_encoder",
    )
    add(
        "--classes",
        metavar="N",
        help="cut the classifiers to their first N classes, or those of Kinetics-710 to k400, k600 "
        "or k700",
    )
    add(
        "--class-names",
        metavar="FILE",
        help="names of SOURCE's classes: a file of one a line, or a data set's, such as k400",
    )
    add(
        "--grid",
        metavar="FRAMESxPIXELS",
        help="resize the position table to another native grid: 16x224, or 16x224x336",
    )
    add(
        "--text-encoder",
        metavar="FILE",
        default="",
        help="where the frozen text encoder of a run of Flux-CLIP is now, if it was moved",
    )
    add("--dtype", choices=tuple(adapt.DTYPES), help="cast the tensors (default: SOURCE's dtype)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status: 0, 2 for a UserError, 130 when interrupted."""
    try:
        _convert(_arguments(argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; TARGET is as it was", file=sys.stderr)
        return 130
    return 0


def _convert(args: argparse.Namespace) -> None:
    grid = _grid(args.grid) if args.grid else None
    if os.path.exists(args.target) and not args.overwrite:
        raise UserError(f"{args.target} is there already; add --overwrite to replace it")
    if Path(args.target).resolve() == Path(args.source).resolve():
        raise UserError("SOURCE and TARGET are the same")
    if not args.workdir:
        weight_files.place(args.target)  # refuses before the weights are read
    if args.network == "internvideo2":
        return _convert_teacher(args, grid)
    if args.network == "projector":
        return _convert_projector(args)
    given = weight_files.read_config(args.config) if args.config else {}
    if args.class_names:
        given["id2label"] = {str(i): n for i, n in enumerate(read_class_names(args.class_names))}
    pretrained = read_weights(
        args.source,
        given,
        allow_missing=args.allow_missing,
        allow_unexpected=args.allow_unexpected,
    )
    for note in pretrained.notes:
        print(note)
    print(f"{args.source}: {describe(pretrained)}")
    if assumption := describe_assumption(pretrained.config, args.source):
        print(f"{assumption}; --class-names=FILE names others", file=sys.stderr)
    adapted = _adapt(pretrained, args.classes, grid, args.dtype)
    parts = flux_clip_weights.read_parts(args.source, args.text_encoder)
    write = write_workdir if args.workdir else weight_files.write
    write(adapted, args.target)
    print(f"{args.target}: {describe(adapted)}")
    if parts and Path(args.target).is_dir() and not args.workdir:
        clip_parts.write(parts, Path(args.target))
        print(f"{args.target}: with the head and the text encoder of Flux-CLIP")
    elif parts:
        print(f"{args.target}: the network alone; a folder would hold the text encoder as well")


def _convert_teacher(args: argparse.Namespace, grid: Grid | None) -> None:
    _refuse(args, ("workdir", "classes", "class_names", "allow_missing", "text_encoder"))
    given = weight_files.read_config(args.config) if args.config else None
    found = teacher.read(args.source, given, args.allow_unexpected)
    for note in found.notes:
        print(note)
    print(f"{args.source}: {_describe(found.state, found.config)}")
    adapted = teacher.resize_grid(found, grid) if grid else found
    if args.dtype:
        adapted = adapted._replace(state=adapt.cast(adapted.state, args.dtype))
    teacher.write(adapted, args.target)
    print(f"{args.target}: {_describe(adapted.state, adapted.config)}")


def _convert_projector(args: argparse.Namespace) -> None:
    for_networks = ("allow_missing", "allow_unexpected", "text_encoder", "config", "grid")
    _refuse(args, ("workdir", "classes", "class_names", *for_networks))
    path = Path(args.target)
    if path.suffix not in (*weight_files.PTH, ".safetensors"):
        raise UserError(f"{path}: a projector goes into a .bin or .safetensors file")
    projection = flux_chat_weights.read_projection(args.source)
    state = adapt.cast(
        flux_chat_weights.official_projector(projection.connector), args.dtype or "float32"
    )
    try:
        if path.suffix == ".safetensors":
            weight_files.write_tensors(state, {}, path)
        else:
            weight_files.write_torch_tensors(state, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error
    first = state[f"{flux_chat_weights.OFFICIAL_NAMES['fc1']}.weight"]
    print(f"{path}: a projector from {first.shape[1]} to {first.shape[0]} channels")


def _refuse(args: argparse.Namespace, options: Sequence[str]) -> None:
    """Raises UserError if an option is given that a network has no use for."""
    for option in options:
        if getattr(args, option):
            raise UserError(f"--{option.replace('_', '-')}: not for --network={args.network}")


def _adapt(
    pretrained: Pretrained, classes: str | None, grid: Grid | None, dtype: str | None
) -> Pretrained:
    if classes in PARTS_OF_K710:
        pretrained = adapt.cut_k710(pretrained, classes)
    elif classes is not None:
        pretrained = adapt.cut_classes(pretrained, _number(classes))
    if grid is not None:
        pretrained = adapt.resize_grid(pretrained, grid)
    if dtype is not None:
        state = adapt.cast(pretrained.state, dtype)
        pretrained = pretrained._replace(state=state, evaluations=())
    return pretrained


def _number(classes: str) -> int:
    if not re.fullmatch("[1-9][0-9]{0,8}", classes):
        raise UserError(
            f"--classes={classes}: neither a number nor one of {', '.join(PARTS_OF_K710)}"
        )
    return int(classes)


def _grid(text: str) -> Grid:
    """16x224 or 16x224x336: frames, height and width in pixels."""
    match = re.fullmatch(r"(\d+)x(\d+)(?:x(\d+))?", text)
    frames, height, width = (int(n or match[2]) for n in match.groups()) if match else (0, 0, 0)
    if not frames or not height or not width or height % PATCH or width % PATCH:
        raise UserError(f"--grid={text}: not frames x pixels, multiples of {PATCH}, such as 16x224")
    return Grid(frames, height // PATCH, width // PATCH)


def describe(pretrained: Pretrained) -> str:
    """What the weights are, in a line."""
    model = pretrained.config.model
    return _describe(pretrained.state, model, f"{model.classes} classes, ")


def _describe(
    state: Mapping[str, np.ndarray], model: FluxViTConfig | InternVideo2Config, more: str = ""
) -> str:
    dtypes = ", ".join(sorted({str(tensor.dtype) for tensor in state.values()}))
    millions = sum(tensor.size for tensor in state.values()) / 1e6
    grid = Grid(model.frames, model.rows, model.columns)
    return (
        f"{len(state)} tensors, {millions:.1f} M parameters, {dtypes}; width {model.width}, depth "
        f"{model.depth}, {more}native grid of {grid}"
    )


if __name__ == "__main__":
    sys.exit(main())
