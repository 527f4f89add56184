"""From a source of videos to batches of patches, the same whatever machines and workers make them.

Training is an endless sequence of groups of clips (`TrainGroups`), evaluation a sequence of videos
(`EvaluationVideos`). Any item of them can be made anywhere from its number alone: grids, frames and
augmentation are drawn from the seed and that number. A host takes its share of each global batch
(`HostShare`), Grain's worker processes make the items, and `Batches` puts them together in order.
So nothing changes with the number of hosts or workers, or when a run stops and goes on, and all
there is to remember is how many batches were delivered.

Workers hand over single items instead of batches: the first batch comes sooner, hosts get
consecutive samples, and memory is bounded by `HELD_ITEMS` items a worker, however large the batch.
Worker processes start anew and import `__main__`, so the program needs its `__main__` guard.
"""

import contextlib
import dataclasses
import gc
import multiprocessing
import multiprocessing.resource_tracker
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import cv2
import grain
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from fluxvit_jax.budgets import PATCH, Grid, capacity
from fluxvit_jax.config import admissible_grids, is_distillation
from fluxvit_jax.data.annotations import Record, Source, open_source, training_part
from fluxvit_jax.data.augment import MAX_SHORT_SIDE, augment_clip
from fluxvit_jax.data.decode import DecodeError, Video
from fluxvit_jax.data.images import open_clip
from fluxvit_jax.data.lessons import Lessons, plan_groups
from fluxvit_jax.data.mixture import Mixture, open_mixture
from fluxvit_jax.data.patches import PATCH_VALUES, patchify
from fluxvit_jax.data.sampling import grid_of_group, stream_rng, train_frames
from fluxvit_jax.data.views import cut_views, read_frames
from fluxvit_jax.errors import UserError

# What takes the place of a bad video; beside the streams of `sampling`.
REPLACEMENT_STREAM = 2
# Videos that are tried in place of a bad one. With 5 % bad ones, all fail once in 10^10 times.
REPLACEMENTS = 8

# Items that a worker can be ahead: ready and waiting (1), queued (1), and received (2). Each lies
# in shared memory; one more is being made.
HELD_ITEMS = 4
SHARED_MEMORY = "/dev/shm"  # where Linux keeps it
MIN_SHARED_BYTES = 1 << 16  # smaller arrays are cheaper to copy

# Frames of one video kept at full size while views are cut; a video of more is decoded once for
# each resolution instead, scaled down on the way. The views are the same.
MAX_DECODED_BYTES = 512 << 20

Arrays = dict[str, np.ndarray]


def training_source(config: ConfigDict) -> Source:
    """What `config.data` says to train on.

    Raises UserError: as `open_source`, or `open_mixture` where no labels are wanted.
    """
    data = config.data
    if is_distillation(config):
        return open_mixture(data.train, data.root)
    return training_part(open_source(data.train, data.root, config.model.classes), data.held_out)


def train_batches(
    config: ConfigDict,
    source: Source,
    *,
    start_step: int = 0,
    groups: Sequence[int] | None = None,
    lessons: Lessons | None = None,
) -> "Batches":
    """This host's share of each global batch of augmented clips, without end.

    A batch is a dict of the b clips of `groups`:
      patches: uint8 [b, P, 588], zeros behind a clip's own tokens; P fits every admissible grid.
      grid: int32 [b, 3], frames, rows and columns; equal within each `data.grid_group` clips.
      label: int32 [b].
      index: int64 [b], the global number of the sample.
      failure: str [b]; where the clip stands for one that could not be read, a line for each video
        that failed: "id: reason". All repeats of a video say so.
    and the arrays of `lessons`.

    Sample i is augmentation i % repeats of the video at place i // repeats of the epochs' order.
    Each epoch is a fresh permutation of all videos, seeded, and the next follows at once: a batch
    may hold the end of one epoch and the start of the next, nothing is dropped or repeated to fill
    it. So a run of floor(videos * repeats / batch_size) steps an epoch slowly falls behind the
    permutations, and still shows all videos equally often, to within one.

    Args:
      start_step: global batches delivered before, `state()["step"]` of the iterator to go on from.
      groups: which groups of a global batch this host makes, of train.batch_size / grid_group; all
        by default.
      lessons: what a teacher has made of the clips before.

    Raises:
      UserError: no videos; a batch size that does not divide into groups, or groups not into
        repeats; too little shared memory; on `next`, a bad video of which the replacements
        are bad as well.
    """
    if not len(source):
        raise UserError("config.data.train: there are no videos to train on")
    group = config.data.grid_group
    items = TrainGroups(
        source=source,
        seed=config.seed,
        grids=admissible_grids(config),
        group=group,
        repeats=config.data.repeats,
        augment=config.data.augment,
        period=plan_groups(config, source),
        lessons=lessons,
    )
    _check_multiple("config.train.batch_size of data.grid_group", config.train.batch_size, group)
    whole = config.train.batch_size // group
    share = HostShare(items, whole, groups, start_step)
    item_bytes = group * items.capacity * PATCH_VALUES
    item_bytes += group * lessons.bytes_a_clip if lessons else 0
    return Batches(share, share.per_batch, config.data.workers, item_bytes, start_step)


