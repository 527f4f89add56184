"""Lists of videos compared: class names, shared videos, and what changed."""

import shutil

import pytest
from ml_collections import ConfigDict

from fluxvit_jax.data.annotations import open_source
from fluxvit_jax.data.mixture import open_mixture
from fluxvit_jax.data.pipeline import training_source
from fluxvit_jax.data.prepare import prepare
from fluxvit_jax.data.sources import Subset, training_part
from fluxvit_jax.data.splits import (
    common_class_names,
    configured_class_names,
    count_classes,
    describe_data,
    identity_difference,
    open_validation,
    shared_videos,
)
from fluxvit_jax.errors import UserError
from tests import tiny


def test_class_names_that_agree():
    assert common_class_names({"a": None, "b": ()}) is None
    known = {"a": None, "b": ("Pan left", "zoom-in"), "c": ("pan_left", "Zoom In")}
    assert common_class_names(known) == ("Pan left", "zoom-in")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("zoom", "pan"), "the list: class 0 is 'zoom', but the folder calls it 'pan'"),
        (("pan", "tilt"), "the list: class 1 is 'tilt', but the folder calls it 'zoom'"),
        (("pan",), "the list: names 1 classes where the folder names 2"),
    ],
)
def test_class_names_that_differ(names, message):
    with pytest.raises(UserError, match=message):
        common_class_names({"the folder": ("pan", "zoom"), "nothing": None, "the list": names})


def test_configured_class_names(tmp_path):
    assert configured_class_names("", 3) is None
    (tmp_path / "names.txt").write_text("a\nb\n")
    assert configured_class_names(str(tmp_path / "names.txt"), 2) == ("a", "b")
    with pytest.raises(UserError, match=r"names.txt has 2 names for config.model.classes=3"):
        configured_class_names(str(tmp_path / "names.txt"), 3)
    with pytest.raises(UserError, match=r"gone.txt: no such file"):
        configured_class_names(str(tmp_path / "gone.txt"), 3)


def config_of(tmp_path, train, validation, **changes) -> ConfigDict:
    """A config whose lists have these labels."""
    for name, labels in (("train", train), ("validation", validation)):
        write_list(tmp_path, f"{name}.csv", [f"{i}.mp4,{x}" for i, x in enumerate(labels)])
    lists = {f"data__{name}": str(tmp_path / f"{name}.csv") for name in ("train", "validation")}
    return tiny.make_config(tmp_path, model__classes=0, **lists | changes)


def test_validation_is_compared_with_training_by_name(tmp_path):
    """Validation lacks a class and spells another one otherwise."""
    config = count_classes(config_of(tmp_path, ["walk", "run", "juggling"], ["Walk", "juggling"]))
    assert config.model.classes == 3
    training = training_source(config)
    validation = open_validation(config, training)
    assert training.class_names == validation.class_names == ("juggling", "run", "walk")
    assert [record.label for record in validation] == [2, 0]
    description = describe_data(config, training, validation)
    assert description["class_names"] == ["juggling", "run", "walk"]


def test_a_recipe_gives_the_order_of_its_names(tmp_path):
    config = config_of(tmp_path, ["zumba", "abseiling"], ["archery"], data__class_names="k400")
    config = count_classes(config)
    assert config.model.classes == 400
    training = training_source(config)
    assert [record.label for record in training] == [399, 0]
    assert [record.label for record in open_validation(config, training)] == [5]
    config.data.train, config.model.classes = "", 7
    assert count_classes(config).model.classes == 7


def test_numbers_are_counted(tmp_path):
    config = config_of(tmp_path, [4, 0], [1])
    assert count_classes(config).model.classes == 5 and config.model.classes == 0
    config.data.train = ""
    with pytest.raises(UserError, match="no data to count the classes of: add"):
        count_classes(config)


def test_numbers_that_leave_classes_out(tmp_path, capsys):
    assert count_classes(config_of(tmp_path, [0, 1, 2], [0])).model.classes == 3
    assert "no video" not in capsys.readouterr().err
    assert count_classes(config_of(tmp_path, [1, 2, 5], [1])).model.classes == 6
    expected = "3 of its 6 classes have no video; labels count from 0"
    assert expected in capsys.readouterr().err
    with pytest.raises(UserError, match=r"label 2000000000, but .*\.classes=2000000001"):
        count_classes(config_of(tmp_path, [0, 2 * 10**9], [1]))


@pytest.mark.parametrize(
    ("train", "validation", "message"),
    [
        (
            ["walk", "juggling"],
            ["walk", "jugling"],
            r"validation\.csv, line 2: class 'jugling' is none of the 2 of config\.data\.train=.*"
            "did you mean 'juggling'",
        ),
        (["walk", "run"], [0, 1], "its labels are numbers, but those of config.data.train=.* are"),
        (
            [0, 1],
            ["walk", "run"],
            "its labels are names, but config.data.train=.* has numbers only",
        ),
    ],
)
def test_names_and_numbers_that_do_not_go_together(tmp_path, train, validation, message):
    config = count_classes(config_of(tmp_path, train, validation))
    with pytest.raises(UserError, match=message) as error:
        open_validation(config, training_source(config))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("names", [("0", "1", "2", "11"), ("walk", "run", "jump", "sit")])
