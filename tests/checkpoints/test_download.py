"""Weights by name: of the package, from a hub and a web server of the test's own."""

import hashlib
import http.server
import importlib.util
import re
import shutil
import socket
import struct
import threading

import numpy as np
import pytest

import fluxvit_jax
from fluxvit_jax.checkpoints import download
from fluxvit_jax.checkpoints.weights import read_weights
from fluxvit_jax.convert import weight_files
from fluxvit_jax.data import synthetic
from fluxvit_jax.errors import UserError
from tests import tiny

NAME = "owner/tiny"
COMMIT = "0123456789abcdef0123456789abcdef01234567"

needs_hub = pytest.mark.skipif(
    importlib.util.find_spec("huggingface_hub") is None, reason="huggingface_hub is not installed"
)


def test_the_weights_of_the_package_know_the_motions(compiled, tmp_path):
    model = fluxvit_jax.from_pretrained("builtin://ti")
    assert model.class_names == synthetic.MOTIONS
    synthetic.write_dataset(tmp_path, train=12, validation=24, seed=11, workers=1)
    videos = sorted(tmp_path.glob("validation/*/*.mp4"))
    likeliest = [model.predict(path, tokens=64, top=1)[0].name for path in videos]
    right = [name == path.parent.name for name, path in zip(likeliest, videos, strict=True)]
    assert len(right) == 24 and sum(right) >= 19  # 93 % of the demo's 240


@pytest.mark.parametrize("name", ["builtin://k400", "builtin://", "builtin://../weights/ti"])
def test_others_are_refused(name):
    with pytest.raises(UserError, match=f"{name}: the package has only builtin://ti$"):
        fluxvit_jax.from_pretrained(name)


class Handler(http.server.BaseHTTPRequestHandler):
    """A repository as the hub serves one, of `server.folder`, and its files as /files/NAME."""

    def do_HEAD(self):
        self._answer(body=False)

    def do_GET(self):
        self._answer(body=True)

    def _answer(self, body: bool):
        self.server.asked.append(self.path)
        match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path)
        plain = re.fullmatch(r"/files/(.+)", self.path)
        if match and match[1] != NAME:
            return self._refuse("RepoNotFound")
        if match and match[2] not in ("main", "v1", COMMIT):
            return self._refuse("RevisionNotFound")
        file = self.server.folder / (match[3] if match else plain[1] if plain else "none")
        if not file.exists():
            return self._refuse("EntryNotFound")
        content = file.read_bytes()
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def _refuse(self, code: str):
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", code)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def server(finished, tmp_path_factory):
    """Serves the finished run as a folder of weights."""
    folder = tmp_path_factory.mktemp("hub") / "folder"
    named = {"id2label": dict(zip("0123", ("red", "green", "blue", "yellow"), strict=True))}
    weight_files.write(read_weights(finished.workdir, named), folder)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.folder, server.asked = folder, []
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def hub(server, tmp_path, monkeypatch):
    """The server as huggingface_hub's endpoint, with a cache of the test's own."""
    from huggingface_hub import constants, file_download

    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    for module in (constants, file_download):
        for name in ("HF_HUB_CACHE", "HF_XET_CACHE"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True, raising=False)
    return server


@needs_hub
@pytest.mark.parametrize("revision", ["", "@v1", f"@{COMMIT}"])
def test_a_folder_of_the_hub(hub, revision):
    model = fluxvit_jax.from_pretrained(f"hf://{NAME}{revision}")
    expected = read_weights(hub.folder)
    assert model.config == expected.config and model.class_names[0] == "red"
    np.testing.assert_array_equal(model.params["heads"]["bias"], expected.params()["heads"]["bias"])


@needs_hub
def test_a_file_of_the_hub_is_downloaded_once(hub):
    path = download.local_copy(f"hf://{NAME}/model.safetensors")
    assert path.name == "model.safetensors"
    assert path.read_bytes() == (hub.folder / "model.safetensors").read_bytes()
    hub.asked.clear()
    assert download.local_copy(f"hf://{NAME}@{COMMIT}/model.safetensors") == path
    assert not hub.asked


