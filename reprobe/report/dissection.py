"""The report of a dissection: one HTML file in which concepts and units are browsed and searched.

Enters: a `Dissection`, and what its detectors cause if that was measured. Leaves: a page that needs no network and
adapts to light, dark, paper and phone; equal, byte for byte, for equal results. Texts are data on it, never markup.
"""

import json
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import polars as pl
from markupsafe import Markup
from matplotlib import style

from reprobe.evaluation.causation import Causation
from reprobe.methods.dissected import Dissection, Snippet
from reprobe.provenance import write_durably
from reprobe.report.blocks import (
    Block,
    Card,
    Cards,
    Cell,
    Digest,
    Link,
    Panels,
    Prose,
    Section,
    Source,
    Table,
    panel,
    source,
)
from reprobe.report.detectors import causal_intervals, detector_bars
from reprobe.report.page import page, writable
from reprobe.report.study import spelled_sites

#: Units with a page: every concept's best, and detectors by falling IoU, up to so many in all.
UNITS, PER_CONCEPT = 2500, 20
#: Concepts on a unit's page, and snippets.
_CONCEPTS, _SNIPPETS = 6, 6
CONCEPTS_HEAD = ("Concept", "Kind", "Tokens#", "Detectors#", "Best IoU#", "Possible#", "Best unit")
CONCEPTS_ABOUT = "Detectors are units whose best concept it is. Possible: the largest IoU that a full top allows."
_HERE = Path(__file__).parent


def write_dissection(
    dissection: Dissection, to: str | Path, *, causation: Causation | None = None, units: int = UNITS
) -> Path:
    """Draw the report into the file `to`, replacing an older one; at most about `units` units have a page.

    Raises `ArtifactExists` if `to` is something else than a report.
    """
    path = writable(Path(to))
    text = render(dissection, causation, units)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, text.encode())
    return path


def render(dissection: Dissection, causation: Causation | None = None, units: int = UNITS) -> str:
    """The page as text."""
    chosen = _chosen(dissection, units)
    with style.context("default"):  # a user's matplotlibrc must not change the page
        made = [overview(dissection), layers(dissection), _causes(dissection, causation), _concepts(dissection)]
    script = (_HERE / "dissection.js").read_text().strip()
    detectors = int(dissection.units["detector"].sum())
    shown = (
        f"{len(chosen):,} of {dissection.n:,} units have a page: the {PER_CONCEPT} with the largest IoU of each concept"
    )
    return page(
        "dissection.html",
        f"What the units of {dissection.identity.name} detect",
        _summary(dissection, causation),
        [section for section in made if section.blocks],
        scripts={"browse": script},
        digest=dissection.digest,
        browse_css=Markup((_HERE / "dissection.css").read_text().strip()),
        browse_about=f"{shown}, and detectors by falling IoU ({detectors:,} in all). On a unit's page, tokens above "
        "its threshold are marked, the one where it is largest most strongly.",
        data=Markup(_json(_data(dissection, causation, chosen))),
    )


def _summary(dissection: Dissection, causation: Causation | None) -> list[str]:
    d, detectors = dissection, int(dissection.units["detector"].sum())
    said = [
        f"{detectors:,} of {d.n:,} units ({detectors / d.n:.1%}) detect a concept: the IoU of their top "
        f"{d.settings.quantile:.1%} of tokens with one of {len(d.names)} concepts is above {d.settings.detector:g}."
    ]
    if len(d.null):
        by_chance = d.chance["detectors"].to_numpy()
        said.append(
            f"By chance {by_chance.mean():,.0f} would ({by_chance.min():,}–"
            f"{by_chance.max():,} in {len(d.null)} rotations of the concepts along the stream), and the "
            f"largest IoU of any would be {d.null.max():.3f}; found is {d.iou.max():.3f}."
        )
    for line in causation.summary.iter_rows(named=True) if causation is not None else ():
        expected = "above 0" if line["act"] == "stimulate" else "below 0"
        verb = "Clamped at their thresholds" if line["act"] == "stimulate" else "Ablated"
        between = (
            ""
            if line["difference_low"] is None
            else (f" [{line['difference_low']:+.3f}, {line['difference_high']:+.3f}]")
        )
        said.append(
            f"{verb}, the detectors of {line['concepts']} concepts change the log-probability of their concept's "
            f"tokens by {line['difference']:+.3f}{between} nats more than random units that are as active; for "
            f"{line[expected]} of them the interval is {expected}."
        )
    return said


