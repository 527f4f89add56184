"""Planning: the right cell for every limit, on devices that the report knows and on this one."""

import copy
import dataclasses
import json
import random
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fluxvit_jax
from fluxvit_jax.checkpoints.checkpointer import restore_params
from fluxvit_jax.convert.official_names import fingerprint
from fluxvit_jax.distributed import devices
from fluxvit_jax.errors import UserError
from fluxvit_jax.grids import Grid
from fluxvit_jax.models.flops import gflops
from fluxvit_jax.token_optimization import latency, planner
from fluxvit_jax.token_optimization.candidates import Candidate
from fluxvit_jax.token_optimization.planner import plan, read_report

KINDS = ("milliseconds", "gflops", "tokens")
GPU, CPU = "NVIDIA H100 80GB HBM3", "A Processor (cpu)"

# Cells of the tiny recipe's network, with accuracies as a search might have found them: the more
# tokens, the better; select-12-6x42-h0 and its twin differ in the head only.
TINY = {
    Candidate("select", 24, Grid.square(6, 42), 0): 0.80,
    Candidate("select", 12, Grid.square(6, 42), 0): 0.66,
    Candidate("select", 12, Grid.square(6, 42), 1): 0.70,
    Candidate("plain", 12, Grid.square(3, 28), 1): 0.60,
    Candidate("merge", 12, Grid.square(4, 28), 1): 0.65,
    Candidate("plain", 36, Grid.square(4, 42), 0): 0.50,
}
BEST, TWIN = "select-24-6x42-h0", "select-12-6x42-h0"
SECOND, CHEAPEST, MERGING = "select-12-6x42-h1", "plain-12-3x28-h1", "merge-12-4x28-h1"


def tiny_search(finished, folder: Path, milliseconds: dict[str, float] | None = None) -> Path:
    """A copy of the finished run with a report of `TINY`, written by hand.

    milliseconds: of cells on this device; without any the report has no timings at all.
    """
    workdir = shutil.copytree(finished.workdir, folder)
    params, network = restore_params(workdir), fluxvit_jax.from_pretrained(workdir).config.model
    videos, cells = 100, {}
    for cell, top1 in TINY.items():
        work = gflops(cell.network(network), cell.grid, cell.budget)
        cells[cell.name] = {
            **{"method": cell.method, "budget": cell.budget, "tokens": cell.budget},
            **{"frames": cell.grid.frames, "resolution": cell.grid.resolution},
            **{"head": cell.head, "gflops": work.all, "gflops_kept": work.kept},
            "choose": {"videos": videos, "top1": top1, "top1_interval": [top1 - 0.1, top1 + 0.1]},
            "behind": {"top1": 0.8 - top1, "interval": [0.7 - top1, 0.9 - top1], "videos": videos},
        }
    for name in (BEST, SECOND, CHEAPEST, MERGING):  # what was chosen is less accurate elsewhere
        top1 = cells[name]["choose"]["top1"] - 0.125
        cells[name]["report"] = {"videos": 40, "top1": top1, "top1_interval": [0.3, 0.9]}
    timings = {name: {"milliseconds": one} for name, one in (milliseconds or {}).items()}
    report = {
        "version": 1,
        "checkpoint": "checkpoints/20",
        "fingerprint": fingerprint(params),
        "budgets": [24, 12],
        "choose": {"data": "by hand", "videos": videos, "failed": 0},
        "report": {"data": "by hand too", "videos": 40, "failed": 0},
        "notes": ["by hand"],
        "cells": cells,
        "chosen": {
            "24": {"select": BEST, "plain": None, "merge": None},
            "12": {"select": SECOND, "plain": CHEAPEST, "merge": MERGING},
        },
        "devices": {devices.device_name(): {"batch": 1, "cells": timings}} if timings else {},
    }
    (workdir / "search").mkdir()
    (workdir / "search" / "report.json").write_text(json.dumps(report))
    return workdir


def change(report: Path, **changes) -> None:
    """Fields of a report.json, or of the one in a workdir."""
    report = report if report.is_file() else report / "search" / "report.json"
    report.write_text(json.dumps(json.loads(report.read_text()) | changes))


# ---------------------------------------------------------------------------------------------
# Choosing


