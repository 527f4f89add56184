"""FluxViT: patches and their grid in, a clip vector and class scores out, at any token budget."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Float, Int, Key, Shaped

from fluxvit_jax.models import (
    blocks,
    padded_sequence,
    position_embedding,
    sharding_constraints,
    token_merging,
    token_selection,
)
from fluxvit_jax.models.arrays import Array, Size
from fluxvit_jax.models.token_selection import GridLimits, Selection

# Top-level names of a FluxViT's parameters.
PARAMS = (
    "cls_token",
    "pos_embed",
    "gpe",
    "patch_embed",
    "blocks",
    "pool",
    "fc_norm",
    "heads",
    "align",
)
PATCH_VALUES = 14 * 14 * 3  # a patch of one frame, order h, w, c
MEAN = (0.485, 0.456, 0.406)  # ImageNet, for values in 0..1
STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class FluxViTConfig:
    """The network's shape and execution. S, B and L: see `fluxvit_jax.config.variants.VARIANTS`.

    frames, rows, columns: the native grid, that of the position table.
    cls: "outside" adds the CLS token to the budget (official), "inside" counts it in the budget.
    layer_scale, kernel_std, position_scale: initial LayerScale, standard deviation of the kernels
        and scale of GPE; as in the official code, unless a small network is trained from scratch.
    scan: one compiled block looped over the depth; False unrolls (faster steps, slower compiles).
    remat: what the backward pass recomputes: "none"; "names", all but matrix products and
        attention, as in `blocks.Block`; "full", whole blocks.
    attention: the kernel, one of `attention.KERNELS`.
    float32_products: for CPUs, as in `blocks.BlockConfig`.
    frozen_blocks: the first blocks that are not trained, in a network of `with_frozen`; they drop
        no paths.
    merge_blocks: if above 0, `on_grid` does not select patches but merges tokens in the first
        `merge_blocks` blocks down to the budget: see `fluxvit_jax.models.token_merging`.
    """

    width: int
    depth: int
    heads: int
    frames: int
    rows: int
    columns: int
    classes: int
    budgets: int = 3  # pooling heads and classifiers, one for each training budget
    pool_width: int = 768
    pool_heads: int = 16
    layer_scale: float = 1e-5
    kernel_std: float = blocks.KERNEL_STD
    position_scale: float = 1.0
    gelu: str = "tanh"
    cls: str = "outside"
    selector: token_selection.Selector = "group_dynamic"
    groups: int = 0
    rounding: token_selection.Rounding = "exact"
    drop_path: float = 0.0
    dtype: str = "float32"
    scan: bool = True
    remat: str = "none"
    frozen_blocks: int = 0
    merge_blocks: int = 0
    attention: str = "xla"
    float32_products: bool = False

    @property
    def hidden(self) -> int:
        """Hidden units of the MLP of a block."""
        return 4 * self.width

    @property
    def native_tokens(self) -> int:
        """Patches of the native grid."""
        return self.frames * self.rows * self.columns


Model = TypeVar("Model", bound=nnx.Module)


class PatchEmbed(nnx.Module):
    """Dual patch norm: RMSNorm, linear projection, RMSNorm. [..., 588] -> [..., C]."""

    def __init__(self, width: int, dtype: DTypeLike, rngs: nnx.Rngs):
        self.norm_before = blocks.RMSNorm(PATCH_VALUES)
        self.proj = blocks.Linear(PATCH_VALUES, width, dtype=dtype, rngs=rngs)
        self.norm = blocks.RMSNorm(width)

    def __call__(self, patches: Float[Array, "*batch 588"]) -> Float[Array, "*batch C"]:
        return self.norm(self.proj(self.norm_before(patches)))


class FluxViT(nnx.Module):
    """The network. `split` extracts its parameters as a plain tree, `from_params` rebuilds it.

    A forward pass is `select`, then `encode` of the selected patches at their `position`,
    `pool_tokens` and `classify`; `__call__` does all. `on_grid` can use `merge_tokens` instead of
    `select` and `encode`.
    """

    def __init__(self, config: FluxViTConfig, rngs: nnx.Rngs):
        self.config = config
        C, dtype = config.width, jnp.dtype(config.dtype)
        self.cls_token = nnx.Param(blocks.kernel_init(rngs.params(), (C,)))
        self.pos_embed = nnx.Param(
            jnp.asarray(
                position_embedding.sincos_table(config.frames, config.rows, config.columns, C)
            )
        )
        self.gpe = blocks.Affine(C, config.position_scale)
        self.patch_embed = PatchEmbed(C, dtype, rngs)
        block = blocks.BlockConfig(
            width=C,
            heads=config.heads,
            hidden=config.hidden,
            kernel=config.attention,
            exact=config.gelu == "erf",
            layer_scale=config.layer_scale,
            dtype=dtype,
            recompute=config.remat == "names",
            float32_products=config.float32_products,
        )
        self.blocks = blocks.stack(config.depth, rngs, partial(blocks.Block, block))
        _rescale_by_depth(self.blocks, config.depth)
        self.pool = blocks.stack(
            config.budgets,
            rngs,
            lambda r: blocks.AttentionPool(C, config.pool_width, config.pool_heads, dtype, r),
        )
        self.fc_norm = blocks.LayerNorm(config.pool_width, rngs=rngs)
        self.heads = blocks.stack(
            config.budgets,
            rngs,
            lambda r: blocks.Linear(config.pool_width, config.classes, rngs=r),
        )
        self.align = blocks.stack(
            max(config.budgets - 1, 1),
            rngs,
            lambda r: blocks.AlignProjector(config.pool_width, dtype, r),
        )
        _scale_kernels(self, config.kernel_std / blocks.KERNEL_STD)

    def select(
        self,
        patches: Float[Array, "B P 588"],
        grid: Int[Array, "B 3"],
        budget: int,
        limits: GridLimits,
        key: Key[Array, "..."] | None = None,
    ) -> Selection:
        """The patches that a budget keeps, without gradient.

        patches: [B, P, 588], normalized; grid: int32 [B, 3]; key: for noisy selectors, one for all
        clips or one for each.
        """
        config = self.config
        return token_selection.select(
            jax.lax.stop_gradient(self.patch_embed(patches)),
            grid,
            self.patch_budget(budget),
            limits,
            kind=config.selector,
            groups=config.groups,
            rounding=config.rounding,
            key=key,
        )

    def patch_budget(self, budget: int) -> int:
        """Patches of a token budget, which may count CLS."""
        return padded_sequence.patch_budget(budget, self.config.cls)

    def encode(
        self,
        patches: Float[Array, "B S 588"],
        position: Float[Array, "B S C"],
        kept: Selection,
        key: Key[Array, " B"] | None = None,
    ) -> Float[Array, "B S C"]:
        """The tokens after the last block: [B, 1 + N, C], CLS first.

        patches: [B, 1 + N, 588], from `gather_tokens`; position: of these patches, from `position`;
        key: [B], one for each clip; drop path, training only.
        """
        return self._encode(patches, position, kept, key)[0]

    def features(
        self,
        patches: Float[Array, "B S 588"],
        position: Float[Array, "B S C"],
        kept: Selection,
        after: tuple[int, ...],
        head: int = 0,
        key: Key[Array, " B"] | None = None,
    ) -> "Features":
        """The features that distillation compares; arguments as in `encode`.

        after: the blocks, counted from 0 and ascending, whose outputs are returned; head: the
        pooling head.
        """
        tokens, hidden_states = self._encode(patches, position, kept, key, after)
        assert hidden_states is not None
        pool, valid = blocks.unstack(self.pool, head), padded_sequence.prepend_valid(kept.valid)
        return Features(hidden_states, pool(tokens, valid), pool.weights(tokens, valid)[:, 1:])

    def _encode(
        self,
        patches: jax.Array,
        position: jax.Array,
        kept: Selection,
        key: jax.Array | None,
        after: tuple[int, ...] = (),
    ) -> tuple[jax.Array, jax.Array | None]:
        """The tokens after the last block and after each of the blocks `after`, if any."""
        sequence = padded_sequence.padded_sequence(kept.token_index.shape[1], self.config.attention)
        x = sequence.pad(self.embed(patches, position))
        lengths = sequence.lengths(x.shape[0], kept.valid)
        x, outputs = self._run_blocks(x, lengths, key, after=after)
        return sequence.unpad(x), None if outputs is None else outputs[:, :, : sequence.tokens]

    def merge_tokens(
        self,
        patches: Float[Array, "B P 588"],
        grid: Int[Array, "G 3"],
        budget: int,
        limits: GridLimits,
    ) -> tuple[Float[Array, "B S C"], Float[Array, "B S"]]:
        """The tokens after the last block, with merging in the first blocks, and their sizes.

        patches: [B, P, 588], without padding; grid: as in `position`.
        Returns tokens [B, 1 + N, C], CLS first, and patches per token, float32 [B, 1 + N].

        Raises ValueError if there are more merging blocks than blocks, or too few for the budget.
        """
        config = self.config
        if config.merge_blocks > config.depth:
            raise ValueError(f"{config.merge_blocks} of {config.depth} blocks cannot merge")
        B, P, _ = patches.shape
        position = self.position(grid, _all_patches(B, P), limits)
        x = self.embed(padded_sequence.pad_for_cls(patches), position)
        size = jnp.ones(x.shape[:2], jnp.float32)
        schedule = token_merging.schedule(P, self.patch_budget(budget), config.merge_blocks)
        for number, keep in enumerate(schedule):
            block = blocks.unstack(self.blocks, number)
            x, keys = block.attention_branch(x, size)
            x, size = token_merging.merge_tokens(
                x, jnp.mean(keys, axis=2, dtype=jnp.float32), size, keep
            )
            x = block.mlp_branch(x)
        x, _ = self._run_blocks(x, None, None, size, first=config.merge_blocks)
        return x, size

    def embed(
        self, patches: Float[Array, "B S 588"], position: Float[Array, "B S C"]
    ) -> Float[Array, "B S C"]:
        """Token embeddings with positions added, [B, 1 + N, C], CLS first.

        patches: [B, 1 + N, 588]; the first is replaced by CLS; position: [B, 1 + N, C].
        """
        x = self.patch_embed(sharding_constraints.constrain_batch(patches))
        return padded_sequence.set_cls(x, self.cls_token[...]) + position

    def position(
        self, grid: Int[Array, "G 3"], index: Int[Array, "B N"], limits: GridLimits
    ) -> Float[Array, "B 1+N C"]:
        """Position embeddings of CLS and of selected patches: [B, 1 + N, C], CLS first.

        grid: int32 [G, 3] where G divides B, one grid for each run of B / G clips; index: int32
        [B, N], patch indices.
        """
        config, table = self.config, self.pos_embed[...]
        native = (config.frames, config.rows, config.columns, config.width)
        patches = self.gpe(table[1:]).reshape(native)
        return position_embedding.token_positions(
            table[0], patches, grid, index, limits[:3]
        ).astype(config.dtype)

    def _run_blocks(
        self,
        x: jax.Array,
        lengths: jax.Array | None,
        key: jax.Array | None,
        size: jax.Array | None = None,
        first: int = 0,
        after: tuple[int, ...] = (),
    ) -> tuple[jax.Array, jax.Array | None]:
        """Output of block `first` and all that follow; arguments as in `blocks.Block`.

        Returns x, [B, L, C], and the outputs of the K blocks `after`, [K, B, L, C], or None.
        """
        config = self.config
        graph, stacked = nnx.split(self.blocks)
        rates = jnp.linspace(0, config.drop_path, config.depth)
        if config.frozen_blocks:
            rates = rates.at[: config.frozen_blocks].set(0)
        keys = None if key is None else jax.vmap(partial(jax.random.split, num=config.depth))(key).T

        def body(x: jax.Array, layer: tuple) -> tuple[jax.Array, jax.Array | None]:
            state, rate, layer_key = layer
            x = nnx.merge(graph, state)(x, lengths, rate, layer_key, size)
            return x, x if after else None

        if config.remat == "full":
            # XLA cannot undo remat inside a loop: the barriers of prevent_cse would only add cost.
            body = jax.checkpoint(body, prevent_cse=not config.scan)
        if config.scan:
            if 0 < config.frozen_blocks < config.depth:
                # A loop of their own, which needs no backward pass and keeps nothing for one.
                frozen, stacked = (blocks.layer(stacked, part) for part in range(2))
                first = config.frozen_blocks
                x, _ = jax.lax.scan(body, x, (frozen, *_layers((rates, keys), 0, first)))
                layers = (stacked, *_layers((rates, keys), first))
            else:
                layers = _layers((stacked, rates, keys), first)
            x, outputs = jax.lax.scan(body, x, layers)
            return x, None if outputs is None else outputs[np.asarray(after) - first]
        by_block: dict[int, Any] = {}  # None if not returned
        for number in range(first, config.depth):
            layer = tuple(blocks.layer(tree, number) for tree in (stacked, rates, keys))
            x, by_block[number] = body(x, layer)
        return x, jnp.stack([by_block[number] for number in after]) if after else None

    def pool_tokens(
        self,
        tokens: Float[Array, "B S C"],
        kept: Selection,
        head: int,
        size: Float[Array, "B S"] | None = None,
    ) -> Float[Array, "B pool_width"]:
        """The clip vector of one head: [B, 1 + N, C] -> float32 [B, pool_width].

        size: of merged tokens, float32 [B, 1 + N].
        """
        return blocks.unstack(self.pool, head)(
            tokens, padded_sequence.prepend_valid(kept.valid), size
        )

    def classify(
        self, pooled: Float[Array, "B pool_width"], head: int
    ) -> Float[Array, "B classes"]:
        """Class scores of one head: [B, pool_width] -> float32 [B, classes]."""
        return blocks.unstack(self.heads, head)(self.fc_norm(pooled))

    def project(
        self, pooled: Float[Array, "B pool_width"], projector: int
    ) -> Float[Array, "B pool_width"]:
        """A smaller budget's vector, aligned with the largest budget's: unit [B, pool_width]."""
        return blocks.unstack(self.align, projector)(pooled)

    def __call__(
        self,
        patches: Float[Array, "B P 588"],
        grid: Int[Array, "B 3"],
        budget: int,
        head: int,
        limits: GridLimits,
        key: Key[Array, "..."] | None = None,
    ) -> tuple[Float[Array, "B classes"], Float[Array, "B pool_width"]]:
        """Logits [B, classes] and clip vectors [B, pool_width] at a token budget.

        patches: [B, P, 588], normalized, order t, h, w, zero-padded; grid: int32 [B, 3];
        key: for noisy selectors.
        """
        kept = self.select(patches, grid, budget, limits, key)
        position = self.position(grid, kept.token_index, limits)
        tokens = self.encode(gather_tokens(patches, kept), position, kept)
        pooled = self.pool_tokens(tokens, kept, head)
        return self.classify(pooled, head), pooled

    def on_grid(
        self,
        patches: Float[Array, "B P 588"],
        grid: tuple[int, int, int],
        budget: int,
        head: int,
        key: Key[Array, "..."] | None = None,
        ranked: Int[Array, "B N"] | None = None,
    ) -> "ModelOutput":
        """The forward pass of clips that share one grid, static at compile time.

        patches: [B, T * H * W, 588], normalized; grid: frames, rows, columns; key: as in `select`;
        ranked: what `rank` gave for this budget or a larger one, so as not to rank them again.

        Raises ValueError if `merge_blocks` blocks cannot reach the budget.
        """
        limits = GridLimits(*grid, grid[0] * grid[1] * grid[2])
        grids = jnp.broadcast_to(jnp.asarray(grid, jnp.int32), (patches.shape[0], 3))
        # One grid for all clips: the position table is resized once.
        if self.config.merge_blocks and self.patch_budget(budget) < limits.fewest_tokens:
            kept = Selection(_all_patches(*patches.shape[:2]), None)
            tokens, size = self.merge_tokens(patches, grids[:1], budget, limits)
        else:
            size = None
            if ranked is None:
                kept = self.select(patches, grids, budget, limits, key)
            else:
                tokens_kept = min(self.patch_budget(budget), limits.fewest_tokens)
                kept = Selection(ranked[:, :tokens_kept], None)
            position = self.position(grids[:1], kept.token_index, limits)
            tokens = self.encode(gather_tokens(patches, kept), position, kept)
        pooled = self.pool_tokens(tokens, kept, head, size)
        return ModelOutput(self.classify(pooled, head), pooled, tokens, kept)

    def rank(
        self,
        patches: Float[Array, "B P 588"],
        grid: tuple[int, int, int],
        budget: int,
        key: Key[Array, "..."] | None = None,
    ) -> Int[Array, "B N"]:
        """The patches that a budget keeps of clips that share one grid, int32 [B, N].

        The first of them are those of smaller budgets. Arguments as in `on_grid`.

        Raises ValueError with the official rounding, whose budgets are not prefixes of each other.
        """
        if self.config.rounding != "exact":
            raise ValueError("only exact budgets are prefixes of each other")
        limits = GridLimits(*grid, grid[0] * grid[1] * grid[2])
        grids = jnp.broadcast_to(jnp.asarray(grid, jnp.int32), (patches.shape[0], 3))
        return self.select(patches, grids, budget, limits, key).token_index


class ModelOutput(NamedTuple):
    """Output of a forward pass.

    logits: float32 [B, classes]; pooled: float32 [B, pool_width], from attention pooling; tokens:
    [B, 1 + N, C] after the last block, CLS first; kept: patch indices of the N tokens. With token
    merging `kept` lists all P patches, because each of the N tokens may come from several.
    """

    logits: jax.Array
    pooled: jax.Array
    tokens: jax.Array
    kept: Selection


class Features(NamedTuple):
    """Features of B clips for distillation, not normalized.

    hidden_states: the tokens after K of the blocks, [K, B, 1 + N, C], CLS first; pooled: float32
    [B, pool_width]; attention: pooling attention of each patch, averaged over the heads, float32
    [B, N]. The sum for a clip is below 1: the rest is that of CLS.
    """

    hidden_states: jax.Array
    pooled: jax.Array
    attention: jax.Array


def normalize(
    patches: Shaped[Array, "*batch 588"], dtype: DTypeLike = jnp.float32
) -> Float[Array, "*batch 588"]:
    """uint8 patches [..., 588], scaled to the network's input range."""
    mean, std = (np.tile(np.asarray(v, np.float32), PATCH_VALUES // 3) for v in (MEAN, STD))
    return ((patches.astype(jnp.float32) / 255 - mean) / std).astype(dtype)


def gather_tokens(patches: Shaped[Array, "B P 588"], kept: Selection) -> Shaped[Array, "B S 588"]:
    """The selected patches after a placeholder for CLS: [B, P, 588] -> [B, 1 + N, 588]."""
    return jnp.take_along_axis(
        patches, padded_sequence.pad_for_cls(kept.token_index)[..., None], axis=1
    )


def split(model: Model) -> tuple[nnx.GraphDef[Model], dict]:
    """The model's structure and its parameters as a plain tree of float32 arrays."""
    graph, state = nnx.split(model, nnx.Param)
    return graph, nnx.to_pure_dict(state)


def from_params(graph: nnx.GraphDef[Model], params: dict) -> Model:
    """The model of `split`, rebuilt; for use inside functions that JAX transforms."""
    return nnx.merge(graph, nnx.State(params))


def network_params(params: dict) -> dict:
    """The parameters of the FluxViT, without those that an objective adds."""
    return {name: params[name] for name in PARAMS}


def prepare_params(params: dict, config: FluxViTConfig) -> dict:
    """Parameters with block kernels cast to the compute dtype and, without scan, unstacked.

    Called once per step. Unstacked parameters are tuples of K arrays in place of arrays [K, ...]:
    matrix products of whole arrays, not slices of a stack, compile to one program for all layers.
    """
    if "blocks" not in params:  # they are frozen, or not
        return params
    dtype = jnp.dtype(config.dtype)

    def prepare(path: tuple, leaf: Array) -> Array | tuple[Array, ...]:
        leaf = leaf.astype(dtype) if path[-1].key == "kernel" else leaf
        return leaf if config.scan else tuple(leaf)

    prepared = jax.tree_util.tree_map_with_path(prepare, params["blocks"])
    # Otherwise XLA slices the stack again in every matrix product.
    return params | {"blocks": jax.lax.optimization_barrier(prepared)}


def with_frozen(trained: dict, frozen: dict) -> dict:
    """The whole network's prepared parameters, of `Freezing.trained` and `Freezing.frozen`.

    Where only some blocks are frozen, leaves of the blocks are tuples: with scan of two arrays, the
    frozen layers and the trained ones; without scan of all layers.
    """

    def both(frozen: Any, trained: Any) -> tuple:
        return frozen + trained if isinstance(frozen, tuple) else (frozen, trained)

    whole = trained | frozen
    if "blocks" in trained and "blocks" in frozen:
        whole["blocks"] = jax.tree.map(
            both,
            frozen["blocks"],
            trained["blocks"],
            is_leaf=lambda leaf: isinstance(leaf, tuple),
        )
    return whole


def stack_layers(tree: dict) -> dict:
    """The stacked form of a tree that `prepare_params` has unstacked, such as of gradients."""

    def stack(leaf: Array | tuple[Array, ...]) -> Array:
        # The barrier keeps the stacking out of the matrix products: see `prepare_params`.
        return jnp.stack(jax.lax.optimization_barrier(leaf)) if isinstance(leaf, tuple) else leaf

    return jax.tree.map(stack, tree, is_leaf=lambda leaf: isinstance(leaf, tuple))


@partial(jax.jit, static_argnums=0)  # a start of training asks for the shapes again and again
def init_params(config: FluxViTConfig, key: Key[Array, ""]) -> dict:
    """Randomly initialized parameters as a plain tree."""
    return split(FluxViT(config, nnx.Rngs(key)))[1]


@cache  # it takes a second for S, and a search has hundreds of candidates
def graphdef(config: FluxViTConfig) -> nnx.GraphDef:
    """The model's structure, without computing any parameter."""
    return blocks.graphdef(partial(FluxViT, config))


def on_platform(
    call: Callable[..., Any], params: dict, config: FluxViTConfig, *arrays: Array
) -> Any:
    """What `call(network, *arrays)` returns, by the fastest way of the platform.

    It is known when this is lowered; an exported program is for several.
    """

    def run(**changes: Any) -> Callable[..., Any]:
        graph = graphdef(replace(config, **changes))
        return lambda params, *arrays: call(from_params(graph, params), *arrays)

    return jax.lax.platform_dependent(
        params,
        *arrays,
        cpu=run(attention="chunked", float32_products=True),
        default=run(),
    )


def _layers(stacked: Any, first: int, last: int | None = None) -> Any:
    """Layers `first` to `last`, exclusive, of arrays [K, ...]."""
    return jax.tree.map(lambda leaf: leaf[first:last], stacked)


def _all_patches(clips: Size, patches: int) -> jax.Array:
    """The indices of all patches of each clip: int32 [B, P]."""
    return jnp.broadcast_to(jnp.arange(patches, dtype=jnp.int32), (clips, patches))


def _rescale_by_depth(stacked: blocks.Block, depth: int) -> None:
    """Divides attn.proj and mlp.fc2 of layer i (from 1) by sqrt(2 i), as in BEiT."""
    scale = 1 / jnp.sqrt(2.0 * jnp.arange(1, depth + 1))[:, None, None]
    for kernel in (stacked.attn.proj.kernel, stacked.mlp.fc2.kernel):
        kernel[...] = kernel[...] * scale


def _scale_kernels(module: nnx.Module, factor: float) -> None:
    """Multiplies every kernel of a module."""

    def scale(path: tuple, leaf: nnx.Param) -> nnx.Param:
        return jax.tree.map(lambda x: x * factor, leaf) if path[-1] == "kernel" else leaf

    flat = nnx.to_flat_state(nnx.state(module, nnx.Param))
    nnx.update(module, nnx.from_flat_state([(path, scale(path, leaf)) for path, leaf in flat]))
