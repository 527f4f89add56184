"""The timing of a pre-training step, small and on the CPU."""

import json

import pytest

from benchmarks import distill_step

SMALL = [
    "--teacher=InternVideo2-Ti",
    *("--batch=2", "--frames=2", "--resolution=56", "--rounds=1"),
    "--config.model.variant=Ti",
    *("--config.distill.tokens=16", "--config.train.budgets=12,"),
    *("--config.distill.student_blocks=0,1", "--config.distill.teacher_blocks=1,3"),
]


@pytest.mark.slow
def test_both_ways_are_timed(tmp_path, capsys):
    out = tmp_path / "step.json"
    assert distill_step.main([*SMALL, f"--out={out}"]) == 0
    report, printed = json.loads(out.read_text()), capsys.readouterr().out
    assert report["first_losses"]["asked"] == pytest.approx(report["first_losses"]["cached"])
    asked, cached = (report["results"][name] for name in ("asked", "cached"))
    assert asked["model_gigaflops_a_clip"] > cached["model_gigaflops_a_clip"] > 0
    assert report["teacher_share"] == pytest.approx(1 - 1 / cached["times_faster"])
    assert f"the teacher's share of a step: {report['teacher_share']:.0%}" in printed


@pytest.mark.parametrize(
    "option, complaint",
    [
        ("--batch=0", "--batch=0: must be above 0"),
        ("--teacher=InternVideo3", "config.distill.network: 'InternVideo3' is none of"),
        ("--resolution=100", "config.data.grids: resolution 100 px is no multiple"),
        ("--round=x", "argument --rounds: invalid int value"),
        ("--rnd=1", "Unknown command line flag 'rnd'"),
    ],
)
def test_wrong_options_are_one_line(option, complaint, capsys):
    assert distill_step.main([*SMALL, option]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"benchmarks.distill_step: {complaint}"), line
