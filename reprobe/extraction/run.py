"""Streaming activations from a model into a store.

Enters: a language model, a prompt set, sites, a position. Leaves: an `ActivationStore` on disk. Prompts run in packs
through the blocks only, as far as the last wanted site; wanted tokens are gathered on the device; a shard is written
while the next is computed. What is in memory at once is two shards and two packs' wanted activations, whatever the
number of prompts.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from reprobe.errors import ArtifactMissing, CorruptArtifact, IdentityMismatch, SchemaMismatch, UsageError
from reprobe.extraction.calibration import token_budget
from reprobe.extraction.share import Share
from reprobe.extraction.transfer import on_host
from reprobe.model.hooks import board_of, capture
from reprobe.model.language_model import LanguageModel
from reprobe.model.packs import Packing, Plan, lay_out
from reprobe.model.sites import UNIT_PARTS, Site
from reprobe.model.text import Truncate
from reprobe.progress import Progress, silent
from reprobe.prompts import Position, PromptSet, TokenTable, index_frame, token_frame, tokenize
from reprobe.store import ActivationStore, Grid, Shard, StoredSite, StoreWriter, size_on_disk
from reprobe.store.layout import itemsize, torch_dtype


@dataclass(frozen=True)
class Job:
    """An extraction that is settled but not started: what will run, and what it will take.

    `rows` vectors per site, `n_tokens` real tokens of which `n_computed` are computed (shared beginnings once),
    `n_bytes` of activations on disk (exact for zarr without compression, else an upper bound).
    """

    lm: LanguageModel
    prompts: PromptSet
    table: TokenTable
    plan: Plan
    sites: tuple[Site, ...]
    at: Position
    dtype: str
    batch_tokens: int
    #: `batch_tokens` was measured here, not asked for, and gives way to what a store was begun with.
    measured: bool
    truncate: Truncate | None
    grid: Grid
    format: str
    compression: str | None

    @property
    def rows(self) -> int:
        return self.grid.rows

    @property
    def n_tokens(self) -> int:
        return len(self.table.tokens)

    @property
    def n_computed(self) -> int:
        return int(self.plan.computed(self.table.n_tokens).sum())

    @property
    def widths(self) -> dict[Site, int]:
        return {site: self.lm.width(site) for site in self.sites}

    @property
    def n_bytes(self) -> int:
        return size_on_disk(
            self.widths.values(), self.grid, self.dtype, format=self.format, compression=self.compression
        )

    def own(self, share: Share) -> range:
        """The shards that a share of this job comprises."""
        return share.shards(self.costs)

    @property
    def costs(self) -> Float[np.ndarray, " shards"]:
        """What each shard takes to compute: places of its packs, padding included."""
        bounds = [0, *(shard.stop for shard in self.grid.shards)]
        cost = np.concatenate([[0], np.cumsum(self.plan.size(self.table.n_tokens))])
        return np.diff(np.interp(bounds, self._row_ends, cost))

    def as_begun_at(self, to: str | Path) -> "Job":
        """This job with the token budget that the store at `to` was begun with, if that was left to measurement."""
        recorded = _recorded_budget(to) if self.measured else None
        if recorded is None or recorded == self.batch_tokens:
            return self
        plan = self.lm.plan(self.table.tokens, self.table.starts, packing=self.plan.packing, budget=recorded)
        return replace(self, plan=plan, batch_tokens=recorded)

    def numbers(self) -> dict[str, int | float | str]:
        """What will run and what it takes: counts, bytes, and an estimate of the seconds (see `seconds`)."""
        return {
            "prompts": len(self.prompts),
            "tokens": self.n_tokens,
            "tokens_computed": self.n_computed,
            "tokens_saved": self.n_tokens - self.n_computed,
            "places": int(self.plan.size(self.table.n_tokens).sum()),
            "pack": self.plan.packing,
            "packs": self.plan.n_packs,
            "batch_tokens": self.batch_tokens,
            "rows": self.rows,
            "sites": len(self.sites),
            "dtype": self.dtype,
            "shards": self.grid.n_shards,
            "format": self.format,
            "compression": self.compression or "none",
            "bytes": self.n_bytes,
            "seconds": self.seconds(),
        }

    def seconds(self) -> float:
        """Time that the whole job takes on this device, estimated by running one pack of middling size."""
        size = self.plan.size(self.table.n_tokens)
        k = int(np.argsort(size, kind="stable")[len(size) // 2])
        times = []
        for _ in range(2):  # the first pass also pays for what a device sets up once
            start = time.perf_counter()
            for _done in on_host([(k, self._run_pack(k))], self.lm.device):
                times.append(time.perf_counter() - start)
        return min(times) * float(size.sum()) / float(size[k])

    def run(
        self,
        to: str | Path,
        *,
        resume: bool = False,
        overwrite: bool = False,
        own: range | None = None,
        progress: Progress = silent,
    ) -> ActivationStore:
        """Run, or go on with, this job into the store at `to`.

        `own` are the shards to write, neighbours, where several processes write one store (default: all). Raises
        `ArtifactExists` if `to` exists and neither `resume` nor `overwrite` is given, `IdentityMismatch` if the store
        there was made with another model, plan or data, `UsageError` while the model is being steered, `DiskFull`,
        `StoreLocked`. Whatever ends the run, completed shards stay.
        """
        if board_of(self.lm).changed:
            raise UsageError(
                "the model is being steered, and its activations would pass for the plain model's: extract outside "
                "the steering context, or read steered activations with observe"
            )
        try:
            writer = self.writer(to, resume=resume, overwrite=overwrite, own=own)
        except IdentityMismatch:
            # Another process may have begun the store meanwhile, with the budget that it measured.
            begun = self.as_begun_at(to)
            if begun is self:
                raise
            return begun.run(to, resume=resume, overwrite=overwrite, own=own, progress=progress)
        with writer:
            self.fill(writer, progress)
        return ActivationStore.open(to)

    def fill(self, writer: StoreWriter, progress: Progress = silent) -> None:
        """Compute and write the missing shards of a writer of this job's store."""
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="reprobe-write") as pool:
            pending: Future[None] | None = None
            try:
                for shard, values in self._shards(writer.missing(), progress):
                    if pending is not None:
                        pending.result()  # at most one shard waits while one is being filled
                    pending = pool.submit(writer.write_shard, shard.number, values)
            finally:
                if pending is not None:
                    pending.result()

    def writer(
        self, to: str | Path, *, resume: bool = False, overwrite: bool = False, own: range | None = None
    ) -> StoreWriter:
        """Begin the store of this job, or join it; arguments and errors are those of `run`."""
        return StoreWriter.create(
            to,
            identity=self.lm.identity,
            prompts=self.prompts.digest,
            plan=self._settings(),
            sites=[StoredSite(site, width, self._unit_width(site)) for site, width in self.widths.items()],
            dtype=self.dtype,
            index=index_frame(self.prompts, self.table, self.plan.order),
            tokens=token_frame(self.table, self.plan.order),
            shard_rows=self.grid.shard_rows,
            chunk_rows=self.grid.chunk_rows,
            format=self.format,
            compression=self.compression,
            own=own,
            resume=resume,
            overwrite=overwrite,
        )

    def _settings(self) -> dict[str, Any]:
        """All that decides the bytes besides the model, the prompts and the sites."""
        return {
            "at": str(self.at),
            "pack": self.plan.packing,
            "batch_tokens": self.batch_tokens,
            "truncate": self.truncate,
            "attention": str(getattr(self.lm.net.config, "_attn_implementation", None)),
        }

    def _unit_width(self, site: Site) -> int | None:
        """Width of one head or neuron, for the parts that have units."""
        return self.lm.width(Site(site.part, site.layer, 0)) if site.part in UNIT_PARTS else None

    @property
    def _row_ends(self) -> Int[np.ndarray, " packs+1"]:
        """Pack k computes the store's rows `[k]` … `[k + 1] − 1`."""
        rows: np.ndarray = np.concatenate([[0], np.cumsum(self.table.n_rows[self.plan.order])])[self.plan.cuts]
        return rows

    def _shards(self, missing: Sequence[Shard], progress: Progress) -> Iterator[tuple[Shard, dict[Site, Tensor]]]:
        """Fill the missing shards one after the other. A pack whose rows span two of them runs once."""
        ends = self._row_ends
        computed = self.plan.computed(self.table.n_tokens)
        of_shard = {shard.number: shard.overlapping(ends) for shard in missing}
        numbers = list(dict.fromkeys(k for shard in missing for k in of_shard[shard.number]))
        packs = on_host(((k, self._run_pack(k)) for k in numbers), self.lm.device)
        total, done = float(computed[numbers].sum()), 0.0
        held: tuple[int, dict[Site, Tensor]] = (-1, {})
        widths, dtype = self.widths, torch_dtype(self.dtype)
        progress("extract", 0, total)
        for shard in missing:
            values = {site: torch.empty(shard.rows, width, dtype=dtype) for site, width in widths.items()}
            for k in of_shard[shard.number]:
                if held[0] != k:
                    held = next(packs)
                    done += float(computed[k])
                    progress("extract", done, total)
                first, last = max(shard.start, int(ends[k])), min(shard.stop, int(ends[k + 1]))
                for site, rows in held[1].items():
                    values[site][first - shard.start : last - shard.start] = rows[first - ends[k] : last - ends[k]]
            yield shard, values

    def _run_pack(self, k: int) -> dict[Site, Tensor]:
        """One forward pass: rows of the wanted tokens of a pack's prompts, per site, on the device."""
        lm, table, prompts = self.lm, self.table, self.plan.pack(k)
        layout = lay_out(self.plan, k, table.tokens, table.starts)
        n_rows = np.diff(table.row_starts)[prompts]
        owner = np.repeat(np.arange(len(prompts)), n_rows)
        token = np.concatenate([table.rows[table.row_starts[p] : table.row_starts[p + 1]] for p in prompts])
        places = torch.from_numpy(layout.at[layout.starts[owner] + token]).to(lm.device)
        owners = torch.from_numpy(owner).to(lm.device) if table.pooled else None
        counts = torch.from_numpy(n_rows).to(lm.device)
        dtype = torch_dtype(self.dtype)

        def select(h: Tensor) -> Tensor:
            rows = h.flatten(0, 1)[places.to(h.device)]
            if owners is None:
                return rows.to(dtype)
            # Sums in float32: a mean over thousands of tokens loses its last bits in half precision.
            sums = torch.zeros(len(counts), rows.shape[1], device=rows.device)
            sums.index_add_(0, owners.to(h.device), rows.float())
            return (sums / counts.to(h.device)[:, None]).to(dtype)

        return capture(lm, lm.pack_inputs(layout), self.sites, select)


