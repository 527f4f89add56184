"""A report such as a search writes, and readers of the page and the table made of it."""

import csv
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np

from fluxvit_jax.token_optimization import report

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
        "dtype": f"bfloat16{nasty}",
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


def csv_rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "report.csv").open(newline="") as file:
        return list(csv.DictReader(file))


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
