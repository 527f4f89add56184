"""`--mode=predict`: what a network says of one video, or of all in a folder, at each token budget.

A video is seen once at each budget: frames spread evenly over it, the middle square. One video is
printed, drawn as a page and filmed; a folder becomes `predictions.csv`. With `--window` it is also
seen in windows that move along it, which gives a timeline: a table, and a plot on the page.
Features, if asked for, are written beside as `.npz`. Instead of budgets a limit on the time may be
given; what a search has found within it is then run. With a limit on the average time that may be
a cascade, which asks a video again at more tokens only if it is in doubt.
"""

import csv
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from fluxvit_jax.adaptive.cascade import Cascade
from fluxvit_jax.adaptive.planner import plan_cascade
from fluxvit_jax.checkpoints import download
from fluxvit_jax.checkpoints.workdir import read_config
from fluxvit_jax.config.variants import NO_CLASSES
from fluxvit_jax.convert.config_json import Setting, describe_assumption
from fluxvit_jax.data import durable_files
from fluxvit_jax.data.annotations import OWN_FILM, read_class_names, videos_below
from fluxvit_jax.data.clips import Clip, read_clips
from fluxvit_jax.data.decoding import DecodeError, Video
from fluxvit_jax.deploy.cascade_passes import CascadePasses
from fluxvit_jax.deploy.chat_encoder import ChatEncoder
from fluxvit_jax.deploy.page import Shown, write_film, write_page
from fluxvit_jax.deploy.pretrained import PretrainedModel, from_pretrained
from fluxvit_jax.deploy.shared_space import TextClassifier
from fluxvit_jax.deploy.windows import read_windows, seconds_of, windows_of
from fluxvit_jax.distributed import devices, storage
from fluxvit_jax.errors import UserError
from fluxvit_jax.grids import PATCH, nearest_head
from fluxvit_jax.objectives import flux_chat, flux_chat_weights
from fluxvit_jax.reports.spreadsheet import cell
from fluxvit_jax.reports.wording import count
from fluxvit_jax.token_optimization import planner

if TYPE_CHECKING:
    from fluxvit_jax.deploy.timeline import Timeline

CSV = "predictions.csv"
TIMELINES = "timeline.csv"
LEAST = 1e-3  # probability that a plot shows
TIMED_PASSES, TIMED_SECONDS = 5, 1.0  # of one video, after which timing ends


def predict(
    model: PretrainedModel,
    clip: Clip,
    budget: int,
    class_names: Sequence[str],
    top: int,
    timed: bool = False,
    head: int | None = None,
    classifier: TextClassifier | None = None,
    calibrated: bool = False,
) -> Shown:
    """The likeliest classes of a clip at a budget, and the patches that were kept.

    head: by default the one that was trained at the nearest budget.
    classifier: of Flux-CLIP, whose classes then are named; by default those of the weights.
    timed: whether the pass is run again, without compiling, for its time; otherwise that is 0.
    calibrated: whether probabilities are at the temperature of `model.temperature_at`.
    """
    out = model(clip.frames, budget, head)
    if classifier:
        out = out._replace(logits=classifier.logits(out.pooled))
    temperature = model.temperature_at(out.tokens_kept) if calibrated else 1.0
    (found,) = model.likeliest(out, class_names, top, temperature)
    seconds = 0.0
    if timed:
        seconds = _median_seconds(
            lambda: model(clip.frames, budget, head).logits.block_until_ready()
        )
    return Shown(budget, clip.frames, np.asarray(out.kept[0]), clip.times, found, out.head, seconds)


def _median_seconds(run: Callable[[], Any]) -> float:
    """The median of some calls that wait for their result, or the time of one where it is long."""
    times: list[float] = []
    while len(times) < TIMED_PASSES and sum(times) < TIMED_SECONDS:
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def features(
    model: PretrainedModel, clip: Clip, budget: int, kind: str, head: int | None = None
) -> dict[str, np.ndarray]:
    """The arrays of an `.npz` at a budget, their names ending in `_BUDGET`.

    pooled: float32 [pool_width], the clip's vector. Of kind "tokens" also tokens: float32 [N, C],
    the kept patches after the last block; thw: int32 [N, 3], frame, patch row and column of each;
    frames: int [T], the numbers of the video's frames.
    """
    found = model.features(clip.frames, budget, head)
    arrays = {"pooled": found.pooled[0]}
    if kind == "tokens":
        arrays |= {"tokens": found.tokens[0], "thw": found.places[0], "frames": clip.numbers}
    return {f"{name}_{budget}": array for name, array in arrays.items()}


