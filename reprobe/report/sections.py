"""What the report says: the order of its sections, what was run on what, how to get it again, what was not read.

Enters: the results of a folder. Leaves: one `Section` per kind of result that is there; a kind that is missing is no
section. What is said of each kind stands in sections_probing, sections_control and sections_methods. Does not know
HTML.
"""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

from reprobe.model.identity import ModelIdentity
from reprobe.report import sections_control, sections_methods, sections_probing
from reprobe.report.blocks import Block, Card, Cards, Cell, Commands, Digest, Link, Prose, Quote, Section, Table
from reprobe.report.folder import Results
from reprobe.report.study import named_model, studies
from reprobe.store.reader import ActivationStore

#: Names of files without results that are told one by one.
_TOLD = 30


def sections(results: Results, base: Path, say: Callable[[str], None]) -> tuple[Section, ...]:
    """All sections for which there are results, in the order of the page, which will lie in the folder `base`; `say` is
    told of what turns out to be damaged."""
    found = studies(results)
    made = (
        _overview(results),
        sections_probing.layers(found),
        sections_probing.readers(found),
        sections_probing.heads(found),
        sections_probing.geometry(found, say),
        sections_probing.directions(found),
        sections_probing.transfers(results),
        sections_probing.scans(results, found),
        sections_control.steering(results),
        sections_control.costs(results),
        sections_control.choices(results),
        sections_methods.traces(results),
        sections_control.edits(results),
        sections_methods.dissections(results, base),
        _reproduce(results),
        _left_out(results),
    )
    return tuple(s for s in made if s.blocks)


def _overview(results: Results) -> Section:
    models = _models(results)
    blocks: list[Block] = []
    if results.damaged:
        n = len(results.damaged)
        said = "1 file is damaged and its content" if n == 1 else f"{n} files are damaged and their content"
        blocks.append(Prose(f"Caution: {said} is not on this page:", Link("what is wrong", "#left-out")))
    if results.files:
        counts = Counter(file.kind for file in results.files)
        blocks.append(Prose(f"Joined here: {', '.join(_counted(kind, n) for kind, n in counts.items())}."))
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


def _reproduce(results: Results) -> Section:
    rows: list[tuple[Cell, ...]] = []
    for model in _models(results):
        parts = {"weights": model.weights, "tokenizer": model.tokenizer, "chat template": model.template}
        rows += [(what, model.name, Digest(d, whole=True)) for what, d in parts.items() if d]
    for name, store in results.stores.items():
        rows.append(("prompts", name, Digest(store.manifest.prompts, whole=True)))
        rows.append(("store", name, Digest(store.manifest.digest, whole=True)))
    rows += [(f.kind, f.name, Digest(f.digest, whole=True)) for f in results.files if f.digest and f.kind != "store"]
    rows += [
        (what, name, Digest(d, whole=True)) for name, found in results.records.items() for what, d in found.items()
    ]
    for name, steered in results.steering.items():
        rows.append(("direction", f"{name}, {steered.site}", Digest(steered.direction, whole=True)))
    blocks: list[Block] = []
    if results.run and results.run.commands:
        blocks.append(Commands(results.run.commands))
    for name, text in results.recipes.items():
        blocks += [Prose(f"{name}.toml:"), Quote(text.strip())]
    if rows:
        caption = (
            "Equal digests mean equal content. That of the weights covers a sample of every tensor; that "
            "of a store its manifest, which holds the model, the prompts, the plan and the versions; that of a file "
            "its bytes."
        )
        blocks.append(Table(caption, ("What", "Name", "sha256"), rows))
    return Section("reproduce", "How to get this again", blocks)


def _left_out(results: Results) -> Section:
    blocks: list[Block] = []
    if results.damaged:
        rows = [(damaged.path, damaged.why) for damaged in results.damaged]
        blocks.append(
            Table("Damaged: files that are results, or should be, and cannot be read.", ("File", "Why"), rows)
        )
    if results.unknown:
        n, told = len(results.unknown), ", ".join(results.unknown[:_TOLD])
        more = f", and {n - _TOLD:,} more" if n > _TOLD else ""
        blocks.append(Prose(f"Not shown, because they are no results that a report knows: {told}{more}."))
    return Section("left-out", "What is not on this page", blocks)


def _models(results: Results) -> tuple[ModelIdentity, ...]:
    """The different models that the results name."""
    named = [results.run.identity] if results.run and results.run.identity else []
    named += [store.identity for store in results.stores.values()]
    named += [edit.base for found in results.edits.values() for edit in found]
    named += [found.identity for found in results.dissections.values()]
    grids = (*results.grids.values(), *(c.first for c in results.comparisons.values()))
    told = [named_model(grid.provenance) for grid in grids]
    told += [named_model(trace.provenance) for trace in results.traces.values()]
    told += [scan.identity for scan in results.scans.values()]
    told += [steered.identity for steered in results.steering.values()]
    told += [measured.identity for measured in results.measured.values()]
    named += [model for model in told if model is not None]
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


def _counted(kind: str, n: int) -> str:
    return f"{n} {kind}" + ("" if n == 1 else "es" if kind.endswith("ch") else "s")


def _duration(seconds: float) -> str:
    return f"{seconds:,.1f} s"