def prepare(
    lm: LanguageModel,
    prompts: PromptSet | str | Path,
    *,
    sites: Site | str | Iterable[Site | str] = "resid.post@*",
    at: Position | str = "last",
    pack: Packing = "forest",
    dtype: str | None = None,
    batch_tokens: int | None = None,
    truncate: Truncate | None = None,
    shard_rows: int | None = None,
    format: str = "zarr",  # noqa: A002
    compression: str | None = None,
) -> Job:
    """Settle an extraction without running it; the arguments are those of `extract`."""
    data = prompts if isinstance(prompts, PromptSet) else PromptSet.load(prompts)
    chosen = lm.sites(sites)
    if any(site.unit is not None for site in chosen):
        raise UsageError("a store holds whole parts: extract 'attn.heads@12' and read head 3 as 'attn.heads@12.3'")
    position = at if isinstance(at, Position) else Position.parse(at)
    store_dtype = dtype if dtype is not None else str(lm.dtype).removeprefix("torch.")
    row_bytes = [lm.width(site) * itemsize(store_dtype) for site in chosen]
    table = tokenize(data, lm.tokenizer, at=position, context=lm.context, truncate=truncate)
    grid = Grid.of(int(table.n_rows.sum()), row_bytes, shard_rows=shard_rows)
    budget = batch_tokens if batch_tokens is not None else token_budget(lm, len(table.tokens))
    return Job(
        lm=lm,
        prompts=data,
        table=table,
        plan=lm.plan(table.tokens, table.starts, packing=pack, budget=budget),
        sites=chosen,
        at=position,
        dtype=store_dtype,
        batch_tokens=budget,
        measured=batch_tokens is None,
        truncate=truncate,
        grid=grid,
        format=format,
        compression=compression,
    )


