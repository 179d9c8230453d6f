"""What the child processes of the crash tests run: imported by a fork server, so that each child starts at once."""

import importlib
import os
import resource
from functools import cache
from pathlib import Path

import torch
from tiny import tiny_model

import reprobe as rp
from reprobe.model.language_model import LanguageModel


@cache
def model() -> LanguageModel:
    torch.set_num_threads(1)
    return tiny_model()


def prompts(n: int) -> rp.PromptSet:
    words = ("the cat", "a dog", "an owl", "the end of it", "on and on")
    return rp.PromptSet.from_records({"id": f"{i:05d}", "text": f"{words[i % 5]} is number {i}"} for i in range(n))


def run(
    path: Path,
    n: int,
    shard_rows: int,
    resume: bool,
    sites: str = "resid.post@*,attn.heads@1",
    variables: dict[str, str] | None = None,
    options: dict[str, str | None] | None = None,
) -> None:
    """An extraction of every token of n prompts, in an environment with further variables."""
    os.environ.update(variables or {})
    rp.extract(
        model(),
        prompts(n),
        to=path,
        sites=sites,
        at="all",
        batch_tokens=64,
        shard_rows=shard_rows,
        resume=resume,
        **(options or {}),
    )


def peak(path: Path, n: int, out: Path) -> None:
    """Write the peak resident memory (MiB) of extracting n prompts at every site."""
    parts = ("resid.pre", "attn.heads", "attn.out", "resid.mid", "mlp.neurons", "mlp.out", "resid.post")
    run(path, n, 2048, resume=False, sites=",".join(f"{part}@*" for part in parts))
    out.write_text(str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))


if "REPROBE_WARM" in os.environ:  # in the fork server; no more than this, since polars' threads do not survive a fork
    model()
    importlib.import_module("reprobe.extraction")
    importlib.import_module("reprobe.store")
