"""Video chat: FluxViT's tokens before a language model, at one token budget or several.

The paper (arXiv 2503.14237, table 10) trains a projector between a frozen FluxViT and a frozen
language model, and does not tell which model, data and recipe; its base is stage 1 of
VideoChat-Flash (OpenGVLab/VideoChat-Flash), which is followed here. There each frame has as many
tokens as the others, and a clip of T frames becomes 16 T tokens; here the tokens that a budget
keeps are no frame grid, so each budget is divided by `chat.merge`, 16 as there.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from fluxvit_jax.checkpoints import download
from fluxvit_jax.config.fields import REQUIRED, numbers_of
from fluxvit_jax.config.grids import admissible_grids
from fluxvit_jax.config.network import model_config
from fluxvit_jax.config.variants import VARIANTS
from fluxvit_jax.convert import language_model_files
from fluxvit_jax.data.chat_texts import TIME_TOKENS, ChatTexts
from fluxvit_jax.data.conversations import open_conversations
from fluxvit_jax.data.sources import Source
from fluxvit_jax.distributed import partition_rules
from fluxvit_jax.distributed.console import say
from fluxvit_jax.distributed.partition_rules import Rules
from fluxvit_jax.errors import UserError
from fluxvit_jax.grids import Grid
from fluxvit_jax.models import blocks, connector, fluxvit, language_model, padded_sequence
from fluxvit_jax.models.connector import Connector
from fluxvit_jax.models.flops import connector_macs, language_model_macs
from fluxvit_jax.models.fluxvit import FluxViT, FluxViTConfig
from fluxvit_jax.models.language_model import LanguageModel, LanguageModelConfig
from fluxvit_jax.models.token_selection import NOISY_SELECTORS, GridLimits, Selection, take_prefix
from fluxvit_jax.objectives import next_token_loss
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
from fluxvit_jax.objectives.frame_times import VideoTokens, with_times
from fluxvit_jax.objectives.micro_batches import mapped

Tree = dict[str, Any]

OBJECTIVE = "flux_chat"
CONNECTOR, LLM = "connector", "llm"  # names among the parameters
TEXTS = ("text", "labels", "place", "times")  # arrays of a batch; times: of frames, if told
BY_FRAME = "frame"
LOSS = "loss_"  # of validation, before the budget


@register(OBJECTIVE)
@dataclass(frozen=True)
class FluxChat(Objective):
    """The language model's cross entropy of the answers, at every budget.

    The loss of a budget is the mean over all labels of the whole batch, as in the official code;
    the losses of the budgets are added.

    budgets: decreasing. by_turns: whether each step trains one of them, in turn. group: clips
    that share a grid. parts: of a batch, in which it goes through the networks. merge: tokens of
    a budget that become one. order: of merged tokens, see `token_order`. train_llm: whether the
    language model is trained.
    """

    labelled: ClassVar[bool] = False
    whole_batch: ClassVar[bool] = True
    training_data: ClassVar[str] = (
        "conversations as LLaVA's, JSON, or captions, JSON or CSV of path,caption"
    )
    task: ClassVar[str] = "mvbench"
    pools: ClassVar[bool] = False
    freezes: ClassVar[bool] = True
    partition_rules: ClassVar[Rules] = (
        ("connector/fc1/kernel", P("fsdp", None)),  # [C, D]
        ("connector/fc2/kernel", P(None, "fsdp")),  # [D, D]
        ("llm/token_embed", P(None, "fsdp")),  # [vocabulary, D]
        ("llm/output/kernel", P("fsdp", "tensor")),  # [D, vocabulary]
        ("llm/layers/(q|k|v|gate|up)/kernel", P(None, "fsdp", "tensor")),  # [depth, D, ...]
        ("llm/layers/(q|k|v)/bias", P(None, "tensor")),
        ("llm/layers/(proj|down)/kernel", P(None, "tensor", "fsdp")),  # [depth, ..., D]
    )

    network: FluxViTConfig
    llm: LanguageModelConfig
    limits: GridLimits
    budgets: tuple[int, ...]
    by_turns: bool
    group: int
    parts: int
    merge: int
    order: str
    train_llm: bool

    @classmethod
    def from_config(cls, config: ConfigDict, limits: GridLimits, platform: str) -> "FluxChat":
        return cls(
            network=encoder_config(config, platform),
            llm=llm_config(config),
            limits=limits,
            budgets=tuple(config.train.budgets),
            by_turns=config.chat.step_budgets == "one",
            group=config.data.clips_per_grid,
            parts=config.train.grad_accum_steps,
            merge=config.chat.merge,
            order=token_order(config),
            train_llm=trains_llm(config),
        )

    @classmethod
    def check(cls, config: ConfigDict) -> None:
        check_without_classes(config, OBJECTIVE, "answers have no classes")
        if config.train.freeze != "all":
            raise UserError('config.train.freeze: flux_chat trains no video network; set it "all"')
        if config.data.holdout_fraction:
            raise UserError("config.data.holdout_fraction: flux_chat leaves no videos out; set 0")
        if config.model.selector.rounding != "exact":
            raise UserError("config.model.selector.rounding: flux_chat takes exact budgets only")
        depth = VARIANTS[config.model.variant].depth
        if config.chat.layer < -depth:
            raise UserError(
                f"config.chat.layer: {config.chat.layer}, and {config.model.variant} has {depth} "
                f"blocks; -{depth} is the first"
            )
        if config.chat.frame_times and config.chat.order != "time":
            raise UserError(
                "config.chat.frame_times: takes tokens in the order of the video; chat.order is "
                f"{config.chat.order}, set it to time"
            )
        fewest = min(grid.tokens for grid in admissible_grids(config))
        for budget in config.train.budgets:
            if budget > fewest:
                raise UserError(
                    f"config.train.budgets: {budget} tokens, and a grid of data.grids has "
                    f"{fewest}; a language model takes full budgets only"
                )
            if budget % config.chat.merge:
                raise UserError(
                    f"config.chat.merge: {budget} tokens of train.budgets do not divide by "
                    f"{config.chat.merge}"
                )

    @classmethod
    def check_for_training(cls, config: ConfigDict) -> None:
        if config.chat.llm in ("", REQUIRED):
            raise UserError(
                "no language model: add --config.chat.llm=FOLDER, such as a copy of "
                "Qwen2.5-7B-Instruct"
            )

    @classmethod
    def init_params(cls, config: ConfigDict, key: jax.Array) -> Tree:
        params: Tree = {CONNECTOR: fluxvit.split(_connector(config, nnx.Rngs(key)))[1]}
        if trains_llm(config):
            rngs = nnx.Rngs(jax.random.fold_in(key, 1))
            params[LLM] = fluxvit.split(LanguageModel(llm_config(config), rngs))[1]
        return params

    @classmethod
    def load_initial(cls, config: ConfigDict) -> Tree:
        """The projector of `train.init_from`, a run of video chat, and the language model to train.

        That is the run's, if it has trained one, or the one in `chat.llm`.
        """
        source = config.train.init_from
        parts = (CONNECTOR, LLM)
        initial = params_of_run(download.local_copy(source), parts) if source else {}
        if not trains_llm(config):
            initial.pop(LLM, None)
        elif LLM not in initial:
            shapes = language_model_files.shapes(llm_config(config))
            initial[LLM] = language_model_files.read(config.chat.llm, shapes)
        return initial

    @classmethod
    def abstract_frozen(cls, config: ConfigDict, mesh: Mesh | AbstractMesh) -> Tree:
        """The language model, in the compute dtype."""
        return {} if trains_llm(config) else {LLM: llm_shapes(llm_config(config), mesh)}

    @classmethod
    def load_frozen(cls, config: ConfigDict, mesh: Mesh) -> Tree:
        expected = cls.abstract_frozen(config, mesh)
        if not expected:
            return {}
        say(f"the language model is {config.chat.llm}")
        return {LLM: language_model_files.read(config.chat.llm, expected[LLM])}

    @classmethod
    def frozen_identity(cls, config: ConfigDict) -> dict[str, str]:
        if trains_llm(config):
            return {}
        return {LLM: language_model_files.fingerprint(config.chat.llm)}

    @classmethod
    def clip_fields(cls, config: ConfigDict) -> Fields:
        tokens = config.chat.text_tokens
        fields: Fields = {name: ((tokens,), "int32") for name in ("text", "labels")}
        fields["place"] = ((), "int32")
        if frames := timed_frames(config):
            fields["times"] = ((frames, TIME_TOKENS), "int32")
        return fields

    @classmethod
    def open_training(cls, config: ConfigDict) -> Source:
        """Conversations, or captions: see `conversations.open_conversations`."""
        source = open_conversations(config.data.train, config.data.root, config.chat.template)
        cls.text_arrays(config).check(source)
        return source

    @classmethod
    def open_validation(cls, config: ConfigDict, training: Source) -> Source:
        """Likewise; what they leave out of a text is not measured either."""
        source = open_conversations(config.data.validation, config.data.root, config.chat.template)
        cls.text_arrays(config).check(source)
        return source

    @classmethod
    def measure(cls, config: ConfigDict) -> Measure:
        return Measure(LOSS, "loss of a token", "answer_loss", falls=True)

    @classmethod
    def text_arrays(cls, config: ConfigDict) -> ChatTexts:
        chat = config.chat
        return ChatTexts(
            chat.llm,
            chat.template,
            chat.labels,
            chat.text_tokens,
            chat.time_message,
            timed_frames(config),
        )

    @classmethod
    def next_commands(cls, config: ConfigDict, workdir: str) -> list[str]:
        return [
            f"main --mode=chat --checkpoint={workdir} --video=VIDEO "
            f"--tokens={config.train.budgets[-1]}",
            f"main --mode=evaluate --workdir={workdir} --config.data.validation=MVBENCH/json",
        ]

    @classmethod
    def extra_macs(cls, config: ConfigDict) -> tuple[float, float, float]:
        """The language model counts twice where it is frozen: gradients pass through it."""
        llm = llm_config(config)
        trained = frozen = attention = 0.0
        for budget in cls.step_budgets(config):
            tokens = budget // config.chat.merge
            trained += connector_macs(encoder_config(config).width, llm.width, tokens)
            whole = tokens + timed_frames(config) * TIME_TOKENS + config.chat.text_tokens - 1
            all_macs, attention_only = language_model_macs(llm, whole, config.chat.text_tokens)
            if trains_llm(config):
                trained += all_macs
            else:
                frozen += 2 * all_macs
                attention += 2 * attention_only
        return trained, frozen, attention

    def turns(self) -> dict[str, Objective]:
        """One budget each, if they take turns, the largest first."""
        if not self.by_turns:
            return {"": self}
        return {f"{budget} tokens": replace(self, budgets=(budget,)) for budget in self.budgets}

    @classmethod
    def step_budgets(cls, config: ConfigDict) -> tuple[int, ...]:
        budgets = tuple(config.train.budgets)
        return budgets[:1] if config.chat.step_budgets == "one" else budgets

    def value_and_grad(self, params: Tree, frozen: Tree, batch: Tree) -> tuple[Tree, Tree]:
        """As in `Objective`; `frozen` holds the video network and may hold the language model."""
        clips = {name: batch[name] for name in ("patches", "grid")}
        if self.network.selector in NOISY_SELECTORS:
            clips["key"] = jax.vmap(lambda key: jax.random.split(key, 1)[0])(batch["key"])
        video_network = encoder_params(frozen, self.network)
        with jax.named_scope(FROZEN_SCOPE):
            kept = self._mapped(self._select, video_network, clips)
        texts = {name: batch[name] for name in TEXTS if name in batch}
        total = next_token_loss.labels_counted(batch["labels"])
        added = {name: params[name] for name in (CONNECTOR, LLM) if name in params}

        def loss_at(params: Tree, _: None, i: int, carry: None) -> tuple[jax.Array, tuple]:
            # An image has fewer tokens than a budget; all of its grids then have as many.
            tokens = padded_sequence.patch_budget(self.budgets[i], self.network.cls)
            tokens = min(tokens, self.limits.fewest_tokens)
            own = clips | {"kept": take_prefix(kept, tokens, self.limits.fewest_tokens)}
            with jax.named_scope(FROZEN_SCOPE):
                features, frame = self._mapped(self._features, video_network, own)
            losses, hits = self._mapped(
                lambda params, clips: self.scores(params | _llm_of(frozen), clips),
                params,
                texts | {"features": features, "frame": frame},
            )
            loss = jnp.sum(losses) / total
            return loss, ({"answer": loss, "top1": jnp.sum(hits) / total}, None)

        gradients, metrics = multi_budget_value_and_grad(
            loss_at, lambda params: [None] * len(self.budgets), added, self.budgets
        )
        return gradients, metrics

    def _mapped(self, function: Any, params: Tree, clips: Tree) -> Any:
        return mapped(function, params, clips, self.parts, self.group)

    def _select(self, params: Tree, clips: Tree) -> Selection:
        """The tokens of the largest budget; those of smaller ones are prefixes."""
        model: FluxViT = fluxvit.from_params(fluxvit.graphdef(self.network), params)
        budget = min(self.budgets[0], self.limits.fewest_tokens + (self.network.cls == "inside"))
        patches = fluxvit.normalize(clips["patches"], jnp.dtype(self.network.dtype))
        return model.select(patches, clips["grid"], budget, self.limits, clips.get("key"))

    def _features(self, params: Tree, clips: Tree) -> tuple[jax.Array, jax.Array]:
        model: FluxViT = fluxvit.from_params(fluxvit.graphdef(self.network), params)
        grids = clips["grid"][:: self.group]
        return features(model, clips["patches"], grids, clips["kept"], self.limits)

    def scores(self, params: Tree, clips: Tree) -> tuple[jax.Array, jax.Array]:
        """Of each clip the sum of its answer's losses and the number of its hits, float32 [B].

        params: projector and language model; clips: the arrays of `TEXTS`, and "features" [B, N, C]
        and "frame" [B, N] as `features` gives them.
        """
        llm: LanguageModel = fluxvit.from_params(language_model.graphdef(self.llm), params[LLM])
        projector = connector_of(self.network, self.llm.width, params[CONNECTOR])
        seen = project(
            projector,
            VideoTokens(clips["features"], clips["frame"]),
            self.merge,
            self.network.heads,
            self.order,
        )
        video, length, place = seen.tokens, None, clips["place"]
        if self.order == BY_FRAME:
            video, length = with_times_of(llm, seen, clips["times"])
        embeddings = next_token_loss.with_video(llm.embed(clips["text"]), video, place, length)
        hidden = llm.encode(embeddings, remat=True)
        return next_token_loss.answer_scores(hidden, clips["labels"], place, llm.logits, length)


def trains_llm(config: ConfigDict) -> bool:
    """Whether the language model is trained too."""
    return config.chat.train == "projector+llm"


def token_order(config: ConfigDict) -> str:
    """Order of merged tokens: "time", "official", or for times of frames `BY_FRAME`."""
    return BY_FRAME if config.chat.frame_times else config.chat.order


def timed_frames(config: ConfigDict) -> int:
    """Most frames of a training clip whose times are told; 0 if none are."""
    if not config.chat.frame_times:
        return 0
    return max(numbers_of("data.grids.frames", config.data.grids.frames))


def with_times_of(
    llm: LanguageModel, video: VideoTokens, times: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """`with_times` of texts by their ids, int32 [B, T, M], below 0 for padding."""
    B, T, M = times.shape
    embedded = llm.embed(jnp.maximum(times, 0).reshape(B, T * M))
    return with_times(video, embedded.reshape(B, T, M, -1), times >= 0)


def llm_config(config: ConfigDict) -> LanguageModelConfig:
    """The language model in the compute dtype. Raises UserError as `read_config`."""
    return language_model_files.read_config(config.chat.llm).in_dtype(config.model.dtype)


def llm_shapes(config: LanguageModelConfig, mesh: Mesh | AbstractMesh) -> Tree:
    """Shapes of the language model in its compute dtype, and how the mesh shares it.

    Raises UserError if a side of the mesh does not divide it.
    """
    tree = {LLM: language_model_files.shapes(config)}
    partition_rules.check(tree, mesh, "the language model", FluxChat.partition_rules)
    sharded = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(
            leaf.shape, jnp.dtype(config.dtype), sharding=sharding
        ),
        tree,
        partition_rules.shardings(tree, mesh, FluxChat.partition_rules),
    )
    return sharded[LLM]


def encoder_config(config: ConfigDict, platform: str = "") -> FluxViTConfig:
    """The video network up to the block whose tokens are projected."""
    network = model_config(config, platform)
    depth = network.depth + 1 + config.chat.layer
    return replace(network, depth=depth, frozen_blocks=depth, drop_path=0.0)


def encoder_params(params: Tree, network: FluxViTConfig) -> Tree:
    """The parameters of that network, of those of the whole one."""
    whole = fluxvit.network_params(params)
    cut = jax.tree.map(
        lambda leaf: leaf[: network.depth], whole["blocks"], is_leaf=lambda x: isinstance(x, tuple)
    )
    return whole | {"blocks": cut}


def features(
    model: FluxViT,
    patches: jax.Array,
    grid: jax.Array,
    kept: Selection,
    limits: GridLimits,
) -> tuple[jax.Array, jax.Array]:
    """The tokens of kept patches, [B, N, C], and their frames, int32 [B, N], from 0.

    They are in the order t, h, w, without CLS.

    model: up to the block whose tokens are projected; patches: uint8 [B, P, 588]; grid: int32
    [G, 3], one for each run of B / G clips.
    """
    ordered = Selection(jnp.sort(kept.token_index, axis=1), None)
    tokens = fluxvit.normalize(
        fluxvit.gather_tokens(patches, ordered), jnp.dtype(model.config.dtype)
    )
    position = model.position(grid, ordered.token_index, limits)
    of_frame = jnp.repeat(grid[:, 1] * grid[:, 2], len(patches) // len(grid))
    frame = ordered.token_index // of_frame[:, None]
    return model.encode(tokens, position, ordered)[:, 1:], frame


def features_on_grid(
    network: FluxViTConfig, params: Tree, patches: jax.Array, grid: Grid, budget: int
) -> tuple[jax.Array, jax.Array]:
    """The same of the patches that a budget keeps of clips on one grid.

    network, params: of the encoder, see `encoder_config` and `encoder_params`.
    """
    limits = GridLimits(*grid, grid.tokens)
    model: FluxViT = fluxvit.from_params(fluxvit.graphdef(network), params)
    grids = jnp.broadcast_to(jnp.asarray(grid, jnp.int32), (len(patches), 3))
    normalized = fluxvit.normalize(patches, jnp.dtype(network.dtype))
    # One key for every clip: what is drawn of it depends on no other.
    keys = jnp.broadcast_to(jax.random.key(0), (len(patches),))
    kept = model.select(normalized, grids, budget, limits, keys)
    return features(model, patches, grids[:1], kept, limits)


def connector_of(network: FluxViTConfig, width: int, params: Tree) -> Connector:
    """The projector to `width` channels, for use inside functions that JAX transforms."""
    graph = blocks.graphdef(lambda rngs: _make_connector(network, width, rngs))
    return fluxvit.from_params(graph, params)


def project(
    projector: Connector, features: VideoTokens, merge: int, heads: int, order: str
) -> VideoTokens:
    """What the language model reads of videos, [B, N / merge, D].

    features: of kept patches, see `features`; order: see `token_order`.
    """
    keep = max(1, features.tokens.shape[1] // merge)
    merged = connector.merge(features.tokens, keep, heads, features.frame)
    if order == BY_FRAME:
        merged = connector.by_frame(merged)
    elif order == "time":
        merged = connector.in_order(merged)
    return VideoTokens(projector(merged.tokens), connector.nearest_frame(merged))


def _connector(config: ConfigDict, rngs: nnx.Rngs) -> Connector:
    return _make_connector(encoder_config(config), llm_config(config).width, rngs)


def _make_connector(network: FluxViTConfig, width: int, rngs: nnx.Rngs) -> Connector:
    return Connector(network.width, width, jnp.dtype(network.dtype), rngs)


def _llm_of(frozen: Tree) -> Tree:
    return {name: frozen[name] for name in (LLM,) if name in frozen}
