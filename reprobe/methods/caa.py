"""Contrastive activation addition (Rimsky et al. 2023, arXiv:2312.06681): the difference that an answer's letter makes.

Enters: questions with choices, each with the letter of either answer; a store of what the model holds at that letter.
Leaves: a `Steering` that adds the mean difference to what comes after a prompt. Does not know how models run.
"""

import re

import polars as pl

from reprobe.control import Add, Scope, Steering
from reprobe.errors import DataError, UsageError
from reprobe.model.sites import Site
from reprobe.probing.direction import Direction, Label
from reprobe.probing.grid import Source, site_rows, wanted_sites
from reprobe.probing.probe_grid import store_provenance
from reprobe.probing.readers.pairing import sides
from reprobe.probing.rows import require_pairs, select_rows
from reprobe.prompts import PromptSet

#: Where a store for `fit` is to be read.
AT = "span:letter:last"
_LETTER = re.compile(r"[^\W_]")


def with_letters(data: PromptSet) -> PromptSet:
    """`data` with a span `letter` in every prompt: the first letter or digit of its span `answer`, the A of "(A)".

    Persona evaluations (`question`, `answer_matching_behavior`, `answer_not_matching_behavior`), as `PromptSet.load`
    reads them, have that span, and pairs. Of messages, spans are of the last one. Raises `DataError` for a prompt
    without an answer, or one without a letter.
    """
    marked = []
    for row in data.frame.iter_rows(named=True):
        found = [s for s in row["spans"] if s["name"] == "answer"]
        if not found:
            raise DataError(f"{data.name}: prompt {row['id']!r} has no span 'answer' whose letter could be found")
        start, end = found[0]["start"], found[0]["end"]
        text = row["text"] if row["text"] is not None else row["messages"][-1]["content"]
        letter = _LETTER.search(text, start, end)
        if letter is None:
            raise DataError(f"{data.name}: the answer of prompt {row['id']!r}, {text[start:end]!r}, has no letter")
        kept = [s for s in row["spans"] if s["name"] != "letter"]
        marked.append([*kept, {"name": "letter", "start": letter.start(), "end": letter.end()}])
    spans = pl.Series("spans", marked, dtype=data.frame.schema["spans"])
    return PromptSet(data.frame.with_columns(spans), data.name)


def fit(
    store: Source,
    site: Site | str,
    strength: float = 1.0,
    *,
    tokens: Scope | str = "generated",
    label: str = "label",
    positive: Label | None = None,
    where: pl.Expr | None = None,
) -> Steering:
    """h + strength · v after the prompt, v the mean over pairs of h(positive answer) − h(negative answer) at `site`.

    `store` holds pairs of the same question with either answer, read at the answer's letter:
    `extract(lm, caa.with_letters(data), at=caa.AT, …)`. That is the letter whatever follows it (the published code
    takes the last token but one). `strength` is the paper's multiplier, of v itself: 1, −1, 2 …; a block at 0.4 of the
    depth is a good first one. Tokens after the prompt are steered; the published code begins one token earlier, with
    the prompt's last: `tokens="last"`. Raises `UnknownSite`, `UsageError` for rows without a pair, a store read
    elsewhere, or pairs that do not differ.
    """
    (where_read,) = wanted_sites(store, site)
    at = str(store.manifest.plan.get("at", ""))
    if at != "last" and not (at.startswith("span:") and at.endswith((":last", ":first"))):
        raise UsageError(f"the store was read at {at!r}, not at the answers' letters: extract with at={AT!r}")
    rows = select_rows(store.index, label=label, positive=positive, where=where)
    pairs = require_pairs(rows, "caa.fit")
    ((_, X),) = site_rows(store, (where_read,), rows)
    found = sides(X, rows.positive, pairs, seed=0)
    made = store_provenance(store.manifest) | {"rows": rows.digest, "note": rows.note}
    v = Direction.from_vector(where_read, (found.high - found.low).mean(axis=0), provenance=made)
    said = {"method": "caa", "site": str(where_read), "strength": strength, "pairs": len(found.high)}
    return Steering(Add(v, strength, tokens=tokens), name=f"CAA at {where_read}", provenance=made | said)
