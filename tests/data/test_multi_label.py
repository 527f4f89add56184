"""Lists with several labels a video, and their multi-hot arrays."""

import numpy as np
import pytest

from fluxvit_jax.data import splits
from fluxvit_jax.data.annotations import open_source, read_named
from fluxvit_jax.data.class_names import KnownNames
from fluxvit_jax.data.evaluation_videos import EvaluationVideos
from fluxvit_jax.data.multi_label import label_array
from fluxvit_jax.data.prepare import prepare
from fluxvit_jax.data.views import Views
from fluxvit_jax.errors import UserError
from fluxvit_jax.grids import Grid
from tests import tiny


def read(folder, text: str, classes: int | None = None, known: KnownNames | None = None):
    """The labels of a list's videos, and its names."""
    path = folder / "list.csv"
    path.write_text(text)
    examples, names = read_named(path, classes=classes, known=known, multi_label=True)
    return [example.label for example in examples], names


@pytest.mark.parametrize(
    "text",
    [
        "path,labels\na.mp4,7|0|3\nb.mp4,\nc.mp4,2\n",
        "a.mp4, 0 | 3|7|3\nb.mp4,\nc.mp4,2\n",
        "a.mp4\t0|3|7\nb.mp4\t\nc.mp4\t2\n",
        'a.mp4;"0|3|7"\nb.mp4;""\nc.mp4;2\n',
    ],
)
def test_numbers(tmp_path, text):
    assert read(tmp_path, text, 8) == ([(0, 3, 7), (), (2,)], None)
    assert open_source(tmp_path / "list.csv", multi_label=True).classes == 8


def test_numbers_after_blanks(tmp_path):
    assert read(tmp_path, "a.mp4 1|0\nb.mp4 2\n") == ([(0, 1), (2,)], None)


def test_names(tmp_path):
    """In the order of a checkpoint or a file of names if there is one, else sorted."""
    text = 'path,label\na.mp4,running|jumping high\nb.mp4,"Jumping_High | eating, fast"\nc.mp4,\n'
    names = ("eating, fast", "jumping high", "running")
    assert read(tmp_path, text, 3) == ([(1, 2), (0, 1), ()], names)
    known = KnownNames(("sleeping", *reversed(names)), "the checkpoint")
    assert read(tmp_path, text, 4, known)[0] == [(1, 2), (2, 3), ()]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.mp4,0|4\nb.mp4,1\n", "line 1: label 4 must be one of 0..3"),
        ("a.mp4,0||1\n", "line 1: label '' is no integer"),
        ("a.mp4,0\nb.mp4,1|x\n", "line 2: label 'x' is no integer"),
        ("a.mp4,a|b\nb.mp4,c|d|\n", "line 2: the label is missing"),
        ("a.mp4,a|b\nb.mp4,c\n", "names 3 classes where 4 are expected"),
        ("a.mp4,0|1\nb.mp4,2\na.mp4,2\n", r"line 3: a.mp4 has label 2, but 0\|1 in line 1; write"),
        ("a.mp4,0\na.mp4,\nb.mp4,1\n", "line 2: a.mp4 has label none, but 0 in line 1"),
        ("a.mp4,\nb.mp4,\n", "no video has a label"),
    ],
)
def test_a_bad_line_is_named(tmp_path, text, message):
    known = KnownNames("abcd", "it") if "missing" in message else None
    with pytest.raises(UserError, match=message):
        read(tmp_path, text, 4, known)


@pytest.mark.parametrize("labels", ["0|1", "running|jumping"])
def test_several_labels_need_the_field(tmp_path, labels):
    path = tmp_path / "list.csv"
    path.write_text(f"path,label\na.mp4,{labels}\n")
    message = (
        r"line 2: '.*\|.*' is several labels, which only --config.train.multi_label=True reads"
    )
    with pytest.raises(UserError, match=message):
        read_named(path)
    with pytest.raises(UserError, match=message):
        prepare(path, tmp_path / "out")
    known = KnownNames(["running|jumping"], "data.class_names")
    if labels in known:  # the one name of a class
        assert read_named(path, known=known)[0][0].label == 0


def test_folders_tell_one_label_a_video(tiny_data, tmp_path):
    folder = tiny.class_folders(tiny_data, tmp_path / "folders", "abcd", range(4))
    prepared = tmp_path / "prepared"
    prepare(tiny_data / "train.csv", prepared)
    for path in (folder, prepared):
        with pytest.raises(UserError, match=r"one label a video; config.train.multi_label needs a"):
            open_source(path, multi_label=True)


def test_other_labels_of_the_same_videos_are_other_data(tmp_path):
    """Also where each video has as many labels as before, or only one."""
    identities = []
    for labels in ("0|1", "0|2", "0"):
        (tmp_path / "list.csv").write_text(f"a.mp4,{labels}\nb.mp4,1\n")
        identities.append(open_source(tmp_path / "list.csv", multi_label=True).identity)
    for other in identities[1:]:
        difference = splits.identity_difference(identities[0], other)
        assert difference == "other labels for the same videos"


def test_a_clip_in_quarantine_keeps_its_label(tiny_data, tmp_path):
    """It counts as wrong, of its own classes."""
    (tmp_path / "list.csv").write_text("1.mp4,0|2\n")
    for path, several, label in (
        (tmp_path / "list.csv", True, [[1, 0, 1]]),
        (tiny_data / "train.csv", False, [1]),
    ):
        source = open_source(path, tiny_data, multi_label=several)
        quarantine = {"1.mp4": "crashed"}
        videos = EvaluationVideos(
            source, (Grid.square(2, 28),), Views(), multi_hot=3 * several, quarantine=quarantine
        )
        item = videos[source.ids.index("1.mp4")]
        assert item["failure"] == ["crashed"] and item["label"].tolist() == label


def test_arrays():
    several = label_array([(0, 2), (), (1,)], multi_hot=3)
    assert several.dtype == np.uint8 and several.tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0]]
    single = label_array([2, 0])
    assert single.dtype == np.int32 and single.tolist() == [2, 0]
