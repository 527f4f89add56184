"""Packs videos into ArrayRecord shards with TFDS metadata, without TensorFlow.

    python -m fluxvit_jax.data.prepare --annotations=train.csv --root=VIDEOS --out=DIR

The list decides which video goes into which shard before any is read, so each shard is written
by one process on its own, and a run that was cut off goes on with the shards that are missing and
ends with the same bytes as an undisturbed one. DIR then holds

    videos-train.array_record-00000-of-00009 ...   records of id, label and the bytes of the file
    dataset_info.json features.json metadata.json  what TFDS reads, and fingerprints
    quarantine.csv                                 id, label, reason, split of every bad video

and `.prepare/` while a run is unfinished. Every frame of every video is decoded once. A video that
fails is listed in quarantine.csv; a training split goes without it, any other keeps its bytes,
since an evaluation must count it as failed and not pretend that it was never there.
"""

import argparse
import contextlib
import csv
import fcntl
import hashlib
import io
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from tensorflow_datasets.core.example_serializer import ExampleSerializer
from tqdm import tqdm

from fluxvit_jax import storage
from fluxvit_jax.data.annotations import (
    Example,
    class_names,
    fingerprint,
    prepared_builder,
    read_annotations,
    read_class_names,
)
from fluxvit_jax.data.decode import DecodeError
from fluxvit_jax.data.images import open_clip
from fluxvit_jax.errors import ArgumentParser, UserError

DATASET = "videos"  # its name for TFDS, and how shards begin
WORK_FOLDER = ".prepare"
MAX_VIDEO_BYTES = 2**31 - 2**20  # a protobuf message, which a record is, stays below 2 GiB
CHECK_SHORT_SIDE = 16  # pixels: frames are decoded to see that they can be, and need no room
MEBIBYTE = 2**20


class Shard(NamedTuple):
    """The work of one process: which videos go into which file."""

    path: Path
    report: Path  # JSON, written last: a shard that has one is finished
    examples: list[Example]
    keep_bad: bool


class Report(NamedTuple):
    """What became of a shard."""

    file_bytes: int
    stored: list[tuple[str, int, int]]  # id, label, bytes of the video
    quarantined: list[tuple[str, int, str]]  # id, label, reason


class Prepared(NamedTuple):
    """What became of a split."""

    stored: int
    quarantined: int


def prepare(
    annotations: str | os.PathLike,
    out: str | os.PathLike,
    root: str | os.PathLike | None = None,
    split: str = "train",
    workers: int = 1,
    shard_mb: float = 200,
    names: Sequence[str] | None = None,
) -> Prepared:
    """Writes one split of a prepared folder; goes on where an earlier run was cut off.

    Args:
      annotations: a list or a folder of class folders, see `read_annotations`.
      out: the folder to write. It may hold other splits of the same classes.
      root: folder that the paths of a list are relative to (default: the folder of the list).
      split: its name: letters, digits and underscores.
      workers: processes.
      shard_mb: size of a shard in MiB; one video alone may exceed it.
      names: names of the classes (default: of the class folders, or those of the other splits).

    Raises:
      UserError: bad annotations; no video is there, or none can be decoded; `out` is no folder,
        in use, or holds this split of other data; the disk is full; a process died.
    """
    if not re.fullmatch(r"[A-Za-z]\w*", split) or split == "all":
        raise UserError(f"split {split!r} must be letters, digits and underscores, and not 'all'")
    if workers < 1 or not 0 < shard_mb < math.inf:
        raise UserError(f"workers ({workers}) and shard_mb ({shard_mb}) must be above 0")
    if "://" in os.fspath(out):
        raise UserError(f"{out}: shards are written to a folder of this machine; copy them then")
    out = Path(os.path.abspath(out))
    with _one_run_at_a_time(out):
        info = _existing_info(out)
        names = _names(out, info, annotations, names)
        examples = read_annotations(annotations, root, len(names) if names else None)
        sizes = storage.file_sizes([example.source for example in examples])
        if not any(sizes):
            raise UserError(
                f"{annotations}: none of its {len(examples)} videos is there; the first would be "
                f"{examples[0].source}; is the root right?"
            )
        plan = _plan(examples, sizes, shard_mb)
        if info and split in info.splits:
            return _finished_before(out, split, plan, info.metadata["splits"][split])
        work = _work_folder(out, split, plan)
        shards = _shards(out, work, split, examples, sizes, int(shard_mb * MEBIBYTE))
        _write_missing(shards, workers)
        reports = [_read_report(shard.report) for shard in shards]
        _write_quarantine(out, split, reports)
        if sum(len(report.quarantined) for report in reports) == len(examples):
            name, _, reason = reports[0].quarantined[0]
            raise UserError(
                f"{annotations}: no video can be decoded, see {out}/quarantine.csv; the first: "
                f"{name}: {reason}"
            )
        summary = _write_metadata(out, split, plan, names, reports, info)
        _remove_work(out, split)
    return summary


