"""Writing the shards of a prepared folder, each by one process on its own."""

import contextlib
import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import cast

from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from tqdm import tqdm

from fluxvit_jax.data import durable_files
from fluxvit_jax.data.decoding import DecodeError, check_regular
from fluxvit_jax.data.images import open_clip
from fluxvit_jax.data.prepared_format import serialize
from fluxvit_jax.data.sources import Example
from fluxvit_jax.data.supervised_workers import (
    Quarantine,
    SupervisedWorkers,
    reading,
)
from fluxvit_jax.distributed import storage
from fluxvit_jax.errors import UserError

MAX_VIDEO_BYTES = 2**31 - 2**20  # a record is a protobuf message, which must stay below 2 GiB
DYING = (
    "a worker process {}; finished shards are kept, and the same command goes on from there; fewer "
    "--workers need less memory"
)
CHECK_SHORT_SIDE = 16  # pixels: the frames are decoded only to check them, so keep them small


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """The work of one process: which videos go into which file."""

    path: Path
    report: Path  # JSON, written last: a shard that has one is finished
    examples: list[Example]
    keep_bad: bool


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The result of writing a shard."""

    file_bytes: int
    stored: list[tuple[str, int, int]]  # id, label, bytes of the video
    quarantined: list[tuple[str, int, str]]  # id, label, reason


def read_report(path: Path) -> Report:
    """Reads the report of a finished shard."""
    report = json.loads(path.read_text())
    return Report(
        file_bytes=report["file_bytes"],
        stored=[tuple(row) for row in report["stored"]],
        quarantined=[tuple(row) for row in report["quarantined"]],
    )


# The parent process


def write_shards(shards: list[Shard], workers: int, clip_seconds: float) -> list[Report]:
    """Writes the shards that are not finished yet; returns the reports of all.

    clip_seconds: time limit for a video, which counts as bad then; 0: none.
    """
    missing = [shard for shard in shards if not _is_finished(shard)]
    videos = sum(len(shard.examples) for shard in shards)
    to_do = sum(len(shard.examples) for shard in missing)
    interval = 0.5 if sys.stderr.isatty() else 30  # seconds: no flood in the log of a batch job
    with tqdm(
        total=videos, initial=videos - to_do, unit=" videos", mininterval=interval, smoothing=0.05
    ) as bar:
        if missing:
            _run_workers(missing, min(workers, len(missing)), clip_seconds, bar)
    return [read_report(shard.report) for shard in shards]


def _is_finished(shard: Shard) -> bool:
    return (
        shard.report.exists()
        and shard.path.exists()
        and shard.path.stat().st_size == read_report(shard.report).file_bytes
    )


def _run_workers(shards: list[Shard], workers: int, clip_seconds: float, bar: tqdm) -> None:
    quarantine: Quarantine = {}
    missing = set(range(len(shards)))
    write = _NumberedShards(shards, quarantine)
    pool = SupervisedWorkers(write, workers, clip_seconds, quarantine, ahead=1, dying=DYING)
    with contextlib.closing(pool):
        for number in missing:
            pool.submit(number)
        first = bar.n
        while missing:
            for number, result in pool.finished():
                if isinstance(result, Exception):
                    raise result
                missing.remove(number)
                pool.went_on()
            bar.update(min(first + pool.clips_read, bar.total) - bar.n)


# The worker processes


@dataclasses.dataclass(frozen=True)
class _NumberedShards:
    """Writing of shards by number."""

    shards: list[Shard]
    quarantine: Quarantine

    def __call__(self, number: int) -> None:
        write_shard(self.shards[number], self.quarantine)


def write_shard(shard: Shard, quarantine: Quarantine) -> None:
    """Writes one shard and its report; the shard is finished when the report is there.

    quarantine: videos not to read, by id; they count as bad.
    """
    unfinished = shard.report.with_name(f"{shard.report.stem}.{os.getpid()}.tmp")
    stored: list[tuple[str, int, int]] = []
    quarantined: list[tuple[str, int, str]] = []
    try:
        # Groups of one record: records are read at random.
        writer = ArrayRecordWriter(str(unfinished), "group_size:1,uncompressed")
        for example in shard.examples:
            label = cast(int, example.label)  # `prepare` reads one label a video
            try:
                with reading(example.id, quarantine):
                    video, reason = read_video(example)
            except DecodeError as error:
                video, reason = b"", error.reason
            if reason is not None:
                quarantined.append((example.id, label, reason))
            if reason is None or shard.keep_bad:
                writer.write(serialize(example, video))
                stored.append((example.id, label, len(video)))
        writer.close()
        _check_count(unfinished, len(stored))
        size = unfinished.stat().st_size
        report = Report(file_bytes=size, stored=stored, quarantined=quarantined)
        durable_files.move(unfinished, shard.path)
        durable_files.write(shard.report, json.dumps(dataclasses.asdict(report)))
    except (OSError, RuntimeError) as error:  # array_record raises RuntimeError
        raise UserError(f"{shard.path}: cannot be written: {error}") from None


def read_video(example: Example) -> tuple[bytes, str | None]:
    """The bytes of a video file, and the reason why it is bad or None if every frame decodes.

    The bytes are empty for a file that cannot be read or is too large for a record.
    """
    try:
        is_local = not storage.is_remote(example.source)
        if is_local:
            check_regular(example.source, example.id)
        if is_local and os.path.getsize(example.source) > MAX_VIDEO_BYTES:
            return b"", "larger than 2 GiB"
        content = storage.read_bytes(example.source)
    except DecodeError as error:
        return b"", error.reason
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


def _check_count(path: Path, expected: int) -> None:
    reader = ArrayRecordReader(str(path))
    count = reader.num_records()
    reader.close()
    if count != expected:
        raise OSError(f"{count} of {expected} records arrived")
