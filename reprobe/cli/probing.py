"""`reprobe probe`, `compare`, `transfer` and `scan`: directions that read a store, and what they read in a text."""

from pathlib import Path
from typing import Annotated, Any

import typer

from reprobe.cli.inputs import directions_of, load_model, named_store
from reprobe.cli.options import (
    AsJson,
    Device,
    Dtype,
    Mismatch,
    Model,
    Overwrite,
    ReaderName,
    Revision,
    Store,
    ToTable,
    seed_of,
)
from reprobe.cli.outputs import new_figure, new_file, new_report, new_table, results_folder
from reprobe.cli.show import say, show_json, show_table
from reprobe.cli.verb import verb
from reprobe.errors import UsageError

Reader = Annotated[ReaderName, typer.Option(help="Which reader to train.")]
Sites = Annotated[str | None, typer.Option(help="Sites or patterns; default: all, each head by itself.")]
Label = Annotated[str, typer.Option(help="Index column to read.")]
Positive = Annotated[str | None, typer.Option(help="The label that scores above 0; default: the greater.")]
Seed = Annotated[int, seed_of("folds and bootstrap")]


@verb("reprobe probe cities.reprobe --reader logistic --to truth.grid")
def probe(
    store: Store,
    reader: Reader = "logistic",
    sites: Sites = None,
    label: Label = "label",
    positive: Positive = None,
    folds: Annotated[int, typer.Option(help="Folds of the group-safe cross-validation.")] = 5,
    seed: Seed = 0,
    to: Annotated[Path | None, typer.Option(help="Save the grid with all its directions here.")] = None,
    to_table: ToTable = None,
    to_direction: Annotated[Path | None, typer.Option(help="Save the best direction (.safetensors) here.")] = None,
    permutations: Annotated[
        int, typer.Option(help="Add p, from so many permutations: the best of all sites, labels exchanged.", min=0)
    ] = 0,
    selectivity: Annotated[
        bool, typer.Option("--selectivity", help="Add the accuracy above that on control tasks.")
    ] = False,
    types: Annotated[str, typer.Option(help="The column whose values get random labels in control tasks.")] = "group",
    mdl: Annotated[bool, typer.Option("--mdl", help="Add the length of the labels' online code, in bits.")] = False,
    top: Annotated[int, typer.Option(help="Lines to show.", min=1)] = 10,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Train one reader at every site of a store, with group-safe cross-validation."""
    from reprobe.probing import probe as run_probe
    from reprobe.probing import with_controls, write_table
    from reprobe.probing.readers import READERS
    from reprobe.progress import terminal
    from reprobe.store import ActivationStore

    for path in (to, to_direction):
        new_file(path, overwrite)
    new_table(to_table, overwrite)
    opened = ActivationStore.open(store)
    with terminal() as progress:
        grid = run_probe(
            opened,
            READERS[reader](),
            sites=sites,
            label=label,
            positive=_label(opened.index, label, positive),
            folds=folds,
            seed=seed,
            progress=progress,
        )
        if permutations or selectivity or mdl:
            grid = with_controls(
                grid,
                opened,
                READERS[reader](),
                permutations=permutations,
                selectivity=selectivity,
                types=types,
                mdl=mdl,
                progress=progress,
            )
    if grid.note:
        say(f"note: {grid.note}")
    if to is not None:
        grid.save(to, overwrite=overwrite)
    if to_direction is not None:
        grid.best().save(to_direction, overwrite=overwrite)
    if to_table is not None:
        write_table(grid.table, to_table, overwrite=overwrite)
    rows = grid.table.sort(["accuracy", "layer", "head"], descending=[True, False, False], nulls_last=True)
    show_table(rows.head(top).to_dicts(), as_json)
    if not as_json and len(grid.inner):  # two folds leave no rows to choose a site with
        chosen = grid.selected
        say(
            f"held-out accuracy of the best site, chosen on the other folds: {chosen.accuracy:.3f} "
            f"[{chosen.accuracy_low:.3f}, {chosen.accuracy_high:.3f}] (chance {chosen.chance:.2f})"
        )


@verb("reprobe compare cities.reprobe --readers mean-difference,lda,logistic --to-table readers.csv")
def compare(
    store: Store,
    readers: Annotated[
        str, typer.Option(help="Readers, separated by commas: see `reprobe probe --reader`.")
    ] = "mean-difference,lda,logistic,pca",
    sites: Sites = None,
    label: Label = "label",
    positive: Positive = None,
    folds: Annotated[int, typer.Option(help="Folds of the group-safe cross-validation, 3 at least.")] = 5,
    seed: Seed = 0,
    to: Annotated[Path | None, typer.Option(help="Save all grids and probabilities in one file here.")] = None,
    to_table: ToTable = None,
    out: Annotated[Path | None, typer.Option(help="Put the comparison and its HTML report in this folder.")] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Train several readers at every site of a store, in the same folds: which reads better, and is that sure?"""
    from reprobe.probing import compare as run_compare
    from reprobe.probing import readers_named, write_table
    from reprobe.progress import terminal
    from reprobe.report import comparison_path, write_report
    from reprobe.report.page import REPORT
    from reprobe.store import ActivationStore

    named = readers_named(readers)
    name = Path(store.rstrip("/")).stem
    in_folder = None if out is None else comparison_path(out, name)
    results_folder(out)
    for path in (to, in_folder):
        new_file(path, overwrite)
    new_report(None if out is None else out / REPORT)
    new_table(to_table, overwrite)
    opened = ActivationStore.open(store)
    with terminal() as progress:
        found = run_compare(
            opened,
            named,
            sites=sites,
            label=label,
            positive=_label(opened.index, label, positive),
            folds=folds,
            seed=seed,
            progress=progress,
        )
    if found.first.note:
        say(f"note: {found.first.note}")
    for path in (to, in_folder):
        if path is not None:
            found.save(path, overwrite=overwrite)
    if to_table is not None:
        write_table(found.table, to_table, overwrite=overwrite)
    if out is not None:
        say(f"the report: {write_report(out, stores={name: opened}, say=say)}")
    if as_json:
        show_json({what: getattr(found, what).to_dicts() for what in ("table", "choices", "differences")})
        return
    shown = ["reader", "sites", "accuracy", "accuracy_low", "accuracy_high", "auroc", "recall", "ece"]
    say(f"held out, sites chosen on the other folds (chance {found.choices['chance'][0]:.2f}):")
    show_table(found.choices.select(shown).to_dicts())
    if len(found.differences):
        say("one reader less the other, on the same rows:")
        show_table(found.differences.to_dicts())


@verb("reprobe transfer cities.reprobe neg_cities.reprobe --reader lda --sites 'resid.post@8:20' --to-table t.json")
def transfer(
    stores: Annotated[list[str], typer.Argument(help="Two stores or more, each as PATH or NAME=PATH.")],
    reader: Reader = "mean-difference",
    sites: Annotated[str | None, typer.Option(help="Sites or patterns; default: all that every store holds.")] = None,
    label: Label = "label",
    positive: Positive = None,
    transductive: Annotated[
        bool, typer.Option("--transductive", help="Also centre each data set by its own mean, the tested one included.")
    ] = False,
    folds: Annotated[int, typer.Option(help="Folds wherever train and test share groups.")] = 5,
    seed: Seed = 0,
    to_table: Annotated[
        Path | None, typer.Option(help="Save the table here (.csv, .parquet; .json also says of what it is).")
    ] = None,
    figure: Annotated[Path | None, typer.Option(help="Draw the matrix here (.svg, .png, .pdf).")] = None,
    at: Annotated[
        str | None, typer.Option(help="The site shown and drawn; default: the best where train and test are the same.")
    ] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Train one reader on each store, test it on each: what is read here, does it hold there?"""
    from reprobe.probing import transfer as run_transfer
    from reprobe.probing.readers import READERS
    from reprobe.progress import terminal
    from reprobe.report import transfer_map
    from reprobe.report.transfer import best_on_the_diagonal
    from reprobe.store import ActivationStore

    new_figure(figure, overwrite)
    new_table(to_table, overwrite)
    named = [named_store(text) for text in stores]
    opened = {name: ActivationStore.open(path) for name, path in named}
    if len(opened) < len(named):
        raise UsageError("two stores have the same name: tell them apart with NAME=PATH")
    with terminal() as progress:
        grid = run_transfer(
            opened,
            READERS[reader](),
            sites=sites,
            label=label,
            positive=_label(next(iter(opened.values())).index, label, positive),
            transductive=transductive,
            folds=folds,
            seed=seed,
            progress=progress,
        )
    for name, note in grid.notes.items():
        if note:
            say(f"note on {name}: {note}")
    if to_table is not None:
        grid.save(to_table, overwrite=overwrite)
    if figure is not None:
        figure.parent.mkdir(parents=True, exist_ok=True)
        transfer_map(grid, at).savefig(figure)
    place = at or best_on_the_diagonal(grid)
    shown = ["train", "test", "site", "centring", "left_out", "n", "accuracy", "accuracy_low", "accuracy_high", "auroc"]
    grid.matrix(place)  # says which sites there are if this is none
    rows = grid.table.filter(grid.table["site"] == place).to_dicts()
    show_table(grid.table.to_dicts() if as_json else [{c: row[c] for c in shown} for row in rows], as_json)


@verb('reprobe scan smollm2-135m "Paris is in France. Paris is in Peru." --grid truth.grid')
def scan(
    model: Model,
    text: Annotated[str, typer.Argument(help="The text to read.")],
    grid: Annotated[Path, typer.Option(help="A grid saved by `reprobe probe --to`.")],
    part: Annotated[str, typer.Option(help="Which of the grid's parts to read.")] = "resid.post",
    to: Annotated[Path | None, typer.Option(help="Save the scan (.json) here, for `reprobe report`.")] = None,
    figure: Annotated[Path | None, typer.Option(help="Draw the token × layer map here (.svg, .png, .pdf).")] = None,
    dtype: Dtype = None,
    device: Device = None,
    revision: Revision = None,
    allow_mismatch: Mismatch = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Read every token of a text at every layer with stored directions (LAT scan)."""
    from reprobe.methods import repe
    from reprobe.probing import ProbeGrid

    new_file(to, overwrite)
    new_figure(figure, overwrite)
    directions = directions_of(ProbeGrid.load(grid), part, str(grid))
    lm = load_model(model, dtype=dtype, device=device, revision=revision)
    result = repe.scan(lm, text, directions, allow_mismatch=allow_mismatch)
    if to is not None:
        from reprobe.report import ScanResult, save_scan

        save_scan(to, ScanResult(result, text, grid.stem, lm.identity))
    if figure is not None:
        from reprobe.report import scan_map

        figure.parent.mkdir(parents=True, exist_ok=True)
        scan_map(result).savefig(figure)
    rows = [
        {"token": token, **{str(s): round(float(v), 3) for s, v in zip(result.sites, column, strict=True)}}
        for token, column in zip(result.tokens, result.scores.T, strict=True)
    ]
    if as_json:
        show_json(rows)
        return
    step = max(1, len(result.sites) // 8)
    keep = {"token", *(str(s) for s in result.sites[::step])}
    show_table([{k: v for k, v in row.items() if k in keep} for row in rows])


def _label(index: Any, column: str, text: str | None) -> Any:
    """A label as it stands in the index: typed text is a string, a label may be a number."""
    if text is None or column not in index.columns:
        return text
    return next((value for value in index[column].unique() if str(value) == text), text)
