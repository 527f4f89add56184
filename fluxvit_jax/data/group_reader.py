"""The clips of training groups, as workers read them: without grain, and so without JAX."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

import cv2
import numpy as np
from ml_collections import ConfigDict

from fluxvit_jax.data.augmentation import MAX_SHORT_SIDE, augment_clip
from fluxvit_jax.data.captions import ClipTimes, TextArrays, clip_texts
from fluxvit_jax.data.decoding import DecodeError
from fluxvit_jax.data.frame_sampling import train_frames
from fluxvit_jax.data.grid_sampling import grid_of_group
from fluxvit_jax.data.host_share import Arrays
from fluxvit_jax.data.images import open_clip
from fluxvit_jax.data.media import turn_of_step
from fluxvit_jax.data.mixture import Mixture
from fluxvit_jax.data.multi_label import label_array
from fluxvit_jax.data.patches import PATCH_VALUES, patchify
from fluxvit_jax.data.random_streams import REPLACEMENT_STREAM, stream_rng
from fluxvit_jax.data.reading import reading_video, segment_of
from fluxvit_jax.data.sources import Record, Source
from fluxvit_jax.data.supervised_workers import Quarantine
from fluxvit_jax.errors import UserError
from fluxvit_jax.grids import PATCH, Grid, capacity

# Videos that are tried in place of a bad one. With 5 % bad videos, all fail once in 10^10 cases.
REPLACEMENTS = 8

TimedClip = tuple[np.ndarray, ClipTimes]  # uint8 [T, size, size, 3]


@runtime_checkable
class ClipData(Protocol):
    """Stored arrays of each clip, by the number of the sample."""

    @property
    def bytes_a_clip(self) -> int: ...

    def read(self, samples: np.ndarray) -> Arrays:
        """Arrays [n, ...] of `samples`, int64 [n]. Raises UserError if they cannot be read."""


@dataclasses.dataclass(repr=False)
class GroupReader:
    """Reads groups of training: group g holds the samples g * group onwards.

    See `pipeline.train_batches` for the arrays. Raises UserError when `group` is no multiple of
    `repeats`.
    """

    source: Source
    seed: int
    grids: tuple[Grid, ...]
    group: int  # clips that share a grid
    repeats: int  # clips of one decoded video
    augment: ConfigDict  # section data.augment
    clip_data: ClipData | None = None
    texts: TextArrays = clip_texts  # of captions or conversations
    multi_hot: int = 0  # classes of multi-hot labels; 0: one label a clip
    image_grids: tuple[Grid, ...] = ()  # for steps that show images
    per_step: int = 1  # groups of a training step
    open_video: Callable[..., Any] = open_clip
    quarantine: Quarantine = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        check_multiple("config.data.clips_per_grid of data.repeated_aug", self.group, self.repeats)
        self.capacity = capacity(self.grids)
        self.image_share = self.source.image_share if isinstance(self.source, Mixture) else 0.0
        self._augment_unflipped = ConfigDict({**self.augment.to_dict(), "flip": 0.0})

    def places(self, number: int) -> tuple[bool, list[int]]:
        """Whether a group shows images, and the places of its videos in their drawing order."""
        step = number // self.per_step
        turn = turn_of_step(step, self.image_share)
        # Places in the order of the medium: other steps show the other one.
        first = number * self.group + (turn.before - step) * self.per_step * self.group
        starts = range(first, first + self.group, self.repeats)
        return turn.images, [start // self.repeats for start in starts]

    def read(self, group: tuple[int, ...]) -> Arrays:
        """The arrays of a group: its number, and then the number of each of its videos."""
        number, *videos = group
        has_images, places = self.places(number)
        grids = self.image_grids if has_images else self.grids
        grid = grid_of_group(grids, self.seed, number)
        samples = np.arange(number * self.group, (number + 1) * self.group)
        patches = np.zeros((self.group, capacity(grids), PATCH_VALUES), np.uint8)
        records: list[Record] = []
        times: list[ClipTimes] = []
        failures: list[str] = []
        for first, place, video in zip(
            range(0, self.group, self.repeats), places, videos, strict=True
        ):
            rows = slice(first, first + self.repeats)
            clips, record, failure = self._read_or_replace(video, place, samples[rows], grid)
            for target, (clip, own_times) in zip(patches[rows], clips, strict=True):
                target[: grid.tokens] = patchify(clip)
                times.append(own_times)
            records += [record] * self.repeats
            failures += [failure] * self.repeats
        return {
            "patches": patches,
            "grid": np.tile(np.array(grid, np.int32), (self.group, 1)),
            "label": label_array([record.label for record in records], self.multi_hot),
            "index": samples,
            "failure": np.array(failures, np.str_),
            **(self.clip_data.read(samples) if self.clip_data else {}),
            **self.texts(records, samples, self.seed, times),
        }

    def _read_or_replace(
        self, drawn: int, place: int, samples: np.ndarray, grid: Grid
    ) -> tuple[list[TimedClip], Record, str]:
        """Clips of a video's samples, its record, and a line for each video that failed before."""
        failures: list[str] = []
        for video in self._candidates(drawn, place):
            try:
                with reading_video(self.source, video, self.quarantine) as record:
                    clips = self._clips(record, samples, grid)
                return clips, record, "\n".join(failures)
            except DecodeError as error:
                failures.append(f"{error.path}: {error.reason}")
        raise UserError(
            f"config.data.train: {len(failures)} videos in a row cannot be read; {failures[0]}"
        )

    def _candidates(self, video: int, place: int) -> Iterator[int]:
        """The video that was drawn at a place, then its replacements, all different."""
        yield video
        rng = stream_rng(self.seed, place, REPLACEMENT_STREAM)
        among = np.arange(len(self.source))
        if isinstance(self.source, Mixture):
            among = self.source.like(video)
        others = rng.choice(among, min(REPLACEMENTS + 1, len(among)), replace=False)
        yield from [int(other) for other in others if other != video][:REPLACEMENTS]

    def _clips(self, record: Record, samples: np.ndarray, grid: Grid) -> list[TimedClip]:
        """An augmented clip for each sample, from one decode."""
        rngs = [stream_rng(self.seed, int(sample)) for sample in samples]
        augment = self.augment if record.flip else self._augment_unflipped
        with self.open_video(record.video) as opened:
            first, end = segment_of(record, opened)
            rate = opened.frame_rate
            indices = [first + train_frames(end - first, grid.frames, rng) for rng in rngs]
            frames = opened.read(np.concatenate(indices), MAX_SHORT_SIDE, cv2.INTER_AREA)
        size = grid.rows * PATCH
        period = 1 / rate if rate else 0.0
        clips = np.split(frames, len(rngs))
        return [
            (
                augment_clip(clip, size, augment, rng),
                ClipTimes((end - first) * period, (own - first) * period),
            )
            for clip, rng, own in zip(clips, rngs, indices, strict=True)
        ]


def check_multiple(what: str, value: int, unit: int) -> None:
    """Raises UserError if it is not."""
    if value % unit:
        nearest = max(1, round(value / unit)) * unit
        raise UserError(f"{what}: {value} is no multiple of {unit}; the nearest is {nearest}")
