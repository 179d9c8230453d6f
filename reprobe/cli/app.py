"""The verbs of `reprobe`.

Exit codes: 0 done, 1 failed, 2 called wrongly, 130 interrupted. Results go to stdout, bars and messages to stderr.
"""

import contextlib
import dataclasses
import functools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, ParamSpec, TypeVar

import typer
from typer.core import TyperGroup

from reprobe.errors import ReprobeError, UsageError

P = ParamSpec("P")
R = TypeVar("R")

app = typer.Typer(
    name="reprobe",
    help="Extract hidden states once, probe them offline, control anywhere, and prove it is the same activation.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
data_app = typer.Typer(help="The project's own data sets, and files in public formats.", no_args_is_help=True)
app.add_typer(data_app, name="data")
import_app = typer.Typer(help="Activations that other programs computed.", no_args_is_help=True)
app.add_typer(import_app, name="import")
evaluate_app = typer.Typer(help="What steering does to a model, and what else it does.", no_args_is_help=True)
app.add_typer(evaluate_app, name="evaluate")


class _Steer(TyperGroup):
    """`reprobe steer MODEL PROMPT` beside `reprobe steer tune`: what is no subcommand is a prompt's."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, args if args and args[0] in self.commands else ["prompt", *args])


steer_app = typer.Typer(cls=_Steer)
app.add_typer(steer_app, name="steer", short_help="Continue a prompt with and without steering; tune a strength.")

Model = Annotated[str, typer.Argument(help="Bundled name, hub id, local folder, or .gguf file.")]
Data = Annotated[str, typer.Argument(help="Bundled name, .jsonl/.json/.csv/.parquet file, or hf:NAME.")]
Store = Annotated[str, typer.Argument(help="A store made by `reprobe extract`: a folder, or s3://BUCKET/PREFIX.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 …; default: CUDA where there is one.")]
Dtype = Annotated[str | None, typer.Option(help="Compute in float32, bfloat16 or float16; default: as stored.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what stands there.")]
Act = Annotated[Path, typer.Option(help="A direction or a steering (.safetensors).")]
Push = Annotated[
    float | None,
    typer.Option(
        help="In units of the direction's scale, by default 4; negative steers away. A steering's own strengths are "
        "multiplied by it, by default by 1."
    ),
]
Remove = Annotated[bool, typer.Option("--ablate", help="Remove the direction instead of adding it.")]
ActAt = Annotated[str | None, typer.Option(help="Act here instead of where the direction was read.")]
Scope = Annotated[str | None, typer.Option(help="all, prompt, generated or last; default: all.")]
Texts = Annotated[Path | None, typer.Option(help="Ordinary texts, one a line; default: sixteen of our own.")]
ReaderName = Literal[
    "mean-difference", "whitened", "cluster-mean", "pca", "logistic", "lda", "ccs", "k-sparse", "random"
]
ToTable = Annotated[Path | None, typer.Option("--to-table", help="Save the table here (.csv, .parquet, .json).")]
Mismatch = Annotated[bool, typer.Option("--allow-mismatch", help="Use directions of another model, knowingly.")]


def verb(example: str, on: typer.Typer = app, name: str | None = None) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Register a command whose help ends with `example` and whose errors become messages and exit codes."""

    def register(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                return function(*args, **kwargs)
            except ReprobeError as e:
                _say(f"{type(e).__name__}: {e}")
                raise typer.Exit(2 if isinstance(e, UsageError) else 1) from e
            except KeyboardInterrupt as e:
                resumable = function.__name__ in ("extract", "import_vllm")
                hint = " Completed shards are kept: go on with --resume." if resumable else ""
                _say(f"interrupted.{hint}")
                raise typer.Exit(130) from e

        shown = "\n".join(f"    {line}" for line in example.strip().splitlines())
        on.command(name, epilog=None)(guarded)
        guarded.__doc__ = f"{function.__doc__}\n\n\\b\n[bold]Example[/bold]\n{shown}"
        return guarded

    return register


@verb("reprobe demo --out reprobe-demo")
def demo(
    out: Annotated[Path, typer.Option(help="Folder for stores, probes and the report.")] = Path("reprobe-demo"),
    model: Annotated[str, typer.Option(help="Any model; the texts are made for small English ones.")] = "smollm2-135m",
    overwrite: Overwrite = False,
) -> None:
    """Find, plot and use a language model's truth and sentiment directions (3 minutes on 2 cores)."""
    from reprobe.cli.demo import run_demo
    from reprobe.progress import terminal

    _quiet_libraries()
    with terminal() as progress:
        summary = run_demo(out, model=model, overwrite=overwrite, progress=progress, say=_say)
    typer.echo(summary)


@verb("reprobe extract smollm2-135m cities --sites 'resid.post@*,attn.heads@*' --at last --to cities.reprobe")
def extract(
    model: Model,
    data: Data,
    to: Annotated[str, typer.Option(help="The store to write: a folder, or s3://BUCKET/PREFIX.")],
    sites: Annotated[str, typer.Option(help="Sites or patterns, comma-separated.")] = "resid.post@*",
    at: Annotated[str, typer.Option(help="last, all, mean, index:-2, span:NAME:last|first|mean|all")] = "last",
    store_dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16 on disk.")] = None,
    pack: Annotated[
        Literal["forest", "padded", "single"], typer.Option(help="How prompts run together; the rows are the same.")
    ] = "forest",
    batch_tokens: Annotated[
        int | None, typer.Option(help="Tokens per forward pass; default: what is fastest on the device.")
    ] = None,
    truncate: Annotated[
        Literal["left", "right"] | None, typer.Option(help="Cut prompts beyond the context on this side.")
    ] = None,
    shard_rows: Annotated[int | None, typer.Option(help="Rows per shard.")] = None,
    format: Annotated[  # noqa: A002
        Literal["zarr", "hdf5"], typer.Option(help="One array per site, or one file per shard.")
    ] = "zarr",
    compression: Annotated[Literal["zstd"] | None, typer.Option(help="Shuffle bytes and compress them.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first N prompts.")] = None,
    dtype: Dtype = None,
    device: Device = None,
    revision: Revision = None,
    rank: Annotated[
        int | None, typer.Option(help="This process of several, from 0; default: the environment's.")
    ] = None,
    world: Annotated[int | None, typer.Option(help="How many processes write the store together.")] = None,
    ray: Annotated[
        str | None, typer.Option(help="Run on a Ray cluster: HOST:PORT, auto (this node's), or local (started here).")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="With --ray: how many; default: one per GPU or 4 CPUs.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would run and what it takes; write nothing.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted store.")] = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Stream hidden states of a model on a data set into a store.

    Under torchrun and in SLURM arrays each process writes its own shards of one store, without further options. On a
    Ray cluster all nodes must see the model and the store under the same path.
    """
    from reprobe.extraction import Share, extract_on_ray, prepare
    from reprobe.progress import terminal
    from reprobe.prompts import PromptSet

    prompts = PromptSet.load(data, limit=limit)
    if ray is None and workers is not None:
        raise UsageError("--workers counts those of a Ray cluster: say which with --ray (local starts one here)")
    if ray is not None:
        if dry_run or rank is not None or world is not None:
            raise UsageError("--ray shares the work out by itself and goes without --rank, --world and --dry-run")
        with terminal() as progress:
            store = extract_on_ray(
                model,
                prompts,
                to=to,
                load={"dtype": dtype, "device": device, "revision": revision},
                address=ray,
                workers=workers,
                sites=sites,
                at=at,
                pack=pack,
                dtype=store_dtype,
                batch_tokens=batch_tokens,
                truncate=truncate,
                shard_rows=shard_rows,
                format=format,
                compression=compression,
                resume=resume,
                overwrite=overwrite,
                progress=progress,
            )
        _say(f"{store.path}: {store.rows:,} rows at {len(store.sites)} sites, complete")
        return
    lm = _load(model, dtype=dtype, device=device, revision=revision)
    job = prepare(
        lm,
        prompts,
        sites=sites,
        at=at,
        pack=pack,
        dtype=store_dtype,
        batch_tokens=batch_tokens,
        truncate=truncate,
        shard_rows=shard_rows,
        format=format,
        compression=compression,
    )
    share = Share.of_environment() if rank is None and world is None else Share(rank or 0, world or 1)
    if resume or share.world > 1:
        job = job.as_begun_at(to)
    own = job.own(share)
    if dry_run:
        saved = job.n_tokens - job.n_computed
        plan = {
            "prompts": f"{len(prompts):,}",
            "tokens": f"{job.n_tokens:,}",
            "computed": f"{job.n_computed:,} ({saved:,} saved, {saved / job.n_tokens:.0%}: shared beginnings)",
            "packs": f"{job.plan.n_packs:,} of at most {job.batch_tokens} tokens, {job.plan.packing}",
            "rows": f"{job.rows:,} × {len(job.sites)} sites, {job.dtype}",
            "size": f"{_bytes(job.n_bytes)} in {job.grid.n_shards} shards of {job.grid.shard_rows:,} rows",
            "time": f"about {_duration(job.seconds())} on {lm.device}",
        }
        _show(job.numbers() if as_json else plan, as_json)
        return
    part = f"; process {share.rank} of {share.world} writes {_shards_text(own)} of {job.grid.n_shards}"
    _say(
        f"{len(prompts)} prompts, {job.n_tokens:,} tokens ({job.n_computed:,} to compute) in {job.plan.n_packs} packs "
        f"→ {job.rows:,} rows × {len(job.sites)} sites, {job.dtype}: {_bytes(job.n_bytes)} on disk at {to}"
        + (part if share.world > 1 else "")
    )
    with terminal("tokens") as progress:
        store = job.run(to, resume=resume, overwrite=overwrite, own=own if share.world > 1 else None, progress=progress)
    state = "complete" if store.complete else f"{len(store.committed)} of {job.grid.n_shards} shards there by now"
    _say(f"{store.path}: {store.rows:,} rows at {len(store.sites)} sites, {state}")


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
        _show(told | {"sites": list(map(str, opened.sites))} | more, True)
        return
    plan = dict(told["plan"])
    sizes = f"{_bytes(told['bytes_on_disk'])} of about {_bytes(told['bytes_of_arrays_when_complete'])}"
    go_on = "import vllm" if plan.get("source") == "vllm" else "extract"
    _show(
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
            "size": _bytes(told["bytes_on_disk"]) if told["complete"] else sizes,
            "plan": _counts(plan) or "nothing else",
            "versions": ", ".join(f"{k} {v}" for k, v in told["versions"].items()),
        },
        False,
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
    seed: Annotated[int, typer.Option(help="Seed of the sample.")] = 0,
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
    from reprobe.errors import CorruptArtifact
    from reprobe.store import ActivationStore

    if model is None and any((sample, direction, tolerance, seed, dtype, device, revision, allow_mismatch)):
        raise UsageError("these options are about running prompts again: say on which model with --model")
    opened = ActivationStore.open(store)
    checked = opened.verify()
    if not checked.ok:
        raise CorruptArtifact(f"{store}:\n" + "\n".join(f"  {p}" for p in checked.problems))
    _say(f"{store}: every byte is as it was written")
    if model is None:
        if as_json:
            _show({"path": opened.path, "ok": True, "files": checked.files}, True)
        return
    from reprobe.extraction import replay
    from reprobe.extraction.proof import SAMPLE
    from reprobe.probing import Direction
    from reprobe.progress import terminal

    directions = [Direction.load(path) for path in direction or ()]
    prompts = SAMPLE if sample is None else _sample(sample)
    lm = _load(model, dtype=dtype or opened.identity.dtype, device=device, revision=revision)
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


@verb(
    "reprobe import vllm hidden-states --layers 0,8,16 --model smollm2-135m --to s.reprobe", on=import_app, name="vllm"
)
def import_vllm(
    folder: Annotated[Path, typer.Argument(help="The shared_storage_path of vLLM's hidden-states connector.")],
    layers: Annotated[
        str,
        typer.Option(help="The connector's layer ids in its order: 0 is embed, i is resid.post@(i-1), e.g. 0,8,16."),
    ],
    model: Annotated[str, typer.Option(help="The model that vLLM ran: bundled name, hub id, local folder, or .gguf.")],
    to: Annotated[Path, typer.Option(help="The store to write.")],
    at: Annotated[str, typer.Option(help="last, all, mean or index:-2")] = "last",
    data: Annotated[str | None, typer.Option(help="Data set with labels; its ids are the names of the files.")] = None,
    store_dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16; default: the files'.")] = None,
    shard_rows: Annotated[int | None, typer.Option(help="Rows per shard.")] = None,
    device: Device = None,
    revision: Revision = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted store.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Turn what vLLM's hidden-states connector wrote into a store.

    The last layer id (the number of blocks) is the last block's output before the final norm, unlike the last of
    transformers' hidden_states. Whether the files are of the model shows `reprobe verify --model`.
    """
    from reprobe.extraction import VllmFiles
    from reprobe.extraction import import_vllm as run_import
    from reprobe.progress import terminal

    ids = _layers(layers)
    with terminal("files") as progress:
        files = VllmFiles.scan(folder, progress)
    lm = _load(model, dtype=files.dtype, device=device, revision=revision)
    with terminal("rows") as progress:
        store = run_import(
            files,
            lm,
            layers=ids,
            to=to,
            at=at,
            data=data,
            dtype=store_dtype,
            shard_rows=shard_rows,
            resume=resume,
            overwrite=overwrite,
            progress=progress,
        )
    _say(
        f"{store.path}: {store.rows:,} rows of {len(files.ids):,} files at {store.manifest.sites_text}, complete. "
        f"Prove that they are the model's: reprobe verify {to} --model {model}"
    )


@verb("reprobe probe cities.reprobe --reader logistic --to truth.grid")
def probe(
    store: Store,
    reader: Annotated[ReaderName, typer.Option(help="Which reader to train.")] = "logistic",
    sites: Annotated[str | None, typer.Option(help="Sites or patterns; default: all, each head by itself.")] = None,
    label: Annotated[str, typer.Option(help="Index column to read.")] = "label",
    positive: Annotated[str | None, typer.Option(help="The label that scores above 0; default: the greater.")] = None,
    folds: Annotated[int, typer.Option(help="Folds of the group-safe cross-validation.")] = 5,
    seed: Annotated[int, typer.Option(help="Seed of folds and bootstrap.")] = 0,
    to: Annotated[Path | None, typer.Option(help="Save the grid with all its directions here.")] = None,
    to_table: ToTable = None,
    direction: Annotated[Path | None, typer.Option(help="Save the best direction (.safetensors) here.")] = None,
    permutations: Annotated[
        int, typer.Option(help="Add p, from so many permutations: the best of all sites under exchanged labels.")
    ] = 0,
    selectivity: Annotated[
        bool, typer.Option("--selectivity", help="Add the accuracy above that on control tasks.")
    ] = False,
    types: Annotated[str, typer.Option(help="The column whose values get random labels in control tasks.")] = "group",
    mdl: Annotated[bool, typer.Option("--mdl", help="Add the length of the labels' online code, in bits.")] = False,
    top: Annotated[int, typer.Option(help="Lines to show.")] = 10,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Train one reader at every site of a store, with group-safe cross-validation."""
    from reprobe.probing import probe as run_probe
    from reprobe.probing import with_controls, write_table
    from reprobe.probing.readers import READERS
    from reprobe.progress import terminal
    from reprobe.store import ActivationStore

    for path in (to, direction):
        _refuse_existing(path, overwrite)
    _refuse_table(to_table, overwrite)
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
        _say(f"note: {grid.note}")
    if to is not None:
        grid.save(to, overwrite=overwrite)
    if direction is not None:
        grid.best().save(direction, overwrite=overwrite)
    if to_table is not None:
        write_table(grid.table, to_table, overwrite=overwrite)
    rows = grid.table.sort(["accuracy", "layer", "head"], descending=[True, False, False], nulls_last=True)
    _table(rows.head(top).to_dicts(), as_json)
    if not as_json:
        chosen = grid.selected
        _say(
            f"held-out accuracy of the best site, chosen on the other folds: {chosen.accuracy:.3f} "
            f"[{chosen.accuracy_low:.3f}, {chosen.accuracy_high:.3f}] (chance {chosen.chance:.2f})"
        )


@verb("reprobe compare cities.reprobe --readers mean-difference,lda,logistic --to-table readers.csv")
def compare(
    store: Store,
    readers: Annotated[
        str, typer.Option(help="Readers, separated by commas: see `reprobe probe --reader`.")
    ] = "mean-difference,lda,logistic,pca",
    sites: Annotated[str | None, typer.Option(help="Sites or patterns; default: all, each head by itself.")] = None,
    label: Annotated[str, typer.Option(help="Index column to read.")] = "label",
    positive: Annotated[str | None, typer.Option(help="The label that scores above 0; default: the greater.")] = None,
    folds: Annotated[int, typer.Option(help="Folds of the group-safe cross-validation, 3 at least.")] = 5,
    seed: Annotated[int, typer.Option(help="Seed of folds and bootstrap.")] = 0,
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
    from reprobe.store import ActivationStore

    named = readers_named(readers)
    name = Path(store.rstrip("/")).stem
    in_folder = None if out is None else comparison_path(out, name)
    for path in (to, in_folder):
        _refuse_existing(path, overwrite)
    _refuse_table(to_table, overwrite)
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
        _say(f"note: {found.first.note}")
    for path in (to, in_folder):
        if path is not None:
            found.save(path, overwrite=overwrite)
    if to_table is not None:
        write_table(found.table, to_table, overwrite=overwrite)
    if out is not None:
        _say(f"the report: {write_report(out, stores={name: opened})}")
    if as_json:
        _show({what: getattr(found, what).to_dicts() for what in ("table", "choices", "differences")}, True)
        return
    shown = ["reader", "sites", "accuracy", "accuracy_low", "accuracy_high", "auroc", "recall", "ece"]
    _say(f"held out, sites chosen on the other folds (chance {found.choices['chance'][0]:.2f}):")
    _table(found.choices.select(shown).to_dicts(), False)
    if len(found.differences):
        _say("one reader less the other, on the same rows:")
        _table(found.differences.to_dicts(), False)


@verb("reprobe transfer cities.reprobe neg_cities.reprobe --reader lda --sites 'resid.post@8:20' --to-table t.json")
def transfer(
    stores: Annotated[list[str], typer.Argument(help="Two stores or more, each as PATH or NAME=PATH.")],
    reader: Annotated[ReaderName, typer.Option(help="Which reader to train.")] = "mean-difference",
    sites: Annotated[str | None, typer.Option(help="Sites or patterns; default: all that every store holds.")] = None,
    label: Annotated[str, typer.Option(help="Index column to read.")] = "label",
    positive: Annotated[str | None, typer.Option(help="The label that scores above 0; default: the greater.")] = None,
    transductive: Annotated[
        bool, typer.Option("--transductive", help="Also centre each data set by its own mean, the tested one included.")
    ] = False,
    folds: Annotated[int, typer.Option(help="Folds wherever train and test share groups.")] = 5,
    seed: Annotated[int, typer.Option(help="Seed of folds and bootstrap.")] = 0,
    to_table: Annotated[
        Path | None,
        typer.Option("--to-table", "--to", help="Save the table here (.csv, .parquet; .json also says of what it is)."),
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

    _refuse_existing(figure, overwrite)
    _refuse_table(to_table, overwrite)
    named = [_named_store(text) for text in stores]
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
            _say(f"note on {name}: {note}")
    if to_table is not None:
        grid.save(to_table, overwrite=overwrite)
    if figure is not None:
        transfer_map(grid, at).savefig(figure)
    place = at or best_on_the_diagonal(grid)
    shown = ["train", "test", "site", "centring", "left_out", "n", "accuracy", "accuracy_low", "accuracy_high", "auroc"]
    grid.matrix(place)  # says which sites there are if this is none
    rows = grid.table.filter(grid.table["site"] == place).to_dicts()
    _table(grid.table.to_dicts() if as_json else [{c: row[c] for c in shown} for row in rows], as_json)


@verb('reprobe scan smollm2-135m "Paris is in France. Paris is in Peru." --grid truth.grid')
def scan(
    model: Model,
    text: Annotated[str, typer.Argument(help="The text to read.")],
    grid: Annotated[Path, typer.Option(help="A grid saved by `reprobe probe --to`.")],
    part: Annotated[str, typer.Option(help="Which of the grid's parts to read.")] = "resid.post",
    figure: Annotated[Path | None, typer.Option(help="Draw the token × layer map here (.svg, .png, .pdf).")] = None,
    dtype: Dtype = None,
    device: Device = None,
    revision: Revision = None,
    allow_mismatch: Mismatch = False,
    as_json: AsJson = False,
) -> None:
    """Read every token of a text at every layer with stored directions (LAT scan)."""
    from reprobe.methods import repe
    from reprobe.probing import ProbeGrid

    found = ProbeGrid.load(grid).directions
    directions = {site: d for site, d in found.items() if site.part == part and site.unit is None}
    if not directions:
        parts = ", ".join(sorted({s.part for s in found}))
        raise UsageError(f"{grid} has no directions of {part}; it holds {parts}")
    lm = _load(model, dtype=dtype, device=device, revision=revision)
    result = repe.scan(lm, text, directions, allow_mismatch=allow_mismatch)
    if figure is not None:
        from reprobe.report import scan_map

        scan_map(result).savefig(figure)
    rows = [
        {"token": token, **{str(s): round(float(v), 3) for s, v in zip(result.sites, column, strict=True)}}
        for token, column in zip(result.tokens, result.scores.T, strict=True)
    ]
    if as_json:
        _table(rows, True)
        return
    step = max(1, len(result.sites) // 8)
    keep = {"token", *(str(s) for s in result.sites[::step])}
    _table([{k: v for k, v in row.items() if k in keep} for row in rows], False)


@verb(
    'reprobe steer smollm2-135m "She opened the letter and" --direction happiness.safetensors --strength 4',
    on=steer_app,
    name="prompt",
)
def steer(
    model: Model,
    direction: Act,
    prompt: Annotated[str | None, typer.Argument(help="The text to continue.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="A file of texts to continue: one a line, or .jsonl, .json, .csv, .parquet.")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Answer what is typed; /strength X, /off and /on change the steering.")
    ] = False,
    strength: Push = None,
    ablate: Remove = False,
    site: ActAt = None,
    tokens: Scope = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 40,
    dtype: Dtype = None,
    device: Device = None,
    revision: Revision = None,
    allow_mismatch: Mismatch = False,
    as_json: AsJson = False,
) -> None:
    """Continue a prompt with and without steering, with a score per token, and say how far apart the two models are.

    The file is a direction or a steering. With --chat, talk to the steered model. `reprobe steer tune` finds the
    strength of a wanted price.
    """
    if (prompt is not None) + (prompts is not None) + chat != 1:
        raise UsageError("give one of these: a PROMPT, --prompts FILE, or --chat")
    from reprobe.cli import steering as run

    steerer = run.load(direction, ablate=ablate, site=site, tokens=tokens)
    item = steerer(strength)
    texts = [prompt or ""] if prompts is None else _prompts(prompts)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "allow_mismatch": allow_mismatch}
    lm = _load(model, dtype=dtype, device=device, revision=revision)
    if chat:
        run.chat(lm, steerer, strength, read=_typed, show=typer.echo, say=_say, **options)
        return
    results = run.compared(lm, texts, item, **options)
    rows = [
        {
            "unsteered": r.unsteered,
            "steered": r.steered.text,
            "scores": r.steered.to_json() if as_json else r.steered.scored,
            "KL on the unsteered text, nats per token": round(r.kl, 4),
        }
        for r in results
    ]
    if prompts is None:
        _show(rows[0], as_json)
        return
    rows = [{"prompt": r.prompt, **row} for r, row in zip(results, rows, strict=True)]
    if as_json:
        _table(rows, True)
        return
    for i, row in enumerate(rows):
        typer.echo(nl=i > 0)
        _show(row, False)


@verb("reprobe export happiness.safetensors --format gguf --strength 4 --to happiness.gguf")
def export(
    file: Annotated[Path, typer.Argument(help="A direction or a steering (.safetensors).")],
    to: Annotated[Path, typer.Option(help="The file to write.")],
    format: Annotated[  # noqa: A002
        Literal["gguf", "repeng", "steering-vectors", "vllm-lens", "tensors"], typer.Option(help="Who reads it.")
    ] = "gguf",
    strength: Annotated[
        float, typer.Option(help="In units of a direction's scale; times a steering's own strengths.")
    ] = 1.0,
    site: ActAt = None,
    overwrite: Overwrite = False,
) -> None:
    """Write what a direction or a steering adds, as a file that another program reads.

    gguf: a control vector of llama.cpp; repeng: the same for repeng; steering-vectors and tensors: safetensors;
    vllm-lens: JSON. A file multiplied by 1 there is the strength given here.
    """
    import reprobe as rp
    from reprobe.cli.steering import load

    item = load(file, ablate=False, site=site, tokens=None)(strength)
    typer.echo(rp.export(item, to, format=format, overwrite=overwrite))


@verb("reprobe push truth.safetensors hf:OWNER/truth --private")
def push(
    file: Annotated[Path, typer.Argument(help="A direction or a grid (.safetensors).")],
    target: Annotated[str, typer.Argument(help="A folder, or hf:OWNER/NAME on the Hugging Face hub.")],
    private: Annotated[bool, typer.Option("--private", help="If the repository is made, for its owner only.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Share a direction or a grid: its file and a model card, in a folder or on the hub."""
    from reprobe.probing import load
    from reprobe.probing import push as run_push

    typer.echo(run_push(load(file), target, overwrite=overwrite, private=private))


@verb("reprobe pull hf:OWNER/truth --to truth.safetensors")
def pull(
    source: Annotated[str, typer.Argument(help="A folder that `reprobe push` wrote, or hf:OWNER/NAME.")],
    to: Annotated[Path, typer.Option(help="The file to write (.safetensors).")],
    revision: Revision = None,
    overwrite: Overwrite = False,
) -> None:
    """Fetch a direction or a grid that was pushed, and check that it is as it was written."""
    from reprobe.probing import pull as run_pull

    _refuse_existing(to, overwrite)
    typer.echo(run_pull(source, revision=revision).save(to, overwrite=overwrite))


@verb("reprobe steer tune smollm2-135m --direction happiness.safetensors --target-kl 0.1", on=steer_app, name="tune")
def steer_tune(
    model: Model,
    direction: Annotated[Path, typer.Option(help="A direction (.safetensors).")],
    target_kl: Annotated[float, typer.Option(help="KL from the unsteered model, in nats per token.")],
    away: Annotated[bool, typer.Option("--away", help="Steer away: look among negative strengths.")] = False,
    site: ActAt = None,
    tokens: Scope = None,
    texts: Texts = None,
    to_table: ToTable = None,
    dtype: Dtype = None,
    device: Device = None,
    revision: Revision = None,
    allow_mismatch: Mismatch = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Find the strength at which adding a direction costs a given KL on ordinary text (± 5 %, 8 evaluations).

    Exit 1 if no strength reaches it.
    """
    import reprobe as rp
    from reprobe.probing import write_table
    from reprobe.progress import terminal

    _refuse_existing(to_table, overwrite)
    vector, given = rp.Direction.load(direction), _texts(texts)
    lm = _load(model, dtype=dtype, device=device, revision=revision)
    with terminal() as progress:
        found = rp.tune(
            lm,
            lambda strength: rp.Add(vector, strength, site=site, tokens=tokens or "all"),
            target_kl,
            texts=given,
            start=-1.0 if away else 1.0,
            allow_mismatch=allow_mismatch,
            progress=progress,
        )
    told = {"strength": found.strength, "kl": found.kl, "kl_low": found.kl_low, "kl_high": found.kl_high}
    if to_table is not None:
        write_table(found.tried, to_table, overwrite=overwrite, about={"target_kl": target_kl, **told})
    _show(told | {"target_kl": target_kl, "evaluations": found.tried.height}, as_json)


@verb(
    "reprobe evaluate truthfulqa smollm2-135m --data misconceptions --direction truth.safetensors --strength 4",
    on=evaluate_app,
    name="truthfulqa",
)
def evaluate_truthfulqa(
    model: Model,
    data: Annotated[
        str | None,
        typer.Option(help="misconceptions (ours), or TruthfulQA's file; default: that in the folder REPROBE_DATA."),
    ] = None,
    direction: Annotated[
        Path | None, typer.Option(help="Steer with this direction or steering (.safetensors), and compare.")
    ] = None,
    strength: Push = None,
    ablate: Remove = False,
    site: ActAt = None,
    tokens: Annotated[str | None, typer.Option(help="all, prompt, generated or last; default: generated.")] = None,
    primer: Annotated[
        Path | None, typer.Option(help="Text before each question, e.g. the benchmark's; default: six of our own.")
    ] = None,
    questions: Annotated[int | None, typer.Option(help="Only the first N questions.")] = None,
    dola: Annotated[
        str | None, typer.Option(help="Score by DoLa, and compare: high, low, or layers such as 15 or 15,17,19.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.")] = 0,
    to_table: ToTable = None,
    dtype: Dtype = None,
    device: Device = None,
    revision: Revision = None,
    allow_mismatch: Mismatch = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Multiple choice, MC1, MC2 and MC3, with intervals over questions.

    With --direction, --dola or both, the plain model is compared with the one so steered or scored.

    --to-table saves a line per question.
    """
    import reprobe as rp
    from reprobe.cli.steering import load
    from reprobe.evaluation import PRIMER, compare
    from reprobe.methods.dola import DoLa
    from reprobe.probing import write_table
    from reprobe.progress import terminal

    _refuse_existing(to_table, overwrite)
    before = PRIMER if primer is None else _read_text(primer)
    prompts = rp.PromptSet.load(data or _truthfulqa())
    if questions is not None:
        first = prompts.frame["group"].unique(maintain_order=True).head(questions)
        prompts = prompts.where(group=first.to_list())
    items = []
    if direction is not None:
        items.append(load(direction, ablate=ablate, site=site, tokens=tokens, otherwise="generated")(strength))
    decoding = None if dola is None else DoLa(_dola_layers(dola))
    lm = _load(model, dtype=dtype, device=device, revision=revision)
    if decoding is not None:
        decoding.candidates(lm)  # raises before anything is scored
    with terminal() as progress:
        plain = rp.multiple_choice(lm, prompts, primer=before, progress=progress)
        result, table = plain.summary(seed=seed), plain.table
        if items or decoding:
            with rp.steer(lm, *items, allow_mismatch=allow_mismatch):
                steered = rp.multiple_choice(lm, prompts, primer=before, decoding=decoding, progress=progress)
            result = compare(plain, steered, seed=seed)
            own = steered.table.select(rp.evaluation.METRICS).rename(lambda metric: f"{metric}_steered")
            table = plain.table.hstack(own)
    if to_table is not None:
        about = {"model": lm.identity.to_json(), "data": prompts.digest, "primer": before, "metrics": result.to_dicts()}
        if decoding is not None:
            about["dola"] = dataclasses.asdict(decoding)
        write_table(table, to_table, overwrite=overwrite, about=about)
    _table(result.to_dicts(), as_json)


@verb(
    "reprobe evaluate side-effects smollm2-135m --direction happiness.safetensors --strength 4",
    on=evaluate_app,
    name="side-effects",
)
def evaluate_side_effects(
    model: Model,
    direction: Act,
    strength: Push = None,
    ablate: Remove = False,
    site: ActAt = None,
    tokens: Scope = None,
    texts: Texts = None,
    data: Annotated[
        str | None, typer.Option(help="Unrelated knowledge: facts, misconceptions, a file like them, or none.")
    ] = "facts",
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate after each text's prompt; 0: none.")] = 40,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.")] = 0,
    to_table: ToTable = None,
    dtype: Dtype = None,
    device: Device = None,
    revision: Revision = None,
    allow_mismatch: Mismatch = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """What steering costs: ordinary text, variety of what is written, unrelated knowledge, with intervals."""
    import reprobe as rp
    from reprobe.cli.steering import load
    from reprobe.probing import write_table
    from reprobe.progress import terminal

    _refuse_existing(to_table, overwrite)
    item = load(direction, ablate=ablate, site=site, tokens=tokens)(strength)
    unrelated = None if data == "none" else data
    given = _texts(texts)
    lm = _load(model, dtype=dtype, device=device, revision=revision)
    with terminal() as progress:
        found = rp.side_effects(
            lm,
            item,
            texts=given,
            unrelated=unrelated,
            max_new_tokens=max_new_tokens,
            allow_mismatch=allow_mismatch,
            seed=seed,
            progress=progress,
        )
    if to_table is not None:
        about = {"model": lm.identity.to_json(), "generations": found.generations.to_dicts()}
        write_table(found.table, to_table, overwrite=overwrite, about=about)
    _table(found.table.to_dicts(), as_json)


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

    stores = {name: ActivationStore.open(path) for name, path in map(_named_store, store or ())}
    typer.echo(write_report(folder, to, stores=stores))


@verb("reprobe data list", on=data_app, name="list")
def data_list(as_json: AsJson = False) -> None:
    """List the project's own data sets."""
    from reprobe.prompts import PromptSet, bundled

    sets = [PromptSet.load(name).describe() for name in bundled()]
    rows = [
        {
            "name": s.name,
            "prompts": s.prompts,
            "groups": s.groups,
            "pairs": s.pairs,
            "labels": _counts(s.labels),
            "spans": _counts(s.spans),
        }
        for s in sets
    ]
    _table(rows, as_json)


@verb("reprobe data show cities --limit 5", on=data_app, name="show")
def data_show(
    data: Data, limit: Annotated[int, typer.Option(help="Rows to show.")] = 10, as_json: AsJson = False
) -> None:
    """Show the first rows of a data set."""
    from reprobe.prompts import PromptSet

    prompts = PromptSet.load(data)
    if not as_json:
        about = prompts.describe()
        _show(
            {
                "name": about.name,
                "prompts": about.prompts,
                "groups": about.groups if about.has_groups else "none: each prompt counts as its own",
                "pairs": about.pairs,
                "labels": _counts(about.labels),
                "spans": _counts(about.spans),
                "digest": about.digest,
            },
            False,
        )
    rows = prompts.head(limit).frame.to_dicts()
    for row in rows:
        row["spans"] = {s["name"]: [s["start"], s["end"]] for s in row["spans"]}
    empty = {key for key in rows[0] if all(row[key] in (None, {}) for row in rows)}
    _table([{k: v for k, v in row.items() if k not in empty} for row in rows], as_json)


@verb("reprobe data validate my-prompts.jsonl", on=data_app, name="validate")
def data_validate(data: Data) -> None:
    """Check a data set: ids, texts, labels, groups, spans; exit 2 with the faulty rows if it is malformed."""
    from reprobe.prompts import PromptSet

    prompts = PromptSet.load(data)
    note = "" if prompts.has_groups else "; it has no groups, so each prompt counts as its own"
    _say(f"{data}: {len(prompts)} prompts, sound{note}")


def _load(model: str, *, dtype: str | None, device: str | None, revision: str | None) -> Any:
    from reprobe.model.language_model import LanguageModel
    from reprobe.progress import terminal

    _quiet_libraries()
    with terminal() as progress:
        return LanguageModel.load(model, dtype=dtype, device=device, revision=revision, progress=progress)


def _typed() -> str | None:
    """A line from the terminal or a pipe; None at its end."""
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None


def _texts(path: Path | None) -> Any:
    """The texts of a file, one a line; the library's own where there is no file."""
    from reprobe.evaluation import NEUTRAL, Passage

    if path is None:
        return NEUTRAL
    return [Passage.of(line) for line in _lines(path)]


def _prompts(path: Path) -> list[str]:
    """The texts of a prompt file, or of any other file one a line."""
    from reprobe.prompts import PromptSet
    from reprobe.prompts.load import SUFFIXES

    return PromptSet.load(str(path)).texts if path.suffix in SUFFIXES else _lines(path)


def _lines(path: Path) -> list[str]:
    lines = [line.strip() for line in _read_text(path).splitlines() if line.strip()]
    if not lines:
        raise UsageError(f"{path} holds no text")
    return lines


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise UsageError(f"{path} cannot be read as text: {e}") from e


def _dola_layers(text: str) -> Any:
    """Layers of --dola: a bucket's name, which the method checks, or whole numbers."""
    numbers = text.split(",")
    return [int(n) for n in numbers] if all(n.strip().isdecimal() for n in numbers) else text


def _truthfulqa() -> str:
    """TruthfulQA's multiple-choice file in the folder that REPROBE_DATA names."""
    folder = os.environ.get("REPROBE_DATA")
    path = Path(folder or ".") / "truthfulqa" / "mc_task.json"
    if folder is None or not path.is_file():
        why = "REPROBE_DATA is not set" if folder is None else f"there is no {path}"
        raise UsageError(
            f"TruthfulQA does not come with reprobe, and {why}: name its mc_task.json or TruthfulQA.csv with --data, "
            "or take our own questions with --data misconceptions"
        )
    return str(path)


def _sample(text: str) -> int | None:
    if text == "all":
        return None
    if not text.isdecimal():
        raise UsageError(f"--sample {text}: give a number of prompts, or all")
    return int(text)


def _layers(text: str) -> list[int]:
    pieces = [piece.strip() for piece in text.split(",")]
    if not all(piece.isdecimal() for piece in pieces):
        raise UsageError(f"--layers {text}: give vLLM's layer ids, separated by commas, e.g. 0,8,16")
    return [int(piece) for piece in pieces]


def _quiet_libraries() -> None:
    """Keep the advice of the libraries below off a user's terminal. Only the command line does this."""
    import logging

    for name in ("transformers", "huggingface_hub", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _label(index: Any, column: str, text: str | None) -> Any:
    """A label as it stands in the index: typed text is a string, a label may be a number."""
    if text is None or column not in index.columns:
        return text
    return next((value for value in index[column].unique() if str(value) == text), text)


def _named_store(text: str) -> tuple[str, str]:
    """NAME=PATH, or a path, whose last part without suffix is the name."""
    name, equals, path = text.partition("=")
    if equals and name and path and "/" not in name:
        return name, path
    return Path(text.rstrip("/")).stem, text


def _refuse_existing(path: Path | None, overwrite: bool) -> None:
    """Before long work, not after it."""
    from reprobe.errors import ArtifactExists

    if path is not None and path.exists() and not overwrite:
        raise ArtifactExists(f"{path} exists; choose another name or pass --overwrite")


def _refuse_table(path: Path | None, overwrite: bool) -> None:
    from reprobe.probing import require_new_table

    if path is not None:
        require_new_table(path, overwrite=overwrite)


def _say(message: str) -> None:
    typer.echo(message, err=True)


def _show(values: dict[str, Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(values, indent=2, ensure_ascii=False, default=str))
        return
    width = max(map(len, values), default=0)
    for key, value in values.items():
        typer.echo(f"{key:<{width}}  {value}")


def _show_replay(result: Any, directions: list[str], as_json: bool) -> None:
    """What a replay found: all of it as JSON, or a table of what failed and a verdict."""
    if as_json:
        _show(result.to_json(), True)
        return
    for problem in result.problems:
        typer.echo(problem)
    for allowed in (s for s in result.unlike if s not in result.problems):
        _say(f"allowed: {allowed}")
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
        _table(rows, False)
    for name, d in zip(directions, result.directions, strict=not result.problems):
        typer.echo(
            f"{name} at {d.site}: {d.flips} of {d.rows} decisions flip"
            + (f", at most {d.margin:.2g} scales from the boundary" if d.flips else "")
            + f"; greatest change of a score {d.drift:.2g} scales (row {d.at.row})"
        )
    if result.problems:
        way_on = "; --allow-mismatch compares the numbers of another model" if result.identity else ""
        _say(f"nothing was run on {result.model}{way_on}")
        return
    worst = result.worst
    _say(
        f"{result.prompts:,} of {result.of_prompts:,} prompts run again on {result.model}: "
        f"{'the same activations' if result.ok else 'NOT the same activations'}. Worst relative difference of a row "
        f"{worst.worst:.2g} at '{worst.site}', {'within' if not result.failed else 'tolerance'} {result.tolerance:.2g}"
    )


def _table(rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(rows, indent=2, ensure_ascii=False, default=str))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for key in rows[0] if rows else ():
        table.add_column(key, overflow="fold")
    for row in rows:
        table.add_row(*(f"{v:.3f}" if isinstance(v, float) else "" if v is None else str(v) for v in row.values()))
    # A pipe has no width: give it one, or the lines would be folded to 80 columns.
    console = Console() if sys.stdout.isatty() else Console(width=200)
    with contextlib.suppress(BrokenPipeError):
        console.print(table)


def _shards_text(own: range) -> str:
    if not own:
        return "no shard (there are fewer than processes: lower --shard-rows)"
    return f"shard {own[0]}" if len(own) == 1 else f"shards {own[0]}–{own[-1]}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _counts(values: Any) -> str:
    return ", ".join(f"{'none' if k is None else k}: {'none' if n is None else n}" for k, n in values.items())


def _bytes(n: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} TB"


def main() -> None:
    """The `reprobe` console script."""
    app()
