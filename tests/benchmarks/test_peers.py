"""The comparison with PyTorch on a CPU: whole but small, and its arithmetic."""

import json

import numpy as np
import pytest

from benchmarks import cpu

SMALL = ["--variant=Ti", "--frames=4", "--resolution=42", "--budgets=24", "--training=24"]


@pytest.mark.slow
def test_all_run_and_agree(monkeypatch, tmp_path, capfd):
    pytest.importorskip("torch", reason="needs PyTorch, which the package does not")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out = tmp_path / "cpu.json"
    assert cpu.main([*SMALL, "--kernels=chunked", "--rounds=1", f"--out={out}"]) == 0

    results, printed = json.loads(out.read_text()), capfd.readouterr().out
    assert list(results) == ["inference, 24", "training, 24"]
    for contenders in results.values():
        assert list(contenders) == ["chunked", "pytorch"]
        for own in contenders.values():
            assert own["cpu_milliseconds"] > 0 and own["peak_gib"] > 0.05
        assert contenders["pytorch"]["times_faster"] == 1
    assert "24 tokens: chunked differs from pytorch by loss" in printed


@pytest.mark.parametrize(
    ("option", "complaint"),
    [
        ("--kernels=flash", "--kernels: 'flash' is none of xla, chunked,"),
        ("--budgets=4000", "config.train.budgets: no grid can fill 4000 tokens"),
    ],
)
def test_wrong_options_are_one_line(option, complaint, capsys):
    pytest.importorskip("torch", reason="without it, that is the complaint")
    assert cpu.main([*SMALL, option]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"benchmarks.cpu: {complaint}")


def called(*seconds: float) -> list[cpu.Called]:
    return [
        cpu.Called(cpu=s, wall=2 * s, answer={"loss": np.float32(s)}, peak=2**30) for s in seconds
    ]


def test_medians_are_of_the_rounds():
    own = cpu.summary(called(100, 1, 2, 3), called(100, 4, 1, 9))  # the first call compiled
    assert own["cpu_milliseconds"] == 2000 and own["wall_milliseconds"] == 4000
    assert own["times_faster"] == 3  # the median of 4, 1/2 and 3, not the ratio of the medians
    assert own["peak_gib"] == 1


def test_nothing_is_timed_where_answers_differ():
    rounds = {("24", "chunked"): called(1.1), ("24", "pytorch"): called(1.0)}
    with pytest.raises(RuntimeError, match=r"more than the 0\.001 of rounding"):
        cpu.check(rounds, "float32")
