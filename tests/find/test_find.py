"""`python -m fluxvit_jax.find`: the index of a folder of videos, and what it finds by words."""

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from etils import epath

import fluxvit_jax
from fluxvit_jax.checkpoints.weights import read_weights
from fluxvit_jax.convert import weight_files
from fluxvit_jax.data.annotations import videos_below
from fluxvit_jax.data.decoding import Video
from fluxvit_jax.deploy.windows import windows_of
from fluxvit_jax.errors import UserError
from fluxvit_jax.find import index_file, indexing, page, search, weights
from fluxvit_jax.find.__main__ import main
from fluxvit_jax.find.index_file import Index, Moment, Settings
from fluxvit_jax.find.moment_reader import read_parts
from fluxvit_jax.find.search import Found
from tests import limited, tiny
from tests.data.videos import moving_texture, write_video
from tests.find.bad_reader import open_badly

SETTINGS = Settings("0" * 64, 12, 4, 28, 0.0, 0.0)


@pytest.fixture(scope="module")
def clip_folder(tiny_data, compiled, tmp_path_factory) -> Path:
    """Weights of Flux-CLIP, random ones."""
    place = tmp_path_factory.mktemp("clip")
    config = tiny.make_clip(tiny.write_captions(tiny_data, place), tiny_data)
    run = tiny.write_clip_run(place / "run", config)
    fluxvit_jax.from_pretrained(run).save_pretrained(place / "folder")
    return place / "folder"


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    """Six videos, two of them below, one of them broken, and one that is longer."""
    folder = tmp_path_factory.mktemp("videos")
    (folder / "be low").mkdir()
    for number, name in enumerate(("a", "b", "be low/c", "be low/d#1")):
        write_video(folder / f"{name}.mp4", moving_texture(6 + number, 48, 64, seed=number))
    write_video(folder / "long.mp4", moving_texture(40, 48, 48, seed=9))
    (folder / "broken.mp4").write_bytes((folder / "a.mp4").read_bytes()[:200])
    return folder


GOOD = ["a.mp4", "b.mp4", "be low/c.mp4", "be low/d#1.mp4", "long.mp4"]


def index(videos: Path, clip_folder: Path, out: Path, *options: str) -> int:
    own = (f"--checkpoint={clip_folder}", f"--out={out}", "--tokens=12", "--workers=0")
    return main(["index", str(videos), *own, *options])


@pytest.fixture(scope="module")
def made(videos, clip_folder, tmp_path_factory) -> Path:
    """An index that nothing disturbed; read only."""
    out = tmp_path_factory.mktemp("index") / "index.npz"
    assert not index(videos, clip_folder, out)
    return out


def find(words: str, made: Path, clip_folder: Path, *options: str) -> int:
    return main([words, f"--index={made}", f"--checkpoint={clip_folder}", *options])


def test_an_index_holds_the_vectors_of_encode_video(made, videos, clip_folder):
    found, model = index_file.load(made), fluxvit_jax.from_pretrained(clip_folder)
    assert list(found.moments) == GOOD and found.folder == str(videos)
    for name in GOOD:
        expected = model.encode_video(videos / name, tokens=12)
        np.testing.assert_allclose(found.vectors[name], expected, atol=1e-5)
        with Video(videos / name) as video:
            assert found.moments[name] == [Moment(0, len(video) / video.frame_rate)]
    assert found.failures.keys() == {"broken.mp4"}
    assert "cannot open" in found.failures["broken.mp4"]
    assert found.settings == Settings(weights.checksum(model), 12, 4, 28, 0.0, 0.0)
    with np.load(made) as arrays:  # plain: nothing of ours is needed to read it
        assert arrays["vectors"].shape == (5, 64) and arrays["vectors"].dtype == np.float32
        assert arrays["files"][arrays["video"]].tolist() == GOOD
        assert arrays["failures"][0, 0] == "broken.mp4" and int(arrays["tokens"]) == 12


def test_windows_of_videos(videos, clip_folder, tmp_path):
    out = tmp_path / "index.npz"
    assert not index(videos, clip_folder, out, "--window=0.5s", "--stride=0.25", "--batch-size=3")
    found, model = index_file.load(out), fluxvit_jax.from_pretrained(clip_folder)
    with Video(videos / "long.mp4") as video:
        rate = video.frame_rate
        windows = windows_of(len(video), rate, 0.5, 0.25)
        frames = video.read(range(len(video)))
    assert found.moments["long.mp4"] == [Moment(w.start / rate, w.stop / rate) for w in windows]
    # The square video is only scaled, from 48 to 28 px, and four frames are taken of a window.
    last = frames[windows[-1].start : windows[-1].stop]
    clip = np.stack([_scaled(last[int((i + 0.5) * len(last) / 4)]) for i in range(4)])
    (vector,) = model.encode_video(clip, tokens=12)
    assert float(found.vectors["long.mp4"][-1] @ vector) > 0.99
    assert len(found.vectors["long.mp4"]) == len(windows) > 3


