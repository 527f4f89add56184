"""The pre-flight: the search for the largest batch, the model's FLOPs, whole runs of the mode."""

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest

from fluxvit_jax import preflight
from fluxvit_jax.config.fields import default_config
from fluxvit_jax.objectives.base import FROZEN_SCOPE
from fluxvit_jax.preflight.compiler import memory, work
from fluxvit_jax.preflight.largest_batch import PROBES, Trial, search_largest
from fluxvit_jax.preflight.programs import model_flops
from fluxvit_jax.preflight.text import text_of
from tests import limited, tiny

GIB = 2**30


def run(data: Path, workdir: Path, cache: Path, topology: str, *options: str):
    """A finished process of the mode with the tiny recipe."""
    return limited.run(
        [
            *(sys.executable, "-m", "fluxvit_jax.main", "--mode=preflight"),
            f"--config=tests/tiny.py:{data}",
            f"--workdir={workdir}",
            f"--config.preflight.topology={topology}",
            *options,
        ],
        env=os.environ | tiny.environment(cache),
        cwd=tiny.ROOT,
    )


# ---------------------------------------------------------------------------------------------
# The largest batch


def search(first: int, needed, available: float, fixed: float = 0.0) -> list[Trial]:
    """The search, with memory as a function of the units."""

    def compile_units(units: int) -> Trial:
        return Trial(units, needed(units), needed(units) <= available)

    return search_largest(compile_units(first), fixed, available, compile_units)


def largest(tried: list[Trial]) -> int:
    return max((one.units for one in tried if one.fits), default=0)


@pytest.mark.parametrize("first", [1, 3, 7, 8, 20, 200])
def test_memory_that_grows_linearly_takes_two_compiles_or_three(first):
    tried = search(first, lambda units: 3.0 + 1.5 * units, available=14.0, fixed=3.0)
    assert largest(tried) == 7 and len(tried) <= 2
    # With a wrong idea of what does not depend on the batch, one more.
    tried = search(first, lambda units: 3.0 + 1.5 * units, available=14.0, fixed=1.0)
    assert largest(tried) == 7 and len(tried) <= 3


def test_memory_with_steps_is_searched_within_bounds():
    def needed(units: int) -> float:
        return 2.0 + units + (5.0 if units > 6 else 0.0)

    tried = search(2, needed, available=12.0, fixed=2.0)
    assert largest(tried) == 6
    assert len(tried) <= 1 + PROBES and len({one.units for one in tried}) == len(tried)
    assert largest(search(30, needed, available=12.0, fixed=2.0)) == 6


def test_a_batch_of_one_unit_is_tried_before_none_is_said_to_fit():
    tried = search(4, lambda units: 20.0 + units, available=15.0)
    assert largest(tried) == 0 and min(one.units for one in tried) == 1
    assert search(1, lambda units: 20.0, available=15.0) == [Trial(1, 20.0, False)]


# ---------------------------------------------------------------------------------------------
# What is counted and said


@pytest.mark.parametrize(("variant", "teraflops"), [("S", 1.6), ("B", 4.8)])
def test_flops_of_the_model(variant, teraflops):
    """Of a clip at three budgets, forward and backward, as the paper's GFLOPs have it."""
    config = default_config(variant)
    flops = model_flops(config)
    assert flops.all / 1e12 == pytest.approx(teraflops, rel=0.05)
    tokens = [budget + 1 for budget in config.train.budgets]
    width, depth = {"S": (384, 12), "B": (768, 12)}[variant]
    assert flops.attention == sum(6 * depth * 2 * n**2 * width for n in tokens)
    config.model.cls = "inside"
    assert model_flops(config).all < flops.all


@pytest.mark.parametrize(("freeze", "passes"), [("6", 2.0), ("backbone", 1.0)])
def test_frozen_blocks_run_forward_only(freeze, passes):
    """Half of the blocks once and half three times is two passes; embedding and head are little."""
    config = default_config("S")
    whole = model_flops(config)
    config.train.freeze = freeze
    part = model_flops(config)
    assert part.all / whole.all == pytest.approx(passes / 3, rel=0.06)
    assert part.attention / whole.attention == pytest.approx(passes / 3)


def test_the_scope_of_frozen_networks_is_theirs():
    """The compiler's reader knows of no network, so that the name stands in two places."""
    assert work.FROZEN == FROZEN_SCOPE


