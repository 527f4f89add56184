"""README, docs/ and the notebook: their code runs as it stands, their links lead somewhere.

A block of code that a test cannot run has `<!-- skip: REASON -->` in the line above it. All others
run in one folder, in which docs/finetune.md's block for laptops has trained the demo's network.
"""

import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from fluxvit_jax.config import reference
from tests import limited, programs

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LANGUAGES = {"bash", "python", "text", "bibtex"}  # the first two run
FENCE = re.compile(
    r"^(?P<indent> *)(?:<!-- skip: (?P<skip>.+?) -->\n(?P=indent))?"
    r"```(?P<language>\w*)\n(?P<text>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)
LAPTOP = "laptop/run"  # what the block for laptops trains


class Block(NamedTuple):
    """A fenced block of a page. skip: the reason why a test does not run it, if any."""

    language: str
    text: str
    skip: str | None


def blocks(page: Path) -> list[Block]:
    return [
        Block(found["language"], textwrap.dedent(found["text"]), found["skip"])
        for found in FENCE.finditer(page.read_text())
    ]


def runnable(page: Path) -> list[Block]:
    return [
        block for block in blocks(page) if block.language in ("bash", "python") and not block.skip
    ]


@pytest.fixture(scope="module")
def home(compiled, tmp_path_factory) -> Path:
    """A clone in which the demo was made, but small."""
    folder = tmp_path_factory.mktemp("home")
    for name in ("configs", "launch"):
        (folder / name).symlink_to(ROOT / name)
    (block,) = (block for block in runnable(ROOT / "docs/finetune.md") if LAPTOP in block.text)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run_bash(block.text)
    (folder / "demo").mkdir()
    (folder / "demo/clips").symlink_to(folder / "laptop/clips")
    shutil.copytree(folder / LAPTOP, folder / "demo/multi")
    return folder


def run_bash(text: str) -> None:
    """Runs commands; `python -m` in this process, which has imported JAX already."""
    commands = [line for line in text.replace("\\\n", " ").splitlines() if line.strip()]
    for command in commands:
        words = shlex.split(command, comments=True)
        if words[:2] == ["python", "-m"]:
            assert not programs.run_module(*words[2:]), command
        else:
            limited.run(["bash", "-c", command], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(
    "page", [page for page in PAGES if runnable(page)], ids=lambda page: page.stem
)
def test_code_runs(page, home, monkeypatch):
    monkeypatch.chdir(home)
    names = {}
    for block in runnable(page):
        if block.language == "python":
            exec(block.text, names)
        elif LAPTOP not in block.text:  # `home` has run it
            run_bash(block.text)
    # The demo's videos are 84 x 112 px.
    outputs = {"out": (1, 12), "kept": (1, 12, 6, 8)}
    for name in outputs.keys() & names.keys():
        shape = np.shape(names[name].logits if name == "out" else names[name])
        assert shape == outputs[name], name


def test_every_block_has_a_language():
    for page in PAGES:
        text = page.read_text()
        assert text.count("```") == 2 * len(blocks(page)), f"{page.name}: a fence is not closed"
        assert {block.language for block in blocks(page)} <= LANGUAGES, page.name


def test_every_page_is_in_the_table_of_contents():
    contents = (ROOT / "mkdocs.yml").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert f" {page.name}\n" in contents, page.name


def test_configuration_is_up_to_date():
    written = (ROOT / "docs/configuration.md").read_text()
    assert written == reference.page(), reference.__doc__


def test_links_of_the_readme():
    text = (ROOT / "README.md").read_text()
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (ROOT / target).exists(), target


def test_error_lines_of_the_faq_are_in_the_code():
    """Each is made of pieces of one message; … in the page is what the program fills in."""
    sources = [path.read_text() for path in (ROOT / "fluxvit_jax").rglob("*.py")]
    joined = [re.sub(r'[\'"]\s*\n\s*f?[\'"]', "", source) for source in sources]
    messages = [re.sub(r"\{[^{}]*\}", "…", source) for source in joined]
    entries = re.findall(r"^### `(.+)`\n\n(.+)$", (ROOT / "docs/faq.md").read_text(), re.MULTILINE)
    assert len(entries) >= 20
    for message, cure in entries:
        if "JAX's" not in cure:
            pieces = [piece for piece in message.split("…") if piece.strip()]
            assert any(all(piece in text for piece in pieces) for text in messages), message


def test_the_notebook_was_executed():
    """In order and without an error. CONTRIBUTING.md has the command; it takes minutes."""
    cells = json.loads((ROOT / "notebooks/quickstart.ipynb").read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert all(out["output_type"] != "error" for cell in code for out in cell["outputs"])
    for cell in code:
        compile("".join(cell["source"]), "quickstart.ipynb", "exec")


@pytest.mark.skipif(not importlib.util.find_spec("mkdocs"), reason="mkdocs is not installed")
def test_the_site_builds(tmp_path):
    """--strict: links between pages and to headings lead somewhere, docstrings are well-formed."""
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        f"--site-dir={tmp_path / 'site'}",
    ]
    done = limited.run(command, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "from_pretrained" in (tmp_path / "site/api/index.html").read_text()
