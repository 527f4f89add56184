"""The comparison with PyTorch, whole but small and on the CPU, and its arithmetic."""

import importlib.util
import json
from concurrent.futures import Future

import numpy as np
import pytest

from benchmarks import gpu
from fluxvit_jax.errors import UserError

SMALL = ["--variants=Ti", "--batch=2", "--budgets=24,16", "--frames=4", "--resolution=42"]


@pytest.fixture
def on_cpu(monkeypatch):
    """For the processes that a test starts, of which one thread is enough."""
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.mark.slow
def test_both_run_and_agree(on_cpu, tmp_path, capfd):
    pytest.importorskip("torch", reason="needs PyTorch, which the package does not")
    out = tmp_path / "gpu.json"
    assert gpu.main([*SMALL, "--rounds=1", "--calls=1", "--compiler=eager", f"--out={out}"]) == 0

    report, printed = json.loads(out.read_text()), capfd.readouterr().out
    assert report["command"] in printed and "--variants=Ti" in report["command"]
    assert (
        report["ours"].items()
        >= {"platform": "cpu", "dtype": "float32", "attention": "chunked"}.items()
    )
    assert report["pytorch"].items() >= {"platform": "cpu", "dtype": "float32"}.items()
    assert report["tokens"] == 36
    assert {name: list(own) for name, own in report["results"].items()} == {
        "Ti training": ["24 + 16"],
        "Ti inference": ["24", "16"],
    }
    for title, programs in report["results"].items():
        for tokens, own in programs.items():
            compared = {"loss", "gradient_norm"} if title == "Ti training" else {"logits"}
            assert own["first_difference"].keys() == compared
            assert max(own["first_difference"].values()) < 1e-4
            assert f"{title}, {tokens} tokens: ours and PyTorch differ by" in printed
            assert min(own[side]["clips_per_second"] for side in ("ours", "pytorch")) > 0
            assert own["ours"]["peak_gib"] > 0 and own["pytorch"]["peak_gib"] is None
    # Not only the first step is the same.
    trained = report["results"]["Ti training"]["24 + 16"]
    ours, theirs = (trained[side]["last"] for side in ("ours", "pytorch"))
    assert ours == pytest.approx(theirs, rel=5e-3)
    assert ours["loss"] < 0.9 * np.log(400) * 2


@pytest.mark.parametrize(
    "option, complaint",
    [
        ("--variants=Ti,XL", "--variants: 'XL' is none of Ti, S, B, L"),
        ("--budgets=24,many", "--budgets=24,many: not numbers"),
        ("--budgets=8,16", "config.train.budgets: (8, 16) must be"),
        ("--budgets=4000", "config.train.budgets: no grid can fill 4000 tokens"),
        ("--resolution=100", "--resolution=100: no multiple of 14"),
        ("--batch=0", "--batch=0: must be above 0"),
        ("--dtype=float8", "argument --dtype: invalid choice"),
        ("--round=x", "argument --rounds: invalid int value"),
    ],
)
def test_wrong_options_are_one_line(option, complaint, capsys):
    assert gpu.main([*SMALL, option]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"benchmarks.gpu: {complaint}")


def test_without_pytorch_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert gpu.main(SMALL) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.endswith("pip install torch")


class Played:
    """In place of a process: what it would say."""

    def __init__(self, platform: str = "cpu", seconds: tuple[float, ...] = (), loss: float = 1.0):
        self.platform, self.seconds, self.loss = platform, iter(seconds), np.float32(loss)

    def submit(self, function, *arguments):
        future = Future()
        if function is gpu.prepare:
            future.set_result({"platform": self.platform})
        else:
            _, calls = arguments  # a single one is not timed
            seconds = next(self.seconds) if calls > 1 else 100.0
            future.set_result(gpu.Called(seconds, {"loss": self.loss}, 2**30))
        return future


@pytest.fixture
def options():
    return gpu.parse([*SMALL, "--rounds=3", "--calls=2"])


def test_two_devices_are_refused(options):
    sides = {"ours": Played("cpu"), "pytorch": Played("gpu")}
    with pytest.raises(UserError, match="JAX runs on the cpu and PyTorch on the gpu"):
        gpu.begin(sides, gpu.cases(options, "")[0])


def test_medians_are_of_the_rounds(options):
    sides = {
        "ours": Played(seconds=(1.0, 2.0, 3.0)),
        "pytorch": Played(seconds=(4.0, 1.0, 9.0), loss=1.0001),
    }
    case = gpu.cases(options, "")[0]
    own = gpu.measure(sides, case, options, "title", "float32")["24 + 16"]
    assert own["ours"]["milliseconds"] == 2000 and own["pytorch"]["milliseconds"] == 4000
    assert own["ours"]["clips_per_second"] == 1 and own["ours"]["peak_gib"] == 1
    assert own["times_faster"] == 3  # the median of 4, 1/2 and 3, not the ratio of the medians
    assert own["first_difference"] == {"loss": pytest.approx(1e-4, rel=1e-2)}


def test_nothing_is_timed_where_answers_differ(options):
    sides = {"ours": Played(), "pytorch": Played(loss=1.1)}
    with pytest.raises(RuntimeError, match=r"more than the 0\.001 of float32"):
        gpu.measure(sides, gpu.cases(options, "")[0], options, "title", "float32")


def test_logits_are_compared_up_to_a_constant():
    logits = np.random.default_rng(0).standard_normal((2, 5))

    def softmax(x):
        return {"probabilities": np.exp(x) / np.exp(x).sum(-1, keepdims=True)}

    assert gpu.difference(softmax(logits), softmax(logits + 3))["logits"] < 1e-12
    assert gpu.difference(softmax(logits), softmax(1.5 * logits)) == {"logits": pytest.approx(0.5)}
