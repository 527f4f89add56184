"""The page: its text, and a browser's view."""

import html
import re

import numpy as np
import pytest

from fluxvit_jax.token_optimization import report
from fluxvit_jax.token_optimization.report.style import DARK, LIGHT
from tests import limited
from tests.deploy import test_page
from tests.token_optimization.report.sample import NASTY, read, sample, words

browser = test_page.browser
WIDTHS = 1400, 800, 400
LIGHT_FLAG, DARK_FLAG = (f"--blink-settings=preferredColorScheme={i}" for i in (1, 0))


def test_the_page_says_what_was_measured(page):
    text = words(page.text)
    for expected in (
        *("Token Optimization of FluxViT-S", "checkpoints/500", "computed in bfloat16", "4x3"),
        *("20,000 videos, 3 of them failed and count as wrong", "2,000 videos, none failed"),
        *("lists/train.csv", "lists/val.csv"),
        *("trained at 8x224 only", "184 cells", "120 cells stopped early by halving"),
    ):
        assert expected in text


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


@pytest.mark.parametrize("width", [*(pytest.param(w, marks=pytest.mark.slow) for w in WIDTHS), 320])
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
    done = limited.run(command)
    assert f"<title>{width} of {width} px</title>" in done.stdout, done.stdout[:300] + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("width", WIDTHS)
def test_a_page_is_light_or_dark_as_the_reader_likes(browser, folder, tmp_path, width):
    # Without the tables above them, the charts are in view.
    text = (folder / "report.html").read_text()
    text = re.sub(r"<section>\n<h2>(Plain and|What that).*?</section>", "", text, flags=re.S)
    for name, flag, colours, others in (
        ("light", LIGHT_FLAG, LIGHT, DARK),
        ("dark", DARK_FLAG, DARK, LIGHT),
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
