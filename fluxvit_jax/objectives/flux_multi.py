"""Supervised training at one budget (Flux-Single) or several with alignment (Flux-Multi)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float
from ml_collections import ConfigDict

from fluxvit_jax.config.network import freezing, model_config
from fluxvit_jax.models import fluxvit
from fluxvit_jax.models.arrays import Array
from fluxvit_jax.models.blocks import l2_normalize
from fluxvit_jax.models.token_selection import NOISY_SELECTORS, GridLimits, Selection, take_prefix
from fluxvit_jax.objectives import mixing
from fluxvit_jax.objectives.base import Objective, multi_budget_value_and_grad, register


@register("flux_multi")
@dataclass(frozen=True)
class FluxMulti(Objective):
    """The official Flux-Multi loss: each clip at every budget, with one head per budget.

    The sum over the budgets of the cross entropy (with `multi_label` the binary one of each class's
    sigmoid, averaged over the classes), plus `align` times the smooth L1 distance
    (averaged over batch and width) between each smaller budget's projected clip vector and the
    largest budget's clip vector, both of unit length, without gradient to the latter.

    budgets: decreasing; budget i uses head i. group: clips that share a grid. class_weights:
    factors of the classes' terms of the cross entropy, empty for 1.
    """

    freezes: ClassVar[bool] = True
    takes_multi_label: ClassVar[bool] = True

    graph: nnx.GraphDef
    limits: GridLimits
    budgets: tuple[int, ...]
    classes: int
    group: int
    align: float = 1.0
    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    mixup_probability: float = 1.0
    erase: float = 0.0
    dtype: str = "float32"
    drop_path: bool = False
    rounding: str = "exact"
    selector: str = "group_dynamic"
    class_weights: tuple[float, ...] = ()
    multi_label: bool = False

    @classmethod
    def from_config(cls, config: ConfigDict, limits: GridLimits, platform: str) -> "FluxMulti":
        train, frozen, model = config.train, freezing(config), model_config(config, platform)
        whole = "blocks" in frozen.names
        model = replace(model, frozen_blocks=model.depth if whole else frozen.blocks)
        return cls(
            graph=fluxvit.graphdef(model),
            limits=limits,
            budgets=tuple(train.budgets),
            classes=config.model.classes,
            group=config.data.clips_per_grid,
            # With frozen clip vectors it could change nothing.
            align=0.0 if "pool" in frozen.names else train.align_weight,
            label_smoothing=train.label_smoothing,
            mixup=train.mixup,
            cutmix=train.cutmix,
            mixup_probability=train.mixup_probability,
            erase=train.random_erasing,
            dtype=config.model.dtype,
            drop_path=config.model.drop_path > 0 and not whole,
            rounding=config.model.selector.rounding,
            selector=config.model.selector.kind,
            multi_label=train.multi_label,
        )

    def weighted(self, class_weights: Sequence[float]) -> "FluxMulti":
        return replace(self, class_weights=tuple(class_weights))

    def value_and_grad(self, params: dict, frozen: dict, batch: dict) -> tuple[dict, dict]:
        """As in `Objective`; `frozen` holds what is frozen of the network, if anything.

        Summing the gradients of the budgets is exact: the alignment target has no gradient.
        """
        augment_keys, select_keys, drop_keys = (_fold_in(batch["key"], n) for n in range(3))
        patches, targets = self._augmented(batch, augment_keys)

        def network(params: dict) -> dict:
            return fluxvit.with_frozen(params, frozen)

        selections = self._selections(network(params), patches, batch["grid"], select_keys)
        grids = batch["grid"][:: self.group]

        def loss_at(
            params: dict, position: jax.Array, head: int, anchor: jax.Array | None
        ) -> tuple[jax.Array, tuple[dict, jax.Array]]:
            kept = selections[head]
            if frozen:  # embeddings always are: without their gradient, frozen blocks need none
                position = jax.lax.stop_gradient(position)
            keys = _fold_in(drop_keys, head) if self.drop_path else None
            tokens = fluxvit.gather_tokens(patches, kept)
            loss, (terms, pooled) = self._loss(
                network(params), position, tokens, targets, kept, head, anchor, keys
            )
            return loss, (terms, l2_normalize(pooled) if anchor is None else anchor)

        return multi_budget_value_and_grad(
            loss_at,
            lambda params: self._positions(network(params), grids, selections),
            params,
            self.budgets,
        )

    def _augmented(self, batch: dict, keys: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Normalized, erased and mixed patches [B, P, 588] and float32 targets [B, classes]."""
        patches = fluxvit.normalize(batch["patches"], jnp.dtype(self.dtype))
        if self.multi_label:
            targets = batch["label"].astype(jnp.float32)
        else:
            targets = mixing.smooth_one_hot(batch["label"], self.classes, self.label_smoothing)
        if self.erase:
            patches = mixing.erase(patches, batch["grid"], self.erase, _fold_in(keys, 0))
        if self.mixup or self.cutmix:
            patches, targets = mixing.mix(
                patches,
                targets,
                batch["grid"],
                self.group,
                _fold_in(keys, 1),
                mixup=self.mixup,
                cutmix=self.cutmix,
                probability=self.mixup_probability,
            )
        return patches, targets

    def _selections(
        self, params: dict, patches: jax.Array, grid: jax.Array, keys: jax.Array | None
    ) -> list[Selection]:
        """The selection of each budget. Exact budgets are prefixes of the largest: one sort."""
        model: fluxvit.FluxViT = fluxvit.from_params(self.graph, params)
        keys = keys if self.selector in NOISY_SELECTORS else None
        first = model.select(patches, grid, self.budgets[0], self.limits, keys)
        if self.rounding == "official":
            rest = [model.select(patches, grid, b, self.limits, keys) for b in self.budgets[1:]]
        else:
            rest = [
                take_prefix(first, model.patch_budget(b), self.limits.fewest_tokens)
                for b in self.budgets[1:]
            ]
        return [first, *rest]

    def _positions(
        self, params: dict, grids: jax.Array, selections: list[Selection]
    ) -> list[jax.Array]:
        """The positions of each budget's tokens. Those of exact budgets are prefixes too."""
        model: fluxvit.FluxViT = fluxvit.from_params(self.graph, params)
        if self.rounding == "official":
            return [model.position(grids, kept.token_index, self.limits) for kept in selections]
        largest = model.position(grids, selections[0].token_index, self.limits)
        return [largest[:, : 1 + kept.token_index.shape[1]] for kept in selections]

    def _loss(
        self,
        params: dict,
        position: jax.Array,
        patches: jax.Array,
        targets: jax.Array,
        kept: Selection,
        head: int,
        anchor: jax.Array | None,
        keys: jax.Array | None,
    ) -> tuple[jax.Array, tuple[dict, jax.Array]]:
        """The loss of one budget, with its terms and the clip vectors."""
        model: fluxvit.FluxViT = fluxvit.from_params(self.graph, params)
        pooled = model.pool_tokens(model.encode(patches, position, kept, keys), kept, head)
        logits = model.classify(pooled, head)
        if self.multi_label:
            terms = {"bce": binary_cross_entropy(logits, targets)}
        else:
            terms = {
                "ce": cross_entropy(logits, targets, self.class_weights),
                "top1": jnp.mean(jnp.argmax(logits, axis=-1) == jnp.argmax(targets, axis=-1)),
            }
        loss = terms["bce" if self.multi_label else "ce"]
        if anchor is not None and self.align:
            distance = smooth_l1(model.project(pooled, head - 1), anchor)
            terms["align"] = self.align * distance
        return loss + terms.get("align", 0.0), (terms, pooled)


