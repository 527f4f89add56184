"""The table of the pre-flight: rows are configs that go with their slices; what is done stays."""

import json
import math

import pytest

from benchmarks import preflight
from fluxvit_jax.config.loading import load_config
from fluxvit_jax.errors import UserError
from fluxvit_jax.preflight.compiler import topology
from fluxvit_jax.training.setup import check_batch_size

GIB = 2**30
REPORT = {
    "programs": {
        "training step": {
            "fits": True,
            "compile_cpu_seconds": 251.4,
            "memory": {"used": 4.25 * GIB},
            "estimate": {"mfu": 0.474},
        }
    },
    "largest_batch": {"clips_a_device": 16.0, "mfu": 0.45},
    "schedule": {"chip_hours": 10.4},
}


@pytest.mark.parametrize("row", preflight.ROWS, ids=lambda row: row.name)
def test_rows_go_with_their_slices(row):
    (where,) = topology.parse(row.topology)
    chips = math.prod(where.shape)
    recipe = f"configs/{row.recipe}.py:{preflight.RECIPES[row.variant]}"
    config = load_config(recipe, row.overrides(chips))
    check_batch_size(config, chips)
    assert config.model.variant == row.variant
    assert chips % row.fsdp == 0


def test_names_and_files_are_unique(tmp_path):
    assert len({row.name for row in preflight.ROWS}) == len(preflight.ROWS)
    assert len({preflight.file_of(row, tmp_path) for row in preflight.ROWS}) == len(preflight.ROWS)


def test_the_table_has_what_is_finished(tmp_path, monkeypatch, capsys):
    first, second = preflight.ROWS[0], next(row for row in preflight.ROWS if row.fsdp > 1)
    failed = {"fits": False, "compile_cpu_seconds": 9.0, "memory": {"used": 20 * GIB}}
    preflight.write(first, REPORT, tmp_path)
    preflight.write(second, {"programs": {"training step": failed}}, tmp_path)

    def no_process(*_, **__):
        raise AssertionError("what is finished is not done again")

    monkeypatch.setattr(preflight.subprocess, "run", no_process)
    assert preflight.main([f"--out={tmp_path}", f"--only={first.name}"]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert lines[2] == (
        f"| {first.variant} | {first.topology} | {first.clips} | {first.form}, remat {first.remat} "
        "| 4.2 | 47% | 251 | 16 (45%) | 10 |"
    )
    assert f"FSDP over {second.fsdp} | 20.0 does not fit |  | 9 |  |  |" in lines[3]
    assert len(lines) == 4 and (tmp_path / preflight.TABLE).exists()


def test_pretraining_has_a_table_of_its_own(tmp_path):
    """With the share of the cycles that the teacher takes."""
    row = next(row for row in preflight.ROWS if row.recipe == "pretrain")
    taught = json.loads(json.dumps(REPORT))
    taught["programs"]["training step"]["estimate"]["frozen_share"] = 0.425
    preflight.write(preflight.ROWS[0], REPORT, tmp_path)
    preflight.write(row, taught, tmp_path)
    first, second = preflight.tabulate(tmp_path).strip().split("\n\n")
    assert "share" not in first and len(first.splitlines()) == 3
    assert second.splitlines()[0].endswith("| the teacher's share |")
    assert second.endswith("| 16 (45%) | 10 | 42% |")


def test_an_unknown_row():
    with pytest.raises(UserError, match=f"--row=x: none of {preflight.ROWS[0].name}"):
        preflight.main(["--row=x"])
