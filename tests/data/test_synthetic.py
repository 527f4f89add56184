"""The demo's clips: what tells the classes apart, what must not, and the files themselves."""

import hashlib
import signal
import subprocess
import sys
from itertools import combinations, pairwise

import av
import cv2
import numpy as np
import pytest
from av.video.frame import PictureType
from sklearn.ensemble import ExtraTreesClassifier

from fluxvit_jax.data import synthetic
from fluxvit_jax.data.synthetic import MOTIONS, photographs, render, write_dataset
from fluxvit_jax.errors import UserError
from tests import limited

TRAIN, VALIDATION = 36, 12


def make(motion, seed, frames=33, size=(64, 80)):
    photos = photographs("train")
    chosen = [photos[(seed + step) % len(photos)] for step in range(3)]
    return render(motion, chosen, np.random.default_rng(seed), frames, size)


def is_print(frame):
    """Its pixels [H, W]: only the print's are bright in all three colours."""
    return frame.min(-1) >= 99


def is_object(frame):
    """Its pixels [H, W]: bright in red alone."""
    return (frame[..., 0] > 110) & (frame[..., 1:].max(-1) < 99)


def centre(mask):
    """(x, y) of the middle of a mask [H, W], in short sides of the frame from its centre."""
    height, width = mask.shape
    y, x = np.nonzero(mask)
    middle = np.array([x.mean() - (width - 1) / 2, y.mean() - (height - 1) / 2])
    return middle / min(height, width)


def flow(before, after):
    """Least-squares flow of the print, outliers damped: [3, 2], in short sides of the frame.

    It is x, y = a + b (column, row), where column and row go from -1 to 1.
    """
    gray = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in (before, after)]
    field = cv2.calcOpticalFlowFarneback(*gray, None, 0.5, 3, 15, 3, 5, 1.1, 0)
    height, width = field.shape[:2]
    rows, columns = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    inside = is_print(before) | is_print(after)
    design = np.stack([np.ones(inside.sum()), columns[inside], rows[inside]], 1)
    target = field[inside] / min(height, width)
    weight = np.ones(len(target))
    for _ in range(4):
        weighted = design * weight[:, None]
        solution = np.linalg.solve(design.T @ weighted + 1e-6 * np.eye(3), weighted.T @ target)
        weight = 1 / (1 + (np.linalg.norm(target - design @ solution, axis=1) / 0.01) ** 2)
    return solution


# What is positive in the flow of a motion: (function of flow, motion, its opposite).
SENSES = [
    (lambda f: f[0, 0], "pan_left", "pan_right"),
    (lambda f: f[0, 1], "pan_up", "pan_down"),
    (lambda f: f[1, 0] + f[2, 1], "zoom_in", "zoom_out"),
    (lambda f: f[1, 1] - f[2, 0], "rotate_clockwise", "rotate_counterclockwise"),
]


@pytest.mark.parametrize("measure, motion, opposite", SENSES)
def test_motions_go_the_way_their_names_say(measure, motion, opposite):
    for seed in range(3, 9):
        for name, sign in ((motion, 1), (opposite, -1)):
            clip = make(name, seed)
            total = sum(measure(flow(a, b)) for a, b in pairwise(clip[8:25]))
            assert sign * total > 0.1, (name, seed)


def test_labels_are_those_of_sorted_class_folders():
    assert list(MOTIONS) == sorted(MOTIONS) and len(set(MOTIONS)) == 12


def test_render_is_a_function_of_its_arguments():
    clip = make("start_stop", 3, frames=7, size=(60, 42))
    assert clip.shape == (7, 60, 42, 3) and clip.dtype == np.uint8
    np.testing.assert_array_equal(clip, make("start_stop", 3, frames=7, size=(60, 42)))
    assert (clip != make("start_stop", 4, frames=7, size=(60, 42))).any()
    with pytest.raises(ValueError, match="unknown motion 'pan'"):
        make("pan", 0)