@pytest.fixture(scope="module")
def sample() -> dict:
    """150 cells, many of them equal in something; not all seen to the end, timed, or seen at all.

    Nothing cheap was seen to the end, so that for small limits only cells that were stopped fit.
    """
    draw = random.Random(0)
    cells, tables = {}, {GPU: {}, CPU: {}}
    for i in range(150):
        method, frames = draw.choice(planner.METHODS), draw.randrange(4, 30)
        size, budget = draw.randrange(8, 25), draw.choice((512, 1024, 2048, 3072))
        name = f"{method}-{budget}-{frames}x{14 * size}-h{i}"
        tokens = draw.choice((budget, budget - 4))
        cells[name] = {
            **{"method": method, "budget": budget, "tokens": tokens, "head": i},
            **{"frames": frames, "resolution": 14 * size, "gflops": budget / 20 + i % 7},
        }
        stopped = budget == 512 or draw.random() < 0.3
        if draw.random() < 0.9:
            top1 = draw.randrange(600, 620) / 1000 + budget / 10_000
            cells[name]["choose"] = {"videos": 125 if stopped else 1000, "top1": top1}
        for device, per_token in ((GPU, 0.004), (CPU, 0.5)):
            if draw.random() < 0.9:
                tables[device][name] = {"milliseconds": per_token * budget * (1 + (i % 5) / 10)}
    devices = {device: {"batch": 8, "cells": table} for device, table in tables.items()}
    return {"version": 1, "cells": cells, "devices": devices}


def by_hand(report: dict, kind: str, limit: float, device: str, merging: bool):
    """The name of the planned cell, or None and the name of the cheapest."""
    costs = []
    for name, cell in report["cells"].items():
        timing = report["devices"][device]["cells"].get(name)
        cost = (timing and timing["milliseconds"]) if kind == "milliseconds" else cell[kind]
        if "choose" in cell and cost is not None and (merging or cell["method"] != "merge"):
            top1, videos = cell["choose"]["top1"], cell["choose"]["videos"]
            costs.append((videos < 1000, -top1, cost, cell["gflops"], name))
    for row in sorted(costs):
        if row[2] <= limit:
            return row[4], None
    return None, min(costs, key=lambda row: (row[2], row[4]))[4]


@pytest.mark.parametrize("kind", KINDS)
def test_every_limit_gets_the_best_cell(sample, kind):
    """200 limits, from below the cheapest cell to above the dearest, against a search by hand."""
    draw, refused, stopped, chosen = random.Random(1), 0, 0, set()
    top = {"milliseconds": 20, "gflops": 170, "tokens": 3300}[kind]
    for _ in range(200):
        merging, device = draw.random() < 0.5, draw.choice((GPU, CPU))
        limit = draw.uniform(0, top) * (125 if kind == "milliseconds" and device == CPU else 1)
        expected, cheapest = by_hand(sample, kind, limit, device, merging)
        asked = {kind: limit, "device": device, "merging": merging}
        if expected is None:
            refused += 1
            with pytest.raises(UserError, match=f"the cheapest, {cheapest}, takes") as error:
                plan(sample, **asked)
            assert "\n" not in str(error.value)
        else:
            found = plan(sample, **asked)
            assert found.cell == expected
            assert getattr(found, kind) <= limit and found.limit == planner.Limit(kind, limit)
            seen = sample["cells"][expected]["choose"]["videos"]
            stopped += seen < 1000
            assert ("The search stopped it early" in str(found)) == (seen < 1000)
            chosen.add(expected)
    assert refused and stopped and len(chosen) > 5, "the sample is to cover all of these"


def test_a_limit_that_is_met_exactly_fits(sample):
    for name, cell in sample["cells"].items():
        if "choose" in cell:
            found = plan(sample, gflops=cell["gflops"])
            assert found.gflops <= cell["gflops"]
            assert found.cell == by_hand(sample, "gflops", cell["gflops"], GPU, True)[0], name


def cell(**fields) -> dict:
    shared = {"method": "select", "budget": 512, "tokens": 512, "frames": 8, "resolution": 168}
    top1 = fields.pop("top1")
    return shared | {"head": 0, "gflops": 10, "choose": {"videos": 9, "top1": top1}} | fields


DAMAGED = cell(top1=0.8, report={"videos": 3})


def test_ties_go_to_the_cheaper_then_to_fewer_gflops_then_to_the_name():
    cells = {
        "d": cell(top1=0.8, tokens=512, gflops=9),
        "c": cell(top1=0.8, tokens=500, gflops=12),
        "b": cell(top1=0.8, tokens=500, gflops=11),
        "a": cell(top1=0.7, tokens=400, gflops=5),
    }
    assert plan({"version": 1, "cells": cells}, tokens=600).cell == "b"
    assert plan({"version": 1, "cells": cells}, gflops=20).cell == "d"
    cells["e"] = cells["b"]
    assert plan({"version": 1, "cells": cells}, tokens=600).cell == "b"


