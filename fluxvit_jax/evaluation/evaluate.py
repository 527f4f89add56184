"""Accuracy at every token budget: `--mode=evaluate`, and validation during training.

Every video counts once, for any batch size and number of devices or hosts. Its views (temporal
clips x spatial crops) go through the network one view of a batch at a time, so that
`eval.batch_size` clips are on the devices at once. Probabilities are averaged over the views. A
video that cannot be read is listed with its reason and counts as wrong; if no video can be read,
evaluation fails. With `train.multi_label` the probabilities are sigmoids, and the measure is mAP.
"""

import contextlib
import functools
import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh
from jax.stages import Wrapped
from ml_collections import ConfigDict
from tqdm import tqdm

from fluxvit_jax.checkpoints import checkpointer
from fluxvit_jax.config.fields import ADDED, FIELDS, flatten
from fluxvit_jax.config.network import model_config
from fluxvit_jax.config.variants import NO_CLASSES
from fluxvit_jax.data.annotations import Record, Source
from fluxvit_jax.data.class_names import KnownNames, numbered
from fluxvit_jax.data.multi_label import label_array
from fluxvit_jax.data.pipeline import evaluation_batches
from fluxvit_jax.data.reading import reasons_unreadable
from fluxvit_jax.data.splits import (
    check_same_videos,
    common_class_names,
    configured_class_names,
    configured_names,
    open_compared,
)
from fluxvit_jax.data.supervised_workers import Quarantine
from fluxvit_jax.data.views import views_of
from fluxvit_jax.distributed import atomic, lifelines, partition_rules, storage
from fluxvit_jax.distributed.hosts import compute_on_host0, raise_on_all_hosts
from fluxvit_jax.distributed.mesh import (
    batch_sharding,
    compiler_options,
    device_put_global,
    gather,
    host_count,
    host_index,
    local_row_indices,
    local_rows,
    make_mesh,
    platform_of,
    replicated,
    round_up_to_shards,
    say,
    shard_batch,
    sum_over_hosts,
    traced_on_mesh,
)
from fluxvit_jax.distributed.watchdog import Watchdog
from fluxvit_jax.errors import UserError
from fluxvit_jax.evaluation import average_precision, calibration, zero_shot
from fluxvit_jax.evaluation.results import SUFFIX, TOP
from fluxvit_jax.grids import PATCH, Grid, kept_tokens, nearest_head
from fluxvit_jax.models import fluxvit
from fluxvit_jax.models.fluxvit import FluxViT, FluxViTConfig, ModelOutput
from fluxvit_jax.models.token_selection import NOISY_SELECTORS
from fluxvit_jax.token_optimization import planner
from fluxvit_jax.training import init_from
from fluxvit_jax.training.train_state import abstract_params, check_params_divide

FOLDER = "evaluation"
DIGITS = 6  # of the stored probabilities
NAME_LENGTH = 40  # letters of the data's name in the name of a report
MAX_PROGRAMS = 2048  # compiled programs kept; a search with the default lattice has 540 candidates


class Setting(NamedTuple):
    """Setting of an evaluation: token budget, grid that the tokens are selected from, and head."""

    budget: int
    grid: Grid
    head: int


class Evaluation(NamedTuple):
    """Results of an evaluation.

    report: {"dataset", "views", "budgets", "failures", "warning"}, as in a workdir's
        `evaluation/*.json`; "top1" and "top5" are shares of all videos, including failed ones;
        "loss" is the mean cross-entropy of those that were read, and "calibration", if it was asked
        for, what `calibration.measure` finds of these;
        "warning" is None unless more videos failed than `data.max_bad_fraction`. With several
        labels a video there is "multi_label": true, and in place of "top1" and "top5" are "map" and
        "ap", of each class or None; "videos_of_class" counts them.
    predictions: one dict per video, {"id", "label", "predictions": {budget: [[class, probability],
        ...]}}, likeliest first; {"id", "label", "failure"} for a video that could not be read; with
        several labels a video, "labels": [...] in place of "label".
    classes: number of classes. Among few of them a top-5 says nothing: people are not told it.
    """

    report: dict[str, Any]
    predictions: list[dict[str, Any]]
    classes: int

    @property
    def multi_label(self) -> bool:
        return self.report.get("multi_label", False)

    def scalars(self) -> dict[str, float]:
        """{"top1_1024": .., "top5_1024": .., "loss_1024": .., ..., "failed": ..}: the metrics.

        With several labels a video "map_1024" is in place of "top1_1024" and "top5_1024".
        """
        kinds = ("map", "loss") if self.multi_label else ("top1", "top5", "loss")
        budgets = self.report["budgets"].items()
        scalars = {f"{kind}_{budget}": row[kind] for budget, row in budgets for kind in kinds}
        return scalars | {"failed": len(self.report["failures"])}

    def told(self) -> dict[str, float]:
        """The scalars that people are told."""
        few = self.classes <= TOP
        return {k: x for k, x in self.scalars().items() if not (few and k.startswith("top5"))}

    def table(self) -> str:
        """A table with one line per budget."""
        measures = {"top1": "top-1", "top5": "top-5"}
        if self.multi_label:
            measures = {"map": "mAP"}
        elif self.classes <= TOP:
            del measures["top5"]
        rows = self.report["budgets"]
        if all("calibration" in row for row in rows.values()):
            measures["ece"] = "ECE"
        heads = "".join(f"  {name:>6}" for name in measures.values())
        lines = [f"budget  frames  resolution  tokens  head{heads}"]
        for budget, row in rows.items():
            shares = row | {"ece": row.get("calibration", {}).get("ece")}
            lines.append(
                f"{budget:>6}  {row['frames']:>6}  {row['resolution']:>7} px  {row['tokens']:>6}  "
                f"{row['head']:>4}" + "".join(f"  {shares[measure]:>6.2%}" for measure in measures)
            )
        return "\n".join(lines)


