"""How fast stores are written and read, and how small they are, per format and compression.

    uv run python experiments/bench/reading.py [--store PATH] [--rows N] [--blocks N] [--width N] [--dtype NAME] …

Fills a store with random normal numbers (or, with --store, copies the rows of that store, whose numbers are real)
in each format and compression, and reads it in order and shuffled, one site and all sites. Prints one JSON object;
speeds are in bytes of rows per second, whatever they take on disk. Each reading is done `--repeats` times, in order
and shuffled by turns, and the fastest counts. Files come from the page cache if they fit; --cold evicts them first.
"""

import argparse
import inspect
import itertools
import json
import os
import tempfile
import time
from pathlib import Path

import polars as pl
import torch

from reprobe.model.identity import ModelIdentity
from reprobe.model.sites import Site
from reprobe.store import ActivationStore, StoredSite, StoreWriter

PROMPT_TOKENS = 100  # of the synthetic store, in which every token has a row
VOCABULARY = 50_000


def synthetic(rows, blocks, width, dtype):
    """Arguments of `StoreWriter.create`, and a function that gives a shard's rows."""
    generator = torch.Generator().manual_seed(0)
    prompts = -(-rows // PROMPT_TOKENS)
    ids = torch.randint(VOCABULARY, (prompts, PROMPT_TOKENS), generator=generator)
    number = pl.Series(range(rows), dtype=pl.UInt64)
    prompt = [f"prompt-{i // PROMPT_TOKENS:07d}" for i in range(rows)]
    index = pl.DataFrame(
        {
            "row": number,
            "prompt": prompt,
            "position": (number % PROMPT_TOKENS).cast(pl.Int32),
            "token": pl.Series(ids.flatten()[:rows].tolist(), dtype=pl.Int32),
            "label": number // PROMPT_TOKENS % 2 == 0,
            "group": prompt,
            "pair": pl.Series([None] * rows, dtype=pl.String),
            "n_tokens": pl.Series([PROMPT_TOKENS] * rows, dtype=pl.Int32),
        }
    )
    sites = [Site("resid.post", block) for block in range(blocks)]
    arguments = {
        "identity": ModelIdentity("random", None, "llama", blocks, width, "0" * 64, "0" * 64, None, dtype, None),
        "prompts": "0" * 64,
        "plan": {"random normal": True},
        "sites": [StoredSite(site, width) for site in sites],
        "dtype": dtype,
        "index": index,
        "tokens": pl.DataFrame(
            {
                "prompt": index["prompt"].unique(maintain_order=True),
                "tokens": pl.Series(ids.tolist(), dtype=pl.List(pl.Int32)),
            }
        ),
    }

    def values(shard):
        return {s: torch.randn(shard.rows, width, generator=generator).to(getattr(torch, dtype)) for s in sites}

    return arguments, values


def copied(store):
    m = store.manifest
    arguments = {
        "identity": m.identity, "prompts": m.prompts, "plan": m.plan, "sites": m.sites, "dtype": m.dtype,
        "index": store.index, "tokens": store.tokens, "shard_rows": m.grid.shard_rows, "chunk_rows": m.grid.chunk_rows,
    }  # fmt: skip

    def values(shard):
        return {site: store.read(site, slice(shard.start, shard.stop)) for site in store.sites}

    return arguments, values


def variants():
    """Formats and compressions that this version writes, as arguments of `StoreWriter.create`."""
    takes = inspect.signature(StoreWriter.create).parameters
    formats = [{"format": f} for f in ("zarr", "hdf5")] if "format" in takes else [{}]
    compressions = [{"compression": c} for c in (None, "zstd")] if "compression" in takes else [{}]
    return [f | c for f, c in itertools.product(formats, compressions)]


def write(path, arguments, values, variant):
    """Bytes of rows per second, commits and fsync included, making the values not."""
    seconds = 0.0
    with StoreWriter.create(path, **arguments, **variant) as writer:
        for shard in writer.missing():
            rows = values(shard)
            start = time.perf_counter()
            writer.write_shard(shard.number, rows)
            seconds += time.perf_counter() - start
    return writer.manifest.row_bytes * writer.manifest.grid.rows / seconds


def files_of_shards(path):
    """The files that hold rows (not the index, the tokens and the descriptions)."""
    return [
        p for p in Path(path).rglob("*") if p.is_file() and p.suffix not in {".json", ".parquet"} and p.name[0] != "."
    ]


def evict(path):
    for file in files_of_shards(path):
        fd = os.open(file, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def read(store, sites, batch_rows, seed, cold):
    if cold:
        evict(store.path)
    start, n = time.perf_counter(), 0
    for batch in store.iter(sites, batch_rows=batch_rows, shuffle=seed):
        n += sum(values.nbytes for values in batch.values.values())
    return n / (time.perf_counter() - start)


def reading(store, sites, options):
    speed = {"in order": 0.0, "shuffled": 0.0}
    for repeat in range(options.repeats):
        for name, seed in (("in order", None), ("shuffled", repeat)):
            speed[name] = max(speed[name], read(store, sites, options.batch_rows, seed, options.cold))
    return {
        "in order, bytes/s": round(speed["in order"]),
        "shuffled, bytes/s": round(speed["shuffled"]),
        "shuffled / in order": round(speed["shuffled"] / speed["in order"], 2),
    }


def measured(path, options):
    store = ActivationStore.open(path)
    return {
        "one site": reading(store, store.sites[:1], options),
        "all sites": reading(store, store.sites, options),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", type=Path, help="take the rows of this store instead of random numbers")
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--blocks", type=int, default=30)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch-rows", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cold", action="store_true", help="evict the files from the page cache before each reading")
    parser.add_argument("--folder", type=Path, help="where to write (by default the folder of temporary files)")
    options = parser.parse_args()
    if options.store is None:
        arguments, values = synthetic(options.rows, options.blocks, options.width, options.dtype)
    else:
        arguments, values = copied(ActivationStore.open(options.store))
    out = {
        "rows of": "random normal" if options.store is None else options.store.name,
        "rows": arguments["index"].height,
        "sites": len(arguments["sites"]),
        "widest site": max(s.width for s in arguments["sites"]),
        "dtype": arguments["dtype"],
        "batch_rows": options.batch_rows,
        "page cache": "evicted" if options.cold else "as it comes",
    }
    for variant in variants():
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            path = Path(folder) / "s.reprobe"
            speed = write(path, arguments, values, variant)
            store = ActivationStore.open(path)
            m = store.manifest
            shards = sum(p.stat().st_size for p in files_of_shards(path))
            out.setdefault("grid", {"shard_rows": m.grid.shard_rows, "chunk_rows": m.grid.chunk_rows})
            out.setdefault("index, bytes per row", round((path / "index.parquet").stat().st_size / store.rows, 2))
            tokens = store.tokens["tokens"].list.len().sum()
            out.setdefault("tokens, bytes per token", round((path / "tokens.parquet").stat().st_size / tokens, 2))
            name = ", ".join(str(v) for v in variant.values()) or "zarr, None"
            out[name] = {
                "written, bytes/s": round(speed),
                "compression ratio": round(m.row_bytes * store.rows / shards, 3),
            } | measured(path, options)
    print(json.dumps(out, indent=2))


if __name__ == "__main__":
    main()
