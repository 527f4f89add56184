"""Checksums of JSON objects: damage is found, and costs the damaged line only."""

import json

from fluxvit_jax.distributed import checksums

LINES = [
    {"step": 1, "split": "train", "loss": 0.1},
    {"step": 2, "split": "train", "loss": None},
    {"step": 2, "split": "validation", "top1_24": 0.25, "note": 'ä "b"'},
]


def test_lines_return_as_they_were(tmp_path):
    path = tmp_path / "a.jsonl"
    checksums.write_lines(path, LINES)
    assert checksums.read_lines(path) == LINES
    assert checksums.read_lines(tmp_path / "none.jsonl") == []


def test_no_flipped_bit_changes_a_value(tmp_path, caplog):
    path = tmp_path / "a.jsonl"
    checksums.write_lines(path, LINES)
    whole = path.read_bytes()
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        caplog.clear()
        found = checksums.read_lines(path)
        # Without the end of a line, that line and the next one are lost.
        assert len(found) >= len(LINES) - 2 and all(line in LINES for line in found), bit
        if damaged.endswith(b"\n") and found != LINES:
            assert "are damaged and dropped" in caplog.text, bit


def test_a_line_cut_short_by_a_kill_is_dropped_without_a_word(tmp_path, caplog):
    path = tmp_path / "a.jsonl"
    checksums.write_lines(path, LINES)
    path.write_bytes(path.read_bytes()[:-9])
    assert checksums.read_lines(path) == LINES[:2] and not caplog.text


def test_files_of_earlier_versions_are_read(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    assert checksums.read_lines(path) == LINES
