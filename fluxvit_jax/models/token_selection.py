"""Token selection: the patches that a token budget keeps. Shapes are static, the grid is data.

A selector gives a score to each token and a number of groups of consecutive frames; the ranking is
the same for all selectors. It does not depend on the budget: the tokens that a smaller budget keeps
are a prefix of those that a larger one keeps, so a step with several budgets sorts once.

Source of the group-dynamic rule: the official FluxViT code, as in the paper's section 3.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, Key

from fluxvit_jax.errors import UserError
from fluxvit_jax.models.arrays import Array

Selector = Literal["group_dynamic", "dynamic_l1", "dynamic_l2", "tube", "random", "none"]
Rounding = Literal["exact", "official"]
SELECTORS: tuple[str, ...] = get_args(Selector)
NOISY_SELECTORS = ("tube", "random")  # with random scores
MAX_RULE_GROUPS = 4
MOST_PATCHES = 65_535  # of a clip: half the square of more is no int32


class GridLimits(NamedTuple):
    """Static bounds on the grids of a compiled program.

    frames, rows, columns: maxima; fewest_tokens: the minimum of a grid's tokens. A budget up to
    that number is always filled and needs no mask.
    """

    frames: int
    rows: int
    columns: int
    fewest_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PatchCoordinates:
    """Frame, row and column of each of P patches, int32 [B, P]; real: False for padding."""

    t: jax.Array
    h: jax.Array
    w: jax.Array
    real: jax.Array


class Selection(NamedTuple):
    """The selected patches, highest score first within a group, groups interleaved.

    token_index: int32 [B, N], patch indices in 0..P-1.
    valid: bool [B, N], False for padding; None if all are known to be real.
    """

    token_index: jax.Array
    valid: jax.Array | None


def patch_coordinates(grid: Int[Array, "B 3"], patches: int) -> PatchCoordinates:
    """The frame, row and column of each of P patches, in the order t, h, w; grid: int32 [B, 3]."""
    frames, rows, columns = (grid[:, axis, None] for axis in range(3))
    index = jnp.arange(patches, dtype=jnp.int32)[None]
    t, in_frame = index // (rows * columns), index % (rows * columns)
    return PatchCoordinates(t=t, h=in_frame // columns, w=in_frame % columns, real=t < frames)


def num_groups(frames: Int[Array, "*shape"]) -> Int[Array, "*shape"]:
    """Groups of consecutive frames for a clip of `frames` frames: int32, the shape of `frames`.

    The official rule (4 when the frames divide by 4, 1 for two frames, else 2), bounded so that
    every group has the two frames that a difference needs: 4 frames make 2 groups, where the
    official code fails, 3 frames make 1.
    """
    official = jnp.where(frames % MAX_RULE_GROUPS == 0, MAX_RULE_GROUPS, 2)
    return bound_groups(official, frames)


def bound_groups(
    groups: Int[Array, "*shape"] | int, frames: Int[Array, "*shape"]
) -> Int[Array, "*shape"]:
    """`groups`, reduced so that every group has at least two frames; at least 1."""
    return jnp.maximum(1, jnp.minimum(groups, frames // 2))


def frame_difference(
    tokens: Float[Array, "B P C"], grid: Int[Array, "B 3"], groups: Int[Array, " B"], order: int
) -> Float[Array, "B P"]:
    """Distance of each token to the same patch of the previous frame in its group.

    tokens: [B, P, C]; grid: int32 [B, 3]; groups: int32 [B]; order: 1 or 2, the norm.
    Returns float32 [B, P]. The first frame of a group has the scores of its second; a clip of one
    frame has no motion and scores 0 everywhere.
    """
    tokens = tokens.astype(jnp.float32)
    per_frame = grid[:, 1] * grid[:, 2]
    before = jax.vmap(lambda x, shift: jnp.roll(x, shift, axis=0))(tokens, per_frame)
    distance = jnp.linalg.norm(tokens - before, ord=order, axis=-1)
    after = jax.vmap(lambda x, shift: jnp.roll(x, -shift))(distance, per_frame)
    t = patch_coordinates(grid, tokens.shape[1]).t
    group = group_of_frame(t, grid[:, :1], groups[:, None])
    first = t == group_start(group, grid[:, :1], groups[:, None])
    distance = jnp.where(first, after, distance)
    return jnp.where(grid[:, :1] > 1, distance, 0.0)


def group_start(
    group: Int[Array, "..."] | int,
    frames: Int[Array, "..."] | int,
    groups: Int[Array, "..."] | int,
) -> Int[Array, "..."] | int:
    """The first frame of a group if `frames` frames form near-equal consecutive groups."""
    return group * frames // groups


def group_of_frame(
    t: Int[Array, "..."], frames: Int[Array, "..."] | int, groups: Int[Array, "..."] | int
) -> Int[Array, "..."]:
    """The group of frame `t`; the inverse of `group_start`."""
    return ((t + 1) * groups - 1) // frames


def token_scores(
    kind: Selector,
    tokens: Float[Array, "B P C"],
    grid: Int[Array, "B 3"],
    groups: Int[Array, " B"],
    key: Key[Array, "..."] | None,
) -> Float[Array, "B P"]:
    """The score of each token, float32 [B, P]; tokens with higher scores are kept first.

    key: one for all clips, or one for each, [B], if a clip's scores must not depend on the rest of
    its batch.

    Raises ValueError for a selector with random scores if `key` is None.
    """
    B, P, _ = tokens.shape
    if kind in ("group_dynamic", "dynamic_l2"):
        return frame_difference(tokens, grid, groups, order=2)
    if kind == "dynamic_l1":
        return frame_difference(tokens, grid, groups, order=1)
    if kind == "none":
        return jnp.zeros((B, P), jnp.float32)
    if key is None:
        raise ValueError(f"the selector {kind!r} draws its scores and needs a key")
    keys = key if key.ndim else jax.random.split(key, B)
    noise = jax.vmap(lambda key: jax.random.uniform(key, (P,)))(keys)
    if kind == "random":
        return noise
    per_frame = grid[:, 1:2] * grid[:, 2:3]
    in_frame = jnp.arange(P, dtype=jnp.int32)[None] % per_frame
    return jnp.take_along_axis(noise, in_frame, axis=1)  # the same in every frame


def ranking(
    scores: Float[Array, "B P"], grid: Int[Array, "B 3"], groups: Int[Array, " B"], max_groups: int
) -> Int[Array, "B P"]:
    """Patch indices in the order in which growing budgets keep them: int32 [B, P].

    Within a group, higher scores come first and ties are resolved by token order. Groups are
    interleaved by Webster (Sainte-Lague) apportionment, so that each prefix is shared among the
    groups in proportion to their tokens: next is the group with the smallest (rank + 1/2) / size,
    and ties go to the earlier group. Groups of equal size get equal shares. Padding comes last.

    Raises UserError for more than `MOST_PATCHES` patches.
    """
    B, P = scores.shape
    if P > MOST_PATCHES:
        raise UserError(
            f"a clip of {P} patches: tokens are selected of at most {MOST_PATCHES}; use fewer "
            "frames or a lower resolution"
        )
    frames, per_frame = grid[:, :1], grid[:, 1:2] * grid[:, 2:3]
    patch = patch_coordinates(grid, P)
    group = jnp.where(patch.real, group_of_frame(patch.t, frames, groups[:, None]), max_groups)
    index = jnp.broadcast_to(jnp.arange(P, dtype=jnp.int32), (B, P))
    group, _, index = jax.lax.sort((group, -scores, index), num_keys=2, is_stable=True)

    # Groups are consecutive frames and stay in place when sorted, so ranks need no second sort.
    def tokens_before(group: jax.Array | int) -> jax.Array:
        return group_start(group, frames, groups[:, None]) * per_frame

    rank = jnp.arange(P, dtype=jnp.int32)[None] - tokens_before(group)
    size = jnp.maximum(tokens_before(group + 1) - tokens_before(group), 1)  # 0 for padding only
    order = rank
    for other in range(max_groups):  # add the number of tokens of each other group that come before
        other_size = jnp.where(
            other < groups[:, None], tokens_before(other + 1) - tokens_before(other), 0
        )
        # Ranks r with (2r + 1) * size < (2 * rank + 1) * other_size, with equality for earlier
        # groups: integers throughout, exact up to `MOST_PATCHES`.
        limit = (2 * rank + 1) * other_size - size
        ahead = jnp.where(other < group, limit // (2 * size) + 1, -(-limit // (2 * size)))
        order += jnp.where(other == group, 0, jnp.clip(ahead, 0, other_size))
    order = jnp.where(group < max_groups, order, P)
    if P * P < 2**31:  # one key: faster than two
        return jax.lax.sort(order * P + index, is_stable=False) % P
    return jax.lax.sort((order, index), num_keys=1, is_stable=True)[1]


def official_kept_table(budget: int, patches: int) -> Int[np.ndarray, "_ 1+{patches}"]:
    """Tokens that the official code keeps, int32 [MAX_RULE_GROUPS + 1, P + 1]: (groups, total).

    `groups * int((1 - ratio) * (total // groups))` with `ratio = 1 - budget / total` in float64,
    which loses up to four tokens; all tokens if they fit the budget.
    """
    table = np.zeros((MAX_RULE_GROUPS + 1, patches + 1), np.int32)
    total = np.arange(1, patches + 1)
    for groups in range(1, MAX_RULE_GROUPS + 1):
        ratio = 1 - budget / total
        kept = groups * ((1 - ratio) * (total // groups)).astype(np.int32)
        table[groups, 1:] = np.where(total <= budget, total, kept)
    return table


def kept_tokens(
    total: Int[Array, "*shape"],
    groups: Int[Array, "*shape"],
    budget: int,
    patches: int,
    rounding: Rounding,
) -> Int[Array, "*shape"]:
    """Number of tokens that a budget keeps of `total` in `groups` groups: int32, like `total`."""
    if rounding == "exact":
        return jnp.minimum(total, budget)
    # The official arithmetic is in float64, which is disabled on the device: look up a table.
    return jnp.asarray(official_kept_table(budget, patches))[groups, total]


def select(
    tokens: Float[Array, "B P C"],
    grid: Int[Array, "B 3"],
    budget: int,
    limits: GridLimits,
    *,
    kind: Selector = "group_dynamic",
    groups: int = 0,
    rounding: Rounding = "exact",
    key: Key[Array, "..."] | None = None,
) -> Selection:
    """Selects `budget` of each clip's tokens.

    tokens: [B, P, C], patch embeddings; grid: int32 [B, 3], frames, rows, columns of each clip.
    groups: number of groups of consecutive frames, 0 for the rule; for group_dynamic only.
    key: for the selectors in NOISY_SELECTORS, one for all clips or one for each.
    Returns a Selection of N = min(budget, P) patches.
    """
    P = tokens.shape[1]
    N = min(budget, P)
    frames = grid[:, 0]
    if kind != "group_dynamic":
        clip_groups, max_groups = jnp.ones_like(frames), 1
    elif groups == 0:
        clip_groups, max_groups = num_groups(frames), MAX_RULE_GROUPS
    else:
        clip_groups, max_groups = bound_groups(groups, frames), groups
    scores = token_scores(kind, tokens, grid, clip_groups, key)
    index = ranking(scores, grid, clip_groups, max_groups)[:, :N]
    if rounding == "exact" and limits.fewest_tokens >= N:
        return Selection(index, None)
    num_kept = kept_tokens(jnp.prod(grid, axis=1), clip_groups, budget, P, rounding)
    return Selection(index, jnp.arange(N)[None] < num_kept[:, None])


def gumbel_top_k(attention: Float[Array, "B N"], noise: Float[Array, "B N"]) -> Int[Array, "B N"]:
    """Token indices sampled without replacement in proportion to attention: int32 [B, N].

    attention: float32 [B, N], at least 0; noise: float32 [B, N], exponential with mean 1. The first
    n indices are a sample of n tokens, as from `torch.multinomial` in the official code, so smaller
    samples are prefixes of larger ones. Without noise (ones) tokens are sorted by attention;
    uniform attention samples uniformly.
    """
    return jax.lax.top_k(attention / noise, attention.shape[1])[1]


def mask(selection: Selection, patches: int) -> Bool[Array, "B {patches}"]:
    """Mask of the selected patches of each clip: bool [B, P]."""
    index, valid = selection
    row = jnp.arange(index.shape[0])[:, None]
    return (
        jnp.zeros((index.shape[0], patches), bool)
        .at[row, index]
        .set(True if valid is None else valid)
    )


def take_prefix(
    selection: Selection, tokens: int, fewest_tokens: int, rounding: Rounding = "exact"
) -> Selection:
    """The selection of a smaller budget of `tokens`, from that of a larger one (exact only)."""
    if rounding != "exact":
        raise ValueError("only exact budgets are prefixes of each other")
    valid = None if fewest_tokens >= tokens else selection.valid
    return Selection(
        selection.token_index[:, :tokens], None if valid is None else valid[:, :tokens]
    )
