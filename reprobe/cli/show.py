"""What a verb tells: results on stdout, as JSON or for reading, and messages on stderr.

Does not know where the values come from.
"""

import contextlib
import json
import math
import sys
from typing import Any

import typer


def say(message: str) -> None:
    """A message, which is no result: on stderr."""
    typer.echo(message, err=True)


def show_json(result: Any) -> None:
    """A result as JSON. What JSON does not know becomes text; NaN and infinities, which it does not know, null."""
    typer.echo(json.dumps(_finite(result), indent=2, ensure_ascii=False, default=str, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def show(values: dict[str, Any], as_json: bool = False) -> None:
    """A result of named values, a line each, or as JSON."""
    if as_json:
        show_json(values)
        return
    width = max(map(len, values), default=0)
    for key, value in values.items():
        typer.echo(f"{key:<{width}}  {value}")


def show_saved(what: Any, as_json: bool = False) -> None:
    """Where something was put, and nothing else: a line that a shell can use."""
    if as_json:
        show_json({"saved": str(what)})
    else:
        typer.echo(what)


def show_table(rows: list[dict[str, Any]], as_json: bool = False) -> None:
    """A result of rows that have the same columns, as a table, or as JSON."""
    if as_json:
        show_json(rows)
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for key in rows[0] if rows else ():
        table.add_column(key, overflow="fold")
    for row in rows:
        table.add_row(*(f"{v:.3f}" if isinstance(v, float) else "" if v is None else str(v) for v in row.values()))
    # A pipe has no width: give it one, or the lines would be folded to 80 columns.
    console = Console() if sys.stdout.isatty() else Console(width=200)
    with contextlib.suppress(BrokenPipeError):
        console.print(table)


def counts_text(values: Any) -> str:
    """A mapping on one line: cat: 3, none: 2."""
    return ", ".join(f"{'none' if k is None else k}: {'none' if n is None else n}" for k, n in values.items())


def bytes_text(n: float) -> str:
    """A number of bytes in the unit that keeps it below 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} TB"
