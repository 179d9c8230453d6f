"""The ways in which other libraries read activations, each through its own public API.

Enters: a language model and texts. Leaves: the last token's `resid.post` of every block, as one array in memory. Each
library gets its fair best: float32, torch's own threads, batches of 32 in the order given, only the wanted sites. Most
compute logits that nobody asked for, as their documentation has it; where the API lets a caller leave them out, that
is a second way, named "no logits". Does not know reprobe's extraction, nor clocks.
"""

import contextlib
import copy
import importlib
import importlib.metadata
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reprobe import LanguageModel

BATCH = 32

#: Hub names of the bundled models, under which transformer-lens looks up what it knows of a model.
HUB_NAMES = {"smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct", "gemma3-270m": "google/gemma-3-270m"}


@dataclass(frozen=True)
class Way:
    """One way of reading. `read(texts)` is (prompts, blocks, d_model), float32.

    `logits` says whether it computes them. `last_block` is False where the last entry is not the last block's output
    but the state after the final norm, which is what `hidden_states[-1]` of transformers is.
    """

    name: str
    read: Callable[[Sequence[str]], np.ndarray]
    logits: bool
    last_block: bool


def ways(lm: LanguageModel) -> tuple[list[Way], dict[str, str]]:
    """All ways that are installed, and for each library that is not or does not run: why."""
    found, missing = transformers_ways(lm), {}
    for distribution, make in (
        ("transformer-lens", transformer_lens_ways),
        ("nnsight", nnsight_ways),
        ("repeng", repeng_ways),
        ("steering-vectors", steering_vectors_ways),
    ):
        try:
            importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            missing[distribution] = "not installed (uv run --group bench …)"
            continue
        try:
            found += make(lm)
        except Exception as e:  # a peer that breaks with these versions is a result, not an end
            missing[distribution] = does_not_run(e)
    return found, missing


def does_not_run(e: Exception) -> str:
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("transformers", "torch", "numpy"))
    return f"does not run with {versions}: {type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"


# -- transformers ---------------------------------------------------------------------------------------------


def one_by_one(lm: LanguageModel, texts: Sequence[str]) -> np.ndarray:
    """Each prompt by itself with `output_hidden_states` and the whole head, as many research scripts do."""
    rows = []
    with torch.no_grad():
        for text in texts:
            out = lm.net(**lm.tokenizer(text, return_tensors="pt"), output_hidden_states=True)
            rows.append(torch.stack(out.hidden_states[1:])[:, 0, -1])
    return torch.stack(rows).numpy()


def transformers_ways(lm: LanguageModel) -> list[Way]:
    """`output_hidden_states`, of the whole model and of its blocks alone."""

    def batched(net: Any, texts: Sequence[str], **options: Any) -> np.ndarray:
        rows = []
        with torch.no_grad():
            for batch in _batches(texts):
                coded = lm.tokenizer(batch, padding=True, padding_side="right", return_tensors="pt")
                out = net(**coded, output_hidden_states=True, **options)
                rows.append(_last_tokens(out.hidden_states[1:], coded["attention_mask"]))
        return torch.cat(rows).numpy()

    trunk = lm.architecture.trunk(lm.net)
    return [
        Way("transformers, batches of 32", lambda texts: batched(lm.net, texts), True, False),
        Way("transformers, no logits", lambda texts: batched(trunk, texts, use_cache=False), False, False),
    ]


# -- transformer-lens -----------------------------------------------------------------------------------------


def transformer_lens_ways(lm: LanguageModel) -> list[Way]:
    """`run_with_cache` with a filter of names; it hands on `logits_to_keep`, of which 1 column is the least.

    The bridge changes the modules that it wraps: it gets its own copy.
    """
    from transformer_lens.model_bridge import TransformerBridge

    bridge = TransformerBridge.boot_transformers(
        HUB_NAMES[lm.name], hf_model=copy.deepcopy(lm.net), tokenizer=copy.deepcopy(lm.tokenizer)
    )
    names = [f"blocks.{i}.hook_resid_post" for i in range(lm.n_layers)]

    def cached(texts: Sequence[str], **options: Any) -> np.ndarray:
        rows = []
        with torch.no_grad():
            for batch in _batches(texts):
                # Given tokens, because from texts the bridge would prepend a BOS that SmolLM2 does not have.
                coded = lm.tokenizer(batch, padding=True, padding_side="right", return_tensors="pt")
                _, cache = bridge.run_with_cache(coded["input_ids"], names_filter=names, return_type=None, **options)
                rows.append(_last_tokens([cache[name] for name in names], coded["attention_mask"]))
        return torch.cat(rows).numpy()

    return [
        Way("transformer-lens", cached, True, True),
        Way("transformer-lens, no logits", lambda texts: cached(texts, logits_to_keep=1), False, True),
    ]


