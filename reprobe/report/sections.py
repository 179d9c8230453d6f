"""What the report says, section by section.

Enters: the results of a folder. Leaves: one `Section` per kind of result that is there; a kind that is
missing is no section. Every caption says what is shown, how many rows in how many groups, and which interval.
Does not know HTML.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import polars as pl

from reprobe.model.identity import ModelIdentity
from reprobe.model.sites import Site
from reprobe.probing.comparison import Comparison
from reprobe.probing.intervals import LEVEL, RESAMPLES
from reprobe.probing.probe_grid import ProbeGrid
from reprobe.provenance import digest_file
from reprobe.report.blocks import (
    Beside,
    Block,
    Card,
    Cards,
    Cell,
    Commands,
    Digest,
    Panel,
    Panels,
    Prose,
    Quote,
    Section,
    Table,
    panel,
)
from reprobe.report.cosines import cosine_map, layer_cosines
from reprobe.report.curves import dose_curves, layer_curves
from reprobe.report.maps import head_map, saturation, scan_map
from reprobe.report.points import LEAST_COSINE, SCATTER_ROWS, projections, scatter
from reprobe.report.reliability import reliability
from reprobe.report.results import Results, ScanResult, SteeringResult, comparison_path, probe_path
from reprobe.report.study import (
    Study,
    best_line,
    chosen,
    class_name,
    interval,
    reader_of,
    single_head,
    studies,
    whole_site,
)
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
_HYPHEN = "\u2011"  # a hyphen at which no line ends


def sections(results: Results) -> tuple[Section, ...]:
    """All sections for which there are results, in the order of the page."""
    found = studies(results)
    made = (
        _overview(results),
        _layers(found),
        _readers(found),
        _heads(found),
        _geometry(found),
        _directions(found),
        _scans(results, found),
        _steering(results),
        _reproduce(results),
    )
    return tuple(s for s in made if s.blocks)


def _overview(results: Results) -> Section:
    models = _models(results)
    blocks: list[Block] = []
    if len(models) > 1:
        blocks.append(Prose(f"Caution: these results are of {len(models)} different models."))
    cards = [_model_card(m) for m in models]
    cards += [_store_card(name, store) for name, store in results.stores.items()]
    if cards:
        blocks.append(Cards(cards))
    if results.run and results.run.steps:
        steps = results.run.steps
        total = ("total", _duration(sum(s.seconds for s in steps)), "")
        rows = [(s.name, _duration(s.seconds), s.detail) for s in steps]
        blocks.append(Table("What was done, and how long it took.", ("Step", "Time#", "What"), rows, total=total))
    if results.run and results.run.versions:
        versions = ", ".join(f"{name} {version}" for name, version in sorted(results.run.versions.items()))
        blocks.append(Prose(f"Versions: {versions}."))
    return Section("overview", "What was run on what", blocks)


def _layers(found: Sequence[Study]) -> Section:
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
        panels.append(panel(figure, f"layers-{i}", f"Accuracy over blocks on {study.name}", caption.strip()))
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


def _readers(found: Sequence[Study]) -> Section:
    blocks: list[Block] = []
    for i, study in enumerate(found):
        if (comparison := study.comparison) is None:
            continue
        blocks += [_choices(study, comparison), *([_differences(study, comparison)] if len(study.grids) > 1 else [])]
        panels = []
        for j, name in enumerate(comparison.readers):
            figure = reliability(comparison.calibrated(name), seed=comparison.first.seed, title=f"{study.name}, {name}")
            caption = f"{name} on {study.rows}, at the sites chosen on the other folds."
            panels.append(panel(figure, f"reliability-{i}-{j}", f"Calibration of {name} on {study.name}", caption))
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
            _change(line, "accuracy_difference"),
            _change(line, "auroc_difference"),
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


def _directions(found: Sequence[Study]) -> Section:
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
        panels.append(panel(figure, f"cosines-{i}", f"Cosines between blocks, {reader} on {study.name}", caption))
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
    return panel(figure, "cosines-across", f"Cosines between directions at {site}", caption)


def _width(grid: ProbeGrid) -> int:
    return next(iter(grid.directions.values())).width


def _change(line: dict[str, Any], name: str) -> str:
    """A difference with its interval, signs always shown."""
    value, low, high = (_signed(line[f"{name}{bound}"], "+.3f") for bound in ("", "_low", "_high"))
    return f"{value} [{low}, {high}]"


def _heads(found: Sequence[Study]) -> Section:
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
            panels.append(panel(figure, f"heads-{i}-{j}", label, caption))
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


def _geometry(found: Sequence[Study]) -> Section:
    blocks: list[Block] = []
    for i, study in enumerate(found):
        if not (grids := study.readers_of(whole_site)):
            continue
        lines = {name: best_line(grid) for name, grid in grids.items()}
        reader = max(lines, key=lambda name: float(lines[name]["accuracy"]))
        grid, site = grids[reader], Site.parse(lines[reader]["site"])
        panels = []
        if study.store is not None and study.store.complete:
            panels.append(_scatter_panel(study, study.store, grid, site, f"pca-{i}"))
            panels.append(_along_panel(study, study.store, grid, site, f"along-{i}"))
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
        panels.append(panel(figure, f"scores-{i}", label, caption))
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
    return panel(figure, name, f"Principal components of {study.name} at {site}", caption)


def _along_panel(study: Study, store: ActivationStore, grid: ProbeGrid, site: Site, name: str) -> Panel:
    caption = (
        f"The same rows from left to right along the direction of {reader_of(grid)}, upwards on the first principal "
        "component of what is left. The direction was fitted on all of them, and parts them better than rows it has "
        f"not seen. {_HOLLOW}"
    )
    figure = scatter(store, site, grid=grid, plane="direction", title=f"{study.name}, {site}")
    return panel(figure, name, f"{study.name} at {site} along the direction of the reader", caption)


def _drawn(grid: ProbeGrid) -> str:
    n = len(grid.rows)
    return f"{n:,} rows" if n <= SCATTER_ROWS else f"{SCATTER_ROWS:,} of {n:,} rows, drawn at random,"


def _scans(results: Results, found: Sequence[Study]) -> Section:
    blocks: list[Block] = []
    for i, (name, result) in enumerate(results.scans.items()):
        label = f"Score of every token at every block, {name}"
        shown = panel(scan_map(result.scan), f"scan-{i}", label, _scan_caption(result, found))
        blocks += [Quote(result.text), Panels([shown])]
    return Section("scans", "Reading a text, token by token", blocks)


def _scan_caption(result: ScanResult, found: Sequence[Study]) -> str:
    scan, of, positive = result.scan, result.grid, "the positive class"
    for study in found:
        if (grid := study.grids.get(result.grid)) is not None:
            of = f"{reader_of(grid)} on {study.name} ({study.size})"
            positive = class_name(grid.classes[1])
    limit = saturation(scan)
    beyond = int((np.abs(scan.scores) > limit).sum())
    return (
        f"LAT scan: {len(scan.tokens)} tokens × {len(scan.sites)} sites, read with the directions of {of}. "
        "A score is the signed distance from the decision boundary, in standard deviations of the training "
        f"projections at that site; above 0 (blue) is {positive}. Colours saturate at ±{limit:.2f}; "
        f"{beyond:,} of {scan.scores.size:,} scores lie beyond. The directions were fitted at the position "
        "that the data were read at, and are applied here to every token."
    )


def _steering(results: Results) -> Section:
    blocks: list[Block] = []
    for i, (name, result) in enumerate(results.steering.items()):
        table, contrast = result.table.sort("strength"), result.contrast
        caption = (
            f"{_capital(result.intervention)}. Above: log-odds of {_words(contrast.positive)} over "
            f"{_words(contrast.negative)} after {_many(contrast.prompts, 'prompt')}, mean over the prompts; "
            "bars: ± 1 standard deviation, over the prompts, of the change against strength 0. Below: "
            "KL(unsteered ‖ steered) of the next-token distributions, mean over the tokens of "
            f"{_many(result.neutral, 'neutral text')}."
        )
        label = f"Effect and KL divergence against strength, {name}"
        shown = panel(dose_curves(table, title=name), f"dose-{i}", label, caption)
        blocks.append(Beside(shown, _continuations(result, table)))
    return Section("steering", "Steering: effect against strength", blocks)


def _continuations(result: SteeringResult, table: pl.DataFrame) -> Table:
    rows = [
        (_signed(strength, "+g"), _signed(odds, "+.2f"), f"{kl:.3f}", text.strip())
        for strength, odds, kl, text in table.select("strength", "log_odds", "kl", "text").iter_rows()
    ]
    return Table(
        f"Greedy continuations of “{result.story}” at each strength (0 is the unsteered model), with the "
        f"log-odds in nats and the KL in nats per token. The direction was read at {result.site} (sha256 "
        f"{result.direction[:12]}…).",
        ("Strength#", f"Log{_HYPHEN}odds#", "KL#", "Text"),
        rows,
    )


def _reproduce(results: Results) -> Section:
    rows: list[tuple[Cell, ...]] = []
    for model in _models(results):
        parts = {"weights": model.weights, "tokenizer": model.tokenizer, "chat template": model.template}
        rows += [(what, model.name, Digest(d, whole=True)) for what, d in parts.items() if d]
    for name, store in results.stores.items():
        rows.append(("prompts", name, Digest(store.manifest.prompts, whole=True)))
        rows.append(("store", name, Digest(store.manifest.digest, whole=True)))
    for name in results.grids:
        rows.append(("probe grid", name, Digest(digest_file(probe_path(results.folder, name)), whole=True)))
    for name in results.comparisons:
        path = comparison_path(results.folder, name)
        rows.append(("comparison", name, Digest(digest_file(path), whole=True)))
    for name, steered in results.steering.items():
        rows.append(("direction", f"{name}, {steered.site}", Digest(steered.direction, whole=True)))
    blocks: list[Block] = []
    if results.run and results.run.commands:
        blocks.append(Commands(results.run.commands))
    if rows:
        caption = (
            "Equal digests mean equal content. That of the weights covers a sample of every tensor; that "
            "of a store its manifest, which holds the model, the prompts, the plan and the versions."
        )
        blocks.append(Table(caption, ("What", "Name", "sha256"), rows))
    return Section("reproduce", "How to get this again", blocks)


def _models(results: Results) -> tuple[ModelIdentity, ...]:
    """The different models that the results name."""
    named = [results.run.identity] if results.run and results.run.identity else []
    named += [store.identity for store in results.stores.values()]
    for grid in (*results.grids.values(), *(c.first for c in results.comparisons.values())):
        if "identity" in grid.provenance:
            named.append(ModelIdentity.from_json(grid.provenance["identity"]))
    kept: list[ModelIdentity] = []
    for one in named:
        if all(one.differences(other) for other in kept):
            kept.append(one)
    return tuple(kept)


def _model_card(model: ModelIdentity) -> Card:
    facts: list[tuple[str, Cell]] = [
        ("revision", model.revision or "none named"),
        ("architecture", model.architecture),
        ("size", f"{model.n_layers} blocks, d_model {model.d_model}"),
        ("dtype", model.dtype),
        ("quantization", model.quantization or "none"),
        ("weights", Digest(model.weights)),
        ("tokenizer", Digest(model.tokenizer)),
        ("chat template", Digest(model.template) if model.template else "none"),
    ]
    return Card(f"Model {model.name}", facts)


def _store_card(name: str, store: ActivationStore) -> Card:
    m, index = store.manifest, store.index
    counts = index["label"].drop_nulls().value_counts().sort("label")
    labels = ", ".join(f"{value} ({n:,})" for value, n in counts.iter_rows())
    groups = index["group"].drop_nulls().n_unique()
    written = "" if store.complete else f" ({len(store.committed)} of {m.grid.n_shards} shards written)"
    facts: list[tuple[str, Cell]] = [
        ("rows", f"{store.rows:,} of {index['prompt'].n_unique():,} prompts{written}"),
        ("groups", f"{groups:,}" if groups else "none"),
        ("labels", (labels if len(counts) <= 6 else f"{len(counts):,} different") or "none"),
        ("position", str(m.plan.get("at", "not recorded"))),
        ("sites", store.manifest.sites_text),
        ("stored as", f"{m.dtype}, {store.info().bytes_on_disk / 1e6:,.1f} MB"),
        ("model", m.identity.name),
        ("prompts", Digest(m.prompts)),
        ("store", Digest(m.digest)),
    ]
    return Card(f"Data {name}", facts)


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 120 else f"{int(seconds // 60)} min {int(seconds % 60):02d} s"


def _signed(value: float, form: str) -> str:
    """With a true minus sign, and 0 without any."""
    return f"{value:{form}}".replace("-", "−") if value else "0"


def _capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]


def _words(texts: Iterable[str]) -> str:
    return " / ".join(f"“{t.strip()}”" for t in texts)


def _many(texts: Sequence[str], what: str) -> str:
    return f"{len(texts)} {what}{'' if len(texts) == 1 else 's'}"