def evaluation_batches(
    config: ConfigDict,
    source: Source,
    grids: Sequence[Grid],
    *,
    batch_size: int = 0,
    rows: Sequence[int] | None = None,
) -> "Batches":
    """This host's share of the videos to evaluate, each once; all grids and views of one decode.

    A batch is a dict of the b videos of `rows`, with V = clips * crops views of each, clip by clip:
      video: int64 [b], number in the source; -1 where there is none any more.
      id: str [b], its id in the source.
      label: int32 [b].
      failure: str [b], why a video could not be read; its patches are zeros then. Else "".
      patches0, patches1, ...: uint8 [b, V, P, 588] for each of `grids`, P being its tokens.

    All hosts yield as many batches, the last of them filled up with -1.

    Args:
      batch_size: videos of a batch over all hosts; by default eval.batch_size.
      rows: which of them this host reads; all by default.

    Raises UserError when there is too little shared memory.
    """
    videos = EvaluationVideos(
        source=source,
        grids=tuple(grids),
        clips=config.eval.clips,
        crops=config.eval.crops,
    )
    share = HostShare(videos, batch_size or config.eval.batch_size, rows)
    views = config.eval.clips * config.eval.crops
    item_bytes = views * sum(grid.tokens for grid in videos.grids) * PATCH_VALUES
    return Batches(share, share.per_batch, config.data.workers, item_bytes)