def test_a_report_as_text():
    parts = {"parameters": GIB, "batch": 2**20 * 25, "tiny": 1}
    memory = {"available": 16 * GIB, "used": 20 * GIB, "parts": parts}
    program = {"fits": False, "failure": "", "compile_seconds": 12.3, "compile_cpu_seconds": 20.0}
    largest = {"batch_size": 32, "clips_a_device": 2.0, "fails_at": 48, "used": 15 * GIB}
    report = {
        "fits": False,
        "devices": 16,
        "device": "TPU v5 lite",
        "hosts": 4,
        "mesh": {"data": 4, "fsdp": 4, "tensor": 1},
        "batch_size": 64,
        "clips_a_device": 4.0,
        "programs": {"training step": program | {"memory": memory}},
        "largest_batch": largest,
        "schedule": {"videos": None, "steps": None, "hours": None, "chip_hours": None},
    }
    text = text_of("v5e:4x4", report)
    assert text.startswith("\nv5e:4x4: DOES NOT FIT\n")
    assert "16 x TPU v5 lite on 4 hosts, mesh data=4 x fsdp=4; 64 clips a step, 4 a device" in text
    assert "DOES NOT FIT, 20.00 GiB of 16.00 GiB a device (125%)" in text
    assert (
        "parameters 1.00 GiB, batch 25.0 MiB\n" in text and "compiled in 12 s (20 s of CPU)" in text
    )
    assert (
        "largest batch that fits: 2 clips a device, 32 in all, 15.00 GiB a device; 48 fail" in text
    )
    assert "set config.preflight.videos" in text
    report["programs"]["training step"]["failure"] = "E1001: too much"
    assert "  training step: DOES NOT COMPILE: E1001: too much\n" in text_of("v5e:4x4", report)
    failed = {"fits": False, "error": "config.x: y"}
    assert text_of("cpu:3", failed) == "\ncpu:3: DOES NOT WORK: config.x: y"


# ---------------------------------------------------------------------------------------------
# The mode


@pytest.fixture(scope="module")
def checked(tiny_data, compiled, tmp_path_factory):
    """The tiny run on two CPU devices, and on three, which do not divide its batch."""
    workdir = tmp_path_factory.mktemp("preflight") / "new"
    process = run(tiny_data, workdir, compiled, "cpu:2,cpu:3")
    assert process.returncode == 1, process.stderr
    return process, json.loads((workdir / "preflight.json").read_text())


def test_the_report_of_a_run(checked):
    process, report = checked
    cpu = report["topologies"]["cpu:2"]
    assert cpu["fits"] and (cpu["devices"], cpu["hosts"], cpu["clips_a_device"]) == (2, 1, 4.0)
    assert cpu["mesh"] == {"data": 2, "fsdp": 1, "tensor": 1}
    names = ["training step", "evaluation, 24 tokens of 6 x 42 px"]
    assert list(cpu["programs"]) == [*names, "evaluation, 12 tokens of 4 x 28 px"]
    for name, program in cpu["programs"].items():
        assert program["fits"] and program["compile_seconds"] > 0
        assert f"{name}: " in process.stdout
        assert sum(program["memory"]["parts"].values()) == program["memory"]["used"]
        assert "estimate" not in program  # for TPUs only
    training = cpu["programs"]["training step"]
    parts = training["memory"]["parts"]
    assert parts["parameters"] == parts["average"]
    assert 0 <= parts["moments"] - 2 * parts["parameters"] < 100  # and counts of steps
    # Products beside those of the paper's count: the choice of tokens, positions, alignment.
    assert training["flops"]["compiled"] > training["flops"]["model"] > 0
    gradients = training["exchanges"]["all-reduce"]
    assert gradients["bytes"] >= parts["parameters"] and gradients["devices"] == 2
    assert all("all-gather" not in own["exchanges"] for own in cpu["programs"].values())


def test_what_reading_takes_is_measured_on_the_videos(checked):
    _, report = checked
    clip = report["clip"]
    assert clip["videos"] == 16 and clip["measured_on"] == "16 videos of config.data.train"
    assert clip["cpu_seconds"] > 0 and clip["bytes"] > 100


def test_a_topology_that_does_not_do_is_named_and_the_others_go_on(checked):
    process, report = checked
    assert not report["topologies"]["cpu:3"]["fits"]
    assert "config.train.batch_size: 8 clips" in report["topologies"]["cpu:3"]["error"]
    assert "cpu:3: DOES NOT WORK: config.train.batch_size: 8" in process.stdout


def test_it_says_what_it_is_compiling(checked):
    process, _ = checked
    said = process.stderr.splitlines()
    assert "cpu:2: compiling the training step, 8 clips" in said
    assert any(line.startswith("cpu:2: compiling the training step, 8 clips: ") for line in said)