# ---------------------------------------------------------------------------------------------
# --mode=predict


class Options(NamedTuple):
    """The flags of this mode, as `main` reads them: from `video` on they bear these names."""

    weights: str  # of any form
    out: str  # folder to write into
    tokens: Sequence[int]  # budgets; the checkpoint's own without any
    network: str  # config.json for what the weights do not tell
    dtype: str | None  # by default float32, or with `milliseconds` what the search measured in
    video: str  # file or folder
    top: int = 5
    features: str | None = None
    class_names: str = ""  # file or data set; goes before the names in the weights
    classes: Sequence[str] = ()  # named by texts, in place of those of the weights
    milliseconds: float | None = None  # of one clip; instead of `tokens`
    workdir: str | None = None  # whose search then plans, before that of the weights
    window: str = ""  # length of a window, such as "4s"; none: no timeline
    stride: str = ""  # from window to window; the length by default
    calibrated: bool = False  # whether probabilities are at the temperatures of an evaluation
    average_milliseconds: float | None = None  # of a cascade; `milliseconds`: at worst
    average_gflops: float | None = None

    @property
    def averages(self) -> dict[str, float]:
        """The limits of a cascade, that of an average first; none if no cascade is asked for."""
        given = {
            "average_milliseconds": self.average_milliseconds,
            "average_gflops": self.average_gflops,
        }
        averages = {kind: value for kind, value in given.items() if value is not None}
        if averages and self.milliseconds is not None:
            averages["milliseconds"] = self.milliseconds
        return averages


def run(options: Options, config: ConfigDict | None = None) -> int:
    """Predicts a video or a folder of them; returns the exit status, 0.

    config: a recipe, if one was given: its evaluation settings then hold, and its class names if
        the weights do not know theirs.

    Raises:
        UserError: there are no such weights or videos, or not one video can be read; there is no
            report of a search of these weights, or it has nothing within the limit.
    """
    source = storage.path_of(options.video)
    if not options.video or not source.exists():
        raise UserError(f"--video={options.video}: no such file or folder")
    if options.top < 1 or any(budget < 2 for budget in options.tokens):
        raise UserError("--top must be at least 1 and --tokens at least 2")
    windows = _windows(options)
    if options.tokens and (options.averages or options.milliseconds is not None):
        raise UserError("--tokens and --milliseconds both choose a budget; give one of them")
    _check_cascade(options)
    dtype = options.dtype or "float32"
    model = from_pretrained(options.weights, options.network or None, dtype)
    settings = model.config.asked(options.tokens, config.eval.settings if config else ())
    head, cascade = None, None
    if options.averages:
        model, cascade = _planned_cascade(model, options)
        settings = [(step.budget, *step.grid) for step in cascade.steps]
    elif options.milliseconds is not None:
        model, settings, head = _planned(model, options)
    classifier = _text_classifier(model, options)
    if options.calibrated:
        _tell_calibration(model, options)
    job = _Job(
        model,
        settings,
        head,
        classifier.names if classifier else _class_names(model, options, config),
        options.top,
        options.features,
        Path(options.out),
        windows,
        classifier,
        options.calibrated,
        cascade,
        _chat_encoder(options),
    )
    try:
        job.out.mkdir(parents=True, exist_ok=True)
        predict_all = _predict_folder if source.is_dir() else _predict_video
        predict_all(job, source)
    except OSError as error:
        raise UserError(f"--out={job.out}: cannot be written: {error}") from error
    return 0


def _chat_encoder(options: Options) -> ChatEncoder | None:
    """What makes the features for a language model, if these are asked for."""
    if options.features != "llm":
        return None
    projection = flux_chat_weights.read_projection(options.weights)
    return ChatEncoder(projection, options.dtype or "float32")


