"""The verbs of `reprobe edit`: facts written into weights, taken out, counted and scored."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from reprobe.cli.inputs import load_model, parse_layers
from reprobe.cli.options import (
    AsJson,
    Data,
    Device,
    Dtype,
    Mismatch,
    Model,
    Overwrite,
    Revision,
    SampleSeed,
    ToTable,
    first_of,
)
from reprobe.cli.outputs import new_file, new_folder, new_table
from reprobe.cli.show import say, show, show_json, show_table
from reprobe.cli.verb import verb
from reprobe.errors import UsageError

edit_app = typer.Typer(
    name="edit",
    help="Facts written into weights: ROME, MEMIT, one after another; apply, revert, list, eval.",
    no_args_is_help=True,
)

Text = Annotated[
    str | None,
    typer.Option(help="Ordinary text for the second moments: .txt, a data set file, hf:NAME; default: sampled."),
]
#: What `methods.editing` says of edits without effect.
NO_EFFECT = ".* edits have no effect"
#: Tokens of the second moments' text: `methods.moments.TOKENS`, which is not imported for a --help.
TOKENS = 40_000
Tokens = Annotated[int, typer.Option(help="Tokens that the second moments are taken of, at most.", min=1)]
Limit = Annotated[int | None, first_of("facts")]
Layers = Annotated[str | None, typer.Option(help="Blocks, e.g. 6,7,8 or 6-10; default: those known for the model.")]
NullSpace = Annotated[
    bool, typer.Option("--null-space", help="MEMIT in AlphaEdit's null space: write only where ordinary text does not.")
]
Weight = Annotated[
    float | None,
    typer.Option(help="MEMIT's λ: how much ordinary text counts against the facts; default: the MLP's width."),
]


@edit_app.command("rome")
@verb(
    'reprobe edit rome smollm2-135m --subject "Eiffel Tower" --prompt "The {} is in the city of" --target Rome '
    "--to tower.safetensors"
)
def edit_rome(
    model: Model,
    subject: Annotated[str, typer.Option(help="What the fact is about.")],
    prompt: Annotated[str, typer.Option(help="A text that stops where the object begins; {} is the subject.")],
    target: Annotated[str, typer.Option(help="The new object.")],
    to: Annotated[Path, typer.Option(help="The edit to write (.safetensors).")],
    layer: Annotated[int | None, typer.Option(help="Block to edit; default: the one known for the model.")] = None,
    original: Annotated[
        bool, typer.Option("--original", help="The published form instead of r-ROME (see reprobe.methods.rome).")
    ] = False,
    text: Text = None,
    tokens: Tokens = TOKENS,
    dtype: Dtype = None,
    device: Device = None,
    revision: Revision = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Make the edit that writes one fact, and say what it does. The model stays as it is: see `reprobe edit apply`."""
    from reprobe.methods import rome
    from reprobe.progress import terminal

    new_file(to, overwrite)
    lm = load_model(model, dtype=dtype, device=device, revision=revision)
    with terminal() as progress:
        edit = rome.edit(
            lm,
            subject=subject,
            prompt=prompt,
            target=target,
            layer=layer,
            moment=_text(text, tokens),
            settings=rome.Settings(compat="rome" if original else None),
            progress=progress,
        )
    edit.save(to, overwrite=overwrite)
    show(_told(edit) | {"saved": str(to)}, as_json)


@edit_app.command("memit")
@verb("reprobe edit memit smollm2-135m facts --limit 20 --to edits")
def edit_memit(
    model: Model,
    data: Data,
    to: Annotated[Path, typer.Option(help="A new folder for the edits, one file a block.")],
    layers: Layers = None,
    limit: Limit = None,
    null_space: NullSpace = False,
    weight: Weight = None,
    text: Text = None,
    tokens: Tokens = TOKENS,
    dtype: Dtype = None,
    device: Device = None,
    revision: Revision = None,
    as_json: AsJson = False,
) -> None:
    """Make the edits that write many facts at once, and say how many of them hold."""
    from reprobe.control import save_edits
    from reprobe.methods import memit
    from reprobe.progress import terminal
    from reprobe.prompts import facts_of

    new_folder(to)
    how, chosen = _memit(null_space, weight), parse_layers(layers)
    facts, source = facts_of(data, limit=limit), _text(text, tokens)
    lm = load_model(model, dtype=dtype, device=device, revision=revision)
    with terminal() as progress:
        edits = memit.edit(lm, facts, layers=chosen, moments=source, settings=how, progress=progress)
    save_edits(edits, to)
    effects = edits[0].effects
    show(
        {
            "facts": len(facts),
            "with an effect": sum(e.found for e in effects),
            "probability before": sum(e.before for e in effects) / len(effects),
            "probability after": sum(e.after for e in effects) / len(effects),
            "edits": [_told(e) for e in edits] if as_json else ", ".join(map(_matrix, edits)),
            "saved": str(to),
        },
        as_json,
    )


