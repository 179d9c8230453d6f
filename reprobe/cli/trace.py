"""The verb `reprobe trace`: which states carry facts to their answers."""

from pathlib import Path
from typing import Annotated, Any, Literal, cast

import typer

from reprobe.cli.inputs import load_model, parse_layers
from reprobe.cli.options import AsJson, Device, Dtype, Model, Overwrite, Revision, ToTable, first_of, seed_of
from reprobe.cli.outputs import new_file, new_folder, new_table
from reprobe.cli.show import say, show, show_table
from reprobe.cli.verb import verb
from reprobe.errors import UsageError


@verb(
    'reprobe trace smollm2-135m --subject "Eiffel Tower" --prompt "The {} is located in the city of" --target Paris '
    "--figures traced\nreprobe trace smollm2-135m facts --unknown drop --limit 20 --to facts.trace --figures traced"
)
def trace(
    model: Model,
    facts: Annotated[
        str | None,
        typer.Argument(help="Data set of facts: bundled `facts`, or a file such as known_1000.json; or give one fact."),
    ] = None,
    subject: Annotated[str | None, typer.Option(help="Of one fact: what it is about.")] = None,
    prompt: Annotated[
        str | None, typer.Option(help="Of one fact: a text that stops where the object begins; {} is the subject.")
    ] = None,
    target: Annotated[str | None, typer.Option(help="Of one fact: its true object.")] = None,
    unknown: Annotated[
        Literal["refuse", "drop", "keep"], typer.Option(help="What becomes of facts that the model does not know.")
    ] = "refuse",
    limit: Annotated[int | None, first_of("facts (with --unknown drop: of the known)")] = None,
    kinds: Annotated[str, typer.Option(help="What is restored, comma-separated.")] = "resid.post,attn.out,mlp.out",
    layers: Annotated[str | None, typer.Option(help="Blocks, e.g. 3,4,5 or 3-10; default: all.")] = None,
    window: Annotated[int, typer.Option(help="Blocks at which attn.out and mlp.out are restored together.")] = 10,
    samples: Annotated[int, typer.Option(help="Draws of noise.")] = 10,
    noise: Annotated[float, typer.Option(help="Noise in standard deviations of the subjects' embeddings.")] = 3.0,
    seed: Annotated[int, seed_of("the noise")] = 0,
    to: Annotated[Path | None, typer.Option(help="Save the trace (.safetensors) here.")] = None,
    to_table: ToTable = None,
    figures: Annotated[
        Path | None, typer.Option(help="A folder for figures: a map of the first facts, and the curves by role.")
    ] = None,
    maps: Annotated[int, typer.Option(help="With --figures: of so many facts a map.", min=0)] = 3,
    dtype: Dtype = None,
    device: Device = None,
    revision: Revision = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Corrupt the subject, restore one state, and see whether the model says the object again.

    Prints, for each kind and role of a token, at which block restoring has its greatest effect.
    """
    from reprobe.methods import tracing
    from reprobe.methods.tracing import Settings
    from reprobe.probing import write_table
    from reprobe.progress import terminal
    from reprobe.prompts import Fact, facts_of

    one = (subject, prompt, target)
    if (facts is None) == (None in one) or (facts is not None and any(one)):
        raise UsageError("give a data set of facts, or one fact by --subject, --prompt and --target")
    blocks = parse_layers(layers)
    how = Settings(
        noise=noise,
        samples=samples,
        window=window,
        kinds=cast(Any, tuple(kind.strip() for kind in kinds.split(","))),  # checked there
        layers=None if blocks is None else tuple(blocks),
        seed=seed,
    )
    new_file(to, overwrite)
    new_table(to_table, overwrite)
    new_folder(figures, overwrite)
    if facts is None:
        given = [Fact.of(subject=subject or "", prompt=prompt or "", true=target)]
    else:
        given = facts_of(facts, limit=None if unknown == "drop" else limit)
    lm = load_model(model, dtype=dtype, device=device, revision=revision)
    if unknown == "drop":
        given = tracing.known(lm, given, limit=limit)
        if not given:
            raise UsageError(f"{lm.name} knows none of these facts; --unknown keep traces them all the same")
    with terminal() as progress:
        grid = tracing.trace(
            lm, given, settings=how, unknown="keep" if unknown == "keep" else "refuse", progress=progress
        )
    if to is not None:
        grid.save(to, overwrite=overwrite)
    if to_table is not None:
        write_table(grid.table, to_table, overwrite=overwrite)
    if figures is not None:
        _draw(grid, figures, maps)
    totals = {row["measure"]: row for row in grid.totals.to_dicts()}
    if as_json:
        show({"facts": grid.facts.to_dicts(), "totals": totals, "peaks": grid.peaks, "std": grid.std}, True)
        return
    show_table(grid.peaks)
    mean = {name: f"{row['mean']:.3f}" for name, row in totals.items()}
    say(
        f"{len(grid.traces)} facts: p(object) {mean['clean']} clean, {mean['corrupted']} corrupted, total effect "
        f"{mean['total_effect']}" + (f"; figures in {figures}" if figures is not None else "")
    )


def _draw(grid: Any, folder: Path, maps: int) -> None:
    from reprobe.report import trace_curves, trace_map

    folder.mkdir(parents=True, exist_ok=True)
    for i in range(min(maps, len(grid.traces))):
        trace_map(grid, i).savefig(folder / f"fact-{i}.svg")
    trace_curves(grid).savefig(folder / "curves.svg")