def test_bad_names_are_one_line(tiny_data, compiled, tmp_path):
    process = run(tiny_data, tmp_path, compiled, "v9:2x2")
    assert process.returncode == 2 and process.stderr.count("\n") == 1
    assert process.stderr.startswith("error: topology 'v9:2x2' is none of those known: v4:AxBxC")
    assert not (tmp_path / "preflight.json").exists()


@pytest.mark.slow
def test_all_else_is_told_before_the_search_for_the_largest_batch(
    tiny_data, tmp_path, monkeypatch, capsys
):
    found = {"batch_size": 32, "clips_a_device": 32.0, "fails_at": 48, "used": GIB}
    reports = []

    def search(target, training):
        reports.append(json.loads((tmp_path / "preflight.json").read_text()))
        told = capsys.readouterr().out
        assert "\ncpu:1: fits\n" in told and "evaluation, 24 tokens" in told
        assert told.endswith(
            "no times: cycles are estimated for TPUs by name, for programs that fit\n"
        )
        return found

    monkeypatch.setattr(preflight, "largest_batch", search)
    monkeypatch.setattr(memory, "available", lambda device: 64 * GIB)
    quick = {"train__budgets": (24,), "eval__settings": ((24, 6, 42),)}
    config = tiny.make_config(tiny_data, preflight__topology="cpu:1", **quick)
    assert preflight.run(config, tmp_path) == 0
    line, *_ = capsys.readouterr().out.splitlines()
    assert line.startswith("  largest batch that fits: 32 clips a device")
    after = json.loads((tmp_path / "preflight.json").read_text())
    assert after["topologies"]["cpu:1"].pop("largest_batch") == found
    assert reports == [after]


# A network and a batch that the TPU compiler does in seconds.
QUICK = (
    "--config.model.dtype=bfloat16",
    "--config.model.cls=inside",
    "--config.data.grids.frames=8..12..2",
    "--config.data.grids.resolutions=56..70",
    "--config.data.grids.tokens=(128,300)",
    "--config.train.batch_size=16",
    "--config.train.budgets=(128,)",
    "--config.train.mixup=0",
    "--config.train.cutmix=0",
    "--config.train.random_erasing=0",
    "--config.eval.settings=((128,8,56),)",
    "--config.preflight.find_max_batch_size=False",
)


@pytest.mark.slow
@pytest.mark.tpu_compiler
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("fsdp", [1, 8])
def test_a_run_on_a_slice_of_eight_tpus(fsdp, tiny_data, compiled, tmp_path):
    options = [f"--config.parallel.mesh.fsdp={fsdp}"]
    options += ["--config.data.validation="] * (fsdp > 1)
    process = run(tiny_data, tmp_path, compiled, "v5e:2x4", *QUICK, *options)
    assert process.returncode == 0, process.stderr
    report = json.loads((tmp_path / "preflight.json").read_text())["topologies"]["v5e:2x4"]
    assert report["fits"] and (report["devices"], report["hosts"]) == (8, 2)
    training, *evaluations = report["programs"].values()
    parts, exchanges = training["memory"]["parts"], training["exchanges"]
    whole = 830_000  # bytes of the parameters
    if fsdp == 1:
        assert parts["parameters"] == pytest.approx(whole, rel=0.01)
        assert list(exchanges) == ["all-reduce"] and exchanges["all-reduce"]["count"] <= 4
        assert exchanges["all-reduce"]["bytes"] == pytest.approx(whole, rel=0.1)
        (evaluation,) = evaluations
        assert evaluation["exchanges"] == {}
    else:
        assert parts["parameters"] < whole / 4
        gathered = sum(own["count"] for kind, own in exchanges.items() if kind != "all-reduce")
        assert gathered > 0
    assert training["memory"]["used"] < 32 * 2**20
    assert sum(training["flops"]["kernels"].values()) >= 4  # two blocks, there and back
    estimate = training["estimate"]
    assert estimate["not_counted"]["kernels"] == 0 and estimate["loops_counted_once"] == 0
    assert 0 < estimate["kernels"] < estimate["computing"] <= estimate["seconds"]
    assert 0 < estimate["mfu"] < 0.2
    assert report["reading"]["cores_a_host"] > 0
    schedule = report["schedule"]  # 16 videos, twice each, five times
    assert schedule["steps"] == 10
    assert schedule["chip_hours"] == pytest.approx(8 * 10 * estimate["seconds"] / 3600)