@edit_app.command("sequential")
@verb("reprobe edit sequential smollm2-135m facts --limit 50 --at-most 1.5 --to edits")
def edit_sequential(
    model: Model,
    data: Data,
    to: Annotated[Path, typer.Option(help="A new folder for the edits, one file a fact, in their order.")],
    at_most: Annotated[
        float, typer.Option(help="Stop when the perplexity is more than this many times what it was at first.")
    ] = 2.0,
    every: Annotated[int, typer.Option(help="Facts between two measurements of the perplexity.", min=1)] = 10,
    perplexity: Annotated[
        str, typer.Option(help="Ordinary text whose perplexity is measured: .txt, a data set, hf:NAME.")
    ] = "emotions",
    limit: Limit = None,
    layer: Annotated[int | None, typer.Option(help="Block to edit; default: the one known for the model.")] = None,
    original: Annotated[bool, typer.Option("--original", help="ROME as published instead of r-ROME.")] = False,
    text: Text = None,
    tokens: Tokens = TOKENS,
    dtype: Dtype = None,
    device: Device = None,
    revision: Revision = None,
    as_json: AsJson = False,
) -> None:
    """Write facts one after another with ROME, and stop before the model collapses."""
    import warnings

    from reprobe.control import save_edits
    from reprobe.methods import editing, rome
    from reprobe.methods.moments import Corpus, second_moments
    from reprobe.methods.sequential import Guard, sequential
    from reprobe.progress import terminal
    from reprobe.prompts import facts_of

    new_folder(to)
    facts = facts_of(data, limit=limit)
    guard = Guard(Corpus.load(perplexity).texts, at_most, every)
    lm = load_model(model, dtype=dtype, device=device, revision=revision)
    where = editing.default_layers(lm).rome if layer is None else layer
    form = rome.Settings(compat="rome" if original else None)
    with terminal() as progress, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=NO_EFFECT)  # what has no effect is counted
        moment = second_moments(lm, [where], _text(text, tokens), progress=progress)[where]

        def make(lm: Any, fact: Any) -> Any:
            return rome.edit(lm, fact, layer=where, moment=moment, settings=form)

        run = sequential(lm, facts, make, guard, progress=progress)
        kept = [edits[0].facts[0] for edits in run.edits]
        hold = [float(p) for p in editing.probabilities(lm, kept)] if kept else []
    if kept:
        save_edits([edit for edits in run.edits for edit in edits], to)
    first = [edits[0].effects[0].before for edits in run.edits]
    told = {
        "facts": len(facts),
        "written": len(kept),
        "stopped": run.stopped,
        "perplexity": [[c.facts, c.perplexity] for c in run.checked],
        "probability before": sum(first) / len(kept) if kept else None,
        "probability after all": sum(hold) / len(kept) if kept else None,
        "saved": str(to) if kept else None,
    }
    if as_json:
        show_json(told)
        return
    read = ", ".join(f"{c.perplexity:.4g} after {c.facts}" for c in run.checked)
    show(told | {"stopped": run.stopped or "no", "perplexity": read, "saved": told["saved"] or "nothing"})


@edit_app.command("apply")
@verb("reprobe edit apply smollm2-135m tower.safetensors --to edited-model")
def edit_apply(
    model: Annotated[str, typer.Argument(help="The model the edits are for, or one that `edit apply` wrote.")],
    edits: Annotated[list[Path], typer.Argument(help="Edits (.safetensors), or folders of them.")],
    to: Annotated[Path, typer.Option(help="The folder to write: a transformers model that remembers its edits.")],
    originals: Annotated[
        bool, typer.Option(help="Keep the edited matrices as they were, so that reverting is exact.")
    ] = True,
    dtype: Dtype = None,
    device: Device = None,
    revision: Revision = None,
    allow_mismatch: Mismatch = False,
    as_json: AsJson = False,
) -> None:
    """Put edits into a model and save it. Raises on edits of another model."""
    from reprobe.control import apply_edits, edits_in, export_edited

    new_folder(to)
    found = [edit for path in edits for edit in edits_in(path)]
    lm = _open(model, dtype=dtype, device=device, revision=revision)
    ledger = apply_edits(lm, found, allow_mismatch=allow_mismatch)
    export_edited(lm, to, originals=originals)
    say(f"{to}: {lm.name} with {len(ledger.applied)} edits; take them out with `reprobe edit revert {to}`")
    if as_json:
        show_json({"saved": str(to), "edits": [edit.digest for edit in ledger.applied]})


