"""Lists of conversations: what is read, what is refused, and clips of parts of videos."""

import json
import pickle

import cv2
import numpy as np
import pytest

from fluxvit_jax.data.chat_templates import Turn
from fluxvit_jax.data.conversations import open_conversations
from fluxvit_jax.data.decoding import DecodeError, Video
from fluxvit_jax.data.pipeline import train_batches
from fluxvit_jax.data.reading import segment_of
from fluxvit_jax.data.sources import Example, Record
from fluxvit_jax.data.splits import identity_difference
from fluxvit_jax.errors import UserError
from tests import tiny
from tests.data.videos import write_video

TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A dog."}]
READ = (Turn("user", "<image>\nWhat?"), Turn("assistant", "A dog."))
ITEM = {"video": "a.mp4", "conversations": TURNS}


def write(folder, name: str, content) -> str:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def items(count: int) -> list[dict]:
    return [ITEM | {"video": f"{number}.mp4"} for number in range(count)]


def test_videos_and_images_are_parts_of_their_own(tmp_path):
    content = [
        ITEM | {"id": "x", "start": 1, "end": 2.5},
        {"image": ["b.jpg"], "conversations": TURNS},
        {"video": "c.mp4", "image": None, "conversations": [*TURNS, *TURNS[1:]]},
    ]
    mixture = open_conversations(write(tmp_path, "list.json", content))
    assert [(part.images, part.flip) for part in mixture.parts] == [(False, False), (True, False)]
    first, second, image = (mixture[number] for number in range(3))
    assert first.conversation == image.conversation == READ
    assert second.conversation == (*READ, READ[1])
    assert (first.seconds, second.seconds, image.seconds) == ((1.0, 2.5), None, None)
    assert first.video == str(tmp_path / "a.mp4") and image.id.endswith("list.json/b.jpg")
    assert mixture.image_share == 1 / 3 and not first.flip


def test_json_lines_are_the_same_list(tmp_path):
    lines = "\n\n".join(json.dumps(item) for item in items(3))
    by_line = open_conversations(write(tmp_path, "list.jsonl", lines))
    whole = open_conversations(write(tmp_path, "list.json", items(3)))
    assert by_line.identity == whole.identity and len(by_line) == 3


def test_sources_travel_to_workers_and_other_records_stay_as_they_are(tmp_path):
    mixture = open_conversations(write(tmp_path, "list.json", items(2)))
    assert pickle.loads(pickle.dumps(mixture))[1] == mixture[1]
    assert Record("a", 0, "a.mp4").conversation == Example("a", 0, "a.mp4").conversation == ()


def test_the_identity_covers_what_is_said(tmp_path):
    for name in "ab":
        write(tmp_path, f"{name}.mp4", "")
    known = open_conversations(write(tmp_path, "list.json", [ITEM]))
    for change in ({"start": 0, "end": 1}, {"conversations": [TURNS[0], *TURNS[1:] * 2]}):
        other = open_conversations(write(tmp_path, "list.json", [ITEM | change]))
        difference = identity_difference(known.identity, other.identity)
        assert difference == "other conversations about the same videos"
        assert other.fingerprint != known.fingerprint
    again = open_conversations(write(tmp_path, "list.json", [ITEM | {"id": 1}]))
    assert again.identity == known.identity and again.fingerprint == known.fingerprint


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("all", range(7)),
        ("first:3", range(3)),
        ("end:2", range(5, 7)),
        ("first:15%", range(2)),  # the official code rounds up
        ("end:1%", range(6, 7)),
        ("first:100", range(7)),
        ("end:100%", range(7)),
    ],
)
def test_sampling(tmp_path, strategy, expected):
    write(tmp_path, "list.json", items(7))
    several = {"datasets": [{"json_path": "list.json", "sampling_strategy": strategy}]}
    mixture = open_conversations(write(tmp_path, "mixture.json", several))
    found = [mixture[number].id for number in range(len(mixture))]
    assert found == [f"list.json/{number}.mp4" for number in expected]


def test_random_items_are_the_same_each_time(tmp_path):
    write(tmp_path, "list.json", items(40))
    found = []
    for strategy in ("random:10", "random:25%", "first:10"):
        text = f"datasets:\n- {{json_path: list.json, sampling_strategy: '{strategy}'}}\n"
        mixture = open_conversations(write(tmp_path, "mixture.yaml", text))
        found.append([mixture[number].id for number in range(len(mixture))])
    assert found[0] == found[1] != found[2] and len(set(found[0])) == 10


