"""`--mode=predict`: what a network says of one video, or of all in a folder, at each token budget.

A video is seen once at each budget: frames spread evenly over it, the middle square. One video is
printed, drawn as a page and filmed; a folder becomes `predictions.csv`. Features, if asked for, are
written beside as `.npz`. Instead of budgets a limit on the time may be given; what a search has
found within it is then run.
"""

import csv
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from fluxvit_jax import devices, planner, storage
from fluxvit_jax.budgets import PATCH
from fluxvit_jax.convert.config_json import Setting
from fluxvit_jax.data import sampling
from fluxvit_jax.data.annotations import read_class_names, videos_below
from fluxvit_jax.data.augment import crop_view, resize_clip
from fluxvit_jax.data.decode import DecodeError, Video
from fluxvit_jax.errors import UserError
from fluxvit_jax.page import Shown, write_film, write_page
from fluxvit_jax.pretrained import PretrainedModel, from_pretrained

CSV = "predictions.csv"
TIMED = 5  # passes of one video


class Clip(NamedTuple):
    """What the network sees of a video.

    frames: uint8 [T, resolution, resolution, 3]; numbers: int [T], which frames of the video they
    are; times: float [T], seconds, at the video's mean frame rate (0 where it names none).
    """

    frames: np.ndarray
    numbers: np.ndarray
    times: np.ndarray


def read_clip(video: Video, frames: int, resolution: int) -> Clip:
    """Evenly spread frames, the short side scaled to `resolution`, the middle square.

    Raises DecodeError for a video that cannot be read.
    """
    numbers = sampling.test_frames(len(video), frames)
    pixels = video.read(numbers)
    size = sampling.resized_size(*pixels.shape[1:3], resolution)
    corner = sampling.test_crops(*size, 1)[0]
    pixels = crop_view(resize_clip(pixels, *size), resolution, *corner)
    rate = video.frame_rate
    return Clip(pixels, numbers, numbers / rate if rate else np.zeros(frames))


def predict(
    model: PretrainedModel,
    clip: Clip,
    budget: int,
    class_names: Sequence[str],
    top: int,
    timed: int = 0,
    head: int | None = None,
) -> Shown:
    """The likeliest classes of a clip at a budget, and the patches that were kept.

    head: by default the one that was trained at the nearest budget.
    timed: so many passes are run once more, without compiling, for their median time; without any
        the time is 0.
    """
    out = model(clip.frames, budget, head)
    logits = np.asarray(out.logits[0], np.float64)
    odds = np.exp(logits - logits.max())
    likeliest = np.argsort(-logits, kind="stable")[:top]
    named = [(class_names[c], float(odds[c] / odds.sum())) for c in likeliest]
    times = [_seconds(model, clip, budget, head) for _ in range(timed)]
    seconds = statistics.median(times) if times else 0.0
    return Shown(budget, clip.frames, np.asarray(out.kept[0]), clip.times, named, out.head, seconds)


def _seconds(model: PretrainedModel, clip: Clip, budget: int, head: int | None) -> float:
    begin = time.perf_counter()
    model(clip.frames, budget, head).logits.block_until_ready()
    return time.perf_counter() - begin


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
    class_names: str = ""  # file; before the names in the config and the checkpoint
    milliseconds: float | None = None  # of one clip; instead of `tokens`
    workdir: str | None = None  # whose search then plans, before that of the weights


def run(options: Options, config: ConfigDict | None = None) -> int:
    """Predicts a video or a folder of them; returns the exit status, 0.

    config: a recipe, if one was given: its class names and evaluation settings then hold.

    Raises:
        UserError: there are no such weights or videos, or the only video cannot be read; there is
            no report of a search of these weights, or it has nothing within the limit.
    """
    source = storage.path_of(options.video)
    if not options.video or not source.exists():
        raise UserError(f"--video={options.video}: no such file or folder")
    if options.top < 1 or any(budget < 2 for budget in options.tokens):
        raise UserError("--top must be at least 1 and --tokens at least 2")
    if options.tokens and options.milliseconds is not None:
        raise UserError("--tokens and --milliseconds both choose a budget; give one of them")
    dtype = options.dtype or "float32"
    model = from_pretrained(options.weights, options.network or None, dtype)
    settings = model.config.asked(options.tokens, config.eval.settings if config else ())
    head = None
    if options.milliseconds is not None:
        model, settings, head = _planned(model, options)
    job = _Job(
        model,
        settings,
        head,
        _class_names(model, options, config),
        options.top,
        options.features,
        Path(options.out),
    )
    try:
        job.out.mkdir(parents=True, exist_ok=True)
        predict_all = _predict_folder if source.is_dir() else _predict_video
        predict_all(job, source)
    except OSError as error:
        raise UserError(f"--out={job.out}: cannot be written: {error}") from error
    return 0


