"""What the report says of changed models: steering and its price, multiple choice, facts written into weights.

Enters: the results of a folder. Leaves: a `Section` of each, without blocks where there is nothing of it. Does not know
HTML.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

import polars as pl

from reprobe.control import EditEffect, WeightEdit
from reprobe.control.edits import KIND
from reprobe.prompts.fact import Fact
from reprobe.provenance import digest
from reprobe.report.blocks import (
    Beside,
    Block,
    Cell,
    Digest,
    Heading,
    Panels,
    Prose,
    Section,
    Source,
    Table,
    panel,
    source,
)
from reprobe.report.curves import dose_curves
from reprobe.report.folder import Results
from reprobe.report.measured import CHOICES, COMPARED, DOSES, EDITING, SIDE_EFFECTS, TUNING, Measured
from reprobe.report.results import SteeringResult, effect_of
from reprobe.report.shifts import Shift, shift_lines
from reprobe.report.wording import HYPHEN, bounded, capital, many, signed, words

#: Lines up to which facts are drawn and told one by one.
_FACTS, _TOLD = 24, 200
#: Texts shown of those that were written with and without steering.
_WRITTEN = 6


def steering(results: Results) -> Section:
    blocks: list[Block] = []
    for i, (name, result) in enumerate(results.steering.items()):
        table, contrast = result.table.sort("strength"), result.contrast
        caption = (
            f"{capital(result.intervention)}. Above: log-odds of {words(contrast.positive)} over "
            f"{words(contrast.negative)} after {many(contrast.prompts, 'prompt')}, mean over the prompts; "
            "bars: ± 1 standard deviation, over the prompts, of the change against strength 0. Below: "
            "KL(unsteered ‖ steered) of the next-token distributions, mean over the tokens of "
            f"{many(result.neutral, 'neutral text')}."
        )
        label = f"Effect and KL divergence against strength, {name}"
        shown = panel(dose_curves(table, title=name), f"dose-{i}", label, caption, _of_steering(result, results))
        blocks.append(Beside(shown, _continuations(result, table)))
    for i, (name, measured) in enumerate(results.of(DOSES).items()):
        effect = effect_of(measured.table)
        caption = (
            f"{name}: above {effect.replace('_', ' ')}, mean over the prompts, with ± 1 standard deviation of the "
            "change against the unsteered model; below KL(unsteered ‖ steered) on neutral text."
        )
        figure, label = dose_curves(measured.table, title=name), f"Effect and KL divergence against strength, {name}"
        shown = panel(figure, f"doses-{i}", label, caption, _of_table(measured))
        blocks.append(Beside(shown, _doses(measured.table.sort("strength"), effect)))
    return Section("steering", "Steering: effect against strength", blocks)


def _of_steering(result: SteeringResult, results: Results) -> Source:
    identity = result.identity
    if identity is None:  # from before it was kept: that of the direction, if that is at hand
        found = (d.identity for d in results.directions.values() if d.digest == result.direction)
        identity = next(found, None)
    asked = digest([dataclasses.asdict(result.contrast), list(result.neutral), result.story])
    return source(identity, {"prompts and texts": asked, "direction": result.direction}, at=str(result.site))


def _continuations(result: SteeringResult, table: pl.DataFrame) -> Table:
    rows = [
        (signed(strength, "+g"), signed(odds, "+.2f"), f"{kl:.3f}", text.strip())
        for strength, odds, kl, text in table.select("strength", "log_odds", "kl", "text").iter_rows()
    ]
    return Table(
        f"Greedy continuations of “{result.story}” at each strength (0 is the unsteered model), with the "
        f"log-odds in nats and the KL in nats per token. The direction was read at {result.site} (sha256 "
        f"{result.direction[:12]}…).",
        ("Strength#", f"Log{HYPHEN}odds#", "KL#", "Text"),
        rows,
    )


def _doses(table: pl.DataFrame, effect: str) -> Table:
    text = "text" in table.columns
    rows = [
        (
            signed(line["strength"], "+g"),
            bounded(line[effect], line.get(f"{effect}_low"), line.get(f"{effect}_high")),
            bounded(line["change"], line.get("change_low"), line.get("change_high"), "+.3f"),
            bounded(line["kl"], line.get("kl_low"), line.get("kl_high")),
            *([(line["text"] or "").strip()] if text else []),
        )
        for line in table.iter_rows(named=True)
    ]
    head = ("Strength#", f"{effect.replace('_', ' ')} [95\u00a0%]#", "Change [95\u00a0%]#", "KL [95\u00a0%]#")
    return Table("The same in numbers; intervals are over the prompts.", (*head, *(["Text"] if text else [])), rows)


def costs(results: Results) -> Section:
    """What steering does besides, and the strength at which that has a given price."""
    blocks: list[Block] = []
    for name, measured in results.of(SIDE_EFFECTS).items():
        rows = [
            (
                line["measure"],
                line["unit"] or "",
                f"{line['unsteered']:.3f}",
                f"{line['steered']:.3f}",
                bounded(line["change"], line["low"], line["high"], "+.3f"),
                f"{line['n']:,} {line['over']}",
            )
            for line in measured.table.iter_rows(named=True)
        ]
        caption = (
            f"{name}: what steering does that was not asked for. Intervals are of the paired change, over texts and "
            "groups of questions. KL, cross-entropy and perplexity are of ordinary text; distinct-n and n-gram "
            "entropy of greedy continuations."
        )
        head = ("Measure", "Unit", "Unsteered#", "Steered#", "Change [95\u00a0%]#", "Of")
        blocks += [Table(caption, head, rows, source=_of_table(measured)), *_generations(measured)]
    for name, measured in results.of(TUNING).items():
        found, target = (measured.about.get(key) for key in ("strength", "target_kl"))
        known = found is not None and target is not None
        said = f" Found: strength {found:+g} for a target of {target:g} nats per token." if known else ""
        tried = [
            (f"{i}", signed(strength, "+.4g"), f"{kl:.4f}")
            for i, (strength, kl) in enumerate(measured.table.select("strength", "kl").iter_rows(), 1)
        ]
        caption = f"{name}: strengths tried in the search of one that costs a given KL on ordinary text.{said}"
        blocks.append(Table(caption, ("Step#", "Strength#", "KL, nats per token#"), tried, source=_of_table(measured)))
    return Section("costs", "What steering costs", blocks)


def _of_table(measured: Measured) -> Source:
    return source(measured.identity, measured.data, by=measured.interventions)


def _generations(measured: Measured) -> list[Block]:
    given = measured.about.get("generations")
    texts = [line for line in given if isinstance(line, Mapping)] if isinstance(given, Sequence) else []
    if not texts:
        return []
    rows = [tuple(str(line.get(key, "")).strip() for key in ("prompt", "unsteered", "steered")) for line in texts]
    caption = f"What was written after the first {min(_WRITTEN, len(rows))} of {len(rows)} prompts."
    return [Table(caption, ("Prompt", "Unsteered", "Steered"), rows[:_WRITTEN])]


def choices(results: Results) -> Section:
    blocks: list[Block] = []
    tables = results.of(CHOICES) | results.of(COMPARED)
    for i, (name, measured) in enumerate(tables.items()):
        found = measured.choices
        n = f"{found['n'][0]:,} questions"
        of = _of_table(measured)
        if "mean" in found.columns:
            means = [(_metric(line), bounded(line["mean"], line["low"], line["high"])) for line in found.to_dicts()]
            caption = f"{name}: {n}. Intervals are over groups of questions."
            blocks.append(Table(caption, ("Metric", "Mean [95\u00a0%]#"), means, source=of))
            continue
        shifts = [
            Shift(_metric(line), line["unsteered"], line["steered"], *_beside(line, line["unsteered"]))
            for line in found.to_dicts()
        ]
        figure = shift_lines(
            shifts, x="mean over the questions", states=("unsteered", "steered"), limits=(0, 1), title=name
        )
        caption = (
            f"{name}: {n}, without and with what was done. Bands: 95\u00a0% intervals of the paired change over groups "
            "of questions, laid beside the unsteered value."
        )
        rows = [
            (
                _metric(line),
                f"{line['unsteered']:.3f}",
                f"{line['steered']:.3f}",
                bounded(line["change"], line["low"], line["high"], "+.3f"),
            )
            for line in found.to_dicts()
        ]
        head = ("Metric", "Unsteered#", "Steered#", "Change [95\u00a0%]#")
        shown = panel(figure, f"choices-{i}", f"Multiple choice without and with steering, {name}", caption, of)
        blocks.append(Beside(shown, Table("The same in numbers.", head, rows)))
    if blocks:
        blocks.append(
            Prose(
                "MC1: the best answer is likelier than every false one. MC2: the share of probability on true answers. "
                "MC3: the share of true answers that are likelier than every false one."
            )
        )
    return Section("choices", "Multiple choice", blocks)


def _metric(line: Mapping[str, Any]) -> str:
    return str(line["metric"]).upper()


def _beside(line: Mapping[str, Any], value: float) -> tuple[float | None, float | None]:
    """The interval of a change, laid beside the value that changed."""
    low, high = line["low"], line["high"]
    return (None, None) if low is None or high is None else (value + low, value + high)


@dataclasses.dataclass(frozen=True)
class _Together:
    """Edits that write the same facts: MEMIT's, one for each block."""

    name: str
    edits: tuple[tuple[str, WeightEdit], ...]

    @property
    def first(self) -> WeightEdit:
        return self.edits[0][1]

    @property
    def facts(self) -> list[tuple[Fact, EditEffect | None]]:
        effects = self.first.effects or [None] * len(self.first.facts)
        return list(zip(self.first.facts, effects, strict=True))


