"""An exported folder of Flux-CLIP: vectors of videos and texts from its programs."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import fluxvit_jax
from fluxvit_jax.deploy.export import run
from fluxvit_jax.deploy.exported import MANIFEST
from tests import tiny

TEXTS = ["A red thing!", "The green", "blue"]


@pytest.fixture(scope="module")
def clip_run(tiny_data, compiled, tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("clip")
    return tiny.write_clip_run(place / "run", tiny.make_clip("", ""))


@pytest.fixture(scope="module")
def exported(clip_run, tmp_path_factory) -> Path:
    """Read only."""
    folder = tmp_path_factory.mktemp("exported") / "folder"
    assert run(str(clip_run), str(folder), tokens=(24, 12)) == 0
    return folder


def test_vectors_are_those_of_the_model(clip_run, exported):
    live, served = fluxvit_jax.from_pretrained(clip_run), fluxvit_jax.load_exported(exported)
    for tokens, frames, side in ((24, 6, 42), (12, 4, 28)):
        shape = (2, frames, side, side, 3)
        videos = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
        found = served.encode_video(videos, tokens)
        np.testing.assert_allclose(found, live.encode_video(videos, tokens), atol=1e-5)
    np.testing.assert_allclose(served.encode_text(TEXTS), live.encode_text(TEXTS), atol=1e-5)
    one = served.encode_text(TEXTS[1])
    np.testing.assert_allclose(one, live.encode_text(TEXTS[1:2]), atol=1e-5)
    assert served.encode_text([]).shape == (0, 64)
    assert served.temperature == live.temperature
    with pytest.warns(UserWarning, match="longer than 77 tokens"):
        served.encode_text("word " * 100)


def test_damaged_parts_are_refused(exported, tmp_path):
    for name in ("clip.npz", "text.stablehlo"):
        folder = Path(shutil.copytree(exported, tmp_path / name))
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}: its checksum differs"):
            fluxvit_jax.load_exported(folder).encode_text("red")


def test_weights_without_a_text_encoder_say_so(exported, tmp_path):
    folder = Path(shutil.copytree(exported, tmp_path / "folder"))
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["space"], manifest["crc32"]
    (folder / MANIFEST).write_text(json.dumps(manifest))
    model = fluxvit_jax.load_exported(folder)
    for ask in (
        lambda: model.encode_text("red"),
        lambda: model.encode_video(np.zeros((4, 28, 28, 3), np.uint8), 12),
        lambda: model.temperature,
    ):
        with pytest.raises(ValueError, match="without a text encoder"):
            ask()