def test_several_lists_of_a_yaml_file(tmp_path):
    (tmp_path / "data/videos").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    write(tmp_path, "lists/a.jsonl", json.dumps(ITEM))
    write(tmp_path, "lists/b.json", [{"image": "b.png", "conversations": TURNS}])
    text = """
datasets:
  - json_path: a.jsonl  # a comment
    sampling_strategy: "all"
    data_root: ../data/videos
  - {json_path: b.json, video_read_type: decord, media_type: image}
"""
    path = write(tmp_path, "lists/mixture.yaml", text)
    mixture = open_conversations(path)
    videos = [mixture[number].video for number in range(2)]
    assert videos[0].endswith("/data/videos/a.mp4")
    assert videos[1] == str(tmp_path / "lists/b.png")
    assert [part.images for part in mixture.parts] == [False, True]
    # A root is that of the lists, too.
    (tmp_path / "other/videos").mkdir()
    write(tmp_path, "lists/mixture.yaml", text.replace("../data/", ""))
    rooted = open_conversations(path, tmp_path / "other")
    assert rooted[0].video == str(tmp_path / "other/videos/a.mp4")
    assert rooted[1].video == str(tmp_path / "other/b.png")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"video": None}, 'item 1: names no file: "video" or "image" is missing'),
        ({"image": "b.png"}, "item 1: names both a video and an image"),
        ({"video": ["a.mp4", "b.mp4"]}, "item 1: names 2 files; a conversation can be about one"),
        ({"video": 3}, 'item 1: "video" is no path'),
        ({"video": "../a.mp4"}, "item 1: path '../a.mp4' is not inside the root"),
        ({"video": "https://a.b/c.mp4"}, "item 1: path 'https://a.b/c.mp4' is a URL"),
        ({"conversations": None}, 'item 1: "conversations" is missing, or no list of turns'),
        ({"conversations": []}, 'item 1: "conversations" is missing, or no list of turns'),
        (
            {"conversations": [{"from": "human", "value": "What?"}, TURNS[1]]},
            "item 1: the conversation has no <image>, where the video goes",
        ),
        (
            {"conversations": [TURNS[0], {"from": "judge", "value": ""}]},
            "item 1: turn 2 of the conversation is by 'judge', who is none of human, user, gpt",
        ),
        ({"conversations": TURNS[:1]}, "item 1: the conversation has no answer to learn"),
        ({"conversations": TURNS * 2}, "item 1: the conversation has 2 <image>"),
        ({"start": 1}, "item 1: start=1 and end=None are no part of a video"),
        ({"start": 2, "end": 2}, "item 1: start=2 and end=2 are no part of a video"),
        ({"start": "x", "end": 2}, "item 1: start=x and end=2 are no part of a video"),
        ({"start": -1, "end": 2}, "item 1: start=-1 and end=2 are no part of a video"),
    ],
)
def test_errors_name_the_file_and_the_item(tmp_path, change, message):
    path = write(tmp_path, "list.json", [ITEM, ITEM | change])
    with pytest.raises(UserError) as raised:
        open_conversations(path)
    assert str(raised.value).startswith(f"{path}: {message}") and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("list.json", "{", "list.json: no JSON: "),
        ("list.json", {"a": 1}, 'list.json: not a list of {"video": .., "conversations": ..}'),
        ("list.json", [], "list.json: holds no conversations"),
        ("list.json", ["a.mp4"], 'item 0: is not {"video": .., "conversations": ..}'),
        ("list.jsonl", '\n{"a"', "list.jsonl: line 2: no JSON: "),
        ("list.jsonl", "\n", "list.jsonl: holds no conversations"),
        ("a.yaml", "a: [", "a.yaml: no YAML: "),
        ("a.yaml", "a: 1", "a.yaml: not a list of "),
        ("a.yaml", "datasets: 1", 'a.yaml: "datasets" is no list of {json_path: ..'),
        ("a.yml", "datasets: [1]", "a.yml: dataset 0: names no list: json_path is missing"),
        ("a.yaml", "datasets: [{json_path: x.json, root: b}]", "0: 'root' is none of json_path"),
        ("a.yaml", "datasets: [{json_path: x.json, data_root: 3}]", "0: data_root is no text"),
        ("a.yaml", "datasets: [{json_path: x.json}]", "x.json: no such file or folder"),
        ("a.yaml", "datasets: [{json_path: 'http://a/b.json'}]", "neither of this machine nor"),
        (
            "a.yaml",
            "datasets: [{json_path: good.json, data_root: none}]",
            "the root of its paths, {folder}/none, is no folder",
        ),
        (
            "a.yaml",
            "datasets: [{json_path: good.json, sampling_strategy: 'first:0'}]",
            "the sampling strategy 'first:0' is none of all, first:N, end:N and random:N",
        ),
        (
            "a.yaml",
            "datasets: [{json_path: good.json, sampling_strategy: first2}]",
            "dataset 0: the sampling strategy 'first2' is none of all",
        ),
        (
            "a.yaml",
            "datasets: [{json_path: good.json, video_read_type: img}]",
            "dataset 0: video_read_type is img, and folders of frames cannot be read",
        ),
    ],
)
def test_errors_of_files(tmp_path, name, content, message):
    write(tmp_path, "good.json", [ITEM])
    path = write(tmp_path, name, content)
    with pytest.raises(UserError) as raised:
        open_conversations(path)
    assert message.replace("{folder}", str(tmp_path)) in str(raised.value)
    assert str(raised.value).startswith(path) and "\n" not in str(raised.value)


