"""The part of an exported folder of Flux-CLIP that maps videos and texts into one space."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fluxvit_jax.convert import official_names
from fluxvit_jax.data.tokenizer import CONTEXT
from fluxvit_jax.deploy.shared_space import SharedSpace, encode_texts, project
from fluxvit_jax.distributed import checksums

WEIGHTS = "clip.npz"
HEAD, TEXT = "video_head.stablehlo", "text.stablehlo"

Params = dict[str, jax.Array]


def write(space: SharedSpace, folder: Path, platforms: tuple[str, ...]) -> dict[str, Any]:
    """Writes weights and programs into a folder; returns their entry in the manifest.

    A program takes parameters {path: array} and, for any b, clip vectors float32 [b, pool_width] or
    ids int32 [b, 77]; it returns unit vectors float32 [b, D].
    """
    parts = space.parts
    head, text = (
        {name: np.asarray(array) for name, array in official_names.flatten(tree)}
        for tree in (parts.head, parts.text_encoder)
    )
    arrays: dict[str, Any] = {f"head.{name}": array for name, array in head.items()}
    arrays |= {f"text.{name}": array for name, array in text.items()}
    np.savez(folder / WEIGHTS, **arrays)
    width = parts.head["norm"]["scale"].shape[0]
    (b,) = jax.export.symbolic_shape("b")
    programs = {
        HEAD: _lowered(
            lambda params, pooled: project(params, pooled, parts.network.dtype),
            head,
            jax.ShapeDtypeStruct((b, width), jnp.float32),
            platforms,
        ),
        TEXT: _lowered(
            lambda params, ids: encode_texts(params, ids, parts.network),
            text,
            jax.ShapeDtypeStruct((b, CONTEXT), jnp.int32),
            platforms,
        ),
    }
    for name, program in programs.items():
        (folder / name).write_bytes(program)
    files = {"weights": WEIGHTS, "head": HEAD, "text": TEXT}
    return {
        "temperature": space.temperature,
        "width": parts.network.out,
        **{
            what: {"file": name, "sha256": checksums.sha256(folder / name)}
            for what, name in files.items()
        },
    }


def _lowered(
    run: Callable[[dict, jax.Array], jax.Array],
    params: dict[str, np.ndarray],
    argument: jax.ShapeDtypeStruct,
    platforms: tuple[str, ...],
) -> bytes:
    """The serialised program of a function of a tree of parameters; it takes them flat."""

    def run_flat(flat: Params, argument: jax.Array) -> jax.Array:
        tree: dict[str, Any] = {}
        for path, array in flat.items():
            official_names.insert(tree, path, array)
        return run(tree, argument)

    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in params.items()}
    exported = jax.export.export(jax.jit(run_flat), platforms=platforms)(shapes, argument)
    return bytes(exported.serialize())
