"""`reprobe info` and `reprobe verify`: what a store holds, and whether it holds what it says."""

from pathlib import Path
from typing import Annotated, Any

import typer

from reprobe.cli.inputs import load_model
from reprobe.cli.options import AsJson, Device, Revision, SampleSeed, Store
from reprobe.cli.show import bytes_text, counts_text, say, show, show_json, show_table
from reprobe.cli.verb import verb
from reprobe.errors import CorruptArtifact, UsageError


@verb("reprobe info cities.reprobe")
def info(store: Store, as_json: AsJson = False) -> None:
    """Show what a store holds, of which model, and whether it is complete."""
    from reprobe.store import ActivationStore

    opened = ActivationStore.open(store)
    told, manifest, identity = vars(opened.info()), opened.manifest, opened.identity
    lengths = opened.tokens["tokens"].list.len()
    counts: dict[str, Any] = {"prompts": len(lengths), "tokens": lengths.sum(), "longest": lengths.max()}
    if as_json:
        more = {"identity": identity.to_json(), "counts": counts, "shard_rows": manifest.grid.shard_rows}
        show_json(told | {"sites": list(map(str, opened.sites))} | more)
        return
    plan = dict(told["plan"])
    sizes = f"{bytes_text(told['bytes_on_disk'])} of about {bytes_text(told['bytes_of_arrays_when_complete'])}"
    go_on = "import vllm" if plan.get("source") == "vllm" else "extract"
    show(
        {
            "path": told["path"],
            "state": "complete" if told["complete"] else f"incomplete: go on with `reprobe {go_on} … --resume`",
            "model": identity.name + (f" @ {identity.revision}" if identity.revision else ""),
            "architecture": f"{identity.architecture}, {identity.n_layers} blocks, d_model {identity.d_model}",
            "computed in": identity.dtype + (f", quantised: {identity.quantization}" if identity.quantization else ""),
            "weights": identity.weights[:12],
            "tokenizer": identity.tokenizer[:12],
            "chat template": identity.template[:12] if identity.template else "none",
            "sites": manifest.sites_text,
            "positions": plan.pop("at", "not recorded"),
            "prompts": f"{counts['prompts']:,} (digest {manifest.prompts[:12]})",
            "tokens": f"{counts['tokens']:,}, at most {counts['longest']} in a prompt",
            "rows": f"{told['rows']:,}",
            "stored in": ", ".join(filter(None, (told["dtype"], told["format"], told["compression"]))),
            "shards": f"{told['committed']} of {told['shards']}, {manifest.grid.shard_rows:,} rows each",
            "size": bytes_text(told["bytes_on_disk"]) if told["complete"] else sizes,
            "plan": counts_text(plan) or "nothing else",
            "versions": ", ".join(f"{k} {v}" for k, v in told["versions"].items()),
        }
    )


@verb("reprobe verify cities.reprobe --model smollm2-135m --direction truth.safetensors")
def verify(
    store: Store,
    model: Annotated[
        str | None, typer.Option(help="Run prompts on this model again and compare with the store.")
    ] = None,
    sample: Annotated[str | None, typer.Option(help="How many prompts to run again, or all; default: 64.")] = None,
    direction: Annotated[
        list[Path] | None, typer.Option(help="Do its scores hold? May be given several times.")
    ] = None,
    tolerance: Annotated[
        float | None, typer.Option(help="Relative difference per row; default: what rounding alone gives.")
    ] = None,
    seed: SampleSeed = 0,
    dtype: Annotated[str | None, typer.Option(help="Compute in this; default: as the store's model did.")] = None,
    device: Device = None,
    revision: Revision = None,
    allow_mismatch: Annotated[
        bool, typer.Option("--allow-mismatch", help="Compare the numbers of another model, knowingly.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Recompute every checksum of a store, and with --model prove that it holds that model's activations.

    Exit 1 if a byte is not as it was written, or if the model is another or gives other activations.
    """
    from reprobe.store import ActivationStore

    if model is None and any((sample, direction, tolerance, seed, dtype, device, revision, allow_mismatch)):
        raise UsageError("these options are about running prompts again: say on which model with --model")
    from reprobe.probing import Direction

    directions = [Direction.load(path) for path in direction or ()]
    prompts = _sample(sample)
    opened = ActivationStore.open(store)
    checked = opened.verify()
    if not checked.ok:
        raise CorruptArtifact(f"{store}:\n" + "\n".join(f"  {p}" for p in checked.problems))
    say(f"{store}: every byte is as it was written")
    if model is None:
        if as_json:
            show_json({"path": opened.path, "ok": True, "files": checked.files})
        return
    from reprobe.extraction import replay
    from reprobe.progress import terminal

    lm = load_model(model, dtype=dtype or opened.identity.dtype, device=device, revision=revision)
    with terminal("tokens") as progress:
        result = replay(
            opened,
            lm,
            sample=prompts,
            seed=seed,
            directions=directions,
            tolerance=tolerance,
            allow_mismatch=allow_mismatch,
            progress=progress,
        )
    _show_replay(result, [path.name for path in direction or ()], as_json)
    if not result.ok:
        raise typer.Exit(1)


def _sample(text: str | None) -> int | None:
    """A number of prompts; None for all."""
    if text is None:
        from reprobe.extraction.proof import SAMPLE

        return SAMPLE
    if text == "all":
        return None
    if not text.isdecimal():
        raise UsageError(f"--sample {text}: give a number of prompts, or all")
    return int(text)


def _show_replay(result: Any, directions: list[str], as_json: bool) -> None:
    """What a replay found: all of it as JSON, or a table of what failed and a verdict."""
    if as_json:
        show_json(result.to_json())
        return
    for problem in result.problems:
        typer.echo(problem)
    for allowed in (s for s in result.unlike if s not in result.problems):
        say(f"allowed: {allowed}")
    rows = [
        {
            "site": str(s.site),
            "worst": f"{s.worst:.2g}",
            "median": f"{s.median:.2g}",
            "beyond": f"{s.beyond} of {s.rows} rows",
            "worst row": s.at.row,
            "prompt": s.at.prompt,
            "position": "mean" if s.at.position is None else s.at.position,
            "what it looks like": s.diagnosis,
        }
        for s in result.failed
    ]
    if rows:
        show_table(rows)
    for name, d in zip(directions, result.directions, strict=not result.problems):
        typer.echo(
            f"{name} at {d.site}: {d.flips} of {d.rows} decisions flip"
            + (f", at most {d.margin:.2g} scales from the boundary" if d.flips else "")
            + f"; greatest change of a score {d.drift:.2g} scales (row {d.at.row})"
        )
    if result.problems:
        way_on = "; --allow-mismatch compares the numbers of another model" if result.identity else ""
        say(f"nothing was run on {result.model}{way_on}")
        return
    worst = result.worst
    say(
        f"{result.prompts:,} of {result.of_prompts:,} prompts run again on {result.model}: "
        f"{'the same activations' if result.ok else 'NOT the same activations'}. Worst relative difference of a row "
        f"{worst.worst:.2g} at '{worst.site}', {'within' if not result.failed else 'tolerance'} {result.tolerance:.2g}"
    )