def _windows(options: Options) -> tuple[float, float] | None:
    """Seconds of a window and from window to window, if windows are asked for."""
    if not options.window:
        if options.stride:
            raise UserError(f"--stride={options.stride}: add --window, the length of a window")
        return None
    window = seconds_of("window", options.window)
    return window, seconds_of("stride", options.stride) if options.stride else window


class _Job(NamedTuple):
    """What is asked of each video."""

    model: PretrainedModel
    settings: Sequence[Setting]
    head: int | None  # of all settings; by default that of the nearest budget
    class_names: Sequence[str]
    top: int
    features: str | None
    out: Path
    windows: tuple[float, float] | None  # seconds of a window, and from window to window
    classifier: TextClassifier | None  # of classes by their names
    calibrated: bool
    cascade: Cascade | None  # of the settings, which are run until the answer is sure
    chat_encoder: ChatEncoder | None  # of features for a language model

    def predict(self, clip: Clip, budget: int, top: int, timed: bool = False) -> Shown:
        """What `predict` finds."""
        return predict(
            self.model,
            clip,
            budget,
            self.class_names,
            top,
            timed,
            self.head,
            self.classifier,
            self.calibrated,
        )

    def read(self, path: Path) -> list[Clip]:
        """The clip of each setting. Raises DecodeError."""
        with Video(path) as video:
            return read_clips(video, [(frames, size) for _, frames, size in self.settings])

    def answers(self, clips: Sequence[Clip], timed: bool = False) -> Iterator[Shown]:
        """What `predict` finds at each setting; of a cascade at each step until one is sure."""
        if self.cascade:
            yield from self._cascade_answers(self.cascade, clips, timed)
            return
        for (budget, *_), clip in zip(self.settings, clips, strict=True):
            yield self.predict(clip, budget, self.top, timed)

    def _cascade_answers(
        self, cascade: Cascade, clips: Sequence[Clip], timed: bool
    ) -> Iterator[Shown]:
        by_size = {
            step.grid: clip.frames[None] for step, clip in zip(cascade.steps, clips, strict=True)
        }
        passes = CascadePasses(self.model.params, self.model.config.model, cascade, [by_size])
        this, average = np.zeros(1, int), None
        for number, (step, clip) in enumerate(zip(cascade.steps, clips, strict=True)):
            probabilities, kept = passes.run(number, this)
            average, stops = cascade.join(number, probabilities, average)
            order = np.argsort(-average[0], kind="stable")[: self.top]
            top = [(self.class_names[c], float(average[0, c])) for c in order]
            seconds = _median_seconds(partial(passes.run, number, this)) if timed else 0.0
            yield Shown(step.budget, clip.frames, kept[0], clip.times, top, step.head, seconds)
            if stops[0]:
                return

    def timelines(self, path: Path) -> "list[Timeline]":
        """The windows of a video at each setting. Raises DecodeError."""
        from fluxvit_jax.deploy.timeline import Moment, Timeline  # imports matplotlib

        assert self.windows is not None
        found = []
        with Video(path) as video:
            if not video.frame_rate:
                raise DecodeError(video.name, "names no frame rate, which --window needs")
            rate = video.frame_rate
            windows = windows_of(len(video), rate, *self.windows)
            for budget, frames, resolution in self.settings:
                clips = read_windows(video, windows, frames, resolution)
                moments = [
                    Moment(window.start / rate, window.stop / rate, *self._classes(clip, budget))
                    for window, clip in tqdm(
                        zip(windows, clips, strict=True),
                        desc="predicting windows",
                        total=len(windows),
                        disable=None,
                        leave=False,
                    )
                ]
                head = self.head
                if head is None:
                    head = nearest_head(budget, self.model.config.head_budgets)
                found.append(Timeline(budget, frames, resolution, head, moments))
        return found

    def _classes(
        self, clip: Clip | DecodeError, budget: int
    ) -> tuple[Sequence[tuple[str, float]], str]:
        """The classes of a window with their probabilities, and why it cannot be read.

        Improbable ones are left out: a long video has thousands of windows.
        """
        if isinstance(clip, DecodeError):
            return [], clip.reason
        top = self.predict(clip, budget, len(self.class_names)).top
        return [own for i, own in enumerate(top) if i < self.top or own[1] >= LEAST], ""

    def write_features(self, clips: Sequence[Clip], name: Path) -> None:
        """`NAME.npz` in the folder to write into, if features are asked for."""
        if not self.features:
            return
        arrays: dict[str, Any] = {}
        for (budget, *_), clip in zip(self.settings, clips, strict=True):
            if self.chat_encoder:
                video = self.chat_encoder.encode(clip.frames[None], budget)
                arrays |= {f"llm_{budget}": np.asarray(video.tokens[0], np.float32)}
                if self.chat_encoder.frame_times:
                    arrays |= {f"seconds_{budget}": clip.times[np.asarray(video.frame[0])]}
            else:
                arrays |= features(self.model, clip, budget, self.features, self.head)
        path = self.out / f"{storage.display_name(name)}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, **arrays)