def test_a_plan_says_what_it_costs_and_what_the_next_would():
    best = cell(top1=0.812, gflops=90, tokens=1020, budget=1024, frames=12)
    good = cell(top1=0.801, gflops=40)
    good["choose"]["top1_interval"] = [0.78, 0.82]
    good["behind"] = {"top1": 0.012, "interval": [0.001, 0.023], "videos": 9}
    table = {"good": {"milliseconds": 7.9}, "best": {"milliseconds": 14.04}}
    report = {
        "version": 1,
        "cells": {"best": best, "good": good},
        "devices": {GPU: {"batch": 8, "cells": table}},
    }
    found = plan(report, milliseconds=8, device="h100")
    assert (
        str(found)
        == found.why
        == (
            "good keeps 512 of 1152 tokens (8 frames of 168 px, head 0): "
            "7.9 ms on NVIDIA H100 80GB HBM3, 40 GFLOPs, within 8 ms; top-1 80.1% (78.0 to 82.0) "
            "on the videos that chose it, 1.2 points (0.1 to 2.3) behind best, the best. "
            "The next that is more accurate there, best, takes 14.04 ms and has top-1 81.2% "
            "on the videos that chose it."
        )
    )
    assert (found.split, found.top1) == ("choose", 0.801)
    assert found.device == GPU and found.milliseconds == 7.9
    assert found.top1_interval == (0.78, 0.82) and found.behind_interval == (0.001, 0.023)
    found = plan(report, tokens=2000)
    assert str(found) == (
        "best keeps 1020 of 1728 tokens (12 frames of 168 px, head 0): 90 GFLOPs, within "
        "2000 tokens; top-1 81.2% on the videos that chose it, no cell is more accurate."
    )
    assert (found.budget, found.tokens, found.behind) == (1024, 1020, 0)
    assert found.device is None and found.milliseconds is None and found.top1_interval is None
    assert plan(report, gflops=50, device=GPU).milliseconds == 7.9
    del good["behind"]
    assert plan(report, gflops=50).behind == pytest.approx(0.011)


def test_the_accuracy_that_is_said_is_the_reported_one():
    """Cells are compared where they were chosen; the numbers shown are of the reporting split."""
    reported = {"videos": 30, "top1": 0.833, "top1_interval": [0.66, 0.93]}
    small = cell(top1=0.958, gflops=10, report=reported)
    large = cell(top1=0.97, gflops=20, report={"videos": 30, "top1": 0.8})
    unreported = cell(top1=0.96, gflops=40)
    report = {"version": 1, "cells": {"small": small, "large": large, "unreported": unreported}}
    found = plan(report, gflops=10)
    assert str(found).endswith(
        "within 10 GFLOPs; top-1 83.3% (66.0 to 93.0) on the reporting split; on the videos that "
        "chose it, 1.2 points behind large, the best. The next that is more accurate there, large, "
        "takes 20 GFLOPs and has top-1 80.0% on the reporting split."
    )
    assert (found.split, found.top1, found.top1_interval) == ("report", 0.833, (0.66, 0.93))
    assert plan(report, gflops=20).cell == plan(report, gflops=99).cell == "large"  # as chosen
    assert str(plan(report, gflops=20)).endswith(
        "top-1 80.0% on the reporting split; on the videos that chose it, no cell is more accurate."
    )
    report["notes"] = ["The cells are chosen on the list that is reported, so gains are flattered."]
    assert str(plan(report, gflops=20)).endswith(
        f", no cell is more accurate. {report['notes'][0]}"
    )
    # An accuracy of videos that chose is nowhere without these words.
    for one in ("95.8%", "97.0%", "96.0%"):
        assert not any(one in str(plan(report, gflops=limit)) for limit in (10, 20, 40))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({}, "one limit, of milliseconds, gflops, tokens; 0 are given"),
        ({"gflops": 5, "tokens": 100}, "2 are given"),
        ({"gflops": 0}, "gflops=0: a limit is a number above 0"),
        ({"milliseconds": float("nan"), "device": GPU}, "a limit is a number"),
        ({"milliseconds": 5, "device": "TPU"}, f"'TPU' is none of .*: {GPU}, A Processor"),
        ({"milliseconds": 5, "device": "a"}, "'a' is part of several of .*A Processor"),
        ({"tokens": 100}, r"no cell is within 100 tokens; the cheapest, \S+-512-\S+, takes 508 t"),
        ({"milliseconds": 1, "device": "H100"}, r"within 1 ms on NVIDIA H100 .* takes 2\.\d+ ms"),
        ({"milliseconds": 5}, f"the report: has timings of {GPU}, .* not of .*cpu"),
    ],
)
def test_wrong_questions_are_one_line(sample, asked, message):
    with pytest.raises(UserError, match=message) as error:
        plan(sample, **asked)
    assert "\n" not in str(error.value)


