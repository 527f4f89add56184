"""Which patches a token budget keeps: static shapes, with the grid as data.

Every selector is a score for each token and a number of groups of consecutive frames; one ordering
then serves them all. The ordering does not depend on the budget: the tokens that a smaller budget
keeps are a prefix of those that a larger one keeps, so a step with several budgets sorts once.

Source of the group-dynamic rule: the official FluxViT code, as in the paper's section 3.
"""

from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

Selector = Literal["group_dynamic", "dynamic_l1", "dynamic_l2", "tube", "random", "none"]
Rounding = Literal["exact", "official"]
SELECTORS: tuple[str, ...] = get_args(Selector)
NOISY_SELECTORS = ("tube", "random")  # these draw their scores, the others compute them
MAX_RULE_GROUPS = 4


class GridLimits(NamedTuple):
    """What a compiled program knows of the grids that it will meet.

    The three sides bound every grid; no grid has fewer than `fewest_tokens` tokens, so a budget up
    to that number is always filled and needs no mask.
    """

    frames: int
    rows: int
    columns: int
    fewest_tokens: int


class Layout(NamedTuple):
    """Where each of the P patch places of a clip lies; int32 [B, P] each. Padding is not `real`."""

    t: jax.Array
    h: jax.Array
    w: jax.Array
    real: jax.Array


class Selection(NamedTuple):
    """The kept patch places, best first within a group, groups interleaved.

    index: int32 [B, N], places in 0..P-1.
    valid: bool [B, N], or None where every place is known to hold a real token.
    """

    index: jax.Array
    valid: jax.Array | None


