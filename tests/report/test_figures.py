"""Figures show the data that they were given, and change nothing else."""

import dataclasses
import io
from pathlib import Path

import matplotlib
import numpy as np
import polars as pl
import pytest
from matplotlib.collections import PathCollection, QuadMesh
from matplotlib.colors import to_rgba
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from report import synthetic
from sklearn.decomposition import PCA

from reprobe.errors import UsageError
from reprobe.methods.repe import Scan
from reprobe.model.sites import Site
from reprobe.probing import Comparison
from reprobe.probing.metrics import calibration_error
from reprobe.probing.probe_grid import COLUMNS, ProbeGrid
from reprobe.report import (
    comparison_path,
    cosine_map,
    dose_curves,
    head_map,
    layer_cosines,
    layer_curves,
    probe_path,
    projections,
    reliability,
    scan_map,
    scatter,
    store_path,
)
from reprobe.report.maps import saturation
from reprobe.report.points import SCATTER_ROWS
from reprobe.report.style import PAPER, Plot
from reprobe.store import ActivationStore

SITE = Site("resid.post", 18)


@pytest.fixture(scope="module")
def grid(full: Path) -> ProbeGrid:
    return ProbeGrid.load(probe_path(full, "cities-logistic"))


@pytest.fixture(scope="module")
def other(full: Path) -> ProbeGrid:
    return ProbeGrid.load(probe_path(full, "cities-pca"))


@pytest.fixture(scope="module")
def store(full: Path) -> ActivationStore:
    return ActivationStore.open(store_path(full, "cities"))


def of_sites(grid: ProbeGrid, sites: list[Site]) -> ProbeGrid:
    """A grid of the same numbers at other sites."""
    lines = grid.table.head(len(sites)).with_columns(
        site=pl.Series([str(s) for s in sites]),
        part=pl.Series([s.part for s in sites]),
        layer=pl.Series([s.layer for s in sites], dtype=pl.Int32),
        head=pl.Series([s.unit for s in sites], dtype=pl.Int32),
    )
    direction = next(iter(grid.directions.values()))
    return dataclasses.replace(
        grid,
        table=lines.select(*COLUMNS),
        directions={s: dataclasses.replace(direction, site=s) for s in sites},
        oof=grid.oof[:, : len(sites)],
        inner=grid.inner[:, : len(sites)],
    )


def rows_of(figure: Plot) -> list[PathCollection]:
    """The marks of a scatter's rows, negative ones first, without those of the legend."""
    return [c for c in figure.axes[0].collections if isinstance(c, PathCollection) and len(c.get_offsets())]


def dots_of(figure: Plot) -> np.ndarray:
    """Where the rows of a scatter are drawn, negative ones first."""
    return np.concatenate([np.asarray(c.get_offsets()) for c in rows_of(figure)])


def lines_of(figure: Plot, name: str) -> list[Line2D]:
    return [line for axes in figure.axes for line in axes.get_lines() if line.get_label() == name]


def test_layer_curves_draw_the_accuracy_of_every_block_and_the_chance_line(grid: ProbeGrid, other: ProbeGrid):
    figure = layer_curves([grid, other])
    for one, name in ((grid, "LogisticReader"), (other, "PCAReader")):
        (line,) = lines_of(figure, name)
        want = one.table.filter(pl.col("part") == "resid.post").sort("layer")
        np.testing.assert_array_equal(line.get_xdata(), want["layer"])
        np.testing.assert_array_equal(line.get_ydata(), want["accuracy"])
    (chance,) = lines_of(figure, "majority class")
    assert set(chance.get_ydata()) == {grid.table["chance"][0]}


def test_layer_curves_draw_the_interval_as_a_band(grid: ProbeGrid):
    (band,) = layer_curves([grid]).axes[0].collections
    want = grid.table.filter(pl.col("part") == "resid.post")
    drawn = band.get_paths()[0].vertices[:, 1]
    assert set(want["accuracy_low"]) | set(want["accuracy_high"]) <= set(drawn)