class Batches(Iterator[Arrays]):
    """Iterator over batches of `per_batch` items each, made by `workers` processes (0: in place).

    An item is a dict of arrays with a leading axis; a batch has them one behind another. Whatever
    goes wrong is final, be it an exception in a worker or its death: every later `next` fails too,
    where Grain would go on without the items of that worker. Close it, or use `with`.

    Raises UserError when `workers` need more shared memory than there is.
    """

    def __init__(
        self,
        items: Sequence[Arrays],
        per_batch: int,
        workers: int,
        item_bytes: int,
        start_step: int = 0,
    ):
        self._per_batch = per_batch
        self._step = start_step
        self._error: BaseException | None = None
        if workers:
            _check_shared_memory((workers * HELD_ITEMS + per_batch) * item_bytes)
        self._items = _start(items, workers)
        self._begun = False

    def __next__(self) -> Arrays:
        if self._error is not None:
            raise RuntimeError("reading the data has failed before") from self._error
        try:
            items = [self._next_item() for _ in range(self._per_batch)]
        except StopIteration:
            self.close()
            raise
        except BaseException as error:  # an interrupt too: the items so far are lost with it
            self._error = error
            self.close()
            raise
        self._step += 1
        # As plain arrays: those of a worker are of a class that carries its shared memory along.
        return {
            name: np.concatenate([np.asarray(item[name]) for item in items]) for name in items[0]
        }

    def _next_item(self) -> Arrays:
        if self._begun:
            return next(self._items)
        self._begun = True
        with _stop_signals_blocked():  # Grain starts its workers now
            return next(self._items)

    def state(self) -> dict[str, int]:
        """What resumes this iterator, as JSON: {"step": global batches delivered}."""
        return {"step": self._step}

    def close(self) -> None:
        """Ends the workers."""
        items, self._items = self._items, iter(())
        if isinstance(items, grain.DatasetIterator):
            items.close()
        # Grain's iterator is part of a cycle, and with it the last items' shared memory.
        del items
        gc.collect()

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclasses.dataclass(repr=False)
class TrainGroups(Sequence[Arrays]):
    """The endless sequence of training groups: item g holds the samples g * group onwards.

    See `train_batches` for the arrays. Raises UserError when `group` is no multiple of `repeats`.
    """

    source: Source
    seed: int
    grids: tuple[Grid, ...]
    group: int  # clips that share a grid
    repeats: int  # clips of one decoded video
    augment: ConfigDict  # section data.augment
    period: int = 0  # groups after which they repeat; 0: never
    lessons: Lessons | None = None
    open_video: Callable[..., Any] = open_clip

    def __post_init__(self):
        _check_multiple("config.data.grid_group of data.repeats", self.group, self.repeats)
        self.capacity = capacity(self.grids)
        # Place in the epochs -> video.
        if isinstance(self.source, Mixture):
            self._order = self.source.order(self.seed)
        else:
            places = grain.MapDataset.range(len(self.source))
            self._order = places.seed(self.seed).shuffle().repeat()
        self._augment_unflipped = ConfigDict({**self.augment.to_dict(), "flip": 0.0})

    def __len__(self) -> int:
        return 2**62

    def __getitem__(self, number: int) -> Arrays:
        number = number % self.period if self.period else number
        grid = grid_of_group(self.grids, self.seed, number)
        samples = np.arange(number * self.group, (number + 1) * self.group)
        patches = np.zeros((self.group, self.capacity, PATCH_VALUES), np.uint8)
        labels, failures = [], []
        for first in range(0, self.group, self.repeats):
            own = slice(first, first + self.repeats)
            clips, label, failure = self._read_or_replace(samples[own], grid)
            for target, clip in zip(patches[own], clips, strict=True):
                target[: grid.tokens] = patchify(clip)
            labels += [label] * self.repeats
            failures += [failure] * self.repeats
        return {
            "patches": patches,
            "grid": np.tile(np.array(grid, np.int32), (self.group, 1)),
            "label": np.array(labels, np.int32),
            "index": samples,
            "failure": np.array(failures, np.str_),
            **(self.lessons.read(samples) if self.lessons else {}),
        }

    def _read_or_replace(
        self, samples: np.ndarray, grid: Grid
    ) -> tuple[list[np.ndarray], int, str]:
        """Clips of a video's samples, its label, and a line for each video that failed before."""
        place = int(samples[0]) // self.repeats
        failures = []
        for video in self._candidates(place):
            record = self.source[video]
            try:
                return self._clips(record, samples, grid), record.label, "\n".join(failures)
            except DecodeError as error:
                failures.append(f"{record.id}: {error.reason}")
        raise UserError(
            f"config.data.train: {len(failures)} videos in a row cannot be read; {failures[0]}"
        )

    def _candidates(self, place: int) -> Iterator[int]:
        """The video at a place of the epochs' order, then those to replace it, all different."""
        video = int(self._order[place])
        yield video
        rng = stream_rng(self.seed, place, REPLACEMENT_STREAM)
        count = len(self.source)
        others = rng.choice(count, min(REPLACEMENTS + 1, count), replace=False)
        yield from [int(other) for other in others if other != video][:REPLACEMENTS]

    def _clips(self, record: Record, samples: np.ndarray, grid: Grid) -> list[np.ndarray]:
        """An augmented clip uint8 [T, size, size, 3] for each sample, of one decode."""
        rngs = [stream_rng(self.seed, int(sample)) for sample in samples]
        augment = self.augment if record.flip else self._augment_unflipped
        with self.open_video(record.video) as opened:
            indices = [train_frames(len(opened), grid.frames, rng) for rng in rngs]
            frames = opened.read(np.concatenate(indices), MAX_SHORT_SIDE, cv2.INTER_AREA)
        size = grid.rows * PATCH
        clips = np.split(frames, len(rngs))
        return [
            augment_clip(clip, size, augment, rng) for clip, rng in zip(clips, rngs, strict=True)
        ]


