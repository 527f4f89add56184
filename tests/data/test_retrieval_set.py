"""Lists of videos and texts against what the official code reads of them."""

import json

import pytest

from fluxvit_jax.data.retrieval_set import read_retrieval_set
from fluxvit_jax.errors import UserError
from tests.models.golden import GOLDEN

CASES = json.loads((GOLDEN / "clip/annotation_cases.json").read_text())["eval_cases"]
TRAP = "paragraph_of_string"  # the official code joins its letters with spaces


def write(folder, content, name="set.json"):
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def as_lists(indices) -> list[list[int]]:
    return [own if isinstance(own, list) else [own] for own in indices]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_golden_lists(case, tmp_path):
    paragraphs = case["flags"].get("is_paragraph_retrieval", False)
    path = write(tmp_path, case["annotation"])
    found = read_retrieval_set(path, case["data_root"], paragraphs)
    assert list(found.videos) == case["image"]
    assert list(found.texts) == (["ab cd"] if case["name"] == TRAP else case["text"])
    assert list(map(list, found.texts_of)) == as_lists(case["img2txt"])
    assert list(map(list, found.videos_of)) == as_lists(case["txt2img"])


def test_a_csv(tmp_path):
    text = '\ufeffpath,caption\na b.mp4,"A man, playing."\nc.mp4, Two dogs\n'
    found = read_retrieval_set(write(tmp_path, text, "set.csv"), "/videos")
    assert found.videos == ("/videos/a b.mp4", "/videos/c.mp4")
    assert found.texts == ("a man playing", "two dogs") and found.videos_of == ((0,), (1,))


def test_a_video_in_several_lines_of_a_csv_is_one(tmp_path):
    """Its captions are all right for it, as of an entry in JSON with a list of captions."""
    rows = [("a.mp4", "a dog runs"), ("b.mp4", "a cat"), ("a.mp4", "a dog is running")]
    text = "\n".join(["path,caption", *map(",".join, rows)])
    found = read_retrieval_set(write(tmp_path, text, "set.csv"))
    assert found.videos == ("a.mp4", "b.mp4") and found.texts_of == ((0, 2), (1,))
    assert found.texts == ("a dog runs", "a cat", "a dog is running")
    assert found.videos_of == ((0,), (1,), (0,))


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        ([{"video": "a.mp4", "caption": " . "}], "s.json", "entry 0: a caption is empty, or has"),
        ([{"video": "a.mp4"}], "s.json", "entry 0: caption is no text and no list of texts"),
        ([{"video": 3, "caption": "x"}], "s.json", "entry 0: video is no text and no list"),
        ([], "s.json", "s.json: there are no videos in it"),
        ({"a.mp4": "x"}, "s.json", r's.json: not a list of \{"video": \.\., "caption": \.\.\}'),
        ("[" * 100_000, "s.json", "s.json: no JSON: nested too deep"),
        ("a.mp4,x\n", "s.csv", "s.csv: the first line is not path,caption"),
        ("path,caption\na.mp4\n", "s.csv", "line 2: caption is no text"),
        ("path,caption\na,b\nc,d, e\n", "s.csv", "line 3: has more columns than the first"),
        ('path,caption\na,b\nc,"d e\n' + "f,g\n" * 9, "s.csv", "line 3: is not valid CSV: unexp"),
        ('path,caption\nc,"d\n' + "f,g\n" * 40_000, "s.csv", "line 2: is not valid CSV: field"),
        (
            r'[{"video": "\ud83d.mp4", "caption": "x"}]',
            "s.json",
            "0: path .* is no file name",
        ),
    ],
)
def test_other_lists_are_refused(content, name, message, tmp_path):
    with pytest.raises(UserError, match=message):
        read_retrieval_set(write(tmp_path, content, name))
    with pytest.raises(UserError, match="no such file"):
        read_retrieval_set(tmp_path / "none.json")
