"""Supervised training at one budget (Flux-Single) or several with alignment (Flux-Multi)."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from fluxvit_jax.models import fluxvit
from fluxvit_jax.models.layers import l2_normalise
from fluxvit_jax.models.selection import NOISY_SELECTORS, GridLimits, Selection, truncate
from fluxvit_jax.objectives import mixing


@dataclass(frozen=True)
class Supervised:
    """The official Flux-Multi loss: the same clip at every budget, each by its own head.

    The sum over the budgets of the cross entropy, plus `align` times the smooth L1 distance
    (averaged over batch and width) between each smaller budget's projected vector and the
    largest budget's own, both of unit length, without gradient to the latter.

    budgets: decreasing; pass i ends in head i. group: clips that share a grid.
    """

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

    def gradients(self, params: dict, frozen: dict, batch: dict) -> tuple[dict, dict]:
        """As of `Objective`; nothing is frozen.

        The budgets run one after another and their gradients are added: exact, since the alignment
        target passes no gradient, and only the largest budget's activations are ever alive.
        """
        augment_keys, select_keys, drop_keys = (_fold_in(batch["key"], n) for n in range(3))
        patches, targets = self._augmented(batch, augment_keys)
        selections = self._selections(params, patches, batch["grid"], select_keys)
        grids = batch["grid"].reshape(-1, self.group, 3)[:, 0]
        positions, to_table = jax.vjp(
            lambda params: self._positions(params, grids, selections), params
        )
        gradients, metrics, anchor, by_position = None, {"loss": 0.0}, None, []
        for head, kept in enumerate(selections):
            if gradients is not None:
                params, gradients, anchor = jax.lax.optimization_barrier(
                    (params, gradients, anchor)
                )
            (_, (terms, pooled)), (passed, own) = jax.value_and_grad(
                self._pass, argnums=(0, 1), has_aux=True
            )(
                params,
                positions[head],
                fluxvit.take(patches, kept),
                targets,
                kept,
                head,
                anchor,
                _fold_in(drop_keys, head) if self.drop_path else None,
            )
            by_position.append(own)
            passed = optax.tree.cast(passed, jnp.float32)
            gradients = passed if gradients is None else jax.tree.map(jnp.add, gradients, passed)
            anchor = l2_normalise(pooled) if anchor is None else anchor
            metrics["loss"] += sum(terms[name] for name in ("ce", "align") if name in terms)
            metrics |= {f"{name}_{self.budgets[head]}": value for name, value in terms.items()}
        (through_table,) = to_table(by_position)
        return jax.tree.map(jnp.add, gradients, through_table), metrics

    def _augmented(self, batch: dict, keys: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Normalised, erased and mixed patches [B, P, 588] and soft targets [B, classes]."""
        patches = fluxvit.normalise(batch["patches"], jnp.dtype(self.dtype))
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

    def _selections(self, params, patches, grid, keys) -> list[Selection]:
        """What each budget keeps. Exact budgets are prefixes of the largest: one sort for all."""
        model = fluxvit.merge(self.graph, params)
        keys = keys if self.selector in NOISY_SELECTORS else None
        first = model.select(patches, grid, self.budgets[0], self.limits, keys)
        if self.rounding == "official":
            rest = [model.select(patches, grid, b, self.limits, keys) for b in self.budgets[1:]]
        else:
            rest = [
                truncate(first, model.patch_budget(b), self.limits.fewest_tokens)
                for b in self.budgets[1:]
            ]
        return [first, *rest]

    def _positions(self, params, grids, selections) -> list[jax.Array]:
        """The positions of what each budget keeps: looked up once, as it is sorted once."""
        model = fluxvit.merge(self.graph, params)
        if self.rounding == "official":
            return [model.position(grids, kept.index, self.limits) for kept in selections]
        largest = model.position(grids, selections[0].index, self.limits)
        return [largest[:, : 1 + kept.index.shape[1]] for kept in selections]

    def _pass(self, params, position, patches, targets, kept, head, anchor, keys):
        """One budget's loss; beside it its terms and the clip vectors."""
        model = fluxvit.merge(self.graph, params)
        pooled = model.pool_tokens(model.encode(patches, position, kept, keys), kept, head)
        logits = model.classify(pooled, head)
        terms = {
            "ce": -jnp.mean(jnp.sum(targets * jax.nn.log_softmax(logits), axis=-1)),
            "top1": jnp.mean(jnp.argmax(logits, axis=-1) == jnp.argmax(targets, axis=-1)),
        }
        if anchor is not None and self.align:
            distance = smooth_l1(model.project(pooled, head - 1), anchor)
            terms["align"] = self.align * distance
        return terms["ce"] + terms.get("align", 0.0), (terms, pooled)


def _fold_in(keys: jax.Array, number: int) -> jax.Array:
    """Another stream of each clip's key: [B] -> [B]."""
    return jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)


def smooth_l1(x: jax.Array, y: jax.Array) -> jax.Array:
    """PyTorch's SmoothL1Loss with beta 1, averaged over all elements."""
    distance = jnp.abs(x - y)
    return jnp.mean(jnp.where(distance < 1, 0.5 * distance**2, distance - 0.5))