def test_layer_curves_have_a_panel_per_part_and_name_the_ends(grid: ProbeGrid):
    blocks = [Site(part, i) for part in ("resid.post", "attn.out") for i in range(3)]
    figure = layer_curves([of_sites(grid, [Site("embed"), *blocks, Site("final")])])
    figure.draw_without_rendering()
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["resid.post", "attn.out"]
    ticks = {t.get_position()[0]: t.get_text() for t in figure.axes[-1].get_xticklabels()}
    assert (ticks[-1], ticks[3]) == ("embed", "final")
    at = {mark.x for mark in figure.marks if "embed:" in mark.text or "final:" in mark.text}
    assert at == {-1, 3}


def test_layer_curves_tell_chance_levels_apart_where_they_differ(grid: ProbeGrid, other: ProbeGrid):
    uneven = dataclasses.replace(other, table=other.table.with_columns(chance=0.7))
    figure = layer_curves({"even": grid, "uneven": uneven})
    assert lines_of(figure, "majority class (even)")[0].get_ydata()[0] == 0.5
    assert lines_of(figure, "majority class (uneven)")[0].get_ydata()[0] == 0.7


def test_layer_curves_refuse_heads_alone_and_readers_that_cannot_be_told_apart(grid: ProbeGrid):
    with pytest.raises(UsageError, match="head_map"):
        layer_curves([of_sites(grid, [Site("attn.heads", 0, h) for h in range(3)])])
    with pytest.raises(UsageError, match="several grids are of LogisticReader"):
        layer_curves([grid, grid])
    assert len(lines_of(layer_curves({"a": grid, "b": grid}), "b")) == 1


def test_a_head_map_puts_blocks_on_x_and_heads_on_y(grid: ProbeGrid):
    figure = head_map(grid)
    (mesh,) = [c for c in figure.axes[0].collections if isinstance(c, QuadMesh)]
    drawn = np.asarray(mesh.get_array())
    assert drawn.shape == (synthetic.HEADS, synthetic.LAYERS)
    for row in grid.table.filter(pl.col("head").is_not_null()).iter_rows(named=True):
        assert drawn[row["head"], row["layer"]] == row["accuracy"]
    assert len(figure.marks) == synthetic.HEADS * synthetic.LAYERS


def test_a_head_map_crosses_out_what_may_be_chance_and_frames_the_best(grid: ProbeGrid):
    figure = head_map(grid)
    heads = grid.table.filter(pl.col("head").is_not_null())
    crosses = [c for c in figure.axes[0].collections if isinstance(c, PathCollection)]
    crossed = {tuple(map(int, p)) for c in crosses for p in c.get_offsets()}
    unclear = heads.filter(pl.col("accuracy_low") <= pl.col("chance"))
    assert crossed == set(unclear.select("layer", "head").iter_rows())
    assert 0 < len(crossed) < len(heads)
    (frame,) = [p for p in figure.axes[0].patches if isinstance(p, Rectangle)]
    best = heads.sort("accuracy", "layer", "head", descending=[True, False, False]).row(0, named=True)
    assert frame.get_xy() == (best["layer"] - 0.5, best["head"] - 0.5)


def test_a_head_map_needs_heads(grid: ProbeGrid):
    with pytest.raises(UsageError, match=r"resid\.post@0"):
        head_map(of_sites(grid, [Site("resid.post", i) for i in range(3)]))


