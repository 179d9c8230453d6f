"""Streaming activations from a model into a store.

Enters: a language model, a prompt set, sites, a position. Leaves: an `ActivationStore` on disk. Prompts run in packs
through the blocks only, as far as the last wanted site; wanted tokens are gathered on the device; a shard is written
while the next is computed. What is in memory at once is two shards and one pack, whatever the number of prompts.
"""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reprobe.errors import UsageError
from reprobe.extraction.plan import Plan, padded_plan
from reprobe.model.hooks import board_of, capture
from reprobe.model.language_model import LanguageModel
from reprobe.model.sites import UNIT_PARTS, Site
from reprobe.model.text import Truncate
from reprobe.progress import Progress, silent
from reprobe.prompts import Position, PromptSet, TokenTable, index_frame, token_frame, tokenize
from reprobe.store import ActivationStore, Grid, Shard, StoredSite, StoreWriter, size_on_disk
from reprobe.store.layout import itemsize

#: Padded tokens of one pack unless the caller says otherwise; larger packs feed a GPU, smaller fit a CPU's cache.
BATCH_TOKENS = {"cpu": 512, "cuda": 16384}


@dataclass(frozen=True)
class Job:
    """An extraction that is settled but not started: what will run, and what it will take.

    `rows` vectors per site, `n_tokens` real tokens, `n_bytes` of activations on disk.
    """

    lm: LanguageModel
    prompts: PromptSet
    table: TokenTable
    plan: Plan
    sites: tuple[Site, ...]
    at: Position
    dtype: str
    batch_tokens: int
    truncate: Truncate | None
    grid: Grid

    @property
    def rows(self) -> int:
        return self.grid.rows

    @property
    def n_tokens(self) -> int:
        return len(self.table.tokens)

    @property
    def widths(self) -> dict[Site, int]:
        return {site: self.lm.width(site) for site in self.sites}

    @property
    def n_bytes(self) -> int:
        return size_on_disk(self.widths.values(), self.grid, self.dtype)

    def run(
        self, to: str | Path, *, resume: bool = False, overwrite: bool = False, progress: Progress = silent
    ) -> ActivationStore:
        """Run, or go on with, this job into the store at `to`.

        Raises `ArtifactExists` if `to` exists and neither `resume` nor `overwrite` is given, `IdentityMismatch` if
        the store there was made with another model, plan or data, `UsageError` while the model is being steered,
        `DiskFull`, `StoreLocked`. Whatever ends the run, completed shards stay.
        """
        if board_of(self.lm).changed:
            raise UsageError(
                "the model is being steered, and its activations would pass for the plain model's: extract outside "
                "the steering context, or read steered activations with observe"
            )
        writer = StoreWriter.create(
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
            resume=resume,
            overwrite=overwrite,
        )
        with writer, ThreadPoolExecutor(max_workers=1, thread_name_prefix="reprobe-write") as pool:
            pending: Future[None] | None = None
            try:
                for shard, values in self._shards(writer.missing(), progress):
                    if pending is not None:
                        pending.result()  # at most one shard waits while one is being filled
                    pending = pool.submit(writer.write_shard, shard.number, values)
            finally:
                if pending is not None:
                    pending.result()
        return ActivationStore.open(to)

    def _settings(self) -> dict[str, Any]:
        """All that decides the bytes besides the model, the prompts and the sites."""
        return {
            "at": str(self.at),
            "pack": "padded",
            "batch_tokens": self.batch_tokens,
            "truncate": self.truncate,
            "attention": str(getattr(self.lm.net.config, "_attn_implementation", None)),
        }

    def _unit_width(self, site: Site) -> int | None:
        """Width of one head or neuron, for the parts that have units."""
        return self.lm.width(Site(site.part, site.layer, 0)) if site.part in UNIT_PARTS else None

    def _shards(self, missing: Sequence[Shard], progress: Progress) -> Iterator[tuple[Shard, dict[Site, Tensor]]]:
        """Fill the missing shards one after the other. A pack whose rows span two of them runs once."""
        counts = np.ones(len(self.prompts), dtype=np.int64) if self.table.pooled else np.diff(self.table.row_starts)
        ends = np.concatenate([[0], np.cumsum(counts[self.plan.order])])[self.plan.cuts]
        tokens = np.diff(self.table.starts)
        packs = {shard.number: _overlapping(ends, shard) for shard in missing}
        total = float(sum(tokens[self.plan.pack(k)].sum() for k in {k for of in packs.values() for k in of}))
        done = 0.0
        held: tuple[int, dict[Site, Tensor]] = (-1, {})
        widths, dtype = self.widths, getattr(torch, self.dtype)
        progress("extract", 0, total)
        for shard in missing:
            values = {site: torch.empty(shard.rows, width, dtype=dtype) for site, width in widths.items()}
            for k in packs[shard.number]:
                if held[0] != k:
                    held = (k, self._run_pack(self.plan.pack(k)))
                    done += float(tokens[self.plan.pack(k)].sum())
                    progress("extract", done, total)
                first, last = max(shard.start, int(ends[k])), min(shard.stop, int(ends[k + 1]))
                for site, rows in held[1].items():
                    values[site][first - shard.start : last - shard.start] = rows[first - ends[k] : last - ends[k]]
            yield shard, values

    def _run_pack(self, prompts: np.ndarray) -> dict[Site, Tensor]:
        """One forward pass: rows of the wanted tokens of these prompts, per site, on the host."""
        lm, table = self.lm, self.table
        lengths = table.starts[prompts + 1] - table.starts[prompts]
        ids = np.full((len(prompts), int(lengths.max())), lm.pad_id, dtype=np.int64)
        where: list[np.ndarray] = []
        for i, p in enumerate(prompts):
            ids[i, : lengths[i]] = table.tokens[table.starts[p] : table.starts[p + 1]]
            where.append(table.rows[table.row_starts[p] : table.row_starts[p + 1]])
        n_rows = np.asarray([len(w) for w in where])
        owner = torch.from_numpy(np.repeat(np.arange(len(prompts)), n_rows)).to(lm.device)
        column = torch.from_numpy(np.concatenate(where).astype(np.int64)).to(lm.device)

        def select(h: Tensor) -> Tensor:
            rows = h[owner.to(h.device), column.to(h.device)]
            if not table.pooled:
                return rows
            # Sums in float32: a mean over thousands of tokens loses its last bits in half precision.
            sums = torch.zeros(len(prompts), rows.shape[1], device=rows.device)
            sums.index_add_(0, owner.to(h.device), rows.float())
            return sums / torch.from_numpy(n_rows).to(rows.device)[:, None]

        inputs: dict[str, Tensor] = {"input_ids": torch.from_numpy(ids).to(lm.device)}
        if lm.architecture.kind == "encoder":
            columns = np.arange(ids.shape[1])
            inputs["attention_mask"] = torch.from_numpy((columns < lengths[:, None]).astype(np.int64)).to(lm.device)
        # Decoders need no mask: padding is on the right, where no real token looks.
        found = capture(lm, inputs, self.sites, select)
        return {site: rows.to(getattr(torch, self.dtype)).cpu() for site, rows in found.items()}