def test_all_motions_share_a_frame_near_the_middle():
    shared = []
    for seed in range(6):
        clips = [make(motion, seed) for motion in MOTIONS]
        shared += [t for t in range(33) if all((clip[t] == clips[0][t]).all() for clip in clips)]
    assert len(shared) == 6 and len(set(shared)) > 2  # one in each, not always the same
    assert min(shared) >= 11 and max(shared) <= 21


@pytest.mark.parametrize("size", [(84, 84), (84, 150), (160, 90)])
def test_print_and_object_are_in_the_central_square(size):
    short = min(size)
    top, left = (size[0] - short) // 2, (size[1] - short) // 2
    for seed in range(20):
        clip = make(MOTIONS[seed % 12], seed, 24, size)
        square = clip[:, top : top + short, left : left + short]
        assert min(is_print(frame).mean() for frame in square) > 0.02, seed
        assert is_print(square[12]).mean() > 0.1 and is_object(square[12]).mean() > 0.01, seed


@pytest.mark.parametrize("seed", range(4))
def test_start_stop_moves_and_then_stands(seed):
    clip = make("start_stop", seed).astype(float)
    change = np.abs(np.diff(clip, axis=0)).mean((1, 2, 3))
    assert change[:12].min() > 0.5  # stops between 0.42 and 0.58
    assert change[20:].max() == 0


@pytest.mark.parametrize("seed", range(4))
def test_reversal_comes_back_the_same_way(seed):
    clip = make("reversal", seed, frames=61).astype(float)
    late = clip[45]
    early = np.abs(clip[:28] - late).mean((1, 2, 3)).min()  # where 45 is was passed before
    assert early < 0.3 * np.abs(clip[30] - late).mean()


@pytest.mark.parametrize("seed", range(4))
def test_the_object_goes_its_own_way_in_the_object_classes_alone(seed):
    def displacements(clip):
        """Of print and object."""
        by_object = centre(is_object(clip[-1])) - centre(is_object(clip[0]))
        return sum(flow(a, b)[0] for a, b in pairwise(clip)), by_object

    def cosine(one, other):
        return one @ other / np.linalg.norm(one) / np.linalg.norm(other)

    stuck, moving, still = (
        make(motion, seed)[12:21]  # here print and object are well in view
        for motion in ("pan_left", "object_over_moving", "object_over_still")
    )
    assert cosine(*displacements(stuck)) > 0.9
    assert cosine(*displacements(moving)) < -0.2
    assert np.median(np.ptp(still[:, is_print(still[0])], axis=0)) == 0
    assert np.linalg.norm(displacements(still)[1]) > 0.08


@pytest.mark.parametrize("motion", MOTIONS)
def test_the_background_stands(motion):
    clip = make(motion, 1, size=(64, 128))
    away = ~np.any([is_print(f) | is_object(f) for f in clip], axis=0)
    away = cv2.erode(away.astype(np.uint8), np.ones((5, 5))).astype(bool)  # not at soft edges
    assert away.mean() > 0.1
    assert np.ptp(clip[:, away], axis=0).max() == 0


def single_frame_features(frame):
    """Colours by place, edges, and where print and object are, how large and how they lie."""
    small = cv2.resize(frame, (6, 6), interpolation=cv2.INTER_AREA).ravel() / 255
    dy, dx = np.gradient(frame.mean(-1))
    edges = np.hypot(dx, dy)
    angles = np.histogram(np.arctan2(dy, dx), 12, (-np.pi, np.pi), weights=edges)[0]
    shapes = []
    for mask in (is_print(frame), is_object(frame)):
        moments = cv2.moments(mask.astype(np.uint8), binaryImage=True)
        area = max(moments["m00"], 1)
        shapes += [area, moments["m10"] / area, moments["m01"] / area]
        shapes += [moments[name] / area for name in ("mu20", "mu11", "mu02")]
        shapes += [mask[0].sum(), mask[-1].sum(), mask[:, 0].sum(), mask[:, -1].sum()]
    percentiles = np.percentile(edges, (10, 50, 75, 90, 99))
    return np.concatenate([small, angles / edges.sum(), percentiles, shapes])