def edits(results: Results) -> Section:
    blocks: list[Block] = []
    for i, group in enumerate(_together(results)):
        method = str(group.first.provenance.get("method", "an unknown method"))
        blocks.append(Heading(f"{group.name} ({method.upper()})"))
        drawn = [(fact, effect) for fact, effect in group.facts[:_FACTS] if effect is not None]
        if drawn:
            n = len(group.facts)
            which = f"{n} fact{'s' if n > 1 else ''}" if n == len(drawn) else f"The first {len(drawn)} of {n} facts"
            caption = (
                f"{which} written by {method.upper()}: probability of the new object after the fact's prompt, "
                "exp(mean log-probability of its tokens), without and with the edit. How an edit does on other prompts "
                "than its own is measured by reprobe edit eval."
            )
            shifts = [Shift(f"{f.subject} → {f.new}", e.before, e.after) for f, e in drawn]
            figure = shift_lines(shifts, x="probability of the new object", states=("before", "after"), limits=(0, 1))
            label = f"Probability of each new object before and after, {group.name}"
            blocks.append(Panels([panel(figure, f"edits-{i}", label, caption, _of_edits(group))]))
        blocks += [*([_facts(group)] if group.facts else []), _matrices(group)]
    for name, measured in results.of(EDITING).items():
        blocks += [Heading(f"Scores: {name}"), *_scores(name, measured)]
    return Section("edits", "Facts written into weights", blocks)