class NothingReadableError(UserError):
    """No video of a data set can be read, so that an accuracy of 0 % would be meaningless.

    All hosts of a run raise it together.
    """

    def __init__(self, data: str, videos: int, first: Record, reason: str):
        where = ""
        if isinstance(first.video, str):
            root = first.video.removesuffix(first.id).rstrip("/")
            where = f"; they were looked for in {root}, see config.data.root" if root else ""
        super().__init__(
            f"{data}: not one of {videos} videos can be read; {first.id}: {reason}{where}"
        )


def check_readable(source: Source, data: str, config: ConfigDict) -> None:
    """Raises `NothingReadableError` unless some video can be read; the first such ends the check.

    data: name of the videos for the message.
    """
    first = ""
    reasons = reasons_unreadable(source, config.data.workers, config.data.clip_seconds)
    with contextlib.closing(reasons):
        for reason in reasons:
            if not reason:
                return
            first = first or reason
    if first:
        raise NothingReadableError(data, len(source), source[0], first)


def describe_failures(failed: int, videos: int, first: str) -> str:
    """Message with the number of unreadable videos and the first one's "ID: REASON"."""
    return f"{failed} of {videos} videos could not be read and count as wrong; {first}"


def warn_of_failures(config: ConfigDict, failed: int, videos: int, first: str) -> str | None:
    """Warning if more than `data.max_bad_fraction` of the videos failed; else None."""
    share = config.data.max_bad_fraction
    if failed <= share * videos:
        return None
    more = f"; that is more than data.max_bad_fraction={share}"
    return describe_failures(failed, videos, first) + more


def settings_of(config: ConfigDict) -> list[Setting]:
    """`eval.settings`, each with the head trained at the nearest budget."""
    return [
        Setting(budget, Grid.square(*size), nearest_head(budget, config.train.budgets))
        for budget, *size in config.eval.settings
    ]


def evaluate(
    params: dict,
    config: ConfigDict,
    source: Source,
    mesh: Mesh | None = None,
    stop: Callable[[], bool] = lambda: False,
    settings: Sequence[Setting] = (),
    quarantine: Quarantine | None = None,
    after_batch: Callable[[], None] = lambda: None,
    measure_calibration: bool = False,
) -> Evaluation | None:
    """Accuracy of `params` on the videos of `source`.

    Args:
        params: the network's parameters, on the devices or as numpy arrays.
        mesh: the devices; all of them by default.
        settings: of different budgets; by default those of `eval.settings`.
        stop: called before each batch, by all hosts, and on a single host while waiting for one;
            once it returns True, evaluation ends and returns None. With several hosts it is True
            once `lifelines.stop_status` is not 0 on any of them.
        quarantine: see `pipeline.evaluation_batches`.
        after_batch: called after each batch.
        measure_calibration: of one label a video. It keeps all probabilities in memory, on each
            host those of its own videos.

    Raises:
        UserError: there are no videos, none can be read, or too little shared memory.
    """
    if not len(source):
        raise UserError("config.data.validation: there are no videos to evaluate on")
    mesh = mesh or make_mesh(config)
    settings = settings or settings_of(config)
    answers = _Answers(params, config, settings, mesh, measure_calibration)
    if not for_each_batch(
        answers.take, config, source, settings, mesh, stop, quarantine, after_batch, "evaluating"
    ):
        return None
    videos = answers.of_all_hosts()
    check_some_readable(config, source, videos)
    report = _report(config, source, settings, videos)
    if answers.kept is not None:
        measured = calibrations(answers.kept, videos)
        for row, calibrated in zip(report["budgets"].values(), measured, strict=True):
            row["calibration"] = calibrated
    return Evaluation(report, _predictions(settings, videos), config.model.classes)


