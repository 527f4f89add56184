"""Flux-UMT: students at several budgets learn to agree with a teacher that does not change.

The paper (arXiv 2503.14237) names the double mask and table 14; its code for this stage is not
released. What it leaves open is as in InternVideo2's distillation, on which it builds:
engines/engine_for_distill.py and models/internvideo2_distill.py of its single_modality.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from fluxvit_jax.models import fluxvit, selection, sequence
from fluxvit_jax.models.layers import l2_normalise
from fluxvit_jax.models.selection import GridLimits, Selection

Mask = Literal["attention", "attention_topk", "random"]
MASKS: tuple[str, ...] = get_args(Mask)
TEACHER = "teacher"  # scope of the teacher's instructions in a compiled program
DECODERS = "decoders"  # where the trained parameters have them
# What a batch has where the teacher was asked before.
CACHED = ("teacher_index", "teacher_attention", "teacher_pooled", "teacher_middle")


class Lesson(NamedTuple):
    """What the teacher makes of B clips, its tokens in the order in which students get them.

    patches: [B, 1 + N, 588], the first of which counts for nothing; index: int32 [B, N], their
    places; middle: [K, B, 1 + N, D], CLS first; pooled: float32 [B, F]. The first n tokens are what
    a student of n tokens sees.
    """

    patches: jax.Array
    index: jax.Array
    middle: jax.Array
    pooled: jax.Array

    def first(self, n: int) -> "Lesson":
        """What a student of n tokens gets."""
        return Lesson(
            self.patches[:, : 1 + n], self.index[:, :n], self.middle[:, :, : 1 + n], self.pooled
        )


@dataclass(frozen=True)
class Distillation:
    """Masked distillation with the double mask: the teacher sees the tokens that a selector keeps
    of a clip, the students a part of those.

    The loss is the sum over the students of `layer_weight` times the mean distance (2 - 2 cos) of
    tokens, over pairs of layers, clips and tokens with CLS, and `pooled_weight` times that of the
    clip vectors. Each student pools by the head of its own, which fine-tuning at as many budgets
    goes on with.

    tokens: patches that the teacher sees; budgets: patches of the students, decreasing and at most
    so many; names: what these are called in metrics; pairs: (block of the student, of the teacher),
    ascending; mask: how students' tokens are drawn from the teacher's: in proportion to its pooling
    attention, the most attended, or at random; scored_by: whose patch embedding the selector looks
    at, "teacher" or "student".
    """

    student: nnx.GraphDef
    decoders: nnx.GraphDef
    teacher: nnx.GraphDef
    limits: GridLimits
    tokens: int
    budgets: tuple[int, ...]
    names: tuple[int, ...]
    pairs: tuple[tuple[int, int], ...]
    group: int
    mask: Mask
    scored_by: str
    selector: selection.Selector
    groups: int
    layer_weight: float
    pooled_weight: float
    dtype: str
    drop_path: bool

    def gradients(self, params: dict, frozen: dict, batch: dict) -> tuple[dict, dict]:
        """As of `Objective`. Labels are not looked at.

        params: the student's, and its decoders under "decoders"; frozen: the teacher's. The
        students run one after another and their gradients are added: exact, since the teacher
        passes none, and only one student's activations are alive.
        """
        keys = jax.vmap(lambda key: jax.random.split(key, 3))(batch["key"])
        grids = batch["grid"].reshape(-1, self.group, 3)[:, 0]
        lesson = self._lesson(params, frozen, batch, grids, keys[:, 0], keys[:, 1])
        positions, to_tables = jax.vjp(
            lambda params: self._positions(params, grids, lesson.index), params
        )
        gradients, metrics, by_position = None, {"loss": 0.0}, []
        for head, (n, name) in enumerate(zip(self.budgets, self.names, strict=True)):
            if gradients is not None:
                params, gradients, lesson = jax.lax.optimization_barrier(
                    (params, gradients, lesson)
                )
            drop = jax.vmap(lambda key, head=head: jax.random.fold_in(key, head))(keys[:, 2])
            (loss, terms), (passed, own) = jax.value_and_grad(
                self._pass, argnums=(0, 1), has_aux=True
            )(params, positions[head], lesson.first(n), head, drop if self.drop_path else None)
            by_position.append(own)
            passed = optax.tree.cast(passed, jnp.float32)
            gradients = passed if gradients is None else jax.tree.map(jnp.add, gradients, passed)
            metrics["loss"] += loss
            metrics |= {f"{term}_{name}": value for term, value in terms.items()}
        (through_tables,) = to_tables(by_position)
        return jax.tree.map(jnp.add, gradients, through_tables), metrics

    def cached_lesson(self, frozen: dict, batch: dict) -> dict:
        """What a cache keeps of B clips, by which `gradients` then goes in place of a teacher.

        batch: patches uint8 [B, P, 588], grid int32 [B, 3]. Returns arrays [B, ...] by the names of
        `CACHED`: the places that the teacher saw, and its features; two-byte numbers as their bits,
        uint16, which every reader of files knows.
        """
        patches = fluxvit.normalise(batch["patches"], jnp.dtype(self.dtype))
        grids = batch["grid"].reshape(-1, self.group, 3)[:, 0]
        kept, seen = self._see({}, frozen, patches, batch["grid"], grids, None)
        middle = jnp.moveaxis(seen.middle, 0, 1)
        if middle.dtype.itemsize == 2:
            middle = jax.lax.bitcast_convert_type(middle, jnp.uint16)
        return dict(zip(CACHED, (kept.index, seen.attention, seen.pooled, middle), strict=True))

    def _lesson(self, params, frozen, batch, grids, select_keys, mask_keys) -> Lesson:
        """The teacher's selection and features, and the order in which students get its tokens."""
        patches = fluxvit.normalise(batch["patches"], jnp.dtype(self.dtype))
        if CACHED[0] in batch:
            kept, seen = self._remembered(batch)
        else:
            kept, seen = self._see(params, frozen, patches, batch["grid"], grids, select_keys)
        chosen = fluxvit.take(patches, kept)
        order = self._order(seen.attention, mask_keys)
        rows = sequence.behind_cls(1 + order)  # CLS stays the first
        return Lesson(
            patches=jnp.take_along_axis(chosen, rows[..., None], axis=1),
            index=jnp.take_along_axis(kept.index, order, axis=1),
            middle=jnp.take_along_axis(seen.middle, rows[None, ..., None], axis=2),
            pooled=seen.pooled,
        )

    def _remembered(self, batch) -> tuple[Selection, fluxvit.Features]:
        """As `_see`, from what `cached_lesson` has returned."""
        index, attention, pooled, middle = (batch[name] for name in CACHED)
        if middle.dtype == jnp.uint16:
            middle = jax.lax.bitcast_convert_type(middle, jnp.dtype(self.dtype))
        middle = jnp.moveaxis(middle, 1, 0)
        return Selection(index, None), fluxvit.Features(middle, pooled, attention)

    @jax.named_scope(TEACHER)
    def _see(
        self, params, frozen, patches, grid, grids, keys
    ) -> tuple[Selection, fluxvit.Features]:
        """What the selector leaves of clips for the teacher, and what it makes of that."""
        teacher = fluxvit.merge(self.teacher, frozen)
        scorer = teacher if self.scored_by == "teacher" else self._student(params)
        kept = selection.select(
            jax.lax.stop_gradient(scorer.patch_embed(patches)),
            grid,
            self.tokens,
            self.limits,
            kind=self.selector,
            groups=self.groups,
            key=keys,
        )
        position = teacher.position(grids, kept.index, self.limits)
        blocks = tuple(block for _, block in self.pairs)
        return kept, teacher.features(fluxvit.take(patches, kept), position, kept, blocks)

    def _order(self, attention: jax.Array, keys: jax.Array) -> jax.Array:
        """The order in which students get the teacher's tokens: int32 [B, N]."""
        even = jnp.ones_like(attention)
        noise = jax.vmap(lambda key: jax.random.exponential(key, attention.shape[1:]))(keys)
        return selection.draw(
            even if self.mask == "random" else attention,
            even if self.mask == "attention_topk" else noise,
        )

    def _positions(self, params, grids, index) -> list[tuple[jax.Array, jax.Array]]:
        """Of each student's tokens, for blocks and for decoders: prefixes of the first's."""
        student, decoders = self._student(params), self._decoders(params)
        first = index[:, : self.budgets[0]]
        found = [network.position(grids, first, self.limits) for network in (student, decoders)]
        return [tuple(own[:, : 1 + n] for own in found) for n in self.budgets]

    def _pass(self, params, positions, lesson, head, keys):
        """One student's loss; beside it its terms."""
        student, decoders = self._student(params), self._decoders(params)
        blocks = tuple(block for block, _ in self.pairs)
        kept = Selection(lesson.index, None)
        own = student.features(lesson.patches, positions[0], kept, blocks, head, keys)
        layers = decoders.compare(own.middle, positions[1], lesson.middle, distance)
        pooled = distance(decoders.pooled(own.pooled), lesson.pooled)
        terms = {"layers": jnp.mean(layers), "pooled": pooled}
        loss = self.layer_weight * terms["layers"] + self.pooled_weight * pooled
        agreement = {
            f"agreement_block{block}": 1 - far / 2
            for block, far in zip(blocks, layers, strict=True)
        }
        return loss, terms | agreement | {"agreement_pooled": 1 - pooled / 2}

    def _student(self, params: dict) -> fluxvit.FluxViT:
        return fluxvit.merge(
            self.student, {name: own for name, own in params.items() if name != DECODERS}
        )

    def _decoders(self, params: dict) -> nnx.Module:
        return fluxvit.merge(self.decoders, params[DECODERS])


def distance(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """The mean of 2 - 2 cos, from 0 to 4, over all vectors: float32.

    student, teacher: [..., C], of any length.
    """
    pair = (l2_normalise(x.astype(jnp.float32)) for x in (student, teacher))
    return 2 - 2 * jnp.mean(jnp.sum(jnp.multiply(*pair), axis=-1))
