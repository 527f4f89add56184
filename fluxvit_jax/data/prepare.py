"""Packs videos into ArrayRecord shards with TFDS metadata, without TensorFlow.

    python -m fluxvit_jax.data.prepare --annotations=train.csv --root=VIDEOS --out=DIR

The list decides which video goes into which shard before any is read, so each shard is written
by one process on its own, and an interrupted run resumes with the missing shards and ends with the
same bytes as an undisturbed one. DIR then holds

    videos-train.array_record-00000-of-00009 ...   records of id, label and the bytes of the file
    dataset_info.json features.json metadata.json  what TFDS reads, and fingerprints
    quarantine.csv                                 id, label, reason, split of every bad video

and `.prepare/` while a run is unfinished. Every frame of every video is decoded once. A video that
fails is listed in quarantine.csv; a training split leaves it out, any other split keeps its bytes,
because an evaluation must count it as failed. So is one that hangs or crashes its reader, but its
bytes stay out.
"""

import argparse
import contextlib
import csv
import dataclasses
import hashlib
import io
import math
import os
import re
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fluxvit_jax.data import durable_files
from fluxvit_jax.data.annotations import class_names, read_class_names, read_named
from fluxvit_jax.data.caption_lists import open_captions, with_captions
from fluxvit_jax.data.class_names import KnownNames
from fluxvit_jax.data.images import is_image
from fluxvit_jax.data.prepared_format import shard_paths, write_metadata
from fluxvit_jax.data.prepared_source import prepared_builder
from fluxvit_jax.data.shard_writer import Report, Shard, write_shards
from fluxvit_jax.data.sources import Example, fingerprint, identity
from fluxvit_jax.distributed import storage
from fluxvit_jax.errors import ArgumentParser, UserError

WORK_FOLDER = ".prepare"
MEBIBYTE = 2**20
CLIP_SECONDS = 600.0  # every frame is decoded: at 300 frames a second an hour takes 360


@dataclasses.dataclass(frozen=True, slots=True)
class Prepared:
    """Number of videos of a prepared split."""

    stored: int
    quarantined: int


class _Videos(NamedTuple):
    """The videos of a split, in the order of their list.

    sizes: of the files in bytes, 0 of one that cannot be read. class_names: None if classes have
    none. captions: what metadata.json keeps of a list of captions.
    """

    examples: list[Example]
    sizes: list[int]
    class_names: Sequence[str] | None
    captions: dict[str, Any]


def prepare(
    annotations: str | os.PathLike,
    out: str | os.PathLike,
    root: str | os.PathLike | None = None,
    split: str = "train",
    workers: int = 1,
    shard_mb: float = 200,
    names: Sequence[str] | None = None,
    clip_seconds: float = CLIP_SECONDS,
    captioned: bool = False,
) -> Prepared:
    """Writes one split of a prepared folder; resumes an interrupted run.

    Args:
      annotations: a list or a folder of class folders, see `read_annotations`.
      out: the folder to write. It may hold other splits of the same classes.
      root: folder that the paths of a list are relative to (default: the folder of the list).
      split: its name: letters, digits and underscores.
      workers: processes.
      shard_mb: size of a shard in MiB; one video alone may exceed it.
      names: names of the classes (default: of the class folders, those of the other splits, or the
        labels of a list).
      clip_seconds: time limit for a video, which counts as bad then; 0: none.
      captioned: whether the list is of captions, see `caption_lists`, all of one medium.

    Raises:
      UserError: bad annotations; no video is there, or none can be decoded; `out` is no folder,
        in use, or holds this split of other data; the disk is full; processes die.
    """
    _check_options(split, workers, shard_mb, clip_seconds)
    out = _local_folder(out)
    with durable_files.one_run_at_a_time(out, "prepare"), storage.write_errors(out):
        info = _finished_splits(out, captioned)
        videos = _read_videos(out, info, annotations, root, names, captioned)
        plan = _plan(videos, shard_mb)
        if info and split in info.splits:
            about = info.metadata["splits"][split]
            if about["plan"] != plan:
                raise UserError(
                    f"{out}: holds {split} of other data or shard_mb; choose another --out"
                )
        else:
            work = _work_folder(out, split, plan)
            shards = _shards(out, work, split, videos, int(shard_mb * MEBIBYTE))
            reports = write_shards(shards, workers, clip_seconds)
            _write_quarantine(out, split, reports)
            _check_decoded(annotations, out, videos, reports)
            about = _about(videos, plan, reports)
            write_metadata(
                out,
                work,
                split,
                about=about,
                class_names=videos.class_names,
                shard_lengths=[len(report.stored) for report in reports],
                num_bytes=sum(size for report in reports for _, _, size in report.stored),
                info=info,
            )
        _remove_work(out, split)
    return Prepared(about["videos"], about["quarantined"])


