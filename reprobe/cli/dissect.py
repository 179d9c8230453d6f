"""The verb `reprobe dissect`: which concept each unit detects, and what the detectors cause."""

from pathlib import Path
from typing import Annotated, Any

import typer

from reprobe.cli.inputs import load_model
from reprobe.cli.options import AsJson, Device, Dtype, Model, Overwrite, Revision, ToTable, seed_of
from reprobe.cli.outputs import new_file, new_report, new_table
from reprobe.cli.show import say, show_json, show_table
from reprobe.cli.verb import verb
from reprobe.errors import UsageError

#: The stream that is no data set but text that the model writes itself.
_SAMPLE = "sample"


@verb("reprobe dissect smollm2-135m sample --tokens 60000 --drop-absent --to neurons.safetensors --report neurons.html")
def dissect(
    model: Model,
    stream: Annotated[
        str, typer.Argument(help="Text: a data set, .txt, .jsonl/.csv/.parquet, hf:NAME; or sample: the model's own.")
    ],
    to: Annotated[Path, typer.Option(help="The dissection to write (.safetensors).")],
    concepts: Annotated[
        str | None, typer.Option(help="Ready ones: names, kind:KIND, comma-separated, or none; default: all.")
    ] = None,
    words: Annotated[list[str] | None, typer.Option(help="A concept of words: NAME=one,two. Repeatable.")] = None,
    regex: Annotated[list[str] | None, typer.Option(help="A concept of matches: NAME=PATTERN. Repeatable.")] = None,
    span: Annotated[
        list[str] | None, typer.Option(help="A concept of prompts' spans of this name. Repeatable.")
    ] = None,
    label: Annotated[list[str] | None, typer.Option(help="A concept of prompts with this label. Repeatable.")] = None,
    sites: Annotated[str, typer.Option(help="Whose coordinates are the units: sites or patterns.")] = "mlp.neurons@*",
    quantile: Annotated[float, typer.Option(help="Share of tokens at a unit's top.")] = 0.005,
    detector: Annotated[float, typer.Option(help="IoU above which a unit detects a concept.")] = 0.04,
    permutations: Annotated[int, typer.Option(help="Rotations of the concepts for the null.", min=0)] = 20,
    drop_absent: Annotated[
        bool, typer.Option("--drop-absent", help="Leave out concepts that never or always occur.")
    ] = False,
    tokens: Annotated[int | None, typer.Option(help="Only the first N tokens; of sample: how many.")] = None,
    window: Annotated[int, typer.Option(help="Tokens of a row.")] = 128,
    causes: Annotated[
        bool, typer.Option("--causes", help="Also clamp and ablate the detectors of each concept (minutes).")
    ] = False,
    report: Annotated[Path | None, typer.Option(help="Draw an HTML report to browse, in place of an older.")] = None,
    to_table: ToTable = None,
    seed: Annotated[int, seed_of("the sample, the rotations and the controls")] = 0,
    dtype: Dtype = None,
    device: Device = None,
    revision: Revision = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Ask every neuron which concept it detects: the overlap of its highest tokens with the concept's, and by chance.

    Prints one line per concept; --to-table saves one per unit.
    """
    from reprobe.evaluation import causes as measure
    from reprobe.methods.dissection import dissect as run
    from reprobe.methods.moments import TOKENS, Sample
    from reprobe.probing import write_table
    from reprobe.progress import terminal
    from reprobe.report import write_dissection

    new_file(to, overwrite)
    new_report(report)
    new_table(to_table, overwrite)
    wanted = _concepts(concepts, words or [], regex or [], span or [], label or [])
    lm = load_model(model, dtype=dtype, device=device, revision=revision)
    source: Any = Sample(tokens or TOKENS, seed) if stream == _SAMPLE else stream
    with terminal() as progress:
        found = run(
            lm,
            source,
            wanted,
            sites,
            quantile=quantile,
            detector=detector,
            permutations=permutations,
            absent="drop" if drop_absent else "raise",
            tokens=tokens,
            window=window,
            seed=seed,
            progress=progress,
        )
        found.save(to, overwrite=overwrite)
        caused = measure(lm, found, seed=seed, progress=progress) if causes else None
    if to_table is not None:
        write_table(found.units, to_table, overwrite=overwrite)
    if report is not None:
        write_dissection(found, report, causation=caused)
    units, chance = found.units, found.chance
    by_chance = "" if not chance.height else f" ({chance['detectors'].to_numpy().mean():.1f} by chance)"
    gone = f"; left out: {', '.join(found.dropped)}" if found.dropped else ""
    say(
        f"{to}: {found.n:,} units on {found.stream.n:,} tokens, {units['detector'].sum():,} detectors{by_chance} of "
        f"{len(found.names)} concepts{gone}"
    )
    shown = found.concepts.sort("detectors", "best_iou", descending=True).drop("about", "share").to_dicts()
    caused_rows = None if caused is None else caused.summary.to_dicts()
    if as_json:
        show_json({"concepts": shown, "causes": caused_rows})
        return
    show_table(shown)
    if caused_rows is not None:
        show_table(caused_rows)


def _concepts(ready: str | None, words: list[str], regex: list[str], span: list[str], label: list[str]) -> Any:
    """The concepts that were asked for: all ready ones if none was."""
    from reprobe.methods import concepts
    from reprobe.methods.concepts import Concept

    own = [Concept.words(name, said.split(",")) for name, said in (_named(w, "--words") for w in words)]
    own += [Concept.regex(name, said) for name, said in (_named(r, "--regex") for r in regex)]
    own += [Concept.span(name) for name in span]
    own += [Concept.label(f"label {value}", int(value) if value.lstrip("-").isdecimal() else value) for value in label]
    if ready == "none" or (ready is None and own):
        return own
    return [*concepts.ready(ready), *own]


def _named(text: str, option: str) -> tuple[str, str]:
    name, equals, said = text.partition("=")
    if not (name and equals and said):
        raise UsageError(f"{option} {text}: write NAME=…")
    return name, said
