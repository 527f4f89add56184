"""The comparison with peers on a CPU: whole but small, and its arithmetic."""

import importlib.util
import json
import os

import numpy as np
import pytest

from benchmarks import peers

SMALL = ["--variant=Ti", "--frames=8", "--resolution=42", "--budgets=24", "--training=24"]


@pytest.mark.slow
def test_all_run_and_agree(monkeypatch, tmp_path, capfd):
    for module in ("torch", "onnxruntime", "onnxscript"):
        pytest.importorskip(module, reason="needs PyTorch and ONNX, which the package does not")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out, others = tmp_path / "peers.json", "official,torch_fluxvit,onnxruntime"
    # A checkout of the official code, where the environment names one: it is nobody's dependency.
    official = os.environ.get("FLUXVIT_OFFICIAL", "")
    assert (
        peers.main(
            [*SMALL, "--rounds=1", f"--peers={others}", f"--official={official}", f"--out={out}"]
        )
        == 0
    )

    report, printed = json.loads(out.read_text()), capfd.readouterr().out
    assert list(report["results"]) == ["inference, 24", "training, 24"]
    theirs = ["official"] * bool(official) + ["torch_fluxvit"]
    inference, training = report["results"].values()
    assert list(inference) == ["ours", "exported", *theirs, "onnxruntime"]
    assert list(training) == ["ours", *theirs]
    for own in (*inference.values(), *training.values()):
        assert own["cpu_milliseconds"] > 0 and own["peak_gib"] > 0.05
        assert 0 < own["percent_of_peak"] < 100
    assert inference["ours"]["times_faster_is_ours"] == 1
    assert "24 tokens: torch_fluxvit differs from ours by loss" in printed
    assert ("official is left out: it needs --official=CHECKOUT" in printed) != bool(official)


def test_who_is_not_there_is_said(monkeypatch, capsys):
    options = peers.parse(SMALL)
    monkeypatch.setattr(peers.shutil, "which", lambda _: None)
    assert not peers.is_there("torch.compile", options)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert not peers.is_there("onnxruntime", options)
    compiler, modules = capsys.readouterr().out.splitlines()[-2:]
    assert modules == (
        "onnxruntime is left out: it needs pip install torch onnx onnxscript onnxruntime"
    )
    assert compiler.startswith("torch.compile is left out: it needs")


@pytest.mark.parametrize(
    ("option", "complaint"),
    [
        ("--kernels=flash", "--kernels: 'flash' is none of xla, chunked,"),
        ("--peers=timm", "--peers: 'timm' is none of official, torch_fluxvit,"),
        ("--official=/nowhere", "--official=/nowhere: holds no single_modality/models"),
        ("--budgets=4000", "config.train.budgets: no grid can fill 4000 tokens"),
    ],
)
def test_wrong_options_are_one_line(option, complaint, capsys):
    assert peers.main([*SMALL, option]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"benchmarks.peers: {complaint}")


def called(*seconds: float) -> list[peers.Called]:
    return [
        peers.Called(cpu=s, wall=2 * s, answer={"loss": np.float32(s)}, peak=2**30) for s in seconds
    ]


def test_medians_are_of_the_rounds():
    # The first call compiled.
    own = peers.summary(called(100, 4, 1, 9), called(100, 1, 2, 3), best_seconds=0.4)
    assert own["cpu_milliseconds"] == 4000 and own["wall_milliseconds"] == 8000
    assert own["times_faster_is_ours"] == 3  # the median of 4, 1/2 and 3, not that of the medians
    assert own["percent_of_peak"] == 10
    assert own["peak_gib"] == 1


def test_nothing_is_timed_where_answers_differ():
    rounds = {("24", "pytorch"): called(1.1), ("24", "ours"): called(1.0)}
    with pytest.raises(RuntimeError, match=r"more than the 0\.001 of rounding"):
        peers.check(rounds, "ours", "float32")
