"""What makes a function a verb: an example in its help, and errors and warnings that become messages and exit codes."""

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import typer

from reprobe.cli.show import say
from reprobe.errors import ReprobeError, UsageError

P = ParamSpec("P")
R = TypeVar("R")


def verb(example: str, *, resumable: bool = False) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """End a function's help with `example`, and turn what it raises into a message and an exit code.

    `resumable`: what it has written when it is interrupted can be gone on with, by its --resume.
    """

    def guard(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                with _warnings_said():
                    return function(*args, **kwargs)
            except ReprobeError as e:
                say(f"{type(e).__name__}: {e}")
                raise typer.Exit(2 if isinstance(e, UsageError) else 1) from e
            except BrokenPipeError:  # whoever read our output has read enough
                raise
            except OSError as e:  # the disk, not the call: what could be foreseen was refused before the work
                say(f"{e.strerror or e}" + (f": {e.filename}" if e.filename is not None else ""))
                raise typer.Exit(1) from e
            except KeyboardInterrupt as e:
                say("interrupted." + (" What was completed is kept: go on with --resume." if resumable else ""))
                raise typer.Exit(130) from e

        shown = "\n".join(f"    {line}" for line in example.strip().splitlines())
        guarded.__doc__ = f"{function.__doc__}\n\n\\b\n[bold]Example[/bold]\n{shown}"
        return guarded

    return guard


@contextlib.contextmanager
def _warnings_said() -> Iterator[None]:
    """Warnings as messages, without the line of code that they come from."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        say(f"note: {message}")

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield
