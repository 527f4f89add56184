"""A trained network to call from Python: `from_pretrained`, and what it returns."""

import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import cv2
import jax
import jax.numpy as jnp
import numpy as np

from fluxvit_jax.adaptive.cascade import Answers, Cascade, Size
from fluxvit_jax.checkpoints.weights import read_weights
from fluxvit_jax.config.variants import NO_CLASSES, VARIANTS
from fluxvit_jax.convert import clip_parts, official_names, weight_files
from fluxvit_jax.convert.config_json import PretrainedConfig
from fluxvit_jax.data import decoding
from fluxvit_jax.data.class_names import numbered
from fluxvit_jax.data.clips import read_clip, read_clips
from fluxvit_jax.data.patches import patchify
from fluxvit_jax.deploy.cascade_passes import CascadePasses
from fluxvit_jax.deploy.resize import fit
from fluxvit_jax.deploy.shared_space import SharedSpace
from fluxvit_jax.distributed.compilation_cache import keep_programs_by_default
from fluxvit_jax.errors import UserError
from fluxvit_jax.evaluation.finite import check_finite
from fluxvit_jax.grids import PATCH, Grid, nearest_head
from fluxvit_jax.models import fluxvit, token_selection
from fluxvit_jax.models.fluxvit import FluxViTConfig, ModelOutput
from fluxvit_jax.models.token_selection import NOISY_SELECTORS, Rounding
from fluxvit_jax.objectives import flux_clip_weights

Video = str | os.PathLike | np.ndarray | jax.Array  # a file, or its frames


class Output(NamedTuple):
    """What the network says of B clips.

    logits: float32 [B, classes]; pooled: float32 [B, pool_width], the clips' vectors;
    kept: bool [B, T, H, W], the patches that were looked at, and tokens_kept, how many they are in
    each clip; head: which of the heads answered.
    """

    logits: jax.Array
    pooled: jax.Array
    kept: jax.Array
    tokens_kept: int
    head: int

    def __repr__(self) -> str:
        return _describe_fields(self)


class Prediction(NamedTuple):
    """A class and its probability, 0 to 1."""

    name: str
    probability: float


class Features(NamedTuple):
    """The kept tokens of B clips after the last block, in the order t, h, w.

    tokens: [B, N, C]; places: int32 [B, N, 3], frame, patch row and column of each;
    pooled: float32 [B, pool_width].
    """

    tokens: np.ndarray
    places: np.ndarray
    pooled: np.ndarray

    def __repr__(self) -> str:
        return _describe_fields(self)


def _describe_fields(values: Any) -> str:
    """The fields of a NamedTuple in a line, arrays by their type and shape alone."""
    shown = (
        f"{name}={value.dtype}{list(value.shape)}" if hasattr(value, "shape") else f"{name}={value}"
        for name, value in values._asdict().items()
    )
    return f"{type(values).__name__}({', '.join(shown)})"


def from_pretrained(
    path: str | os.PathLike,
    config: Mapping[str, Any] | str | os.PathLike | None = None,
    dtype: str = "float32",
    text_encoder: str | os.PathLike = "",
) -> "PretrainedModel":
    """The network in `path`, ready to be called.

    Args:
        path: a workdir, one step of it, a folder that `save_pretrained` or the converter wrote, a
            .safetensors file, or an official .pth file; or a name: `builtin://ti`, the demo's
            network, which comes with the package; `hf://OWNER/NAME[@REVISION][/FILE]` and
            `https://HOST/FILE#sha256=HEX`, which are downloaded.
        config: fields of `config.json`, or the path of such a file: what a bare file does not tell,
            or what is to be otherwise than the file says, such as {"gelu": "erf"}.
        dtype: of the computation, "float32" or "bfloat16". Parameters are float32.
        text_encoder: of a run of Flux-CLIP with a frozen one: its file, if it was moved.

    Raises:
        UserError: there are no such weights, or they do not fit.

    Examples:
        >>> model = fluxvit_jax.from_pretrained("runs/k400_small")
        >>> out = model(video, tokens=1024)
        >>> out.logits.argmax(-1), out.tokens_kept
    """
    keep_programs_by_default()
    if isinstance(config, str | os.PathLike):
        config = weight_files.read_config(config)
    found = read_weights(path, config)
    model = replace(found.config.model, dtype=dtype)
    described = replace(found.config, model=model)
    parts = flux_clip_weights.read_parts(path, os.fspath(text_encoder))
    space = SharedSpace(parts, dtype) if parts else None
    return PretrainedModel(found.params(np.float32), described, found.evaluations, space)