def _planned(
    model: PretrainedModel, options: Options
) -> tuple[PretrainedModel, list[Setting], int]:
    """What the search of these weights found best within a time: network, setting and head.

    The network computes as it did when it was timed, unless another dtype is asked for. Cells that
    merge tokens are left out: no patches of theirs are dropped, so there is nothing to show.
    """
    source = planner.find_report(options.workdir, options.weights) or options.weights
    report, device = planner.read_report(source), devices.device_name()
    planner.check_weights(report, model.params, source)
    if device not in report["devices"]:
        report = planner.measure_device(source, model)
    best = planner.plan(report, milliseconds=options.milliseconds, device=device, merging=False)
    print(best, flush=True)
    if options.dtype is None:
        model = planner.as_searched(model, report)
    return model, [(best.budget, best.frames, best.resolution)], best.head


def _check_cascade(options: Options) -> None:
    """Raises UserError for what cannot be had together with a cascade."""
    if not options.averages:
        return
    for flag, value in (
        ("window", options.window),
        ("features", options.features),
        ("classes", options.classes),
        ("calibrated", options.calibrated),
    ):
        if value:
            raise UserError(
                f"--{flag}: is for one budget, and an average limit may ask a video at several; "
                "give --milliseconds or --tokens"
            )


def _planned_cascade(model: PretrainedModel, options: Options) -> tuple[PretrainedModel, Cascade]:
    """What the search of these weights found best within average limits: network and cascade.

    Raises UserError: as `_planned`.
    """
    source = planner.find_report(options.workdir, options.weights) or options.weights
    report, device = planner.read_report(source), devices.device_name()
    planner.check_weights(report, model.params, source)
    timed = any("milliseconds" in kind for kind in options.averages)
    if timed and device not in report["devices"]:
        report = planner.measure_device(source, model)
    best = plan_cascade(report, options.averages, device if timed else None)
    print(best, flush=True)
    if options.dtype is None:
        model = planner.as_searched(model, report)
    return model, best.cascade


def _predict_video(job: _Job, path: Path) -> None:
    try:
        clips = job.read(path)
        timelines = job.timelines(path) if job.windows else []
    except DecodeError as error:
        raise UserError(storage.display_name(f"--video={error}")) from error
    shown = []
    for one in job.answers(clips, timed=True):
        print(_heading(one), flush=True)
        for name, probability in one.top:
            print(f"  {probability:7.2%}  {name}", flush=True)
        shown.append(one)
    if job.cascade:
        print(f"sure after {len(shown)} of {count(len(job.cascade.steps), 'step')}")
    # Not the video's own name: it may lie in the folder that is written into.
    stem = storage.display_name(path.stem)
    page, film = job.out / f"{stem}.kept.html", job.out / f"{stem}{OWN_FILM}"
    write_page(page, storage.display_name(path.name), shown, timelines)
    write_film(film, shown)
    print(storage.display_name(f"written to {page} and {film}"))
    if timelines:
        table = job.out / f"{stem}.{TIMELINES}"
        with _open_table(table) as file:
            _timeline_writer(file, job).writerows(_timeline_rows(job, Path(path.name), timelines))
        windows = count(len(timelines[0].moments), "window")
        print(storage.display_name(f"{windows}; written to {table}"))
    job.write_features(clips, Path(path.name))


