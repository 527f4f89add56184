"""Flux-CLIP: videos and captions in one space, at one token budget or several.

The paper (arXiv 2503.14237) has its tables 16 and 17, and its code is not released. What they leave
open follows InternVideo2 CLIP S and B (OpenGVLab/InternVideo, InternVideo2/multi_modality), on
which it builds. Neither tells the budgets of training or their heads: here budget i ends in pooling
head i, as in fine-tuning, and all budgets share one head into the space of texts, so that a text
has one vector whatever budget a video is seen at.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from fluxvit_jax.checkpoints import download
from fluxvit_jax.config.fields import REQUIRED
from fluxvit_jax.config.network import freezing, model_config
from fluxvit_jax.config.variants import TEXT_ENCODERS, VARIANTS
from fluxvit_jax.convert import clip_parts, official_names
from fluxvit_jax.convert.clip_parts import ClipParts
from fluxvit_jax.data.tokenizer import CONTEXT
from fluxvit_jax.distributed import storage
from fluxvit_jax.distributed.partition_rules import Rules
from fluxvit_jax.errors import UserError
from fluxvit_jax.models import blocks, flops, fluxvit
from fluxvit_jax.models.blocks import l2_normalize
from fluxvit_jax.models.clip_head import ClipHead
from fluxvit_jax.models.text_encoder import TextEncoder
from fluxvit_jax.models.token_selection import NOISY_SELECTORS, GridLimits, Selection, take_prefix
from fluxvit_jax.objectives import flux_clip_text
from fluxvit_jax.objectives.base import (
    FROZEN_SCOPE,
    Fields,
    Measure,
    Objective,
    check_without_classes,
    multi_budget_value_and_grad,
    params_of_run,
    register,
)
from fluxvit_jax.objectives.contrastive_loss import contrastive_loss
from fluxvit_jax.objectives.flux_clip_text import TEXT, text_encoder_config
from fluxvit_jax.objectives.flux_multi import smooth_l1
from fluxvit_jax.objectives.micro_batches import mapped

Tree = dict[str, Any]

OBJECTIVE = "flux_clip"
HEAD, TEMPERATURE = "clip_head", "temperature"  # names among the trained parameters
ADDED = (HEAD, TEMPERATURE, TEXT)


@register(OBJECTIVE)
@dataclass(frozen=True)
class FluxCLIP(Objective):
    """The symmetric contrastive loss over all clips and captions of a step, at every budget.

    The loss is the sum over the budgets of `contrastive_loss` and, with `align` above 0, of the
    distance between each smaller budget's projected clip vector and the largest budget's, as in
    Flux-Multi. `train.freeze` says what of the network is trained: "backbone" is the official way
    (pooling and head), "all_but_head" trains the head alone.

    budgets: decreasing; budget i uses pooling head i. group: clips that share a grid. parts: of a
    batch, in which it goes through the networks. train_text: whether the text encoder is trained.
    """

    labelled: ClassVar[bool] = False
    captioned: ClassVar[bool] = True
    whole_batch: ClassVar[bool] = True
    training_data: ClassVar[str] = "a list of path,caption, CSV or JSON, or a mixture (mixture.csv)"
    task: ClassVar[str] = "retrieval"
    freezes: ClassVar[bool] = True
    partition_rules: ClassVar[Rules] = (
        ("clip_head/proj/kernel", P("fsdp", None)),  # [pool width, D]
        ("temperature", P()),
        ("text_encoder/token_embed", P(None, "fsdp")),  # [vocabulary, C]
        ("text_encoder/pos_embed", P(None, "fsdp")),  # [context, C]
        ("text_encoder/projection", P("fsdp", None)),  # [C, D]
        ("text_encoder/blocks/(qkv|fc1)/kernel", P(None, "fsdp", "tensor")),  # [depth, C, ...]
        ("text_encoder/blocks/(qkv|fc1)/bias", P(None, "tensor")),
        ("text_encoder/blocks/(proj|fc2)/kernel", P(None, "tensor", "fsdp")),  # [depth, ..., C]
    )

    graph: nnx.GraphDef
    head: nnx.GraphDef
    text_encoder: nnx.GraphDef
    limits: GridLimits
    budgets: tuple[int, ...]
    group: int
    parts: int
    align: float
    train_text: bool
    dtype: str
    drop_path: bool
    selector: str
    least_temperature: float

    @classmethod
    def from_config(cls, config: ConfigDict, limits: GridLimits, platform: str) -> "FluxCLIP":
        train, frozen, model = config.train, freezing(config), model_config(config, platform)
        whole = "blocks" in frozen.names
        model = replace(model, frozen_blocks=model.depth if whole else frozen.blocks)
        network = text_encoder_config(config)
        return cls(
            graph=fluxvit.graphdef(model),
            head=blocks.graphdef(lambda rngs: _head(config, rngs)),
            text_encoder=blocks.graphdef(lambda rngs: TextEncoder(network, rngs)),
            limits=limits,
            budgets=tuple(train.budgets),
            group=config.data.clips_per_grid,
            parts=train.grad_accum_steps,
            # With frozen clip vectors it could change nothing.
            align=0.0 if "pool" in frozen.names else train.align_weight,
            train_text=config.clip.train_text,
            dtype=config.model.dtype,
            drop_path=config.model.drop_path > 0 and not whole,
            selector=config.model.selector.kind,
            least_temperature=config.clip.least_temperature,
        )

    @classmethod
    def check(cls, config: ConfigDict) -> None:
        check_without_classes(config, OBJECTIVE, "captions have no classes")
        if config.model.selector.rounding != "exact":
            raise UserError("config.model.selector.rounding: flux_clip takes exact budgets only")
        if config.data.repeated_aug != 1:
            raise UserError(
                f"config.data.repeated_aug: {config.data.repeated_aug} clips of one video would be "
                "each other's positives; set it to 1"
            )
        if config.data.holdout_fraction:
            raise UserError("config.data.holdout_fraction: flux_clip leaves no videos out; set 0")

    @classmethod
    def check_for_training(cls, config: ConfigDict) -> None:
        if config.clip.text_encoder in ("", REQUIRED) and not config.clip.train_text:
            raise UserError(
                "no text encoder: add --config.clip.text_encoder=WEIGHTS, such as MobileCLIP's "
                "mobileclip_blt.pt, or train one with --config.clip.train_text=True"
            )

    @classmethod
    def init_params(cls, config: ConfigDict, key: jax.Array) -> Tree:
        head_key, text_key = jax.random.split(key)
        params: Tree = {
            HEAD: fluxvit.split(_head(config, nnx.Rngs(head_key)))[1],
            TEMPERATURE: jnp.float32(config.clip.temperature),
        }
        if config.clip.train_text:
            encoder = TextEncoder(text_encoder_config(config), nnx.Rngs(text_key))
            params[TEXT] = fluxvit.split(encoder)[1]
        return params

    @classmethod
    def load_initial(cls, config: ConfigDict) -> Tree:
        """The head and the temperature of a run or a folder of one, and the text encoder.

        `train.init_from` names it. The text encoder is that of `clip.text_encoder`, or without it
        that of the run, if it has trained one, or of the folder.
        """
        initial = _added_in(config.train.init_from) if config.train.init_from else {}
        text = initial.pop(TEXT, None)
        if config.clip.train_text:
            if config.clip.text_encoder:
                text = flux_clip_text.read(config)
            initial |= {TEXT: text} if text else {}
        return initial

    def constrained(self, params: Tree) -> Tree:
        """The temperature at its floor or above."""
        return params | {TEMPERATURE: jnp.maximum(params[TEMPERATURE], self.least_temperature)}

    @classmethod
    def abstract_frozen(cls, config: ConfigDict, mesh: Mesh | AbstractMesh) -> Tree:
        if config.clip.train_text:
            return {}
        return flux_clip_text.abstract(config, mesh, cls.partition_rules)

    @classmethod
    def load_frozen(cls, config: ConfigDict, mesh: Mesh) -> Tree:
        if config.clip.train_text:
            return {}
        return flux_clip_text.load(config, mesh, cls.partition_rules)

    @classmethod
    def frozen_identity(cls, config: ConfigDict) -> dict[str, str]:
        if config.clip.train_text:
            return {}
        return {TEXT: official_names.fingerprint(flux_clip_text.read(config))}

    @classmethod
    def clip_fields(cls, config: ConfigDict) -> Fields:
        return {"text": ((CONTEXT,), "int32"), "identity": ((2,), "int32")}

    @classmethod
    def measure(cls, config: ConfigDict) -> Measure:
        return Measure("t2v_r1_", "text to video R@1", "retrieval")

    @classmethod
    def next_commands(cls, config: ConfigDict, workdir: str) -> list[str]:
        pairs = "" if config.data.validation else " --config.data.validation=PAIRS"
        return [
            f"main --mode=evaluate --workdir={workdir}{pairs}",
            f"main --mode=search --workdir={workdir}{pairs} --config.search.split=PAIRS",
            f"find index VIDEOS --checkpoint={workdir} --tokens={config.train.budgets[0]} "
            "--out=INDEX.npz",
        ]

    @classmethod
    def extra_macs(cls, config: ConfigDict) -> tuple[float, float, float]:
        width = VARIANTS[config.model.variant].pool_width
        heads = len(config.train.budgets) * width * TEXT_ENCODERS[config.clip.network].out
        text, attention = flops.text_macs(text_encoder_config(config))
        if config.clip.train_text:
            return heads + text, 0.0, 0.0
        return heads, text, attention

    def value_and_grad(self, params: Tree, frozen: Tree, batch: Tree) -> tuple[Tree, Tree]:
        """As in `Objective`; `frozen` may hold the text encoder and a part of the network.

        Summing the gradients of the budgets is exact: the alignment target has no gradient.
        """
        params = self.constrained(params)  # official; a start may be below the floor
        keys = jax.vmap(lambda key: jax.random.split(key, 2))(batch["key"])
        clips = {"patches": batch["patches"], "grid": batch["grid"], "drop": keys[:, 1]}
        if self.selector in NOISY_SELECTORS:
            clips["select"] = keys[:, 0]
        kept = self._mapped(self._select, _network(params, frozen), clips)

        def loss_at(
            params: Tree, texts: jax.Array, head: int, anchor: jax.Array | None
        ) -> tuple[jax.Array, tuple[Tree, jax.Array]]:
            networks = _network(params, frozen) | {HEAD: params[HEAD]}
            own = clips | {"kept": self._prefix(_without_added(networks), kept, head)}
            vectors, pooled = self._mapped(
                lambda networks, clips: self._embed(networks, clips, head), networks, own
            )
            loss = contrastive_loss(vectors, texts, params[TEMPERATURE], batch["identity"])
            terms = {"contrastive": loss, "top1": _top1(vectors, texts)}
            if anchor is None:
                return loss, (terms, l2_normalize(pooled))
            if self.align:
                model: fluxvit.FluxViT = fluxvit.from_params(self.graph, _without_added(networks))
                terms["align"] = self.align * smooth_l1(model.project(pooled, head - 1), anchor)
                loss += terms["align"]
            return loss, (terms, anchor)

        gradients, metrics = multi_budget_value_and_grad(
            loss_at,
            lambda params: [self._texts(params, frozen, batch["text"])] * len(self.budgets),
            params,
            self.budgets,
        )
        return gradients, metrics | {TEMPERATURE: params[TEMPERATURE]}

    def _mapped(self, function: Callable[[Tree, Any], Any], params: Tree, clips: Any) -> Any:
        return mapped(function, params, clips, self.parts, self.group)

    def _select(self, network: Tree, clips: Tree) -> Selection:
        """The tokens of the largest budget; those of smaller ones are prefixes."""
        model: fluxvit.FluxViT = fluxvit.from_params(self.graph, network)
        patches = fluxvit.normalize(clips["patches"], jnp.dtype(self.dtype))
        keys = clips.get("select")
        return model.select(patches, clips["grid"], self.budgets[0], self.limits, keys)

    def _prefix(self, network: Tree, first: Selection, head: int) -> Selection:
        if not head:
            return first
        model: fluxvit.FluxViT = fluxvit.from_params(self.graph, network)
        tokens = model.patch_budget(self.budgets[head])
        return take_prefix(first, tokens, self.limits.fewest_tokens)

    def _embed(self, networks: Tree, clips: Tree, head: int) -> tuple[jax.Array, jax.Array]:
        """Vectors to compare with texts', [B, D], and clip vectors, [B, pool width]."""
        model: fluxvit.FluxViT = fluxvit.from_params(self.graph, _without_added(networks))
        to_text: ClipHead = fluxvit.from_params(self.head, networks[HEAD])
        kept, keys = clips["kept"], None
        if self.drop_path:
            keys = jax.vmap(lambda key: jax.random.fold_in(key, head))(clips["drop"])
        tokens = fluxvit.gather_tokens(clips["patches"], kept)
        tokens = fluxvit.normalize(tokens, jnp.dtype(self.dtype))
        position = model.position(clips["grid"][:: self.group], kept.token_index, self.limits)
        pooled = model.pool_tokens(model.encode(tokens, position, kept, keys), kept, head)
        return to_text(pooled), pooled

    def _texts(self, params: Tree, frozen: Tree, ids: jax.Array) -> jax.Array:
        """Vectors of texts: float32 [B, D]."""

        def encode(params: Tree, ids: jax.Array) -> jax.Array:
            encoder: TextEncoder = fluxvit.from_params(self.text_encoder, params)
            return encoder(ids)

        if self.train_text:
            return self._mapped(encode, params[TEXT], ids)
        with jax.named_scope(FROZEN_SCOPE):
            return self._mapped(encode, frozen[TEXT], ids)