def prepare(
    lm: LanguageModel,
    prompts: PromptSet | str | Path,
    *,
    sites: Site | str | Iterable[Site | str] = "resid.post@*",
    at: Position | str = "last",
    dtype: str | None = None,
    batch_tokens: int | None = None,
    truncate: Truncate | None = None,
    shard_rows: int | None = None,
) -> Job:
    """Settle an extraction without running it; the arguments are those of `extract`."""
    data = prompts if isinstance(prompts, PromptSet) else PromptSet.load(prompts)
    chosen = lm.sites(sites)
    if any(site.unit is not None for site in chosen):
        raise UsageError("a store holds whole parts: extract 'attn.heads@12' and read head 3 as 'attn.heads@12.3'")
    position = at if isinstance(at, Position) else Position.parse(at)
    store_dtype = dtype if dtype is not None else str(lm.dtype).removeprefix("torch.")
    table = tokenize(data, lm.tokenizer, at=position, context=lm.context, truncate=truncate)
    budget = batch_tokens if batch_tokens is not None else BATCH_TOKENS.get(lm.device.type, BATCH_TOKENS["cpu"])
    row_bytes = [lm.width(site) * itemsize(store_dtype) for site in chosen]
    return Job(
        lm=lm,
        prompts=data,
        table=table,
        plan=padded_plan(np.diff(table.starts), budget),
        sites=chosen,
        at=position,
        dtype=store_dtype,
        batch_tokens=budget,
        truncate=truncate,
        grid=Grid.of(len(data) if table.pooled else len(table.rows), row_bytes, shard_rows=shard_rows),
    )


def extract(
    lm: LanguageModel,
    prompts: PromptSet | str | Path,
    *,
    to: str | Path,
    sites: Site | str | Iterable[Site | str] = "resid.post@*",
    at: Position | str = "last",
    dtype: str | None = None,
    batch_tokens: int | None = None,
    truncate: Truncate | None = None,
    shard_rows: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress = silent,
) -> ActivationStore:
    """Stream the activations of prompts into a store on disk.

    `prompts` is a `PromptSet` or what `PromptSet.load` takes. `sites` are sites or patterns; `at` says which tokens
    (`last`, `all`, `mean`, `index:-2`, `span:subject:last` …). `dtype` is that of the store (default: the
    activations' own). A pack holds at most `batch_tokens` padded tokens. Prompts beyond the model's context are
    refused unless `truncate` is "left" or "right". Rows are in the order in which they ran: `store.index` says
    which prompt and token a row is.
    """
    job = prepare(
        lm,
        prompts,
        sites=sites,
        at=at,
        dtype=dtype,
        batch_tokens=batch_tokens,
        truncate=truncate,
        shard_rows=shard_rows,
    )
    return job.run(to, resume=resume, overwrite=overwrite, progress=progress)


def _overlapping(ends: np.ndarray, shard: Shard) -> range:
    """Packs that hold rows of a shard; pack k holds rows ends[k] to ends[k + 1]."""
    first = int(np.searchsorted(ends, shard.start, side="right")) - 1
    return range(first, int(np.searchsorted(ends, shard.stop, side="left")))
