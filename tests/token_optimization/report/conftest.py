"""A report that tests of its files share."""

from pathlib import Path
from typing import Any

import pytest

from fluxvit_jax.token_optimization import report
from tests.token_optimization.report.sample import Page, sample


@pytest.fixture(scope="session")
def given() -> dict[str, Any]:
    """A report that tests share and leave as it is."""
    return sample()


@pytest.fixture(scope="session")
def folder(given, tmp_path_factory) -> Path:
    """Where it is written."""
    folder = tmp_path_factory.mktemp("search")
    report.write(given, folder)
    return folder


@pytest.fixture(scope="session")
def page(folder) -> Page:
    return Page(folder / "report.html")
