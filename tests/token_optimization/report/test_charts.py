"""Charts of accuracy against cost, and the front in them."""

import base64
import random
import re
from xml.etree import ElementTree

import pytest

from fluxvit_jax.token_optimization.report.charts import pareto
from fluxvit_jax.token_optimization.report.style import DARK, LIGHT
from tests.token_optimization.report.sample import DEVICES, VIDEOS, read, sample


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
            *((narrow_dark, DARK), (dark, DARK)),
            *((narrow, LIGHT), (light, LIGHT)),
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