def layout(grid: jax.Array, places: int) -> Layout:
    """The frame, row and column of each patch place. grid: int32 [B, 3]; order t, h, w."""
    frames, rows, columns = (grid[:, axis, None] for axis in range(3))
    place = jnp.arange(places, dtype=jnp.int32)[None]
    t, in_frame = place // (rows * columns), place % (rows * columns)
    return Layout(t, in_frame // columns, in_frame % columns, t < frames)


def rule_groups(frames: jax.Array) -> jax.Array:
    """Groups of consecutive frames for a clip of `frames` frames: int32, the shape of `frames`.

    The official rule (4 when the frames divide by 4, 1 for two frames, else 2), bounded so that
    every group has the two frames that a difference needs: 4 frames make 2 groups, where the
    official code fails, 3 frames make 1.
    """
    wanted = jnp.where(frames % MAX_RULE_GROUPS == 0, MAX_RULE_GROUPS, 2)
    return bound_groups(wanted, frames)


def bound_groups(groups: jax.Array | int, frames: jax.Array) -> jax.Array:
    """`groups`, or as many groups of at least two frames as `frames` allow; at least 1."""
    return jnp.maximum(1, jnp.minimum(groups, frames // 2))


def frame_difference(tokens: jax.Array, grid: jax.Array, groups: jax.Array, order: int):
    """Distance of each token to the one before it in time inside its group.

    tokens: [B, P, C]; grid: int32 [B, 3]; groups: int32 [B]; order: 1 or 2, the norm.
    Returns float32 [B, P]. The first frame of a group has the scores of its second; a clip of one
    frame has no motion and scores 0 everywhere.
    """
    tokens = tokens.astype(jnp.float32)
    per_frame = grid[:, 1] * grid[:, 2]
    before = jax.vmap(lambda x, shift: jnp.roll(x, shift, axis=0))(tokens, per_frame)
    distance = jnp.linalg.norm(tokens - before, ord=order, axis=-1)
    after = jax.vmap(lambda x, shift: jnp.roll(x, -shift))(distance, per_frame)
    t = layout(grid, tokens.shape[1]).t
    group = group_of_frame(t, grid[:, :1], groups[:, None])
    first = t == group_start(group, grid[:, :1], groups[:, None])
    distance = jnp.where(first, after, distance)
    return jnp.where(grid[:, :1] > 1, distance, 0.0)


def group_start(group: jax.Array, frames: jax.Array, groups: jax.Array) -> jax.Array:
    """First frame of a group when `frames` frames are cut into near-equal consecutive groups."""
    return group * frames // groups


def group_of_frame(t: jax.Array, frames: jax.Array, groups: jax.Array) -> jax.Array:
    """The group that frame `t` belongs to; the inverse of `group_start`."""
    return ((t + 1) * groups - 1) // frames


def token_scores(
    kind: Selector, tokens: jax.Array, grid: jax.Array, groups: jax.Array, key: jax.Array | None
) -> jax.Array:
    """The score of each token, float32 [B, P]; higher is kept first.

    key: one for all clips, or one for each, [B], where a clip's scores must not depend on the batch
    that it is in.

    Raises ValueError for a selector that draws its scores when `key` is None.
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
    noise = jax.vmap(lambda one: jax.random.uniform(one, (P,)))(keys)
    if kind == "random":
        return noise
    per_frame = grid[:, 1:2] * grid[:, 2:3]
    in_frame = jnp.arange(P, dtype=jnp.int32)[None] % per_frame
    return jnp.take_along_axis(noise, in_frame, axis=1)  # a tube scores alike in every frame


def keep_order(scores: jax.Array, grid: jax.Array, groups: jax.Array, max_groups: int):
    """Patch places in the order in which growing budgets take them: int32 [B, P].

    Inside a group the higher score comes first, ties by token order. Groups take turns so that
    each prefix shares its length among the groups in proportion to their tokens, by the method of
    Webster (one more for the group with the smallest (rank + 1/2) / size, ties to the earlier
    group): equal groups get equal shares. Padding comes last.
    """
    B, P = scores.shape
    frames, per_frame = grid[:, :1], grid[:, 1:2] * grid[:, 2:3]
    where = layout(grid, P)
    own = jnp.where(where.real, group_of_frame(where.t, frames, groups[:, None]), max_groups)
    place = jnp.broadcast_to(jnp.arange(P, dtype=jnp.int32), (B, P))
    own, _, place = jax.lax.sort((own, -scores, place), num_keys=2, is_stable=True)

    # Groups are consecutive frames, so the sort leaves each where it was: ranks follow at once.
    def tokens_before(group):
        return group_start(group, frames, groups[:, None]) * per_frame

    rank = jnp.arange(P, dtype=jnp.int32)[None] - tokens_before(own)
    size = jnp.maximum(tokens_before(own + 1) - tokens_before(own), 1)  # 0 for padding only
    turn = rank
    for other in range(max_groups):  # how many tokens of each other group have their turn before
        other_size = jnp.where(
            other < groups[:, None], tokens_before(other + 1) - tokens_before(other), 0
        )
        # Ranks r with (2r + 1) * size < (2 * rank + 1) * other_size, with equality for earlier
        # groups: integers throughout, exact up to 16,000 tokens.
        limit = (2 * rank + 1) * other_size - size
        ahead = jnp.where(other < own, limit // (2 * size) + 1, -(-limit // (2 * size)))
        turn += jnp.where(other == own, 0, jnp.clip(ahead, 0, other_size))
    turn = jnp.where(own < max_groups, turn, P)
    return jax.lax.sort(turn * P + place, is_stable=False) % P  # one number each: quicker to sort


def official_kept_table(budget: int, places: int) -> np.ndarray:
    """Tokens the official code keeps, int32 [MAX_RULE_GROUPS + 1, places + 1]: (groups, total).

    `groups * int((1 - ratio) * (total // groups))` with `ratio = 1 - budget / total` in float64,
    which loses up to four tokens; everything when the budget is no limit.
    """
    table = np.zeros((MAX_RULE_GROUPS + 1, places + 1), np.int32)
    total = np.arange(1, places + 1)
    for groups in range(1, MAX_RULE_GROUPS + 1):
        ratio = 1 - budget / total
        kept = groups * ((1 - ratio) * (total // groups)).astype(np.int32)
        table[groups, 1:] = np.where(total <= budget, total, kept)
    return table


def kept_tokens(
    total: jax.Array, groups: jax.Array, budget: int, places: int, rounding: Rounding
) -> jax.Array:
    """How many tokens a budget keeps of `total` in `groups` groups: int32, shape of `total`."""
    if rounding == "exact":
        return jnp.minimum(total, budget)
    # float64 is not to be had inside a program, so the official arithmetic is a table.
    return jnp.asarray(official_kept_table(budget, places))[groups, total]


def select(
    tokens: jax.Array,
    grid: jax.Array,
    budget: int,
    limits: GridLimits,
    *,
    kind: Selector = "group_dynamic",
    groups: int = 0,
    rounding: Rounding = "exact",
    key: jax.Array | None = None,
) -> Selection:
    """Keeps `budget` of each clip's tokens.

    tokens: [B, P, C], patch embeddings; grid: int32 [B, 3], frames, rows, columns of each clip.
    groups: how many groups of consecutive frames, 0 for the rule; only group_dynamic has groups.
    key: for the selectors in NOISY_SELECTORS, one or one for each clip.
    Returns a Selection of N = min(budget, P) places.
    """
    P = tokens.shape[1]
    N = min(budget, P)
    frames = grid[:, 0]
    if kind != "group_dynamic":
        count, max_groups = jnp.ones_like(frames), 1
    elif groups == 0:
        count, max_groups = rule_groups(frames), MAX_RULE_GROUPS
    else:
        count, max_groups = bound_groups(groups, frames), groups
    scores = token_scores(kind, tokens, grid, count, key)
    index = keep_order(scores, grid, count, max_groups)[:, :N]
    if rounding == "exact" and limits.fewest_tokens >= N:
        return Selection(index, None)
    kept = kept_tokens(jnp.prod(grid, axis=1), count, budget, P, rounding)
    return Selection(index, jnp.arange(N)[None] < kept[:, None])


def draw(attention: jax.Array, noise: jax.Array) -> jax.Array:
    """Places of tokens in the order in which they are drawn by their attention: int32 [B, N].

    attention: float32 [B, N], at least 0; noise: float32 [B, N], exponential with mean 1. The first
    n are n tokens drawn without replacement, each next one of those left in proportion to its
    attention: what the official code has `torch.multinomial` do. So fewer tokens are a prefix of
    more. Without noise (ones) the most attended come first; equal attention draws evenly.
    """
    return jax.lax.top_k(attention / noise, attention.shape[1])[1]


def mask(selection: Selection, places: int) -> jax.Array:
    """Which of a clip's patch places are kept: bool [B, places]."""
    index, valid = selection
    row = jnp.arange(index.shape[0])[:, None]
    return (
        jnp.zeros((index.shape[0], places), bool)
        .at[row, index]
        .set(True if valid is None else valid)
    )


def truncate(
    selection: Selection, tokens: int, fewest_tokens: int, rounding: Rounding = "exact"
) -> Selection:
    """What a smaller budget of `tokens` keeps, given the selection of a larger one (exact only)."""
    if rounding != "exact":
        raise ValueError("only exact budgets are prefixes of each other")
    valid = None if fewest_tokens >= tokens else selection.valid
    return Selection(selection.index[:, :tokens], None if valid is None else valid[:, :tokens])
