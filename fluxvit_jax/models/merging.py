"""Token merging (ToMe): a token budget met inside the network, as an alternative to selection.

All patches of a grid enter. Each of the first blocks merges pairs of tokens whose attention keys
are alike, between its attention and its MLP, until the budget is left. A merged token is the mean
of its patches and counts as so many in every attention that follows. vid-TLDR merges in the first
blocks of a video network in the same manner.

It costs more than selection at the same budget: all tokens pass the first block's attention, and
the blocks that merge still carry more of them than the budget. Selection embeds all patches too,
but its blocks see the kept ones alone. In return every patch has its part in the answer.

Source: Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023, section 3. What differs:
- There every block merges the same number of tokens, here the first blocks the same share, since
  the budget is to hold for as many of the blocks as possible.
- There what is left of one set comes before the other set, here tokens stay in order. Where a frame
  has an even number of patches, a patch and the same place in the next frame are in one set and
  cannot meet. Among tokens in order that ends with the first irregular gaps; in ToMe's order, meant
  for images, the other set stays regular, and still scenes merge worse.
"""

import jax
import jax.numpy as jnp

from fluxvit_jax.models.layers import l2_normalise

# Bipartite matching can halve the tokens in one block, but then half of them must go, however
# little they are like any other. Over four blocks none of them merges more than 30% on the way to
# a quarter, and so the least alike can wait for a better match.
GRADUAL_BLOCKS = 4


def blocks_for(tokens: int, budget: int, depth: int) -> int:
    """How many of `depth` blocks should merge: the fewest that can, but at least GRADUAL_BLOCKS.

    tokens, budget: of patches, without CLS. 0 where there is nothing to merge.

    Raises ValueError where all blocks together cannot reach the budget.
    """
    if tokens <= budget:
        return 0
    _check_within_reach(tokens, budget, depth)
    fewest = next(blocks for blocks in range(depth + 1) if tokens <= budget << blocks)
    return max(fewest, min(GRADUAL_BLOCKS, depth))


def schedule(tokens: int, budget: int, blocks: int) -> tuple[int, ...]:
    """How many tokens are left after each of the first `blocks` blocks; the last is the budget.

    tokens, budget: of patches, without CLS. Every block takes nearly the same share of its tokens,
    and none takes more than half. Where tokens <= budget all of them stay.

    Raises ValueError where so many blocks cannot reach the budget.
    """
    if tokens <= budget:
        return (tokens,) * blocks
    _check_within_reach(tokens, budget, blocks)
    left = [tokens]
    for block in range(1, blocks + 1):
        even = round(tokens * (budget / tokens) ** (block / blocks))
        within_reach = min(even, budget << blocks - block)
        left.append(max(left[-1] - left[-1] // 2, within_reach))
    return tuple(left[1:])


def _check_within_reach(tokens: int, budget: int, blocks: int) -> None:
    if budget < 1:
        raise ValueError(f"a budget of {budget} patches leaves nothing to merge into")
    if tokens > budget << blocks:
        raise ValueError(
            f"{blocks} merging blocks cannot bring {tokens} patches down to {budget}: each at most "
            f"halves them, which leaves {-(-tokens >> blocks)}"
        )


def merge(
    x: jax.Array, metric: jax.Array, size: jax.Array, keep: int
) -> tuple[jax.Array, jax.Array]:
    """Merges the tokens that are most alike until `keep` are left beside CLS.

    Tokens alternate between two sets, the first token in B, the second in A. Each of A is matched
    with its most similar one of B, and the best matches are merged into their B token: the mean,
    weighted by size. Equal similarities are taken in token order. CLS takes no part.

    x: [B, 1 + N, C], CLS first; metric: [B, 1 + N, D], compared by cosine in float32;
    size: float32 [B, 1 + N], how many patches each token stands for.
    Returns x [B, 1 + keep, C] and size [B, 1 + keep], CLS and the tokens that are left, in order.

    Raises ValueError where `keep` is more than N or less than half of it.
    """
    N = x.shape[1] - 1
    merged = N - keep
    if not 0 <= merged <= N // 2:
        raise ValueError(f"one merging leaves {N - N // 2} to {N} of {N} tokens, not {keep}")
    if merged == 0:
        return x, size
    best, order = _match(metric[:, 2::2], metric[:, 1::2])
    gone = order[:, :merged]
    into = jnp.take_along_axis(best, gone, axis=1)

    def merge_clip(sums, gone, into):
        sums = sums.at[into].add(sums[gone])
        return jnp.delete(sums, gone, axis=0, assume_unique_indices=True)

    # Sums over the patches, with their number as one more channel.
    size = size[..., None]
    sums = jnp.concatenate([x.astype(jnp.float32) * size, size], axis=-1)
    sums = jax.vmap(merge_clip)(sums, 2 + 2 * gone, 1 + 2 * into)
    x_sum, size = sums[..., :-1], sums[..., -1:]
    return (x_sum / size).astype(x.dtype), size[..., 0]


def _match(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The b most similar to each a, and the a's by that similarity, highest first: int [B, n].

    a: [B, n, D]; b: [B, m, D].
    """
    a, b = (l2_normalise(side.astype(jnp.float32)) for side in (a, b))
    # By default accelerators multiply float32 with fewer bits, and other tokens would be merged.
    scores = jnp.einsum("bnd,bmd->bnm", a, b, precision=jax.lax.Precision.HIGHEST)
    return jnp.argmax(scores, axis=2), jnp.argsort(-jnp.max(scores, axis=2), axis=1, stable=True)