def _together(results: Results) -> list[_Together]:
    groups: dict[str, list[tuple[str, WeightEdit]]] = {}
    folders = {file.name: PurePosixPath(file.path).parent.as_posix() for file in results.files if file.kind == KIND}
    for name, found in results.edits.items():
        for i, edit in enumerate(found):
            facts = [f.to_json() for f in edit.facts], [(e.before, e.after) for e in edit.effects]
            key = digest([edit.base.weights, *facts]) if edit.facts else edit.digest
            groups.setdefault(key, []).append((name if len(found) == 1 else f"{name} {i + 1}", edit))
    out = []
    for members in groups.values():
        name = members[0][0]
        folder = folders.get(name, ".")
        out.append(_Together(name if len(members) == 1 or folder == "." else folder, tuple(members)))
    return out


def _of_edits(group: _Together) -> Source:
    edit, layers = group.first, [e.provenance.get("layer") for _, e in group.edits]
    where = ", ".join(f"block {layer}" for layer in layers if layer is not None)
    facts = digest([fact.to_json() for fact in edit.facts])
    return source(edit.base, {"facts": facts, "edit": edit.digest}, at=where)


def _facts(group: _Together) -> Table:
    rows = [
        (
            fact.prompt,
            fact.subject,
            fact.true or "",
            fact.new or "",
            "" if effect is None else f"{effect.before:.4f}",
            "" if effect is None else f"{effect.after:.4f}",
            "not measured" if effect is None else "yes" if effect.found else "no",
        )
        for fact, effect in group.facts[:_TOLD]
    ]
    n = len(group.facts)
    shown = "" if n <= _TOLD else f" The first {_TOLD} of {n:,}."
    head = ("Prompt", "Subject", "Was", "New object", "p before#", "p after#", "Took effect")
    return Table(f"The facts, and what was measured of each.{shown}", head, rows)


def _matrices(group: _Together) -> Table:
    rows: list[tuple[Cell, ...]] = [
        (name, edit.parameter, str(edit.rank), f"{edit.norm:.4g}", str(len(edit.after)), Digest(edit.digest))
        for name, edit in group.edits
    ]
    head = ("Edit", "Matrix", "Rank#", "Norm of the change#", "Made after edits#", "Digest")
    return Table("The changed matrices. Norm: Frobenius.", head, rows, source=_of_edits(group))


def _scores(name: str, measured: Measured) -> list[Block]:
    found = measured.editing
    kinds = list(found.after.shares)
    rows = [
        (
            line["measure"],
            bounded(line["before"], line["before_low"], line["before_high"]),
            bounded(line["after"], line["after_low"], line["after_high"]),
        )
        for line in found.table.iter_rows(named=True)
    ]
    shifts = [
        Shift(kind, found.before.shares[kind].mean, after.mean, after.low, after.high)
        for kind, after in found.after.shares.items()
        if kind in found.before.shares
    ]
    of = source(measured.identity, {"prompts": digest(measured.table["prompt"].to_list())})
    caption = (
        f"{name}: {found.after.facts:,} facts. Shares of prompts that are as they shall be: the new object likelier "
        f"than the true one ({', '.join(kinds)}; neighbourhood: the other way round). Bands: 95\u00a0% intervals over "
        "subjects."
    )
    figure = shift_lines(shifts, x="share of prompts", states=("before", "after"), limits=(0, 1), title=name)
    slug = f"scores-{digest(name)[:8]}"
    shown = panel(figure, slug, f"Scores of edits before and after, {name}", caption, of)
    head = ("Measure", "Before [95\u00a0%]#", "After [95\u00a0%]#")
    return [Beside(shown, Table("The same in numbers; the score is the harmonic mean of the shares.", head, rows))]