# What goes where


def _plan(examples: list[Example], sizes: list[int], shard_mb: float) -> str:
    """Hex digest of all that the bytes of the shards depend on, to know other data by."""
    rows = fingerprint((e.id, e.label, size) for e, size in zip(examples, sizes, strict=True))
    return hashlib.sha256(f"{rows} {float(shard_mb)}".encode()).hexdigest()


def _shards(
    out: Path, work: Path, split: str, examples: list[Example], sizes: list[int], limit: int
) -> list[Shard]:
    """Consecutive examples, as many as fit into `limit` bytes, but at least one."""
    groups, room = [], 0
    for example, size in zip(examples, sizes, strict=True):
        if not groups or size > room:
            groups.append([])
            room = limit
        groups[-1].append(example)
        room -= size
    template = _filename_template(out, split)
    return [
        Shard(
            path=Path(template.sharded_filepath(shard_index=index, num_shards=len(groups))),
            report=work / f"{index:05}.json",
            examples=group,
            keep_bad=not split.startswith("train"),
        )
        for index, group in enumerate(groups)
    ]


def _filename_template(out: Path, split: str) -> tfds.core.ShardedFileTemplate:
    return tfds.core.ShardedFileTemplate(
        data_dir=out, dataset_name=DATASET, split=split, filetype_suffix="array_record"
    )


def _names(
    out: Path, info: Any, annotations: str | os.PathLike, names: Sequence[str] | None
) -> Sequence[str] | None:
    """Class names: as given, or of the class folders, or of the splits that are there already."""
    if names is None and storage.is_folder(annotations):
        names = class_names(annotations) or None
    if info is None:
        return names
    known = getattr(info.features["label"], "names", None) or None
    if known and names and list(known) != list(names):
        raise UserError(f"{out}: its other splits have other class names; choose another --out")
    highest = max(info.metadata["splits"][split]["max_label"] for split in info.splits)
    if names and highest >= len(names):
        raise UserError(f"{out}: has label {highest}, for which the class names do not suffice")
    return names or known


# Folder and state


@contextlib.contextmanager
def _one_run_at_a_time(out: Path) -> Iterator[None]:
    """Makes the folder and holds it; the system lets go of it when the process dies."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        folder = os.open(out, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise UserError(f"{out}: cannot be used as a folder: {error.strerror}") from None
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise UserError(f"{out}: another run of `prepare` is at work here") from None
    finally:
        os.close(folder)


def _existing_info(out: Path) -> Any:
    """The `tfds.core.DatasetInfo` of the splits that are finished, None where there are none."""
    if not (out / "dataset_info.json").exists():
        return None
    return prepared_builder(out).info


def _finished_before(out: Path, split: str, plan: str, about: dict) -> Prepared:
    if about["plan"] != plan:
        raise UserError(f"{out}: holds {split} of other data or shard_mb; choose another --out")
    _remove_work(out, split)
    return Prepared(about["videos"], about["quarantined"])


def _work_folder(out: Path, split: str, plan: str) -> Path:
    """`.prepare/SPLIT`, for this plan only, without what a killed run left half written."""
    work = out / WORK_FOLDER / split
    work.mkdir(parents=True, exist_ok=True)
    plan_file = work / "plan"
    if plan_file.exists() and plan_file.read_text() != plan:
        raise UserError(
            f"{out}: holds unfinished work on {split} of other data or shard_mb; choose another "
            f"--out, or remove {work}"
        )
    _write_whole(plan_file, plan)
    for file in work.glob("*.tmp"):
        file.unlink()
    return work


def _remove_work(out: Path, split: str) -> None:
    shutil.rmtree(out / WORK_FOLDER / split, ignore_errors=True)
    with contextlib.suppress(OSError):  # not there, or not empty: another split is unfinished
        os.rmdir(out / WORK_FOLDER)


def _read_report(path: Path) -> Report:
    report = json.loads(path.read_text())
    return Report(
        file_bytes=report["file_bytes"],
        stored=[tuple(row) for row in report["stored"]],
        quarantined=[tuple(row) for row in report["quarantined"]],
    )


def _is_finished(shard: Shard) -> bool:
    return (
        shard.report.exists()
        and shard.path.exists()
        and shard.path.stat().st_size == _read_report(shard.report).file_bytes
    )


def _write_whole(path: Path, text: str) -> None:
    """Writes a file so that it is there whole or not at all."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, errors="surrogateescape")
    _move(temporary, path)


