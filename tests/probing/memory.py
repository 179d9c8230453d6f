"""Stores of given rows, in memory and on disk, and rows with a known answer."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import torch
from store import synthetic

from reprobe.model.identity import ModelIdentity
from reprobe.model.sites import Parts, Site
from reprobe.store import ActivationStore, StoredSite, StoreWriter


@dataclass
class MemoryStore:
    """Looks like an `ActivationStore`: whole sites in memory, one index."""

    arrays: dict[Site, torch.Tensor]
    index: pl.DataFrame
    head_dim: int = 7
    reads: list[Site] = field(default_factory=list)

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(self.arrays)

    @property
    def parts(self) -> Parts:
        n = 1 + max(s.layer or 0 for s in self.sites)
        of_layer = tuple(frozenset(s.part for s in self.sites if s.layer == i) for i in range(n))
        heads = {s.part: t.shape[1] // self.head_dim for s, t in self.arrays.items() if s.part == "attn.heads"}
        return Parts("a model", of_layer, heads)

    @property
    def manifest(self) -> Any:
        return SimpleNamespace(
            identity=IDENTITY, prompts="p" * 64, plan={"at": "last"}, digest="s" * 64, dtype="float32"
        )

    def width(self, site: Site) -> int:
        return self.arrays[site.whole].shape[1] if site.unit is None else self.head_dim

    def read(self, site: Site, rows: Any = None) -> torch.Tensor:
        self.reads.append(site)
        return self.arrays[site] if rows is None else self.arrays[site][torch.as_tensor(rows)]


IDENTITY = ModelIdentity("tiny", None, "llama", 3, 35, "a" * 64, "b" * 64, None, "float32", None)


def make_index(labels: Any, *, group: Any = None, pair: Any = None, prompt: Any = None) -> pl.DataFrame:
    n = len(labels)
    columns = {
        "row": np.arange(n),
        "prompt": [f"p{i:04}" for i in range(n)] if prompt is None else prompt,
        "position": pl.Series(np.arange(n) % 11, dtype=pl.Int32),
        "token": pl.Series(np.full(n, 5), dtype=pl.Int32),
        "label": labels,
        "group": pl.Series([None] * n if group is None else [f"g{g}" for g in group], dtype=pl.String),
        "pair": pl.Series([None] * n if pair is None else pair, dtype=pl.String),
        "n_tokens": pl.Series(np.full(n, 12), dtype=pl.Int32),
    }
    return pl.DataFrame(columns)


def planted_rows(n: int = 240, width: int = 21, strength: float = 3.0, seed: int = 0) -> SimpleNamespace:
    """Pairs of rows (2i, 2i+1) of opposite labels, `strength` apart along `axis`, in unequal noise."""
    rng = np.random.default_rng(seed)
    axis = rng.standard_normal(width)
    axis /= np.linalg.norm(axis)
    y = np.arange(n) % 2
    shared = np.repeat(rng.standard_normal((n // 2, width)), 2, axis=0)
    X = shared + rng.standard_normal((n, width)) * 0.3 + strength * np.outer(y - 0.5, axis) + 5.0
    return SimpleNamespace(X=X, y=y, axis=axis, pairs=np.arange(n) // 2)


def make_store(arrays: dict[str, Any], labels: Any, **index: Any) -> MemoryStore:
    """`make_store({site: rows}, labels, group=…, pair=…)`: a store in memory."""
    tensors = {Site.parse(s): torch.as_tensor(np.asarray(a), dtype=torch.float32) for s, a in arrays.items()}
    return MemoryStore(tensors, make_index(labels, **index))


def on_disk(
    path: Path, arrays: Mapping[Site, Any], index: pl.DataFrame, *, head_dim: int = 7, **options: Any
) -> ActivationStore:
    """The same as a store on disk; `options` are those of `StoreWriter.create`."""
    sites = [StoredSite(s, a.shape[1], head_dim if s.part == "attn.heads" else None) for s, a in arrays.items()]
    about = {"identity": IDENTITY, "prompts": "p" * 64, "plan": {"at": "last"}, "dtype": "float32"}
    given = about | options | {"sites": sites, "index": index, "tokens": synthetic.tokens(index)}
    synthetic.write(StoreWriter.create(path, **given), arrays)
    return ActivationStore.open(path)
