"""Token merging (ToMe): reaches a token budget inside the network, instead of selecting patches.

All patches of a grid enter. Each of the first blocks merges pairs of tokens with similar attention
keys, between its attention and its MLP, until the budget is reached. A merged token is the mean of
its patches and is weighted by their number in all later attention. vid-TLDR merges in the first
blocks of a video network in the same way.

It costs more than selection at the same budget: all tokens pass the first block's attention, and
the merging blocks still process more tokens than the budget. Selection embeds all patches too, but
its blocks process only the selected ones. In return every patch contributes to the output.

Source: "Token Merging: Your ViT But Faster", ICLR 2023, section 3. Differences:
- In ToMe every block merges the same number of tokens. Here the first blocks merge the same share,
  so that as many blocks as possible run at the budget.
- ToMe puts the remaining tokens of one set before the other set. Here tokens stay in order. If a
  frame has an even number of patches, a patch and the same patch of the next frame are in the same
  set and cannot be matched. With tokens in order this ends with the first irregular gaps; in ToMe's
  order, meant for images, the other set stays regular, and still scenes merge worse.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Float

from fluxvit_jax.models.arrays import Array
from fluxvit_jax.models.blocks import l2_normalize

# Bipartite matching can halve the tokens in one block, but then it merges even tokens that are
# similar to no other. Over four blocks each merges at most 30% on the way to a quarter, so tokens
# without a similar one can wait for a better match.
GRADUAL_BLOCKS = 4


def blocks_for(tokens: int, budget: int, depth: int) -> int:
    """Number of merging blocks among `depth`: the fewest possible, but at least GRADUAL_BLOCKS.

    tokens, budget: of patches, without CLS. Returns 0 if there is nothing to merge.

    Raises ValueError if all blocks together cannot reach the budget.
    """
    if tokens <= budget:
        return 0
    _check_within_reach(tokens, budget, depth)
    fewest = next(blocks for blocks in range(depth + 1) if tokens <= budget << blocks)
    return max(fewest, min(GRADUAL_BLOCKS, depth))


def schedule(tokens: int, budget: int, blocks: int) -> tuple[int, ...]:
    """Tokens left after each of the first `blocks` blocks; the last number is the budget.

    tokens, budget: of patches, without CLS. Each block merges nearly the same share of its tokens,
    at most half. If tokens <= budget, none are merged.

    Raises ValueError if `blocks` blocks cannot reach the budget.
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
            f"halves them, which leaves {math.ceil(tokens / 2**blocks)}"
        )


def merge_tokens(
    x: Float[Array, "B S C"], metric: Float[Array, "B S D"], size: Float[Array, "B S"], keep: int
) -> tuple[Float[Array, "B 1+{keep} C"], Float[Array, "B 1+{keep}"]]:
    """Merges the most similar tokens until `keep` are left besides CLS.

    Tokens alternate between two sets, the first token in set B, the second in set A. Each token of
    A is matched with the most similar one of B, and the best matches are merged into their B token:
    the mean, weighted by size. Ties are resolved in token order. CLS is not merged.

    x: [B, 1 + N, C], CLS first; metric: [B, 1 + N, D], compared by cosine in float32;
    size: float32 [B, 1 + N], patches per token.
    Returns x [B, 1 + keep, C] and size [B, 1 + keep], CLS and the remaining tokens, in order.

    Raises ValueError if `keep` is more than N or less than half of it.
    """
    N = x.shape[1] - 1
    merged = N - keep
    if not 0 <= merged <= N // 2:
        raise ValueError(f"one merging leaves {N - N // 2} to {N} of {N} tokens, not {keep}")
    if merged == 0:
        return x, size
    best, order = _match(metric[:, 2::2], metric[:, 1::2])
    source = order[:, :merged]
    target = jnp.take_along_axis(best, source, axis=1)

    def merge_clip(sums: jax.Array, source: jax.Array, target: jax.Array) -> jax.Array:
        sums = sums.at[target].add(sums[source])
        return jnp.delete(sums, source, axis=0, assume_unique_indices=True)

    # Sums over patches, with the number of patches as an additional channel.
    size = size[..., None]
    sums = jnp.concatenate([x.astype(jnp.float32) * size, size], axis=-1)
    sums = jax.vmap(merge_clip)(sums, 2 + 2 * source, 1 + 2 * target)
    x_sum, size = sums[..., :-1], sums[..., -1:]
    return (x_sum / size).astype(x.dtype), size[..., 0]


def _match(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The most similar b of each a, and the a's sorted by that similarity, descending.

    a: [B, n, D]; b: [B, m, D]. Returns two arrays int [B, n].
    """
    a, b = (l2_normalize(side.astype(jnp.float32)) for side in (a, b))
    # By default accelerators multiply float32 in lower precision and would merge other tokens.
    scores = jnp.einsum("bnd,bmd->bnm", a, b, precision=jax.lax.Precision.HIGHEST)
    return jnp.argmax(scores, axis=2), jnp.argsort(-jnp.max(scores, axis=2), axis=1, stable=True)
