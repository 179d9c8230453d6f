"""`reprobe demo` and `reprobe report`: a folder of results, and the page that is drawn of it."""

from pathlib import Path
from typing import Annotated

import typer

from reprobe.cli.inputs import named_store, quiet_libraries
from reprobe.cli.options import AsJson, Overwrite
from reprobe.cli.outputs import new_report, results_folder
from reprobe.cli.show import say, show_json, show_saved
from reprobe.cli.verb import verb


@verb("reprobe demo --out reprobe-demo")
def demo(
    out: Annotated[Path, typer.Option(help="Folder for stores, probes and the report.")] = Path("reprobe-demo"),
    model: Annotated[str, typer.Option(help="Any model; the texts are made for small English ones.")] = "smollm2-135m",
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Find, plot and use a language model's truth and mood directions (3 minutes on 2 cores)."""
    quiet_libraries()  # before they are imported: matplotlib says at once that a home is read-only
    from reprobe.cli.demo import run_demo
    from reprobe.progress import terminal
    from reprobe.report.page import REPORT

    results_folder(out)
    new_report(out / REPORT)
    with terminal() as progress:
        summary, page = run_demo(out, model=model, overwrite=overwrite, progress=progress, say=say)
    if as_json:
        show_json({"summary": summary, "report": str(page)})
    else:
        typer.echo("\n".join([*summary, f"The report: {page}"]))


@verb("reprobe report reprobe-demo")
def report(
    folder: Annotated[
        Path, typer.Argument(help="A folder with what verbs saved: stores, grids, traces, edits, tables …")
    ],
    to: Annotated[
        Path | None, typer.Option(help="The HTML file, in place of an older; default: report.html in the folder.")
    ] = None,
    store: Annotated[
        list[str] | None, typer.Option(help="A store that lies elsewhere, whose rows are to be drawn; may be repeated.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Join all results in a folder in one self-contained HTML page.

    Artifacts are found by what they are, wherever they lie in the folder. Damaged ones are named on the page and here.
    """
    from reprobe.report import write_report
    from reprobe.store import ActivationStore

    new_report(to)
    stores = {name: ActivationStore.open(path) for name, path in map(named_store, store or ())}
    show_saved(write_report(folder, to, stores=stores, say=say), as_json)