class _Answers:
    """What the network says of this host's videos at each setting.

    Attributes:
        kept: all probabilities, if they are kept, else None.
    """

    def __init__(
        self,
        params: dict,
        config: ConfigDict,
        settings: Sequence[Setting],
        mesh: Mesh,
        keep: bool,
    ):
        """Arguments as in `evaluate`. keep: whether to keep all probabilities."""
        params = fluxvit.network_params(params) | zero_shot.classifier_in(params)
        shardings = partition_rules.shardings(params, mesh, zero_shot.RULES)
        self._params = device_put_global(params, shardings)
        self._mesh = mesh
        self._multi_label = config.train.multi_label
        model = model_config(config, platform_of(mesh))
        self._programs = [
            predictor(model, setting, config.seed, mesh, multi_label=self._multi_label)
            for setting in settings
        ]
        self._videos: list[dict[str, Any]] = []
        self.kept = Kept([], [[] for _ in settings]) if keep else None

    def take(self, batch: dict[str, np.ndarray]) -> None:
        """Adds the videos of a batch of `pipeline.evaluation_batches`."""
        video = batch["video"]
        found = [
            own
            for k, program in enumerate(self._programs)
            for own in probabilities(
                [program], self._params, video, batch[f"patches{k}"], self._mesh
            )
        ]
        if self.kept is not None:
            self.kept.add(batch, found)
        tops = [likeliest(own) for own in found]
        loss_of = _binary_cross_entropy if self._multi_label else cross_entropy
        losses = [loss_of(own, batch["label"]) for own in found]
        self._videos.extend(
            {
                "number": int(number),
                "host": host_index(),
                "id": str(batch["id"][row]),
                "label": _label(batch["label"][row]),
                "failure": str(batch["failure"][row]),
                "top": [top[row] for top in tops],
                "loss": [loss[row] for loss in losses],
                "probabilities": [own[row].tolist() for own in found] if self._multi_label else [],
            }
            for row, number in enumerate(video)
            if number >= 0
        )

    def of_all_hosts(self) -> list[dict[str, Any]]:
        """The videos in the order of their numbers. All hosts call it."""
        return by_number(self._videos)


def check_some_readable(
    config: ConfigDict, source: Source, videos: Sequence[dict[str, Any]]
) -> None:
    """Raises NothingReadableError if no video could be read. videos: as `by_number` has them."""
    if all(video["failure"] for video in videos):
        raise NothingReadableError(
            config.data.validation, len(source), source[0], videos[0]["failure"]
        )


