"""Prepared folders: written by real processes from real files, killed, resumed and read back."""

import csv
import fcntl
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest
import tensorflow_datasets as tfds

from fluxvit_jax.config.fields import default_config
from fluxvit_jax.data.annotations import open_source
from fluxvit_jax.data.decoding import Video
from fluxvit_jax.data.evaluation_videos import EvaluationVideos
from fluxvit_jax.data.pipeline import TrainGroups
from fluxvit_jax.data.prepare import Prepared, main, prepare
from fluxvit_jax.data.shard_writer import Shard, write_shards
from fluxvit_jax.data.sources import Example
from fluxvit_jax.data.views import Views
from fluxvit_jax.errors import UserError
from fluxvit_jax.grids import Grid
from tests import limited

SHARD_MB = 0.03  # one to three of the clips below
CLIPS = 150  # of the runs that are stopped


def write_clip(path, seed, frames):
    """Writes an H.264 clip of noise, so that it is of some size: about 2 kB a frame."""
    rng = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(frames):
            image = rng.integers(0, 255, (48, 64, 3), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image)))
        container.mux(stream.encode())


@pytest.fixture(scope="session")
def videos(tmp_path_factory):
    """A folder of two class folders with 12 clips, and lists of them: good.csv, bad.csv."""
    root = tmp_path_factory.mktemp("videos")
    rows = [(f"{('run', 'walk ö')[i % 2]}/{i}.mp4", i % 2) for i in range(12)]
    for i, (name, _) in enumerate(rows):
        write_clip(root / name, i, frames=4 + i % 3 * 3)
    whole = (root / rows[0][0]).read_bytes()
    (root / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (root / "page.mp4").write_bytes(b"<html>not found</html>\0\0")  # zeros that must survive
    bad = [("cut.mp4", 0), rows[0], ("page.mp4", 1), ("gone.mp4", 1), rows[1]]
    for name, lines in {"good.csv": rows, "bad.csv": bad}.items():
        (root / name).write_text("".join(f"{path},{label}\n" for path, label in lines))
    return root


@pytest.fixture(scope="session")
def whole(videos, tmp_path_factory):
    """The folder that an undisturbed run writes of good.csv."""
    out = tmp_path_factory.mktemp("whole")
    assert prepare(videos / "good.csv", out, workers=2, shard_mb=SHARD_MB) == Prepared(12, 0)
    return out


def content(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_tfds_and_our_source_read_the_same_without_tensorflow(videos, whole):
    listed = open_source(videos / "good.csv")
    source = open_source(whole, classes=2)
    records = tfds.builder_from_directory(whole).as_data_source("train")
    assert len(source) == len(records) == len(listed) == 12
    for ours, theirs, file in zip(source, records, listed, strict=True):
        assert ours.id == theirs["id"].decode() == file.id
        assert ours.label == theirs["label"] == file.label
        assert ours.video == theirs["video"] == Path(file.video).read_bytes()
    with Video(source[1].video) as video:
        assert len(video) == 7
    assert source.fingerprint == listed.fingerprint
    assert source.class_names is None
    assert pickle.loads(pickle.dumps(source))[11] == source[11]
    assert "tensorflow" not in sys.modules


def test_shards_are_full_and_no_fuller(videos, whole):
    info = tfds.builder_from_directory(whole).info.splits["train"]
    sizes = [Path(record.video).stat().st_size for record in open_source(videos / "good.csv")]
    limit, start = SHARD_MB * 2**20, 0
    assert info.num_shards >= 4
    assert {p.name for p in whole.glob("videos-*")} == set(info.filenames)
    for count in info.shard_lengths:
        assert count == 1 or sum(sizes[start : start + count]) <= limit
        assert sum(sizes[start : start + count + 1]) > limit or start + count == 12
        start += count
    assert info.num_bytes == sum(sizes)


def test_bytes_do_not_depend_on_workers_or_place(videos, whole, tmp_path):
    prepare(videos / "good.csv", tmp_path / "o", root=f"{videos}/run/..", shard_mb=SHARD_MB)
    assert content(tmp_path / "o") == content(whole)


def start(annotations, out):
    command = [sys.executable, "-m", "fluxvit_jax.data.prepare", f"--annotations={annotations}"]
    command += [f"--out={out}", "--workers=2", "--shard_mb=0.001"]  # a shard a clip
    return limited.Process(command, stderr=subprocess.PIPE, text=True, start_new_session=True)


def workers_of(process):
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    commands = {int(child): Path(f"/proc/{child}/cmdline").read_bytes() for child in children}
    return [child for child, command in commands.items() if b"spawn_main" in command]


def written_by(out):
    """The finished shards of an unfinished run, and when they were written."""
    numbers = [report.stem for report in (out / ".prepare" / "train").glob("*.json")]
    shards = [next(out.glob(f"videos-train.array_record-{number}-of-*")) for number in numbers]
    return {shard: shard.stat().st_mtime_ns for shard in shards}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds processes in /proc")
def test_a_run_stopped_in_every_way_goes_on_and_ends_the_same(videos, tmp_path):
    rows = (videos / "good.csv").read_text().splitlines()
    annotations = videos / "long.csv"
    annotations.write_text("".join(f"{rows[i % 12]}\n" for i in range(CLIPS)))
    prepare(annotations, tmp_path / "undisturbed", workers=2, shard_mb=0.001)
    out = tmp_path / "stopped"
    finished = {}
    for way, status in {"kill": -9, "ctrl-c": 130, "terminate": 130}.items():
        process = start(annotations, out)
        due = len(finished) + 5
        assert limited.wait_until(lambda due=due: len(written_by(out)) >= due, process)
        workers = workers_of(process)
        assert len(workers) == 2
        if way == "kill":
            process.kill()
        elif way == "ctrl-c":
            os.killpg(process.pid, signal.SIGINT)  # what a terminal does
        else:  # although a worker does not answer
            os.kill(workers[0], signal.SIGSTOP)
            process.terminate()
        errors = process.communicate()[1]
        assert process.returncode == status and "Traceback" not in errors, errors
        if way != "kill":
            assert re.fullmatch("prepare: .* the same command goes on .*", errors.splitlines()[-1])
        limited.wait_until(lambda own=workers: not any(map(limited.is_running, own)))
        with pytest.raises(UserError, match="finished `prepare`"):
            open_source(out)
        assert finished.items() <= written_by(out).items(), "a finished shard was written again"
        finished = written_by(out)
        assert len(finished) < CLIPS
    # And the machine goes down before all of a shard is on the disk.
    os.truncate(finished.popitem()[0], 1000)
    process = start(annotations, out)
    assert limited.wait_until(lambda: len(workers_of(process)) == 2, process)
    os.kill(workers_of(process)[0], signal.SIGKILL)  # one is replaced
    errors = process.communicate()[1]
    assert process.returncode == 0, errors
    assert "was killed by SIGKILL, as happens when memory runs out; it is replaced" in errors
    assert all(path.stat().st_mtime_ns == moment for path, moment in finished.items())
    assert content(out) == content(tmp_path / "undisturbed")


class CrashingPath(str):
    """A path that crashes whoever asks whether it is in a bucket."""

    def startswith(self, *_: object) -> bool:
        os.kill(os.getpid(), signal.SIGSEGV)
        raise AssertionError


class HangingPath(str):
    """A path that never says whether it is in a bucket."""

    def startswith(self, *_: object) -> bool:
        time.sleep(1000)
        raise AssertionError


@pytest.mark.slow
def test_videos_that_hang_or_crash_their_reader_are_bad(videos, tmp_path):
    good = str(videos / "run" / "0.mp4")
    sources = {"a": CrashingPath(good), "b": good, "c": HangingPath(good)}
    examples = [Example(name, 0, source) for name, source in sources.items()]
    shard = Shard(
        path=tmp_path / "shard", report=tmp_path / "0.json", examples=examples, keep_bad=True
    )
    [report] = write_shards([shard], workers=1, clip_seconds=1)
    assert report.stored == [("a", 0, 0), ("b", 0, os.path.getsize(good)), ("c", 0, 0)]
    assert report.quarantined == [
        ("a", 0, "crashes its reader, which was killed by SIGSEGV"),
        ("c", 0, "hangs: not read within 1 s"),
    ]


def test_a_finished_split_is_left_alone(videos, whole):
    before = {path: path.stat().st_mtime_ns for path in whole.iterdir()}
    assert prepare(videos / "good.csv", whole, shard_mb=SHARD_MB) == Prepared(12, 0)
    assert before == {path: path.stat().st_mtime_ns for path in whole.iterdir()}
    for name, shard_mb in [("good.csv", 1), ("bad.csv", SHARD_MB)]:
        with pytest.raises(UserError, match="holds train of other data or shard_mb"):
            prepare(videos / name, whole, shard_mb=shard_mb)
    assert before == {path: path.stat().st_mtime_ns for path in whole.iterdir()}


def test_training_goes_without_bad_videos_and_evaluation_counts_them(videos, tmp_path):
    assert prepare(videos / "bad.csv", tmp_path, split="train") == Prepared(2, 3)
    assert prepare(videos / "bad.csv", tmp_path, split="validation") == Prepared(5, 3)
    with open(tmp_path / "quarantine.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for split in ("train", "validation"):
        bad = [row for row in rows if row["split"] == split]
        assert [(row["id"], row["label"]) for row in bad] == [
            ("cut.mp4", "0"),
            ("page.mp4", "1"),
            ("gone.mp4", "1"),
        ]
        assert bad[2]["reason"] == "no such file" and all(row["reason"] for row in bad)

    train = open_source(f"{tmp_path}:train")
    assert [record.id for record in train] == ["run/0.mp4", "walk ö/1.mp4"]
    listed, validation = open_source(videos / "bad.csv"), open_source(f"{tmp_path}:validation")
    assert [record[:2] for record in validation] == [record[:2] for record in listed]
    for index, name in [(0, "cut.mp4"), (2, "page.mp4")]:
        assert validation[index].video == (videos / name).read_bytes()
    assert validation[3].video == b""
    assert validation.fingerprint == listed.fingerprint != train.fingerprint
    splits = json.loads((tmp_path / "metadata.json").read_text())["splits"]
    assert [splits[name]["quarantined"] for name in ("train", "validation")] == [3, 3]


def test_names_that_are_not_utf8_are_shown_escaped(videos, tmp_path, capsys):
    folder = tmp_path / "set"
    os.makedirs(os.fsencode(folder) + b"/cl\xe9")
    for name, source in {b"b\xe8.mp4": "run/0.mp4", b"bad\xe8.mp4": "page.mp4"}.items():
        os.symlink(videos / source, os.fsencode(folder) + b"/cl\xe9/" + name)
    for split in ("train", "validation"):
        arguments = [f"--annotations={folder}", f"--out={tmp_path}/out", f"--split={split}"]
        assert main([*arguments, "--workers=1"]) == 0
    with open(tmp_path / "out" / "quarantine.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["id"], row["split"]) for row in rows] == [
        ("cl\\xe9/bad\\xe8.mp4", "train"),
        ("cl\\xe9/bad\\xe8.mp4", "validation"),
    ]
    prepared, listed = open_source(f"{tmp_path}/out:validation"), open_source(folder)
    assert prepared.class_names == listed.class_names == ("cl\\xe9",)
    assert [record.id for record in prepared] == listed.ids
    assert prepared.fingerprint == listed.fingerprint
    records = tfds.builder_from_directory(tmp_path / "out").as_data_source("train")
    assert [record["id"].decode() for record in records] == ["cl\\xe9/b\\xe8.mp4"]
    with pytest.raises(UserError, match=r"o\\xe9: shards need a path that is UTF-8"):
        prepare(folder, os.fsdecode(os.fsencode(tmp_path) + b"/o\xe9"))


def test_a_list_of_names_is_prepared_with_them(videos, tmp_path):
    """Another split is looked up in them, and lacks one."""
    lists = {"train": ["walk", "run"], "validation": ["Walk"], "test": ["swim"]}
    for split, labels in lists.items():
        rows = [f"run/{2 * i}.mp4,{label}\n" for i, label in enumerate(labels)]
        (tmp_path / f"{split}.csv").write_text("".join(rows))
    out = tmp_path / "out"
    for split in ("train", "validation"):
        prepare(tmp_path / f"{split}.csv", out, root=videos, split=split)
    train, validation = (open_source(f"{out}:{split}") for split in ("train", "validation"))
    assert train.class_names == validation.class_names == ("run", "walk") and train.classes == 2
    assert [record.label for record in train] == [1, 0] and validation[0].label == 1
    with pytest.raises(UserError, match=r"test.csv, line 1: class 'swim' is none of the 2 of the"):
        prepare(tmp_path / "test.csv", out, root=videos, split="test")


def test_several_splits_share_class_names(videos, tmp_path):
    (tmp_path / "classes").mkdir()
    for name in ("run", "walk ö"):
        (tmp_path / "classes" / name).symlink_to(videos / name)
    out = tmp_path / "out"
    assert prepare(tmp_path / "classes", out, split="validation") == Prepared(12, 0)
    assert open_source(out).class_names == ("run", "walk ö")  # one split needs no naming
    first = {path.name: path.read_bytes() for path in out.glob("videos-*")}
    assert prepare(videos / "good.csv", out, split="train") == Prepared(12, 0)
    assert first.items() <= {path.name: path.read_bytes() for path in out.glob("videos-*")}.items()
    builder = tfds.builder_from_directory(out)
    assert builder.info.features["label"].names == ["run", "walk ö"]
    assert {name: len(builder.as_data_source(name)) for name in builder.info.splits} == {
        "train": 12,
        "validation": 12,
    }
    assert open_source(f"{out}:train")[0].id == "run/0.mp4"
    for path in (out, f"{out}:test"):
        with pytest.raises(UserError, match=f"holds train, validation; name one: {out}:train"):
            open_source(path)
    with pytest.raises(UserError, match=r"label 1 must be one of 0\.\.0"):
        open_source(f"{out}:train", classes=1)
    assert prepare(videos / "good.csv", out, split="train") == Prepared(12, 0)  # still done
    with pytest.raises(UserError, match="have other class names"):
        prepare(videos / "good.csv", out, split="test", names=["walk", "run"])


def test_class_folders_beside_splits_of_numbers_are_refused(videos, tmp_path):
    """Folders are numbered in the order of their names, and the list may have another one."""
    for name in ("run", "walk ö"):
        (tmp_path / "classes").mkdir(exist_ok=True)
        (tmp_path / "classes" / name).symlink_to(videos / name)
    prepare(videos / "good.csv", tmp_path / "out")
    with pytest.raises(UserError, match="classes: its labels are names, but those of the other sp"):
        prepare(tmp_path / "classes", tmp_path / "out", split="validation")
    names = ["run", "walk ö"]
    added = prepare(tmp_path / "classes", tmp_path / "out", split="validation", names=names)
    assert added == Prepared(12, 0)


def test_bad_folders_are_refused(videos, whole, tmp_path):
    prepare(videos / "good.csv", tmp_path, shard_mb=SHARD_MB)
    shard = sorted(tmp_path.glob("videos-*"))[1]
    shard.write_bytes(shard.read_bytes()[:70_000])
    source = open_source(tmp_path)
    assert source[0].id == "run/0.mp4"
    failed = [bool(record.failure) for record in source]
    assert failed[2] and not any(failed[:2]) and not failed[-1]
    shard.unlink()
    with pytest.raises(UserError, match=f"shard {shard.name} is missing"):
        open_source(tmp_path)
    for text in ("{}", "not json"):
        (tmp_path / "metadata.json").write_text(text)
        with pytest.raises(UserError, match="is no folder of `prepare`"):
            open_source(tmp_path)
        with pytest.raises(UserError, match="is no folder of `prepare`"):
            prepare(videos / "good.csv", tmp_path, split="validation")


def test_a_flipped_bit_is_one_clip_that_fails(videos, tmp_path):
    prepare(videos / "good.csv", tmp_path, shard_mb=SHARD_MB)
    source = open_source(tmp_path)
    shard = sorted(tmp_path.glob("videos-*"))[0]
    content = bytearray(shard.read_bytes())
    content[content.index(source[1].video[:500]) + 250] ^= 4
    shard.write_bytes(content)
    damaged = list(open_source(tmp_path))
    assert [i for i, record in enumerate(damaged) if record.failure] == [1]
    name = f"{tmp_path.name}, record 1"
    assert damaged[1].id == name and "the shard is damaged here" in damaged[1].failure
    grids = (Grid(2, 2, 2),)
    items = EvaluationVideos(open_source(tmp_path), grids, Views())
    assert [str(items[i]["id"][0]) for i in range(3)] == [source[0].id, name, source[2].id]
    assert "hash mismatch" in items[1]["failure"][0] and not items[1]["patches0"].any()
    augment = default_config("Ti").data.augment
    groups = TrainGroups(open_source(tmp_path), 0, grids, group=4, repeats=1, augment=augment)
    failures = {
        line for i in range(3) for text in groups[i]["failure"] for line in text.split("\n")
    }
    assert [line.split(": ")[0] for line in failures if line] == [name]


def test_one_run_at_a_time(videos, tmp_path):
    folder = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    with pytest.raises(UserError, match="another run of `prepare` is at work"):
        prepare(videos / "good.csv", tmp_path)
    os.close(folder)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "arguments are required: --annotations, --out"),
        (["--worker=2"], "arguments are required"),
        (["--annotations=gone.csv", "--out=o"], "gone.csv: no such file or folder"),
        (["--annotations=good.csv", "--out=good.csv"], "good.csv: cannot be used as a folder"),
        (["--annotations=good.csv", "--out=gs://o"], "gs://o: shards are written to a folder"),
        (["--annotations=good.csv", "--out=o", "--workers=two"], "invalid int value: 'two'"),
        (["--annotations=good.csv", "--out=o", "--workers=0"], "must be above 0"),
        (["--annotations=good.csv", "--out=o", "--shard_mb=nan"], "must be above 0"),
        (["--annotations=good.csv", "--out=o", "--split=a/b"], "split 'a/b' must be letters"),
        (["--annotations=good.csv", "--out=o", "--class_names=one.txt"], "line 2: label 1 must"),
        (["--annotations=three.csv", "--out=o"], "line 2: 3 columns"),
        (["--annotations=good.csv", "--out=o", "--root=run"], "is the root right?"),
        (["--annotations=junk.csv", "--out=o"], "no video can be decoded"),
    ],
)
def test_bad_input_is_one_line_and_no_data_set(
    videos, tmp_path, monkeypatch, capsys, arguments, message
):
    for name in ("good.csv", "run", "walk ö", "page.mp4"):
        (tmp_path / name).symlink_to(videos / name)
    (tmp_path / "one.txt").write_text("run\n")
    (tmp_path / "three.csv").write_text("run/0.mp4,0\nrun/1.mp4,0,1\n")
    (tmp_path / "junk.csv").write_text("page.mp4,0\n")
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line and "%|" not in line]
    assert len(lines) == 1 and lines[0].startswith("prepare: ") and message in lines[0]
    assert not list(tmp_path.glob("o/*.json"))


def test_help_tells_what_it_does(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert all(word in text for word in ("--annotations", "--shard_mb", "quarantine.csv"))
