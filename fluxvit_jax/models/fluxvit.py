"""FluxViT: patches and their grid in, a clip vector and class scores out, at any token budget."""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fluxvit_jax.models import (
    layers,
    merging,
    placement,
    positions,
    selection,
    sequence,
)
from fluxvit_jax.models.selection import GridLimits, Selection

PATCH_VALUES = 14 * 14 * 3  # a patch of one frame, order h, w, c
MEAN = (0.485, 0.456, 0.406)  # ImageNet, for values in 0..1
STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class FluxViTConfig:
    """The network's shape and execution. S, B and L: see `fluxvit_jax.config.VARIANTS`.

    frames, rows, columns: the native grid, that of the position table.
    cls: "outside" adds the CLS token to the budget (official), "inside" lets it take one place.
    layer_scale, kernel_std, position_scale: what LayerScale, the kernels (a deviation) and GPE's
        scale start at; as in the official code, unless a small network is trained from scratch.
    scan: one compiled block looped over the depth; False unrolls (faster steps, slower compiles).
    remat: what the backward pass recomputes: "none"; "names", all but matrix products and
        attention, as in `layers.Block`; "full", whole blocks.
    attention: the kernel, one of `attention.KERNELS`.
    merge_blocks: above 0, `on_grid` selects no patches but merges tokens in so many of the first
        blocks, until the budget is left: see `fluxvit_jax.models.merging`.
    """

    width: int
    depth: int
    heads: int
    frames: int
    rows: int
    columns: int
    classes: int
    budgets: int = 3  # pooling heads and classifiers, one a training budget
    pool_width: int = 768
    pool_heads: int = 16
    layer_scale: float = 1e-5
    kernel_std: float = layers.KERNEL_STD
    position_scale: float = 1.0
    gelu: str = "tanh"
    cls: str = "outside"
    selector: selection.Selector = "group_dynamic"
    groups: int = 0
    rounding: selection.Rounding = "exact"
    drop_path: float = 0.0
    dtype: str = "float32"
    scan: bool = True
    remat: str = "none"
    merge_blocks: int = 0
    attention: str = "xla"

    @property
    def hidden(self) -> int:
        """Units of the MLP of a block."""
        return 4 * self.width

    @property
    def native_tokens(self) -> int:
        return self.frames * self.rows * self.columns


