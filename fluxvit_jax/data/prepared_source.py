"""Sources of videos that `prepare` wrote: records of array_record, read by TFDS."""

import dataclasses
import os
import re
from typing import Any

from fluxvit_jax.data.sources import Record
from fluxvit_jax.distributed import storage
from fluxvit_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class PreparedSource:
    """One split of a folder written by `prepare`."""

    folder: str
    records: Any  # TFDS's data source: a random-access sequence of dicts of id, label, video
    class_names: tuple[str, ...] | None
    fingerprint: str
    identity: dict[str, int | str]
    classes: int  # as many as there are names, or as the largest label tells
    images: bool = False  # whether it is of images with captions
    ids: None = None
    labels: None = None
    files: None = None

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(index)
        try:
            record = self.records[index]
        except RuntimeError as error:  # by the checksums of array_record, one for each record
            shown = f"{os.path.basename(self.folder)}, record {index}"
            return Record(shown, 0, b"", failure=f"the shard is damaged here: {error}")
        name = record["id"].decode(errors="backslashreplace")
        if "captions" not in record:
            return Record(name, int(record["label"]), record["video"])
        first, end = map(int, record["segment"])
        return Record(
            name,
            int(record["label"]),
            record["video"],
            captions=tuple(text.decode() for text in record["captions"]),
            segment=(first, end) if first >= 0 else None,
        )


def split_of(path: str | os.PathLike) -> tuple[str, str | None]:
    """Folder and split of `FOLDER:SPLIT`; the split is None if not given."""
    match = re.fullmatch(r"(.+):(\w+)", os.fspath(path))
    return (match[1], match[2]) if match else (os.fspath(path), None)


def is_prepared(folder: str) -> bool:
    """Whether a folder is one that `prepare` has finished."""
    with storage.errors(folder):
        return bool(folder) and (storage.path_of(folder) / "dataset_info.json").exists()


def prepared_builder(folder: str | os.PathLike) -> Any:
    """The read-only TFDS builder of a folder written by `prepare`.

    `builder.info.metadata["splits"][split]` holds the split's fingerprint, max_label, videos,
    quarantined and plan.

    Raises:
      UserError: its metadata is damaged, or not that of `prepare`.
    """
    import tensorflow_datasets as tfds  # late: not needed for lists

    try:
        builder = tfds.builder_from_directory(folder)
        if set(builder.info.splits) <= set(builder.info.metadata["splits"]):
            return builder
        reason = "metadata.json lacks a split"
    except Exception as error:  # TFDS raises what the parsers below it do
        reason = f"{type(error).__name__} {error}"
    raise UserError(f"{folder}: is no folder of `prepare`: {' '.join(reason.split())}")


def open_prepared(folder: str, split: str | None, classes: int | None) -> PreparedSource:
    """A split of a prepared folder; None stands for its only one.

    Raises UserError: damaged metadata, no such split, a missing shard, labels not below `classes`.
    """
    builder = prepared_builder(folder)
    about, features = builder.info.metadata["splits"], builder.info.features
    split = _chosen_split(folder, split, sorted(builder.info.splits))
    if classes is not None and about[split]["max_label"] >= classes:
        raise UserError(
            f"{folder}: label {about[split]['max_label']} must be one of 0..{classes - 1}"
        )
    with storage.errors(folder):
        present = {file.name for file in storage.path_of(folder).iterdir()}
    for shard in builder.info.splits[split].filenames:
        if shard not in present:
            raise UserError(f"{folder}: shard {shard} is missing")
    names = tuple(getattr(features["label"], "names", ())) or None
    return PreparedSource(
        folder=folder,
        records=builder.as_data_source(split),
        class_names=names,
        classes=len(names or ()) or 1 + about[split]["max_label"],
        fingerprint=about[split]["fingerprint"],
        identity=_prepared_identity(about[split]),
        images=bool(about[split].get("images", False)),
    )


def _prepared_identity(about: Any) -> dict[str, int | str]:
    """`Source.identity` by the metadata of a prepared split."""
    if "ids" not in about:  # prepared by a version without ids
        return {"videos": about["videos"], "content": about["fingerprint"]}
    return {n: about[n] for n in ("videos", "ids", "captions" if "captions" in about else "labels")}


def _chosen_split(folder: str, split: str | None, splits: list[str]) -> str:
    if split is None and len(splits) == 1:
        return splits[0]
    if split not in splits:
        raise UserError(f"{folder}: holds {', '.join(splits)}; name one: {folder}:{splits[0]}")
    return split