def test_a_search_under_way_is_planned_as_far_as_it_goes(sample):
    report = {"version": 1, "cells": copy.deepcopy(sample["cells"])}
    for one in report["cells"].values():
        one.pop("choose", None)
    with pytest.raises(UserError, match="has no cells; let --mode=search finish"):
        plan(report, gflops=50)
    name = next(iter(report["cells"]))
    report["cells"][name]["choose"] = {"videos": 2, "top1": 0.5}
    assert plan(report, gflops=500).cell == name
    report["devices"] = {GPU: {"batch": 8, "cells": {}}}
    with pytest.raises(UserError, match=f"no cells timed on {GPU}"):
        plan(report, milliseconds=50, device=GPU)


# ---------------------------------------------------------------------------------------------
# Reading


def test_a_report_is_found_by_file_folder_workdir_or_checkpoint(sample, tmp_path):
    file = tmp_path / "run" / "search" / "report.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(sample))
    (tmp_path / "run" / "checkpoints" / "500").mkdir(parents=True)
    for path in ("search/report.json", "search", "", "checkpoints/500"):
        report = read_report(tmp_path / "run" / path)
        assert report["cells"] == sample["cells"] and report["chosen"] == {}
        assert fluxvit_jax.plan(str(tmp_path / "run" / path), gflops=100).gflops <= 100


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no report of a search is there; make one with --mode=search"),
        ("", r"report.json: cannot be read as a report: .*; run --mode=search again"),
        ('{"version": 1, "cells": {"a"', "report.json: cannot be read as a report"),
        (b"\xff\xfe\x00", "report.json: cannot be read as a report"),
        ("[1, 2]", "report.json: is no report of a search"),
        ('{"version": 1, "budgets": {}}', "report.json: is no report of a search"),
        ('{"version": 2, "cells": {}}', "version 2, and this reads version 1; run --mode=search"),
        ('{"version": 1, "cells": {"a": {"method": "select"}}}', "its cell a is damaged"),
        ('{"version": 1, "cells": {"a": 3}}', "its cell a is damaged"),
        (json.dumps({"version": 1, "cells": {"a": DAMAGED}}), "its cell a is damaged"),
    ],
)
def test_what_is_no_report_is_said_in_one_line(tmp_path, content, message):
    if content is not None:
        content = content if isinstance(content, bytes) else content.encode()
        (tmp_path / "report.json").write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read_report(tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_a_fingerprint_is_of_values_and_names_alone():
    params = {"b": {"x": np.arange(6, dtype=np.float32).reshape(2, 3)}, "a": np.float32(1)}
    same = {"a": jnp.ones(()), "b": {"x": jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3)}}
    assert fingerprint(params) == fingerprint(same) == fingerprint(jax.device_put(params))
    assert fingerprint(params) == fingerprint(
        params | {"b": {"x": np.asfortranarray(params["b"]["x"])}}
    )
    others = [
        params | {"a": np.nextafter(np.float32(1), np.float32(2))},
        params | {"b": {"x": params["b"]["x"].reshape(3, 2)}},
        params | {"b": {"y": params["b"]["x"]}},
        {"b": params["b"]},
    ]
    assert len({fingerprint(one) for one in [params, *others]}) == 5


def test_a_workdir_and_the_network_of_it_have_one_fingerprint(finished):
    params = fluxvit_jax.from_pretrained(finished.workdir).params
    assert fingerprint(params) == fingerprint(restore_params(finished.workdir))


# ---------------------------------------------------------------------------------------------
# Measuring this device


@pytest.fixture(scope="module")
def searched(finished, compiled, tmp_path_factory) -> Path:
    """A workdir whose report has no timings; the first test that plans with it measures."""
    return tiny_search(finished, tmp_path_factory.mktemp("searched") / "run")


