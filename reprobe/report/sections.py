"""What the report says, section by section.

Enters: the results of a folder. Leaves: one `Section` per kind of result that is there; a kind that is missing is no
section. Every caption says what is shown, how many rows in how many groups, and which interval. Does not know HTML.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import polars as pl

from reprobe.model.identity import ModelIdentity
from reprobe.model.sites import Site
from reprobe.probing.intervals import LEVEL, RESAMPLES
from reprobe.probing.probe_grid import ProbeGrid, Selected
from reprobe.provenance import digest_file
from reprobe.report.blocks import (
    Block,
    Card,
    Cards,
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
from reprobe.report.figures import (
    SCATTER_ROWS,
    dose_curves,
    head_map,
    layer_curves,
    projections,
    reader_of,
    saturation,
    scan_map,
    scatter,
)
from reprobe.report.results import Results, ScanResult, SteeringResult, probe_path
from reprobe.store.reader import ActivationStore

_INTERVAL = f"{LEVEL:.0%} percentile intervals of a cluster bootstrap over groups ({RESAMPLES:,} resamples)".replace(
    "%", " %", 1
)


@dataclass(frozen=True, eq=False)
class Study:
    """The grids that were made from the same rows with the same labels, by name, and their store if it is there."""

    name: str
    grids: dict[str, ProbeGrid]
    store: ActivationStore | None

    @cached_property
    def first(self) -> ProbeGrid:
        return next(iter(self.grids.values()))

    @cached_property
    def readers(self) -> dict[str, ProbeGrid]:
        """Grids by reader; by their own name where two are of one reader."""
        names = [reader_of(g) for g in self.grids.values()]
        return {
            reader if names.count(reader) == 1 else f"{reader} ({name})": grid
            for reader, (name, grid) in zip(names, self.grids.items(), strict=True)
        }

    @property
    def rows(self) -> str:
        """n, groups, position and folds, in words."""
        line = self.first.table.row(0, named=True)
        plan = self.first.provenance.get("plan", {})
        at = f", at {plan['at']!r}" if "at" in plan else ""
        folds = int(self.first.fold.max()) + 1
        return f"{self.name}: {line['n']:,} rows in {line['n_groups']:,} groups{at}; {folds} folds that keep groups whole"

    @property
    def notes(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(g.note for g in self.grids.values() if g.note))


def sections(results: Results) -> tuple[Section, ...]:
    """All sections for which there are results, in the order of the page."""
    found = studies(results)
    made = (
        _overview(results),
        *(make(found) for make in (_layers, _heads, _geometry)),
        _scans(results, found),
        _steering(results),
        _reproduce(results),
    )
    return tuple(s for s in made if s.blocks)


def studies(results: Results) -> tuple[Study, ...]:
    """The grids, put together by the rows and labels they were made from."""
    stores = {store.manifest.digest: (name, store) for name, store in results.stores.items()}
    together: dict[tuple[object, ...], dict[str, ProbeGrid]] = {}
    for name, grid in results.grids.items():
        key = tuple(grid.provenance.get(k) for k in ("store", "rows", "label"))
        together.setdefault(key if key[0] else (name,), {})[name] = grid
    out = []
    for (digest, *rest), grids in together.items():
        known = stores.get(str(digest))
        name = known[0] if known else _common(list(grids))
        label = rest[-1] if rest else "label"
        out.append(Study(name if label == "label" else f"{name} ({label})", grids, known[1] if known else None))
    return tuple(sorted(out, key=lambda s: s.name))


# Sections


def _overview(results: Results) -> Section:
    cards = [_model_card(m) for m in _models(results)] + [_store_card(n, s) for n, s in results.stores.items()]
    blocks: list[Block] = []
    if len(models := _models(results)) > 1:
        blocks.append(Prose(f"These results are of {len(models)} different models; the sections say which is which."))
    if results.run and results.run.versions:
        cards.append(Card("Versions", sorted(results.run.versions.items())))
    if cards:
        blocks.append(Cards(cards))
    if results.run and results.run.steps:
        steps = results.run.steps
        blocks.append(
            Table(
                "What was done, in this order, and how long it took.",
                ("Step", "Time#", "What"),
                [(s.name, _duration(s.seconds), s.detail) for s in steps],
                total=("total", _duration(sum(s.seconds for s in steps)), ""),
            )
        )
    return Section("overview", "What was run on what", blocks)


def _layers(found: Sequence[Study]) -> Section:
    panels: list[Panel] = []
    rows = []
    for i, study in enumerate(found):
        grids = {name: whole for name, grid in study.readers.items() if (whole := _whole(grid)) is not None}
        if not grids:
            continue
        chance = float(study.first.table["chance"][0])
        caption = (
            f"Held-out accuracy at every block on {study.rows}. Bands: {_INTERVAL}. Dashed: always answering with the "
            f"larger class ({chance:.3f}). {_sentences(study.notes)}"
        )
        figure = layer_curves(grids, title=study.name)
        panels.append(panel(figure, f"layers-{i}", f"Accuracy over blocks on {study.name}", caption.strip()))
        for name, grid in grids.items():
            best = _best(grid)
            rows.append(
                (study.name, name, best["site"], _interval(best), f"{best['auroc']:.3f}", _chosen(grid.selected))
            )
    if not panels:
        return Section("layers", "Accuracy over layers", ())
    table = Table(
        "The best site of each curve. Its accuracy is the highest of all that were tried, which flatters it; in the last "
        "column, the site is chosen for each fold by its accuracy on the other folds, which does not.",
        ("Data", "Reader", "Best site", "Accuracy there [95 %]#", "AUROC#", "Accuracy, site chosen on other folds [95 %]#"),
        rows,
    )
    return Section("layers", "Accuracy over layers", (Panels(panels), table))


def _heads(found: Sequence[Study]) -> Section:
    panels, rows = [], []
    for i, study in enumerate(found):
        grids = {name: heads for name, grid in study.readers.items() if (heads := _only_heads(grid)) is not None}
        if not grids:
            continue
        values = np.concatenate([g.table["accuracy"].to_numpy() for g in grids.values()])
        limits = (float(values.min()), float(values.max()))
        for j, (name, grid) in enumerate(grids.items()):
            table = grid.table
            above = int((table["accuracy_low"] > table["chance"]).sum())
            caption = (
                f"Held-out accuracy of {name} at each attention head on {study.rows}. In {above} of {len(table)} heads the "
                f"{LEVEL:.0%} interval lies above chance ({table['chance'][0]:.3f}); × marks the others, the frame the "
                "highest accuracy. Colours are the same in all maps of this data set."
            ).replace("95%", "95 %")
            label = f"Accuracy of every head, {name} on {study.name}"
            figure = head_map(grid, limits=limits, title=f"{study.name}, {name}")
            panels.append(panel(figure, f"heads-{i}-{j}", label, caption))
            best = _best(grid)
            by_chance = len(table) * (1 - LEVEL) / 2
            rows.append(
                (study.name, name, f"{above} of {len(table)}", f"{by_chance:.0f}", best["site"], _interval(best),
                 _chosen(grid.selected))
            )  # fmt: skip
    if not panels:
        return Section("heads", "Accuracy of single heads", ())
    caution = Prose(
        "The highest accuracy among many heads is biased upward: the head was picked because it came out highest on these "
        "very rows. The last column of the table is free of that: for each fold, the head is chosen by its accuracy on the "
        "other folds, and judged on this one."
    )
    head = (
        "Data", "Reader", "Heads above chance#", "Expected if none were#", "Highest head", "Accuracy there [95 %]#",
        "Accuracy, head chosen on other folds [95 %]#",
    )  # fmt: skip
    table = Table("Heads whose interval lies above chance, and the highest of them.", head, rows)
    return Section("heads", "Accuracy of single heads", (caution, Panels(panels), table))


def _geometry(found: Sequence[Study]) -> Section:
    blocks: list[Block] = []
    for i, study in enumerate(found):
        grids = {name: whole for name, grid in study.readers.items() if (whole := _whole(grid)) is not None}
        if not grids:
            continue
        reader = max(grids, key=lambda name: _best(grids[name])["accuracy"])
        grid = grids[reader]
        best = _best(grid)
        site = Site.parse(best["site"])
        panels = []
        if study.store is not None and study.store.complete:
            n = len(grid.rows)
            some = "" if n <= SCATTER_ROWS else f" ({SCATTER_ROWS:,} of {n:,} rows, evenly spaced)"
            caption = (
                f"{study.name} at {site}, the best site of {reader}: {min(n, SCATTER_ROWS):,} rows{some} on their first two "
                "principal components, fitted on these rows (centred, not scaled). The arrow is the reader's direction "
                "as it falls in this plane, drawn at a fixed length; the cosine says how much of it lies in the plane."
            )
            figure = scatter(study.store, site, grid=grid, title=f"{study.name}, {site}")
            panels.append(panel(figure, f"pca-{i}", f"Principal components of {study.name} at {site}", caption))
        elif study.store is not None:
            blocks.append(
                Prose(f"The store of {study.name} is not complete, so its rows are not drawn: finish it with --resume.")
            )
        caption = (
            f"Scores of the same site by {reader}, each row scored by the fold that held it out ({study.rows}). Dotted: the "
            f"decision boundary. Accuracy {_interval(best)}."
        )
        figure = projections(grid, site, title=f"{study.name}, {reader}")
        panels.append(panel(figure, f"scores-{i}", f"Held-out scores of {study.name} at {site}", caption))
        blocks.append(Panels(panels))
    return Section("geometry", "The best layer, row by row", blocks)


def _scans(results: Results, found: Sequence[Study]) -> Section:
    blocks: list[Block] = []
    for i, (name, result) in enumerate(results.scans.items()):
        figure = scan_map(result.scan)
        blocks.append(Quote(result.text))
        blocks.append(
            Panels([panel(figure, f"scan-{i}", f"Score of every token at every block, {name}", _scan_caption(result, found))])
        )
    return Section("scans", "Reading a text, token by token", blocks)


def _scan_caption(result: ScanResult, found: Sequence[Study]) -> str:
    scan, of = result.scan, f"the directions of {result.grid}"
    positive = "the positive class"
    for study in found:
        if (grid := study.grids.get(result.grid)) is not None:
            line = grid.table.row(0, named=True)
            of = f"the directions of {reader_of(grid)} on {study.name} ({line['n']:,} rows in {line['n_groups']:,} groups)"
            positive = f"the class {grid.classes[1]!r}"
    limit = saturation(scan)
    beyond = int((np.abs(scan.scores) > limit).sum())
    return (
        f"LAT scan: {len(scan.tokens)} tokens × {len(scan.sites)} sites, read with {of}. A score is the signed distance "
        f"from the decision boundary, in standard deviations of the training projections at that site; above 0 (blue) is "
        f"{positive}. Colours saturate at ±{limit:.2f}; {beyond} of {scan.scores.size:,} scores lie beyond. The directions "
        "were fitted at the position that the data were read at, and are applied here to every token."
    )


def _steering(results: Results) -> Section:
    blocks: list[Block] = []
    for i, (name, result) in enumerate(results.steering.items()):
        table, contrast = result.table.sort("strength"), result.contrast
        caption = (
            f"{result.intervention}. Above: log-odds of {_words(contrast.positive)} over {_words(contrast.negative)} after "
            f"{_many(contrast.prompts, 'prompt')}, mean over the prompts; bars: ± 1 standard deviation, over the prompts, of "
            "the change against strength 0. Below: KL(unsteered ‖ steered) of the next-token distributions, mean over the "
            f"tokens of {_many(result.neutral, 'neutral text')}."
        )
        label = f"Effect and KL divergence against strength, {name}"
        blocks += [
            Panels([panel(dose_curves(table, title=name), f"dose-{i}", label, caption)]),
            _texts(result, table),
        ]
    return Section("steering", "Steering: effect against strength", blocks)


def _texts(result: SteeringResult, table: pl.DataFrame) -> Table:
    rows = [
        (f"{row['strength']:+g}" if row["strength"] else "0 (unsteered)", f"{row['log_odds']:+.2f}", f"{row['kl']:.3f}", row["text"].strip())
        for row in table.iter_rows(named=True)
    ]  # fmt: skip
    return Table(
        f"Greedy continuations of “{result.story}” at each strength, with the log-odds (nats) and the KL from the unsteered "
        f"model (nats per token). Direction at {result.site}, sha256 {result.direction[:12]}….",
        ("Strength#", "Log-odds#", "KL#", "Text"),
        rows,
        stack=True,
    )


def _reproduce(results: Results) -> Section:
    rows: list[tuple[str, str, Digest]] = []
    for model in _models(results):
        parts = {"weights": model.weights, "tokenizer": model.tokenizer, "chat template": model.template}
        rows += [(what, model.name, Digest(d, True)) for what, d in parts.items() if d]
    for name, store in results.stores.items():
        rows.append(("prompts", name, Digest(store.manifest.prompts, True)))
        rows.append(("store", name, Digest(store.manifest.digest, True)))
    rows += [("probe grid", n, Digest(digest_file(probe_path(results.folder, n)), True)) for n in results.grids]
    rows += [("direction", f"{n}, {s.site}", Digest(s.direction, True)) for n, s in results.steering.items()]
    blocks: list[Block] = []
    if results.run and results.run.commands:
        blocks.append(Commands(results.run.commands))
    if rows:
        blocks.append(
            Table(
                "Equal digests mean equal bytes; the digest of weights covers a sample of every tensor, and that of a store "
                "its manifest, which holds the model, the prompts, the plan and the versions.",
                ("What", "Name", "sha256"),
                rows,
                stack=True,
            )
        )
    return Section("reproduce", "How to get this again", blocks)


# Parts of sections


def _models(results: Results) -> tuple[ModelIdentity, ...]:
    """The different models that the results name."""
    named = [results.run.identity] if results.run and results.run.identity else []
    named += [s.identity for s in results.stores.values()]
    for grid in results.grids.values():
        if "identity" in grid.provenance:
            named.append(ModelIdentity.from_json(grid.provenance["identity"]))
    kept: list[ModelIdentity] = []
    for one in named:
        if all(one.differences(other) for other in kept):
            kept.append(one)
    return tuple(kept)


def _model_card(model: ModelIdentity) -> Card:
    facts: list[tuple[str, str | Digest]] = [
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
    labels = ", ".join(f"{v} ({n:,})" for v, n in counts.iter_rows())
    groups = index["group"].drop_nulls().n_unique()
    written = "" if store.complete else f" ({len(store.committed)} of {m.grid.n_shards} shards written)"
    facts: list[tuple[str, str | Digest]] = [
        ("rows", f"{store.rows:,} of {index['prompt'].n_unique():,} prompts{written}"),
        ("groups", f"{groups:,}" if groups else "none"),
        ("labels", (labels if len(counts) <= 6 else f"{len(counts):,} different") or "none"),
        ("position", str(m.plan.get("at", "not recorded"))),
        ("sites", _ranges(m.sites[0].site.part if len(m.sites) == 1 else None, store)),
        ("stored as", f"{m.dtype}, {store.info().bytes_on_disk / 1e6:,.1f} MB"),
        ("model", m.identity.name),
        ("prompts", Digest(m.prompts)),
        ("store", Digest(m.digest)),
    ]
    return Card(f"Data {name}", facts)


def _ranges(only: str | None, store: ActivationStore) -> str:
    """Parts with their blocks: resid.post@0–29, attn.heads@0–29 (9 × 64)."""
    out = []
    for part in dict.fromkeys(s.part for s in store.sites):
        stored = [s for s in store.manifest.sites if s.site.part == part]
        layers = sorted(s.site.layer for s in stored if s.site.layer is not None)
        units = f" ({stored[0].units} × {stored[0].unit_width})" if stored[0].unit_width else ""
        out.append((f"{part}@{_runs(layers)}" if layers else part) + units)
    return ", ".join(out)


def _runs(numbers: Sequence[int]) -> str:
    """0, 1, 2, 5 as 0–2, 5."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}–{b}" for a, b in runs)