class PatchEmbed(nnx.Module):
    """Dual patch norm: RMSNorm, linear projection, RMSNorm. [..., 588] -> [..., C]."""

    def __init__(self, width: int, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.norm_before = layers.RMSNorm(PATCH_VALUES)
        self.proj = layers.Linear(PATCH_VALUES, width, dtype=dtype, rngs=rngs)
        self.norm = layers.RMSNorm(width)

    def __call__(self, patches: jax.Array) -> jax.Array:
        return self.norm(self.proj(self.norm_before(patches)))


class FluxViT(nnx.Module):
    """The network. Parameters leave as a plain tree (`split`); `merge` makes a model of one again.

    A forward pass is `select`, then `encode` of the kept patches at their `position`, `pool_tokens`
    and `classify`; `__call__` does all. `on_grid` can have `merge_tokens` in place of the first.
    """

    def __init__(self, config: FluxViTConfig, rngs: nnx.Rngs):
        self.config = config
        C, dtype = config.width, jnp.dtype(config.dtype)
        self.cls_token = nnx.Param(layers.kernel_init(rngs.params(), (C,)))
        self.pos_embed = nnx.Param(
            jnp.asarray(positions.sincos_table(config.frames, config.rows, config.columns, C))
        )
        self.gpe = layers.Affine(C, config.position_scale)
        self.patch_embed = PatchEmbed(C, dtype, rngs)
        block = layers.BlockConfig(
            width=C,
            heads=config.heads,
            hidden=config.hidden,
            kernel=config.attention,
            exact=config.gelu == "erf",
            layer_scale=config.layer_scale,
            dtype=dtype,
            recompute=config.remat == "names",
        )
        self.blocks = layers.stack(config.depth, rngs, partial(layers.Block, block))
        _rescale_by_depth(self.blocks, config.depth)
        self.pool = layers.stack(
            config.budgets,
            rngs,
            lambda r: layers.AttentionPool(C, config.pool_width, config.pool_heads, dtype, r),
        )
        self.fc_norm = layers.LayerNorm(config.pool_width, rngs=rngs)
        self.heads = layers.stack(
            config.budgets,
            rngs,
            lambda r: layers.Linear(config.pool_width, config.classes, rngs=r),
        )
        self.align = layers.stack(
            max(config.budgets - 1, 1),
            rngs,
            lambda r: layers.AlignProjector(config.pool_width, dtype, r),
        )
        _scale_kernels(self, config.kernel_std / layers.KERNEL_STD)

    def select(
        self,
        patches: jax.Array,
        grid: jax.Array,
        budget: int,
        limits: GridLimits,
        key: jax.Array | None = None,
    ) -> Selection:
        """The patches that a budget keeps, without gradient.

        patches: [B, P, 588], normalised; grid: int32 [B, 3]; key: for noisy selectors,
            one or one for each clip.
        """
        config = self.config
        return selection.select(
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
        """Places of a budget that patches may take."""
        return sequence.patch_budget(budget, self.config.cls)

    def encode(
        self,
        patches: jax.Array,
        position: jax.Array,
        kept: Selection,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """The tokens after the last block: [B, 1 + N, C], CLS first.

        patches: [B, 1 + N, 588], the kept ones as `take` puts them; position: theirs, as `position`
        has it; key: [B], one for each clip; drop path, training only.
        """
        return self._encode(patches, position, kept, key)[0]

    def features(
        self,
        patches: jax.Array,
        position: jax.Array,
        kept: Selection,
        after: tuple[int, ...],
        head: int = 0,
        key: jax.Array | None = None,
    ) -> "Features":
        """What teachers and students are compared by; arguments as in `encode`.

        after: the blocks, counted from 0 and ascending, whose tokens are wanted; head: by which the
        tokens are pooled.
        """
        tokens, middle = self._encode(patches, position, kept, key, after)
        pool, valid = layers.unstack(self.pool, head), sequence.with_cls(kept.valid)
        return Features(middle, pool(tokens, valid), pool.weights(tokens, valid)[:, 1:])

    def _encode(
        self,
        patches: jax.Array,
        position: jax.Array,
        kept: Selection,
        key: jax.Array | None,
        after: tuple[int, ...] = (),
    ) -> tuple[jax.Array, jax.Array | None]:
        """The tokens after the last block, and after those of `after`."""
        places = sequence.of(kept.index.shape[1], self.config.attention)
        x = places.pad(self.embed(patches, position))
        x, middle = self._run_blocks(x, places.real(x.shape[0], kept.valid), key, after=after)
        return places.cut(x), middle if middle is None else middle[:, :, : places.tokens]

    def merge_tokens(
        self, patches: jax.Array, grid: jax.Array, budget: int, limits: GridLimits
    ) -> tuple[jax.Array, jax.Array]:
        """The tokens after the last block where blocks merge them: [B, 1 + N, C], CLS first.

        patches: [B, P, 588], all of them real; grid: as in `position`.
        Beside them their sizes, how many patches each stands for: float32 [B, 1 + N].

        Raises ValueError where the merging blocks are more than there are, or too few.
        """
        config = self.config
        if config.merge_blocks > config.depth:
            raise ValueError(f"{config.merge_blocks} of {config.depth} blocks cannot merge")
        B, P, _ = patches.shape
        position = self.position(grid, _all_places(B, P), limits)
        x = self.embed(sequence.behind_cls(patches), position)
        size = jnp.ones(x.shape[:2], jnp.float32)
        left = merging.schedule(P, self.patch_budget(budget), config.merge_blocks)
        for number, keep in enumerate(left):
            block = layers.unstack(self.blocks, number)
            x, keys = block.attend(x, size)
            x, size = merging.merge(x, jnp.mean(keys, axis=2, dtype=jnp.float32), size, keep)
            x = block.transform(x)
        x, _ = self._run_blocks(x, None, None, size, first=config.merge_blocks)
        return x, size

    def embed(self, patches: jax.Array, position: jax.Array) -> jax.Array:
        """Tokens with their positions, [B, 1 + N, C], CLS first.

        patches: [B, 1 + N, 588], the first of which counts for nothing; position: [B, 1 + N, C].
        """
        x = self.patch_embed(placement.by_clip(patches))
        return sequence.put_cls(x, self.cls_token[...]) + position

    def position(self, grid: jax.Array, index: jax.Array, limits: GridLimits) -> jax.Array:
        """The position embeddings of CLS and of kept patches: [B, 1 + N, C], CLS first.

        grid: int32 [G, 3] where G divides B, one grid for each run of B / G clips; index: int32
        [B, N], the patches' places.
        """
        config, table = self.config, self.pos_embed[...]
        native = (config.frames, config.rows, config.columns, config.width)
        patches = self.gpe(table[1:]).reshape(native)
        return positions.of_tokens(table[0], patches, grid, index, limits[:3]).astype(config.dtype)

    def _run_blocks(
        self,
        x: jax.Array,
        lengths: jax.Array | None,
        key: jax.Array | None,
        size: jax.Array | None = None,
        first: int = 0,
        after: tuple[int, ...] = (),
    ) -> tuple[jax.Array, jax.Array | None]:
        """Block `first` and all that follow. x: [B, N, C]; the others as in `layers.Block`.

        Beside the result what each block of `after` leaves: [K, B, N, C], or None.
        """
        config = self.config
        graph, stacked = nnx.split(self.blocks)
        rates = jnp.linspace(0, config.drop_path, config.depth)
        keys = None if key is None else jax.vmap(partial(jax.random.split, num=config.depth))(key).T

        def body(x, layer):
            state, rate, layer_key = layer
            x = nnx.merge(graph, state)(x, lengths, rate, layer_key, size)
            return x, x if after else None

        if config.remat == "full":
            # The compiler cannot undo it inside a loop: barriers against that would only cost.
            body = jax.checkpoint(body, prevent_cse=not config.scan)
        if config.scan:
            left = jax.tree.map(lambda leaf: leaf[first:], (stacked, rates, keys))
            x, outputs = jax.lax.scan(body, x, left)
            return x, outputs[np.asarray(after) - first] if after else None
        outputs = {}
        for number in range(first, config.depth):
            own = tuple(layers.layer(tree, number) for tree in (stacked, rates, keys))
            x, outputs[number] = body(x, own)
        return x, jnp.stack([outputs[number] for number in after]) if after else None

    def pool_tokens(
        self, tokens: jax.Array, kept: Selection, head: int, size: jax.Array | None = None
    ) -> jax.Array:
        """The clip vector of one head: [B, 1 + N, C] -> float32 [B, pool_width].

        size: of merged tokens, float32 [B, 1 + N].
        """
        return layers.unstack(self.pool, head)(tokens, sequence.with_cls(kept.valid), size)

    def classify(self, pooled: jax.Array, head: int) -> jax.Array:
        """Class scores of one head: [B, pool_width] -> float32 [B, classes]."""
        return layers.unstack(self.heads, head)(self.fc_norm(pooled))

    def project(self, pooled: jax.Array, projector: int) -> jax.Array:
        """A smaller budget's vector made comparable with the largest's: unit [B, pool_width]."""
        return layers.unstack(self.align, projector)(pooled)

    def __call__(
        self,
        patches: jax.Array,
        grid: jax.Array,
        budget: int,
        head: int,
        limits: GridLimits,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Logits [B, classes] and clip vectors [B, pool_width] at a token budget.

        patches: [B, P, 588], normalised, order t, h, w, zero-padded; grid: int32 [B, 3];
        key: for noisy selectors.
        """
        kept = self.select(patches, grid, budget, limits, key)
        position = self.position(grid, kept.index, limits)
        tokens = self.encode(take(patches, kept), position, kept)
        pooled = self.pool_tokens(tokens, kept, head)
        return self.classify(pooled, head), pooled

    def on_grid(
        self,
        patches: jax.Array,
        grid: tuple[int, int, int],
        budget: int,
        head: int,
        key: jax.Array | None = None,
    ) -> "Answer":
        """The forward pass of clips that all lie on one grid, known when this is compiled.

        patches: [B, T * H * W, 588], normalised; grid: frames, rows, columns; key: as in `select`.

        Raises ValueError where `merge_blocks` cannot reach the budget.
        """
        limits = GridLimits(*grid, grid[0] * grid[1] * grid[2])
        grids = jnp.broadcast_to(jnp.asarray(grid, jnp.int32), (patches.shape[0], 3))
        # One grid for all clips: the position table is resized once.
        if self.config.merge_blocks and self.patch_budget(budget) < limits.fewest_tokens:
            kept = Selection(_all_places(*patches.shape[:2]), None)
            tokens, size = self.merge_tokens(patches, grids[:1], budget, limits)
        else:
            kept, size = self.select(patches, grids, budget, limits, key), None
            position = self.position(grids[:1], kept.index, limits)
            tokens = self.encode(take(patches, kept), position, kept)
        pooled = self.pool_tokens(tokens, kept, head, size)
        return Answer(self.classify(pooled, head), pooled, tokens, kept)


class Answer(NamedTuple):
    """What a forward pass finds.

    logits: float32 [B, classes]; pooled: float32 [B, pool_width]; tokens: [B, 1 + N, C] after the
    last block, CLS first; kept: the places of the others. Where tokens are merged, N of them have
    come of all patches, and these are what is kept.
    """

    logits: jax.Array
    pooled: jax.Array
    tokens: jax.Array
    kept: Selection


class Features(NamedTuple):
    """What a network sees in B clips, as it has it: nothing is normalised.

    middle: the tokens after some blocks, [K, B, 1 + N, C], CLS first; pooled: float32
    [B, pool_width]; attention: how much each patch is attended to in pooling, the mean of all
    heads, float32 [B, N]. A clip's add up to less than 1: the rest is CLS's.
    """

    middle: jax.Array
    pooled: jax.Array
    attention: jax.Array


def normalise(patches: jax.Array, dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """uint8 patches [..., 588] to the network's input range."""
    mean, std = (np.tile(np.asarray(v, np.float32), PATCH_VALUES // 3) for v in (MEAN, STD))
    return ((patches.astype(jnp.float32) / 255 - mean) / std).astype(dtype)


def take(patches: jax.Array, kept: Selection) -> jax.Array:
    """The kept patches behind one that stands where CLS will: [B, P, 588] -> [B, 1 + N, 588]."""
    return jnp.take_along_axis(patches, sequence.behind_cls(kept.index)[..., None], axis=1)


def split(model: nnx.Module) -> tuple[nnx.GraphDef, dict]:
    """The model's structure and its parameters as a plain tree of float32 arrays."""
    graph, state = nnx.split(model, nnx.Param)
    return graph, nnx.to_pure_dict(state)


def merge(graph: nnx.GraphDef, params: dict) -> FluxViT:
    """The model again; for use inside functions that JAX transforms."""
    return nnx.merge(graph, nnx.State(params))


def for_passes(params: dict, config: FluxViTConfig) -> dict:
    """Parameters in the form in which forward and backward passes read them: made once a step.

    Kernels of the blocks are in the compute dtype. Where blocks are not scanned each layer's arrays
    lie apart, tuples in place of arrays [depth, ...]: products that read and write whole arrays,
    not parts of a stack, are the same program in every layer, which is compiled once.
    """
    dtype = jnp.dtype(config.dtype)

    def prepare(path: tuple, leaf: jax.Array) -> jax.Array | tuple[jax.Array, ...]:
        leaf = leaf.astype(dtype) if path[-1].key == "kernel" else leaf
        return leaf if config.scan else tuple(leaf)

    blocks = jax.tree_util.tree_map_with_path(prepare, params["blocks"])
    # Otherwise the compiler takes the parts out of the stack in every product again.
    return params | {"blocks": jax.lax.optimization_barrier(blocks)}


def stack_layers(tree: dict) -> dict:
    """What is of the structure of `for_passes`, such as gradients, in the structure of `params`."""

    def together(leaf: jax.Array | tuple[jax.Array, ...]) -> jax.Array:
        # Not by the products themselves: see `for_passes`.
        return jnp.stack(jax.lax.optimization_barrier(leaf)) if isinstance(leaf, tuple) else leaf

    return jax.tree.map(together, tree, is_leaf=lambda leaf: isinstance(leaf, tuple))


def initialise(config: FluxViTConfig, key: jax.Array) -> dict:
    """Fresh parameters as a plain tree."""
    return split(FluxViT(config, nnx.Rngs(key)))[1]


def structure(config: FluxViTConfig) -> nnx.GraphDef:
    """The model's structure without any parameter being made."""
    return layers.structure(partial(FluxViT, config))


def _all_places(clips: int, places: int) -> jax.Array:
    """Every patch of every clip, in the order t, h, w: int32 [B, P]."""
    return jnp.broadcast_to(jnp.arange(places, dtype=jnp.int32), (clips, places))


def _rescale_by_depth(blocks: layers.Block, depth: int) -> None:
    """attn.proj and mlp.fc2 of layer i (from 1) start divided by sqrt(2 i), as in BEiT."""
    scale = 1 / jnp.sqrt(2.0 * jnp.arange(1, depth + 1))[:, None, None]
    for kernel in (blocks.attn.proj.kernel, blocks.mlp.fc2.kernel):
        kernel[...] = kernel[...] * scale


def _scale_kernels(module: nnx.Module, factor: float) -> None:
    """Multiplies every kernel of a module."""

    def scaled(path, leaf):
        return leaf * factor if path[-1] == "kernel" else leaf

    flat = nnx.to_flat_state(nnx.state(module, nnx.Param))
    nnx.update(
        module,
        nnx.from_flat_state(
            [(path, jax.tree.map(partial(scaled, path), leaf)) for path, leaf in flat]
        ),
    )