class _Job(NamedTuple):
    """What is asked of each video."""

    model: PretrainedModel
    settings: Sequence[Setting]
    head: int | None  # of all settings; by default that of the nearest budget
    class_names: Sequence[str]
    top: int
    features: str | None
    out: Path

    def read(self, path: Path) -> list[Clip]:
        """The clip of each setting. Raises DecodeError."""
        with Video(path) as video:
            return [read_clip(video, *grid) for _, *grid in self.settings]

    def answers(self, clips: Sequence[Clip], timed: int = 0) -> Iterator[Shown]:
        """What `predict` finds at each setting."""
        for (budget, *_), clip in zip(self.settings, clips, strict=True):
            yield predict(self.model, clip, budget, self.class_names, self.top, timed, self.head)

    def write_features(self, clips: Sequence[Clip], name: Path) -> None:
        """`NAME.npz` in the folder to write into, if features are asked for."""
        if not self.features:
            return
        arrays: dict[str, np.ndarray] = {}
        for (budget, *_), clip in zip(self.settings, clips, strict=True):
            arrays |= features(self.model, clip, budget, self.features, self.head)
        path = self.out / f"{name}.npz"
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


def _predict_video(job: _Job, path: Path) -> None:
    try:
        clips = job.read(path)
    except DecodeError as error:
        raise UserError(f"--video={error}") from error
    shown = []
    for one in job.answers(clips, TIMED):
        print(_heading(one), flush=True)
        for name, probability in one.top:
            print(f"  {probability:7.2%}  {name}", flush=True)
        shown.append(one)
    # Not the video's own name: it may lie in the folder that is written into.
    page, film = job.out / f"{path.stem}.kept.html", job.out / f"{path.stem}.kept.mp4"
    write_page(page, path.name, shown)
    write_film(film, shown)
    print(f"written to {page} and {film}")
    job.write_features(clips, Path(path.name))


def _predict_folder(job: _Job, folder: Path) -> None:
    videos = videos_below(folder)
    if not videos:
        raise UserError(f"--video={folder}: holds no videos")
    top, failed = min(job.top, len(job.class_names)), 0
    header = ["video", "tokens", "frames", "resolution", "head"]
    header += [column for n in range(1, top + 1) for column in (f"class{n}", f"probability{n}")]
    with (job.out / CSV).open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*header, "failure"])
        for path in tqdm(videos, desc="predicting", unit="video", disable=None):
            name = path.relative_to(folder)
            try:
                clips = job.read(path)
                writer.writerows(_rows(job, name, clips))
                job.write_features(clips, name)
            except DecodeError as error:
                failed += 1
                tqdm.write(f"{name}: {error.reason}", file=sys.stderr)
                writer.writerow([name.as_posix(), *[""] * (len(header) - 1), error.reason])
            file.flush()  # what is done stays, should it be interrupted
    bad = f"; {failed} could not be read" if failed else ""
    print(f"{len(videos)} videos{bad}; written to {job.out / CSV}")


def _rows(job: _Job, name: Path, clips: Sequence[Clip]) -> Iterator[list[Any]]:
    """The lines of a video in the table, one a budget."""
    for setting, one in zip(job.settings, job.answers(clips), strict=True):
        top = [cell for named, odds in one.top for cell in (named, f"{odds:.6f}")]
        yield [name.as_posix(), *setting, one.head, *top, ""]


def _class_names(
    model: PretrainedModel, options: Options, config: ConfigDict | None
) -> Sequence[str]:
    """From the file named, the recipe, or the checkpoint; else "class 0" and so on."""
    classes = model.config.model.classes
    path = options.class_names or (config.data.class_names if config else "")
    if not path:
        return model.config.class_names or [f"class {i}" for i in range(classes)]
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