@dataclasses.dataclass(repr=False)
class EvaluationVideos(Sequence[Arrays]):
    """The videos of a source with their views: item i is video i, and there is padding beyond.

    See `evaluation_batches` for the arrays, which have a leading axis of 1 here.
    """

    source: Source
    grids: tuple[Grid, ...]
    clips: int
    crops: int
    open_video: Callable[..., Any] = open_clip

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, number: int) -> Arrays:
        video, name, label, failure, views = -1, "", 0, "", None
        if number < len(self.source):
            record = self.source[number]
            video, name, label = number, record.id, record.label
            try:
                with self.open_video(record.video) as opened:
                    views = self._views(opened)
            except DecodeError as error:
                failure = error.reason
        item = {
            "video": np.array([video], np.int64),
            "id": np.array([name], np.str_),
            "label": np.array([label], np.int32),
            "failure": np.array([failure], np.str_),
        }
        if views is None:
            shape = (self.clips * self.crops,)
            views = [np.zeros((*shape, g.tokens, PATCH_VALUES), np.uint8) for g in self.grids]
        return item | {f"patches{k}": patches[None] for k, patches in enumerate(views)}

    def _views(self, video: Video) -> list[np.ndarray]:
        """Patches uint8 [V, P, 588] on each grid."""
        read = partial(read_frames, video, clips=self.clips, most_bytes=MAX_DECODED_BYTES)
        frames = read(self.grids)
        return [
            cut_views(
                frames or read([grid], short_side=grid.rows * PATCH), grid, self.clips, self.crops
            )
            for grid in self.grids
        ]


@dataclasses.dataclass(repr=False)
class HostShare(Sequence[Arrays]):
    """The items that one host makes: those at `places` of each global batch of `whole`, in order.

    Its length is a whole number of batches, the same for all hosts, so it may ask `items` for
    numbers beyond their length.
    """

    items: Sequence[Arrays]
    whole: int
    places: Sequence[int] | None = None  # all
    start_step: int = 0

    def __post_init__(self):
        self.places = [int(p) for p in (range(self.whole) if self.places is None else self.places)]

    @property
    def per_batch(self) -> int:
        return len(self.places)

    def __len__(self) -> int:
        batches = -(-len(self.items) // self.whole)
        return max(0, batches - self.start_step) * self.per_batch

    def __getitem__(self, number: int) -> Arrays:
        step, place = divmod(number, self.per_batch)
        return self.items[(self.start_step + step) * self.whole + self.places[place]]


def _start(items: Sequence[Arrays], workers: int) -> grain.DatasetIterator:
    """Iterates over `items` in order, made by `workers` processes."""
    if not flags.FLAGS.is_parsed():  # Grain asks absl's flags, which only `main` parses
        flags.FLAGS.mark_as_parsed()
    dataset = grain.MapDataset.source(items).to_iter_dataset(
        grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    )
    if not workers:
        cv2.setNumThreads(0)
        return iter(dataset)
    options = grain.experimental.DatasetOptions(min_shm_size=MIN_SHARED_BYTES)
    dataset = grain.experimental.WithOptionsIterDataset(dataset, options)
    processes = grain.multiprocessing.MultiprocessingOptions(
        num_workers=workers, per_worker_buffer_size=1
    )
    return iter(dataset.mp_prefetch(processes, worker_init_fn=_start_worker))


def _start_worker(index: int, count: int) -> None:
    """Runs first in each worker."""
    cv2.setNumThreads(0)  # the workers themselves are the parallelism
    # Should it be killed, the workers must not outlive it.
    threading.Thread(target=_exit_with_parent, daemon=True).start()


@contextlib.contextmanager
def _stop_signals_blocked() -> Iterator[None]:
    """Keeps Ctrl-C and SIGTERM waiting, and from what is started meanwhile for good.

    Sent to all processes of a job, they are for the main one to act on: it ends the workers. These
    inherit the mask, so that no signal can hit them while they still import.
    """
    # Python starts this process beside the first worker, and unblocks the signals then.
    multiprocessing.resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _exit_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _check_multiple(what: str, value: int, unit: int) -> None:
    if value % unit:
        nearest = max(1, round(value / unit)) * unit
        raise UserError(f"{what}: {value} is no multiple of {unit}; the nearest is {nearest}")


def _check_shared_memory(needed: int) -> None:
    """Without this, a worker in a container of 64 MB shared memory just dies of a bus error."""
    if not os.path.isdir(SHARED_MEMORY):
        return
    free = shutil.disk_usage(SHARED_MEMORY).free
    if needed > free:
        raise UserError(
            f"config.data.workers: the workers need {needed >> 20} MB of shared memory and "
            f"{SHARED_MEMORY} has {free >> 20} free; enlarge it (docker: --shm-size) or use fewer"
        )
