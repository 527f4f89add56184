"""Flux-UMT: distillation of a frozen teacher into students at several token budgets.

The paper (arXiv 2503.14237) describes the double mask and has table 14; its code for this stage is
not released. Details that it leaves open follow InternVideo2's distillation, on which it builds:
engines/engine_for_distill.py and models/internvideo2_distill.py of its single_modality.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Float
from ml_collections import ConfigDict

from fluxvit_jax.checkpoints import download
from fluxvit_jax.config.network import model_config
from fluxvit_jax.convert import official_names
from fluxvit_jax.data.sources import Source
from fluxvit_jax.data.teacher_targets import (
    CACHED,
    CachedTargets,
    Fields,
    cached_teacher,
    open_cached_targets,
)
from fluxvit_jax.distributed.console import say
from fluxvit_jax.distributed.partition_rules import Rules
from fluxvit_jax.models import blocks, flops, fluxvit, padded_sequence, token_selection
from fluxvit_jax.models.arrays import Array
from fluxvit_jax.models.blocks import l2_normalize
from fluxvit_jax.models.decoders import Decoders
from fluxvit_jax.models.internvideo2 import InternVideo2
from fluxvit_jax.models.token_selection import GridLimits, Selection
from fluxvit_jax.objectives.base import (
    FROZEN_SCOPE,
    Objective,
    multi_budget_value_and_grad,
    params_of_run,
    register,
)
from fluxvit_jax.objectives.flux_umt_teacher import (
    abstract_teacher,
    block_pairs,
    check_config,
    check_teacher_named,
    decoders_config,
    load_teacher,
    make_network,
    read_teacher,
    runs_teacher,
    target_fields,
    teacher_config,
)

Mask = Literal["attention", "attention_topk", "random"]
MASKS: tuple[str, ...] = get_args(Mask)
Positions = tuple[jax.Array, jax.Array]  # of tokens, for the blocks and for the decoders
DECODERS = "decoders"  # name of the decoders among the trained parameters
TEACHER = "teacher"
# Recipes that start from what was pre-trained, by its size.
FINE_TUNING = {"Ti": "custom:tiny", "S": "k400:small", "B": "k400:base", "L": "k400:large"}


class TeacherTargets(NamedTuple):
    """The teacher's features of B clips, with tokens in the order in which students get them.

    patches: [B, 1 + N, 588], the first a placeholder for CLS; token_index: int32 [B, N], patch
    indices of the N tokens; hidden_states: [K, B, 1 + N, target width], CLS first; pooled: float32
    [B, target pool width]. A student of n tokens gets the first n.
    """

    patches: jax.Array
    token_index: jax.Array
    hidden_states: jax.Array
    pooled: jax.Array

    def first(self, n: int) -> "TeacherTargets":
        """The targets of a student of n tokens."""
        return TeacherTargets(
            self.patches[:, : 1 + n],
            self.token_index[:, :n],
            self.hidden_states[:, :, : 1 + n],
            self.pooled,
        )


@register("flux_umt")
@dataclass(frozen=True)
class FluxUMT(Objective):
    """Masked distillation with the double mask.

    A selector chooses the teacher's tokens of a clip, and the students get subsets of them. The
    loss is the sum over the students of `layer_weight` times the mean distance (2 - 2 cos) of
    tokens, over pairs of layers, clips and tokens with CLS, and `pooled_weight` times that of the
    clip vectors. Each student has its own pooling head, which fine-tuning at as many budgets
    continues to train.

    tokens: patches of the teacher; budgets: patches of the students, decreasing and at most
    `tokens`; names: of the budgets in metrics; pairs: (block of the student, of the teacher),
    ascending; mask: how students' tokens are sampled from the teacher's: in proportion to its
    pooling attention, those with the most attention, or uniformly; scored_by: whose patch embedding
    the selector uses, "teacher" or "student".
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
    selector: token_selection.Selector
    groups: int
    layer_weight: float
    pooled_weight: float
    dtype: str
    drop_path: bool

    labelled: ClassVar[bool] = False
    training_data: ClassVar[str] = (
        "a list of path,label (train.csv, val.csv) or a mixture (mixture.csv)"
    )
    partition_rules: ClassVar[Rules] = (
        ("internvideo2/patch_embed/kernel", P(None, "fsdp")),  # [588, C]
        ("internvideo2/pool/(q|k|v)/kernel", P("fsdp", "tensor")),  # [C, C]
        ("internvideo2/pool/(q|k|v)/bias", P("tensor")),  # [C]
        ("internvideo2/pool/proj/kernel", P("tensor", "fsdp")),  # [C, pool width]
        ("decoders/tokens/fc[12]/kernel", P(None, "fsdp", None)),  # [pairs of layers, C, C or D]
        ("decoders/pooled/fc[12]/kernel", P("fsdp", None)),  # [pool width, pool width]
    )

    @classmethod
    def from_config(cls, config: ConfigDict, limits: GridLimits, platform: str) -> "FluxUMT":
        distill, student = config.distill, model_config(config, platform)
        network = teacher_config(config, platform)
        return cls(
            student=fluxvit.graphdef(student),
            decoders=blocks.graphdef(lambda rngs: Decoders(decoders_config(config), rngs)),
            teacher=blocks.graphdef(lambda rngs: make_network(network, rngs)),
            limits=limits,
            tokens=padded_sequence.patch_budget(distill.tokens, student.cls),
            budgets=tuple(
                padded_sequence.patch_budget(n, student.cls) for n in config.train.budgets
            ),
            names=tuple(config.train.budgets),
            pairs=block_pairs(config),
            group=config.data.clips_per_grid,
            mask=distill.mask,
            scored_by=distill.selector_features,
            selector=student.selector,
            groups=student.groups,
            layer_weight=distill.feature_loss_weight,
            pooled_weight=distill.clip_loss_weight,
            dtype=student.dtype,
            drop_path=student.drop_path > 0,
        )

    @classmethod
    def check(cls, config: ConfigDict) -> None:
        check_config(config)

    @classmethod
    def check_for_training(cls, config: ConfigDict) -> None:
        if runs_teacher(config):
            check_teacher_named(config)

    @classmethod
    def init_params(cls, config: ConfigDict, key: jax.Array) -> dict:
        decoders = Decoders(decoders_config(config), nnx.Rngs(key))
        return {DECODERS: fluxvit.split(decoders)[1]}

    @classmethod
    def load_initial(cls, config: ConfigDict) -> dict:
        """The decoders of a run of distillation in `train.init_from`, for as large a teacher."""
        source = config.train.init_from
        initial = params_of_run(download.local_copy(source), (DECODERS,)) if source else {}
        expected = jax.eval_shape(lambda: cls.init_params(config, jax.random.key(0)))
        if initial and not _same_shapes(initial, expected):
            say(f"{source}: its decoders are for other layers or another teacher; new ones start")
            return {}
        return initial

    @classmethod
    def abstract_frozen(cls, config: ConfigDict, mesh: Mesh | AbstractMesh) -> dict:
        if not runs_teacher(config):
            return {}
        return abstract_teacher(config, mesh, cls.partition_rules)

    @classmethod
    def load_frozen(cls, config: ConfigDict, mesh: Mesh) -> dict:
        if not runs_teacher(config):
            return {}
        return load_teacher(config, mesh, cls.partition_rules)

    @classmethod
    def frozen_identity(cls, config: ConfigDict) -> dict[str, str]:
        if runs_teacher(config):
            return {TEACHER: official_names.fingerprint(read_teacher(config))}
        fingerprint = cached_teacher(config)
        return {TEACHER: fingerprint} if fingerprint else {}

    @classmethod
    def head_sizes(cls, config: ConfigDict) -> set[int]:
        teacher = teacher_config(config)
        own = {teacher.width // teacher.heads} if runs_teacher(config) else set()
        return super().head_sizes(config) | own

    @classmethod
    def clip_fields(cls, config: ConfigDict) -> Fields:
        return {} if runs_teacher(config) else target_fields(config)

    @classmethod
    def open_clip_data(cls, config: ConfigDict, source: Source) -> CachedTargets | None:
        return open_cached_targets(config, source)

    @classmethod
    def next_commands(cls, config: ConfigDict, workdir: str) -> list[str]:
        recipe = FINE_TUNING[config.model.variant]
        return [f"main --config={recipe} --config.train.init_from={workdir}"]

    @classmethod
    def extra_macs(cls, config: ConfigDict) -> tuple[float, float, float]:
        patches = [padded_sequence.patch_budget(n, config.model.cls) for n in config.train.budgets]
        decoders = decoders_config(config)
        trained = sum(flops.decoders_macs(decoders, n) for n in patches)
        if not runs_teacher(config):
            return trained, 0.0, 0.0
        network = teacher_config(config)
        tokens = padded_sequence.patch_budget(config.distill.tokens, config.model.cls)
        return trained, flops.features_macs(network, tokens), flops.attention_macs(network, tokens)

    def value_and_grad(self, params: dict, frozen: dict, batch: dict) -> tuple[dict, dict]:
        """As in `Objective`. Labels are not used.

        params: the student's, and its decoders under "decoders"; frozen: the teacher's. Summing the
        gradients of the students is exact: the teacher has no gradient.
        """
        keys = jax.vmap(lambda key: jax.random.split(key, 3))(batch["key"])
        grids = batch["grid"][:: self.group]
        targets = self._teacher_targets(params, frozen, batch, grids, keys[:, 0], keys[:, 1])

        def loss_at(
            params: dict, positions: Positions, head: int, targets: TeacherTargets
        ) -> tuple[jax.Array, tuple[dict, TeacherTargets]]:
            drop = jax.vmap(lambda key: jax.random.fold_in(key, head))(keys[:, 2])
            prefix = targets.first(self.budgets[head])
            loss, terms = self._loss(
                params, positions, prefix, head, drop if self.drop_path else None
            )
            return loss, (terms, targets)

        return multi_budget_value_and_grad(
            loss_at,
            lambda params: self._positions(params, grids, targets.token_index),
            params,
            self.names,
            carry=targets,
        )

    def targets_to_cache(self, frozen: dict, batch: dict) -> dict:
        """The teacher's targets of B clips, for `value_and_grad` to use in place of a teacher.

        batch: patches uint8 [B, P, 588], grid int32 [B, 3]. Returns arrays [B, ...] by the names in
        `CACHED`: the indices of the teacher's tokens, and its features. 16-bit floats are stored as
        their bits, uint16, a type that all file formats support.
        """
        patches = fluxvit.normalize(batch["patches"], jnp.dtype(self.dtype))
        grids = batch["grid"][:: self.group]
        kept, features = self._teacher_forward({}, frozen, patches, batch["grid"], grids, None)
        hidden = jnp.moveaxis(features.hidden_states, 0, 1)
        if hidden.dtype.itemsize == 2:
            hidden = jax.lax.bitcast_convert_type(hidden, jnp.uint16)
        arrays = (kept.token_index, features.attention, features.pooled, hidden)
        return dict(zip(CACHED, arrays, strict=True))

    def _teacher_targets(
        self,
        params: dict,
        frozen: dict,
        batch: dict,
        grids: jax.Array,
        select_keys: jax.Array,
        mask_keys: jax.Array,
    ) -> TeacherTargets:
        """The teacher's tokens and features, in the order in which students get the tokens."""
        patches = fluxvit.normalize(batch["patches"], jnp.dtype(self.dtype))
        if CACHED[0] in batch:
            kept, features = self._targets_from_cache(batch)
        else:
            kept, features = self._teacher_forward(
                params, frozen, patches, batch["grid"], grids, select_keys
            )
        tokens = fluxvit.gather_tokens(patches, kept)
        order = self._order(features.attention, mask_keys)
        rows = padded_sequence.pad_for_cls(1 + order)  # CLS stays first
        return TeacherTargets(
            patches=jnp.take_along_axis(tokens, rows[..., None], axis=1),
            token_index=jnp.take_along_axis(kept.token_index, order, axis=1),
            hidden_states=jnp.take_along_axis(
                features.hidden_states, rows[None, ..., None], axis=2
            ),
            pooled=features.pooled,
        )

    def _targets_from_cache(self, batch: dict) -> tuple[Selection, fluxvit.Features]:
        """As `_teacher_forward`, from arrays that `targets_to_cache` has returned."""
        index, attention, pooled, hidden = (batch[name] for name in CACHED)
        if hidden.dtype == jnp.uint16:
            hidden = jax.lax.bitcast_convert_type(hidden, jnp.dtype(self.dtype))
        features = fluxvit.Features(jnp.moveaxis(hidden, 1, 0), pooled, attention)
        return Selection(index, None), features

    @jax.named_scope(FROZEN_SCOPE)
    def _teacher_forward(
        self,
        params: dict,
        frozen: dict,
        patches: jax.Array,
        grid: jax.Array,
        grids: jax.Array,
        keys: jax.Array | None,
    ) -> tuple[Selection, fluxvit.Features]:
        """The tokens that the selector chooses for the teacher, and the teacher's features."""
        teacher: fluxvit.FluxViT | InternVideo2 = fluxvit.from_params(self.teacher, frozen)
        scorer = teacher if self.scored_by == "teacher" else self._student(params)
        kept = token_selection.select(
            jax.lax.stop_gradient(scorer.patch_embed(patches)),
            grid,
            self.tokens,
            self.limits,
            kind=self.selector,
            groups=self.groups,
            key=keys,
        )
        position = teacher.position(grids, kept.token_index, self.limits)
        teacher_blocks = tuple(block for _, block in self.pairs)
        return kept, teacher.features(
            fluxvit.gather_tokens(patches, kept), position, kept, teacher_blocks
        )

    def _order(self, attention: jax.Array, keys: jax.Array) -> jax.Array:
        """The order in which students get the teacher's tokens: int32 [B, N]."""
        even = jnp.ones_like(attention)
        noise = jax.vmap(lambda key: jax.random.exponential(key, attention.shape[1:]))(keys)
        return token_selection.gumbel_top_k(
            even if self.mask == "random" else attention,
            even if self.mask == "attention_topk" else noise,
        )

    def _positions(self, params: dict, grids: jax.Array, index: jax.Array) -> list[Positions]:
        """Positions of each student's tokens: prefixes of those of the first student."""
        first = index[:, : self.budgets[0]]
        student = self._student(params).position(grids, first, self.limits)
        decoders = self._decoders(params).position(grids, first, self.limits)
        return [(student[:, : 1 + n], decoders[:, : 1 + n]) for n in self.budgets]

    def _loss(
        self,
        params: dict,
        positions: Positions,
        targets: TeacherTargets,
        head: int,
        keys: jax.Array | None,
    ) -> tuple[jax.Array, dict]:
        """The loss of one student, with its terms."""
        student, decoders = self._student(params), self._decoders(params)
        student_blocks = tuple(block for block, _ in self.pairs)
        kept = Selection(targets.token_index, None)
        features = student.features(targets.patches, positions[0], kept, student_blocks, head, keys)
        distances = decoders.compare(
            features.hidden_states, positions[1], targets.hidden_states, distance
        )
        pooled = distance(decoders.pooled(features.pooled), targets.pooled)
        terms = {"layers": jnp.mean(distances), "pooled": pooled}
        loss = self.layer_weight * terms["layers"] + self.pooled_weight * pooled
        agreement = {
            f"agreement_block{block}": 1 - apart / 2
            for block, apart in zip(student_blocks, distances, strict=True)
        }
        return loss, terms | agreement | {"agreement_pooled": 1 - pooled / 2}

    def _student(self, params: dict) -> fluxvit.FluxViT:
        return fluxvit.from_params(self.student, fluxvit.network_params(params))

    def _decoders(self, params: dict) -> Decoders:
        return fluxvit.from_params(self.decoders, params[DECODERS])


def _same_shapes(one: dict, other: dict) -> bool:
    shapes = [jax.tree.map(lambda leaf: leaf.shape, tree) for tree in (one, other)]
    return shapes[0] == shapes[1]


def distance(
    student: Float[Array, "*batch C"], teacher: Float[Array, "*batch C"]
) -> Float[Array, ""]:
    """The mean of 2 - 2 cos, from 0 to 4, over all vectors: float32.

    student, teacher: [..., C], of any norm.
    """
    pair = (l2_normalize(x.astype(jnp.float32)) for x in (student, teacher))
    return 2 - 2 * jnp.mean(jnp.sum(jnp.multiply(*pair), axis=-1))