def _restricted(grid: ProbeGrid, keep: Callable[[Site], bool]) -> ProbeGrid | None:
    """The grid of some of its sites, so that choices are among those; None if there are none."""
    mask = np.array([keep(s) for s in grid.sites], dtype=bool)
    if not mask.any():
        return None
    return dataclasses.replace(
        grid,
        table=grid.table.filter(pl.Series(mask)),
        directions={s: d for s, d in grid.directions.items() if keep(s)},
        oof=grid.oof[:, mask],
    )


def _whole(grid: ProbeGrid) -> ProbeGrid | None:
    return _restricted(grid, lambda s: s.unit is None)


def _only_heads(grid: ProbeGrid) -> ProbeGrid | None:
    return _restricted(grid, lambda s: s.part == "attn.heads" and s.unit is not None)


def _best(grid: ProbeGrid) -> dict[str, object]:
    """The table's line of `grid.best()`."""
    site = str(grid.best().site)
    return grid.table.row(by_predicate=pl.col("site") == site, named=True)


def _interval(line: dict[str, object]) -> str:
    return f"{line['accuracy']:.3f} [{line['accuracy_low']:.3f}, {line['accuracy_high']:.3f}]"


def _chosen(selected: Selected) -> str:
    return f"{selected.accuracy:.3f} [{selected.accuracy_low:.3f}, {selected.accuracy_high:.3f}]"


def _common(names: Sequence[str]) -> str:
    """What names of grids have in common: cities-pca and cities-logistic are of cities."""
    words = [re.split(r"(?=[-_.])", n) for n in names]
    shared = [w[0] for w in zip(*words, strict=False) if len(set(w)) == 1] if len(names) > 1 else words[0][:-1]
    return "".join(shared) or names[0]


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 120 else f"{int(seconds // 60)} min {seconds % 60:02.0f} s"


def _words(texts: Iterable[str]) -> str:
    return " / ".join(f"“{t.strip()}”" for t in texts)


def _many(texts: Sequence[str], what: str) -> str:
    return f"{len(texts)} {what}{'' if len(texts) == 1 else 's'}"


def _sentences(notes: Iterator[str] | Sequence[str]) -> str:
    return " ".join(notes)
