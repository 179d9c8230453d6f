"""The fast half of the benchmarks again, and what they measure now beside what is recorded.

    uv run --group bench python experiments/bench/run.py [--only NAME …] [--minutes 15] [--json F] [--markdown F]

Enters: the recorded results (NAME.md beside this file). Leaves: one table, claim by claim: the target, what is
recorded, what was measured now, and whether each meets the target. Run it on an idle machine. Each benchmark runs in a
process of its own, on SmolLM2, with fewer rounds than were recorded, so figures scatter more; what it left out (no
peer, no REPROBE_DATA) is said. What would begin after the minutes are over is not begun, what still runs is stopped,
and what was measured by then is kept.

Does not know how anything is measured.
"""

import argparse
import datetime
import json
import math
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reprobe.provenance import write_durably

HERE = Path(__file__).parent
#: What runs, in this order: a script beside this file, and options that keep it short.
BENCHES: Mapping[str, str] = {
    "monitor": "--dtype float32 --device cpu --batches 1 8 --tokens 48 --repeats 4",
    "extraction": "--models smollm2-135m --work cities one-site planning --repeats 1",
    "control": "--models smollm2-135m --work one eight --tokens 64 --repeats 4",
    "tracing": "--models smollm2-135m --one 0 --passes 6 --facts 0 --repeats 1",
    "probing": "--work layers bootstrap --repeats 1",
    "choices": "--models smollm2-135m --questions 20 --answers 20 --repeats 1",
    "dola": "--models smollm2-135m --batches 1 --tokens 48 --repeats 4",
    "dissection": "--tokens 8000",
    "editing": "--facts 4",
}
_ROW = re.compile(r"\| (?P<cells>[^|]*(?: \| [^|]*){4}) \| (?:met|\*\*missed\*\*) \|")
_DATE = re.compile(r"\b\d{4}-\d{2}-\d{2}\b")


@dataclass(frozen=True)
class Figure:
    """A measured ratio or share, and the target it should meet: `≥ 0.98`."""

    work: str
    model: str
    claim: str
    target: str
    measured: float

    @property
    def key(self) -> tuple[str, str, str]:
        """What makes two figures ones of the same thing. A peer in brackets is the fastest of that day."""
        return self.work, self.model, re.sub(r" \([^()]*\)$", "", self.claim)

    @property
    def met(self) -> bool:
        relation, limit = self.target.split()
        return self.measured >= float(limit) if relation == "≥" else self.measured <= float(limit)


def recorded(markdown: str) -> tuple[str, list[Figure]]:
    """The date of a results file, and the figures of its table of claims. Raises `ValueError` if there is no date."""
    date = _DATE.search(markdown)
    if date is None:
        raise ValueError("no date")
    rows = (row["cells"].split("|") for row in _ROW.finditer(markdown))
    return date[0], [
        Figure(work.strip(), model.strip(), claim.strip(), target.strip(), float(measured))
        for work, model, claim, target, measured in rows
    ]


def measured(record: Mapping[str, Any]) -> list[Figure]:
    """The figures of a `Recorder`'s JSON."""
    return [
        Figure(work["work"], work["model"], claim["what"], claim["target"], claim["measured"])
        for work in record["works"]
        for claim in work["claims"]
    ]


def beside(bench: str, now: Iterable[Figure], before: Iterable[Figure], date: str | None) -> list[dict[str, Any]]:
    """What was measured now beside what is recorded of the same; `of recorded` is their ratio."""
    known = {figure.key: figure for figure in before}
    rows = []
    for figure in now:
        old = known.get(figure.key)
        rows.append(
            {
                "bench": bench,
                "work": figure.work,
                "claim": figure.claim,
                "target": figure.target,
                "recorded": None if old is None else old.measured,
                "on": None if old is None else date,
                "now": figure.measured,
                "of recorded": figure.measured / old.measured if old is not None and old.measured else None,
                "met": ("" if old is None else "yes → " if old.met else "no → ") + ("yes" if figure.met else "no"),
            }
        )
    return rows


def run(bench: str, options: str, folder: Path, seconds: float) -> tuple[dict[str, Any] | None, str]:
    """A benchmark in a process of its own: what it recorded, also if it was stopped, and how it ended."""
    out = folder / f"{bench}.json"
    command = [sys.executable, str(HERE / f"{bench}.py"), *shlex.split(options), "--json", str(out)]
    try:
        done = subprocess.run(command, stdout=subprocess.DEVNULL, timeout=seconds, check=False)
        ended = "" if done.returncode == 0 else f"ended with {done.returncode}"
    except subprocess.TimeoutExpired:
        ended = f"stopped after {seconds:.0f} s"
    return (json.loads(out.read_bytes()) if out.is_file() else None), ended


def as_markdown(rows: list[dict[str, Any]], notes: list[str]) -> str:
    columns = list(rows[0]) if rows else []
    lines = ["# The fast half again", ""]
    lines += [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"] if rows else []
    lines += [f"| {' | '.join(_cell(row[c]) for c in columns)} |" for row in rows]
    return "\n".join([*lines, *(line for note in notes for line in ("", note))]) + "\n"


def _cell(value: Any) -> str:
    return "–" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(BENCHES), default=list(BENCHES), metavar="NAME")
    parser.add_argument("--minutes", type=float, default=15, help="in all; what would begin later is left out")
    parser.add_argument("--options", help="of one benchmark, instead of its own, e.g. for a very short try")
    parser.add_argument("--json", type=Path, metavar="OUT")
    parser.add_argument("--markdown", type=Path, metavar="OUT")
    chosen = parser.parse_args()
    if not (0 < chosen.minutes < math.inf) or (chosen.options is not None and len(chosen.only) != 1):
        parser.error("--minutes is above 0, and --options goes with one --only")
    end = time.monotonic() + 60 * chosen.minutes
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for bench in chosen.only:
            left = end - time.monotonic()
            if left <= 0:
                notes.append(f"{bench} was not begun: {chosen.minutes:g} minutes were over.")
                continue
            print(f"== {bench}", file=sys.stderr, flush=True)
            options, start = BENCHES[bench] if chosen.options is None else chosen.options, time.monotonic()
            record, ended = run(bench, options, Path(folder), left)
            known = HERE / f"{bench}.md"
            date, figures = recorded(known.read_text()) if known.is_file() else (None, [])
            now = [] if record is None else measured(record)
            rows += beside(bench, now, figures, date)
            out = [] if record is None else [f"left out {why}" for why in record["left out"]]
            took = f"{bench} {options}: {time.monotonic() - start:.0f} s"
            notes.append("; ".join([took, *out, *([ended] if ended else [])]) + ".")
    notes.append(f"{datetime.datetime.now(datetime.UTC).date()}; recorded figures are in NAME.md beside this script.")
    text = as_markdown(rows, notes)
    print(text)
    if chosen.markdown is not None:
        write_durably(chosen.markdown, text.encode())
    if chosen.json is not None:
        write_durably(
            chosen.json, (json.dumps({"figures": rows, "notes": notes}, indent=2, ensure_ascii=False) + "\n").encode()
        )
    return 0 if rows else 1


if __name__ == "__main__":
    sys.exit(main())