def accuracy(features, clips):
    """Of a forest that learns from clips of the training photographs, on validation's."""
    known, labels = zip(*clips["train"], strict=True)
    forest = ExtraTreesClassifier(200, min_samples_leaf=2, random_state=0)
    forest.fit([features(clip) for clip in known], labels)
    unseen, labels = zip(*clips["validation"], strict=True)
    return (forest.predict([features(clip) for clip in unseen]) == np.array(labels)).mean()


@pytest.fixture(scope="module")
def clips():
    def some(split, count):
        photos = photographs(split)
        for index in range(count):
            rng = np.random.default_rng([index, len(split)])
            chosen = [photos[number] for number in rng.choice(len(photos), 3, replace=False)]
            label = index % len(MOTIONS)
            yield render(MOTIONS[label], chosen, rng, 9, (60, 64)), label

    return {"train": list(some("train", 720)), "validation": list(some("validation", 480))}


# Chance is 0.083 with a standard deviation of 0.013 on 480 clips.
@pytest.mark.slow
@pytest.mark.parametrize("frame, most", [(0, 0.7), (4, 0.2), (8, 0.7), (None, 0.35)])
def test_how_far_a_single_frame_tells_the_class(clips, frame, most):
    random = np.random.default_rng(0)

    def features(clip):
        return single_frame_features(clip[random.integers(len(clip)) if frame is None else frame])

    assert accuracy(features, clips) < most


def test_motion_tells_the_class_on_unseen_photographs(clips):
    def features(clip):
        objects = [centre(mask) if mask.any() else np.zeros(2) for mask in map(is_object, clip)]
        flows = [flow(a, b).ravel() for a, b in zip(clip[:-1:2], clip[1::2], strict=True)]
        return np.concatenate([*flows, *np.diff(objects, axis=0)])

    few = {split: members[:240] for split, members in clips.items()}
    assert accuracy(features, few) > 0.9


def test_splits_share_no_photograph():
    pictures = [photo for split in ("train", "validation") for photo in photographs(split)]
    assert len(photographs("train")) >= 12 and len(photographs("validation")) >= 5
    for one, other in combinations(pictures, 2):
        small = [cv2.resize(p, (16, 16), interpolation=cv2.INTER_AREA) for p in (one, other)]
        assert np.corrcoef(small[0].ravel(), small[1].ravel())[0, 1] < 0.9
    assert all(photo.ndim == 3 and photo.dtype == np.uint8 for photo in pictures)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    out = tmp_path_factory.mktemp("synthetic") / "data"
    write_dataset(out, TRAIN, VALIDATION, seed=5, workers=2)
    return out


