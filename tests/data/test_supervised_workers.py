"""Workers that really hang, crash, are stopped and are killed."""

import contextlib
import itertools
import os
import signal
import time
from dataclasses import dataclass, field

import pytest

from fluxvit_jax.config.grids import admissible_grids
from fluxvit_jax.data.evaluation_videos import EvaluationVideos
from fluxvit_jax.data.host_share import HostShare
from fluxvit_jax.data.pipeline import Batches, TrainGroups, train_batches
from fluxvit_jax.data.supervised_workers import SupervisedWorkers, reading
from fluxvit_jax.data.views import Views
from fluxvit_jax.errors import UserError
from fluxvit_jax.grids import Grid
from tests.data.bad_readers import KILLED, REASONS, open_bad, open_fatal, open_killing
from tests.data.test_pipeline import assert_equal, folder, make_config, make_source, take

__all__ = ["folder"]  # a fixture


def batches_of(items, config, quarantine, start=0):
    share = HostShare(items, 4, start_step=start)
    workers, limit = config.data.workers, config.data.clip_seconds
    return Batches(share, 4, workers, 0, start, clip_seconds=limit, quarantine=quarantine)


def groups_of(config, folder, open_video, quarantine=None):
    return TrainGroups(
        source=make_source(folder),
        seed=config.seed,
        grids=admissible_grids(config),
        group=4,
        repeats=1,
        augment=config.data.augment,
        open_video=open_video,
        quarantine={} if quarantine is None else quarantine,
    )


def test_clips_that_hang_or_kill_are_bad_clips(folder, caplog):
    config = make_config(workers=2, clip_seconds=1.0)
    expected = take(batches_of(groups_of(config, folder, open_bad), make_config(), {}), 2)
    assert sum((batch["failure"] != "").sum() for batch in expected) > 5
    quarantine = {}
    begin = time.monotonic()
    batches = batches_of(groups_of(config, folder, open_fatal, quarantine), config, quarantine)
    assert_equal(take(batches, 2), expected)
    assert time.monotonic() - begin < 60
    assert quarantine == REASONS
    lines = [record.getMessage() for record in caplog.records]
    for clip, reason in REASONS.items():
        line = f"{clip}: {reason}; it is skipped from now on, the worker replaced"
        assert lines.count(line) == 1
    # A later reader knows them, with or without workers.
    again = batches_of(groups_of(config, folder, open_fatal, quarantine), make_config(), {})
    assert_equal(take(again, 2), expected)
    assert_equal(
        take(train_batches(config, make_source(folder), quarantine=quarantine), 1), expected[:1]
    )


def test_evaluation_counts_them_as_failed(folder):
    config = make_config(workers=1, clip_seconds=1.0)
    quarantine = {clip: reason for clip, reason in REASONS.items() if clip != "4.mp4"}
    videos = EvaluationVideos(
        make_source(folder), (Grid(2, 2, 2),), Views(), open_video=open_fatal, quarantine=quarantine
    )
    items = take(batches_of(videos, config, quarantine), None)
    failures = {
        str(name): str(failure)
        for batch in items
        for name, failure in zip(batch["id"], batch["failure"], strict=True)
        if failure
    }
    assert failures == quarantine == REASONS


def test_what_kills_workers_everywhere_ends_the_run(folder):
    config = make_config(workers=1, clip_seconds=1.0)
    config.train.batch_size = 4
    groups = groups_of(config, folder, open_killing)
    with (
        batches_of(groups, config, groups.quarantine) as batches,
        pytest.raises(UserError, match=f"{KILLED}; lower data.workers") as error,
    ):
        list(itertools.islice(batches, 10))
    assert "\n" not in str(error.value)


def test_a_wait_can_be_stopped_and_goes_on(folder):
    config = make_config(workers=1, clip_seconds=0.0)  # no limit
    source = make_source(folder)
    begin = time.monotonic()
    with batches_of(groups_of(config, folder, open_fatal), config, {}) as batches:
        assert batches.next_unless(lambda: time.monotonic() > begin + 1) is None
        assert batches.state() == {"step": 0}
    expected = take(train_batches(make_config(), source), 2)
    with train_batches(config, source) as batches:
        first = next(batches)
        asked = iter([False, True])
        while (second := batches.next_unless(lambda: next(asked, False))) is None:
            pass
        assert_equal([first, second], expected)


@dataclass
class Crashing:
    """Reads clips, and crashes at the third."""

    quarantine: dict[str, str] = field(default_factory=dict)

    def __call__(self, number):
        with reading(f"{number}.mp4", self.quarantine):
            if number == 2:
                os.kill(os.getpid(), signal.SIGSEGV)
        return number


def test_a_crash_is_charged_to_its_clip_when_nobody_listened():
    """The worker is gone, with numbers it has not taken, before its first word is heard.

    Linux then reports a reset connection once, and only after that what the worker had said.
    """
    make = Crashing()
    workers = SupervisedWorkers(make, 1, 0, make.quarantine, ahead=8, dying="{}")
    with contextlib.closing(workers):
        for number in range(6):
            workers.submit(number)
        workers._assign()
        [worker] = workers._workers
        worker.process.join(60)
        found = workers.finished()
        assert make.quarantine == {"2.mp4": "crashes its reader, which was killed by SIGSEGV"}
        assert found == [(0, 0), (1, 1)]
