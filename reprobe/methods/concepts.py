"""Concepts: which characters of a text are of something, and so which tokens of a stream.

Enters: word lists, regular expressions, spans and labels of prompts, spans from a tagger of the user's; or the names of
ready concepts in data/concepts. Leaves: `Concept` values, and their masks over a `TokenStream`. A token is of a concept
if it shares a character with what the concept finds, as tokens of spans are found everywhere here. Does not know
activations.
"""

import re
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool

from reprobe.errors import DataError, UnknownData, UsageError
from reprobe.methods.stream import Document, TokenStream
from reprobe.model.text import Span
from reprobe.prompts import catalog

#: A concept's spans in one document, in any order; they may overlap.
Find = Callable[[Document], Iterable[Span]]
#: Finds spans with a tag each in a text: (first character, one beyond the last, tag).
Tagger = Callable[[str], Iterable[tuple[int, int, str]]]
Absent = Literal["raise", "drop"]

_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Concept:
    """What tokens may be of. `find` gives the characters of a document that are; `about` says which they are.

    Make one with `words`, `regex`, `span`, `label`, `given`, `tags`, or from a function of your own. `kind` groups
    concepts for the eye.
    """

    name: str
    find: Find = field(repr=False)
    about: str = ""
    kind: str = "other"

    @classmethod
    def words(
        cls, name: str, words: Iterable[str], *, case: bool = False, about: str = "", kind: str = "other"
    ) -> "Concept":
        """Whole words, and phrases of several; upper and lower case alike unless `case`."""
        chosen = [word.strip() for word in words if word.strip()]
        if not chosen:
            raise UsageError(f"the concept {name!r} has no words")
        known = [word if case else word.casefold() for word in chosen]
        single = frozenset(word for word in known if _WORD.fullmatch(word))
        # A phrase, or a word with an apostrophe, is no single run of letters.
        rest = sorted({word for word in known if word not in single}, key=len, reverse=True)
        phrases = [r"\s+".join(map(re.escape, phrase.split())) for phrase in rest]
        flags = re.NOFLAG if case else re.IGNORECASE
        pattern = re.compile(rf"(?<!\w)(?:{'|'.join(phrases)})(?!\w)", flags) if rest else None

        def find(document: Document) -> Iterable[Span]:
            for m in _WORD.finditer(document.text):
                if (m[0] if case else m[0].casefold()) in single:
                    yield m.span()
            for m in pattern.finditer(document.text) if pattern else ():
                yield m.span()

        return cls(name, find, about or f"{len(known)} words, e.g. {', '.join(chosen[:3])}", kind)

    @classmethod
    def regex(
        cls, name: str, pattern: str | re.Pattern[str], *, case: bool = True, about: str = "", kind: str = "other"
    ) -> "Concept":
        """What a regular expression matches; if it has a group named `it`, the characters of that group."""
        try:
            compiled = re.compile(pattern, re.NOFLAG if case or isinstance(pattern, re.Pattern) else re.IGNORECASE)
        except re.error as error:
            raise UsageError(f"the concept {name!r}: {pattern!r} is no regular expression ({error})") from error
        group = "it" if "it" in compiled.groupindex else 0

        def find(document: Document) -> Iterable[Span]:
            return (m.span(group) for m in compiled.finditer(document.text))

        return cls(name, find, about or f"what matches {compiled.pattern}", kind)

    @classmethod
    def span(cls, name: str, span: str | None = None, *, about: str = "", kind: str = "other") -> "Concept":
        """The named span of prompts that have one; without `span`, that of the concept's name."""
        wanted = name if span is None else span

        def find(document: Document) -> Iterable[Span]:
            return [document.spans[wanted]] if wanted in document.spans else []

        return cls(name, find, about or f"the span {wanted!r} of the prompts", kind)

    @classmethod
    def label(cls, name: str, value: Any, *, column: str = "label", about: str = "", kind: str = "other") -> "Concept":
        """Every token of the prompts whose `column` has this value."""

        def find(document: Document) -> Iterable[Span]:
            return [(0, len(document.text))] if document.columns.get(column) == value else []

        return cls(name, find, about or f"prompts with {column} = {value!r}", kind)

    @classmethod
    def given(cls, name: str, spans: Sequence[Iterable[Span]], *, about: str = "", kind: str = "other") -> "Concept":
        """Spans that were found elsewhere: for each document of the stream, in its order, its own."""
        fixed = [[(int(a), int(b)) for a, b in one] for one in spans]

        def find(document: Document) -> Iterable[Span]:
            if document.number >= len(fixed):
                raise UsageError(
                    f"the concept {name!r} has spans for {len(fixed)} documents, and the stream has more; give one "
                    "list of spans for each (empty where there is none)"
                )
            return fixed[document.number]

        return cls(name, find, about or "spans given by the user", kind)

    @classmethod
    def tags(cls, tagger: Tagger, names: Iterable[str], *, kind: str = "tags") -> "tuple[Concept, ...]":
        """One concept for each tag of a tagger: parts of speech, entities.

        `tagger(text)` yields (first character, one beyond the last, tag). Each text is tagged once. With a spaCy
        pipeline that you have: `lambda text: [(t.idx, t.idx + len(t), t.pos_) for t in nlp(text)]`; its models are not
        on the package index, which is why none comes with reprobe.
        """
        seen: dict[str, list[tuple[int, int, str]]] = {}

        def spans(tag: str) -> Find:
            def find(document: Document) -> Iterable[Span]:
                if document.text not in seen:
                    seen[document.text] = [(int(a), int(b), str(t)) for a, b, t in tagger(document.text)]
                return [(a, b) for a, b, t in seen[document.text] if t == tag]

            return find

        return tuple(cls(name, spans(name), f"tagged {name}", kind) for name in names)