def test_a_very_large_head_map_is_one_image(grid: ProbeGrid):
    heads = [Site("attn.heads", i // 128, i % 128) for i in range(128 * 80)]
    line = grid.table.row(0, named=True)
    table = pl.DataFrame(
        [line | {"part": "attn.heads", "layer": s.layer, "head": s.unit} for s in heads], schema=COLUMNS
    )
    figure = head_map(dataclasses.replace(grid, table=table))
    assert figure.axes[0].collections[0].get_rasterized()
    assert not figure.marks


def test_a_scan_map_puts_tokens_on_x_and_sites_on_y_around_zero():
    scan = synthetic.make_scan("a b c").scan
    figure = scan_map(scan)
    mesh = figure.axes[0].collections[0]
    np.testing.assert_array_equal(np.asarray(mesh.get_array()), scan.scores.astype(np.float64))
    assert mesh.norm.vcenter == 0
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == ["<|im_start|>", "a", "b", "c"]
    assert figure.marks[5].text == f"token 1 'a' at resid.post@1: {scan.scores[1, 1]:+.2f}"


def test_the_first_token_does_not_bleach_a_scan():
    scan = synthetic.make_scan("a b c").scan
    assert saturation(scan) <= np.abs(scan.scores[:, 1:]).max() < np.abs(scan.scores[:, 0]).min()


def test_tokens_are_never_read_as_markup_nor_invisible():
    tokens = ("$\\frac{1$", " ", "\n", "\x00", " word", "", "x" * 90)
    scan = Scan(tokens, (SITE,), np.zeros((1, len(tokens)), dtype=np.float32))
    figure = scan_map(scan, title="$\\bad{")
    shown = [t.get_text() for t in figure.axes[0].get_xticklabels()]
    assert shown[:6] == ["$\\frac{1$", "␣", "↵", "\\x00", "word", "␣"]
    assert len(shown[6]) < 30
    figure.savefig(io.BytesIO(), format="svg")


def test_blocks_that_were_not_all_scanned_keep_their_numbers():
    sites = tuple(Site("resid.post", i) for i in (3, 7, 11))
    axes = scan_map(Scan(("a",), sites, np.ones((3, 1), dtype=np.float32))).axes[0]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["3", "7", "11"]


def test_a_scatter_shows_the_principal_components_of_its_rows(store: ActivationStore, grid: ProbeGrid):
    figure = scatter(store, SITE, grid=grid)
    X = store.read(SITE).double().numpy()[grid.rows]
    pca = PCA(2).fit(X)
    want = pca.transform(X)
    drawn = dots_of(figure)
    order = np.concatenate([np.flatnonzero(~grid.positive), np.flatnonzero(grid.positive)])
    signs = np.sign(np.sum(drawn * want[order], axis=0))
    np.testing.assert_allclose(drawn, want[order] * signs, atol=1e-8)
    share = 100 * pca.explained_variance_ratio_
    assert figure.axes[0].get_xlabel() == f"component 1 ({share[0]:.2g} % of variance)"
    assert figure.axes[0].get_ylabel() == f"component 2 ({share[1]:.2g} % of variance)"


def test_a_scatter_draws_a_direction_as_far_as_it_lies_in_the_plane(store: ActivationStore, grid: ProbeGrid):
    plane = PCA(2).fit(store.read(SITE).double().numpy()[grid.rows]).components_

    def drawn(vector: np.ndarray) -> tuple[float, str]:
        direction = dataclasses.replace(grid.directions[SITE], vector=vector / np.linalg.norm(vector))
        figure = scatter(store, SITE, grid=dataclasses.replace(grid, directions={SITE: direction}))
        dots = dots_of(figure)
        arrows = {tuple(np.abs(a.xy) / np.ptp(dots, axis=0)) for a in figure.axes[0].texts}
        assert len(arrows) <= 1
        (told,) = [t.get_text() for t in figure.legends[0].get_texts() if "cosine" in t.get_text()]
        return max(map(max, arrows), default=0), told

    other = grid.directions[SITE].vector - plane.T @ plane @ grid.directions[SITE].vector
    other /= np.linalg.norm(other)
    assert drawn(plane[0]) == (pytest.approx(0.5), "LogisticReader: cosine 1.00")
    assert drawn(0.6 * plane[0] + 0.8 * other) == (
        pytest.approx(0.3),
        "LogisticReader: cosine 0.60",
    )
    assert drawn(other) == (0, "LogisticReader: not in this plane, cosine 0.00")
    assert not any("cosine" in t.get_text() for t in scatter(store, SITE).legends[0].get_texts())


def test_a_scatter_hollows_what_was_misread_and_tells_the_held_out_score(store: ActivationStore, grid: ProbeGrid):
    figure = scatter(store, SITE, grid=grid)
    scores = grid.oof[:, grid.sites.index(SITE)]
    wrong = (scores > 0) != grid.positive
    told = [t.get_text() for t in figure.legends[0].get_texts()]
    assert f"hollow: misread when held out (n = {wrong.sum()})" in told
    for mark, is_wrong, score in zip(figure.marks, wrong, scores / grid.directions[SITE].scale, strict=True):
        assert mark.text.endswith(f"held-out score {score:+.2f}{' (misread)' if is_wrong else ''}")
    hollow = to_rgba(PAPER, 0.6)
    for dots, side in zip(rows_of(figure), (~grid.positive, grid.positive), strict=True):
        drawn = [tuple(face) == hollow for face in dots.get_facecolors()]
        assert drawn == wrong[side].tolist()


def test_the_boundary_of_a_scatter_is_where_the_plane_meets_it(store: ActivationStore, grid: ProbeGrid):
    X = store.read(SITE).double().numpy()[grid.rows]
    plane = PCA(2).fit(X).components_
    plane = plane * np.sign(plane[[0, 1], np.abs(plane).argmax(axis=1)])[:, None]
    vector = 0.6 * plane[0] + 0.3 * plane[1] + np.linalg.svd(plane)[2][5] * 0.5
    direction = dataclasses.replace(grid.directions[SITE], vector=vector / np.linalg.norm(vector))
    direction = dataclasses.replace(direction, offset=float(direction.project(X.mean(axis=0))) + 0.7)
    axes = scatter(store, SITE, grid=dataclasses.replace(grid, directions={SITE: direction})).axes[0]
    (line,) = lines_of(axes.figure, "decision boundary")
    for point in (line.get_xy1(), line.get_xy2()):
        assert direction.score(X.mean(axis=0) + np.array(point) @ plane) == pytest.approx(0, abs=1e-9)
    far = dataclasses.replace(direction, offset=direction.offset + 1e4)
    figure = scatter(store, SITE, grid=dataclasses.replace(grid, directions={SITE: far}))
    assert figure.legends[0].get_texts()[-1].get_text() == "decision boundary: outside the figure"


def test_along_its_direction_a_scatter_shows_scores_and_an_exact_boundary(store: ActivationStore, grid: ProbeGrid):
    direction = grid.directions[SITE]
    figure = scatter(store, SITE, grid=grid, plane="direction")
    X = store.read(SITE).double().numpy()[grid.rows]
    (line,) = lines_of(figure, "decision boundary")
    assert line.get_xy1()[0] == pytest.approx(line.get_xy2()[0])
    x = np.array([mark.x for mark in figure.marks])
    np.testing.assert_allclose(x - line.get_xy1()[0], direction.score(X), atol=1e-9)
    rest = X - X.mean(axis=0)
    rest -= np.outer(rest @ direction.vector, direction.vector)
    y = np.array([mark.y for mark in figure.marks])
    np.testing.assert_allclose(np.abs(y), np.abs(PCA(1).fit_transform(rest)[:, 0]), atol=1e-8)
    assert "cosine 1.00" in " ".join(t.get_text() for t in figure.legends[0].get_texts())
    with pytest.raises(UsageError, match="needs a grid"):
        scatter(store, SITE, plane="direction")


@pytest.fixture(scope="module")
def compared(full: Path) -> Comparison:
    return Comparison.load(comparison_path(full, "moods"))


def test_a_reliability_diagram_has_the_share_of_positives_in_every_bin(compared: Comparison):
    found = compared.calibrated("lda")
    figure = reliability(found)
    main, counts = figure.axes
    for probabilities, name in ((found.platt, "after Platt scaling"), (found.plain, "σ(score)")):
        (line,) = [line for line in main.get_lines() if str(line.get_label()).startswith(name)]
        used = [b for b in range(15) if ((probabilities * 15).astype(int).clip(max=14) == b).any()]
        for b, x, y in zip(used, line.get_xdata(), line.get_ydata(), strict=True):
            inside = (probabilities >= b / 15) & (probabilities < (b + 1) / 15 + (b == 14))
            assert x == pytest.approx(probabilities[inside].mean(), abs=1e-6)
            assert y == found.positive[inside].mean()
    assert f"ECE {calibration_error(found.platt, found.positive):.3f} [" in figure.legends[0].get_texts()[2].get_text()
    rows = [m for m in figure.marks if m.axes is counts]
    assert sum(int(m.text.split()[0]) for m in rows) == len(found.platt)


def test_a_cosine_map_names_every_pair(grid: ProbeGrid, other: ProbeGrid):
    directions = {
        "one": grid.directions[SITE],
        "$x$": other.directions[SITE],
        "three": grid.directions[Site("resid.post", 3)],
    }
    figure = cosine_map(directions, title="a")
    (mesh,) = [c for c in figure.axes[0].collections if isinstance(c, QuadMesh)]
    wanted = [[float(a.vector @ b.vector) for b in directions.values()] for a in directions.values()]
    np.testing.assert_allclose(np.asarray(mesh.get_array()), wanted, atol=1e-12)
    assert figure.marks[1].text == f"one and $x$: cosine {wanted[0][1]:+.3f}"
    assert [t.get_text() for t in figure.axes[0].texts] == [
        f"{v:.2f}".replace("-0.00", "0.00").replace("-", "−") for row in wanted for v in row
    ]
    figure.draw_without_rendering()
    with pytest.raises(UsageError, match="two directions or more, not 1"):
        cosine_map({"one": grid.directions[SITE]})
    with pytest.raises(UsageError, match="no cosine between widths"):
        cosine_map({"one": grid.directions[SITE], "head": grid.directions[Site("attn.heads", 0, 0)]})


def test_cosines_between_layers_are_in_the_order_of_the_blocks(grid: ProbeGrid):
    figure = layer_cosines(grid)
    (mesh,) = [c for c in figure.axes[0].collections if isinstance(c, QuadMesh)]
    a, b = (grid.directions[Site("resid.post", i)].vector for i in (3, 17))
    assert np.asarray(mesh.get_array())[3, 17] == pytest.approx(float(a @ b))
    assert f"resid.post@3 and resid.post@17: cosine {float(a @ b):+.3f}" in {m.text for m in figure.marks}
    some = of_sites(grid, [Site("resid.post", i) for i in (3, 7, 11)])
    axes = layer_cosines(some).axes[0]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["3", "7", "11"]
    with pytest.raises(UsageError, match=r"two or more of mlp\.out; the grid has 0"):
        layer_cosines(grid, "mlp.out")


def test_more_readers_than_colours_can_still_be_told_apart(grid: ProbeGrid):
    figure = layer_curves({f"reader {i}": grid for i in range(9)})
    looks = {
        (line.get_color(), line.get_marker(), line.get_linestyle(), line.get_markerfacecolor())
        for line in figure.axes[0].get_lines()
        if str(line.get_label()).startswith("reader")
    }
    assert len(looks) == 9


def test_a_scatter_of_many_rows_keeps_both_of_two_alternating_classes(tmp_path: Path):
    store = synthetic.make_store(tmp_path / "many.reprobe", rows=2 * SCATTER_ROWS, layers=1)
    figure = scatter(store, Site("resid.post", 0))
    sizes = [len(c.get_offsets()) for c in rows_of(figure)]
    assert sum(sizes) == SCATTER_ROWS
    assert min(sizes) > SCATTER_ROWS / 3


def test_a_scatter_refuses_what_it_cannot_show(full: Path, store: ActivationStore, tmp_path: Path):
    with pytest.raises(UsageError, match="another store"):
        scatter(store, SITE, grid=ProbeGrid.load(probe_path(full, "emotions-pca")))
    with pytest.raises(UsageError, match="no column 'mood'"):
        scatter(store, SITE, label="mood")
    with pytest.raises(UsageError, match="60 labels; a scatter shows two"):
        scatter(store, SITE, label="group")
    with pytest.raises(UsageError, match="at least three rows"):
        scatter(synthetic.make_store(tmp_path / "two.reprobe", rows=2, layers=1), Site("resid.post", 0))


def test_projections_count_every_held_out_row_in_units_of_the_scale(grid: ProbeGrid):
    figure = projections(grid, SITE)
    scores = grid.oof[:, grid.sites.index(SITE)] / grid.directions[SITE].scale
    counted = dict.fromkeys(("label 0", "label 1"), 0)
    for mark in figure.marks:
        name, rest = mark.text.split(": ")
        counted[name] += int(rest.split(" ")[0])
        assert scores.min() - 1e-6 <= mark.x <= scores.max() + 1e-6
    assert counted == {"label 0": int((~grid.positive).sum()), "label 1": int(grid.positive.sum())}
    with pytest.raises(UsageError, match="was not probed"):
        projections(grid, "mlp.out@3")


def test_dose_curves_have_one_axis_per_quantity_and_the_spread_as_bars():
    table = synthetic.make_steering().table
    figure = dose_curves(table.sample(fraction=1, shuffle=True, seed=1))
    effect, price = figure.axes
    np.testing.assert_array_equal(effect.containers[0].lines[0].get_ydata(), table["log_odds"])
    np.testing.assert_array_equal(price.get_lines()[0].get_ydata(), table["kl"])
    bars = np.array([segment[:, 1] for segment in effect.containers[0].lines[2][0].get_segments()])
    np.testing.assert_allclose(np.diff(bars, axis=1)[:, 0], 2 * table["log_odds_sd"].to_numpy())
    assert effect.get_position().y0 > price.get_position().y1, "panels, not twin axes"
    with pytest.raises(UsageError, match="lacks kl"):
        dose_curves(table.drop("kl"))


def test_long_names_are_cut_rather_than_cut_off(store: ActivationStore, grid: ProbeGrid):
    long = dataclasses.replace(grid, classes=("sad " * 30, "happy " * 30))
    named = layer_curves({"a reader of a very long name " * 4: grid}, title="title " * 30)
    for figure in (scatter(store, SITE, grid=long), projections(long, SITE, title="title " * 30), named):
        figure.draw_without_rendering()
        texts = [t for axes in figure.axes for t in (axes.xaxis.label, axes.yaxis.label)]
        texts += [t for axes in figure.axes for t in axes.get_children() if isinstance(t, Text) and t.get_text()]
        texts += figure.legends[0].get_texts()
        assert len(texts) >= 5
        for text in texts:
            box = text.get_window_extent()
            assert box.x0 >= -1, text
            assert box.x1 <= figure.bbox.width + 1, text


def test_every_axis_is_named(store: ActivationStore, grid: ProbeGrid):
    figures = [
        layer_curves([grid]),
        head_map(grid),
        scatter(store, SITE, grid=grid),
        projections(grid, SITE),
        scan_map(synthetic.make_scan("a b").scan),
        layer_cosines(grid),
        dose_curves(synthetic.make_steering().table),
    ]
    for figure in figures:
        assert all(axes.get_ylabel() or axes.get_xlabel() for axes in figure.axes)
        assert figure.axes[-1 if len(figure.axes) > 1 and figure.axes[-1].get_xlabel() else 0].get_xlabel()


@pytest.mark.parametrize("kind", ["png", "svg", "pdf"])
def test_figures_can_be_saved_and_leave_matplotlib_as_it_was(grid: ProbeGrid, kind: str):
    before = dict(matplotlib.rcParams)
    head_map(grid).savefig(io.BytesIO(), format=kind)
    layer_curves([grid]).savefig(io.BytesIO(), format=kind)
    assert dict(matplotlib.rcParams) == before
