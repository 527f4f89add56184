"""Runs what `--mode=export` wrote. Of all that this package needs, it needs JAX and NumPy only."""

import contextlib
import json
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, overload

import jax
import jax.export
import numpy as np

from fluxvit_jax.adaptive.cascade import Answers, Cascade
from fluxvit_jax.adaptive.planner import CascadePlan, choose
from fluxvit_jax.data import captions
from fluxvit_jax.data.patches import patchify
from fluxvit_jax.deploy.resize import fit
from fluxvit_jax.distributed import atomic, checksums, storage
from fluxvit_jax.distributed.compilation_cache import keep_programs_by_default
from fluxvit_jax.distributed.devices import device_name
from fluxvit_jax.errors import UserError
from fluxvit_jax.evaluation.finite import check_finite
from fluxvit_jax.grids import PATCH
from fluxvit_jax.token_optimization import planner
from fluxvit_jax.token_optimization.planner import Limit

MANIFEST = "manifest.json"
WEIGHTS = "weights.npz"
LATENCY = "latency.json"  # {device: {budget or cell: milliseconds}}, by servers that may write
VERSION = 1  # of the folder's layout
TIMED = 10  # calls of a program, after a first one


class ExportedOutput(NamedTuple):
    """logits: float32 [B, classes]; pooled: float32 [B, pool_width]; kept: bool [B, T, H, W]."""

    logits: jax.Array
    pooled: jax.Array
    kept: jax.Array