def by_number(videos: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The videos of all hosts in the order of their "number". All hosts call it."""
    # Hosts whose devices share clips have evaluated the same videos.
    found = {video["number"]: video for video in gather(list(videos))}
    return [found[number] for number in sorted(found)]


def for_each_batch(
    take: Callable[[dict[str, np.ndarray]], None],
    config: ConfigDict,
    source: Source,
    settings: Sequence[Setting],
    mesh: Mesh,
    stop: Callable[[], bool],
    quarantine: Quarantine | None,
    after_batch: Callable[[], None],
    words: str,
) -> bool:
    """Gives `take` this host's part of every evaluation batch; False if `stop` ended it.

    Arguments as in `evaluate`; words: before the progress bar.
    """
    batch_size = round_up_to_shards(config.eval.batch_size, mesh)
    batches = evaluation_batches(
        config,
        source,
        [setting.grid for setting in settings],
        batch_size=batch_size,
        rows=local_row_indices(mesh, batch_size).tolist(),
        quarantine=quarantine,
    )
    # A host that has heard of a signal waits no longer for its batch. Then hosts call `stop`
    # together, before any of them computes what takes all of them.
    stop_waiting = stop if host_count() == 1 else (lambda: lifelines.stop_status() != 0)
    with batches, progress_bar(len(source), desc=words, unit="video") as bar:
        with contextlib.suppress(StopIteration):
            while True:
                batch = batches.next_unless(stop_waiting)
                if stop():
                    return False
                assert batch is not None  # else `stop` would have known
                take(batch)
                bar.update(min(batch_size, len(source) - bar.n))
                after_batch()
        return True


@functools.lru_cache(MAX_PROGRAMS)
def predictor(
    model: FluxViTConfig, setting: Setting, seed: int, mesh: Mesh, *, multi_label: bool
) -> Wrapped:
    """The jitted program of a setting, which adds a view's probabilities to a running total.

    `add_view(params, total [b, classes], patches uint8 [b, P, 588], video int32 [b], view int32)`,
    with the arrays of a batch split over the devices. Random selectors depend on seed, video and
    view only.

    multi_label: whether the probabilities of the classes are independent.
    """

    return view_program(probabilities_of(model, multi_label), model, setting, seed, mesh)


def probabilities_of(
    model: FluxViTConfig, multi_label: bool
) -> Callable[[dict, ModelOutput], jax.Array]:
    """The `answer` of a classifier, the network's own or that of texts, for `view_program`."""

    def answer(params: dict, output: ModelOutput) -> jax.Array:
        logits = output.logits
        if zero_shot.CLASSIFIER in params:
            logits = zero_shot.logits(params[zero_shot.CLASSIFIER], output.pooled, model.dtype)
        return (jax.nn.sigmoid if multi_label else jax.nn.softmax)(logits)

    return answer


def view_program(
    answer: Callable[[dict, ModelOutput], jax.Array],
    model: FluxViTConfig,
    setting: Setting,
    seed: int,
    mesh: Mesh,
) -> Wrapped:
    """The jitted program that adds what `answer` makes of a view to a running total [b, ...].

    Arguments as in `predictor`. answer: (params, output) -> [b, ...].
    """

    def add_view(
        params: dict, total: jax.Array, patches: jax.Array, video: jax.Array, view: jax.Array
    ) -> jax.Array:
        network, patches, keys = on_view(params, patches, video, view, model, seed)
        output = network.on_grid(patches, setting.grid, setting.budget, setting.head, keys)
        return total + answer(params, output)

    by_clip = batch_sharding(mesh)
    return jax.jit(
        traced_on_mesh(add_view, mesh),
        # None: parameters keep their sharding.
        in_shardings=(None, by_clip, by_clip, by_clip, replicated(mesh)),
        out_shardings=by_clip,
        compiler_options=compiler_options(mesh),
    )


def on_view(
    params: dict,
    patches: jax.Array,
    video: jax.Array,
    view: jax.Array,
    model: FluxViTConfig,
    seed: int,
) -> tuple[FluxViT, jax.Array, jax.Array | None]:
    """What a program of a view begins with: the network, normalized patches, keys of the clips.

    Arguments as of the programs of `predictor`; keys: of selectors with random scores, else None.
    """
    network = fluxvit.prepare_params(fluxvit.network_params(params), model)
    keys = None
    if model.selector in NOISY_SELECTORS:
        view_key = jax.random.fold_in(jax.random.key(seed), view)
        keys = jax.vmap(lambda number: jax.random.fold_in(view_key, number))(video)
    return (
        fluxvit.from_params(fluxvit.graphdef(model), network),
        fluxvit.normalize(patches, jnp.dtype(model.dtype)),
        keys,
    )


def probabilities(
    programs: Sequence[Callable],
    params: dict,
    video: np.ndarray,
    patches: np.ndarray,
    mesh: Mesh,
) -> list[np.ndarray]:
    """The probabilities of all classes, means over the views, for each program: [b, classes].

    programs: of settings of one grid, from `predictor`; video: int [b], numbers of the videos;
    patches: uint8 [b, V, P, 588], of the host's rows (`mesh.local_row_indices`).
    """
    return mean_over_views(programs, params, class_count(params), video, patches, mesh)


def class_count(params: dict) -> int:
    """Classes of the classifier, which may be made of texts."""
    if zero_shot.CLASSIFIER in params:
        return len(params[zero_shot.CLASSIFIER]["classes"])
    return params["heads"]["bias"].shape[-1]


def mean_over_views(
    programs: Sequence[Callable],
    params: dict,
    width: int,
    video: np.ndarray,
    patches: np.ndarray,
    mesh: Mesh,
) -> list[np.ndarray]:
    """Means over the views of what each of `view_program`s makes: [b, width].

    Arguments as in `probabilities`.
    """
    found = means_after(programs, params, width, video, patches, mesh, [patches.shape[1]])
    return [mean for (mean,) in found]


def means_after(
    programs: Sequence[Callable],
    params: dict,
    width: int,
    video: np.ndarray,
    patches: np.ndarray,
    mesh: Mesh,
    counts: Sequence[int],
) -> list[list[np.ndarray]]:
    """For each program, the means over the first views, as many as each of `counts`: [b, width].

    counts: ascending; no view after the last is run. Other arguments as in `mean_over_views`.
    """
    start = {"total": np.zeros((len(video), width), np.float32), "video": video.astype(np.int32)}
    sharded = shard_batch(start, mesh)
    totals = previous = [sharded["total"]] * len(programs)
    means: list[list[np.ndarray]] = [[] for _ in programs]
    for view in range(counts[-1]):
        part = shard_batch({"patches": patches[:, view]}, mesh)["patches"]
        jax.block_until_ready(previous)  # at most two views on the devices
        previous = totals
        totals = [
            program(params, total, part, sharded["video"], np.int32(view))
            for program, total in zip(programs, totals, strict=True)
        ]
        if view + 1 in counts:
            for own, total in zip(means, totals, strict=True):
                own.append(local_rows(total) / (view + 1))
    return means


def cross_entropy(probabilities: np.ndarray, labels: np.ndarray) -> list[float]:
    """The loss of each row of [b, classes], without label smoothing; finite for probability 0."""
    own = np.take_along_axis(probabilities, labels[:, None], axis=1)[:, 0]
    return [float(loss) for loss in -np.log(np.maximum(own, np.finfo(np.float32).tiny))]


def _binary_cross_entropy(probabilities: np.ndarray, labels: np.ndarray) -> list[float]:
    """The loss of each row of [b, classes], averaged over the classes, of multi-hot labels."""
    probabilities = probabilities.astype(np.float64)
    own = np.where(labels, probabilities, 1 - probabilities)
    losses = -np.log(np.maximum(own, np.finfo(np.float32).tiny)).mean(axis=1)
    return [float(loss) for loss in losses]


def _label(label: np.ndarray) -> int | list[int]:
    """The label of a video, or the classes of a multi-hot one."""
    return np.flatnonzero(label).tolist() if label.ndim else int(label)


def likeliest(probabilities: np.ndarray) -> list[list[tuple[int, float]]]:
    """The `TOP` classes of each row, (class, probability), likeliest first."""
    order = np.argsort(-probabilities, axis=1, kind="stable")[:, :TOP]
    return [
        [(int(c), round(float(row[c]), DIGITS)) for c in classes]
        for row, classes in zip(probabilities, order, strict=True)
    ]


def progress_bar(total: float, **options: Any) -> tqdm:
    """Progress bar on host 0: updated in a terminal, elsewhere a line every ten seconds."""
    terminal = sys.stderr.isatty()
    return tqdm(
        total=total,
        leave=False,
        position=None if terminal else 0,  # nothing moves the cursor of a file
        disable=host_index() != 0,
        mininterval=0.2 if terminal else 10,
        delay=0 if terminal else 10,
        **options,
    )


def tokens_kept(model: FluxViTConfig, grid: Grid, budget: int) -> int:
    """Number of tokens that a budget keeps of a grid, with CLS if it counts in the budget."""
    inside = model.cls == "inside"
    return kept_tokens(grid, budget - inside, model.rounding) + inside


def _report(
    config: ConfigDict, source: Source, settings: Sequence[Setting], videos: Sequence[dict]
) -> dict[str, Any]:
    read = [video for video in videos if not video["failure"]]
    failures = [{"id": v["id"], "reason": v["failure"]} for v in videos if v["failure"]]
    model, budgets = model_config(config), {}
    for k, (budget, grid, head) in enumerate(settings):
        measure = _mean_average_precision if config.train.multi_label else top_accuracies
        budgets[str(budget)] = {
            "frames": grid.frames,
            "resolution": grid.rows * PATCH,
            "tokens": tokens_kept(model, grid, budget),
            "head": head,
            **measure(config.model.classes, videos, k),
            "loss": sum(video["loss"][k] for video in read) / len(read),
            "decoded": len(read),
            "failed": len(videos) - len(read),
        }
    several = {}
    if config.train.multi_label:
        counts = _multi_hot(videos, config.model.classes).sum(axis=0).tolist()
        several = {"multi_label": True, "videos_of_class": counts}
    return several | {
        "dataset": {"videos": len(source), "fingerprint": source.fingerprint},
        "views": str(views_of(config)),
        "budgets": budgets,
        "failures": failures,
        "warning": warn_of_failures(config, len(failures), len(videos), first_of(failures)),
    }


def top_accuracies(classes: int, videos: Sequence[dict], k: int) -> dict[str, Any]:
    """Top-1 and top-5 of the k-th setting; a video that could not be read counts as wrong."""
    read = [video for video in videos if not video["failure"]]
    pairs = [(video["label"], [c for c, _ in video["top"][k]]) for video in read]
    return {
        "top1": sum(label == top[0] for label, top in pairs) / len(videos),
        "top5": sum(label in top for label, top in pairs) / len(videos),
    }


def _mean_average_precision(classes: int, videos: Sequence[dict], k: int) -> dict[str, Any]:
    """mAP and the average precision of each class; a video that could not be read is not found."""
    read = [video for video in videos if not video["failure"]]
    positive = _multi_hot(read, classes)
    missed = _multi_hot(videos, classes).sum(axis=0) - positive.sum(axis=0)
    scores = np.array([video["probabilities"][k] for video in read])
    precisions = average_precision.of_classes(scores, positive, missed)
    return {"map": average_precision.mean(precisions), "ap": precisions}


class Kept(NamedTuple):
    """Probabilities of the videos that this host has read.

    numbers: of the videos of each batch, int [b]; probabilities: of each setting and batch, float32
    [b, classes].
    """

    numbers: list[np.ndarray]
    probabilities: list[list[np.ndarray]]

    def add(self, batch: dict[str, np.ndarray], found: Sequence[np.ndarray]) -> None:
        """Adds a batch. found: the probabilities of its rows for each setting."""
        read = (batch["video"] >= 0) & (batch["failure"] == "")
        self.numbers.append(batch["video"][read])
        for own, rows in zip(self.probabilities, found, strict=True):
            own.append(rows[read])


def calibrations(kept: Kept, videos: Sequence[dict]) -> list[dict[str, Any]]:
    """What `calibration.measure` finds at each setting. All hosts call it.

    The hosts tell each other sums alone: the probabilities of a large data set are many.

    videos: of all hosts. Of hosts that have read the same video only its "host" counts it.
    """
    read = [video for video in videos if not video["failure"]]
    labels = np.array([video["label"] for video in read])
    first = calibration.first_half(labels)
    own = np.flatnonzero([video["host"] == host_index() for video in read])
    row_of = {int(number): row for row, number in enumerate(np.concatenate(kept.numbers))}
    rows = np.array([row_of[read[i]["number"]] for i in own], np.int64)
    return [
        calibration.measure(np.concatenate(parts)[rows], labels[own], first[own], sum_over_hosts)
        for parts in kept.probabilities
    ]


def _multi_hot(videos: Sequence[dict], classes: int) -> np.ndarray:
    """Which classes each video has: bool [n, classes]."""
    return label_array([tuple(video["label"]) for video in videos], classes).astype(bool)


def first_of(failures: Sequence[dict[str, str]]) -> str:
    return f"{failures[0]['id']}: {failures[0]['reason']}" if failures else ""


def _predictions(settings: Sequence[Setting], videos: Sequence[dict]) -> list[dict[str, Any]]:
    def row(video: dict) -> dict[str, Any]:
        key = "labels" if isinstance(video["label"], list) else "label"
        about = {"id": video["id"], key: video["label"]}
        if video["failure"]:
            return about | {"failure": video["failure"]}
        tops = zip(settings, video["top"], strict=True)
        return about | {"predictions": {str(setting.budget): top for setting, top in tops}}

    return [row(video) for video in videos]


# ---------------------------------------------------------------------------------------------
# --mode=evaluate


def run(config: ConfigDict, workdir: str) -> int:
    """Evaluates the best checkpoint of a workdir on `data.validation`; prints a table.

    Writes `evaluation/NAME.json` and `evaluation/NAME.predictions.jsonl`, see `report_name`, and
    the page, tables and picture of `report.write`. A workdir without checkpoints takes the weights
    of `train.init_from`. `eval.plan` replaces the settings by those that a search chose: Token
    Optimization, the paper's "+TO".

    Returns the exit status, 0. Raises UserError: no data, none that can be read, no checkpoint, one
    of another model, a plan of other weights.
    """
    folder = storage.path_of(workdir)
    return run_weights(*weights_with_config(config, folder), folder)


def weights_with_config(config: ConfigDict, folder: epath.Path) -> tuple[ConfigDict, "Weights"]:
    """The weights to evaluate, and the config with their number of classes. Raises as `run`."""
    if not config.data.validation:
        raise UserError("no data to evaluate on: add --config.data.validation=LIST")
    loaded = load_weights(config, folder)
    return with_classes(config, loaded.params), loaded


def opened_validation(
    config: ConfigDict, loaded: "Weights"
) -> tuple[Source, Mesh, tuple[str, ...] | None]:
    """The videos of `data.validation`, the devices, and the class names, after all checks.

    Raises UserError as `run`, on all hosts.
    """
    with raise_on_all_hosts():
        source = open_named(config, "data.validation", loaded)
        mesh = make_mesh(config)
        check_params_divide(config, mesh)
        check_readable(source, config.data.validation, config)
        names = check_class_names(config, loaded, {"data.validation": source})
    check_same_videos(validation=source)
    return source, mesh, names


def run_weights(config: ConfigDict, loaded: "Weights", folder: epath.Path) -> int:
    """As `run`, of given weights."""
    source, mesh, names = opened_validation(config, loaded)
    settings = planned_or_given(config, loaded.params)
    say(f"evaluating {loaded.origin} on {len(source)} videos")
    with Watchdog(config.log.watchdog_seconds, folder) as watchdog:
        evaluation = evaluate(
            loaded.params,
            config,
            source,
            mesh,
            settings=settings,
            after_batch=watchdog.alive,
            measure_calibration=not config.train.multi_label,
        )
    assert evaluation is not None  # nothing stops it
    tell(evaluation, report_name(config, source, settings, loaded), config, loaded, folder, names)
    return 0


def tell(
    evaluation: Evaluation,
    name: str,
    config: ConfigDict,
    loaded: "Weights",
    folder: epath.Path,
    names: Sequence[str] | None,
) -> None:
    """Prints the table of an evaluation, and writes its files; host 0 does.

    name: of the files in the folder's `evaluation`; names: of the classes, if known.
    """
    if host_index() != 0:
        return
    path = folder / FOLDER / f"{name}.json"
    about = {"data": config.data.validation, "plan": config.eval.plan or None}
    about |= {"class_names": list(names or numbered(config.model.classes))}
    print(evaluation.table())  # before what may fail
    page = write(evaluation, path, {"checkpoint": loaded.origin} | about)
    failures, warning = evaluation.report["failures"], evaluation.report["warning"]
    if failures and not warning:
        print(describe_failures(len(failures), len(evaluation.predictions), first_of(failures)))
    print(f"written to {path} and {page.name}")
    if warning:
        print(f"warning: {warning}")


def write(evaluation: Evaluation, path: epath.Path, about: dict[str, Any]) -> epath.Path:
    """Writes a report with `about` in front, `NAME.predictions.jsonl` and what people look at.

    Returns the path of the page, see `report.write`.
    """
    # Importing matplotlib takes a second, and validation on the way draws nothing.
    from fluxvit_jax.evaluation import report

    storage.make_folder(path.parent)
    lines = [json.dumps(prediction) + "\n" for prediction in evaluation.predictions]
    predictions = path.with_suffix(SUFFIX)
    atomic.write(predictions, "".join(lines))
    atomic.write(path, json.dumps(about | evaluation.report, indent=1) + "\n")
    return report.write(predictions)


def report_name(
    config: ConfigDict,
    source: Source,
    settings: Sequence[Setting],
    loaded: "Weights",
    cascade: str = "",
) -> str:
    """The name of a report's file, such as "lists-val-0a1b2c3d", of a plan "lists-val-plan-...".

    It begins with the folder and the name of the data. The digits are a hash of everything that
    tells evaluations of a workdir apart: path and content of the data, views, settings, selection
    of tokens, and weights from outside the workdir. So an evaluation replaces only its own report.

    cascade: all that tells it from others, if one is evaluated.
    """
    words, path = report_words(config.data.validation), config.data.validation
    about = {
        "data": path if storage.is_remote(path) else os.path.abspath(path),
        "videos": source.fingerprint,
        "views": str(views_of(config)),
        "settings": settings,
        "model": [config.model.selector.to_dict(), config.model.dtype, config.seed],
        "weights": loaded.origin if loaded.trained is None else "",
    }
    classifier = loaded.params.get(zero_shot.CLASSIFIER)
    if classifier is not None:  # of texts
        about["classes"] = hashlib.sha256(classifier["classes"].tobytes()).hexdigest()
    if cascade:
        about["cascade"] = cascade
    digits = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:8]
    plan = "cascade" if cascade else "plan" if config.eval.plan else ""
    kinds = (plan, "zero_shot" if classifier is not None else "")
    return "-".join(filter(None, (words, *kinds, digits)))


