"""Telling a person how far a long task is.

A task that takes long accepts a `Progress`: a function called with (what is being done, done, total), in any unit.
`terminal()` makes one that draws bars, and draws nothing where no person is looking. A description may go on after a
colon with what changes on the way ("train: loss 3.2"): the bar is that of what stands before.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

#: Called with a description, how much is done, and how much there is to do (0: not known).
Progress = Callable[[str, float, float], None]


def silent(description: str, done: float, total: float) -> None:
    """The `Progress` that says nothing."""


@contextlib.contextmanager
def terminal(unit: str = "") -> Iterator[Progress]:
    """Bars on stderr, one per description, with rate (`unit`/s) and time left; silent if stderr is no terminal."""
    if not sys.stderr.isatty():
        yield silent
        return
    from rich.console import Console
    from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns: list[Any] = [TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%")]
    if unit:
        columns.append(TextColumn("{task.fields[rate]}"))
    columns += [TimeElapsedColumn(), TimeRemainingColumn()]
    with Bars(*columns, console=Console(stderr=True), transient=False) as bars:
        tasks: dict[str, TaskID] = {}

        def show(description: str, done: float, total: float) -> None:
            name = description.partition(": ")[0]
            task = tasks.get(name)
            if task is None:
                task = tasks[name] = bars.add_task(description, total=total or None, rate="")
            speed = bars.tasks[list(tasks).index(name)].speed
            rate = f"{speed or 0:,.0f} {unit}/s" if unit else ""
            bars.update(task, description=description, completed=done, total=total or None, rate=rate)

        yield show