def _predict_folder(job: _Job, folder: Path) -> None:
    """Writes `predictions.csv`: a line for each video and budget, or for one that failed.

    Names that a spreadsheet would take for a formula begin with an apostrophe, and bytes that are
    no UTF-8 are escaped.
    """
    videos = videos_below(folder)
    if not videos:
        raise UserError(f"--video={folder}: holds no videos")
    failures: list[str] = []
    header = ["video", "tokens", "frames", "resolution", "head", *_class_columns(job)]
    with ExitStack() as files:
        files.enter_context(durable_files.one_run_at_a_time(job.out, "--mode=predict"))
        file = files.enter_context(_open_table(job.out / CSV))
        writer = csv.writer(file)
        timelines = None
        if job.windows:
            timelines = files.enter_context(_open_table(job.out / TIMELINES))
            timeline_writer = _timeline_writer(timelines, job)
        writer.writerow([*header, "failure"])
        for path in tqdm(videos, desc="predicting", unit="video", disable=None):
            name = path.relative_to(folder)
            try:
                clips = job.read(path)
                writer.writerows(_rows(job, name, clips))
                job.write_features(clips, name)
            except DecodeError as error:
                failures.append(f"{storage.display_name(name)}: {error.reason}")
                tqdm.write(f"{storage.display_name(name)}: {error.reason}", file=sys.stderr)
                writer.writerow([cell(name), *[""] * (len(header) - 1), cell(error.reason)])
            if timelines:
                timeline_writer.writerows(_rows_or_failure(job, path, name))
                timelines.flush()
            file.flush()  # what is done stays, should it be interrupted
    if len(failures) == len(videos):
        raise UserError(
            f"--video={folder}: not one of its {len(videos)} videos can be read; {failures[0]}; "
            f"{job.out / CSV} has the reason for each"
        )
    bad = f"; {len(failures)} could not be read" if failures else ""
    more = f" and {job.out / TIMELINES}" if job.windows else ""
    print(storage.display_name(f"{len(videos)} videos{bad}; written to {job.out / CSV}{more}"))


def _open_table(path: Path) -> TextIO:
    return path.open("w", newline="", encoding="utf-8")


def _timeline_writer(file: TextIO, job: _Job) -> Any:
    """A writer of a file of timelines, with its header written."""
    writer = csv.writer(file)
    header = ["video", "start", "end", "tokens", "frames", "resolution", "head"]
    writer.writerow([*header, *_class_columns(job), "failure"])
    return writer


def _class_columns(job: _Job) -> list[str]:
    """The columns of the likeliest classes in both tables."""
    ranks = range(1, min(job.top, len(job.class_names)) + 1)
    return [column for n in ranks for column in (f"class{n}", f"probability{n}")]


def _class_cells(likeliest: Sequence[tuple[str, float]]) -> list[str]:
    """The cells below `_class_columns`."""
    return [text for name, odds in likeliest for text in (cell(name), f"{odds:.6f}")]


def _rows_or_failure(job: _Job, path: Path, name: Path) -> list[list[Any]]:
    """The lines of a video in a file of timelines; one with the reason if it cannot be read."""
    try:
        return list(_timeline_rows(job, name, job.timelines(path)))
    except DecodeError as error:
        blank = [""] * (6 + len(_class_columns(job)))
        return [[cell(name), *blank, cell(error.reason)]]


