"""The pipeline on small real files: what it gives must not depend on who makes it, or when."""

import functools
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

from fluxvit_jax.config.fields import default_config
from fluxvit_jax.config.grids import evaluation_grids
from fluxvit_jax.data import evaluation_videos, frame_sampling, random_streams
from fluxvit_jax.data.annotations import open_source
from fluxvit_jax.data.augmentation import augment_clip
from fluxvit_jax.data.decoding import Video
from fluxvit_jax.data.mixture import Mixture, Part
from fluxvit_jax.data.patches import patchify, unpatchify
from fluxvit_jax.data.pipeline import TrainGroups, evaluation_batches, train_batches
from fluxvit_jax.data.prepare import prepare
from fluxvit_jax.data.sources import Example, FileSource, Record
from fluxvit_jax.errors import UserError
from fluxvit_jax.grids import Grid
from tests import limited
from tests.data.videos import full_decode, moving_texture, write_video

VIDEOS = 13
BAD = 4  # the one that is no video


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """Videos 0.mp4 .. 12.mp4 of various lengths and shapes, and bad.mp4."""
    folder = tmp_path_factory.mktemp("videos")
    for i in range(VIDEOS):
        height, width = ((64, 96), (96, 64), (48, 48))[i % 3]
        write_video(folder / f"{i}.mp4", moving_texture(6 + i, height, width, seed=i))
    (folder / "bad.mp4").write_bytes((folder / "0.mp4").read_bytes()[:200])
    return folder


def make_source(folder: Path, bad: bool = False) -> FileSource:
    """The thirteen videos, each of its own label; with `bad`, one of them cannot be read."""
    names = [f"{i}.mp4" for i in range(VIDEOS)]
    if bad:
        names[BAD] = "bad.mp4"
    return FileSource([Example(n, i, os.path.join(folder, n)) for i, n in enumerate(names)])


def make_config(**data):
    """Clips of 2 to 4 frames, 28 to 56 px; 16 a batch in groups of 4; no workers."""
    config = default_config("Ti")
    config.seed = 3
    config.data.grids.frames = "2..4..1"
    config.data.grids.resolutions = "28..56..14"
    config.data.grids.tokens = (12, 64)
    config.data.clips_per_grid = 4
    config.data.workers = 0
    config.data.augment.randaugment = "rand-m7-n4-mstd0.5-inc1"
    config.train.batch_size = 16
    config.eval.settings = ((16, 4, 42), (8, 3, 28))
    config.eval.clips, config.eval.crops, config.eval.batch_size = 2, 3, 4
    for name, value in data.items():
        assert name in config.data
        config.data[name] = value
    return config


def take(batches, count):
    with batches:
        return list(itertools.islice(batches, count))


