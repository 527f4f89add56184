"""The check before a run: first frames that are read, hang or crash what reads them."""

import sys

import pytest

from fluxvit_jax.config.fields import default_config
from fluxvit_jax.data.reading import reasons_unreadable
from fluxvit_jax.data.sources import Example, FileSource
from fluxvit_jax.evaluation.unreadable import NothingReadableError, check_readable
from tests import limited
from tests.data.videos import moving_texture, write_video
from tests.find.bad_reader import open_badly

HANGS = "hangs: not read within 0.5 s"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    write_video(folder / "sound.mp4", moving_texture(3))
    return folder


def source(folder, *names: str) -> FileSource:
    return FileSource([Example(name, 0, str(folder / name)) for name in names])


def test_what_crashes_or_hangs_its_reader_is_a_reason(folder):
    names = ("a.mp4", "b.mp4", "none.mp4", "sound.mp4")
    crash = "crashes its reader, which was killed by SIGABRT"
    found = list(reasons_unreadable(source(folder, *names), 2, 0.5, open_badly))
    assert found == [crash, HANGS, "no such file", ""]


def test_without_workers_a_hanging_video_is_left_behind(folder):
    names = ("b.mp4", "none.mp4", "sound.mp4")
    found = list(reasons_unreadable(source(folder, *names), 0, 0.5, open_badly))
    assert found == [HANGS, "no such file", ""]


@pytest.mark.parametrize("workers", [0, 1])
def test_the_check_ends_at_the_first_good_video(folder, workers):
    config = default_config("Ti")
    config.data.workers = workers
    check_readable(source(folder, "none.mp4", "sound.mp4"), "list.csv", config)
    message = "list.csv: not one of 2 videos can be read; a.mp4: no such file; they were looked for"
    with pytest.raises(NothingReadableError, match=message):
        check_readable(source(folder, "a.mp4", "b.mp4"), "list.csv", config)


def test_workers_start_without_jax():
    """It would be most of their time and memory."""
    modules = (
        "data.evaluation_videos",
        "data.group_reader",
        "data.reading",
        "token_optimization.frame_reader",
    )
    names = ", ".join(f"fluxvit_jax.{module}" for module in modules)
    code = f"import sys, {names}; sys.exit('jax' in sys.modules or 'grain' in sys.modules)"
    assert limited.run([sys.executable, "-c", code]).returncode == 0