def _fold_in(keys: jax.Array, number: int) -> jax.Array:
    """Stream `number` of each clip's key: [B] -> [B]."""
    return jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)


def cross_entropy(
    logits: Float[Array, "B classes"],
    targets: Float[Array, "B classes"],
    class_weights: Sequence[float] = (),
) -> Float[Array, ""]:
    """The cross entropy, averaged over clips.

    targets: probabilities; class_weights: factors of the classes' terms, [classes], empty for 1.
    """
    if class_weights:
        targets = targets * jnp.asarray(class_weights, jnp.float32)
    return -jnp.mean(jnp.sum(targets * jax.nn.log_softmax(logits), axis=-1))


def binary_cross_entropy(
    logits: Float[Array, "B classes"], targets: Float[Array, "B classes"]
) -> Float[Array, ""]:
    """The binary cross entropy of each class's sigmoid, averaged over classes and clips.

    targets: 0 to 1.
    """
    return jnp.mean(jax.nn.softplus(logits) - targets * logits)


def smooth_l1(x: Float[Array, "*shape"], y: Float[Array, "*shape"]) -> Float[Array, ""]:
    """PyTorch's SmoothL1Loss with beta 1, averaged over all elements."""
    distance = jnp.abs(x - y)
    return jnp.mean(jnp.where(distance < 1, 0.5 * distance**2, distance - 0.5))