def report_words(data: str) -> str:
    """The folder and the name of a list or folder, for the name of a file."""
    path = storage.path_of(data)
    if not storage.is_remote(path):
        path = epath.Path(os.path.abspath(path))
    name = path.stem if path.is_file() else path.name
    return re.sub(r"[^\w.]+", "-", f"{path.parent.name}-{name}")[-NAME_LENGTH:].strip("-.")


def planned_or_given(config: ConfigDict, params: dict) -> list[Setting]:
    """The setting that the report `eval.plan` chose for each budget; without one, `eval.settings`.

    Raises UserError: a report of other weights, or one that chose nothing.
    """
    if not config.eval.plan:
        return settings_of(config)
    report = compute_on_host0(lambda: planner.read_report(config.eval.plan))
    planner.check_weights(report, fluxvit.network_params(params), config.eval.plan)
    cells = planner.chosen_cells(report)
    if not cells:
        raise UserError(f"{config.eval.plan}: chose no cells that select; let --mode=search finish")
    for note in report["notes"]:
        say(f"warning: {config.eval.plan}: {note}")
    return [
        Setting(cell["budget"], Grid.square(cell["frames"], cell["resolution"]), cell["head"])
        for cell in cells
    ]


class Weights(NamedTuple):
    """Parameters as numpy arrays, their origin, and the config that they were trained with.

    trained: the config of a run's checkpoint, a nested dict; None for other weights.
    class_names: of the classifier; empty if unknown.
    """

    params: dict
    origin: str
    trained: dict | None
    class_names: tuple[str, ...] = ()