# -- nnsight --------------------------------------------------------------------------------------------------


def nnsight_ways(lm: LanguageModel) -> list[Way]:
    """A trace that saves the last column (nnsight pads on the left), to the end or stopped after the last block.

    nnsight changes the forward passes of what it wraps: it gets its own copy.
    """
    import nnsight
    from nnsight.modeling.transformers import TransformersModel

    model = TransformersModel(
        copy.deepcopy(lm.net), tokenizer=copy.deepcopy(lm.tokenizer), task="text-generation"
    )  # its LanguageModel is a deprecated name of this
    layers = list(model.model.layers)

    def traced(texts: Sequence[str]) -> np.ndarray:
        rows = []
        with torch.no_grad():
            for batch in _batches(texts):
                with model.trace(batch):
                    seen = nnsight.save([layer.output[:, -1] for layer in layers])
                rows.append(torch.stack(list(seen), 1))
        return torch.cat(rows).numpy()

    def stopped(texts: Sequence[str]) -> np.ndarray:
        rows = []
        with torch.no_grad():
            for batch in _batches(texts):
                with model.trace(batch) as tracer:
                    seen = nnsight.save([layer.output[:, -1] for layer in layers])
                    tracer.stop()
                rows.append(torch.stack(list(seen), 1))
        return torch.cat(rows).numpy()

    return [Way("nnsight", traced, True, True), Way("nnsight, no logits", stopped, False, True)]


# -- repeng ---------------------------------------------------------------------------------------------------


def repeng_ways(lm: LanguageModel) -> list[Way]:
    """`batched_get_hiddens`, which training a control vector begins with; also given the blocks for the model."""
    with float_of_numpy_1():
        batched_get_hiddens = importlib.import_module("repeng.extract").batched_get_hiddens
    tokenizer, layers = copy.deepcopy(lm.tokenizer), list(range(lm.n_layers))

    def read(net: Any, texts: Sequence[str]) -> np.ndarray:
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bar has no switch
            found = batched_get_hiddens(net, tokenizer, list(texts), layers, BATCH)
        return np.stack([found[layer] for layer in layers], 1)

    trunk = lm.architecture.trunk(lm.net)
    return [
        Way("repeng", lambda texts: read(lm.net, texts), True, False),
        Way("repeng, no logits", lambda texts: read(trunk, texts), False, False),
    ]


@contextlib.contextmanager
def float_of_numpy_1() -> Iterator[None]:
    """repeng 0.4 names `np.float_` in a type hint; numpy 2 has dropped it. It is there during the import only."""
    if hasattr(np, "float_"):
        yield
        return
    np.float_ = np.float64
    try:
        yield
    finally:
        del np.float_


# -- steering-vectors -----------------------------------------------------------------------------------------


def steering_vectors_ways(lm: LanguageModel) -> list[Way]:
    """`extract_activations`, which training a steering vector begins with; also given the blocks for the model.

    It takes pairs: prompts 0 and 1, 2 and 3, … are given as positive and negative, and run in separate batches of 32.
    """
    from steering_vectors import extract_activations

    tokenizer = copy.deepcopy(lm.tokenizer)

    def read(net: Any, texts: Sequence[str]) -> np.ndarray:
        pairs = list(zip(texts[::2], texts[1::2], strict=True))
        sides = extract_activations(net, tokenizer, pairs, batch_size=BATCH)
        both = [torch.stack([torch.cat(side[layer]) for layer in range(lm.n_layers)], 1) for side in sides]
        return torch.stack(both, 1).flatten(0, 1).numpy()

    trunk = lm.architecture.trunk(lm.net)
    return [
        Way("steering-vectors", lambda texts: read(lm.net, texts), True, True),
        Way("steering-vectors, no logits", lambda texts: read(trunk, texts), False, True),
    ]


# -- shared ---------------------------------------------------------------------------------------------------


def _batches(texts: Sequence[str]) -> Iterator[list[str]]:
    for start in range(0, len(texts), BATCH):
        yield list(texts[start : start + BATCH])


def _last_tokens(states: Sequence[Tensor], mask: Tensor) -> Tensor:
    """(prompts, blocks, d_model) of right-padded states, each (prompts, columns, d_model)."""
    prompts, last = torch.arange(len(mask)), mask.sum(1) - 1
    return torch.stack([h[prompts, last] for h in states], 1)