def test_a_device_is_measured_once(searched, monkeypatch):
    """The cells worth it, for real; what differs in the head only shares its timings."""
    measured, measure = [], latency.measure

    def counting(params, passes, batch):
        for one in passes:
            merging = one.model.merge_blocks > 0
            measured.append((merging, one.budget, one.grid.frames, one.grid.resolution))
        return measure(params, passes, batch)

    monkeypatch.setattr(latency, "measure", counting)
    found = plan(searched, milliseconds=1e6)
    assert found.cell == BEST and found.device == devices.device_name() and found.milliseconds > 0
    # plain-36 is both dearer and worse than select-12.
    assert measured == [
        (True, 12, 4, 28),
        (False, 12, 3, 28),
        (False, 12, 6, 42),
        (False, 24, 6, 42),
    ]

    report = read_report(searched)
    table = report["devices"][devices.device_name()]
    assert table["batch"] == 1 and set(table["cells"]) == {BEST, SECOND, TWIN, CHEAPEST, MERGING}
    assert table["cells"][SECOND] == table["cells"][TWIN] != table["cells"][BEST]
    assert set(table["cells"][BEST]) == {field.name for field in dataclasses.fields(latency.Cost)}
    assert found.milliseconds == table["cells"][BEST]["milliseconds"]

    before = (searched / "search" / "report.json").read_bytes()
    times = {name: one["milliseconds"] for name, one in table["cells"].items()}
    top1 = {cell.name: top1 for cell, top1 in TINY.items()}
    for limit in times.values():
        fitting = [name for name in times if times[name] <= limit]
        assert plan(searched, milliseconds=limit).cell == max(fitting, key=top1.get)
    assert len(measured) == 4 and (searched / "search" / "report.json").read_bytes() == before
    written = {path.name for path in (searched / "search").iterdir()}
    assert written == {f"report.{kind}" for kind in ("json", "csv", "html", "png")}
    assert devices.device_name() in (searched / "search" / "report.html").read_text()
    with pytest.raises(UserError, match=f"the cheapest, {min(times, key=times.get)}, takes"):
        plan(searched, milliseconds=min(times.values()) / 2)


COST = latency.Cost(
    milliseconds=1,
    milliseconds_p95=2,
    batch_milliseconds=3,
    batch_milliseconds_p95=4,
    clips_per_second=5,
    peak_memory_mb=6,
    compile_seconds=7,
)


def instantly(params, passes, batch):
    return (COST for _ in passes)


def test_measuring_that_is_cut_off_leaves_the_report(searched, tmp_path, monkeypatch):
    workdir = shutil.copytree(searched, tmp_path / "run")
    change(workdir, devices={})
    before = (workdir / "search" / "report.json").read_bytes()

    def cut_off(params, passes, batch):
        yield from (COST for _ in passes[:2])
        raise KeyboardInterrupt

    monkeypatch.setattr(latency, "measure", cut_off)
    with pytest.raises(KeyboardInterrupt):
        plan(workdir, milliseconds=5)
    assert (workdir / "search" / "report.json").read_bytes() == before


def test_a_report_that_cannot_be_written_is_planned_all_the_same(
    searched, tmp_path, monkeypatch, capsys
):
    workdir = shutil.copytree(searched, tmp_path / "run")
    change(workdir, devices={})
    (workdir / "search" / "report.csv").unlink(missing_ok=True)
    (workdir / "search" / "report.csv").mkdir()  # in the way of the new file
    monkeypatch.setattr(latency, "measure", instantly)
    assert plan(workdir, milliseconds=5).cell == BEST
    said = capsys.readouterr().err
    assert "cannot be written" in said and "; the timings may be lost" in said


def test_only_the_network_of_the_report_is_measured(searched, tmp_path):
    """Other weights and a report alone are refused; both lines say what to do."""
    workdir = shutil.copytree(searched, tmp_path / "run")
    change(workdir, devices={}, fingerprint="0" * 64)
    with pytest.raises(UserError, match=r"of other weights \(checkpoints/20\); .*--mode=search"):
        plan(workdir, milliseconds=5)
    alone = shutil.copy(searched / "search" / "report.json", tmp_path / "report.json")
    change(Path(alone), devices={GPU: {"batch": 8, "cells": {BEST: {"milliseconds": 1}}}})
    with pytest.raises(UserError, match=f"timings of {GPU}, not of .*plan with the workdir"):
        plan(alone, milliseconds=5)
    assert plan(alone, milliseconds=5, device=GPU).cell == BEST


def test_the_network_is_timed_in_the_dtype_of_its_search(searched, tmp_path, monkeypatch):
    networks = []

    def note(params, passes, batch):
        networks.extend(one.model.dtype for one in passes)
        return instantly(params, passes, batch)

    monkeypatch.setattr(latency, "measure", note)
    for dtype in ("bfloat16", "float32"):
        workdir = shutil.copytree(searched, tmp_path / dtype)
        change(workdir, dtype=dtype, devices={})
        plan(workdir, milliseconds=5)
        assert set(networks) == {dtype}
        networks.clear()
