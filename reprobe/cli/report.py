"""`reprobe demo` and `reprobe report`: a folder of results, and the page that is drawn of it."""

from pathlib import Path
from typing import Annotated

import typer

from reprobe.cli.inputs import named_store, quiet_libraries
from reprobe.cli.options import Overwrite
from reprobe.cli.show import say
from reprobe.cli.verb import verb


@verb("reprobe demo --out reprobe-demo")
def demo(
    out: Annotated[Path, typer.Option(help="Folder for stores, probes and the report.")] = Path("reprobe-demo"),
    model: Annotated[str, typer.Option(help="Any model; the texts are made for small English ones.")] = "smollm2-135m",
    overwrite: Overwrite = False,
) -> None:
    """Find, plot and use a language model's truth and sentiment directions (3 minutes on 2 cores)."""
    from reprobe.cli.demo import run_demo
    from reprobe.progress import terminal

    quiet_libraries()
    with terminal() as progress:
        summary = run_demo(out, model=model, overwrite=overwrite, progress=progress, say=say)
    typer.echo(summary)


@verb("reprobe report reprobe-demo")
def report(
    folder: Annotated[Path, typer.Argument(help="A folder with results, as `reprobe demo` makes it.")],
    to: Annotated[Path | None, typer.Option(help="The HTML file; default: report.html in the folder.")] = None,
    store: Annotated[
        list[str] | None, typer.Option(help="A store that lies elsewhere, whose rows are to be drawn; may be repeated.")
    ] = None,
) -> None:
    """Draw the self-contained HTML report of a folder of results."""
    from reprobe.report import write_report
    from reprobe.store import ActivationStore

    stores = {name: ActivationStore.open(path) for name, path in map(named_store, store or ())}
    typer.echo(write_report(folder, to, stores=stores))