def load_weights(config: ConfigDict, workdir: epath.Path) -> Weights:
    """The best checkpoint of a workdir, or without one, the weights of `train.init_from`.

    Raises UserError: there are none, or they are of another network.
    """
    if (workdir / checkpointer.FOLDER).exists() or not config.train.init_from:
        step, params, trained, class_names, _ = checkpointer.restore(workdir)
        if trained["model"]["classes"] == NO_CLASSES:
            raise UserError(
                f"{step} is pre-trained and has no classifier; fine-tune from it first: "
                f"--config.train.init_from={workdir}"
            )
        _check_same_network(trained, config, step)
        # Converted weights have the dtype of their file.
        params = jax.tree.map(lambda x: np.asarray(x, np.float32), fluxvit.network_params(params))
        expected = abstract_params(with_classes(config, params))
        checkpointer.check_fit(params, fluxvit.network_params(expected), step)
        return Weights(params, str(step.relative_to(step.parents[1])), trained, class_names)
    path = config.train.init_from
    loaded = init_from.load(path, model_config(config))
    if loaded.multi_label and not config.train.multi_label:
        raise UserError(
            f"{path}: was trained with several labels a video; add --config.train.multi_label=True"
        )
    expected = abstract_params(with_classes(config, loaded.params))
    checkpointer.check_fit(loaded.params, expected, path)
    stated = config.data.class_names  # goes before names that are only assumed
    names = () if loaded.names_assumed and stated else loaded.class_names
    return Weights(loaded.params, path, None, names)