def _check_options(split: str, workers: int, shard_mb: float, clip_seconds: float) -> None:
    """Raises UserError for a value that `prepare` does not take."""
    if not re.fullmatch(r"[A-Za-z]\w*", split) or split == "all":
        raise UserError(f"split {split!r} must be letters, digits and underscores, and not 'all'")
    if workers < 1 or not 0 < shard_mb < math.inf:
        raise UserError(f"workers ({workers}) and shard_mb ({shard_mb}) must be above 0")
    if not clip_seconds >= 0:
        raise UserError(f"clip_seconds ({clip_seconds}) must be 0 or more")


def _local_folder(out: str | os.PathLike) -> Path:
    """The absolute path of the folder. Raises UserError for one that shards cannot be in."""
    if "://" in os.fspath(out):
        raise UserError(f"{out}: shards are written to a folder of this machine; copy them then")
    path = Path(os.path.abspath(out))
    if storage.display_name(path) != str(path):
        raise UserError(f"{storage.display_name(path)}: shards need a path that is UTF-8")
    return path


# The videos


def _finished_splits(out: Path, captioned: bool) -> Any:
    """The `tfds.core.DatasetInfo` of the splits that are finished, or None.

    Raises UserError if they have captions and this one labels, or the other way round.
    """
    if not (out / "dataset_info.json").exists():
        return None
    info = prepared_builder(out).info
    if ("captions" in info.features) != captioned:
        kind = "labels" if captioned else "captions"
        raise UserError(f"{out}: its other splits have {kind}; choose another --out")
    return info


def _read_videos(
    out: Path,
    info: Any,
    annotations: str | os.PathLike,
    root: str | os.PathLike | None,
    names: Sequence[str] | None,
    captioned: bool,
) -> _Videos:
    """The videos that the annotations list. Raises UserError if none is there."""
    captions: dict[str, Any] = {}
    if captioned:
        captions, examples = _read_captions(annotations, root)
    else:
        names = _names(out, info, annotations, names)
        examples, names = _read(out, info, annotations, root, names)
    sizes = storage.file_sizes([example.source for example in examples])
    if not any(sizes):
        raise UserError(
            f"{annotations}: none of its {len(examples)} videos is there; the first would be "
            f"{examples[0].source}; is the root right?"
        )
    return _Videos(examples, sizes, names, captions)


def _read_captions(
    annotations: str | os.PathLike, root: str | os.PathLike | None
) -> tuple[dict[str, Any], list[Example]]:
    """What metadata.json keeps of a list of captions, and its videos.

    Raises UserError: as `caption_lists.open_captions`; videos and images in one list.
    """
    source = open_captions(annotations, root)
    examples = list(source.examples)
    images = {is_image(example.source) for example in examples}
    if len(images) > 1:
        raise UserError(
            f"{annotations}: has videos and images, which are trained on in steps of their own; "
            "write two lists, and prepare a folder of each"
        )
    return {"captions": source.identity["captions"], "images": images.pop()}, examples


def _names(
    out: Path, info: Any, annotations: str | os.PathLike, names: Sequence[str] | None
) -> Sequence[str] | None:
    """Class names: as given, else of the class folders, else of the finished splits."""
    known = getattr(info.features["label"], "names", None) or None if info else None
    if names is None and storage.is_folder(annotations):
        names = class_names(annotations) or None
        if info and names and not known:
            raise _only_numbers(annotations, out)
    if info is None:
        return names
    if known and names and list(known) != list(names):
        raise UserError(f"{out}: its other splits have other class names; choose another --out")
    highest = max(info.metadata["splits"][split]["max_label"] for split in info.splits)
    if names and highest >= len(names):
        raise UserError(f"{out}: has label {highest}, for which the class names do not suffice")
    return names or known


def _read(
    out: Path,
    info: Any,
    annotations: str | os.PathLike,
    root: str | os.PathLike | None,
    names: Sequence[str] | None,
) -> tuple[list[Example], Sequence[str] | None]:
    """The videos, and the class names: those given, else those that are the labels of a list."""
    known = None
    if names and not storage.is_folder(annotations):
        known = KnownNames(names, f"the class names of {out}")
    examples, listed = read_named(annotations, root, len(names) if names else None, known=known)
    if listed and info and not names:
        raise _only_numbers(annotations, out)
    return examples, names or listed


def _only_numbers(annotations: str | os.PathLike, out: Path) -> UserError:
    return UserError(
        f"{annotations}: its labels are names, but those of the other splits of {out} are "
        "numbers; say which is which: --class_names=FILE, a name a line"
    )


# The plan