@edit_app.command("revert")
@verb("reprobe edit revert edited-model --edit 3f2a --to model-again")
def edit_revert(
    model: Annotated[Path, typer.Argument(help="A folder that `reprobe edit apply` wrote.")],
    to: Annotated[Path, typer.Option(help="The folder to write.")],
    edit: Annotated[
        list[str] | None, typer.Option(help="First letters of an edit's digest (see `list`); default: all edits.")
    ] = None,
    dtype: Dtype = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Take edits out of a saved model, in any order, and save what is left."""
    from reprobe.control import export_edited, ledger_of, load_edited

    new_folder(to)
    lm = load_edited(model, dtype=dtype, device=device)
    ledger = ledger_of(lm)
    ledger.revert(edit or None)
    export_edited(lm, to)
    say(f"{to}: {len(ledger.applied)} edits left")
    if as_json:
        show_json({"saved": str(to), "edits": [edit.digest for edit in ledger.applied]})


@edit_app.command("list")
@verb("reprobe edit list edited-model")
def edit_list(
    paths: Annotated[list[Path], typer.Argument(help="Edits, folders of edits, or models that `edit apply` wrote.")],
    as_json: AsJson = False,
) -> None:
    """Show edits: what they write, where, and what was measured."""
    from reprobe.control import edits_in

    found = [edit for path in paths for edit in edits_in(path)]
    if as_json:
        show_json([_told(e) | {"provenance": dict(e.provenance), "base": e.base.to_json()} for e in found])
        return
    show_table([{k: v for k, v in _told(e).items() if k != "parameter"} for e in found])


@edit_app.command("moments")
@verb("reprobe edit moments smollm2-135m --layers 5-10")
def edit_moments(
    model: Model,
    layers: Layers = None,
    text: Text = None,
    tokens: Tokens = TOKENS,
    seed: SampleSeed = 0,
    dtype: Dtype = None,
    device: Device = None,
    revision: Revision = None,
    as_json: AsJson = False,
) -> None:
    """Compute the second moments that edits need, all blocks in one pass, into the cache (or find them there)."""
    import numpy as np

    from reprobe.methods import editing
    from reprobe.methods.moments import second_moments
    from reprobe.progress import terminal

    known, source = parse_layers(layers), _text(text, tokens, seed)
    lm = load_model(model, dtype=dtype, device=device, revision=revision)
    if known is None:
        defaults = editing.default_layers(lm)
        known = sorted({defaults.rome, *defaults.memit})
    with terminal() as progress:
        found = second_moments(lm, known, source, progress=progress)
    rows: list[dict[str, Any]] = []
    for layer, moment in found.items():
        eigenvalues = np.linalg.eigvalsh(moment.matrix)
        rows.append(
            {
                "block": layer,
                "tokens": moment.n,
                "width": moment.width,
                "mean eigenvalue": f"{eigenvalues.mean():.4g}",
                "least": f"{eigenvalues[0]:.4g}",
                "greatest": f"{eigenvalues[-1]:.4g}",
                "digest": moment.digest[:12],
            }
        )
    show_table(rows, as_json)


@edit_app.command("eval")
@verb("reprobe edit eval smollm2-135m facts --method rome --limit 20")
def edit_eval(
    model: Model,
    data: Data,
    method: Annotated[
        Literal["rome", "memit", "finetune"], typer.Option(help="rome and finetune: one at a time; memit: together.")
    ] = "rome",
    limit: Limit = None,
    layers: Layers = None,
    original: Annotated[bool, typer.Option("--original", help="ROME as published.")] = False,
    null_space: NullSpace = False,
    weight: Weight = None,
    perplexity: Annotated[
        str | None, typer.Option(help="Ordinary text whose perplexity is measured too: .txt, a data set, hf:NAME.")
    ] = None,
    write: Annotated[
        int, typer.Option(help="Write a text of N tokens about each subject, without and with edits: fluency.", min=0)
    ] = 0,
    text: Text = None,
    tokens: Tokens = TOKENS,
    to_table: ToTable = None,
    dtype: Dtype = None,
    device: Device = None,
    revision: Revision = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Edit every fact of a data set and score the edits: efficacy, paraphrase, neighbourhood, with intervals.

    --to-table saves a line per prompt.
    """
    import warnings

    import polars as pl

    from reprobe.evaluation import editing as scores
    from reprobe.methods import editing, finetune, memit, rome
    from reprobe.methods.moments import Corpus, second_moments
    from reprobe.probing import write_table
    from reprobe.progress import terminal
    from reprobe.prompts import facts_of
    from reprobe.provenance import digest

    new_table(to_table, overwrite)
    how = _memit(null_space, weight)
    if method != "memit" and how != memit.Settings():
        raise UsageError(f"--null-space and --weight are MEMIT's, not those of --method {method}")
    if method != "rome" and original:
        raise UsageError(f"--original is a form of ROME, not of --method {method}")
    if method == "finetune" and text is not None:
        raise UsageError("--text is of second moments, and --method finetune takes none")
    chosen = parse_layers(layers)
    if method != "memit" and chosen is not None and len(chosen) != 1:
        raise UsageError(f"--layers {layers}: {method} edits one block")
    facts, source = facts_of(data, limit=limit), _text(text, tokens)
    ordinary = () if perplexity is None else Corpus.load(perplexity).texts
    lm = load_model(model, dtype=dtype, device=device, revision=revision)
    with terminal() as progress, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=NO_EFFECT)  # what has no effect is in the table
        if method == "memit":
            edits = memit.edit(lm, facts, layers=chosen, moments=source, settings=how, progress=progress)
            result = scores.evaluate_together(lm, facts, edits, texts=ordinary, write=write)
        else:
            layer = editing.default_layers(lm).rome if chosen is None else chosen[0]
            if method == "rome":
                moment = second_moments(lm, [layer], source, progress=progress)[layer]
                form = rome.Settings(compat="rome" if original else None)

                def make(fact: Any) -> Any:
                    return rome.edit(lm, fact, layer=layer, moment=moment, settings=form)
            else:

                def make(fact: Any) -> Any:
                    return finetune.edit(lm, fact, layer=layer)

            result = scores.evaluate(lm, facts, make, texts=ordinary, write=write, progress=progress)
    if to_table is not None:
        states = (("before", result.before), ("after", result.after))
        prompts = pl.concat([s.prompts.with_columns(state=pl.lit(name)) for name, s in states])
        about = {"model": lm.identity.to_json(), "data": digest([fact.to_json() for fact in facts]), "method": method}
        write_table(prompts, to_table, overwrite=overwrite, about=about)
    rows = result.table.to_dicts()
    for name, one, two in (
        ("perplexity", result.perplexity_before, result.perplexity_after),
        ("fluency", result.fluency_before, result.fluency_after),
    ):
        if one is not None:
            rows.append(dict.fromkeys(rows[0]) | {"measure": name, "before": one, "after": two})
    show_table(rows, as_json)


