"""The project's data sets as plain JSON: what a file holds, without the library."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

DATA = Path(__file__).resolve().parents[2] / "data"

Row = dict[str, Any]


def load(name: str) -> list[Row]:
    text = (DATA / f"{name}.jsonl").read_text(encoding="utf-8")
    assert text.endswith("}\n")
    return [json.loads(line) for line in text.splitlines()]


def by(rows: list[Row], column: str) -> dict[Any, list[Row]]:
    """The rows that share a value of `column`, value by value."""
    parts: defaultdict[Any, list[Row]] = defaultdict(list)
    for row in rows:
        parts[row[column]].append(row)
    return parts
