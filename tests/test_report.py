"""The report of a search: its numbers as JSON, CSV and HTML, its pictures, and a browser's view."""

import base64
import csv
import html
import json
import math
import random
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import cv2
import numpy as np
import pytest

from fluxvit_jax import report
from fluxvit_jax.errors import UserError
from fluxvit_jax.report import pareto
from tests import test_page

METHODS = "select", "plain", "merge"
BUDGETS = (3072, 2048, 1024)
FRAMES, RESOLUTIONS = (4, 8, 12, 16, 24), (112, 168, 224, 280, 336)
VIDEOS, STOPS = 2000, (128, 512)
NASTY = '<script>alert("1")</script> & $x'
DEVICES = "Intel Xeon Platinum 8481C (cpu)", "NVIDIA H100 80GB HBM3"


def sample(
    budgets: tuple[int, ...] = BUDGETS,
    frames: tuple[int, ...] = FRAMES,
    resolutions: tuple[int, ...] = RESOLUTIONS,
    heads: tuple[int, ...] = (1, 2),
    devices: tuple[str, ...] = DEVICES,
    nasty: str = "",
) -> dict[str, Any]:
    """A whole report with accuracies, costs and halvings such as a search finds; `nasty` in all
    strings."""
    rng = np.random.default_rng(0)
    cells: dict[str, dict[str, Any]] = {}
    for t in frames:
        for side in resolutions:
            tokens = t * (side // 14) ** 2
            for budget in (b for b in budgets if b <= tokens):
                for method in ("plain",) if tokens == budget else ("select", "merge"):
                    for head in heads:
                        name = f"{method}-{budget}-{t}x{side}-h{head}"
                        cells[name] = cell(rng, method, budget, tokens, t, side, head)
    stop(cells)
    report = {
        "version": 1,
        "checkpoint": f"checkpoints/500{nasty}",
        "fingerprint": "0f" * 32,
        "network": f"S{nasty}",
        "views": f"4x3{nasty}",
        "budgets": list(budgets),
        "frames": list(frames),
        "resolutions": list(resolutions),
        "choose": split(f"lists/train.csv, a tenth that training left out{nasty}", VIDEOS, 0),
        "report": split(f"lists/val.csv{nasty}", 20000, 3),
        "notes": [
            "The checkpoint was trained at 8x224 only; other grids are what it makes of them."
            + nasty
        ],
        "cells": cells,
    }
    report["chosen"] = {str(budget): choose(rng, cells, budget) for budget in budgets}
    report["skipped"] = [
        {"cell": name, "videos": own["choose"]["videos"]}
        for name, own in cells.items()
        if own["choose"]["videos"] < VIDEOS
    ]
    report["devices"] = {
        device + nasty: {
            "batch": 8,
            "cells": {name: cost(own, 1 + 40 * (i == 0)) for name, own in cells.items()},
        }
        for i, device in enumerate(devices)
    }
    return report


def split(data: str, videos: int, failed: int) -> dict[str, Any]:
    return {"data": data, "videos": videos, "failed": failed, "fingerprint": "a0" * 32}


def cell(
    rng: np.random.Generator, method: str, budget: int, tokens: int, t: int, side: int, head: int
) -> dict[str, Any]:
    """More frames, pixels and tokens help, but not from many times as many as are kept."""
    top1 = 0.83 - 0.5 / t - 12 / side - 12 / budget**0.8
    top1 -= 0.012 * math.log2(tokens / budget) ** 2 + 0.004 * (head - 2) ** 2
    top1 -= 0.015 * (method == "merge")
    top1 += rng.normal(0, 0.004)
    attention = 384 * 2 * 12 * budget**2
    kept = (12 * 12 * budget * 384**2 + attention) / 1e9
    return {
        **{"method": method, "budget": budget, "tokens": budget, "frames": t},
        **{"resolution": side, "head": head},
        **{"gflops": round(kept + tokens * 588 * 384 / 1e9 * 3, 3), "gflops_kept": round(kept, 3)},
        "choose": accuracy(top1, VIDEOS),
    }


def accuracy(top1: float, videos: int) -> dict[str, Any]:
    def interval(share: float) -> list[float]:
        half = 1.96 * math.sqrt(share * (1 - share) / videos)
        return [share - half, share + half]

    top5 = 1 - (1 - top1) / 4
    return {
        **{"videos": videos, "top1": top1, "top1_interval": interval(top1)},
        **{"top5": top5, "top5_interval": interval(top5)},
    }


def stop(cells: dict[str, dict[str, Any]]) -> None:
    """Halves the selecting and merging cells of each budget twice, and pairs all with the best."""
    for budget in {own["budget"] for own in cells.values()}:
        names = [name for name, own in cells.items() if own["budget"] == budget]
        names.sort(key=lambda name: -cells[name]["choose"]["top1"])
        best = cells[names[0]]["choose"]["top1"]
        for rank, name in enumerate(names):
            own = cells[name]
            if own["method"] != "plain" and rank >= len(names) // 3:
                videos = STOPS[rank < 2 * len(names) // 3]
                own["choose"] = accuracy(own["choose"]["top1"], videos)
            behind = best - own["choose"]["top1"]
            videos = own["choose"]["videos"]
            half = 0.6 / math.sqrt(videos)
            own["behind"] = {
                **{"top1": behind, "interval": [behind - half, behind + half], "videos": videos}
            }


def choose(
    rng: np.random.Generator, cells: dict[str, dict[str, Any]], budget: int
) -> dict[str, Any]:
    chosen: dict[str, Any] = {}
    for method in ("select", "plain", "merge"):
        own = {
            name: c["choose"]["top1"]
            for name, c in cells.items()
            if (c["method"], c["budget"], c["choose"]["videos"]) == (method, budget, VIDEOS)
        }
        chosen[method] = max(own, key=own.get) if own else None
        if name := chosen[method]:
            top1 = cells[name]["choose"]["top1"] + rng.normal(0, 0.003)
            cells[name]["report"] = accuracy(top1, 20000)
    for key, other in (("gain", "plain"), ("over_merge", "merge")):
        pair = chosen["select"], chosen[other]
        chosen[key] = None
        if all(pair):
            gain = cells[pair[0]]["report"]["top1"] - cells[pair[1]]["report"]["top1"]
            chosen[key] = {"top1": gain, "interval": [gain - 0.006, gain + 0.006], "videos": 20000}
    return chosen


def cost(cell: dict[str, Any], scale: float) -> dict[str, float]:
    milliseconds = scale * (0.8 + cell["gflops"] / 60) * (1.08 if cell["method"] == "merge" else 1)
    batch = milliseconds * 5
    return {
        **{"milliseconds": milliseconds, "milliseconds_p95": 1.06 * milliseconds},
        **{"batch_milliseconds": batch, "batch_milliseconds_p95": 1.04 * batch},
        **{"clips_per_second": 8000 / batch, "peak_memory_mb": 200 + cell["budget"] / 10},
        "compile_seconds": 7.1,
    }


@pytest.fixture(scope="module")
def given() -> dict[str, Any]:
    """A report that tests share and leave as it is."""
    return sample()


@pytest.fixture(scope="module")
def folder(given, tmp_path_factory) -> Path:
    """Where it is written."""
    folder = tmp_path_factory.mktemp("search")
    report.write(given, folder)
    return folder


@pytest.fixture(scope="module")
def page(folder) -> "Page":
    return Page(folder / "report.html")


# The front.


def test_the_front_is_what_no_other_point_beats():
    choice = random.Random(0)
    for size in (0, 1, 2, 5, 20, 100):
        for values in (3, 10, 1000):  # many ties, some, few
            points = [(choice.randrange(values), choice.randrange(values)) for _ in range(size)]
            front = pareto(points)
            assert sorted(front) == [i for i, own in enumerate(points) if not beaten(own, points)]
            assert [points[i][0] for i in front] == sorted(points[i][0] for i in front)


def beaten(own: tuple[float, float], points: list[tuple[float, float]]) -> bool:
    """Whether one of `points` is no worse than `own` in cost and accuracy, and better in one."""
    cost, accuracy = own
    return any(c <= cost and a >= accuracy and (c, a) != own for c, a in points)


def test_equal_points_are_on_the_front_together():
    assert pareto([(2, 0.5), (1, 0.4), (2, 0.5), (2, 0.4), (3, 0.5)]) == [1, 0, 2]


# Files.


def test_four_files_and_no_other_are_written(tmp_path):
    folder = tmp_path / "run" / "search"
    for _ in range(2):  # the second time over those of the first
        report.write(sample(), folder)
        names = {"report.json", "report.csv", "report.html", "report.png"}
        assert {path.name for path in folder.iterdir()} == names


def test_json_is_the_report(tmp_path):
    given = sample(nasty=NASTY)
    report.write(given, tmp_path)
    text = (tmp_path / "report.json").read_text()
    assert json.loads(text) == given
    assert text == json.dumps(given, indent=1) + "\n"


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "search").write_text("a file")
    with pytest.raises(UserError, match=r"search: cannot be written"):
        report.write(sample(), tmp_path / "search")


def test_nothing_unfinished_stays_where_a_file_cannot_be_replaced(tmp_path):
    (tmp_path / "report.csv").mkdir()
    with pytest.raises(UserError, match="cannot be written"):
        report.write(sample(), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", "report.csv"}


def test_importing_the_module_does_not_import_what_draws():
    code = "import sys, fluxvit_jax.report; sys.exit('matplotlib' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# The file for spreadsheets.


def csv_rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "report.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_csv_has_every_number_of_every_cell(tmp_path):
    given = sample(nasty=NASTY)
    report.write(given, tmp_path)
    found = {row["cell"]: row for row in csv_rows(tmp_path)}
    assert found.keys() == given["cells"].keys()
    stopped = {one["cell"]: str(one["videos"]) for one in given["skipped"]}
    for name, cell in given["cells"].items():
        row = found[name]
        for key in ("method", "budget", "tokens", "frames", "resolution", "head", "gflops_kept"):
            assert row[key] == str(cell[key])
        for split in ("choose", "report"):
            own = cell.get(split, {})
            for key in ("videos", "top1", "top5"):
                assert row[f"{split}_{key}"] == str(own.get(key, ""))
            for key in ("top1", "top5"):
                ends = [str(end) for end in own.get(f"{key}_interval", ("", ""))]
                assert [row[f"{split}_{key}_{end}"] for end in ("low", "high")] == ends
        ends = [str(end) for end in cell["behind"]["interval"]]
        assert [row["behind_low"], row["behind_high"]] == ends
        assert row["stopped_after_videos"] == stopped.get(name, "")
        for device, own in given["devices"].items():
            assert row[f"batch on {device}"] == "8"
            for key, value in own["cells"][name].items():
                assert row[f"{key} on {device}"] == str(value)


def test_csv_says_what_was_chosen_and_its_gains(given, folder):
    found = csv_rows(folder)
    chosen = {own[method] for own in given["chosen"].values() for method in METHODS}
    assert {row["cell"] for row in found if row["chosen"] == "yes"} == chosen - {None}
    gains = {row["cell"]: row["gain_top1"] for row in found if row["gain_top1"]}
    expected = {own["select"]: str(own["gain"]["top1"]) for own in given["chosen"].values()}
    assert gains == expected


def test_rows_are_in_one_order_however_the_search_went(given, folder, tmp_path):
    names = [row["cell"] for row in csv_rows(folder)]
    assert names[:3] == ["select-3072-8x280-h1", "select-3072-8x280-h2", "select-3072-8x336-h1"]
    report.write(given | {"cells": dict(reversed(given["cells"].items()))}, tmp_path)
    assert [row["cell"] for row in csv_rows(tmp_path)] == names


# The page as text.


class Page(HTMLParser):
    """Tables, text and attributes of a page; fails on tags that do not close."""

    VOID = ("img", "meta", "source", "br")

    def __init__(self, path: Path):
        super().__init__()
        self.elements: dict[str, list[dict[str, str]]] = {}
        self.tables: list[list[list[str]]] = []
        self.kinds: list[list[list[str]]] = []  # classes of the cells of tables
        self.text, self._open = "", []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attributes: list) -> None:
        own = dict(attributes)
        self.elements.setdefault(tag, []).append(own)
        if tag not in self.VOID:
            self._open.append(tag)
        if tag == "table":
            self.tables.append([])
            self.kinds.append([])
        elif tag == "tr":
            self.tables[-1].append([])
            self.kinds[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self.kinds[-1][-1].append(own.get("class", ""))
        elif "td" in self._open:
            self.tables[-1][-1][-1] += " "

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self._open:
            self.text += data
        if {"td", "th"} & set(self._open):
            self.tables[-1][-1][-1] += data


def read(given: dict[str, Any], folder: Path) -> Page:
    report.write(given, folder)
    return Page(folder / "report.html")


def words(text: str) -> str:
    return " ".join(text.split()).replace("\u2212", "-")


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def test_the_page_says_what_was_measured(page):
    text = words(page.text)
    for expected in (
        *("Token Optimization of FluxViT-S", "checkpoints/500", "4x3", "lists/val.csv"),
        *("20,000 videos, 3 of them failed and count as wrong", "2,000 videos, none failed"),
        *("trained at 8x224 only", "184 cells", "120 cells stopped early by halving"),
    ):
        assert expected in text


def test_plain_and_to_are_of_the_reporting_split_with_their_intervals(given, page):
    table = page.tables[0]
    assert len(table) == 1 + len(BUDGETS)
    for row, budget in zip(table[1:], BUDGETS, strict=True):
        chosen = given["chosen"][str(budget)]
        assert row[0] == f"{budget:,} tokens"
        for column, method in ((1, "plain"), (2, "select"), (4, "merge")):
            assert words(row[column]) == accuracy_words(given["cells"].get(chosen[method]))
        for column, kind in ((3, "gain"), (5, "over_merge")):
            assert words(row[column]) == gain_words(chosen[kind])


def accuracy_words(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return "\u2013"
    own = cell["report"]
    low, high = map(percent, own["top1_interval"])
    grid = f"{cell['frames']} frames of {cell['resolution']} px, head {cell['head']}"
    return f"{percent(own['top1'])} % {low} to {high} % {grid}"


def gain_words(gain: dict[str, Any] | None) -> str:
    if gain is None:
        return "\u2013"
    top1, low, high = (f"{100 * value:+.1f}" for value in (gain["top1"], *gain["interval"]))
    return f"{top1} {low} to {high}, 20,000 videos"


def test_gains_are_coloured_where_their_interval_is_clear_of_zero(tmp_path):
    given = sample(budgets=(2048, 1024, 512))
    ends = {"2048": [0.01, 0.03], "1024": [-0.01, 0.01], "512": [-0.03, -0.01]}
    for budget, own in given["chosen"].items():
        own["over_merge"] = None
        own["gain"] = {"top1": sum(ends[budget]) / 2, "interval": ends[budget], "videos": 9}
    page = read(given, tmp_path)
    kinds = [own["class"] for own in page.elements["div"] if "class" in own]
    assert [kind for kind in kinds if kind in ("better", "even", "worse")] == [
        *("better", "even", "worse")
    ]
    assert [words(row[3])[:4] for row in page.tables[0][1:]] == ["+2.0", "+0.0", "-2.0"]


def test_costs_of_what_was_chosen_are_both_gflops_and_every_device(given, page):
    table = page.tables[1]
    assert table[0] == ["Tokens", "Method", "GFLOPs", *(f"ms, {device}" for device in DEVICES)]
    own = given["chosen"]["1024"]
    names = [own["plain"], own["select"], own["merge"]]
    shorts = ("plain", "TO", "merging")
    for row, name, short in zip(table[-3:], names, shorts, strict=True):
        cell = given["cells"][name]
        assert row[0] == "1,024"
        assert words(row[1]) == f"{short} {cell['frames']}x{cell['resolution']} px"
        assert words(row[2]) == f"{cell['gflops']:.1f} {cell['gflops_kept']:.1f} kept"
        slow = given["devices"][DEVICES[0]]["cells"][name]
        assert words(row[3]) == f"{slow['milliseconds']:.1f} p95 {slow['milliseconds_p95']:.1f}"
        fast = given["devices"][DEVICES[1]]["cells"][name]
        assert words(row[4]) == f"{fast['milliseconds']:.2f} p95 {fast['milliseconds_p95']:.2f}"


def test_heat_maps_have_the_best_head_of_each_grid_and_frame_the_best(given, page):
    for budget, table, kinds in zip(BUDGETS, page.tables[2:5], page.kinds[2:5], strict=True):
        assert table[0][1:] == [str(side) for side in RESOLUTIONS]
        assert [row[0] for row in table[1:]] == [str(t) for t in FRAMES]
        best = ""
        for i, j in np.ndindex(len(FRAMES), len(RESOLUTIONS)):
            text, kind = table[1 + i][1 + j], kinds[1 + i][1 + j]
            heads = [
                cell["choose"]
                for cell in given["cells"].values()
                if (cell["frames"], cell["resolution"]) == (FRAMES[i], RESOLUTIONS[j])
                and cell["budget"] == budget
                and cell["method"] != "merge"
            ]
            if FRAMES[i] * (RESOLUTIONS[j] // 14) ** 2 < budget:
                assert (text, kind, heads) == ("", "", [])
                continue
            most = max(own["videos"] for own in heads)
            top1 = max(own["top1"] for own in heads if own["videos"] == most)
            assert text == percent(top1)
            assert kind == "partial" if most < VIDEOS else kind.startswith("known")
            best = text if kind == "known best" else best
        whole = [
            cell["choose"]["top1"]
            for cell in given["cells"].values()
            if cell["budget"] == budget and cell["method"] != "merge"
            if cell["choose"]["videos"] == VIDEOS
        ]
        assert best == percent(max(whole))
    assert [page.text.count(f"{budget:,} token") for budget in BUDGETS] == [2, 2, 2]


def test_a_grid_that_was_not_measured_is_a_dot(tmp_path):
    given = sample()
    for name in [name for name in given["cells"] if "select-1024-12x280" in name]:
        del given["cells"][name]
    table = read(given, tmp_path).tables[4]
    assert table[1 + FRAMES.index(12)][1 + RESOLUTIONS.index(280)] == "\u00b7"


def test_lists_have_every_cell_and_every_one_that_was_stopped(given, page):
    stopped, everything = page.tables[-2:]
    assert len(stopped) == 1 + len(given["skipped"])
    for row, one in zip(stopped[1:], given["skipped"], strict=True):
        top1 = given["cells"][one["cell"]]["choose"]["top1"]
        assert row[:2] == [one["cell"], str(one["videos"])]
        assert row[2].startswith(f"{percent(top1)} % (")
    assert {row[0] for row in everything[2:]} == given["cells"].keys()
    by_name = {row[0]: row for row in everything[2:]}
    name = given["chosen"]["1024"]["select"]
    cell, row = given["cells"][name], [words(text) for text in by_name[name]]
    assert row[1:3] == ["1,024", "2,000"]
    assert row[6] == "20,000"
    assert row[7].startswith(f"{percent(cell['report']['top1'])} % (")
    batch = given["devices"][DEVICES[1]]["cells"][name]["batch_milliseconds"]
    assert f"{batch:.2f}" in row


def test_strings_are_text_whatever_they_hold(tmp_path):
    page = read(sample(nasty=NASTY), tmp_path)
    assert "script" not in page.elements
    assert page.text.count(NASTY) >= 8  # title, heading, facts, splits, note, devices
    assert NASTY in page.tables[1][0][-1]


def test_the_page_needs_no_other_file(folder, page):
    assert page.elements.keys().isdisjoint({"link", "script", "iframe", "base"})
    assert all("href" not in own for elements in page.elements.values() for own in elements)
    assert not re.search(r"url\(|@import|https?:", (folder / "report.html").read_text())
    addresses = [own["src"] for own in page.elements["img"]]
    addresses += [own["srcset"] for own in page.elements["source"]]
    assert all(address.startswith("data:image/svg+xml;base64,") for address in addresses)


def test_a_page_of_585_cells_is_below_5_mb(tmp_path):
    given = sample(
        budgets=(3072, 2048, 1024, 512),
        frames=tuple(range(4, 25, 2)),
        resolutions=tuple(range(112, 337, 28)),
        heads=(2,),
    )
    assert len(given["cells"]) == 585
    report.write(given, tmp_path)
    assert (tmp_path / "report.html").stat().st_size < 5e6


# Charts.


def drawing(address: str) -> str:
    """The SVG of an address that holds it."""
    head, data = address.split(",")
    assert head == "data:image/svg+xml;base64"
    svg = base64.b64decode(data).decode()
    ElementTree.fromstring(svg)
    return svg


def test_a_chart_has_every_cell_and_names_its_front(given, page):
    assert len(page.elements["img"]) == 2 + len(DEVICES)
    whole = [cell for cell in given["cells"].values() if cell["choose"]["videos"] == VIDEOS]
    for image, key in zip(page.elements["img"], ("tokens", "gflops"), strict=False):
        points = [(cell[key], cell["choose"]["top1"]) for cell in whole]
        front = [whole[i] for i in range(len(points)) if not beaten(points[i], points)]
        names = [f"{cell['frames']}x{cell['resolution']} px" for cell in front]
        stated = re.findall(r"\d+x\d+ px", image["alt"])
        assert sorted(stated) == sorted(names)
        svg = drawing(image["src"])
        assert svg.count('<use xlink:href="#m') >= len(given["cells"])
        best = max(front, key=lambda cell: cell["choose"]["top1"])
        # matplotlib has what its letters spell in comments.
        assert f"<!-- {best['frames']}x{best['resolution']} -->" in svg


def test_charts_are_light_and_dark_wide_and_narrow(page):
    sources = page.elements["source"]
    for i, image in enumerate(page.elements["img"]):
        own = [*(source["srcset"] for source in sources[3 * i : 3 * i + 3]), image["src"]]
        narrow_dark, narrow, dark, light = map(drawing, own)
        for svg, colours in (
            *((narrow_dark, report.DARK), (dark, report.DARK)),
            *((narrow, report.LIGHT), (light, report.LIGHT)),
        ):
            for name in ("accent", "plain", "merge", "ink"):
                assert colours[name] in svg
        assert int(sources[3 * i]["width"]) < int(image["width"])


@pytest.mark.parametrize(("fastest", "logarithmic"), [(1.0, True), (3.0, False)])
def test_axes_are_logarithmic_over_more_than_a_factor_of_four(tmp_path, fastest, logarithmic):
    given = sample(devices=DEVICES[:1])
    own = given["devices"][DEVICES[0]]["cells"]
    for i, costs in enumerate(own.values()):
        costs["milliseconds"] = 10.0 if i else fastest
    svg = drawing(read(given, tmp_path).elements["img"][2]["src"])
    assert ("milliseconds a clip, log scale" in svg) == logarithmic


def test_the_same_report_is_the_same_page(given, folder, tmp_path):
    report.write(given, tmp_path)
    for name in ("report.html", "report.csv"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize("frames", [FRAMES, tuple(range(2, 62, 2))])
def test_the_picture_is_light_and_shows_all_methods(tmp_path, frames):
    report.write(sample(budgets=(1024,), frames=frames, nasty=NASTY), tmp_path)
    picture = cv2.imread(str(tmp_path / "report.png"))[..., ::-1].astype(int)
    assert picture.shape[1] > 1200
    assert picture[[0, 0, -1, -1], [0, -1, 0, -1]].min() == 255
    for name in ("accent", "plain", "merge"):
        colour = [int(report.LIGHT[name][i : i + 2], 16) for i in (1, 3, 5)]
        assert (np.abs(picture - colour).max(-1) <= 2).sum() > 50


# Reports of searches that are not done, or small.


OPTIONAL = (
    *("checkpoint", "network", "views", "budgets", "frames", "resolutions", "choose", "report"),
    *("notes", "chosen", "skipped", "devices", "fingerprint", "version"),
)


@pytest.mark.parametrize("missing", [*((key,) for key in OPTIONAL), OPTIONAL])
@pytest.mark.parametrize("null", [False, True])
def test_a_report_may_miss_any_part(tmp_path, missing, null):
    given = sample(budgets=(1024,), resolutions=(168, 224), devices=DEVICES[:1])
    for key in missing:
        del given[key]
        given |= {key: None} if null else {}
    assert len(read(given, tmp_path).elements["img"]) == 3 - ("devices" in missing)
    assert len(csv_rows(tmp_path)) == len(given["cells"])


def test_cells_may_miss_all_that_is_measured(tmp_path):
    given = sample()
    for i, cell in enumerate(given["cells"].values()):
        for key in ("choose", "report", "behind", "gflops", "gflops_kept", "tokens")[i % 7 :]:
            cell.pop(key, None)
    for own in given["devices"].values():
        own["cells"] = dict(list(own["cells"].items())[::3])
    del given["devices"][DEVICES[1]]["cells"], given["devices"][DEVICES[0]]["batch"]
    assert len(read(given, tmp_path).tables[-1]) == 2 + len(given["cells"])


@pytest.mark.parametrize("chosen", [{}, dict.fromkeys((*METHODS, "gain", "over_merge"))])
def test_the_best_so_far_stands_where_nothing_was_chosen_and_says_so(tmp_path, chosen):
    given = sample()
    given["chosen"]["1024"] = chosen
    for cell in given["cells"].values():
        cell.pop("report", None)
    for row in read(given, tmp_path).tables[0][1:]:
        known = row[0] != "1,024 tokens"
        split = "choosing split" if known else "choosing split, so far"
        assert split in row[1]
        assert ("so far" in row[2]) != known
    best = max(
        cell["choose"]["top1"]
        for cell in given["cells"].values()
        if (cell["budget"], cell["method"]) == (1024, "select")
        if cell["choose"]["videos"] == VIDEOS
    )
    assert row[2].strip().startswith(f"{percent(best)} %")


def test_cells_of_fewer_videos_are_never_best(tmp_path):
    given = sample()
    name = given["skipped"][0]["cell"]
    cell = given["cells"][name]
    cell["choose"]["top1"] = 0.99  # lucky
    page = read(given, tmp_path)
    assert all("99.0" not in image["alt"] for image in page.elements["img"])
    place = {
        (text, kind)
        for table, kinds in zip(page.tables[2:5], page.kinds[2:5], strict=True)
        for row, row_kinds in zip(table, kinds, strict=True)
        for text, kind in zip(row, row_kinds, strict=True)
    }
    assert ("99.0", "known best") not in place


def test_a_report_of_one_cell(tmp_path):
    given = sample(budgets=(1024,), frames=(4,), resolutions=(224,), heads=(1,), devices=())
    assert list(given["cells"]) == ["plain-1024-4x224-h1"]
    page = read(given, tmp_path)
    assert len(page.elements["img"]) == 2
    assert page.tables[2][1] == [
        "4",
        percent(given["cells"]["plain-1024-4x224-h1"]["choose"]["top1"]),
    ]


def test_a_report_without_cells(tmp_path):
    page = read(sample(budgets=(1024,), frames=(), devices=()), tmp_path)
    assert "img" not in page.elements
    assert words(page.tables[0][1][2]) == "\u2013"


def test_a_report_of_equal_accuracies(tmp_path):
    given = sample()
    for cell in given["cells"].values():
        cell["choose"] = accuracy(0.5, VIDEOS)
    page = read(given, tmp_path)
    kinds = [kind for table in page.kinds[2:5] for row in table for kind in row]
    assert kinds.count("known best") == len(BUDGETS)
    assert "partial" not in kinds


def test_a_report_without_plain_cells(tmp_path):
    given = sample()
    for name in [name for name in given["cells"] if name.startswith("plain")]:
        del given["cells"][name]
    for own in given["chosen"].values():
        own["plain"] = own["gain"] = None
    page = read(given, tmp_path)
    assert [words(row[1]) for row in page.tables[0][1:]] == ["\u2013"] * len(BUDGETS)


def test_without_merging_nothing_is_said_of_it(tmp_path):
    given = sample()
    for name in [name for name in given["cells"] if name.startswith("merge")]:
        del given["cells"][name]
    for own in given["chosen"].values():
        own["merge"] = own["over_merge"] = None
    given["skipped"] = []
    page = read(given, tmp_path)
    assert "merging" not in page.text
    assert len(page.tables[0][0]) == 4


# The page in a browser.


browser = test_page.browser
WIDTHS = 1400, 800, 400
LIGHT_FLAG, DARK_FLAG = (f"--blink-settings=preferredColorScheme={i}" for i in (1, 0))


@pytest.mark.parametrize("width", (*WIDTHS, 320))
def test_a_page_is_as_wide_as_its_window(browser, tmp_path, width):
    """Whatever is opened in it, and however long its names are."""
    report.write(sample(nasty=NASTY + "x" * 200), tmp_path)
    text = (tmp_path / "report.html").read_text().replace("<details>", "<details open>")
    # Browsers have no windows as narrow as a telephone, but frames.
    frame = f'<iframe width="{width}" height="900" srcdoc="{html.escape(text)}"></iframe>'
    script = """onload = () => {
        const page = document.querySelector("iframe").contentDocument.documentElement;
        document.title = `${page.scrollWidth} of ${page.clientWidth} px`;
    }"""
    path = tmp_path / "frame.html"
    path.write_text(f"<!doctype html><meta charset=utf-8><script>{script}</script>{frame}")
    command = [
        *(browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
        *("--dump-dom", f"--user-data-dir={tmp_path / 'profile'}", path.as_uri()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert f"<title>{width} of {width} px</title>" in done.stdout, done.stdout[:300] + done.stderr


@pytest.mark.parametrize("width", WIDTHS)
def test_a_page_is_light_or_dark_as_the_reader_likes(browser, folder, tmp_path, width):
    # Without the tables above them, the charts are in view.
    text = (folder / "report.html").read_text()
    text = re.sub(r"<section>\n<h2>(Plain and|What that).*?</section>", "", text, flags=re.S)
    for name, flag, colours, others in (
        ("light", LIGHT_FLAG, report.LIGHT, report.DARK),
        ("dark", DARK_FLAG, report.DARK, report.LIGHT),
    ):
        path = tmp_path / f"{name}.html"
        path.write_text(text)
        pixels = test_page.screenshot(browser, path, width, flag)
        print(path.with_name("screenshot.png").rename(tmp_path / f"{width}-{name}.png"))
        assert count(pixels, colours["ground"]) > 10000
        # Keys are all in full colour, points only on the front, which merging is not on.
        for own, least in (("accent", 150), ("plain", 60), ("merge", 20)):
            assert count(pixels, colours[own]) > least
            assert count(pixels, others[own]) == 0


def count(pixels: np.ndarray, colour: str) -> int:
    """Pixels [height, width, 3] that have a colour, "#rrggbb"."""
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return int((pixels == wanted).all(-1).sum())
