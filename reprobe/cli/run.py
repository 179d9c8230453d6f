"""`reprobe run`: a whole study from one file."""

from pathlib import Path
from typing import Annotated

import typer

from reprobe.cli.inputs import quiet_libraries
from reprobe.cli.options import AsJson, Device
from reprobe.cli.outputs import results_folder
from reprobe.cli.show import say, show_json
from reprobe.cli.verb import verb


@verb("reprobe run mood\nreprobe run study.toml --out study --resume", resumable=True)
def run(
    recipe: Annotated[str, typer.Argument(help="A recipe (.toml), or the name of a bundled one: mood.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder for the results; default: named like the recipe, here.")
    ] = None,
    device: Device = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the recipe and say what would run; write nothing.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Verify the steps that are finished, and go on with the others.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Run a recipe: extract, probe, steer, evaluate, report, with a digest of recipe, model and data.

    The recipe is copied into the results. A second run with the same digest has the same results. Data and models that
    it names are looked for beside it.
    """
    from reprobe.cli import recipe as recipes

    read = recipes.read(recipes.find(recipe))
    if dry_run:
        steps = [str(step) for step in read.steps]
        if as_json:
            show_json({"title": read.title, "digest": read.digest, "steps": steps})
        else:
            typer.echo(f"{read.title}: {', '.join(steps)}; digest {read.digest[:12]}")
        return
    folder = Path(read.path.stem) if out is None else out
    results_folder(folder)
    from reprobe.cli.recipe_steps import run as run_recipe
    from reprobe.progress import terminal

    quiet_libraries()
    with terminal() as progress:
        done = run_recipe(read, folder, device=device, resume=resume, progress=progress, say=say)
    if as_json:
        told = {"folder": str(done.folder), "digest": done.digest, "results": done.results, "report": str(done.report)}
        show_json(told | {"summary": done.summary})
        return
    for line in (*done.summary, f"digest {done.digest[:12]}, results {done.results[:12]}; the report: {done.report}"):
        typer.echo(line)
