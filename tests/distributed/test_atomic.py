"""Files of this machine that are whole or not there, and files that grow; buckets: test_storage."""

import pytest
from etils import epath

from fluxvit_jax.distributed import atomic


@pytest.fixture(params=["pathlib", "epath"])
def folder(request, tmp_path):
    return tmp_path if request.param == "pathlib" else epath.Path(tmp_path)


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_takes_the_place_of_the_one_before(folder):
    atomic.write(folder / "a.json", "long before\n")
    atomic.write(folder / "a.json", b"new")
    assert (folder / "a.json").read_bytes() == b"new"
    assert names(folder) == ["a.json"]


def test_a_failure_leaves_the_file_of_before_and_nothing_else(folder, monkeypatch):
    atomic.write(folder / "a.json", "before")

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(atomic.os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        atomic.write(folder / "a.json", "after")
    assert (folder / "a.json").read_text() == "before"
    assert names(folder) == ["a.json"]


def test_a_line_is_in_the_file_at_once_and_what_was_there_stays(folder):
    (folder / "a.jsonl").write_text("one\n")
    file = atomic.LineFile(folder / "a.jsonl")
    file.add("two ö")
    assert (folder / "a.jsonl").read_text() == "one\ntwo ö\n"
    file.save()
    file.add("three")
    file.close()
    assert (folder / "a.jsonl").read_text() == "one\ntwo ö\nthree\n"
