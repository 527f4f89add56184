"""Compiled programs of an evaluation: one view of a batch at a time, averaged over the views.

So `eval.batch_size` clips are on the devices at once, however many views a video has.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.stages import Wrapped

from fluxvit_jax.distributed.mesh import (
    batch_sharding,
    compiler_options,
    local_rows,
    replicated,
    shard_batch,
    traced_on_mesh,
)
from fluxvit_jax.evaluation import zero_shot
from fluxvit_jax.evaluation.settings import Setting
from fluxvit_jax.models import fluxvit
from fluxvit_jax.models.fluxvit import FluxViT, FluxViTConfig, ModelOutput
from fluxvit_jax.models.token_selection import NOISY_SELECTORS

MAX_PROGRAMS = 2048  # compiled programs kept; a search with the default lattice has 540 candidates


@functools.lru_cache(MAX_PROGRAMS)
def predictor(
    model: FluxViTConfig, setting: Setting, seed: int, mesh: Mesh, *, multi_label: bool
) -> Wrapped:
    """The jitted program of a setting, which adds a view's probabilities to a running total.

    `add_view(params, total [b, classes], patches uint8 [b, P, 588], video int32 [b], view int32)`,
    with the arrays of a batch split over the devices. Random selectors depend on seed, video and
    view only.

    multi_label: whether the probabilities of the classes are independent.
    """

    return view_program(probabilities_of(model, multi_label), model, setting, seed, mesh)


def probabilities_of(
    model: FluxViTConfig, multi_label: bool
) -> Callable[[dict, ModelOutput], jax.Array]:
    """The `answer` of a classifier, the network's own or that of texts, for `view_program`."""

    def answer(params: dict, output: ModelOutput) -> jax.Array:
        logits = output.logits
        if zero_shot.CLASSIFIER in params:
            logits = zero_shot.logits(params[zero_shot.CLASSIFIER], output.pooled, model.dtype)
        return (jax.nn.sigmoid if multi_label else jax.nn.softmax)(logits)

    return answer


def view_program(
    answer: Callable[[dict, ModelOutput], jax.Array],
    model: FluxViTConfig,
    setting: Setting,
    seed: int,
    mesh: Mesh,
) -> Wrapped:
    """The jitted program that adds what `answer` makes of a view to a running total [b, ...].

    Arguments as in `predictor`. answer: (params, output) -> [b, ...].
    """

    def add_view(
        params: dict, total: jax.Array, patches: jax.Array, video: jax.Array, view: jax.Array
    ) -> jax.Array:
        network, patches, keys = on_view(params, patches, video, view, model, seed)
        output = network.on_grid(patches, setting.grid, setting.budget, setting.head, keys)
        return total + answer(params, output)

    return jit_by_clip(add_view, mesh, clips=3)


def jit_by_clip(program: Callable, mesh: Mesh, clips: int, outputs: int = 1) -> Wrapped:
    """The jitted program of parameters, `clips` arrays [b, ...] split over the devices, and a view.

    outputs: number of the arrays [b, ...] that it returns, a tuple if there are several.
    """
    by_clip = batch_sharding(mesh)
    return jax.jit(
        traced_on_mesh(program, mesh),
        # None: parameters keep their sharding.
        in_shardings=(None, *[by_clip] * clips, replicated(mesh)),
        out_shardings=by_clip if outputs == 1 else (by_clip,) * outputs,
        compiler_options=compiler_options(mesh),
    )


def on_view(
    params: dict,
    patches: jax.Array,
    video: jax.Array,
    view: jax.Array,
    model: FluxViTConfig,
    seed: int,
) -> tuple[FluxViT, jax.Array, jax.Array | None]:
    """What a program of a view begins with: the network, normalized patches, keys of the clips.

    Arguments as of the programs of `predictor`; keys: of selectors with random scores, else None.
    """
    network = fluxvit.prepare_params(fluxvit.network_params(params), model)
    keys = None
    if model.selector in NOISY_SELECTORS:
        view_key = jax.random.fold_in(jax.random.key(seed), view)
        keys = jax.vmap(lambda number: jax.random.fold_in(view_key, number))(video)
    return (
        fluxvit.from_params(fluxvit.graphdef(model), network),
        fluxvit.normalize(patches, jnp.dtype(model.dtype)),
        keys,
    )


def class_count(params: dict) -> int:
    """Classes of the classifier, which may be made of texts."""
    if zero_shot.CLASSIFIER in params:
        return len(params[zero_shot.CLASSIFIER]["classes"])
    return params["heads"]["bias"].shape[-1]


def mean_over_views(
    programs: Sequence[Callable],
    params: dict,
    width: int,
    video: np.ndarray,
    patches: np.ndarray,
    mesh: Mesh,
) -> list[np.ndarray]:
    """Means over the views of what each of `view_program`s makes: [b, width].

    programs: of settings of one grid; video: int [b], numbers of the videos; patches: uint8
    [b, V, P, 588], of the host's rows (`mesh.local_row_indices`).
    """
    found = means_after(programs, params, width, video, patches, mesh, [patches.shape[1]])
    return [mean for (mean,) in found]


def means_after(
    programs: Sequence[Callable],
    params: dict,
    width: int,
    video: np.ndarray,
    patches: np.ndarray,
    mesh: Mesh,
    counts: Sequence[int],
) -> list[list[np.ndarray]]:
    """For each program, the means over the first views, as many as each of `counts`: [b, width].

    counts: ascending; no view after the last is run. Other arguments as in `mean_over_views`.
    """
    start = {"total": np.zeros((len(video), width), np.float32), "video": video.astype(np.int32)}
    sharded = shard_batch(start, mesh)
    totals = previous = [sharded["total"]] * len(programs)
    means: list[list[np.ndarray]] = [[] for _ in programs]
    for view in range(counts[-1]):
        part = shard_batch({"patches": patches[:, view]}, mesh)["patches"]
        jax.block_until_ready(previous)  # at most two views on the devices
        previous = totals
        totals = [
            program(params, total, part, sharded["video"], np.int32(view))
            for program, total in zip(programs, totals, strict=True)
        ]
        if view + 1 in counts:
            for own, total in zip(means, totals, strict=True):
                own.append(local_rows(total) / (view + 1))
    return means
