"""One full results folder for all tests of the report."""

from pathlib import Path

import pytest
from report import synthetic

from reprobe.report import write_report


@pytest.fixture(scope="session")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A full results folder; tests must not write into it."""
    return synthetic.fill(tmp_path_factory.mktemp("results"), rows=120)


@pytest.fixture(scope="session")
def page(full: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Its report."""
    return write_report(full, tmp_path_factory.mktemp("page") / "report.html").read_text()