def extract(
    lm: LanguageModel,
    prompts: PromptSet | str | Path,
    *,
    to: str | Path,
    sites: Site | str | Iterable[Site | str] = "resid.post@*",
    at: Position | str = "last",
    pack: Packing = "forest",
    dtype: str | None = None,
    batch_tokens: int | None = None,
    truncate: Truncate | None = None,
    shard_rows: int | None = None,
    format: str = "zarr",  # noqa: A002
    compression: str | None = None,
    share: Share | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress = silent,
) -> ActivationStore:
    """Stream the activations of prompts into a store, a folder or s3://bucket/prefix.

    `prompts` is a `PromptSet` or what `PromptSet.load` takes. `sites` are sites or patterns; `at` says which tokens
    (`last`, `all`, `mean`, `index:-2`, `span:subject:last` …). `pack` says how prompts run together: "forest"
    computes beginnings that prompts share once, and means "padded" for a family that cannot; "single" is one prompt
    per pass; the rows are the same up to rounding. `dtype` is that of the store (default: the activations' own). A
    pack holds at most `batch_tokens` tokens, padding included; by default what is fastest on the device, measured
    if the run is long. `format` is "zarr" or "hdf5", `compression` None or "zstd". Prompts beyond the model's
    context are refused unless `truncate` is "left" or "right". Rows are in the order in which they ran:
    `store.index` says which prompt and token a row is.

    Several processes write one store together if each has its own `share` (default: that of torchrun's or a SLURM
    array's environment). Each then returns the store as it stands when its own shards are written, which is complete
    only for the last.
    """
    job = prepare(
        lm,
        prompts,
        sites=sites,
        at=at,
        pack=pack,
        dtype=dtype,
        batch_tokens=batch_tokens,
        truncate=truncate,
        shard_rows=shard_rows,
        format=format,
        compression=compression,
    )
    share = Share.of_environment() if share is None else share
    if resume or share.world > 1:
        job = job.as_begun_at(to)
    own = job.own(share) if share.world > 1 else None
    return job.run(to, resume=resume, overwrite=overwrite, own=own, progress=progress)


def _recorded_budget(to: str | Path) -> int | None:
    """The token budget of the store at `to`, if there is one: going on with it needs the same."""
    try:
        budget = ActivationStore.open(to).manifest.plan.get("batch_tokens")
    except (ArtifactMissing, CorruptArtifact, SchemaMismatch):  # told when it is opened for writing
        return None
    return budget if isinstance(budget, int) and budget > 0 else None