def _scaled(frame: np.ndarray) -> np.ndarray:
    return cv2.resize(frame, (28, 28), interpolation=cv2.INTER_LINEAR)


KILLED = """
import sys
from fluxvit_jax.find import indexing
from fluxvit_jax.find.__main__ import main
indexing.FLUSH_SECONDS = 0
after = indexing._Run.save
def slow(run):
    after(run)
    print("saved", len(run._index.moments), flush=True)
    sys.stdin.readline()
indexing._Run.save = slow
main(sys.argv[1:])
"""


def test_a_killed_index_goes_on(made, videos, clip_folder, tmp_path, capsys):
    """SIGKILL after the first videos; the same command embeds the others only."""
    out = tmp_path / "index.npz"
    own = [f"--checkpoint={clip_folder}", f"--out={out}", "--tokens=12", "--workers=0"]
    process = limited.Process(
        [sys.executable, "-c", KILLED, "index", str(videos), *own, "--batch-size=1"],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(tiny.ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    for _ in range(2):
        process.stdout.readline()
        process.stdin.write("\n")
        process.stdin.flush()
    process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = index_file.load(out)
    assert list(before.moments) == GOOD[:3]
    assert not index(videos, clip_folder, out)
    assert "3 of 6 videos are in it already" in capsys.readouterr().out
    found, expected = index_file.load(out), index_file.load(made)
    assert found.moments == expected.moments and found.failures == expected.failures
    for name in GOOD:
        np.testing.assert_allclose(found.vectors[name], expected.vectors[name], atol=1e-5)


def test_an_index_follows_its_folder(made, videos, clip_folder, tmp_path):
    """Videos that have come are added, those that are gone taken out, mended ones read."""
    folder, out = moved(made, videos, tmp_path)
    (folder / "a.mp4").rename(folder / "z.mp4")
    shutil.copy(folder / "b.mp4", folder / "broken.mp4")
    assert not index(folder, clip_folder, out)
    found = index_file.load(out)
    assert set(found.moments) == {*GOOD[1:], "z.mp4", "broken.mp4"} and not found.failures
    np.testing.assert_allclose(found.vectors["broken.mp4"], found.vectors["b.mp4"], atol=1e-5)


def test_a_video_that_has_changed_is_read_again(made, videos, clip_folder, tmp_path):
    """That of an index without versions, as earlier ones were made, cannot be told."""
    folder, out = moved(made, videos, tmp_path)
    index_of = index_file.load(out)
    for vectors in index_of.vectors.values():
        vectors *= -1
    index_of.versions["b.mp4"] = index_file.UNKNOWN
    index_file.save(index_of, out)
    for name in ("a.mp4", "b.mp4"):
        shutil.copy(folder / "be low/c.mp4", folder / name)
    for _ in range(2):
        assert not index(folder, clip_folder, out)
        found = index_file.load(out)
        np.testing.assert_allclose(
            found.vectors["a.mp4"], -found.vectors["be low/c.mp4"], atol=1e-5
        )
        for name in GOOD[1:]:
            np.testing.assert_array_equal(found.vectors[name], index_of.vectors[name])


def moved(made: Path, videos: Path, folder: Path) -> tuple[Path, Path]:
    """A copy of the videos, and the index of it."""
    index = index_file.load(made)
    index.folder = str(shutil.copytree(videos, folder / "videos"))
    index_file.save(index, folder / "index.npz")
    return folder / "videos", folder / "index.npz"


def test_a_video_that_failed_in_part_is_tried_again(made, videos, clip_folder, tmp_path):
    folder, out = moved(made, videos, tmp_path)
    index_of = index_file.load(out)
    expected = index_of.vectors["a.mp4"].copy()
    index_of.vectors["a.mp4"] *= 0
    index_of.failures["a.mp4"] = "hangs: not read within 120 s"
    index_of.failures["a.mp4 at 8.0 to 9.0 s"] = "cannot be read"
    index_file.save(index_of, out)
    assert not index(folder, clip_folder, out)
    found = index_file.load(out)
    np.testing.assert_allclose(found.vectors["a.mp4"], expected, atol=1e-5)
    assert found.failures.keys() == {"broken.mp4"}


def test_an_index_of_another_folder_is_refused(made, videos, clip_folder, tmp_path, capsys):
    """Its videos may have the names of others. That of a folder which was moved goes on."""
    folder, out = moved(made, videos, tmp_path)
    (tmp_path / "other").mkdir()
    write_video(tmp_path / "other/a.mp4", moving_texture(6, 48, 64, seed=5))
    before = out.read_bytes()
    assert index(tmp_path / "other", clip_folder, out) == 2
    assert f"{out}: is an index of {folder}; name another --out" in error_of(capsys)
    assert out.read_bytes() == before
    folder.rename(tmp_path / "away")
    assert not index(tmp_path / "away", clip_folder, out)
    assert index_file.load(out).folder == str(tmp_path / "away")


def test_a_folder_that_cannot_be_listed_ends_the_work(videos, tmp_path, monkeypatch):
    """Its videos would be taken for gone, and their vectors out of the index."""
    folder = shutil.copytree(videos, tmp_path / "videos")
    listed = os.scandir

    def scandir(path):
        if os.path.basename(path) == "be low":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match="be low: cannot be listed: Permission denied"):
        videos_below(epath.Path(folder))


def test_a_video_that_takes_all_memory_is_left_out(videos, tmp_path):
    """The system kills its reader, again and again."""
    killed = str(shutil.copy(videos / "a.mp4", tmp_path / "killed.mp4"))
    parts = dict(read_parts([killed, str(videos / "be low/c.mp4")], SETTINGS, 1, 30, open_badly))
    assert "kill" in parts[0].failure.lower() and not parts[1].failure


def test_videos_that_hang_or_crash_their_reader(videos):
    paths = [str(videos / name) for name in ("a.mp4", "b.mp4", "be low/c.mp4", "long.mp4")]
    # The long one comes in parts: a clip is of nearly as many bytes as one part may have.
    settings = SETTINGS._replace(window=0.5, stride=0.5, frames=64, resolution=280)
    parts: dict[int, list] = {}
    for number, part in read_parts(paths, settings, 2, 1.5, open_badly):
        parts.setdefault(number, []).append(part)
    (crashed,), (hung,) = parts[0], parts[1]
    assert "crashes its reader" in crashed.failure and "hangs: not read within 1.5" in hung.failure
    assert not parts[2][0].failure and len(parts[3]) == parts[3][0].parts
    assert len(parts[3]) == sum(len(part.clips) for part in parts[3]) > 2
    ((_, here),) = read_parts([paths[1]], SETTINGS, 0, 0.2, open_badly)
    assert "hangs" in here.failure


# ---------------------------------------------------------------------------------------------
# Finding


def test_what_is_found_is_printed_and_shown(made, videos, clip_folder, tmp_path, capsys):
    out = tmp_path / "pages/found.html"
    assert not find("A red <thing>!", made, clip_folder, "--top=3", f"--out={out}")
    lines = capsys.readouterr().out.splitlines()
    model, found = fluxvit_jax.from_pretrained(clip_folder), index_file.load(made)
    (vector,) = model.encode_text("A red <thing>!")
    cosines = {name: float((found.vectors[name] @ vector)[0]) for name in GOOD}
    expected = sorted(GOOD, key=lambda name: -cosines[name])[:3]
    for line, name in zip(lines, expected, strict=False):
        assert line.endswith(name) and line.startswith(f"{cosines[name]:7.3f}  0:00.0 to 0:0")
    text = out.read_text()
    assert "A red &lt;thing&gt;!" in text and "<thing>" not in text
    films = re.findall('<video [^>]*src="([^"]+)" poster="data:image/jpeg', text)
    assert len(films) == 3
    for film, name in zip(films, expected, strict=True):
        address, times = film.rsplit("#t=", 1)
        assert times.startswith("0.000,") and "#" not in address and " " not in address
        decoded = os.path.normpath(out.parent / re.sub("%23", "#", address.replace("%20", " ")))
        assert decoded == str(videos / name)


def test_a_moved_folder_of_videos(made, videos, clip_folder, tmp_path, capsys):
    out = tmp_path / "found.html"
    assert not find("red", made, clip_folder, f"--out={out}", f"--videos={tmp_path}")
    assert "no such file" in out.read_text().lower()  # of each poster that is missing
    shutil.copytree(videos, tmp_path, dirs_exist_ok=True)
    assert not find("red", made, clip_folder, f"--out={out}", f"--videos={tmp_path}")
    assert out.read_text().count('src="a.mp4#t=0.000,') == 1


def test_overlapping_windows_are_found_once(clip_folder):
    model = fluxvit_jax.from_pretrained(clip_folder)
    (vector,) = model.encode_text("red")
    other = np.roll(vector, 1)
    moments = [Moment(0, 8), Moment(4, 12), Moment(8, 16)]
    own = Index(SETTINGS, "", {"a": moments, "b": [Moment(0, 8)]})
    own.vectors = {"a": np.stack([vector, vector * 0.9, vector * 0.8]), "b": other[None]}
    found = search.search(model, own, "Red!", top=9)
    places = [(one.file, one.moment.start) for one in found]
    assert sorted(places) == [("a", 0), ("a", 8), ("b", 0)] and places[0] == ("a", 0)
    assert found[0].cosine == pytest.approx(1, abs=1e-5)


def test_moments_as_text():
    assert page.seconds(Moment(61.25, 3725.5)) == "1:01.2 to 1:02:05.5"
    assert page.seconds(Moment(59.96, 60)) == "1:00.0 to 1:00.0"
    assert page.seconds(Moment(0, 0)) == "whole video"


def test_file_names_of_all_bytes(tmp_path):
    """Names that are not UTF-8 survive the file, and are shown."""
    name = os.fsdecode(b"caf\xe9.mp4")
    own = Index(SETTINGS, "/videos", {name: [Moment(0, 1)]}, {name: np.ones((1, 4), np.float32)})
    index_file.save(own, tmp_path / "index.npz")
    assert index_file.load(tmp_path / "index.npz").moments == own.moments
    found = [Found(0.5, name, Moment(0, 1))]
    page.write(tmp_path / "page.html", "x", own, found, str(tmp_path))
    text = (tmp_path / "page.html").read_text()
    assert "caf\\xe9.mp4" in text and 'src="caf%E9.mp4#t=0.000,1.000"' in text


# ---------------------------------------------------------------------------------------------
# What cannot be


def error_of(capsys) -> str:
    """The only line that was said."""
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    return line


def test_an_index_of_another_model_is_refused(made, videos, clip_folder, tmp_path, capsys):
    config = tiny.make_clip("", "")
    other = tiny.write_clip_run(tmp_path / "run", config, seed=1)
    assert find("red", made, other) == 2
    assert f"{made}: is an index of another model than --checkpoint={other}" in error_of(capsys)
    out = shutil.copy(made, tmp_path / "index.npz")
    assert index(videos, other, out) == 2
    assert "is an index of another model; name another --out" in error_of(capsys)
    assert index(videos, clip_folder, out, "--window=1s") == 2
    assert "is an index with window 0, not 1" in error_of(capsys)


def test_words_that_cannot_be(made, clip_folder, capsys):
    for words in ("", "  ", "?!"):
        assert find(words, made, clip_folder) == 2
        assert "there are no words to look for" in error_of(capsys)
    assert not find("word " * 100, made, clip_folder)
    assert "longer than 77 tokens" in capsys.readouterr().err


def test_weights_and_files_that_cannot_be(made, videos, clip_folder, tmp_path, capsys):
    (tmp_path / "bad.npz").write_bytes(made.read_bytes()[:1000])
    np.save(tmp_path / "one.npy", np.zeros(3))
    index_file.save(Index(SETTINGS, str(videos)), tmp_path / "none yet.npz")
    (tmp_path / "empty").mkdir()
    weight_files.write(read_weights(clip_folder), tmp_path / "alone")
    out = tmp_path / "new.npz"
    for run, message in (
        (lambda: find("red", tmp_path / "none.npz", clip_folder), "there is no index; make one"),
        (lambda: find("red", tmp_path / "bad.npz", clip_folder), "is no index, or a damaged one"),
        (lambda: find("red", made, clip_folder, "--top=0"), "--top=0: must be at least 1"),
        (lambda: find("red", made, clip_folder, "--out=a.txt"), "must be a file .* in .html"),
        (lambda: find("red", tmp_path / "one.npy", clip_folder), "is no index, or a damaged one"),
        (lambda: find("red", tmp_path / "none yet.npz", clip_folder), "holds no moment yet"),
        (lambda: index(videos, clip_folder, tmp_path / "x.zip"), "must be a file .* in .npz"),
        (lambda: index(videos, clip_folder, out, "--stride=1s"), "--stride=1s: add --window"),
        (lambda: index(videos, clip_folder, out, "--tokens=1"), "--tokens: must be at least 2"),
        (lambda: index(videos, tmp_path / "alone", out), "alone: has no text encoder"),
        (lambda: index(tmp_path / "gone", clip_folder, out), "gone: no such folder"),
        (lambda: index(tmp_path / "empty", clip_folder, out), "empty: holds no videos"),
    ):
        assert run() == 2
        assert re.search(message, error_of(capsys))
    assert not out.exists()


def test_a_folder_without_a_readable_video(clip_folder, tmp_path):
    (tmp_path / "x.mp4").write_bytes(b"no video")
    model = fluxvit_jax.from_pretrained(clip_folder)
    with pytest.raises(UserError, match=r"not one of its 1 videos can be read; x.mp4: cannot open"):
        indexing.make(model, str(tmp_path), tmp_path / "i.npz", SETTINGS, indexing.Options())