def digests(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def rows(path):
    header, *lines = path.read_text().splitlines()
    assert header == "path,label"
    return [(line.split(",")[0], int(line.split(",")[1])) for line in lines]


def test_lists_name_every_file_and_classes_are_balanced(dataset):
    assert (dataset / "classes.txt").read_text().splitlines() == list(MOTIONS)
    for split, count in (("train", TRAIN), ("validation", VALIDATION)):
        listed = rows(dataset / f"{split}.csv")
        found = {str(p.relative_to(dataset)) for p in (dataset / split).rglob("*") if p.is_file()}
        assert {path for path, _ in listed} == found and len(listed) == count
        assert np.bincount([label for _, label in listed]).tolist() == [count // 12] * 12
        assert all(path.split("/")[1] == MOTIONS[label] for path, label in listed)


def test_files_are_ordinary_h264_of_all_sorts(dataset):
    frames, sizes, rates, sounds, key_frames = set(), set(), set(), 0, set()
    for path in (dataset / "train").rglob("*.mp4"):
        with av.open(path) as file:
            video = file.streams.video[0]
            assert video.codec_context.name == "h264" and video.codec_context.pix_fmt == "yuv420p"
            decoded = list(file.decode(video))
            assert len(decoded) == video.frames
            duration = len(decoded) / video.average_rate
            kinds = [frame.pict_type for frame in decoded]
            assert PictureType.B in kinds and kinds[0] == PictureType.I, path
            frames.add(len(decoded))
            sizes.add((video.height, video.width))
            rates.add(video.average_rate)
            key_frames.add(kinds.count(PictureType.I))
        with av.open(path) as file:
            for audio in file.streams.audio:
                sounds += 1
                assert audio.codec_context.name == "aac"
                samples = sum(frame.samples for frame in file.decode(audio))
                assert samples / audio.rate == pytest.approx(float(duration), abs=0.15)
    assert 20 <= min(frames) < 28 and 36 < max(frames) <= 44
    assert len(rates) >= 4 and 12 in rates
    assert {np.sign(height - width) for height, width in sizes} == {-1, 0, 1}
    assert 0 < sounds < TRAIN / 2
    assert max(key_frames) > 1


def test_a_decoded_clip_shows_the_motion_rendered(dataset):
    with av.open(dataset / "validation" / "pan_left" / "0000.mp4") as file:
        clip = np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])
    assert centre(is_print(clip[-1]))[0] - centre(is_print(clip[0]))[0] > 0.1


def test_same_seed_gives_the_same_bytes(dataset, tmp_path):
    write_dataset(tmp_path / "again", TRAIN, VALIDATION, seed=5, workers=1)
    assert digests(tmp_path / "again") == digests(dataset)
    write_dataset(tmp_path / "other", 12, 1, seed=6, workers=2)
    other, known = digests(tmp_path / "other"), digests(dataset)
    assert all(other[name] != known[name] for name in other if name.endswith(".mp4"))


def test_an_interrupted_run_goes_on_where_it_stopped(dataset, tmp_path):
    out = tmp_path / "data"
    counts = [f"--train={TRAIN}", f"--validation={VALIDATION}"]
    command = [sys.executable, "-m", "fluxvit_jax.data.synthetic", f"--out={out}", *counts]
    command += ["--seed=5", "--workers=1"]
    run = limited.Process(command, stderr=subprocess.PIPE, text=True)
    assert limited.wait_until(lambda: list(out.rglob("*.mp4")), run), run.communicate()
    run.send_signal(signal.SIGINT)
    _, errors = run.communicate()
    assert run.returncode == 130 and "goes on" in errors and "Traceback" not in errors
    written = {path: path.stat().st_mtime_ns for path in out.rglob("*.mp4")}
    assert 0 < len(written) < TRAIN + VALIDATION and not (out / "train.csv").exists()

    write_dataset(out, TRAIN, VALIDATION, seed=5, workers=2)
    assert digests(out) == digests(dataset)
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in written.items())


def test_other_arguments_and_other_folders_are_refused(dataset, tmp_path, capsys):
    before = digests(dataset)
    with pytest.raises(UserError, match="was made with seed 5, not 7"):
        write_dataset(dataset, TRAIN, VALIDATION, seed=7)
    (tmp_path / "mine.txt").write_text("precious")
    assert synthetic.main([f"--out={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert "is no data set of ours" in error and error.count("\n") == 1
    with pytest.raises(UserError, match="at least 1"):
        write_dataset(tmp_path / "new", train=0)
    assert digests(dataset) == before and not (tmp_path / "new").exists()


def test_a_missing_photograph_says_what_to_install(monkeypatch):
    for name in ("skimage/data/nothing.png", "no_such_package/picture.png"):
        monkeypatch.setitem(synthetic.PHOTOGRAPHS, "train", (name,))
        with pytest.raises(UserError, match=rf"{name} is missing: pip install .*\[demo\]"):
            photographs("train")