def overview(d: Dissection) -> Section:
    model = d.identity
    cards = [
        Card(
            model.name,
            [
                ("architecture", f"{model.architecture}, {model.n_layers} blocks, d_model {model.d_model}"),
                ("computed in", model.dtype),
                ("weights", Digest(model.weights)),
            ],
        ),
        Card(
            f"Stream: {d.stream.name}",
            [
                ("tokens", f"{d.stream.n:,} counted of {len(d.stream.ids):,}"),
                ("rows", f"{len(d.stream.starts) - 1:,} of at most {int(np.diff(d.stream.starts).max())} tokens"),
                ("documents", f"{len(d.stream.documents):,}"),
                ("digest", Digest(d.stream.digest)),
            ],
        ),
    ]
    left = f" Left out, since no token or every token was of them: {', '.join(d.dropped)}." if d.dropped else ""
    method = (
        "A unit's top are the tokens at which it exceeds its threshold, the smallest value that at most "
        f"{d.settings.quantile:.2%} of the tokens exceed. IoU is the number of tokens that are both at its top and of "
        "a concept over the number that are either. Precision is the share of its top that is of the concept, recall "
        "the share of the concept that is at its top, selectivity its mean on the concept less its mean elsewhere, in "
        f"its standard deviations. Special tokens and the first of each row do not count.{left}"
    )
    return Section("overview", "What was read, and how", (Cards(cards), Prose(method)))


def layers(d: Dissection, name: str = "detectors") -> Section:
    """`name` is the figure's, unique on the page."""
    blocks: list[Block] = []
    if d.layers["layer"].null_count() < d.layers.height:
        figure = detector_bars(d)
        caption = (
            f"Units whose IoU with their best concept is above {d.settings.detector:g}, by the kind of that concept."
        )
        if len(d.null):
            caption += f" Hollow: how many there would be by chance, the mean over {len(d.null)} rotations."
        blocks.append(Panels([panel(figure, name, "Detectors over blocks", caption, of(d))]))
    rows = [
        (
            line["site"],
            f"{line['units']:,}",
            f"{line['detectors']:,}",
            "" if line["expected"] is None else f"{line['expected']:.1f}",
            str(line["concepts"]),
        )
        for line in d.layers.iter_rows(named=True)
    ]
    head = ("Site", "Units#", "Detectors#", "By chance#", "Concepts detected#")
    blocks.append(Table("Detectors at each site.", head, rows))
    return Section("layers", "Detectors over layers", blocks)


def _causes(d: Dissection, causation: Causation | None) -> Section:
    if causation is None or not causation.table.height:
        return Section("causes", "What detectors cause", ())
    caption = (
        "Change of the log-probability of a concept's tokens when its detectors are clamped at their thresholds on "
        "neutral sentences (left), or set to 0 where the concept occurs (right). Filled: the detectors; the bar is the "
        "95\u00a0% interval, over texts, of the difference from random units that are as active (hollow), laid beside "
        "those. A detector that causes what it detects lies right of the hollow mark on the left, and left "
        "of it on the right."
    )
    figure = panel(causal_intervals(causation), "causes", "What detectors cause", caption, of(d))
    rows: list[tuple[Cell, ...]] = [
        (
            _link("concept", line["concept"]),
            line["act"],
            f"{line['effect']:+.3f}",
            f"{line['control']:+.3f}",
            _difference(line),
            f"{line['rank']:.2f}",
        )
        for line in causation.table.sort("act", "difference", descending=True).iter_rows(named=True)
    ]
    head = ("Concept", "Act", "Detectors, nats#", "Random units#", "Difference [95\u00a0%]#", "Rank#")
    about = "The same in numbers. Rank: the share of sets of units, the detectors among them, that go at least as far."
    return Section("causes", "What detectors cause", (Panels([figure]), Table(about, head, rows)))


def of(d: Dissection) -> Source:
    """What figures of a dissection are of."""
    sites = spelled_sites(reading.site for reading in d.readings)
    return source(d.identity, {"stream": d.stream.digest, "dissection": d.digest}, at=sites)


