"""`reprobe extract` and `reprobe import`: what a model computes, or another program computed, becomes a store."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from reprobe.cli.inputs import load_model
from reprobe.cli.options import AsJson, Data, Device, Dtype, Model, Overwrite, Revision, first_of
from reprobe.cli.outputs import new_store
from reprobe.cli.show import bytes_text, say, show, show_json
from reprobe.cli.verb import verb
from reprobe.errors import UsageError

import_app = typer.Typer(name="import", help="Activations that other programs computed.", no_args_is_help=True)

ShardRows = Annotated[int | None, typer.Option(help="Rows per shard.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with an interrupted store.")]


@verb(
    "reprobe extract smollm2-135m cities --sites 'resid.post@*,attn.heads@*' --at last --to cities.reprobe",
    resumable=True,
)
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
    shard_rows: ShardRows = None,
    format: Annotated[  # noqa: A002
        Literal["zarr", "hdf5"], typer.Option(help="One array per site, or one file per shard.")
    ] = "zarr",
    compression: Annotated[Literal["zstd"] | None, typer.Option(help="Shuffle bytes and compress them.")] = None,
    limit: Annotated[int | None, first_of("prompts")] = None,
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
    resume: Resume = False,
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

    if ray is None and workers is not None:
        raise UsageError("--workers counts those of a Ray cluster: say which with --ray (local starts one here)")
    if ray is not None and (dry_run or rank is not None or world is not None):
        raise UsageError("--ray shares the work out by itself and goes without --rank, --world and --dry-run")
    if (rank is None) != (world is None):
        raise UsageError("--rank and --world go together: this process, and how many there are")
    share = Share.of_environment() if rank is None or world is None else Share(rank, world)
    if overwrite and share.world > 1:
        raise UsageError(
            f"--overwrite would remove what the other processes write: {to} is written by several ({share.world}). "
            "Delete it before they start"
        )
    if not dry_run:
        new_store(to, resume=resume or share.world > 1, overwrite=overwrite)
    prompts = PromptSet.load(data, limit=limit)
    work: dict[str, Any] = {
        "sites": sites,
        "at": at,
        "pack": pack,
        "dtype": store_dtype,
        "batch_tokens": batch_tokens,
        "truncate": truncate,
        "shard_rows": shard_rows,
        "format": format,
        "compression": compression,
    }
    if ray is not None:
        with terminal() as progress:
            store = extract_on_ray(
                model,
                prompts,
                to=to,
                load={"dtype": dtype, "device": device, "revision": revision},
                address=ray,
                workers=workers,
                **work,
                resume=resume,
                overwrite=overwrite,
                progress=progress,
            )
        _show(store, as_json)
        return
    lm = load_model(model, dtype=dtype, device=device, revision=revision)
    job = prepare(lm, prompts, **work)
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
            "size": f"{bytes_text(job.n_bytes)} in {job.grid.n_shards} shards of {job.grid.shard_rows:,} rows",
            "time": f"about {_duration(job.seconds())} on {lm.device}",
        }
        show(job.numbers() if as_json else plan, as_json)
        return
    part = f"; process {share.rank} of {share.world} writes {_shards_text(own)} of {job.grid.n_shards}"
    say(
        f"{len(prompts)} prompts, {job.n_tokens:,} tokens ({job.n_computed:,} to compute) in {job.plan.n_packs} packs "
        f"→ {job.rows:,} rows × {len(job.sites)} sites, {job.dtype}: {bytes_text(job.n_bytes)} on disk at {to}"
        + (part if share.world > 1 else "")
    )
    with terminal("tokens") as progress:
        store = job.run(to, resume=resume, overwrite=overwrite, own=own if share.world > 1 else None, progress=progress)
    _show(store, as_json)


def _show(store: Any, as_json: bool) -> None:
    """A store that has been written, or a part of it."""
    shards = store.manifest.grid.n_shards
    state = "complete" if store.complete else f"{len(store.committed)} of {shards} shards there by now"
    say(f"{store.path}: {store.rows:,} rows at {len(store.sites)} sites, {state}")
    if as_json:
        sites = [str(site) for site in store.sites]
        show_json({"path": str(store.path), "rows": store.rows, "sites": sites, "complete": store.complete})


@import_app.command("vllm")
@verb("reprobe import vllm hidden-states --layers 0,8,16 --model smollm2-135m --to s.reprobe", resumable=True)
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
    shard_rows: ShardRows = None,
    device: Device = None,
    revision: Revision = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Turn what vLLM's hidden-states connector wrote into a store.

    The last layer id (the number of blocks) is the last block's output before the final norm, unlike the last of
    transformers' hidden_states. Whether the files are of the model shows `reprobe verify --model`.
    """
    from reprobe.extraction import VllmFiles
    from reprobe.extraction import import_vllm as run_import
    from reprobe.progress import terminal

    ids = _layers(layers)
    new_store(to, resume=resume, overwrite=overwrite)
    with terminal("files") as progress:
        files = VllmFiles.scan(folder, progress)
    lm = load_model(model, dtype=files.dtype, device=device, revision=revision)
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
    _show(store, as_json)
    say(
        f"{store.manifest.sites_text} of {len(files.ids):,} files. Prove that they are the model's: "
        f"reprobe verify {to} --model {model}"
    )


def _layers(text: str) -> list[int]:
    pieces = [piece.strip() for piece in text.split(",")]
    if not all(piece.isdecimal() for piece in pieces):
        raise UsageError(f"--layers {text}: give vLLM's layer ids, separated by commas, e.g. 0,8,16")
    return [int(piece) for piece in pieces]


def _shards_text(own: range) -> str:
    if not own:
        return "no shard (there are fewer than processes: lower --shard-rows)"
    return f"shard {own[0]}" if len(own) == 1 else f"shards {own[0]}–{own[-1]}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
