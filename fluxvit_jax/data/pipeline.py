"""Batches of patches from a source of videos, independent of the number of hosts and workers.

Training is an endless sequence of groups of clips (`TrainGroups`), evaluation a sequence of videos
(`EvaluationVideos`). Any item can be made anywhere from its number alone: grids, frames and
augmentation are drawn from the seed and that number. A host takes its share of each global batch
(`HostShare`), worker processes make the items (`supervised_workers`), and `Batches` concatenates
them in order. So the data depend neither on the number of hosts or workers nor on interruptions,
and the only state to save is the number of delivered batches.

Workers deliver single items instead of batches: the first batch comes sooner, hosts get consecutive
samples, and memory is bounded by `BUFFERED_ITEMS` items a worker, however large the batch. Worker
processes are spawned and import `__main__`, so the program needs its `__main__` guard.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from typing import Any

import cv2
import grain
import numpy as np
from ml_collections import ConfigDict

from fluxvit_jax.config.grids import admissible_grids, image_grids
from fluxvit_jax.data.annotations import open_source
from fluxvit_jax.data.captions import TextArrays, clip_texts
from fluxvit_jax.data.class_balance import BalancedOrder, source_labels
from fluxvit_jax.data.evaluation_videos import EvaluationVideos
from fluxvit_jax.data.group_reader import ClipData, GroupReader, check_multiple
from fluxvit_jax.data.host_share import Arrays, HostShare, Make, make_numbered
from fluxvit_jax.data.mixture import Mixture, open_mixture
from fluxvit_jax.data.multi_label import multi_hot_classes
from fluxvit_jax.data.patches import PATCH_VALUES
from fluxvit_jax.data.sources import Source, training_part
from fluxvit_jax.data.splits import configured_names
from fluxvit_jax.data.supervised_workers import (
    Quarantine,
    SupervisedWorkers,
    check_shared_memory,
)
from fluxvit_jax.data.views import views_of
from fluxvit_jax.errors import UserError
from fluxvit_jax.grids import Grid

# Items that a worker can be ahead, the one that it is making included. Each lies in shared memory.
BUFFERED_ITEMS = 4
DYING = (
    "config.data.workers: a worker that reads data {}; lower data.workers or the batch size and "
    "start the same command again: training goes on from its last checkpoint"
)


def plan_groups(config: ConfigDict, source: Source) -> int:
    """Number of groups after which grids, frames and crops repeat; 0 if they never do."""
    data = config.data
    return data.sampling_period_epochs * len(source) * data.repeated_aug // data.clips_per_grid


def training_source(config: ConfigDict, labelled: bool = True, captioned: bool = False) -> Source:
    """The training source of `config.data`; a mixture of sources if labels are not needed.

    captioned: whether its videos have captions.

    Raises UserError: as `open_source`, or as `open_mixture`.
    """
    data = config.data
    if not labelled:
        return open_mixture(data.train, data.root, captioned)
    listed = open_source(
        data.train,
        data.root,
        config.model.classes,
        known=configured_names(config),
        multi_label=config.train.multi_label,
    )
    return training_part(listed, data.holdout_fraction)


def train_batches(
    config: ConfigDict,
    source: Source,
    *,
    start_step: int = 0,
    groups: Sequence[int] | None = None,
    clip_data: ClipData | None = None,
    texts: TextArrays = clip_texts,
    quarantine: Quarantine | None = None,
) -> "Batches":
    """Endless iterator over this host's share of each global batch of augmented clips.

    A batch is a dict of the b clips of `groups`:
      patches: uint8 [b, P, 588], zero-padded; P fits every admissible grid.
      grid: int32 [b, 3], frames, rows and columns; equal within each `data.clips_per_grid` clips.
      label: int32 [b]; with `train.multi_label` multi-hot uint8 [b, classes].
      index: int64 [b], the global number of the sample.
      failure: str [b]; if the clip replaces one that could not be read, a line "id: reason" for
        each video that failed, on all repeats of the video; else "".
    and the arrays of `clip_data`, and those of `texts` if the source has captions or conversations.

    Sample i is repeat `i % repeats` of video `order[i // repeats]`. `order` concatenates seeded
    permutations of all videos, one per epoch, without dropping or padding: a batch may cross
    epochs. So a run of floor(videos * repeats / batch_size) steps an epoch slowly falls behind the
    permutations, and still shows all videos equally often, to within one. With `data.sampling` of
    "balanced", `order` is `BalancedOrder`; a video that replaces one that cannot be read may be of
    any class.

    Args:
      start_step: global batches delivered before: `state()["step"]` of the interrupted iterator.
      groups: the groups of a global batch that this host makes, out of train.batch_size /
        data.clips_per_grid; all by default.
      clip_data: stored arrays of the clips, added to each batch.
      texts: what makes arrays of captions or conversations.
      quarantine: clips, by id, that are bad without being tried; grows by those that hang or crash
        their reader.

    Raises:
      UserError: no videos; a batch size that does not divide into groups, or groups not into
        repeats; too little shared memory; on `next`, a bad video whose replacements are bad as
        well.
    """
    if not len(source):
        raise UserError("config.data.train: there are no videos to train on")
    quarantine = {} if quarantine is None else quarantine
    group = config.data.clips_per_grid
    items = TrainGroups(
        source=source,
        seed=config.seed,
        grids=admissible_grids(config),
        group=group,
        repeats=config.data.repeated_aug,
        augment=config.data.augment,
        period=plan_groups(config, source),
        clip_data=clip_data,
        texts=texts,
        balanced=config.data.sampling == "balanced",
        multi_hot=multi_hot_classes(config),
        image_grids=image_grids(config),
        per_step=config.train.batch_size // group,
        quarantine=quarantine,
    )
    check_multiple("config.train.batch_size of data.clips_per_grid", config.train.batch_size, group)
    share = HostShare(items, items.per_step, groups, start_step)
    item_bytes = group * items.capacity * PATCH_VALUES
    item_bytes += group * clip_data.bytes_a_clip if clip_data else 0
    return Batches(
        share,
        share.per_batch,
        config.data.workers,
        item_bytes,
        start_step,
        clip_seconds=config.data.clip_seconds,
        quarantine=quarantine,
    )


def evaluation_batches(
    config: ConfigDict,
    source: Source,
    grids: Sequence[Grid],
    *,
    batch_size: int = 0,
    rows: Sequence[int] | None = None,
    quarantine: Quarantine | None = None,
) -> "Batches":
    """Iterator over this host's share of the evaluation videos, each once and decoded once.

    A batch is a dict of the b videos of `rows`, with V views of each in the order of `Views.order`:
      video: int64 [b], number in the source; -1 for padding.
      id: str [b], its id in the source.
      label: int32 [b]; with `train.multi_label` multi-hot uint8 [b, classes].
      failure: str [b], why the video could not be read (its patches are zeros then); else "".
      length: int64 [b], frames of the video; frame_rate: float64 [b], per second; 0: not known.
      patches0, patches1, ...: uint8 [b, V, P, 588] for each of `grids`, where P is its tokens.

    All hosts yield the same number of batches; the last one is padded.

    Args:
      batch_size: videos of a batch over all hosts; by default eval.batch_size.
      rows: the rows of a batch that this host reads; all by default.
      quarantine: as in `train_batches`.

    Raises UserError when there is too little shared memory.
    """
    quarantine = {} if quarantine is None else quarantine
    videos = EvaluationVideos(
        source=source,
        grids=tuple(grids),
        views=views_of(config),
        multi_hot=multi_hot_classes(config),
        quarantine=quarantine,
    )
    share = HostShare(videos, batch_size or config.eval.batch_size, rows)
    item_bytes = videos.views.count * sum(grid.tokens for grid in videos.grids) * PATCH_VALUES
    return Batches(
        share,
        share.per_batch,
        config.data.workers,
        item_bytes,
        clip_seconds=config.data.clip_seconds,
        quarantine=quarantine,
    )


class Batches(Iterator[Arrays]):
    """Iterator over batches of `per_batch` items each, made by `workers` processes (0: in place).

    A batch concatenates the arrays of its items along their leading axis. Clips that hang or crash
    a worker go into `quarantine`, and the items that hold them are made again. Any other failure is
    final: every later `next` fails too. Close it, or use `with`.

    Raises UserError when `workers` need more shared memory than there is; on `next`, when they die
    again and again.
    """

    def __init__(
        self,
        items: HostShare,
        per_batch: int,
        workers: int,
        item_bytes: int,
        start_step: int = 0,
        clip_seconds: float = 0.0,
        quarantine: Quarantine | None = None,
    ):
        self._items, self._per_batch, self._step = items, per_batch, start_step
        self._num_submitted = self._num_taken = 0
        self._arrived: dict[int, Any] = {}  # items that were made, by number
        self._batch: list[Arrays] = []  # the items so far of the next batch
        self._error: BaseException | None = None
        self._ahead = workers * BUFFERED_ITEMS
        self._workers: SupervisedWorkers | None = None
        if workers:
            check_shared_memory("config.data.workers", (self._ahead + per_batch) * item_bytes)
            self._workers = SupervisedWorkers(
                partial(make_numbered, items.make),
                workers,
                clip_seconds,
                {} if quarantine is None else quarantine,
                BUFFERED_ITEMS,
                DYING,
            )
        else:
            cv2.setNumThreads(0)

    def __next__(self) -> Arrays:
        batch = self.next_unless(lambda: False)
        assert batch is not None  # nothing stops the wait
        return batch

    def next_unless(self, stop: Callable[[], bool]) -> Arrays | None:
        """The next batch, or None once `stop` returns True, which is asked again and again.

        Without workers it is not asked. Raises StopIteration at the end.
        """
        if self._error is not None:
            raise RuntimeError("reading the data has failed before") from self._error
        try:
            while len(self._batch) < self._per_batch:
                item = self._next_item(stop)
                if item is None:
                    return None
                self._batch.append(item)
        except StopIteration:
            self.close()
            raise
        except BaseException as error:
            self._error = error
            self.close()
            raise
        items, self._batch = self._batch, []
        self._step += 1
        if self._workers:
            self._workers.went_on()
        return {name: np.concatenate([item[name] for item in items]) for name in items[0]}

    def _next_item(self, stop: Callable[[], bool]) -> Arrays | None:
        number = self._num_taken
        if number == len(self._items):
            raise StopIteration
        made = self._made_by(self._workers, number, stop) if self._workers else self._items[number]
        self._num_taken += made is not None
        return made

    def _made_by(
        self, workers: SupervisedWorkers, number: int, stop: Callable[[], bool]
    ) -> Arrays | None:
        """The item of a number, the next one to take; None once `stop` returns True."""
        last = min(number + self._ahead, len(self._items))
        for following in range(self._num_submitted, last):
            workers.submit((following, self._items.plan(following)))
        self._num_submitted = max(self._num_submitted, last)
        while number not in self._arrived:
            if stop():
                return None
            self._arrived |= {own: item for (own, _), item in workers.finished()}
        item = self._arrived.pop(number)
        if isinstance(item, Exception):
            raise item
        return item

    def state(self) -> dict[str, int]:
        """The state to resume from, as JSON: {"step": global batches delivered}."""
        return {"step": self._step}

    def close(self) -> None:
        """Stops the workers."""
        if self._workers:
            self._workers.close()
        self._arrived, self._batch = {}, []

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclasses.dataclass(repr=False)
class TrainGroups(GroupReader):
    """The endless sequence of training groups, in the order in which videos are drawn."""

    period: int = 0  # number of groups after which they repeat; 0: never
    balanced: bool = False  # whether all classes are drawn equally often

    def __post_init__(self) -> None:
        super().__post_init__()
        # The numbers of the videos in drawing order, epoch after epoch.
        self._order: Any  # a grain.MapDataset, which ships no types
        if self.balanced:
            self._order = BalancedOrder(source_labels(self.source, "data.sampling"), self.seed)
        elif isinstance(self.source, Mixture):
            if self.image_share < 1:
                self._order = self.source.order(self.seed)
            if self.image_share:
                self._image_order = self.source.order(self.seed, images=True)
        else:
            numbers = grain.MapDataset.range(len(self.source))
            self._order = numbers.seed(self.seed).shuffle().repeat()

    def __len__(self) -> int:
        return 2**62

    def __getitem__(self, number: int) -> Arrays:
        return self.read(self.plan(number))

    def plan(self, number: int) -> tuple[int, ...]:
        """The number of a group, and then the number of each of its videos."""
        number = number % self.period if self.period else number
        has_images, places = self.places(number)
        order = self._image_order if has_images else self._order
        return (number, *(int(order[place]) for place in places))

    @cached_property
    def make(self) -> Make:
        """What worker processes get: the reader without the order, which needs grain."""
        fields = dataclasses.fields(GroupReader)
        return GroupReader(**{field.name: getattr(self, field.name) for field in fields}).read
