"""Format of a prepared folder: the records of its shards, and the metadata of TFDS."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

# Not public: `tfds.features` serializes too, but with fields in any order, and the bytes of a
# resumed run must equal those of an undisturbed one.
from tensorflow_datasets.core.example_serializer import ExampleSerializer

from fluxvit_jax.data.durable_files import move
from fluxvit_jax.data.sources import Example

DATASET = "videos"  # its name in TFDS, with which the names of shards begin


def features(
    class_names: Sequence[str] | None, captioned: bool = False
) -> tfds.features.FeaturesDict:
    """Features of a record: id, label and the content of the video file.

    captioned: with captions and segment, the frame numbers of `Example.segment` or -1, -1.
    """
    label = tfds.features.ClassLabel(names=list(class_names)) if class_names else np.int64
    video = tfds.features.Scalar(np.bytes_)
    own = {"id": tfds.features.Text(), "label": label, "video": video}
    if captioned:
        own["captions"] = tfds.features.Sequence(tfds.features.Text())
        own["segment"] = tfds.features.Tensor(shape=(2,), dtype=np.int64)
    return tfds.features.FeaturesDict(own)


_SERIALIZERS = {
    captioned: ExampleSerializer(features(None, captioned).get_serialized_info())
    for captioned in (False, True)
}


def serialize(example: Example, video: bytes) -> bytes:
    """The record of a video, always the same bytes."""
    values: dict[str, Any] = {"id": example.id.encode(), "label": example.label, "video": video}
    if example.captions:
        values["captions"] = np.array([text.encode() for text in example.captions], object)
        values["segment"] = np.array(example.segment or (-1, -1), np.int64)
    serializer = _SERIALIZERS[bool(example.captions)]
    return serializer.get_tf_example(values).SerializeToString(deterministic=True)


def shard_paths(out: Path, split: str, count: int) -> list[Path]:
    """The paths of all `count` shards of a split."""
    template = _filename_template(out, split)
    return [
        Path(template.sharded_filepath(shard_index=index, num_shards=count))
        for index in range(count)
    ]


def write_metadata(
    out: Path,
    work: Path,
    split: str,
    about: dict[str, Any],
    class_names: Sequence[str] | None,
    shard_lengths: list[int],
    num_bytes: int,
    info: Any,
) -> None:
    """Adds a split to the metadata of a folder, dataset_info.json last: it makes it valid.

    work: folder for unfinished files. about: what metadata.json keeps of the split. info: the
    `tfds.core.DatasetInfo` of the splits that are finished, None if there are none.
    """
    split_info = tfds.core.SplitInfo(
        name=split,
        shard_lengths=shard_lengths,
        num_bytes=num_bytes,
        filename_template=_filename_template(out, split),
    )
    splits = {**(info.splits if info else {}), split: split_info}
    metadata = {**(info.metadata["splits"] if info else {}), split: about}
    new = tfds.core.DatasetInfo(
        builder=tfds.core.DatasetIdentity(
            name=DATASET, version=tfds.core.Version("1.0.0"), data_dir=str(out), module_name=""
        ),
        features=features(class_names, "captions" in about),
        metadata=tfds.core.MetadataDict(splits={name: metadata[name] for name in sorted(splits)}),
    )
    new.set_file_format("array_record")
    new.set_splits(tfds.core.SplitDict([splits[name] for name in sorted(splits)]))
    folder = work / "metadata"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    new.write_to_directory(folder)
    for file in sorted(folder.iterdir(), key=lambda file: file.name == "dataset_info.json"):
        move(file, out / file.name)


def _filename_template(out: Path, split: str) -> tfds.core.ShardedFileTemplate:
    return tfds.core.ShardedFileTemplate(
        data_dir=out, dataset_name=DATASET, split=split, filetype_suffix="array_record"
    )