class PretrainedModel:
    """A network with its weights. Compiles once for each grid, budget, head and number of clips.

    Videos are uint8 pixels [T, height, width, 3] or [B, T, height, width, 3]. Floats of the same
    shapes are accepted with `normalized=True` only: they are then (pixels / 255 - mean) / std with
    ImageNet's mean and standard deviation. Frames whose sides are no multiples of 14 are resized to
    the nearest ones. `tokens` is the budget: so many patches are kept, all where there are no more
    or where it is None.

    Attributes:
        params: nested dict of float32 arrays.
        config: `PretrainedConfig`: the network, the budgets of its heads, its classes.
        evaluations: reports of `--mode=evaluate` that are of these weights, the newest last.
        space: of weights of Flux-CLIP, what maps videos and texts into one space; else None.
    """

    def __init__(
        self,
        params: dict[str, Any],
        config: PretrainedConfig,
        evaluations: Sequence[dict[str, Any]] = (),
        space: SharedSpace | None = None,
    ):
        self.params = jax.device_put(params)
        self.config = config
        self.evaluations = tuple(evaluations)
        self.space = space

    def __repr__(self) -> str:
        model, parameters = self.config.model, sum(x.size for x in jax.tree.leaves(self.params))
        sizes = {(v.width, v.depth): f"FluxViT-{name}, " for name, v in VARIANTS.items()}
        names = ": " + ", ".join(map(repr, self.class_names[:2])) + ", ..."
        if self.config.assumed_names:
            names += f" (assumed: {self.config.assumed_names})"
        return (
            f"PretrainedModel({sizes.get((model.width, model.depth), '')}{parameters / 1e6:.1f} M "
            f"parameters, heads trained at {', '.join(map(str, self.config.head_budgets))} tokens, "
            f"{model.classes} classes{names if self.class_names else ' without names'}"
            f"{', with a text encoder' if self.space else ''})"
        )

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes in the order of the logits; none where they are not known.

        `config.assumed_names` tells of names that the weights do not hold themselves.
        """
        return self.config.class_names

    @property
    def has_classifier(self) -> bool:
        """Whether there are classes to predict, as Flux-CLIP's training gives none."""
        return self.space is None or self.config.model.classes != NO_CLASSES

    @property
    def labels(self) -> tuple[str, ...]:
        """`class_names`, or without them "class 0" and so on."""
        return self.class_names or numbered(self.config.model.classes)

    def __call__(
        self,
        video: np.ndarray | jax.Array,
        tokens: int | None = None,
        head: int | None = None,
        rounding: Rounding | None = None,
        *,
        normalized: bool = False,
    ) -> Output:
        """Class scores and vectors of clips at a token budget.

        head: 0, 1 or 2; by default the one that was trained at the nearest budget.
        rounding: "official" keeps as many tokens as the official code, up to four fewer.
        normalized: the frames are floats that are normalized already.

        Raises ValueError for a video, budget or head that cannot be.
        """
        answer, kept, head = self._run(video, tokens, head, rounding, normalized)
        index, valid = answer.kept
        count = index.shape[1] if valid is None else int(valid[0].sum())
        return Output(answer.logits, answer.pooled, kept, count, head)

    def predict(
        self,
        video: Video | Sequence[Video],
        tokens: int | None = None,
        top: int = 5,
        head: int | None = None,
        *,
        calibrated: bool = False,
    ) -> list[Prediction] | list[list[Prediction]]:
        """The `top` likeliest classes of a video, likeliest first; of several, a list of these.

        Args:
            video: path of a video file, uint8 frames [T, height, width, 3], or several: a list of
                these, or uint8 [B, T, height, width, 3].
            tokens: the budget; by default the first of `config.settings` for a file, and all
                tokens for frames. A file is read on the grid of the nearest setting, as
                --mode=predict reads it; frames are taken as they are.
            head: by default the one that was trained at the nearest budget.
            calibrated: whether probabilities are at the temperature of `temperature_at`; by default
                they are as the network gives them.

        Raises:
            UserError: a file is missing, or no video that can be read; no evaluation has the
                temperatures for `calibrated`.
            ValueError: frames, a budget, a head or a `top` that cannot be.

        >>> model.predict("a.mp4", tokens=512, top=2)
        [Prediction(name='juggling balls', probability=0.83), Prediction(name=...)]
        """
        if not self.has_classifier:
            raise UserError("these weights have no classes of their own; name some: classify(...)")
        found = [
            own
            for output in self._outputs(video, tokens, head)
            for own in self.likeliest(
                output,
                self.labels,
                top,
                self.temperature_at(output.tokens_kept) if calibrated else 1.0,
            )
        ]
        return found if _are_several(video) else found[0]

    def _outputs(
        self, video: Video | Sequence[Video], tokens: int | None, head: int | None = None
    ) -> Iterator[Output]:
        """The answer to each of several videos, or one to all of an array."""
        several = isinstance(video, Sequence) and not isinstance(video, str)
        videos = cast("Sequence[Video]", video if several else [video])
        for one in videos:
            if isinstance(one, str | os.PathLike):
                yield self(*self._read(one, tokens), head)
            else:
                yield self(one, tokens, head)

    def _read(self, path: str | os.PathLike, tokens: int | None) -> tuple[np.ndarray, int]:
        """The frames of a file on the grid of the nearest setting, and the budget."""
        (budget, *grid), *_ = self.config.asked(() if tokens is None else (tokens,))
        try:
            with decoding.Video(path) as opened:
                return read_clip(opened, *grid).frames, budget
        except decoding.DecodeError as error:
            raise UserError(str(error)) from error

    def run_cascade(self, video: Video | Sequence[Video], cascade: Cascade) -> Answers:
        """The answers of a cascade to n videos, which it asks at more tokens only if in doubt.

        Args:
            video: as in `predict`; frames are taken evenly, scaled and cut to the grid of a step.
            cascade: such as `fluxvit_jax.plan(WORKDIR, average_milliseconds=8).cascade`.

        Raises:
            UserError: as in `predict`, the weights have several labels a video, or a step looks at
                several views or is one that the network cannot run.
            ValueError: no video, or frames that cannot be.

        >>> answers = model.run_cascade(["a.mp4", "b.mp4"], best.cascade)
        >>> answers.probabilities.argmax(-1), answers.step
        """
        if not self.has_classifier:
            raise UserError(
                "these weights have no classes of their own, so a cascade has no answer"
            )
        if self.config.multi_label:
            raise UserError(
                "cascades are for one label a video, and these weights have several; choose a "
                "budget: predict(..., tokens=...)"
            )
        several = isinstance(video, Sequence) and not isinstance(video, str)
        videos = cast("Sequence[Video]", video if several else [video])
        if not videos:
            raise ValueError("no video is given")
        sized = [self._sized(one, cascade) for one in videos]
        return CascadePasses(self.params, self.config.model, cascade, sized).answers()

    def _sized(self, video: Video, cascade: Cascade) -> dict[Size, np.ndarray]:
        """A video, or an array of them, on each grid of a cascade: uint8 [B, T, size, size, 3]."""
        sizes = list(dict.fromkeys(step.grid for step in cascade.steps))
        if not isinstance(video, str | os.PathLike):
            return {size: fit(np.asarray(video), *size) for size in sizes}
        try:
            with decoding.Video(video) as opened:
                clips = read_clips(opened, sizes)
        except decoding.DecodeError as error:
            raise UserError(str(error)) from error
        return {size: clip.frames[None] for size, clip in zip(sizes, clips, strict=True)}

    def encode_video(self, video: Video | Sequence[Video], tokens: int | None = None) -> np.ndarray:
        """Unit vectors of videos in the space of texts: float32 [B, D]. For Flux-CLIP.

        Arguments as in `predict`; one video is [1, D]. The product with the vectors of
        `encode_text` is the cosine.

        Raises UserError: the weights have no text encoder, or as `predict`.
        """
        space = self._space()
        pooled = [output.pooled for output in self._outputs(video, tokens)]
        none = np.zeros((0, space.parts.network.out), np.float32)
        vectors = np.concatenate([none, *map(space.vectors_of_pooled, pooled)])
        check_finite(vectors)
        return vectors

    def encode_text(self, texts: str | Sequence[str]) -> np.ndarray:
        """Unit vectors of texts: float32 [T, D]. For Flux-CLIP.

        They are cleaned as in training: lower case, without punctuation. A text of more than 77
        tokens is cut, with a warning.

        Raises UserError if the weights have no text encoder.
        """
        return self._space().vectors_of_texts([texts] if isinstance(texts, str) else list(texts))

    def classify(
        self,
        video: Video | Sequence[Video],
        names: Sequence[str],
        tokens: int | None = None,
        top: int = 5,
        prompts: Sequence[str] | None = None,
    ) -> list[Prediction] | list[list[Prediction]]:
        """The likeliest of classes that have names alone, as `predict` gives them. For Flux-CLIP.

        A probability is the softmax over `names` of the mean cosine with a name's texts, divided
        by the learned temperature.

        Args:
            names: of the classes, such as ["opening a door", "closing a door"].
            prompts: the texts of a name, with {} for it; by default the official 16.

        Raises:
            UserError: the weights have no text encoder, names or prompts that cannot be, or as
                `predict`.
        """
        classes = self._space().classifier(names, prompts)
        found = [
            own
            for output in self._outputs(video, tokens)
            for own in self.likeliest(
                output._replace(logits=classes.logits(output.pooled)), classes.names, top
            )
        ]
        return found if _are_several(video) else found[0]

    @property
    def temperature(self) -> float:
        """By which Flux-CLIP divides cosines. Raises UserError without a text encoder."""
        return self._space().temperature

    def _space(self) -> SharedSpace:
        if self.space is None:
            raise UserError(
                "these weights have no text encoder; texts need weights of Flux-CLIP, which "
                "configs/clip.py trains"
            )
        return self.space

    @functools.cached_property
    def calibration(self) -> dict[str, Any] | None:
        """The newest of `evaluations` that has a temperature for each budget; None without one.

        Its "data" and "dataset" say of which videos the temperatures are.
        """
        for report in reversed(self.evaluations):
            # One of classes that were named by texts is of other logits.
            own = len(report.get("class_names", ())) == self.config.model.classes
            rows = {} if "task" in report else report.get("budgets", {})  # one is "cascade"
            if own and rows and all("calibration" in row for row in rows.values()):
                return report
        return None

    @property
    def temperatures(self) -> dict[int, float]:
        """budget -> the temperature that `calibration` has for it; {} where that is None."""
        rows = self.calibration["budgets"] if self.calibration else {}
        return {int(budget): row["calibration"]["temperature"] for budget, row in rows.items()}

    def temperature_at(self, tokens: int) -> float:
        """The temperature of the budget nearest to so many kept tokens, of those in `temperatures`.

        Raises UserError: there are none, as with several labels a video.
        """
        if self.config.multi_label:
            raise UserError(
                "temperatures are for one label a video, and these weights have several"
            )
        known = list(self.temperatures)
        if not known:
            raise UserError(
                "no evaluation has calibrated these weights, so they have no temperatures: run "
                "--mode=evaluate on their workdir, and name that as the weights"
            )
        return self.temperatures[known[nearest_head(tokens, known)]]

    def likeliest(
        self, output: Output, names: Sequence[str], top: int, temperature: float = 1.0
    ) -> list[list[Prediction]]:
        """The `top` likeliest classes of each clip, likeliest first.

        Their probabilities are the softmax of the logits, divided by `temperature`, or with
        `config.multi_label` the sigmoid of each.

        Raises:
            UserError: the logits are no finite numbers.
            ValueError: `top` is less than 1.
        """
        if top < 1:
            raise ValueError(f"top is 1 or more, not {top}")
        check_finite(output.logits)
        logits = np.asarray(output.logits, np.float64) / temperature
        if self.config.multi_label:
            probabilities = np.exp(-np.logaddexp(0, -logits))
        else:
            odds = np.exp(logits - logits.max(axis=1, keepdims=True))
            probabilities = odds / odds.sum(axis=1, keepdims=True)
        order = np.argsort(-logits, axis=1, kind="stable")[:, :top]
        return [
            [Prediction(names[c], float(row[c])) for c in own]
            for row, own in zip(probabilities, order, strict=True)
        ]

    def select(
        self,
        video: np.ndarray | jax.Array,
        tokens: int | None = None,
        rounding: Rounding | None = None,
        *,
        normalized: bool = False,
    ) -> np.ndarray:
        """Which patches are kept: bool [B, T, H, W]."""
        return np.asarray(self(video, tokens, None, rounding, normalized=normalized).kept)

    def features(
        self,
        video: np.ndarray | jax.Array,
        tokens: int | None = None,
        head: int | None = None,
        rounding: Rounding | None = None,
        *,
        normalized: bool = False,
    ) -> Features:
        """The kept tokens after the last block with their places, and the clips' vectors."""
        answer, mask, _ = self._run(video, tokens, head, rounding, normalized)
        kept = np.asarray(answer.kept.token_index)
        if answer.kept.valid is not None:  # one grid: as many in each clip
            kept = kept[:, : np.asarray(answer.kept.valid)[0].sum()]
        order = np.argsort(kept, axis=1)
        places = np.take_along_axis(kept, order, axis=1)
        tokens_after = np.asarray(answer.tokens.astype(jnp.float32))[:, 1:]
        return Features(
            np.take_along_axis(tokens_after, order[..., None], axis=1),
            np.stack(np.unravel_index(places, mask.shape[1:]), axis=-1).astype(np.int32),
            np.asarray(answer.pooled),
        )

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Writes config.json, model.safetensors (official names), and the network for PyTorch.

        And README.md, a model card with the accuracy, if the weights are of a workdir that has
        evaluated them. And of Flux-CLIP clip.safetensors, with the head, the temperature and the
        text encoder, and the vocabulary of texts.

        Raises UserError if the folder cannot be written, or is the workdir of a run.
        """
        state = official_names.to_official(jax.tree.map(np.asarray, self.params))
        found = weight_files.Pretrained(state, self.config, evaluations=self.evaluations)
        weight_files.write(found, folder)
        if self.space:
            parts = jax.tree.map(np.asarray, (self.space.parts.head, self.space.parts.text_encoder))
            clip_parts.write(
                self.space.parts._replace(head=parts[0], text_encoder=parts[1]), Path(folder)
            )

    def _run(
        self,
        video: np.ndarray | jax.Array,
        tokens: int | None,
        head: int | None,
        rounding: Rounding | None,
        normalized: bool,
    ) -> tuple[ModelOutput, jax.Array, int]:
        """The answer, which patches were kept, bool [B, T, H, W], and the head."""
        patches, grid = as_patches(video, normalized)
        model = self.config.model
        if rounding not in (None, "exact", "official"):
            raise ValueError(f"rounding is 'exact' or 'official', not {rounding!r}")
        if tokens is not None and tokens < 1 + (model.cls == "inside"):
            raise ValueError(f"a budget of {tokens} tokens leaves no patch")
        everything = grid.tokens + (model.cls == "inside")
        budget = everything if tokens is None else min(tokens, everything)
        if model.selector == "none" and budget < everything:
            raise ValueError(f"this network selects nothing: {grid.tokens} patches are too many")
        if head is None:
            head = nearest_head(tokens or grid.tokens, self.config.head_budgets)
        if not 0 <= head < model.budgets:
            raise ValueError(f"there are heads 0 to {model.budgets - 1}, no head {head}")
        if rounding is not None:
            model = replace(model, rounding=rounding)
        return *_compiled(self.params, patches, model, grid, budget, head), head


def _are_several(video: Video | Sequence[Video]) -> bool:
    """Whether answers come as a list: of a list of videos, or of an array of them."""
    if isinstance(video, str | os.PathLike):
        return False
    return isinstance(video, Sequence) or np.ndim(video) == 5


def as_patches(video: np.ndarray | jax.Array, normalized: bool = False) -> tuple[np.ndarray, Grid]:
    """A video, as `PretrainedModel` takes it, as patches [B, P, 588] and their grid.

    Raises ValueError for another shape, kind or range of numbers.
    """
    video = np.asarray(video)
    if video.ndim == 4:
        video = video[None]
    if video.ndim != 5 or video.shape[-1] != 3 or 0 in video.shape:
        raise ValueError(f"a video is [T, height, width, 3] or [B, T, ...], not {video.shape}")
    _check_values(video, normalized)
    if normalized:
        video = video.astype(np.float32)
    sides = [max(1, round(side / PATCH)) * PATCH for side in video.shape[2:4]]
    if list(video.shape[2:4]) != sides:
        video = np.stack([[cv2.resize(frame, sides[::-1]) for frame in clip] for clip in video])
    return np.stack([patchify(clip) for clip in video]), Grid(
        video.shape[1], sides[0] // PATCH, sides[1] // PATCH
    )


def _check_values(video: np.ndarray, normalized: bool) -> None:
    """Raises ValueError unless a video is uint8, or normalized floats and said to be so.

    A network answers frames of 0..1 or 0..255 with confident nonsense, so nothing is guessed.
    """
    if video.dtype == np.uint8:
        if normalized:
            raise ValueError("normalized=True is for floats, and these frames are uint8 pixels")
        return
    if not jnp.issubdtype(video.dtype, jnp.floating):
        raise ValueError(f"pixels are uint8, not {video.dtype}")
    low, high = float(video.min()), float(video.max())
    found = f"frames are {video.dtype} from {low:.4g} to {high:.4g}"
    if not normalized:
        raise ValueError(
            f"{found}: pass uint8 pixels (0 to 255), or, only if they are (pixels / 255 - mean) / "
            "std by ImageNet already, normalized=True"
        )
    # Normalized pixels lie in -2.12..2.64; resampling and noise may go a little beyond.
    if not -4 <= low <= high <= 4 or 0 <= low <= high <= 1:
        raise ValueError(
            f"{found}, which is not (pixels / 255 - mean) / std by ImageNet, about -2.1 to 2.6: "
            "pass uint8 pixels (0 to 255) without normalized=True"
        )


def forward(
    params: dict, patches: jax.Array, model: FluxViTConfig, grid: Grid, budget: int, head: int
) -> tuple[ModelOutput, jax.Array]:
    """The answer to clips on one grid, and which of their patches were kept, bool [B, P].

    patches: [B, P, 588], uint8 or normalised.
    """
    if patches.dtype == jnp.uint8:
        patches = fluxvit.normalize(patches)
    # Selectors that draw their scores draw the same ones in every call.
    key = jax.random.key(0) if model.selector in NOISY_SELECTORS else None

    def run(**changes: Any) -> Callable[[dict, jax.Array], ModelOutput]:
        graph = fluxvit.graphdef(replace(model, **changes))
        return lambda params, patches: fluxvit.from_params(graph, params).on_grid(
            patches, grid, budget, head, key
        )

    answer = fluxvit.on_platform(
        lambda network, patches: network.on_grid(patches, grid, budget, head, key),
        params,
        model,
        patches.astype(model.dtype),
    )
    return answer, token_selection.mask(answer.kept, grid.tokens)


@functools.partial(jax.jit, static_argnames=("model", "grid", "budget", "head"))
def _compiled(
    params: dict, patches: jax.Array, model: FluxViTConfig, grid: Grid, budget: int, head: int
) -> tuple[ModelOutput, jax.Array]:
    answer, kept = forward(params, patches, model, grid, budget, head)
    return answer, kept.reshape(-1, *grid)
