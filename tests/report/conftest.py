"""One full results folder for all tests of the report."""

from pathlib import Path

import pytest
from report import synthetic

from reprobe.report import write_report


@pytest.fixture(scope="session")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A full results folder; tests must not write into it."""
    return synthetic.fill_beyond_probes(synthetic.fill(tmp_path_factory.mktemp("results"), rows=120))


@pytest.fixture(scope="session")
def drawn(full: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its report, in a folder of its own."""
    return write_report(full, tmp_path_factory.mktemp("page") / "report.html")


@pytest.fixture(scope="session")
def page(drawn: Path) -> str:
    """The text of its report."""
    return drawn.read_text()
