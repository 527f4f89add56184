"""Questions with options: what a list may say, and options that come in another order."""

import json

import numpy as np
import pytest

from fluxvit_jax.errors import UserError
from fluxvit_jax.evaluation.multiple_choice import Questions, measures, read_questions

TEXTS = ("cat runs", "dog runs", "bird flies")


def read(folder, *entries: tuple) -> Questions:
    """The questions of a list of (options, answer)."""
    listed = [
        {"video": f"{n}.mp4", "option": options, "answer": answer}
        for n, (options, answer) in enumerate(entries)
    ]
    path = folder / "questions.json"
    path.write_text(json.dumps(listed))
    return read_questions(str(path))


def test_an_option_is_the_same_in_any_order(tmp_path):
    """Scores that prefer some texts whatever the video: their places say nothing about them."""
    rng = np.random.default_rng(0)
    right = rng.random((50, 3)) < 0.4
    scores = (rng.random((50, 3)) + 0.5 * right + np.linspace(0, 1, 3)).astype(np.float32)
    orders = [rng.permutation(3) for _ in range(50)]
    same = read(tmp_path, *((TEXTS, own.astype(int).tolist()) for own in right))
    shuffled = read(
        tmp_path,
        *(
            ([TEXTS[k] for k in order], own[order].astype(int).tolist())
            for order, own in zip(orders, right, strict=True)
        ),
    )
    column = {text: k for k, text in enumerate(same.options[0])}
    found = np.stack(
        [
            own[[column[text] for text in options]]
            for own, options in zip(scores, shuffled.options, strict=True)
        ]
    )
    expected = measures(scores, same, [])
    assert len(set(expected["ap"])) == 3
    got = measures(found, shuffled, [])
    assert got["map"] == pytest.approx(expected["map"])
    assert sorted(got["ap"]) == pytest.approx(sorted(expected["ap"]))


def test_one_right_option_may_be_among_others_for_each_video(tmp_path):
    questions = read(tmp_path, (["a", "b"], 1), (["c", "d"], 0))
    assert questions.options == (("a", "b"), ("c", "d")) and not questions.several
    assert questions.right.tolist() == [[False, True], [True, False]]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (
            [(["x", "y"], [[1], [0]])],
            r"entry 0: the answer \[\[1\], \[0\]\] is no number of an opt",
        ),
        ([(["x", "y"], [0.0, 1.0])], r"entry 0: the answer \[0.0, 1.0\] is no number of an option"),
        ([(["x", "y"], True)], "entry 0: the answer True is no number of an option"),
        ([(["x", "y"], [0, 0]), (["x", "y"], [0, 0])], "no option of any question is right"),
        ([(["x", "y"], [0, 1]), (["x", "z"], [0, 1])], "entry 1: its options are not those of th"),
        (
            [(["x", "y", "y"], [0, 1, 0]), (["x", "x", "y"], [0, 1, 0])],
            "entry 1: its options are not those of the first question",
        ),
    ],
)
def test_a_list_that_cannot_be_measured_is_one_line(tmp_path, entries, message):
    with pytest.raises(UserError, match=message) as error:
        read(tmp_path, *entries)
    assert "\n" not in str(error.value)


def test_a_video_without_a_right_option_counts_for_the_others(tmp_path):
    questions = read(tmp_path, (["x", "y"], [0, 1]), (["x", "y"], [0, 0]))
    measured = measures(np.array([[0.4, 0.6], [0.2, 0.8]]), questions, [])
    assert measured["map"] == 0.5 and measured["ap"] == [None, 0.5]