def _concepts(d: Dissection) -> Section:
    return Section("concepts", "Concepts", (Table(CONCEPTS_ABOUT, CONCEPTS_HEAD, concept_rows(d)),))


def concept_rows(d: Dissection) -> list[tuple[Cell, ...]]:
    """A line a concept; links lead to the places of this page where concepts and units are browsed."""
    return [
        (
            _link("concept", line["concept"]),
            line["kind"],
            f"{line['tokens']:,}",
            str(line["detectors"]),
            f"{line['best_iou']:.3f}",
            f"{line['attainable']:.3f}",
            _link("unit", line["best_unit"]),
        )
        for line in d.concepts.sort("detectors", "best_iou", descending=True).iter_rows(named=True)
    ]


def _link(kind: str, name: str) -> Link:
    return Link(name, f"#{kind}/{quote(name, safe='')}")


def _difference(line: Mapping[str, Any]) -> str:
    if line["difference_low"] is None:
        return f"{line['difference']:+.3f}"
    return f"{line['difference']:+.3f} [{line['difference_low']:+.3f}, {line['difference_high']:+.3f}]"


def _chosen(d: Dissection, units: int) -> list[int]:
    best = np.argsort(-d.iou, axis=0, kind="stable")[:PER_CONCEPT]
    chosen = dict.fromkeys(best.T.ravel().tolist())
    table = d.units.with_row_index("u").filter(pl.col("detector")).sort("iou", descending=True)
    for u in table["u"].to_list():
        if len(chosen) >= units:
            break
        chosen[u] = None
    return sorted(chosen)


def _data(d: Dissection, causation: Causation | None, chosen: list[int]) -> dict[str, Any]:
    place = {u: i for i, u in enumerate(chosen)}
    caused: dict[str, list[list[str]]] = {name: [] for name in d.names}
    for line in causation.table.iter_rows(named=True) if causation is not None else ():
        numbers = [f"{line['effect']:+.3f}", f"{line['control']:+.3f}", _difference(line)]
        caused[line["concept"]].append([line["act"], *numbers])
    p = d.units["p"].to_numpy()
    return {
        "concepts": [
            {
                "n": line["concept"],
                "k": line["kind"],
                "a": line["about"],
                "t": line["tokens"],
                "s": _short(line["share"]),
                "m": _short(line["attainable"]),
                "d": line["detectors"],
                "x": caused[line["concept"]],
                "u": [
                    [place[u], *_pair(d, u, c)] for u in np.argsort(-d.iou[:, c], kind="stable")[:PER_CONCEPT].tolist()
                ],
            }
            for c, line in enumerate(d.concepts.iter_rows(named=True))
        ],
        "units": [
            {
                "n": d.unit_names[u],
                "t": _short(d.threshold[u]),
                "m": _short(d.mean[u]),
                "d": _short(d.sd[u]),
                "a": int(d.active[u]),
                "p": None if np.isnan(p[u]) else _short(p[u]),
                "c": [[c, *_pair(d, u, c)] for c in np.argsort(-d.iou[u], kind="stable")[:_CONCEPTS].tolist()],
                "q": [_marked(snippet) for snippet in d.snippets(u)[:_SNIPPETS]],
            }
            for u in chosen
        ],
    }


def _pair(d: Dissection, u: int, c: int) -> list[float]:
    hits = int(d.hits[u, c])
    shares = (d.iou[u, c], hits / max(int(d.active[u]), 1), hits / int(d.sizes[c]), d.selectivity[u, c])
    return [_short(x) for x in shares]


def _marked(snippet: Snippet) -> list[Any]:
    """Its value, and runs of text with how they are marked: 0 not, 1 above the threshold, 2 the peak."""
    how = [2 if i == snippet.peak else int(marked) for i, marked in enumerate(snippet.marked)]
    runs = groupby(zip(snippet.pieces, how, strict=True), key=lambda pair: pair[1])
    return [_short(snippet.value), [["".join(text for text, _ in run), mark] for mark, run in runs]]


def _short(x: Any) -> float:
    """Four digits are more than anybody reads; a page of thousands of units is that much smaller."""
    return float(f"{float(x):.4g}")


def _json(value: Any) -> str:
    """JSON that can stand inside a script element: no `<` in it could end that."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