def _move(source: Path, target: Path) -> None:
    """Renames a file whose content is on the disk, not only on its way there."""
    with open(source, "rb") as file:
        os.fsync(file.fileno())
    os.replace(source, target)


# The parent process


def _write_missing(shards: list[Shard], workers: int) -> None:
    missing = [shard for shard in shards if not _is_finished(shard)]
    videos = sum(len(shard.examples) for shard in shards)
    to_do = sum(len(shard.examples) for shard in missing)
    interval = 0.5 if sys.stderr.isatty() else 30  # seconds: no flood in the log of a batch job
    with tqdm(
        total=videos, initial=videos - to_do, unit=" videos", mininterval=interval, smoothing=0.05
    ) as bar:
        if missing:
            _run_workers(missing, min(workers, len(missing)), bar)


def _run_workers(shards: list[Shard], workers: int, bar: tqdm) -> None:
    context = multiprocessing.get_context("spawn")
    progress = context.Value("q", 0)
    # Nobody ever writes into this pipe. Its other end closes when this process stops or is killed,
    # however that happens, and takes the workers with it.
    ours, theirs = context.Pipe(duplex=False)[::-1]
    pool = ProcessPoolExecutor(workers, context, _start_worker, (theirs, progress))
    try:
        with _signals_held_back():  # processes start here
            futures = {pool.submit(write_shard, shard) for shard in shards}
        running, counted = futures, 0
        while running:
            done, running = wait(running, timeout=0.5, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
            # Read without its lock, which a worker that was killed may hold.
            counted, before = progress.get_obj().value, counted
            bar.update(counted - before)
    except BrokenProcessPool:
        ours.close()  # the SIGTERM that Python 3.12 sends the other workers is held back
        raise UserError(
            "a worker process died (out of memory, or a crash in the video decoder); finished "
            "shards are kept, and the same command goes on from there"
        ) from None
    except BaseException:
        ours.close()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        ours.close()


@contextlib.contextmanager
def _signals_held_back() -> Iterator[None]:
    """Processes started in here never see Ctrl-C or SIGTERM: their parent tells them to stop."""
    old = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old)


# The worker processes

_progress: Any = None  # videos done by all workers, a shared integer


def _start_worker(parent: Connection, progress: Any) -> None:
    global _progress
    _progress = progress
    threading.Thread(target=_end_with_parent, args=(parent,), daemon=True).start()


def _end_with_parent(parent: Connection) -> None:
    parent.poll(None)  # returns when the other end is closed
    os._exit(1)


def write_shard(shard: Shard) -> None:
    """Writes one shard and its report; the shard is finished when the report is there."""
    temporary = shard.report.with_name(f"{shard.report.stem}.{os.getpid()}.tmp")
    stored, quarantined = [], []
    try:
        # One record a group: records are read at random.
        writer = ArrayRecordWriter(str(temporary), "group_size:1,uncompressed")
        for example in shard.examples:
            video, reason = read_video(example)
            if reason is not None:
                quarantined.append((example.id, example.label, reason))
            if reason is None or shard.keep_bad:
                writer.write(_record(example, video))
                stored.append((example.id, example.label, len(video)))
            if _progress is not None:
                with _progress.get_lock():
                    _progress.value += 1
        writer.close()
        _check_count(temporary, len(stored))
        report = Report(temporary.stat().st_size, stored, quarantined)
        _move(temporary, shard.path)
        _write_whole(shard.report, json.dumps(report._asdict()))
    except (OSError, RuntimeError) as error:  # RuntimeError: what array_record raises
        raise UserError(f"{shard.path}: cannot be written: {error}") from None


def read_video(example: Example) -> tuple[bytes, str | None]:
    """The bytes of a video file and what is wrong with it, None after decoding every frame.

    The bytes are empty for a file that cannot be read or is too large for a record.
    """
    try:
        here = not storage.is_remote(example.source)
        if here and not os.path.isfile(example.source):  # a pipe, say
            return b"", "no such file"
        if here and os.path.getsize(example.source) > MAX_VIDEO_BYTES:
            return b"", "larger than 2 GiB"
        content = storage.read_bytes(example.source)
    except FileNotFoundError:
        return b"", "no such file"
    except OSError as error:
        return b"", error.strerror
    if len(content) > MAX_VIDEO_BYTES:
        return b"", "larger than 2 GiB"
    try:
        with open_clip(content, name=example.id) as video:
            video.read(range(len(video)), short_side=CHECK_SHORT_SIDE)
    except DecodeError as error:
        return content, error.reason
    return content, None