class ExportedModel:
    """An exported network; its programs are loaded when they are first asked for.

    Attributes:
        manifest: what the folder says of itself.
        budgets: the token budgets it can be asked at, largest first.
        classes: names of the classes, as far as they are known.
    """

    def __init__(self, folder: str | os.PathLike):
        """Raises ValueError if a file is missing, damaged, or of a later version."""
        self._folder = Path(folder)
        self.manifest = self._read_manifest()
        self.budgets = sorted(map(int, self.manifest["budgets"]), reverse=True)
        self.classes = tuple(self.manifest["classes"])
        weights = self.manifest["weights"]
        path = self._checked(weights["file"], weights["sha256"])
        with np.load(path) as arrays:
            self._params = {name: jax.device_put(array) for name, array in arrays.items()}
        self._programs: dict[str, Any] = {}
        self._milliseconds: dict[str, float] = {}
        self._space_params: dict[str, dict[str, jax.Array]] = {}

    @overload
    def __call__(
        self, video: np.ndarray, *, average_milliseconds: float, milliseconds: float | None = ...
    ) -> Answers: ...
    @overload
    def __call__(
        self, video: np.ndarray, *, average_gflops: float, milliseconds: float | None = ...
    ) -> Answers: ...
    @overload
    def __call__(
        self, video: np.ndarray, tokens: int | None = ..., milliseconds: float | None = ...
    ) -> ExportedOutput: ...
    def __call__(
        self,
        video: np.ndarray,
        tokens: int | None = None,
        milliseconds: float | None = None,
        *,
        average_milliseconds: float | None = None,
        average_gflops: float | None = None,
    ) -> ExportedOutput | Answers:
        """Class scores and vectors of clips at a token budget, or the answers of a cascade.

        Args:
            video: uint8 pixels, RGB, [T, height, width, 3] or [B, T, ...]. Where they are not of
                the budget's grid, frames are taken evenly, the short side is scaled and the middle
                square cut out.
            tokens: one of `budgets`; the largest by default.
            milliseconds: instead of `tokens`: the budget is then that of `budget_within`.
            average_milliseconds: instead of both: the clips are asked by the cascade of
                `cascade_within`, at more tokens only if in doubt; `milliseconds` beside it limits
                the worst case.
            average_gflops: likewise, 1e9 multiply-accumulates.

        Raises ValueError for a video, budget or limit that cannot be.
        """
        averages = {
            "average_milliseconds": average_milliseconds,
            "average_gflops": average_gflops,
        }
        given = {kind: value for kind, value in averages.items() if value is not None}
        if given:
            if tokens is not None or len(given) > 1:
                raise ValueError("tokens and average limits each choose programs; give one")
            worst = {} if milliseconds is None else {"milliseconds": milliseconds}
            return self.run_cascade(video, self.cascade_within(**given, **worst).cascade)
        if tokens is not None and milliseconds is not None:
            raise ValueError("tokens and milliseconds both choose a program; give one of them")
        if milliseconds is not None:
            tokens = self.budget_within(milliseconds)
        budget = self.budgets[0] if tokens is None else tokens
        if budget not in self.budgets:
            raise ValueError(f"there is no program for {budget} tokens, but for {self.budgets}")
        own = self.manifest["budgets"][str(budget)]
        clips = fit(video, own["frames"], own["resolution"])
        patches = np.stack([patchify(clip) for clip in clips])
        logits, pooled, kept = self._program(budget)(self._params, patches)
        side = own["resolution"] // PATCH
        return ExportedOutput(logits, pooled, kept.reshape(-1, own["frames"], side, side))

    def run_cascade(self, video: np.ndarray, cascade: Cascade) -> Answers:
        """The answers of a cascade to clips; video: as in a call of the model.

        A step's program runs on the next power of two of clips, so that it compiles for few sizes.

        Raises ValueError for a video that cannot be, or a cascade of other programs, and UserError
        for answers that are no finite numbers.
        """
        programs = self.manifest.get("cascades", {}).get("programs", {})
        if missing := [step.cell for step in cascade.steps if step.cell not in programs]:
            raise ValueError(f"{self._folder}: has no program for {missing[0]!r}")
        fitted = {step.grid: fit(video, *step.grid) for step in cascade.steps}

        def ask(number: int, clips: np.ndarray) -> np.ndarray:
            step = cascade.steps[number]
            own = programs[step.cell]
            rows = np.resize(clips, 1 << (len(clips) - 1).bit_length())
            patches = np.stack([patchify(clip) for clip in fitted[step.grid][rows]])
            logits, *_ = self._loaded(own["program"], own["sha256"])(self._params, patches)
            check_finite(logits)
            return np.asarray(jax.nn.softmax(logits))[: len(clips)]

        return cascade.run(len(next(iter(fitted.values()))), ask)

    def cascade_within(self, **limits: float) -> CascadePlan:
        """The most accurate cascade of the search within limits, as `fluxvit_jax.plan` finds it.

        Args:
            limits: average_milliseconds or average_gflops, and of the worst case milliseconds and
                gflops. Times are those of a clip alone on this device, measured once if the
                manifest has none.

        Raises ValueError: the manifest knows no cascades, or none is within the limits.
        """
        report = self.manifest.get("cascades")
        if not report or not report["cascades"]:
            raise ValueError(
                f"{self._folder}: has no cascades; run --mode=search and export again, or choose "
                "by tokens"
            )
        device = None
        if any("milliseconds" in kind for kind in limits):
            device = device_name()
            cells = report["programs"]
            exported = {
                name: own["milliseconds"]
                for name, own in report["devices"].get(device, {"cells": {}})["cells"].items()
            }
            times = self._times(cells, exported)
            timed = {"cells": {name: {"milliseconds": own} for name, own in times.items()}}
            report = report | {"devices": {device: timed}}
        limited = [Limit(kind, value) for kind, value in limits.items()]
        try:
            return choose(report, limited, device, views=False)
        except UserError as error:
            raise ValueError(f"{self._folder}: {error}") from error

    def budget_within(self, milliseconds: float) -> int:
        """The budget whose program is the most accurate of those that answer in time.

        By the accuracy on the videos that a search chose on, and the median time of one clip alone
        on this device, the network only. Where the manifest has no timings of the device, each
        program is timed, once: what is found is kept in this object, and in the folder where that
        is allowed.

        Raises ValueError: the manifest knows no accuracies, or no program is fast enough.
        """
        programs = self.manifest.get("plan", {}).get("programs")
        if not programs:
            raise ValueError(
                f"{self._folder}: how accurate its programs are is not known; run --mode=search "
                "and export again, or choose by tokens"
            )
        known = self.manifest["plan"]["devices"].get(device_name(), {})
        exported = {budget: timings["milliseconds"] for budget, timings in known.items()}
        times = self._times(programs, exported)
        best = planner.best_within(programs, times, milliseconds)
        if best is None:
            cheapest = min(times, key=lambda budget: times[budget])
            raise ValueError(
                f"no program answers within {milliseconds:.4g} ms; the fastest, that of {cheapest} "
                f"tokens, takes {times[cheapest]:.4g} ms"
            )
        return int(best)

    def _times(self, names: Iterable[str], exported: Mapping[str, float]) -> dict[str, float]:
        """Milliseconds of one clip on this device by budget or cell, measured if not known.

        exported: those that the manifest has.
        """
        names, device = list(names), device_name()
        for times in (self._milliseconds, exported, self._read_latency().get(device, {})):
            if all(name in times for name in names):
                self._milliseconds |= {name: times[name] for name in names}
                return {name: times[name] for name in names}
        self._milliseconds |= {name: self._time(name) for name in names}
        self._keep_latency(device)
        return {name: self._milliseconds[name] for name in names}

    def _time(self, name: str) -> float:
        """Milliseconds of a program's call on one clip: the median of those after the first."""
        own = self._described(name)
        shape = (own["frames"], own["resolution"], own["resolution"], 3)
        # Random by seed: patches that are equal would all score alike.
        clip = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
        patches, taken = jax.device_put(patchify(clip)[None]), []
        program = self._loaded(own["program"], own["sha256"])
        for _ in range(1 + TIMED):
            begin = time.perf_counter()
            jax.block_until_ready(program(self._params, patches))
            taken.append(time.perf_counter() - begin)
        return 1000 * statistics.median(taken[1:])

    def _described(self, name: str) -> dict[str, Any]:
        """What the manifest says of the program of a budget, or of a cell of cascades."""
        budgets = self.manifest["budgets"]
        return budgets[name] if name in budgets else self.manifest["cascades"]["programs"][name]

    def _read_latency(self) -> dict[str, dict[str, float]]:
        """What servers have measured before; nothing where the file is missing or damaged."""
        try:
            found = storage.parse_json((self._folder / LATENCY).read_text())
            return {
                device: {budget: float(one) for budget, one in times.items()}
                for device, times in found.items()
            }
        except (OSError, ValueError, AttributeError, TypeError):
            return {}

    def _keep_latency(self, device: str) -> None:
        latency = self._read_latency()
        known = latency | {device: latency.get(device, {}) | self._milliseconds}
        # A folder that only others may write serves as well; then each process measures.
        with contextlib.suppress(OSError):
            atomic.write(self._folder / LATENCY, json.dumps(known, indent=1) + "\n")

    def encode_video(
        self, video: np.ndarray, tokens: int | None = None, milliseconds: float | None = None
    ) -> np.ndarray:
        """Unit vectors of clips in the space of texts: float32 [B, D]. For Flux-CLIP.

        Arguments as in a call of the model. Raises ValueError likewise, or if the weights had no
        text encoder.
        """
        params, space = self._space()
        pooled = self(video, tokens, milliseconds).pooled
        return np.asarray(self._loaded(**space["head"])(params["head"], pooled))

    def encode_text(self, texts: str | Sequence[str]) -> np.ndarray:
        """Unit vectors of texts: float32 [T, D]. For Flux-CLIP; it needs the extra `clip`.

        They are cleaned as in training; those of more than 77 tokens are cut, with a warning.
        Raises ValueError if the weights had no text encoder.
        """
        params, space = self._space()
        texts = [texts] if isinstance(texts, str) else list(texts)
        if not texts:
            return np.zeros((0, space["width"]), np.float32)
        ids = captions.tokenize_cleaned(texts)
        return np.asarray(self._loaded(**space["text"])(params["text"], ids))

    @property
    def temperature(self) -> float:
        """By which Flux-CLIP divides cosines. Raises ValueError without a text encoder."""
        return self._space()[1]["temperature"]

    def _space(self) -> tuple[dict[str, dict[str, jax.Array]], dict[str, Any]]:
        """The parameters of head and text encoder, and what the manifest says of them."""
        space = self.manifest.get("space")
        if space is None:
            raise ValueError(f"{self._folder}: was exported from weights without a text encoder")
        if not self._space_params:
            path = self._checked(space["weights"]["file"], space["weights"]["sha256"])
            with np.load(path) as arrays:
                for name, array in arrays.items():
                    part, _, rest = name.partition(".")
                    self._space_params.setdefault(part, {})[rest] = jax.device_put(array)
        return self._space_params, space

    def _program(self, budget: int) -> Callable:
        """The program of a budget."""
        own = self.manifest["budgets"][str(budget)]
        return self._loaded(own["program"], own["sha256"])

    def _loaded(self, file: str, sha256: str) -> Callable:
        """A program of the folder, loaded once. Raises ValueError if it is damaged."""
        if file not in self._programs:
            program = self._checked(file, sha256).read_bytes()
            self._programs[file] = jax.jit(jax.export.deserialize(bytearray(program)).call)
        return self._programs[file]

    def _read_manifest(self) -> dict[str, Any]:
        path = self._folder / MANIFEST
        try:
            manifest = storage.parse_json(path.read_text())
            version = manifest["version"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: is no manifest of an exported network: {error}") from error
        if version != VERSION:
            raise ValueError(f"{path}: is of version {version}, and this reads version {VERSION}")
        content, matches = checksums.take_checksum(manifest)
        if checksums.KEY in manifest and not matches:  # earlier versions wrote none
            raise ValueError(f"{path}: its checksum differs from its content's; export again")
        return content

    def _checked(self, name: str, checksum: str) -> Path:
        """The path of a file of the folder, after comparing its checksum."""
        path = self._folder / Path(name).name
        try:
            found = checksums.sha256(path)
        except OSError as error:
            raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
        if found != checksum:
            raise ValueError(f"{path}: its checksum differs from the manifest's; export again")
        return path


def load_exported(folder: str | os.PathLike) -> ExportedModel:
    """The network that `--mode=export` wrote into a folder.

    Raises ValueError if a file is missing, damaged, or of a later version.

    Examples:
        >>> model = fluxvit_jax.load_exported("exported")
        >>> out = model(video, tokens=1024)
        >>> out = model(video, milliseconds=8)  # of weights that were searched
    """
    keep_programs_by_default()
    return ExportedModel(folder)
