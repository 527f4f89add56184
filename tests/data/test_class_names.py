"""The class names that ship: their numbers and order, Kinetics-710's parts, and where they go."""

import pytest

from fluxvit_jax.data import class_names
from fluxvit_jax.data.annotations import read_class_names

SIZES = {
    **{"k400": 400, "k600": 600, "k700": 700, "k710": 710},
    **{"ssv2": 174, "ucf101": 101, "hmdb51": 51, "mit": 339},
}


@pytest.mark.parametrize("dataset", class_names.DATASETS)
def test_names_are_as_many_as_classes_and_all_different(dataset):
    names = class_names.of_dataset(dataset)
    assert len(names) == SIZES[dataset] == len(set(map(class_names.normalized, names)))
    assert all(name == name.strip() != "" for name in names)
    assert class_names.dataset_of(names) == dataset
    assert read_class_names(dataset) == names


def test_labels_are_the_official_ones():
    """Lists of videos that others have published count by these."""
    known = {
        "k400": {0: "abseiling", 5: "archery", 169: "juggling balls", 399: "zumba"},
        "ssv2": {
            0: "Approaching something with your camera",
            173: "Wiping something off of something",
        },
        "ucf101": {0: "ApplyEyeMakeup", 34: "Hammering", 35: "HammerThrow", 100: "YoYo"},
        "hmdb51": {0: "brush_hair", 50: "wave"},
        "mit": {0: "clapping"},
    }
    for dataset, labels in known.items():
        names = class_names.of_dataset(dataset)
        assert {label: names[label] for label in labels} == labels


@pytest.mark.parametrize(("part", "renamed"), [("k400", 13), ("k600", 3), ("k700", 1)])
def test_parts_of_kinetics_710(part, renamed):
    """Each class is there once and, but for those that were renamed, under its own name."""
    labels = class_names.labels_in_k710(part)
    names, whole = class_names.of_dataset(part), class_names.of_dataset("k710")
    assert len(labels) == len(set(labels)) == len(names)
    differ = [name for name, label in zip(names, labels, strict=True) if whole[label] != name]
    assert len(differ) == renamed
    assert part != "k400" or labels == tuple(range(400))


def test_the_three_parts_make_up_kinetics_710():
    parts = [set(class_names.labels_in_k710(part)) for part in class_names.PARTS_OF_K710]
    assert set.union(*parts) == set(range(710))


def test_did_you_mean():
    known = ("juggling balls", "Zoom_in")
    assert class_names.did_you_mean("jugling balls", known) == "; did you mean 'juggling balls'?"
    assert class_names.did_you_mean("zoom-inn", known) == "; did you mean 'Zoom_in'?"
    assert class_names.did_you_mean("swimming", known) == ""