def with_classes(config: ConfigDict, params: dict) -> ConfigDict:
    """The config with the `model.classes` of trained weights, where it is 0."""
    if config.model.classes:
        return config
    counted = config.copy_and_resolve_references()
    counted.model.classes = params["heads"]["bias"].shape[-1]
    return counted


def open_named(config: ConfigDict, field: str, weights: Weights) -> Source:
    """The videos of `config.FIELD`, whose names are looked up among those of the weights.

    Raises UserError: as `splits.open_compared`.
    """
    if weights.class_names:
        known: KnownNames | None = KnownNames(weights.class_names, weights.origin)
    else:
        known = configured_names(config)
    return open_compared(flatten(config)[field], field, config, known, weights.origin)


def check_class_names(
    config: ConfigDict, weights: Weights, sources: Mapping[str, Source | None]
) -> tuple[str, ...] | None:
    """The class names; None if they are unknown.

    Without names in the weights, the file `data.class_names` is used. Raises UserError if names of
    the weights and the lists of videos differ.

    sources: by the field of the config that names them; None: there is no such list.
    """
    known: dict[str, Sequence[str] | None] = {weights.origin: weights.class_names}
    if not weights.class_names:
        given = configured_class_names(config.data.class_names, config.model.classes)
        known["config.data.class_names"] = given
    fields = flatten(config)
    known |= {
        f"config.{field}={fields[field]}": source.class_names if source else None
        for field, source in sources.items()
    }
    return common_class_names(known)


def _check_same_network(trained: dict, config: ConfigDict, step: Any) -> None:
    """Raises UserError if a field differs that changes the answers but no tensor's shape."""
    sides = {name: FIELDS[name].default for name in ADDED} | flatten(trained), flatten(config)
    for name in ("model.variant", "model.gelu", "model.cls", "train.budgets", "train.multi_label"):
        before, now = (json.dumps(side.get(name)) for side in sides)
        if before != now:
            raise UserError(f"{step} was trained with config.{name}={before}, not {now}")
