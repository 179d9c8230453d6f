"""Stores in which something is wrong: written through `StoreWriter`, so that every checksum is right."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from store.synthetic import write

import reprobe as rp
from reprobe.store import StoreWriter

TEXTS = [
    "the cat is on the mat",
    "a dog",
    "in the end and on the other hand of it",
    "an owl is here",
    "on and on",
    "the rain in the plain is thin",
    "one and another",
]

Values = dict[rp.Site, torch.Tensor]


def prompts() -> rp.PromptSet:
    rows = [{"id": f"p{i}", "text": t, "label": i % 2, "spans": {"who": (0, 3)}} for i, t in enumerate(TEXTS)]
    return rp.PromptSet.from_records(rows)


def site(text: str) -> rp.Site:
    return rp.Site.parse(text)


def values_of(store: rp.ActivationStore) -> Values:
    return {s: store.read(s) for s in store.sites}


def plant(path: Path, like: rp.ActivationStore, values: Mapping[rp.Site, torch.Tensor], **changes: Any):
    """A store like another but with these values; `changes` replace arguments of `StoreWriter.create`."""
    manifest = like.manifest
    kept = tuple(s for s in manifest.sites if s.site in values)
    arguments = {
        "identity": like.identity,
        "prompts": manifest.prompts,
        "plan": manifest.plan,
        "sites": kept,
        "dtype": manifest.dtype,
        "index": like.index,
        "tokens": like.tokens,
    }
    write(StoreWriter.create(path, **(arguments | changes)), values)
    store = rp.ActivationStore.open(path)
    assert store.verify().ok
    return store


def planted(path: Path, lm: Any, edit: Callable[[Values], Values], *, at: str = "all", sites: str, **changes: Any):
    """What `edit` makes of a true store's values, as a store that claims to be true."""
    true = rp.extract(lm, prompts(), sites=sites, at=at, to=path / "true")
    return plant(path / "planted", true, edit(values_of(true)), **changes)
