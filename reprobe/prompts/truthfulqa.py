"""TruthfulQA: questions with several true and several false answers each.

Enters: the benchmark's CSV, or its multiple-choice JSON. Leaves: one prompt "Q: … A: …" per question and
answer, with label 1 for a true answer and 0 for a false one, the question as group, spans `question` and
`answer`, and the columns `question`, `answer` and `best`. From both files the same prompts come out. Two
questions list the answer "Unknown" on both sides; both prompts are kept, as the benchmark has them. Does not
know how answers are scored.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import polars as pl

from reprobe.errors import DataError
from reprobe.prompts.columns import from_records
from reprobe.prompts.content import Content


@dataclass(frozen=True)
class TruthfulQA:
    """The CSV: answers in lists separated by semicolons, most without a final full stop, which is added.

    `best` marks the row's "Best Answer" (and "Best Incorrect Answer", in files that have one). Answers that a
    list repeats are taken once.
    """

    name = "truthfulqa"
    needs = ".csv with Question, Best Answer, Correct Answers, Incorrect Answers"

    def fits(self, content: Content) -> bool:
        want = {"Question", "Best Answer", "Correct Answers", "Incorrect Answers"}
        return content.kind == "csv" and want <= content.keys

    def frame(self, content: Content) -> pl.DataFrame:
        rows = []
        for i, source in enumerate(content.records):
            question = content.text(source, "Question", i).strip()
            best = {_closed(source[k]) for k in ("Best Answer", "Best Incorrect Answer") if source.get(k)}
            true = _listed(content.text(source, "Correct Answers", i))
            false = _listed(content.text(source, "Incorrect Answers", i))
            kept = {k.lower(): source.get(k) for k in ("Type", "Category", "Source") if k in content.keys}
            for j, (answer, label) in enumerate([(a, 1) for a in true] + [(a, 0) for a in false], 1):
                extra = {"best": answer in best, **kept}
                rows.append(_prompt(f"{content.stem}-{i + 1:04d}-{j:02d}", question, answer, label, extra))
        return from_records(rows, content.stem)


@dataclass(frozen=True)
class TruthfulQAChoices:
    """The multiple-choice JSON; columns `mc1` and `mc2` say in which set of targets an answer is.

    An answer in both is one prompt, so `filter(pl.col("mc1"))` gives the choices of MC1. `best` marks the one
    true choice of MC1.
    """

    name = "truthfulqa-mc"
    needs = ".json: a list of {question, mc1_targets, mc2_targets}, targets as {answer: 0 or 1}"

    def fits(self, content: Content) -> bool:
        return content.kind == "json" and {"question", "mc1_targets", "mc2_targets"} <= content.keys

    def frame(self, content: Content) -> pl.DataFrame:
        rows = []
        for i, source in enumerate(content.records):
            question = content.text(source, "question", i).strip()
            one, two = (_targets(content, source, key, i) for key in ("mc1_targets", "mc2_targets"))
            for j, (answer, label) in enumerate(dict.fromkeys([*two, *one]), 1):
                mc1 = (answer, label) in one
                extra = {"best": mc1 and label == 1, "mc1": mc1, "mc2": (answer, label) in two}
                rows.append(_prompt(f"{content.stem}-{i + 1:04d}-{j:02d}", question, answer, label, extra))
        return from_records(rows, content.stem)


def _targets(content: Content, row: dict[str, Any], key: str, i: int) -> dict[tuple[str, int], None]:
    targets = content.field(row, key, i)
    if not isinstance(targets, dict) or not all(label in (0, 1) for label in targets.values()):
        raise DataError(f"{content.path}: {key} of row {i + 1} must be an object, answer → 0 or 1")
    return {(_closed(answer), label): None for answer, label in targets.items()}


def _prompt(id_: str, question: str, answer: str, label: int, extra: dict[str, Any]) -> dict[str, Any]:
    text = f"Q: {question} A: {answer}"
    spans = {"question": [3, 3 + len(question)], "answer": [len(text) - len(answer), len(text)]}
    head = {"id": id_, "text": text, "label": label, "group": question, "spans": spans}
    return {**head, "question": question, "answer": answer, **extra}


def _listed(cell: str) -> Iterable[str]:
    return dict.fromkeys(_closed(part) for part in cell.split(";") if part.strip())


def _closed(answer: str) -> str:
    """The answer as the benchmark scores it: no blanks around it, and a full stop at its end."""
    stripped = answer.strip()
    return stripped if stripped.endswith(".") else stripped + "."
