"""Multiply-accumulates of a forward pass, by formula."""

import itertools
from dataclasses import dataclass

from fluxvit_jax.grids import Grid, kept_tokens
from fluxvit_jax.models import padded_sequence
from fluxvit_jax.models.decoders import DecodersConfig
from fluxvit_jax.models.fluxvit import PATCH_VALUES, FluxViTConfig
from fluxvit_jax.models.internvideo2 import InternVideo2Config
from fluxvit_jax.models.language_model import LanguageModelConfig
from fluxvit_jax.models.text_encoder import TextEncoderConfig
from fluxvit_jax.models.token_merging import schedule
from fluxvit_jax.models.token_selection import NOISY_SELECTORS

GIGA = 1e9
Network = FluxViTConfig | InternVideo2Config


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardCost:
    """1e9 multiply-accumulates of one clip's forward pass (the paper calls them GFLOPs).

    all: of the program; kept: by the paper's count, without token selection; selection: the part of
    `all` that ranks the patches of the grid, the same for all budgets.
    """

    all: float
    kept: float
    selection: float = 0.0


def gflops(model: FluxViTConfig, grid: Grid, budget: int) -> ForwardCost:
    """The cost of one clip on `grid` at a token budget, by formula.

    It counts matrix products, with N tokens including CLS:
        a block: 12 C^2 per token (q, k, v 3, projection 1, MLP 8) and 2 N^2 C for attention;
        the patch embedding: 588 C per patch;
        the pooling head: k and v of every token, q, attention and projection of one query;
        the classifier.
    `kept` embeds the selected patches only, as many as `model.rounding` keeps.
    `all` is the cost of `FluxViT.on_grid`: it embeds every patch of the grid for the selection and
    the selected ones again, takes the frame differences (C per patch), and computes all tokens of
    the budget, including those that the official rounding masks. A budget of the whole grid is no
    exception. Selectors with random scores do not read the patches, so for them XLA removes the
    first embedding.

    Both leave out what does not grow with the batch: the position table is resized once for a
    whole batch (0.25 for S on 12 x 168 px), and the result could be reused.

    With token merging (`model.merge_blocks`) all patches are embedded, once, and the similarities
    for merging are counted. Tokens must be computed before they are merged, so no cheaper count
    exists, and `kept` equals `all`.

    Raises ValueError if `model.merge_blocks` blocks cannot reach the budget.
    """
    patch_budget = padded_sequence.patch_budget(budget, model.cls)
    if model.merge_blocks and patch_budget < grid.tokens:
        merging = _merging_macs(model, grid, patch_budget) / GIGA
        return ForwardCost(all=merging, kept=merging)
    computed = min(patch_budget, grid.tokens)
    kept = kept_tokens(grid, patch_budget, model.rounding)
    selection = _selection_macs(model, grid)
    return ForwardCost(
        all=(selection + _encoding_macs(model, computed)) / GIGA,
        kept=_encoding_macs(model, kept) / GIGA,
        selection=selection / GIGA,
    )


def features_macs(model: Network, patches: int) -> int:
    """Multiply-accumulates from `patches` patches to the clip vector of one pooling head."""
    tokens = patches + 1
    blocks = model.depth * _block_macs(model, tokens, tokens)
    return _embedding_macs(model, tokens) + blocks + _pooling_macs(model, tokens)


def frozen_macs(model: Network, patches: int, blocks: int, pooling: bool) -> int:
    """Multiply-accumulates of the embedding, the first blocks and, if frozen too, the pooling."""
    tokens = patches + 1
    return (
        _embedding_macs(model, tokens)
        + blocks * _block_macs(model, tokens, tokens)
        + pooling * _pooling_macs(model, tokens)
    )


def attention_macs(model: Network, patches: int) -> int:
    """Multiply-accumulates of attention itself: q k and the weighted sum of v."""
    return model.depth * 2 * (patches + 1) ** 2 * model.width


def decoders_macs(decoders: DecodersConfig, patches: int) -> int:
    """Multiply-accumulates of the decoders of a student with `patches` patches."""
    tokens = decoders.width * (decoders.width + decoders.target_width) * (patches + 1)
    pooled = decoders.pool_width * (decoders.pool_width + decoders.target_pool_width)
    return decoders.count * tokens + pooled


def text_macs(encoder: TextEncoderConfig) -> tuple[int, int]:
    """Multiply-accumulates of one text, and those of attention itself among them."""
    C, L = encoder.width, encoder.context
    attention = encoder.depth * 2 * L * L * C
    products = encoder.depth * L * (4 * C * C + 2 * C * encoder.hidden)
    return products + attention + C * encoder.out, attention


def connector_macs(width: int, out: int, tokens: int) -> int:
    """Multiply-accumulates of the two linear layers before a language model."""
    return tokens * (width * out + out * out)


def language_model_macs(model: LanguageModelConfig, tokens: int, scored: int) -> tuple[int, int]:
    """Multiply-accumulates of `tokens` tokens, `scored` of which get scores of the next one.

    Returns them all, and those of attention itself among them.
    """
    C, D = model.width, model.head_size
    projections = 2 * C * D * (model.heads + model.kv_heads)
    layers = model.depth * tokens * (projections + 3 * C * model.hidden)
    attention = model.depth * 2 * tokens**2 * model.heads * D
    return layers + attention + scored * C * model.vocabulary, attention


def _embedding_macs(model: Network, patches: int) -> int:
    return PATCH_VALUES * model.width * patches


def _selection_macs(model: FluxViTConfig, grid: Grid) -> int:
    """The cost of token selection: embedding all patches and comparing frames."""
    if model.selector in ("none", *NOISY_SELECTORS):
        return 0
    return _embedding_macs(model, grid.tokens) + model.width * grid.tokens


def _encoding_macs(model: FluxViTConfig, patches: int) -> int:
    """The cost from `patches` patches to class scores, all patches in every block.

    The embedding includes the placeholder row for CLS (`padded_sequence.pad_for_cls`).
    """
    return features_macs(model, patches) + _classifier_macs(model)


def _merging_macs(model: FluxViTConfig, grid: Grid, patch_budget: int) -> int:
    """The cost with token merging between attention and MLP of the first blocks."""
    counts = (grid.tokens, *schedule(grid.tokens, patch_budget, model.merge_blocks))
    last = counts[-1]
    merging = sum(
        _block_macs(model, before + 1, after + 1) + _matching_macs(model, before, after)
        for before, after in itertools.pairwise(counts)
    )
    others = (model.depth - model.merge_blocks) * _block_macs(model, last + 1, last + 1)
    head = _pooling_macs(model, last + 1) + _classifier_macs(model)
    return _embedding_macs(model, grid.tokens + 1) + merging + others + head


def _matching_macs(model: FluxViTConfig, before: int, after: int) -> int:
    """The cost of similarities between the halves of the patches, by the heads' mean keys."""
    if after == before:
        return 0
    half = before // 2
    return half * (before - half) * (model.width // model.heads)


def _block_macs(model: Network, attending: int, remaining: int) -> int:
    """The cost of a block with `attending` tokens in attention and `remaining` in the MLP."""
    C = model.width
    attention = 4 * C * C * attending + 2 * attending**2 * C
    return attention + 2 * C * model.hidden * remaining


def _pooling_macs(model: Network, tokens: int) -> int:
    """The cost of attention pooling with one query."""
    C = model.width
    keys_values = 2 * C * C * tokens
    return keys_values + C * C + 2 * C * tokens + C * model.pool_width


def _classifier_macs(model: FluxViTConfig) -> int:
    return model.pool_width * model.classes
