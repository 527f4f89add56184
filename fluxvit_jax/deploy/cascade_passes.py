"""The passes of a cascade through a network that was loaded for use."""

from collections.abc import Mapping, Sequence
from functools import partial

import jax
import numpy as np

from fluxvit_jax.adaptive.cascade import Answers, Cascade, Size, check_steps
from fluxvit_jax.data.patches import patchify
from fluxvit_jax.errors import UserError
from fluxvit_jax.evaluation.finite import check_finite
from fluxvit_jax.grids import Grid
from fluxvit_jax.models import fluxvit, token_selection
from fluxvit_jax.models.fluxvit import FluxViT, FluxViTConfig, ModelOutput
from fluxvit_jax.models.token_selection import NOISY_SELECTORS


class CascadePasses:
    """The passes of a cascade over n videos, one after the other; each sees one view."""

    def __init__(
        self,
        params: dict,
        model: FluxViTConfig,
        cascade: Cascade,
        videos: Sequence[Mapping[Size, np.ndarray]],
    ):
        """videos: on each grid of the cascade, by frames and pixels, uint8 [B, T, size, size, 3].

        Raises UserError: a step looks at several views, or is one that the network cannot run.
        """
        check_steps(cascade.steps, model, "the cascade")
        for number, step in enumerate(cascade.steps, 1):
            if step.views > 1:
                raise UserError(
                    f"the cascade: step {number}: looks at {step.views} views, and one is at hand"
                )
        self._params, self._model, self.cascade = params, model, cascade
        self._passes = cascade.passes(1, shares_ranking=model.rounding == "exact")
        self._patches = {
            size: np.stack([patchify(clip) for own in videos for clip in own[size]])
            for size in {step.grid for step in cascade.steps}
        }
        self._ranked: dict[Size, np.ndarray] = {}

    @property
    def videos(self) -> int:
        """How many there are."""
        return len(next(iter(self._patches.values())))

    def answers(self) -> Answers:
        """The answers to all videos."""
        return self.cascade.run(self.videos, lambda *asked: self.run(*asked)[0])

    def run(self, number: int, videos: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A step's probabilities of the videos of these numbers, and the patches that it keeps.

        number: of the step, from 0, after those before; videos: int [m]. Returns float32 [m, C]
        and bool [m, T, H, W]. Compiles for each power of two of videos.

        Raises UserError if the probabilities are no finite numbers.
        """
        own = self._passes[number]
        step, grid = own.step, Grid.square(*own.step.grid)
        rows = np.resize(videos, 1 << (len(videos) - 1).bit_length())
        budget = min(step.budget, grid.tokens + (self._model.cls == "inside"))
        probabilities, kept, ranked = _run_pass(
            self._params,
            self._patches[step.grid][rows],
            self._ranked[step.grid][rows] if own.takes_ranking else None,
            model=self._model,
            grid=grid,
            budget=budget,
            head=step.head,
            ranked_budget=own.ranked_budget,
        )
        if own.ranked_budget:
            order = np.asarray(ranked)[: len(videos)]
            of_all = np.zeros((self.videos, order.shape[1]), order.dtype)
            of_all[videos] = order
            self._ranked[step.grid] = of_all
        check_finite(probabilities)
        return np.asarray(probabilities)[: len(videos)], np.asarray(kept)[: len(videos)]


@partial(jax.jit, static_argnames=("model", "grid", "budget", "head", "ranked_budget"))
def _run_pass(
    params: dict,
    patches: jax.Array,
    ranked: jax.Array | None,
    *,
    model: FluxViTConfig,
    grid: Grid,
    budget: int,
    head: int,
    ranked_budget: int,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Probabilities [b, C], the kept patches [b, T, H, W], and the ranked ones, if asked for."""
    key = jax.random.key(0) if model.selector in NOISY_SELECTORS else None

    def call(
        network: FluxViT, patches: jax.Array, *ranked: jax.Array
    ) -> tuple[ModelOutput, jax.Array | None]:
        order = ranked[0] if ranked else None
        if ranked_budget:
            order = network.rank(patches, grid, ranked_budget, key)
        return network.on_grid(patches, grid, budget, head, key, order), order

    pixels = fluxvit.normalize(patches).astype(model.dtype)
    taken = () if ranked is None else (ranked,)
    answer, order = fluxvit.on_platform(call, params, model, pixels, *taken)
    kept = token_selection.mask(answer.kept, grid.tokens).reshape(-1, *grid)
    return jax.nn.softmax(answer.logits), kept, order