def _plan(videos: _Videos, shard_mb: float) -> str:
    """Hex digest of everything that the bytes of the shards depend on."""
    sized = zip(videos.examples, videos.sizes, strict=True)
    rows = fingerprint((example.id, example.label, size) for example, size in sized)
    rows = with_captions(rows, videos.captions.get("captions", ""))
    return hashlib.sha256(f"{rows} {float(shard_mb)}".encode()).hexdigest()


def _shards(out: Path, work: Path, split: str, videos: _Videos, limit: int) -> list[Shard]:
    """Shards of consecutive examples, as many as fit into `limit` bytes, but at least one."""
    groups: list[list[Example]] = []
    room = 0
    for example, size in zip(videos.examples, videos.sizes, strict=True):
        if not groups or size > room:
            groups.append([])
            room = limit
        groups[-1].append(example)
        room -= size
    paths = shard_paths(out, split, len(groups))
    return [
        Shard(
            path=path,
            report=work / f"{index:05}.json",
            examples=group,
            keep_bad=not split.startswith("train"),
        )
        for index, (path, group) in enumerate(zip(paths, groups, strict=True))
    ]


# The results


def _check_decoded(
    annotations: str | os.PathLike, out: Path, videos: _Videos, reports: list[Report]
) -> None:
    """Raises UserError if no video can be decoded."""
    if _quarantined(reports) == len(videos.examples):
        name, _, reason = reports[0].quarantined[0]
        raise UserError(
            f"{annotations}: no video can be decoded, see {out}/quarantine.csv; the first: "
            f"{name}: {reason}"
        )


def _about(videos: _Videos, plan: str, reports: list[Report]) -> dict[str, Any]:
    """What metadata.json keeps of a split."""
    rows = [row for report in reports for row in report.stored]
    return {
        **identity([id for id, _, _ in rows], [label for _, label, _ in rows]),
        **videos.captions,
        "fingerprint": with_captions(fingerprint(rows), videos.captions.get("captions", "")),
        "max_label": max(label for _, label, _ in rows),
        "plan": plan,
        "quarantined": _quarantined(reports),
    }


def _quarantined(reports: list[Report]) -> int:
    """The number of bad videos."""
    return sum(len(report.quarantined) for report in reports)


# Folder and state


def _work_folder(out: Path, split: str, plan: str) -> Path:
    """The folder `.prepare/SPLIT` of this plan, without the half-written files of a killed run."""
    work = out / WORK_FOLDER / split
    work.mkdir(parents=True, exist_ok=True)
    plan_file = work / "plan"
    if plan_file.exists() and plan_file.read_text() != plan:
        raise UserError(
            f"{out}: holds unfinished work on {split} of other data or shard_mb; choose another "
            f"--out, or remove {work}"
        )
    durable_files.write(plan_file, plan)
    for file in work.glob("*.tmp"):
        file.unlink()
    return work


def _remove_work(out: Path, split: str) -> None:
    shutil.rmtree(out / WORK_FOLDER / split, ignore_errors=True)
    with contextlib.suppress(OSError):  # not there, or not empty: another split is unfinished
        os.rmdir(out / WORK_FOLDER)


def _write_quarantine(out: Path, split: str, reports: list[Report]) -> None:
    """Rewrites quarantine.csv: the rows of other splits, then those of this one."""
    path = out / "quarantine.csv"
    rows: list[Sequence[str | int]] = []
    if path.exists():
        with open(path, newline="", errors="backslashreplace") as file:
            rows = [row for row in list(csv.reader(file))[1:] if row and row[-1] != split]
    rows += [(*bad, split) for report in reports for bad in report.quarantined]
    rows.sort(key=lambda row: str(row[-1]))  # stable: within a split in the order of the list
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows([("id", "label", "reason", "split"), *rows])
    durable_files.write(path, table.getvalue())


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
        help="list of path,label lines (a comma, semicolon, tab or blanks between), or a folder of "
        "class folders",
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
        "--clip_seconds",
        type=float,
        default=CLIP_SECONDS,
        help="time limit for a video, which counts as bad then; 0: none (default: %(default)g)",
    )
    parser.add_argument(
        "--captions",
        action="store_true",
        help="the list is of captions (JSON, or CSV of path,caption), for configs/clip.py",
    )
    parser.add_argument(
        "--class_names",
        metavar="FILE",
        help="name of a class a line, in the order of the labels, or k400 etc.",
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
            clip_seconds=args.clip_seconds,
            captioned=args.captions,
        )
    except UserError as error:
        print(f"prepare: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("prepare: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    out = storage.display_name(args.out)
    print(f"{out}: {args.split} holds {prepared.stored} videos", end="")
    bad = f"; {prepared.quarantined} cannot be decoded, see {out}/quarantine.csv"
    print(bad if prepared.quarantined else "")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stop as on Ctrl-C
    sys.exit(main())
