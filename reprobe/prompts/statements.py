"""Statements with a label: Geometry-of-Truth and RepE facts, RepE emotions, persona statements.

Enters: their files as `Content`. Leaves: frames in canonical columns. Does not know models or methods.
"""

from dataclasses import dataclass

import polars as pl

from reprobe.errors import DataError
from reprobe.prompts.columns import CANONICAL, from_records, rename
from reprobe.prompts.content import Content, numbered, typed

#: "The Spanish word 'gato' means 'cat'.": the word that a translation is about.
_TRANSLATED = r"word '(.+?)' means"


@dataclass(frozen=True)
class Statements:
    """True and false statements, one a row. Other columns are kept.

    Columns `group` and `pair` of the file stand. Otherwise the group is decided by what there is, in this order:
    `n1` and `n2` (comparisons): the two numbers, in either order; `city`: the city; every statement of the form
    "word '…' means": that word; the pair; else only repeated statements share a group. So a city's statement and
    its negation from another file are in one group. In the first three cases a group of exactly one true and one
    false statement is also a pair.
    """

    name = "statements"
    needs = ".csv with statement, label (Geometry-of-Truth; RepE facts)"

    def fits(self, content: Content) -> bool:
        return content.kind == "csv" and {"statement", "label"} <= content.keys

    def frame(self, content: Content) -> pl.DataFrame:
        table: pl.DataFrame = content.value
        kept = {"statement", *CANONICAL} - {"label"}
        table = table.with_columns(typed(c) for c in table.get_columns() if c.name not in kept)
        frame = rename(table, {"text": "statement"}, content.stem)
        if "id" not in frame.columns:
            frame = frame.with_columns(numbered(content, frame.height))
        stated = {c for c in ("group", "pair") if c in frame.columns and frame[c].null_count() < frame.height}
        if "group" in stated:
            return frame
        group = self._group(frame)
        if group is None and "pair" in stated:
            return frame
        if group is None:
            return frame.with_columns(pl.col("id").first().over("text").alias("group"))
        frame = frame.with_columns(group.cast(pl.String).alias("group"))
        if "pair" in stated:
            return frame
        label = pl.col("label").cast(pl.Float64, strict=False)  # null where labels are words
        opposed = (pl.len() == 2) & (label == 1).any() & (label == 0).any()
        return frame.with_columns(pl.when(opposed.over("group")).then("group").alias("pair"))

    def _group(self, frame: pl.DataFrame) -> pl.Expr | None:
        if {"n1", "n2"} <= set(frame.columns):
            return pl.format("{}|{}", pl.min_horizontal("n1", "n2"), pl.max_horizontal("n1", "n2"))
        if "city" in frame.columns:
            return pl.col("city")
        word = pl.col("text").str.extract(_TRANSLATED)
        return word if frame.select(word.is_not_null().all()).item() else None


@dataclass(frozen=True)
class Emotions:
    """RepE emotions: scenarios as a bare list of strings, all of one label (None: the file's name)."""

    label: str | int | None = None
    name = "emotions"
    needs = ".json: a list of strings (the label is the file's name, or format=Emotions(label=…))"

    def fits(self, content: Content) -> bool:
        items = content.value if content.kind == "json" and isinstance(content.value, list) else []
        return bool(items) and isinstance(items[0], str)

    def frame(self, content: Content) -> pl.DataFrame:
        odd = [i + 1 for i, text in enumerate(content.value) if not isinstance(text, str)]
        if odd:
            raise DataError(f"{content.path}: item {odd[0]} is not a string")
        label = content.stem if self.label is None else self.label
        rows = ({"text": text.strip(), "label": label} for text in content.value)
        return from_records(rows, content.stem).with_columns(numbered(content, len(content.value)))


@dataclass(frozen=True)
class Persona:
    """Persona evaluations: per question two prompts, the question followed by either answer.

    Label 1 is the answer that matches the behaviour, 0 the other; the two are a pair. Answers in these files
    begin with their blank (" Yes"), so that question and answer simply join. Spans: `question`, `answer`, and
    `statement` where the file names it and it stands in the question.
    """

    name = "persona"
    needs = ".jsonl with question, answer_matching_behavior, answer_not_matching_behavior"

    def fits(self, content: Content) -> bool:
        want = {"question", "answer_matching_behavior", "answer_not_matching_behavior"}
        return content.kind == "json" and want <= content.keys

    def frame(self, content: Content) -> pl.DataFrame:
        rows = []
        for i, source in enumerate(content.records):
            question = content.text(source, "question", i)
            pair = f"{content.stem}-{i + 1:04d}"
            statement = content.text_or_none(source, "statement", i)
            at = question.find(statement) if statement else -1
            inside = {"statement": [at, at + len(statement)]} if statement and at >= 0 else {}
            kept = {k: v for k, v in source.items() if not k.startswith("answer_") and k != "question"}
            for side, label in (("matching", 1), ("not_matching", 0)):
                answer = content.text(source, f"answer_{side}_behavior", i)
                text = question + answer
                spans = {
                    "question": [0, len(question)],
                    "answer": [len(text) - len(answer.lstrip()), len(text)],
                    **inside,
                }
                head = {
                    "id": f"{pair}-{side.replace('_', '-')}",
                    "text": text,
                    "label": label,
                    "group": question,
                }
                rows.append(
                    {
                        **head,
                        "pair": pair,
                        "spans": spans,
                        "question": question,
                        "answer": answer.strip(),
                        **kept,
                    }
                )
        return from_records(rows, content.stem)
