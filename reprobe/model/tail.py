"""The blocks above a layer, run again and again on the same tokens.

Enters: a language model, rows of token ids, in each a token from which on the stream will be changed, and a block.
Leaves: the activations of those tokens on, and a `Tail`: a function from the block's output there to the state after
the final norm, with gradients. What a change cannot reach, the blocks below and the tokens before, is computed once.
Does not know facts, edits or losses.

The network itself is run once with a key-value cache of the earlier tokens, and the arguments are kept with which it
calls its blocks (masks, rotary embeddings, biases of the family's own kind); a `Tail` calls the blocks with these
again. So nothing about a family is repeated here.
"""

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from reprobe.errors import UnsupportedOperation
from reprobe.model.hooks import board_of, called, observe
from reprobe.model.sites import Site

if TYPE_CHECKING:
    from reprobe.model.language_model import LanguageModel


@dataclass(frozen=True, eq=False)
class Aligned:
    """Token rows padded on both sides so that the chosen token of every row is in column `first`."""

    input_ids: Int[Tensor, "rows columns"]
    real: Bool[Tensor, "rows columns"]
    first: int

    @property
    def position_ids(self) -> Int[Tensor, "rows columns"]:
        """Position of each token among its row's real tokens; 0 on pads before them."""
        return (self.real.long().cumsum(1) - 1).clamp(min=0)


def align(lm: "LanguageModel", rows: Sequence[Int[np.ndarray, " tokens"]], at: Sequence[int]) -> Aligned:
    """Rows of token ids, with token `at[i]` of row i in the same column."""
    first = max(at)
    width = first + max(len(row) - a for row, a in zip(rows, at, strict=True))
    ids = np.full((len(rows), width), lm.pad_id, dtype=np.int64)
    real = np.zeros((len(rows), width), dtype=bool)
    for i, (row, a) in enumerate(zip(rows, at, strict=True)):
        ids[i, first - a : first - a + len(row)] = row
        real[i, first - a : first - a + len(row)] = True
    return Aligned(torch.from_numpy(ids).to(lm.device), torch.from_numpy(real).to(lm.device), first)


@dataclass(frozen=True, eq=False)
class _Call:
    """The arguments of one block, without the stream itself; `named` says that the stream is a keyword."""

    block: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    named: bool


@dataclass(frozen=True, eq=False)
class Tail:
    """The blocks above `layer` for the columns of an `Aligned` from `first` on. Made by `tail_above`.

    `seen[site]` is (rows, columns, width) of those columns: what the network has there unchanged.
    """

    layer: int
    seen: Mapping[Site, Float[Tensor, "rows columns width"]]
    _lm: "LanguageModel"
    _calls: tuple[_Call, ...]
    _cache: Any
    _given: Any

    def run(self, h: Float[Tensor, "rows columns d_model"]) -> Float[Tensor, "rows columns d_model"]:
        """The state after the final norm, given the output of block `layer`. Differentiable in `h`."""
        cache = _branch(self._cache)

        def own(value: Any) -> Any:
            return cache if value is self._given else value

        for call in self._calls:
            kwargs = {name: own(value) for name, value in call.kwargs.items()}
            args = tuple(own(value) for value in call.args)
            out = call.block(*args, hidden_states=h, **kwargs) if call.named else call.block(h, *args, **kwargs)
            h = out if isinstance(out, Tensor) else out[0]
        norm = self._lm.architecture.final_norm(self._lm.net)
        return h if norm is None else norm(h)


@torch.no_grad()
def tail_above(lm: "LanguageModel", batch: Aligned, layer: int, sites: Sequence[Site]) -> Tail:
    """The tail above block `layer`, and what `sites` hold at the columns from `batch.first` on.

    Raises `UnsupportedOperation` for encoders, whose earlier tokens see the later ones, and while the model is being
    steered.
    """
    from transformers import DynamicCache

    if lm.architecture.kind != "decoder":
        raise UnsupportedOperation(f"{lm.name} is an encoder ({lm.architecture.family}): it has no earlier tokens")
    if board_of(lm).changed:
        raise UnsupportedOperation("the model is being steered: leave the steering context first")
    trunk = lm.architecture.trunk(lm.net)
    # Without the config: layers that keep every token. The masks know the windows.
    cache = DynamicCache()
    first, blocks = batch.first, lm.architecture.blocks(lm.net)[layer + 1 :]
    if first:
        trunk(**_inputs(lm, batch, 0, first), past_key_values=cache, use_cache=True)
    given = _branch(cache)
    with observe(lm, sites) as seen, _recorded(blocks) as calls:
        trunk(**_inputs(lm, batch, first, batch.real.shape[1]), past_key_values=given, use_cache=True)
    return Tail(layer, dict(seen), lm, tuple(calls), cache, given)


def _inputs(lm: "LanguageModel", batch: Aligned, start: int, stop: int) -> dict[str, Tensor]:
    inputs = {"input_ids": batch.input_ids[:, start:stop], "attention_mask": batch.real[:, :stop].long()}
    if lm.architecture.takes_positions:
        inputs["position_ids"] = batch.position_ids[:, start:stop]
    return inputs


def _branch(cache: Any) -> Any:
    """A cache that holds the same keys and values and grows by itself: growing makes new tensors."""
    branch = copy.copy(cache)
    branch.layers = [copy.copy(layer) for layer in cache.layers]
    return branch


@contextlib.contextmanager
def _recorded(blocks: Sequence[nn.Module]) -> Iterator[list[_Call]]:
    """The arguments with which blocks are called inside the context. Reads nothing and changes nothing of the run."""
    calls: list[_Call] = []

    def keep(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        calls.append(_Call(block, args[1:], rest, named=not args))

    with called(blocks, keep):
        yield calls
