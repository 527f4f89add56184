"""Probabilities of chunks of any size, kept in files and read by the number of the video."""

import numpy as np
import pytest
from etils import epath

from fluxvit_jax.errors import UserError
from fluxvit_jax.token_optimization.probability_store import FOLDER, ProbabilityStore


def rows(first: int, end: int) -> np.ndarray:
    """Probabilities that tell their video: [videos, 1, 2]."""
    share = np.arange(first, end, dtype=np.float32)[:, None, None] / 100
    return np.concatenate([share, 1 - share], axis=2)


@pytest.mark.parametrize(
    "chunks",
    [
        [(0, 4), (4, 8), (8, 10)],
        [(0, 6), (4, 8), (8, 10)],  # of six, then of four
        [(0, 4), (0, 6), (6, 10)],  # and the other way
        [(0, 3), (0, 8), (3, 6), (6, 9), (8, 10)],
    ],
)
def test_chunks_of_any_size_are_one_table(tmp_path, chunks):
    store = ProbabilityStore(epath.Path(tmp_path))
    for chunk in chunks:
        store.add("choose", chunk[0], "cell", rows(*chunk))
    for folder in (".", "choose"):
        (tmp_path / FOLDER / folder / ".DS_Store").touch()  # as file managers do
    for one in (store, ProbabilityStore(epath.Path(tmp_path))):
        np.testing.assert_array_equal(one.read("choose", "cell", 10), rows(0, 10))
        np.testing.assert_array_equal(one.read("choose", "cell", 7), rows(0, 7))
        assert one.has("choose", 0, 10, "cell") and one.has("choose", 5, 7, "cell")
        for other in (("choose", 0, 11, "cell"), ("choose", 0, 1, "b"), ("report", 0, 1, "cell")):
            assert not one.has(*other)


def test_a_gap_is_known_and_said(tmp_path):
    store = ProbabilityStore(epath.Path(tmp_path))
    store.add("choose", 0, "cell", rows(0, 4))
    store.add("choose", 6, "cell", rows(6, 8))
    assert store.has("choose", 0, 4, "cell") and store.has("choose", 6, 8, "cell")
    assert not store.has("choose", 0, 8, "cell") and not store.has("choose", 3, 5, "cell")
    with pytest.raises(UserError, match=r"choose/cell: has nothing of video 4 of 8; remove .* and"):
        store.read("choose", "cell", 8)


@pytest.mark.parametrize("content", [None, b"PK", "another"])
def test_a_file_that_is_gone_or_damaged(tmp_path, content):
    store = ProbabilityStore(epath.Path(tmp_path))
    store.add("choose", 0, "cell", rows(0, 4))
    (path,) = (tmp_path / FOLDER).rglob("*.npz")
    if content is None:
        path.unlink()
    elif content == "another":
        np.savez(path, probabilities=rows(0, 3))
    else:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"00000000-00000004\.npz: is missing or damaged; remove"):
        store.read("choose", "cell", 4)
