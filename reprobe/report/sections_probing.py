"""What the report says of probes: accuracies, readers, heads, rows, directions, transfer, scans.

Enters: studies and scans. Leaves: a `Section` of each, without blocks where there is nothing of it. Every caption says
what is shown, how many rows in how many groups, and which interval. Does not know HTML.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import polars as pl

from reprobe.errors import CorruptArtifact
from reprobe.model.identity import ModelIdentity
from reprobe.model.sites import Site
from reprobe.probing.comparison import Comparison
from reprobe.probing.intervals import LEVEL, RESAMPLES
from reprobe.probing.probe_grid import ProbeGrid
from reprobe.provenance import digest_bytes
from reprobe.report.blocks import Block, Cell, Panel, Panels, Prose, Quote, Section, Source, Table, panel, source
from reprobe.report.cosines import cosine_map, layer_cosines
from reprobe.report.curves import layer_curves
from reprobe.report.folder import Results
from reprobe.report.maps import head_map, saturation, scan_map
from reprobe.report.measured import TRANSFER
from reprobe.report.points import LEAST_COSINE, SCATTER_ROWS, projections, scatter
from reprobe.report.reliability import reliability
from reprobe.report.results import ScanResult
from reprobe.report.study import (
    Study,
    best_line,
    chosen,
    class_name,
    interval,
    reader_of,
    single_head,
    spelled_sites,
    whole_site,
)
from reprobe.report.transfer import best_on_the_diagonal, transfer_map
from reprobe.report.wording import capital, change
from reprobe.store.reader import ActivationStore

_LEVEL = f"{100 * LEVEL:.0f}\u00a0%"
_INTERVAL = (
    f"{_LEVEL} intervals over groups (accuracy: Wilson, with the effective number of rows; AUROC: cluster bootstrap, "
    f"BCa, {RESAMPLES:,} resamples)"
)
_HOLLOW = "Hollow: rows that were misread by the reader of the fold that held them out."
_CALIBRATION = (
    "On calibration. Filled: probabilities after Platt scaling, fitted on scores held out inside the training "
    f"rows, with {_LEVEL} intervals of the shares over groups. Hollow: σ(score), the score in standard deviations of "
    "those same scores. The calibration error (ECE) found is above the true one, since few rows in a bin vary by "
    "chance; its interval is of the true one, may lie below the one found, and begins at 0 where perfect calibration "
    "would look no better."
)


def layers(found: Sequence[Study]) -> Section:
    panels: list[Panel] = []
    rows: list[tuple[Cell, ...]] = []
    for i, study in enumerate(found):
        if not (grids := study.readers_of(whole_site)):
            continue
        caption = (
            f"Held-out accuracy at every block on {study.rows}. Bands: {_INTERVAL}. Dashed: always answering "
            f"with the larger class ({study.chance:.3f}). {study.notes}"
        )
        figure = layer_curves(grids, title=study.name)
        panels.append(
            panel(figure, f"layers-{i}", f"Accuracy over blocks on {study.name}", caption.strip(), _of(study, grids))
        )
        for name, grid in grids.items() if study.comparison is None else ():  # their table follows
            best = best_line(grid)
            auroc = f"{best['auroc']:.3f}"
            rows.append((study.name, name, best["site"], interval(best), auroc, chosen(grid)))
    if not panels:
        return Section("layers", "Accuracy over layers", ())
    table = Table(
        "The best site of each curve. Its accuracy is the highest of all that were tried, which flatters "
        "it. The last column is free of that: for each fold, the site is chosen by cross-validation among "
        "the other folds.",
        (
            "Data",
            "Reader",
            "Best site",
            "Accuracy there [95\u00a0%]#",
            "AUROC#",
            "Accuracy, site chosen on other folds [95\u00a0%]#",
        ),
        rows,
    )
    return Section("layers", "Accuracy over layers", (Panels(panels), *([table] if rows else [])))


def readers(found: Sequence[Study]) -> Section:
    blocks: list[Block] = []
    for i, study in enumerate(found):
        if (comparison := study.comparison) is None:
            continue
        blocks += [_choices(study, comparison), *([_differences(study, comparison)] if len(study.grids) > 1 else [])]
        panels = []
        for j, name in enumerate(comparison.readers):
            figure = reliability(comparison.calibrated(name), seed=comparison.first.seed, title=f"{study.name}, {name}")
            caption = f"{name} on {study.rows}, at the sites chosen on the other folds."
            label, of = f"Calibration of {name} on {study.name}", _of(study, {name: study.grids[name]})
            panels.append(panel(figure, f"reliability-{i}-{j}", label, caption, of))
        blocks.append(Panels(panels))
    if blocks:
        blocks.append(Prose(_CALIBRATION))
    return Section("readers", "Readers compared", blocks)


def _choices(study: Study, comparison: Comparison) -> Table:
    rows = [
        (
            line["reader"],
            line["sites"].replace(" ×", "\u00a0×"),
            interval(line),
            interval(line, "auroc"),
            interval(line, "recall"),
            interval(line, "ece"),
        )
        for line in comparison.choices.sort("accuracy", descending=True, maintain_order=True).iter_rows(named=True)
    ]
    return Table(
        f"Readers on {study.rows}. Everything is held out: the site is chosen by cross-validation among the other "
        "folds (× how many folds chose it), and Platt scaling is fitted there. "
        f"Always answering with the larger class is right in {study.chance:.3f}. {_INTERVAL}.",
        (
            "Reader",
            "Sites chosen",
            "Accuracy [95\u00a0%]#",
            "AUROC#",
            "Recall at 1\u00a0% false positives#",
            "ECE after Platt scaling#",
        ),
        rows,
    )


def _differences(study: Study, comparison: Comparison) -> Table:
    rows = [
        (
            f"{line['reader']} less {line['other']}",
            change(line, "accuracy_difference"),
            change(line, "auroc_difference"),
        )
        for line in comparison.differences.iter_rows(named=True)
    ]
    return Table(
        f"One reader less another on {study.name}: the same rows in the same resamples of groups, each reader at the "
        f"sites chosen for it. {_LEVEL} intervals; each holds by itself, so that of {len(rows)} about "
        f"{len(rows) * (1 - LEVEL):.1f} would exclude 0 if all readers were equal.",
        ("Readers", "Accuracy [95\u00a0%]#", "AUROC [95\u00a0%]#"),
        rows,
    )


def directions(found: Sequence[Study]) -> Section:
    panels: list[Panel] = []
    for i, study in enumerate(found):
        grids = study.readers_of(lambda s: whole_site(s) and s.layer is not None)
        if not grids:
            continue
        reader = max(grids, key=lambda name: float(best_line(grids[name])["accuracy"]))
        part = Site.parse(best_line(grids[reader])["site"]).part
        if sum(s.part == part for s in grids[reader].sites) < 2:
            continue
        figure = layer_cosines(grids[reader], part, title=f"{study.name}, {reader}")
        caption = (
            f"Cosines between the directions that {reader} found at each block on {study.name}: blocks with one "
            f"direction form a square. Random directions of width {_width(grids[reader])} have 0 ± "
            f"{_width(grids[reader]) ** -0.5:.2f}."
        )
        label, of = f"Cosines between blocks, {reader} on {study.name}", _of(study, {reader: grids[reader]}, part)
        panels.append(panel(figure, f"cosines-{i}", label, caption, of))
    if (across := _across(found)) is not None:
        panels.append(across)
    return Section("directions", "Which directions are one", (Panels(panels),) if panels else ())


def _across(found: Sequence[Study]) -> Panel | None:
    """Cosines of all readers on all data of the first model, at the site where they read best on average."""
    named = {
        f"{study.name}, {reader}" if len(found) > 1 else reader: grid
        for study in found
        for reader, grid in study.readers_of(whole_site).items()
        if study.first.provenance.get("identity") == found[0].first.provenance.get("identity")
    }
    if len(named) < 2:
        return None
    common = set.intersection(*(set(grid.sites) for grid in named.values()))
    sites = [s for s in next(iter(named.values())).sites if s in common]
    if not sites:
        return None
    accuracy = [{str(s): a for s, a in g.table.select("site", "accuracy").iter_rows()} for g in named.values()]
    site = max(sites, key=lambda s: sum(one[str(s)] for one in accuracy))
    figure = cosine_map({name: grid.directions[site] for name, grid in named.items()}, title=str(site))
    caption = (
        f"Cosines between the directions at {site}, where they read best on average. Each points to its own positive "
        "class, so that the sign means something only between data with the same labels."
    )
    digests = {f"rows of {study.name}": study.first.provenance.get("rows") for study in found}
    of = source(found[0].identity, digests, at=str(site))
    return panel(figure, "cosines-across", f"Cosines between directions at {site}", caption, of)


def _width(grid: ProbeGrid) -> int:
    return next(iter(grid.directions.values())).width


def heads(found: Sequence[Study]) -> Section:
    panels: list[Panel] = []
    rows: list[tuple[Cell, ...]] = []
    for i, study in enumerate(found):
        if not (grids := study.readers_of(single_head)):
            continue
        values = np.concatenate([g.table["accuracy"].to_numpy() for g in grids.values()])
        limits = (float(values.min()), float(values.max()))
        for j, (name, grid) in enumerate(grids.items()):
            n, best = len(grid.table), best_line(grid)
            above = grid.table.filter(pl.col("accuracy_low") > pl.col("chance")).height
            caption = (
                f"{name} on {study.name} ({study.size}): held-out accuracy of each attention head. The "
                f"{_LEVEL} interval over groups lies above chance ({study.chance:.3f}) in {above} of "
                f"{n} heads; × marks the others, the frame the highest."
            )
            figure = head_map(grid, limits=limits, title=f"{study.name}, {name}")
            label = f"Accuracy of every head, {name} on {study.name}"
            panels.append(panel(figure, f"heads-{i}-{j}", label, caption, _of(study, {name: grid})))
            counts = (f"{above} of {n}", f"{n * (1 - LEVEL) / 2:.0f}")
            rows.append((study.name, name, *counts, best["site"], interval(best), chosen(grid)))
    if not panels:
        return Section("heads", "Accuracy of single heads", ())
    caution = Prose(
        "The highest accuracy among many heads is biased upward: the head was picked because it came out "
        "highest on these very rows. The last column of the table is free of that: for each fold, the head "
        "is chosen by cross-validation among the other folds, and judged on this one. Colours mean the "
        "same in all maps of one data set."
    )
    table = Table(
        "How many heads have an interval above chance, how many would if no head knew anything, and the highest.",
        (
            "Data",
            "Reader",
            "Heads above chance#",
            "Expected by chance#",
            "Highest head",
            "Accuracy there [95\u00a0%]#",
            "Accuracy, head chosen on other folds [95\u00a0%]#",
        ),
        rows,
    )
    return Section("heads", "Accuracy of single heads", (caution, Panels(panels), table))


def geometry(found: Sequence[Study], say: Callable[[str], None]) -> Section:
    """`say` is told of stores whose rows cannot be read."""
    blocks: list[Block] = []
    for i, study in enumerate(found):
        if not (grids := study.readers_of(whole_site)):
            continue
        lines = {name: best_line(grid) for name, grid in grids.items()}
        reader = max(lines, key=lambda name: float(lines[name]["accuracy"]))
        grid, site = grids[reader], Site.parse(lines[reader]["site"])
        panels = []
        if study.store is not None and study.store.complete:
            try:
                panels.append(_scatter_panel(study, study.store, grid, site, f"pca-{i}"))
                panels.append(_along_panel(study, study.store, grid, site, f"along-{i}"))
            except CorruptArtifact as error:
                panels.clear()
                what = f"the rows of {study.name} are damaged and not drawn; reprobe verify tells which"
                say(f"{what}: {error}")
                blocks.append(Prose(f"{capital(what)}."))
        elif study.store is not None:
            blocks.append(
                Prose(
                    f"The store of {study.name} is not complete, so its rows are not drawn: finish it with "
                    "reprobe extract … --resume."
                )
            )
        caption = (
            f"Scores at {site} by {reader}, each row scored by the fold that held it out ({study.rows}). "
            f"Dotted: the decision boundary. Accuracy {interval(lines[reader])}."
        )
        figure = projections(grid, site, title=f"{study.name}, {reader}")
        label = f"Held-out scores of {study.name} at {site}"
        panels.append(panel(figure, f"scores-{i}", label, caption, _of(study, site)))
        blocks.append(Panels(panels))
    return Section("geometry", "The best layer, row by row", blocks)


def _scatter_panel(study: Study, store: ActivationStore, grid: ProbeGrid, site: Site, name: str) -> Panel:
    caption = (
        f"{study.name} at {site}, the best site of {reader_of(grid)}: {_drawn(grid)} on their first two principal "
        "components, fitted on these rows (centred, not scaled). The arrow is the reader's direction as "
        f"far as it lies in this plane: half the plot long at cosine 1, not drawn below {LEAST_COSINE}; dashed, where "
        "the plane meets its decision boundary. Components follow variance, and what a reader finds need not vary "
        f"much. {_HOLLOW}"
    )
    figure = scatter(store, site, grid=grid, title=f"{study.name}, {site}")
    return panel(figure, name, f"Principal components of {study.name} at {site}", caption, _of(study, site))


def _along_panel(study: Study, store: ActivationStore, grid: ProbeGrid, site: Site, name: str) -> Panel:
    caption = (
        f"The same rows from left to right along the direction of {reader_of(grid)}, upwards on the first principal "
        "component of what is left. The direction was fitted on all of them, and parts them better than rows it has "
        f"not seen. {_HOLLOW}"
    )
    figure = scatter(store, site, grid=grid, plane="direction", title=f"{study.name}, {site}")
    return panel(figure, name, f"{study.name} at {site} along the direction of the reader", caption, _of(study, site))


def _drawn(grid: ProbeGrid) -> str:
    n = len(grid.rows)
    return f"{n:,} rows" if n <= SCATTER_ROWS else f"{SCATTER_ROWS:,} of {n:,} rows, drawn at random,"


def scans(results: Results, found: Sequence[Study]) -> Section:
    blocks: list[Block] = []
    for i, (name, result) in enumerate(results.scans.items()):
        label = f"Score of every token at every block, {name}"
        read = f"{spelled_sites(result.scan.sites)}, every token"
        of = source(_model_of(result, found), {"text": digest_bytes(result.text.encode())}, at=read)
        shown = panel(scan_map(result.scan), f"scan-{i}", label, _scan_caption(result, found), of)
        blocks += [Quote(result.text), Panels([shown])]
    return Section("scans", "Reading a text, token by token", blocks)


def _scan_caption(result: ScanResult, found: Sequence[Study]) -> str:
    scan, of, positive = result.scan, result.grid, "the positive class"
    if (study := _study_of(result, found)) is not None:
        grid = study.grids[result.grid]
        of, positive = f"{reader_of(grid)} on {study.name} ({study.size})", class_name(grid.classes[1])
    limit = saturation(scan)
    beyond = int((np.abs(scan.scores) > limit).sum())
    return (
        f"LAT scan: {len(scan.tokens)} tokens × {len(scan.sites)} sites, read with the directions of {of}. "
        "A score is the signed distance from the decision boundary, in standard deviations of the training "
        f"projections at that site; above 0 (blue) is {positive}. Colours saturate at ±{limit:.2f}; "
        f"{beyond:,} of {scan.scores.size:,} scores lie beyond. The directions were fitted at the position "
        "that the data were read at, and are applied here to every token."
    )


def _model_of(result: ScanResult, found: Sequence[Study]) -> ModelIdentity | None:
    """The model that a scan was made in; from before that was kept, the one that its directions are of."""
    study = _study_of(result, found)
    return result.identity or (None if study is None else study.identity)


def _study_of(result: ScanResult, found: Sequence[Study]) -> Study | None:
    """That of the grid whose directions read the text. A comparison calls its grids by readers, not by files."""
    return next((study for study in found if study.comparison is None and result.grid in study.grids), None)


def transfers(results: Results) -> Section:
    blocks: list[Block] = []
    for i, (name, measured) in enumerate(results.of(TRANSFER).items()):
        grid = measured.transfer
        site = best_on_the_diagonal(grid)
        reader = grid.provenance.get("reader", "a reader")
        caption = (
            f"{name}: {reader} trained on the data set of the row and tested on that of the column, at {site}, where "
            "accuracy is best on average if both are the same (framed; held out by groups). Means, scales and "
            "thresholds come from training rows. × marks values whose 95\u00a0% interval over groups of the test "
            f"set holds chance or lies below it. {' '.join(note for note in grid.notes.values() if note)}"
        )
        figure = transfer_map(grid, site, title=site)
        of = source(measured.identity, measured.data, at=site)
        shown = panel(figure, f"transfer-{i}", f"Accuracy from data set to data set, {name}", caption.strip(), of)
        blocks.append(Panels([shown]))
    return Section("transfer", "From data set to data set", blocks)


def _of(study: Study, read: Mapping[str, ProbeGrid] | Site, part: str | None = None) -> Source:
    """What a figure of a study is of: the model, the rows, and the sites that were read (of grids those of a part)."""
    if isinstance(read, Site):
        sites = str(read)
    else:
        every = dict.fromkeys(site for grid in read.values() for site in grid.sites)
        sites = spelled_sites([site for site in every if part is None or site.part == part])
    origin = study.first.provenance
    position = f", position {origin['plan']['at']}" if "at" in origin.get("plan", {}) else ""
    digests = {what: origin.get(what) for what in ("prompts", "rows", "store")}
    return source(study.identity, digests, at=sites + position)