@needs_hub
@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("hf://owner/none", "there is no owner/none that you may read; look for the name at http"),
        (f"hf://{NAME}@v9", "has no revision v9; leave @v9 out"),
        (f"hf://{NAME}/none.pth", "has no file none.pth; name one of http"),
        ("hf://tiny", "write hf://OWNER/NAME, hf://OWNER/NAME@REVISION or hf://OWNER/NAME/FILE"),
    ],
)
def test_names_that_the_hub_does_not_have(hub, source, message):
    with pytest.raises(UserError, match=message) as error:
        read_weights(source)
    assert "\n" not in str(error.value) and str(error.value).startswith(f"{source}: ")


@needs_hub
def test_a_hub_that_cannot_be_reached(hub, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    template = "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("time.sleep", lambda _: None)  # between the attempts of huggingface_hub
    with pytest.raises(UserError, match="cannot be reached, and no copy is here") as error:
        read_weights(f"hf://{NAME}")
    assert "\n" not in str(error.value)


def test_without_the_extra_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"pip install 'fluxvit_jax\[hub\]'"):
        read_weights(f"hf://{NAME}")


def test_a_file_of_a_web_server_is_checked_and_kept(server, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    digest = hashlib.sha256((server.folder / "model.safetensors").read_bytes()).hexdigest()
    address = f"{server.url}/files/model.safetensors"
    read = read_weights(f"{address}#sha256={digest}")
    assert read.config.class_names[0] == "red"
    server.asked.clear()
    read_weights(f"{address}#sha256={digest.upper()}")
    assert not server.asked
    shutil.rmtree(tmp_path / "fluxvit_jax")
    for source, message in (
        (address, "write https://HOST/FILE#sha256=HEX"),
        (f"{address}#sha256=12", "write https://HOST/FILE#sha256=HEX"),
        (f"{address}#sha256={'0' * 64}", f"its sha256 is {digest}, not 0+; nothing was kept"),
        (f"{server.url}/files/none.pth#sha256={digest}", "cannot be downloaded: 404"),
        (f"http://127.0.0.1:9/x.pth#sha256={digest}", "cannot be reached"),
    ):
        with pytest.raises(UserError, match=message) as error:
            read_weights(source)
        assert "\n" not in str(error.value)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("http://127.0.0.1/a file.pth", "cannot be downloaded: "),
        ("http://127.0.0.1:port/w.pth", "cannot be downloaded: nonnumeric port"),
        ("http://127.0.0.1:9/caf\u00e9.pth", "cannot be downloaded: 'ascii' codec"),
        ("https://ex..ample/w.pth", "cannot be "),
        ("https://[::1/w.pth", "write https://HOST/FILE#sha256=HEX"),
        ("https://127.0.0.1/..", "write https://HOST/FILE#sha256=HEX"),
        ("https://127.0.0.1/a%00.pth", "write https://HOST/FILE#sha256=HEX"),
    ],
)
def test_addresses_that_are_none(tmp_path, monkeypatch, address, message):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(UserError) as error:
        read_weights(f"{address}#sha256={'0' * 64}")
    assert str(error.value).startswith(address) and message in str(error.value)
    assert "\n" not in str(error.value)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_connection_that_breaks(tmp_path, monkeypatch):
    """The server is to blame, not the place that the file was to be written to."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer():
            connection, _ = listening.accept()
            connection.recv(1000)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 9000000\r\n\r\nstart")
            # Closed so, it is reset.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.close()

        thread = threading.Thread(target=answer)
        thread.start()
        address = f"http://127.0.0.1:{listening.getsockname()[1]}/w.pth"
        with pytest.raises(UserError) as error:
            read_weights(f"{address}#sha256={'0' * 64}")
        thread.join()
    assert str(error.value) == f"{address}: cannot be downloaded: Connection reset by peer"
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@needs_hub
def test_a_folder_of_flux_clip(hub, tmp_path, monkeypatch):
    """Its text encoder and vocabulary come along."""
    own = fluxvit_jax.from_pretrained(tiny.write_clip_run(tmp_path / "run", tiny.make_clip("", "")))
    own.save_pretrained(tmp_path / "folder")
    monkeypatch.setattr(hub, "folder", tmp_path / "folder")
    found = fluxvit_jax.from_pretrained(f"hf://{NAME}")
    np.testing.assert_array_equal(found.encode_text("red"), own.encode_text("red"))
