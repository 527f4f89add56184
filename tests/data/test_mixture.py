import collections
import os
from pathlib import Path

import cv2
import numpy as np
import pytest

from fluxvit_jax.data import pipeline
from fluxvit_jax.data.mixture import Mixture, Part, open_mixture
from fluxvit_jax.data.sources import Example, FileSource
from fluxvit_jax.errors import UserError
from tests import tiny


def source(count: int) -> FileSource:
    return FileSource([Example(f"{i}.mp4", 0, f"/videos/{i}.mp4") for i in range(count)])


def write(folder, text: str):
    path = folder / "mixture.csv"
    path.write_text(text)
    return path


@pytest.fixture
def lists(tmp_path):
    """A list with labels, one without, one of images with three columns, each below a root."""
    for name, text in {
        "a/list.csv": "path,label\nx.mp4,3\ny.mp4,99\n",
        "b.txt": "one.mp4\ntwo words.mp4\n",
        "c.csv": "p.png 1 7\nq.png 1 8\nr.png 1 9\n",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    for root in ("videos", "images"):
        (tmp_path / root).mkdir()
    return tmp_path


def test_sources_of_all_kinds(lists):
    path = write(
        lists, "list,root,weight,flip\na/list.csv,,2,yes\n\nb.txt, videos ,,no\nc.csv,images\n"
    )
    mixed = open_mixture(path)
    assert [(part.name, part.weight, part.flip) for part in mixed.parts] == [
        ("a/list.csv", 2.0, True),
        ("b.txt", 1.0, False),
        ("c.csv", 1.0, True),
    ]
    records = [mixed[i] for i in range(len(mixed))]
    assert [record.label for record in records] == [0] * 7
    assert [record.flip for record in records] == [True] * 2 + [False] * 2 + [True] * 3
    assert records[1].id == "a/list.csv/y.mp4" and records[1].video == str(lists / "a/y.mp4")
    assert records[3].video == str(lists / "videos/two words.mp4")
    assert records[6].video == str(lists / "images/r.png")
    for index in (-1, 7):
        with pytest.raises(IndexError):
            mixed[index]


def test_one_list_is_a_mixture_of_one(lists):
    mixed = open_mixture(lists / "b.txt", lists / "images")
    assert len(mixed) == 2 and mixed[0].video == str(lists / "images/one.mp4")
    assert mixed[0].flip


def test_names_that_are_not_utf8_are_shown_escaped(lists):
    root = os.fsencode(lists)
    for name, content in {
        b"/b\xe8.mp4": b"x",
        b"/l\xe9.txt": b"b\xe8.mp4\n",
        b"/mixture.csv": b"list,flip\nl\xe9.txt,no\n",
    }.items():
        with open(root + name, "wb") as file:
            file.write(content)
    for path in (lists / "mixture.csv", os.fsdecode(root + b"/l\xe9.txt")):
        mixed = open_mixture(path)
        assert mixed[0].id.endswith("l\\xe9.txt/b\\xe8.mp4")
        assert mixed.ids[0].startswith(mixed[0].id)
        assert Path(mixed[0].video).read_text() == "x"
    assert mixed.fingerprint


def test_the_fingerprint_is_of_sources_weights_and_rules(lists):
    for name in ("x", "y"):
        (lists / f"a/{name}.mp4").write_text(name)
    texts = ["list\na/list.csv\n", "list,weight\na/list.csv,2\n", "list,flip\na/list.csv,no\n"]
    prints = [open_mixture(write(lists, text)).fingerprint for text in texts]
    assert len(set(prints)) == 3
    assert open_mixture(write(lists, "list,flip\na/list.csv,yes\n")).fingerprint == prints[0]


@pytest.mark.parametrize(
    "text, message",
    [
        ("list,wieght\na/list.csv,1\n", "line 1: 'wieght' is none of list, root, weight, flip"),
        ("list\n", "names no source"),
        ("list,weight\na/list.csv,-1\n", "line 2: the weight '-1' is no number above 0"),
        ("list,weight\na/list.csv,much\n", "line 2: the weight 'much' is no number"),
        ("list,flip\nb.txt,maybe\n", "line 2: flip is 'maybe', neither yes nor no"),
        ("list,root\na/list.csv,\n,videos\n", "line 3: names no list"),
        ("list\na/list.csv,videos\n", "line 2: 2 columns where list are 1"),
        ("list\nabsent.csv\n", "absent.csv: no such file"),
        ("list,root\nb.txt,nowhere\n", "root of its paths, .*nowhere, is no folder"),
    ],
)
def test_mistakes_are_one_line(lists, text, message):
    with pytest.raises(UserError, match=message) as caught:
        open_mixture(write(lists, text))
    assert "\n" not in str(caught.value)


def test_draws_follow_the_weights():
    """Of 40, 20 and 10 videos with weights 1, 2 and 0.5: 40, 40 and 5 parts of 85."""
    mixed = Mixture(
        (
            Part(name="a", source=source(40), weight=1.0),
            Part(name="b", source=source(20), weight=2.0),
            Part(name="c", source=source(10), weight=0.5),
        )
    )
    order = mixed.order(seed=3)
    drawn = [int(order[i]) for i in range(850)]
    counts = collections.Counter(drawn)
    shares = [sum(counts[i] for i in own) for own in (range(40), range(40, 60), range(60, 70))]
    np.testing.assert_allclose(shares, [400, 400, 50], atol=2)
    assert all(counts[i] in (9, 10, 11) for i in range(40))  # each as often as the others
    assert all(counts[i] in (19, 20, 21) for i in range(40, 60))
    first = [sum(i in own for i in drawn[:85]) for own in (range(40), range(40, 60))]
    np.testing.assert_allclose(first, [40, 40], atol=2)  # mixed from the beginning
    again = mixed.order(seed=3)
    assert [int(again[i]) for i in (849, 5, 400)] == [drawn[i] for i in (849, 5, 400)]
    other = mixed.order(seed=4)
    assert [int(other[i]) for i in range(85)] != drawn[:85]


def test_clips_of_a_mixture(tiny_data, tmp_path):
    """Videos without flips and an image, through the training pipeline."""
    flat = np.zeros((60, 80, 3), np.uint8)
    flat[:, :40] = 255  # white on the left
    assert cv2.imwrite(str(tmp_path / "half.png"), flat)
    (tmp_path / "images.txt").write_text("half.png\n")
    path = write(
        tmp_path,
        f"list,root,weight,flip\nimages.txt,,16,no\n{tiny_data}/train.csv,{tiny_data},1,yes\n",
    )
    config = tiny.make_config(tiny_data, data__repeated_aug=1, data__augment__scale=(0.99, 1.0))
    items = pipeline.TrainGroups(
        source=open_mixture(path), seed=0, grids=pipeline.admissible_grids(config), group=4,
        repeats=1, augment=config.data.augment,
    )  # fmt: skip
    images = 0
    for number in range(10):
        item = items[number]
        assert not item["failure"].any()
        T, H, W = item["grid"][0]
        for clip in item["patches"][:, : T * H * W]:
            frames = clip.reshape(T, H, W, 14, 14, 3).mean((3, 4, 5))
            if np.ptp(frames, axis=0).max() == 0 and frames[0, 0, 0] > 250:
                images += 1
                assert frames[0, :, -1].max() < 5  # not mirrored
    assert 10 <= images <= 30
