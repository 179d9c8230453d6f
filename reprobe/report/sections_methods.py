"""What the report says of methods with results of their own: causal traces, and dissections.

Enters: the results of a folder. Leaves: a `Section` of each, without blocks where there is nothing of it. Does not know
HTML.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import quote

from reprobe.methods.dissected import Dissection
from reprobe.methods.tracing import TraceGrid
from reprobe.model.sites import ranges
from reprobe.provenance import digest
from reprobe.report import dissection as own
from reprobe.report.blocks import Block, Cell, Heading, Link, Panels, Prose, Section, Source, Table, panel, source
from reprobe.report.folder import Results
from reprobe.report.study import named_model
from reprobe.report.traces import trace_curves, trace_map
from reprobe.report.wording import bounded

#: Facts that have a map, and facts that have a line.
_MAPS, _TOLD = 3, 100


def traces(results: Results) -> Section:
    blocks: list[Block] = []
    for i, (name, grid) in enumerate(results.traces.items()):
        if not grid.traces:
            blocks.append(Prose(f"{name} holds no fact."))
            continue
        settings = grid.settings
        of, n = _of_trace(grid), len(grid.traces)
        how = (
            f"The subject's embeddings are corrupted by noise of {settings.noise:g} standard deviations "
            f"({settings.samples} draw{'s' if settings.samples > 1 else ''}, seed {settings.seed}), and one state is "
            "put back as it was. The indirect effect is by how much that raises the probability of the object"
        )
        caption = (
            f"{how}, here the mean over {n} fact{'s' if n > 1 else ''}, by the role of the token; bands: 95\u00a0% "
            "intervals over groups of facts."
        )
        curves = panel(trace_curves(grid), f"trace-{i}", f"Mean effect by role, {name}", caption, of)
        maps = [
            panel(
                trace_map(grid, fact),
                f"trace-{i}-{fact}",
                f"Effect of every token and block for {trace.fact.prompt!r}",
                f"The indirect effect at every token and block for one fact: {trace.fact.prompt} → {trace.fact.true}. "
                f"p(object) is {trace.clean:.3f} clean and {trace.corrupted:.3f} corrupted. The frame is around the "
                "subject.",
                of,
            )
            for fact, trace in enumerate(grid.traces[:_MAPS])
        ]
        blocks += [Heading(name), Panels([curves, *maps]), _peaks(grid), _facts(grid)]
    return Section("traces", "Which states carry a fact", blocks)


def _of_trace(grid: TraceGrid) -> Source:
    facts = digest([trace.fact.to_json() for trace in grid.traces])
    where = f"{', '.join(grid.settings.kinds)} at blocks {ranges(sorted(grid.layers))}"
    return source(named_model(grid.provenance), {"facts": facts}, at=where)


def _peaks(grid: TraceGrid) -> Table:
    rows = [
        (
            line["kind"],
            line["role"],
            str(line["layer"]),
            bounded(line["effect"], line["effect_low"], line["effect_high"]),
            str(line["n"]),
        )
        for line in grid.peaks
    ]
    totals = {row["measure"]: bounded(row["mean"], row["low"], row["high"]) for row in grid.totals.to_dicts()}
    caption = (
        f"The block with the greatest mean effect, which flatters it. p(object) is on average "
        f"{totals['clean']} clean and {totals['corrupted']} corrupted: a total effect of {totals['total_effect']}."
    )
    return Table(caption, ("Restored", "Token", "Block#", "Indirect effect [95\u00a0%]#", "Facts#"), rows)


def _facts(grid: TraceGrid) -> Table:
    rows = [
        (
            line["prompt"],
            line["subject"],
            line["object"] or "",
            *(f"{line[measure]:.4f}" for measure in ("clean", "corrupted", "total_effect")),
        )
        for line in grid.facts.head(_TOLD).iter_rows(named=True)
    ]
    n = len(grid.traces)
    caption = "The facts that were traced." + ("" if n <= _TOLD else f" The first {_TOLD} of {n:,}.")
    return Table(caption, ("Prompt", "Subject", "Object", "p clean#", "p corrupted#", "Total effect#"), rows)


def dissections(results: Results, base: Path) -> Section:
    """`base` is the folder that the page will lie in, from which the dissection's own page is linked."""
    blocks: list[Block] = []
    for i, (name, found) in enumerate(results.dissections.items()):
        own_page = results.pages.get(found.digest)
        href = "" if own_page is None else quote(os.path.relpath(own_page, base))
        blocks.append(Heading(name))
        blocks += own.overview(found).blocks
        blocks += own.layers(found, name=f"detectors-{i}").blocks
        blocks += _browsed(found, name, href)
    return Section("dissections", "What units detect", blocks)


def _browsed(found: Dissection, name: str, href: str) -> Iterable[Block]:
    rows = [tuple(_elsewhere(cell, href) for cell in row) for row in own.concept_rows(found)]
    table = Table(own.CONCEPTS_ABOUT, own.CONCEPTS_HEAD, rows, source=own.of(found))
    if not href:
        return [table]
    said = "It has a page of its own, where concepts and units are searched and read:"
    return [Prose(said, Link(f"browse {name}", f"{href}#browse")), table]


def _elsewhere(cell: Cell, href: str) -> Cell:
    """A link into the dissection's own page, or its text where there is no such page."""
    if not isinstance(cell, Link):
        return cell
    return Link(cell.text, f"{href}{cell.to}") if href else cell.text