def test_class_folders_and_numbers_do_not_go_together(tiny_data, tmp_path, names):
    """Folders are numbered in the order of their names, "11" before "2"; a list as it likes."""
    folder = tiny.class_folders(tiny_data, tmp_path / "folder", names, range(8))
    config = config_of(tmp_path, [0, 1, 2, 3], [0, 1, 2, 3])
    numbers = config.data.train
    for train, validation, message in (
        (numbers, folder, "its labels are names, but config.data.train=.* has numbers only"),
        (folder, numbers, "its labels are numbers, but those of config.data.train=.* are names"),
    ):
        config.data.train, config.data.validation = str(train), str(validation)
        config.model.classes = 4
        with pytest.raises(UserError, match=message):
            open_validation(config, training_source(config))
    (tmp_path / "names.txt").write_text("\n".join(names))
    config.data.train, config.data.validation = numbers, str(folder)
    config.data.class_names = str(tmp_path / "names.txt")
    found = open_validation(config, training_source(config))
    assert [names[found[k].label] for k in range(len(found))] == [
        found.ids[k].split("/")[0] for k in range(len(found))
    ]


def write_list(folder, name, rows):
    (folder / name).write_text("\n".join(rows) + "\n")
    return folder / name


def test_identity_is_of_ids_and_labels_in_order_alone(tiny_data, tmp_path):
    source = open_source(tiny_data / "train.csv")
    rows = [f"{example.id},{example.label}" for example in source.examples]

    def identity(rows):
        return open_source(write_list(tmp_path, "list.csv", rows), tiny_data).identity

    assert identity_difference(source.identity, identity(rows)) is None
    swapped = [rows[1], rows[0], *rows[2:]]
    labels = ["0.mp4,1", *rows[1:]]
    assert "another order" in identity_difference(source.identity, identity(swapped))
    assert "other labels" in identity_difference(source.identity, identity(labels))
    assert "15 videos instead of 16" in identity_difference(source.identity, identity(rows[1:]))
    empty = [tmp_path / f"{n}.mp4" for n in range(16)]
    for path in empty:  # videos of other sizes
        path.touch()
    moved = open_source(tmp_path / "list.csv", tmp_path)
    assert moved.identity == open_source(tmp_path / "list.csv", tiny_data).identity


def test_a_part_of_a_source_has_an_identity_of_its_own(tiny_data):
    source = open_source(tiny_data / "train.csv")
    parts = [training_part(source, share) for share in (0.25, 0.5)]
    again = training_part(open_source(tiny_data / "train.csv"), 0.25)
    assert parts[0].identity == again.identity
    assert parts[0].identity["videos"] == 12
    reordered = Subset(source, parts[0].numbers[::-1])
    assert "another order" in identity_difference(parts[0].identity, reordered.identity)


def test_a_prepared_folder_is_the_list_that_it_was_made_of(tiny_data, tmp_path):
    prepare(tiny_data / "train.csv", tmp_path / "prepared")
    prepared = open_source(tmp_path / "prepared")
    listed = open_source(tiny_data / "train.csv")
    assert prepared.identity == listed.identity
    assert shared_videos(prepared, listed) == 0  # only reading all would tell


def test_a_mixture_knows_its_parts_wherever_they_lie(tiny_data, tmp_path):
    moved = shutil.copytree(tiny_data, tmp_path / "moved")
    before, now = (open_mixture(folder / "train.csv") for folder in (tiny_data, moved))
    assert before.identity == now.identity
    other = open_mixture(tiny_data / "train_bad.csv")
    assert identity_difference(before.identity, other.identity) == "17 videos instead of 16"
    for name, weight in (("a", 1), ("b", 2)):
        write_list(moved, f"{name}.csv", ["list,weight", f"train.csv,{weight}"])
    weighted = [open_mixture(moved / f"{name}.csv").identity for name in "ab"]
    assert weighted[0] == now.identity and "other videos" in identity_difference(*weighted)


def test_shared_videos_are_counted_by_their_files(tiny_data, tmp_path):
    train, validation = (open_source(tiny_data / f"{n}.csv") for n in ("train", "validation"))
    assert shared_videos(train, validation) == 0
    rows = ["0.mp4,0", "1.mp4,1", "17.mp4,1"]
    mixed = open_source(write_list(tmp_path, "mixed.csv", rows), tiny_data)
    assert (shared_videos(train, mixed), shared_videos(validation, mixed)) == (2, 1)
    # Two trees whose files have the same names are not the same videos.
    for split in ("a", "b"):
        (tmp_path / split / "class").mkdir(parents=True)
        shutil.copy(tiny_data / "0.mp4", tmp_path / split / "class")
    trees = [open_source(tmp_path / split) for split in ("a", "b")]
    assert trees[0].ids == trees[1].ids and shared_videos(*trees) == 0