def test_a_template_is_held_against_all_items(tmp_path):
    content = [ITEM, ITEM | {"conversations": [*TURNS, TURNS[1]]}]
    path = write(tmp_path, "list.json", content)
    assert len(open_conversations(path, template="qwen")) == 2
    with pytest.raises(UserError, match="item 1: the conversation has 3 turns, the plain template"):
        open_conversations(path, template="plain")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A video of 40 frames, 10 a second, each of which its gray tells, and an image."""
    folder = tmp_path_factory.mktemp("long")
    frames = np.stack([np.full((32, 32, 3), 6 * n, np.uint8) for n in range(40)])
    write_video(folder / "long.mp4", frames, rate=10)
    cv2.imwrite(str(folder / "image.png"), frames[0])
    return folder


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (None, (0, 40)),
        ((2.0, 3.0), (20, 30)),
        ((2.0, 60.0), (20, 40)),
        ((1.0, 1.01), (10, 11)),
        ((3.96, 4.0), (39, 40)),
    ],
)
def test_seconds_are_frames(folder, seconds, expected):
    with Video(folder / "long.mp4") as video:
        assert video.frame_rate == 10
        assert segment_of(Record("a", 0, "a", seconds=seconds), video) == expected


def test_a_part_after_the_end_is_an_error(folder):
    with Video(folder / "long.mp4") as video:
        record = Record("a", 0, "a", seconds=(4.0, 5.0))
        with pytest.raises(DecodeError, match=r"a: lasts 4.00 s, and the list names 4.0 s"):
            segment_of(record, video)
        video.frame_rate = 0.0
        with pytest.raises(DecodeError, match="a: tells no frames per second"):
            segment_of(record, video)


def test_training_reads_clips_of_parts_and_images(folder):
    part = {"video": "long.mp4", "conversations": TURNS, "start": 2, "end": 3}
    image = {"image": "image.png", "conversations": TURNS}
    path = write(folder, "list.json", [part] * 8 + [image] * 8)
    source = open_conversations(path)
    config = tiny.make_clip(path, folder, data__workers=0)
    with train_batches(config, source) as batches:
        by_frames = {batch["grid"][0, 0] > 1: batch for batch in (next(batches), next(batches))}
    assert set(by_frames) == {True, False}
    shown = []
    for own, grid in zip(by_frames[True]["patches"], by_frames[True]["grid"], strict=True):
        by_frame = own[: np.prod(grid)].reshape(grid[0], -1)
        shown += [round(float(np.median(frame)) / 6) for frame in by_frame]
    assert set(shown) <= set(range(19, 31)) and max(shown) >= 28 and min(shown) <= 21
    assert not by_frames[False]["patches"].any()  # the image is black
