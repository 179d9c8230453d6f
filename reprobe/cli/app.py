"""The `reprobe` command: its verbs, in the order of its help.

Exit codes: 0 done, 1 failed, 2 called wrongly, 130 interrupted. Results go to stdout, bars and messages to stderr.
"""

import importlib.metadata
import os
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from reprobe.cli.bake import bake
from reprobe.cli.data import data_app
from reprobe.cli.dissect import dissect
from reprobe.cli.doctor import doctor
from reprobe.cli.edit import edit_app
from reprobe.cli.evaluate import evaluate_app
from reprobe.cli.extract import extract, import_app
from reprobe.cli.lorra import lorra
from reprobe.cli.probing import compare, probe, scan, transfer
from reprobe.cli.report import demo, report
from reprobe.cli.run import run
from reprobe.cli.sharing import export, pull, push
from reprobe.cli.steer import steer_app
from reprobe.cli.store import info, verify
from reprobe.cli.trace import trace

VERBS: tuple[Callable[..., None], ...] = (
    demo,
    doctor,
    extract,
    info,
    verify,
    probe,
    compare,
    transfer,
    scan,
    trace,
    dissect,
    lorra,
    bake,
    export,
    push,
    pull,
    report,
    run,
)
#: Verbs with verbs of their own.
GROUPS = (data_app, import_app, evaluate_app, steer_app, edit_app)

app = typer.Typer(
    name="reprobe",
    help="Extract hidden states once, probe them offline, control anywhere, and prove it is the same activation.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(importlib.metadata.version("reprobe-lm"))
        raise typer.Exit


@app.callback()
def _reprobe(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


for function in VERBS:
    app.command()(function)
for group in GROUPS:
    app.add_typer(group)


def main() -> None:
    """The `reprobe` console script."""
    if not sys.stderr.isatty():  # our own bars know that; those of the hub's libraries are told
        for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
            os.environ.setdefault(name, "1")
    app()
