"""The videos of an evaluation with their views, each an item that workers make."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from fluxvit_jax.data.decoding import DecodeError, Video
from fluxvit_jax.data.host_share import Arrays, NumberedItems
from fluxvit_jax.data.images import open_clip
from fluxvit_jax.data.multi_label import label_array
from fluxvit_jax.data.patches import PATCH_VALUES
from fluxvit_jax.data.reading import part_of, reading_video
from fluxvit_jax.data.sources import Label, Source
from fluxvit_jax.data.supervised_workers import Quarantine
from fluxvit_jax.data.views import Views, cut_views, read_frames
from fluxvit_jax.grids import Grid

# Limit of one video's frames at full size while views are cut. A larger video is decoded once for
# each resolution instead and scaled down while decoding; the views are the same.
MAX_DECODED_BYTES = 512 << 20


@dataclasses.dataclass(repr=False)
class EvaluationVideos(NumberedItems):
    """The videos of a source with their views: item i is video i, and padding beyond the last.

    See `evaluation_batches` for the arrays, which have a leading axis of 1 here.
    """

    source: Source
    grids: tuple[Grid, ...]
    views: Views
    multi_hot: int = 0  # as in `TrainGroups`
    open_video: Callable[..., Any] = open_clip
    quarantine: Quarantine = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, number: int) -> Arrays:
        label: Label = () if self.multi_hot else 0
        length, rate = 0, 0.0
        video, name, failure, views = -1, "", "", None
        if number < len(self.source):
            video = number
            try:
                with reading_video(self.source, number, self.quarantine) as record:
                    name, label = record.id, record.label
                    with self.open_video(record.video) as opened:
                        part = part_of(record, opened)
                        views = self._views(part)
                        length, rate = len(part), part.frame_rate or 0.0
            except DecodeError as error:
                name, failure = error.path, error.reason
                if self.source.labels is not None:  # what is in quarantine is not opened
                    label = self.source.labels[number]
        item = {
            "video": np.array([video], np.int64),
            "id": np.array([name], np.str_),
            "label": label_array([label], self.multi_hot),
            "failure": np.array([failure], np.str_),
            "length": np.array([length], np.int64),
            "frame_rate": np.array([rate], np.float64),
        }
        if views is None:
            shape = (self.views.count,)
            views = [np.zeros((*shape, g.tokens, PATCH_VALUES), np.uint8) for g in self.grids]
        return item | {f"patches{k}": patches[None] for k, patches in enumerate(views)}

    def _views(self, video: Video) -> list[np.ndarray]:
        """Patches uint8 [V, P, 588] on each grid."""
        read = partial(read_frames, video, views=self.views, most_bytes=MAX_DECODED_BYTES)
        shared = read(self.grids)
        views = []
        for grid in self.grids:
            frames = shared or read([grid], short_side=grid.resolution)
            assert frames is not None  # scaled down, they are never too large
            views.append(cut_views(frames, grid, self.views))
        return views