def _added_in(source: str) -> Tree:
    """What a run or a folder of Flux-CLIP has beside the network; {} for other weights."""
    path = storage.path_of(download.local_copy(source))
    if of_run := params_of_run(path, ADDED):
        return of_run
    if storage.is_remote(path) or not clip_parts.is_in(Path(path)):
        return {}
    return added_params(clip_parts.read(Path(path)))


def added_params(parts: ClipParts) -> Tree:
    """What a folder has beside the network, by the names among parameters."""
    return {HEAD: parts.head, TEMPERATURE: np.float32(parts.temperature), TEXT: parts.text_encoder}


def _head(config: ConfigDict, rngs: nnx.Rngs) -> ClipHead:
    width, out = VARIANTS[config.model.variant].pool_width, TEXT_ENCODERS[config.clip.network].out
    return ClipHead(width, out, jnp.dtype(config.model.dtype), rngs)


def _without_added(params: Tree) -> Tree:
    return {name: tree for name, tree in params.items() if name not in ADDED}


def _network(params: Tree, frozen: Tree) -> Tree:
    """The whole network's prepared parameters, of trained and frozen ones."""
    return fluxvit.with_frozen(_without_added(params), _without_added(frozen))


def _top1(vectors: jax.Array, texts: jax.Array) -> jax.Array:
    """The share of videos of a batch whose own text is the most similar."""
    similar = jnp.argmax(l2_normalize(vectors) @ l2_normalize(texts).T, axis=1)
    return jnp.mean(similar == jnp.arange(len(vectors)))