def _record(example: Example, video: bytes) -> bytes:
    values = {"id": os.fsencode(example.id), "label": example.label, "video": video}
    # Sorted by name: a run that goes on must write what the first one would have.
    return _SERIALIZER.get_tf_example(values).SerializeToString(deterministic=True)


def _features(names: Sequence[str] | None) -> tfds.features.FeaturesDict:
    label = tfds.features.ClassLabel(names=list(names)) if names else np.int64
    video = tfds.features.Scalar(np.bytes_)  # of the file, as it is
    return tfds.features.FeaturesDict({"id": tfds.features.Text(), "label": label, "video": video})


_SERIALIZER = ExampleSerializer(_features(None).get_serialized_info())


def _check_count(path: Path, expected: int) -> None:
    reader = ArrayRecordReader(str(path))
    count = reader.num_records()
    reader.close()
    if count != expected:
        raise OSError(f"{count} of {expected} records arrived")


# The end: what belongs to the whole split


def _write_quarantine(out: Path, split: str, reports: list[Report]) -> None:
    """Writes quarantine.csv anew: the rows of other splits, then those of this one."""
    path = out / "quarantine.csv"
    rows = []
    if path.exists():
        with open(path, newline="", errors="surrogateescape") as file:
            rows = [row for row in list(csv.reader(file))[1:] if row and row[-1] != split]
    rows += [(*bad, split) for report in reports for bad in report.quarantined]
    rows.sort(key=lambda row: row[-1])  # stable: within a split in the order of the list
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows([("id", "label", "reason", "split"), *rows])
    _write_whole(path, table.getvalue())


def _write_metadata(
    out: Path,
    split: str,
    plan: str,
    names: Sequence[str] | None,
    reports: list[Report],
    info: Any,
) -> Prepared:
    """Adds the split to the metadata of the folder, dataset_info.json last: it makes it valid."""
    rows = [row for report in reports for row in report.stored]
    summary = Prepared(len(rows), sum(len(report.quarantined) for report in reports))
    about = {
        "fingerprint": fingerprint(rows),
        "max_label": max(label for _, label, _ in rows),
        "plan": plan,
        "quarantined": summary.quarantined,
        "videos": summary.stored,
    }
    split_info = tfds.core.SplitInfo(
        name=split,
        shard_lengths=[len(report.stored) for report in reports],
        num_bytes=sum(size for _, _, size in rows),
        filename_template=_filename_template(out, split),
    )
    splits = {**(info.splits if info else {}), split: split_info}
    metadata = {**(info.metadata["splits"] if info else {}), split: about}
    new = tfds.core.DatasetInfo(
        builder=tfds.core.DatasetIdentity(
            name=DATASET, version=tfds.core.Version("1.0.0"), data_dir=str(out), module_name=""
        ),
        features=_features(names),
        metadata=tfds.core.MetadataDict(splits={name: metadata[name] for name in sorted(splits)}),
    )
    new.set_file_format("array_record")
    new.set_splits(tfds.core.SplitDict([splits[name] for name in sorted(splits)]))
    folder = out / WORK_FOLDER / split / "metadata"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    new.write_to_directory(folder)
    for file in sorted(folder.iterdir(), key=lambda file: file.name == "dataset_info.json"):
        _move(file, out / file.name)
    return summary


# The command


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="python -m fluxvit_jax.data.prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--annotations",
        required=True,
        help="list of path,label lines (commas, tabs or blanks), or a folder of class folders",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--root", metavar="VIDEOS", help="what paths are relative to (default: the list's folder)"
    )
    parser.add_argument(
        "--split", default="train", help="run again with another one to add it (default: train)"
    )
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count(), help="processes (default: %(default)s)"
    )
    parser.add_argument(
        "--shard_mb", type=float, default=200, help="MiB a shard (default: %(default)s)"
    )
    parser.add_argument(
        "--class_names", metavar="FILE", help="name of a class a line, in the order of the labels"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status: 0, 2 for a UserError, 130 when interrupted."""
    try:
        args = _arguments(argv)
        prepared = prepare(
            annotations=args.annotations,
            out=args.out,
            root=args.root,
            split=args.split,
            workers=args.workers,
            shard_mb=args.shard_mb,
            names=read_class_names(args.class_names) if args.class_names else None,
        )
    except UserError as error:
        print(f"prepare: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("prepare: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    print(f"{args.out}: {args.split} holds {prepared.stored} videos", end="")
    bad = f"; {prepared.quarantined} cannot be decoded, see {args.out}/quarantine.csv"
    print(bad if prepared.quarantined else "")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stop as on Ctrl-C
    sys.exit(main())