def assert_equal(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        for name in batch:
            np.testing.assert_array_equal(batch[name], other[name], err_msg=name)
            if name != "failure":
                assert batch[name].dtype == other[name].dtype, name


def together(shares):
    """The global batches of the shares of all hosts."""
    return [
        {name: np.concatenate([share[name] for share in batch]) for name in batch[0]}
        for batch in zip(*shares, strict=True)
    ]


# --- Training -------------------------------------------------------------------------------------


def test_a_batch_holds_what_it_says(folder):
    config = make_config()
    batches = take(train_batches(config, make_source(folder)), 3)
    for step, batch in enumerate(batches):
        assert batch["patches"].shape == (16, 64, 588) and batch["patches"].dtype == np.uint8
        assert batch["grid"].shape == (16, 3) and batch["grid"].dtype == np.int32
        assert batch["label"].dtype == np.int32
        np.testing.assert_array_equal(batch["index"], np.arange(16 * step, 16 * (step + 1)))
        assert (batch["failure"] == "").all()
        for patches, grid in zip(batch["patches"], batch["grid"], strict=True):
            assert patches[: grid.prod()].any() and not patches[grid.prod() :].any()
    grids = np.concatenate([batch["grid"] for batch in batches]).reshape(-1, 4, 3)
    assert (grids == grids[:, :1]).all()  # within a group
    assert len(np.unique(grids[:, 0], axis=0)) > 2


def test_pixels_are_those_of_the_plain_way(folder):
    config, source = make_config(repeated_aug=2), make_source(folder)
    [batch] = take(train_batches(config, source), 1)
    for patches, grid, label, index in zip(
        *(batch[name] for name in ("patches", "grid", "label", "index")), strict=True
    ):
        grid, rng = Grid(*grid.tolist()), random_streams.stream_rng(config.seed, int(index))
        frames = full_decode(source[label].video)
        clip = frames[frame_sampling.train_frames(len(frames), grid.frames, rng)]
        clip = augment_clip(clip, grid.rows * 14, config.data.augment, rng)
        np.testing.assert_array_equal(unpatchify(patches, grid), clip)


def test_every_epoch_is_another_order_of_all_videos(folder):
    batches = take(train_batches(make_config(), make_source(folder)), 4)
    labels = np.concatenate([batch["label"] for batch in batches])
    epochs = labels[: len(labels) // VIDEOS * VIDEOS].reshape(-1, VIDEOS)
    assert len(epochs) == 4
    assert (np.sort(epochs) == np.arange(VIDEOS)).all()
    assert len(np.unique(epochs, axis=0)) == 4


def test_balanced_batches_resume_and_are_shared_by_hosts(folder):
    """Ten videos of class 0 and three of class 1; balanced, one batch holds as many of each."""
    examples = [
        example._replace(label=int(number >= 10))
        for number, example in enumerate(make_source(folder).examples)
    ]
    config, source = make_config(sampling="balanced"), FileSource(examples)
    whole = take(train_batches(config, source), 3)
    for batch in whole:
        assert np.bincount(batch["label"]).tolist() == [8, 8]
    assert len({batch["label"].tobytes() for batch in whole}) == 3
    config.data.workers = 1
    shares = [
        take(train_batches(config, source, start_step=1, groups=groups_of(host, 2)), 2)
        for host in range(2)
    ]
    assert_equal(together(shares), whole[1:])


def test_seeds_differ(folder):
    first, second = make_config(), make_config()
    second.seed = 4
    source = make_source(folder)
    [one], [other] = (take(train_batches(config, source), 1) for config in (first, second))
    assert (one["label"] != other["label"]).any()
    assert (one["grid"] != other["grid"]).any()


@pytest.mark.parametrize(("workers", "start"), [(1, 0), (2, 1)])
def test_workers_change_nothing(folder, workers, start):
    source = make_source(folder, bad=True)
    expected = take(train_batches(make_config(), source), 4)
    batches = train_batches(make_config(workers=workers), source, start_step=start)
    assert_equal(take(batches, 4 - start), expected[start:])


def groups_of(host: int, hosts: int) -> range:
    """A host's share of the four groups of a batch, behind that of the host before."""
    return range(host * 4 // hosts, (host + 1) * 4 // hosts)


def test_a_host_makes_any_groups(folder):
    """Such as those of devices that a mesh does not put beside each other."""
    source = make_source(folder, bad=True)
    (whole,) = take(train_batches(make_config(), source), 1)
    (share,) = take(train_batches(make_config(), source, groups=[0, 2]), 1)
    rows = np.r_[0:4, 8:12]
    for name, own in share.items():
        np.testing.assert_array_equal(own, whole[name][rows])


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_change_nothing(folder, hosts):
    source = make_source(folder, bad=True)
    shares = [
        take(train_batches(make_config(), source, groups=groups_of(host, hosts)), 4)
        for host in range(hosts)
    ]
    assert shares[0][0]["patches"].shape[0] == 16 // hosts
    assert_equal(together(shares), take(train_batches(make_config(), source), 4))


def test_resumes_at_any_step_on_any_number_of_hosts(folder):
    source = make_source(folder, bad=True)
    expected = take(train_batches(make_config(), source), 5)
    with train_batches(make_config(), source) as batches:
        states = [batches.state()] + [batches.state() for _ in itertools.islice(batches, 4)]
    assert states == [{"step": step} for step in range(5)]
    for step, hosts in zip(range(1, 5), (1, 2, 4, 1), strict=True):
        shares = []
        for host in range(hosts):
            resumed = train_batches(
                make_config(), source, start_step=step, groups=groups_of(host, hosts)
            )
            shares.append(take(resumed, 5 - step))
            assert resumed.state() == {"step": 5}
        assert_equal(together(shares), expected[step:])


class CountingVideo(Video):
    opened = 0

    def __init__(self, *arguments):
        CountingVideo.opened += 1
        super().__init__(*arguments)


def test_repeats_share_a_decode_and_nothing_else(folder):
    config = make_config()
    groups = TrainGroups(
        source=make_source(folder),
        seed=0,
        grids=(Grid(3, 4, 4),),
        group=8,
        repeats=4,
        augment=config.data.augment,
        open_video=CountingVideo,
    )
    CountingVideo.opened = 0
    group = groups[5]
    assert CountingVideo.opened == 2
    assert (group["label"].reshape(2, 4) == group["label"].reshape(2, 4)[:, :1]).all()
    assert len(np.unique(group["patches"], axis=0)) == 8
    np.testing.assert_array_equal(group["index"], np.arange(40, 48))


def test_a_bad_video_is_named_and_replaced(folder):
    good = take(train_batches(make_config(), make_source(folder)), 2)
    bad = take(train_batches(make_config(), make_source(folder, bad=True)), 2)
    replaced = []
    for expected, batch in zip(good, bad, strict=True):
        failed = batch["failure"] != ""
        np.testing.assert_array_equal(failed, expected["label"] == BAD)
        assert (batch["label"][failed] != BAD).all()
        assert all(text.startswith("bad.mp4: ") for text in batch["failure"][failed])
        assert batch["patches"][failed].any(axis=(1, 2)).all()
        for name in ("patches", "grid", "label", "index"):  # the others are untouched
            np.testing.assert_array_equal(batch[name][~failed], expected[name][~failed])
        replaced += batch["label"][failed].tolist()
    assert len(replaced) >= 2


def test_all_repeats_of_a_bad_video_are_replaced_by_one(folder):
    config = make_config(repeated_aug=2)
    batches = take(train_batches(config, make_source(folder, bad=True)), 2)
    failed = np.concatenate([batch["failure"] for batch in batches]) != ""
    labels = np.concatenate([batch["label"] for batch in batches])
    assert failed.any()
    np.testing.assert_array_equal(failed[::2], failed[1::2])
    np.testing.assert_array_equal(labels[::2], labels[1::2])


def test_nothing_but_bad_videos_is_an_error(folder):
    path = str(folder / "bad.mp4")
    source = FileSource([Example(f"{i}.mp4", 0, path) for i in range(20)])
    with train_batches(make_config(), source) as batches, pytest.raises(UserError, match="9 video"):
        next(batches)


def test_a_damaged_replacement_is_named_too(folder):
    bad = str(folder / "bad.mp4")
    examples = list(make_source(folder).examples)
    examples[1:] = [example._replace(source=bad) for example in examples[1:4]]
    [batch] = take(train_batches(make_config(), FileSource(examples)), 1)
    assert (batch["label"] == 0).all()
    assert max(text.count("\n") for text in batch["failure"]) == 2
    for text in batch["failure"]:
        names = [line.split(":")[0] for line in text.splitlines()]
        assert len(set(names)) == len(names)


class FailingSource(FileSource):
    """A source with an error nobody foresees."""

    def __getitem__(self, index: int) -> Record:
        if index == 7:
            raise ZeroDivisionError("unforeseen")
        return super().__getitem__(index)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unforeseen_error_is_final(folder, workers):
    source = FailingSource(make_source(folder).examples)
    with train_batches(make_config(workers=workers), source) as batches:
        with pytest.raises(ZeroDivisionError, match="unforeseen"):
            list(itertools.islice(batches, 2))  # 32 samples, more than two epochs
        delivered = batches.state()
        for _ in range(3):
            with pytest.raises(RuntimeError, match="failed before"):
                next(batches)
        assert batches.state() == delivered


def test_workers_bear_the_signals_of_the_job_and_one_killed_worker(folder):
    expected = take(train_batches(make_config(), make_source(folder)), 20)
    with train_batches(make_config(workers=2), make_source(folder)) as batches:
        given = [next(batches)]
        worker = multiprocessing.active_children()[0]
        os.kill(worker.pid, signal.SIGINT)
        os.kill(worker.pid, signal.SIGTERM)
        given += itertools.islice(batches, 9)  # more than the workers hold
        os.kill(worker.pid, signal.SIGKILL)
        given += itertools.islice(batches, 10)
        assert_equal(given, expected)
    assert not multiprocessing.active_children()


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize("mixed", [False, True])
def test_workers_of_training_load_no_jax(folder, mixed):
    source = make_source(folder)
    if mixed:
        source = Mixture((Part(name="a", source=source), Part(name="b", source=source)))
    with train_batches(make_config(workers=1), source) as batches:
        next(batches)
        [worker] = multiprocessing.active_children()
        loaded = Path(f"/proc/{worker.pid}/maps").read_text()
    assert "numpy" in loaded and "jaxlib" not in loaded


def main_to_be_killed(folder: str) -> None:
    """Starts workers, says who they are, and waits."""
    batches = train_batches(make_config(workers=2), make_source(Path(folder)))
    next(batches)
    print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
    time.sleep(60)


def test_workers_end_with_a_killed_main(folder):
    code = "import sys; from tests.data.test_pipeline import *; main_to_be_killed(sys.argv[1])"
    main = limited.Process(
        [sys.executable, "-c", code, str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    workers = [int(pid) for pid in main.stdout.readline().split()]
    main.kill()
    main.wait()
    main.stdout.close()
    assert len(workers) == 2
    limited.wait_until(lambda: not any(map(limited.is_running, workers)))


def test_bad_sizes_are_named(folder):
    source = make_source(folder)
    with pytest.raises(UserError, match=r"batch_size of data.clips_per_grid: 42 .* 4; .* is 40"):
        config = make_config()
        config.train.batch_size = 42
        train_batches(config, source)
    with pytest.raises(
        UserError, match=r"clips_per_grid of data.repeated_aug: 4 .* 3; the nearest is 3"
    ):
        train_batches(make_config(repeated_aug=3), source)
    with pytest.raises(UserError, match="no videos"):
        train_batches(make_config(), FileSource([]))
    with pytest.raises(UserError, match="shared memory"):
        config = make_config(workers=1000, clips_per_grid=4096)
        config.data.grids.frames = "100"
        config.data.grids.resolutions = "560"
        config.data.grids.tokens = (1, 10**6)
        config.train.batch_size = 4096
        train_batches(config, source)


# --- Evaluation -----------------------------------------------------------------------------------


def evaluate_on(config, source, **host):
    return evaluation_batches(config, source, evaluation_grids(config), **host)


@pytest.mark.parametrize("hosts", [1, 2, 4])
@pytest.mark.parametrize("batch_size", [1, 3, 4, 16])
def test_every_video_is_evaluated_once(folder, hosts, batch_size):
    config, source = make_config(), make_source(folder, bad=True)
    b = -(-batch_size // hosts)
    shares = [
        take(
            evaluate_on(config, source, batch_size=b * hosts, rows=range(host * b, (host + 1) * b)),
            None,
        )
        for host in range(hosts)
    ]
    assert len({len(share) for share in shares}) == 1
    batches = [batch for share in shares for batch in share]
    for batch in batches:
        assert batch["patches0"].shape == (b, 6, 36, 588)
        assert batch["patches1"].shape == (b, 6, 12, 588)
        for video, name, label, failure, *views in zip(*batch.values(), strict=True):
            assert name == ("" if video < 0 else source[video].id)
            assert label == max(video, 0)
            assert bool(failure) == (video == BAD)
            assert all(patches.any() == (video not in (BAD, -1)) for patches in views)
    videos = np.concatenate([batch["video"] for batch in batches])
    np.testing.assert_array_equal(np.sort(videos[videos >= 0]), np.arange(VIDEOS))


def test_evaluation_is_the_same_by_workers_and_from_a_prepared_folder(folder, tmp_path):
    source = make_source(folder)
    rows = [f"{example.id},{example.label}" for example in source.examples]
    (tmp_path / "list.csv").write_text("\n".join(rows))
    prepare(tmp_path / "list.csv", tmp_path / "prepared", root=folder)
    prepared = open_source(tmp_path / "prepared")
    expected = take(evaluate_on(make_config(), source), None)
    assert_equal(take(evaluate_on(make_config(workers=2), prepared), None), expected)


@pytest.mark.parametrize("memory", [evaluation_videos.MAX_DECODED_BYTES, 0])
def test_views_are_those_of_the_plain_way(folder, memory, monkeypatch):
    """Also where a video is too large to be kept whole, and where views are larger than it."""
    monkeypatch.setattr(evaluation_videos, "MAX_DECODED_BYTES", memory)
    config, source = make_config(), make_source(folder)
    config.eval.settings = ((16, 4, 42), (16, 3, 70))
    batches = take(evaluate_on(config, source), None)
    for k, (_, T, size) in enumerate(config.eval.settings):
        patches = np.concatenate([batch[f"patches{k}"] for batch in batches])
        for i in range(VIDEOS):
            expected = plain_views(full_decode(source[i].video), T, size)
            # From the middle out: the middle crops of both clips, then the others clip by clip.
            from_middle = [patchify(expected[view]) for view in (1, 4, 0, 2, 3, 5)]
            np.testing.assert_array_equal(patches[i], np.stack(from_middle))


def plain_views(frames: np.ndarray, T: int, size: int) -> list[np.ndarray]:
    """Two clips of three crops: uint8 [T, size, size, 3] each."""
    height, width = frames.shape[1:3]
    scale = functools.partial(cv2.resize, interpolation=cv2.INTER_LINEAR)
    views = []
    for clip in range(2):
        picked = frames[frame_sampling.test_frames(len(frames), T, clip, 2)]
        if height <= width:
            resized = np.stack([scale(f, (size * width // height, size)) for f in picked])
        else:
            resized = np.stack([scale(f, (size, size * height // width)) for f in picked])
        room = max(resized.shape[1:3]) - size
        for start in (0, int(room / 2), room):
            y, x = (0, start) if height <= width else (start, 0)
            views.append(resized[:, y : y + size, x : x + size])
    return views
