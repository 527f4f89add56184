"""Accuracy at every token budget: `--mode=evaluate`, and validation during training.

Every video counts once, for any batch size and number of devices or hosts. Its views (temporal
clips x spatial crops) go through the network one view of a batch at a time, so that
`eval.batch_size` clips are on the devices at once. Probabilities are averaged over the views. A
video that cannot be read is listed with its reason and counts as wrong; if no video can be read,
evaluation fails. With `train.multi_label` the probabilities are sigmoids, and the measure is mAP.
"""

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from fluxvit_jax.config.network import model_config
from fluxvit_jax.data.pipeline import evaluation_batches
from fluxvit_jax.data.sources import Source
from fluxvit_jax.data.supervised_workers import Quarantine
from fluxvit_jax.data.views import views_of
from fluxvit_jax.distributed import lifelines, partition_rules
from fluxvit_jax.distributed.console import progress_bar
from fluxvit_jax.distributed.mesh import (
    device_put_global,
    gather,
    host_count,
    host_index,
    local_row_indices,
    make_mesh,
    platform_of,
    round_up_to_shards,
)
from fluxvit_jax.errors import UserError
from fluxvit_jax.evaluation import zero_shot
from fluxvit_jax.evaluation.accuracy import (
    Kept,
    binary_cross_entropy,
    calibrations,
    cross_entropy,
    likeliest,
    mean_average_precision,
    multi_hot,
    top_accuracies,
)
from fluxvit_jax.evaluation.results import TOP
from fluxvit_jax.evaluation.settings import Setting, settings_of, tokens_kept
from fluxvit_jax.evaluation.unreadable import check_some_readable, first_of, warn_of_failures
from fluxvit_jax.evaluation.view_programs import class_count, mean_over_views, predictor
from fluxvit_jax.grids import PATCH
from fluxvit_jax.models import fluxvit


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
        video, classes = batch["video"], class_count(self._params)
        found = [
            own
            for k, program in enumerate(self._programs)
            for own in mean_over_views(
                [program], self._params, classes, video, batch[f"patches{k}"], self._mesh
            )
        ]
        if self.kept is not None:
            self.kept.add(batch, found)
        tops = [likeliest(own) for own in found]
        loss_of = binary_cross_entropy if self._multi_label else cross_entropy
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


def _label(label: np.ndarray) -> int | list[int]:
    """The label of a video, or the classes of a multi-hot one."""
    return np.flatnonzero(label).tolist() if label.ndim else int(label)


def _report(
    config: ConfigDict, source: Source, settings: Sequence[Setting], videos: Sequence[dict]
) -> dict[str, Any]:
    read = [video for video in videos if not video["failure"]]
    failures = [{"id": v["id"], "reason": v["failure"]} for v in videos if v["failure"]]
    model, budgets = model_config(config), {}
    for k, (budget, grid, head) in enumerate(settings):
        measure = mean_average_precision if config.train.multi_label else top_accuracies
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
        counts = multi_hot(videos, config.model.classes).sum(axis=0).tolist()
        several = {"multi_label": True, "videos_of_class": counts}
    return several | {
        "dataset": {"videos": len(source), "fingerprint": source.fingerprint},
        "views": str(views_of(config)),
        "budgets": budgets,
        "failures": failures,
        "warning": warn_of_failures(config, len(failures), len(videos), first_of(failures)),
    }


def _predictions(settings: Sequence[Setting], videos: Sequence[dict]) -> list[dict[str, Any]]:
    def row(video: dict) -> dict[str, Any]:
        key = "labels" if isinstance(video["label"], list) else "label"
        about = {"id": video["id"], key: video["label"]}
        if video["failure"]:
            return about | {"failure": video["failure"]}
        tops = zip(settings, video["top"], strict=True)
        return about | {"predictions": {str(setting.budget): top for setting, top in tops}}

    return [row(video) for video in videos]