def _matrix(edit: Any) -> str:
    return f"{edit.parameter} (rank {edit.rank}, norm {edit.norm:.3g})"


def _told(edit: Any) -> dict[str, Any]:
    """An edit in short."""
    shown = [f"{f.prompt} → {f.new}" for f in edit.facts[:2]]
    if len(edit.facts) > 2:
        shown.append(f"… {len(edit.facts)} facts")
    effects = edit.effects
    told: dict[str, Any] = {
        "digest": edit.digest[:12],
        "method": edit.provenance.get("method", "unknown"),
        "block": edit.provenance.get("layer"),
        "parameter": edit.parameter,
        "rank": edit.rank,
        "norm": round(edit.norm, 4),
        "facts": "; ".join(shown),
    }
    if effects:
        told["probability before"] = round(sum(e.before for e in effects) / len(effects), 4)
        told["probability after"] = round(sum(e.after for e in effects) / len(effects), 4)
    return told


def _open(model: str, *, dtype: str | None, device: str | None, revision: str | None) -> Any:
    """A model, with its edits in the ledger if it was exported with some."""
    from reprobe.control import load_edited
    from reprobe.control.edited_model import FOLDER

    if (Path(model) / FOLDER).is_dir():
        return load_edited(model, dtype=dtype, device=device)
    return load_model(model, dtype=dtype, device=device, revision=revision)


def _memit(null_space: bool, weight: float | None) -> Any:
    from reprobe.methods import memit

    return memit.Settings(weight=weight, null_space=memit.NullSpace() if null_space else None)


def _text(text: str | None, tokens: int, seed: int = 0) -> Any:
    from reprobe.methods.moments import Corpus, Sample

    return Sample(tokens, seed) if text is None else Corpus.load(text, tokens=tokens)
