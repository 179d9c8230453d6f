"""The transfer matrix shows every pair where its names say."""

import numpy as np
import polars as pl
import pytest

from reprobe.errors import UsageError
from reprobe.probing.transfer import COLUMNS, TransferGrid
from reprobe.report import transfer_map
from reprobe.report.transfer import best_on_the_diagonal


@pytest.fixture(scope="module")
def grid() -> TransferGrid:
    """Four data sets at two sites; the first site is better on the diagonal, the second off it."""
    names, rng = ("cities", "neg_cities", "larger_than", "a name with $x$ too long to fit"), np.random.default_rng(0)
    lines = []
    for site, own, across in (("resid.post@4", 0.9, 0.5), ("resid.post@7", 0.8, 0.8)):
        for train in names:
            for test in names:
                value = (own if train == test else across) + 0.1 * rng.random()
                numbers = {c: 0 for c, kind in COLUMNS.items() if kind in (pl.Int32, pl.Int64)}
                texts = {"train": train, "test": test, "site": site, "part": "resid.post", "centring": "training"}
                line = {"train_rows": "a" * 64, "test_rows": "b" * 64} | numbers | texts | {"chance": 0.5}
                for metric in ("accuracy", "auroc"):
                    line |= {metric: value, f"{metric}_low": value - 0.08, f"{metric}_high": value + 0.07}
                lines.append(line)
    return TransferGrid(pl.DataFrame(lines, schema=COLUMNS), names, dict.fromkeys(names, ""), {})


def test_every_pair_stands_in_its_row_and_column(grid: TransferGrid):
    figure = transfer_map(grid, "resid.post@7", metric="auroc")
    axes = figure.axes[0]
    values = grid.matrix("resid.post@7", "auroc")
    cells = {(round(t.get_position()[1]), round(t.get_position()[0])): t.get_text() for t in axes.texts}
    assert len(cells) == len(figure.marks) == 16
    for (i, j), text in cells.items():
        assert float(text.split()[0]) == pytest.approx(values[i, j], abs=0.005)
    assert [t.get_text() for t in axes.get_yticklabels()][:2] == ["cities", "neg_cities"]
    assert axes.get_yticklabels()[3].get_text().endswith("…")
    mark = figure.marks[1]
    assert (mark.x, mark.y) == (1, 0)
    assert mark.text.startswith(f"cities → neg_cities at resid.post@7: auroc {values[0, 1]:.3f} [")
    figure.canvas.draw()


def test_without_a_site_the_one_best_on_the_diagonal_is_shown(grid: TransferGrid):
    assert best_on_the_diagonal(grid) == "resid.post@4"
    axes = transfer_map(grid).axes[0]
    assert axes.get_title(loc="left") == "resid.post@4, centred by training rows"
    unclear = grid.matrix("resid.post@4", "accuracy_low") <= 0.5
    assert 0 < unclear.sum() < 16
    assert sum("×" in t.get_text() for t in axes.texts) == unclear.sum()


def test_what_a_transfer_map_cannot_show_is_refused(grid: TransferGrid):
    with pytest.raises(UsageError, match="accuracy or auroc"):
        transfer_map(grid, metric="chance")
    with pytest.raises(UsageError, match="no results centred by 'own mean'"):
        transfer_map(grid, centring="own mean")