@dataclass(frozen=True, eq=False)
class Masks:
    """Which tokens of a stream are of which concept: `of[i, c]` for the i-th counted token. `dropped` were left out,
    because no token was of them, or every one."""

    concepts: tuple[Concept, ...]
    of: Bool[np.ndarray, "counted concepts"]
    dropped: tuple[str, ...]


def masks(stream: TokenStream, concepts: Iterable[Concept], *, absent: Absent = "raise") -> Masks:
    """The tokens of each concept.

    A concept that no counted token is of, or that all are of, tells units nothing: `UsageError` that names them, or
    with `absent="drop"` they are left out. Also raises for two concepts of one name, `DataError` for spans outside
    their text.
    """
    wanted = tuple(concepts)
    names = [concept.name for concept in wanted]
    if not wanted:
        raise UsageError("no concept was given; e.g. concepts=reprobe.methods.concepts.ready()")
    if repeated := {name for name in names if names.count(name) > 1}:
        raise UsageError(f"several concepts are called {', '.join(sorted(repeated))}; give each a name of its own")
    if absent not in ("raise", "drop"):
        raise UsageError(f"absent={absent!r}: 'raise' or 'drop'")
    # All documents one after the other: a token's characters are then a range of one line.
    bases = np.concatenate([[0], np.cumsum([len(d.text) for d in stream.documents])])
    base = bases[stream.document[stream.places]]
    begin, end = base + stream.begin[stream.places], base + stream.end[stream.places]
    of = np.zeros((stream.n, len(wanted)), np.bool_)
    for c, concept in enumerate(wanted):
        inside = np.zeros(int(bases[-1]) + 1, np.int32)
        for document in stream.documents:
            for first, last in concept.find(document):
                if not 0 <= first <= last <= len(document.text):
                    raise DataError(
                        f"the concept {concept.name!r} finds characters {first}–{last} of document {document.number}, "
                        f"which has {len(document.text)}"
                    )
                inside[bases[document.number] + first : bases[document.number] + last] = 1
        before = np.concatenate([[0], np.cumsum(inside)])
        of[:, c] = before[end] > before[begin]
    counts = of.sum(0)
    never, always = (
        [n for n, hit in zip(names, which, strict=True) if hit] for which in (counts == 0, counts == stream.n)
    )
    if (never or always) and absent == "raise":
        told = [f"never occur: {', '.join(never)}"] if never else []
        told += [f"are everywhere: {', '.join(always)}"] if always else []
        raise UsageError(
            f"among the {stream.n:,} tokens of {stream.name}, concepts that {'; that '.join(told)}. Nothing can be a "
            "detector of those: leave them out (absent='drop', --drop-absent), or take other text"
        )
    kept = np.flatnonzero((counts > 0) & (counts < stream.n))
    if not len(kept):
        raise UsageError(f"none of the concepts is found among the {stream.n:,} tokens of {stream.name}")
    return Masks(tuple(wanted[c] for c in kept), np.ascontiguousarray(of[:, kept]), tuple(never + always))


def ready(names: str | Iterable[str] | None = None) -> tuple[Concept, ...]:
    """The ready concepts of data/concepts: all, those of these names, or of a kind (`"kind:time"`).

    `UnknownData` lists what there is.
    """
    table = _table()
    if names is None:
        chosen = list(table)
    else:
        chosen = []
        for name in [n.strip() for n in names.split(",")] if isinstance(names, str) else names:
            kind = name.removeprefix("kind:")
            found = [n for n, row in table.items() if row["kind"] == kind] if name != kind else [name]
            if not found or not set(found) <= set(table):
                kinds = sorted({row["kind"] for row in table.values()})
                raise UnknownData(
                    f"no ready concept is called {name!r}; there are {', '.join(table)}; kinds: "
                    f"{', '.join('kind:' + k for k in kinds)}"
                )
            chosen += found
    return tuple(_made(name, table[name]) for name in dict.fromkeys(chosen))


def _table() -> dict[str, dict[str, Any]]:
    file = catalog.folder() / "concepts" / "concepts.toml"
    table: dict[str, dict[str, Any]] = tomllib.loads(file.read_text(encoding="utf-8"))
    return table


def _made(name: str, row: Mapping[str, Any]) -> Concept:
    said = {"about": row["about"], "kind": row["kind"]}
    if "regex" in row:
        return Concept.regex(name, row["regex"], case=row.get("case", True), **said)
    words = [word.strip() for word in row.get("words", "").replace("\n", " ").split(",") if word.strip()]
    for column in row.get("tables", ()):
        words += _column(*column.split(":"))
    if row.get("plurals"):
        words += [_plural(word) for word in words]
    return Concept.words(name, words, case=row.get("case", False), **said)


def _column(file: str, column: str, where: str = "") -> list[str]:
    """The values of one column of a table of data/tables; `where` is COLUMN=VALUE."""
    lines = (catalog.folder() / "tables" / file).read_text(encoding="utf-8").splitlines()
    head = lines[0].split("\t")
    rows = [dict(zip(head, line.split("\t"), strict=False)) for line in lines[1:]]
    key, _, value = where.partition("=")
    found = [row.get(column, "") for row in rows if not key or row[key] == value]
    return [word for word in dict.fromkeys(found) if word not in ("", "-")]


def _plural(word: str) -> str:
    if re.search(r"(?:s|x|z|ch|sh)$", word):
        return word + "es"
    return word[:-1] + "ies" if re.search(r"[^aeiou]y$", word) else word + "s"