def _timeline_rows(job: _Job, name: Path, timelines: "Sequence[Timeline]") -> Iterator[list[Any]]:
    """The lines of a video in a file of timelines, one per setting and window."""
    columns = len(_class_columns(job))
    for timeline in timelines:
        for moment in timeline.moments:
            times = f"{moment.start:.3f}", f"{moment.end:.3f}"
            named = _class_cells(moment.top[: columns // 2])
            named += [""] * (columns - len(named))
            yield [cell(name), *times, *timeline[:4], *named, cell(moment.failure)]


def _rows(job: _Job, name: Path, clips: Sequence[Clip]) -> Iterator[list[Any]]:
    """The lines of a video in the table, one a budget; of a cascade that of its last step."""
    if job.cascade:
        shown = list(job.answers(clips))
        setting, last = job.settings[len(shown) - 1], shown[-1]
        yield [cell(name), *setting, last.head, *_class_cells(last.top), ""]
        return
    for setting, one in zip(job.settings, job.answers(clips), strict=True):
        yield [cell(name), *setting, one.head, *_class_cells(one.top), ""]


def _text_classifier(model: PretrainedModel, options: Options) -> TextClassifier | None:
    """The classifier of `--classes`, by the official prompts; None without them.

    Raises UserError: the weights have no text encoder, or no classes where none are named.
    """
    if not options.classes:
        if not model.has_classifier:
            raise UserError(
                f"{options.weights}: has no classes of its own; name some, such as "
                '--classes="opening a door,closing a door"'
            )
        if model.space is None and not options.features:
            _check_classes(model, options)
        return None
    if options.class_names:
        raise UserError("--classes and --class_names both name classes; give one of them")
    if model.space is None:
        raise UserError(
            f"--classes: {options.weights} has no text encoder, so its classes are those it was "
            "trained on; weights of Flux-CLIP name any, see configs/clip.py"
        )
    return model.space.classifier(options.classes)


def _check_classes(model: PretrainedModel, options: Options) -> None:
    """Raises UserError for a network whose classifier nothing has trained, of a run or a file."""
    if model.config.model.classes != NO_CLASSES:
        return
    weights, path = options.weights, storage.path_of(download.local_copy(options.weights))
    configs = (read_config(folder) for folder in (path, *path.parents[:2]))
    config = next(filter(None, configs), {})
    if config.get("train", {}).get("objective") == flux_chat.OBJECTIVE:
        raise UserError(
            f"{weights}: is a video chat and has no classes; ask it about the video: --mode=chat "
            f"--checkpoint={weights} --video={options.video}, or write what its language model "
            "reads: --features=llm"
        )
    raise UserError(
        f"{weights}: was pre-trained and has no classes; fine-tune it, such as with "
        f"--config=custom --config.train.init_from={weights}, or write its features: "
        "--features=pooled"
    )


def _tell_calibration(model: PretrainedModel, options: Options) -> None:
    """Says on stderr which evaluation the temperatures of `--calibrated` are of.

    Raises UserError: there is none; with `--classes`, whose probabilities none has measured.
    """
    if options.classes:
        raise UserError("--calibrated: is for the classes of the weights; leave out --classes")
    try:
        model.temperature_at(1)
    except UserError as error:
        raise UserError(f"--calibrated: {options.weights}: {error}") from error
    report = model.calibration
    assert report is not None  # or there are no temperatures
    listed = ", ".join(f"{t:.3g} at {count(b, 'token')}" for b, t in model.temperatures.items())
    videos = count(report["dataset"]["videos"], "video")
    print(f"temperatures of {videos} of {report['data']}: {listed}", file=sys.stderr)


def _class_names(
    model: PretrainedModel, options: Options, config: ConfigDict | None
) -> Sequence[str]:
    """From the flag, the weights, or the recipe; else "class 0" and so on.

    Names that are only assumed of the weights come last, and are said to be.
    """
    classes, known = model.config.model.classes, model.config.class_names
    if known and not options.class_names and not model.config.assumed_names:
        return known
    path = options.class_names or (config.data.class_names if config else "")
    if not path:
        if assumption := describe_assumption(model.config, options.weights):
            print(f"{assumption}; --class_names=FILE names others", file=sys.stderr)
        return model.labels
    names = read_class_names(path)
    if len(names) != classes:
        raise UserError(f"{path}: has {len(names)} names for the network's {classes} classes")
    return names


def _heading(shown: Shown) -> str:
    frames, rows, columns = shown.kept.shape
    return (
        f"{shown.kept.sum()} of {shown.kept.size} tokens ({frames} frames of {rows * PATCH} x "
        f"{columns * PATCH} px, head {shown.head}): {1000 * shown.seconds:.1f} ms"
    )
