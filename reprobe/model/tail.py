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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from reprobe.errors import UnsupportedOperation
from reprobe.model.hooks import board_of, called, observe
from reprobe.model.passes import Prompts, Run, Tokens, positions_of
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
        """Position of each token among its row's real tokens; on pads, that of the token before them, or 0."""
        return positions_of(self.real)


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

    def run(self, h: Tensor, own: Callable[[Any], Any]) -> Tensor:
        """The block's output for the stream `h`, each other argument replaced by `own` of it."""
        args, kwargs = [own(value) for value in self.args], {name: own(value) for name, value in self.kwargs.items()}
        out = self.block(*args, hidden_states=h, **kwargs) if self.named else self.block(h, *args, **kwargs)
        found: Tensor = out if isinstance(out, Tensor) else out[0]
        return found


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
            h = call.run(h, own)
        norm = self._lm.architecture.final_norm(self._lm.net)
        return h if norm is None else norm(h)


@torch.no_grad()
def tail_above(lm: "LanguageModel", batch: Aligned, layer: int, sites: Sequence[Site]) -> Tail:
    """The tail above block `layer`, and what `sites` hold at the columns from `batch.first` on.

    Raises `UnsupportedOperation` for encoders, whose earlier tokens see the later ones, and while the model is being
    steered.
    """
    from transformers import DynamicCache

    require_decoder(lm)
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


# -- rows that branch off at any token and any block ----------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Held:
    """Rows of equally many tokens that the network has run: what was seen there, and every block's keys and values.

    `seen[site]` and `end`, the state after the final norm, are (rows, columns, width).
    """

    ids: Int[Tensor, "rows columns"]
    seen: Mapping[Site, Float[Tensor, "rows columns width"]]
    end: Float[Tensor, "rows columns d_model"]
    _cache: Any


@torch.no_grad()
def hold(lm: "LanguageModel", ids: Int[Tensor, "rows columns"], sites: Sequence[Site]) -> Held:
    """Run rows without padding, under whatever interventions are active. Raises `UnsupportedOperation` for encoders."""
    from transformers import DynamicCache

    require_decoder(lm)
    cache, everything = DynamicCache(), torch.ones_like(ids, dtype=torch.bool)
    with observe(lm, sites) as seen:
        inputs = _inputs(lm, Aligned(ids, everything, 0), 0, ids.shape[1])
        out = lm.architecture.trunk(lm.net)(**inputs, past_key_values=cache, use_cache=True)
    return Held(ids, dict(seen), out.last_hidden_state, cache)


@dataclass(frozen=True, eq=False)
class Branches:
    """The blocks, one at a time, for tokens from column `first` on that follow the earlier tokens of held rows.

    Rows are copies of the held ones: row r continues held row r mod (number of those). Made by `branches`.
    """

    first: int
    _lm: "LanguageModel"
    _held: Held
    _calls: tuple[_Call, ...]
    _given: Any

    def run(self, layer: int, h: Float[Tensor, "rows columns d_model"]) -> Float[Tensor, "rows columns d_model"]:
        """The output of block `layer` at the columns from `first` on, given its input. Interventions act there."""
        return self._call(layer, h, self._past(layer, self.first, len(h)))

    def run_end(
        self, layer: int, h: Float[Tensor, "rows columns d_model"], end: "Branches"
    ) -> Float[Tensor, "rows ending d_model"]:
        """The same at the columns of `end` only, which begin later: of the others, only keys and values are computed.

        For the last block, where no other token reads what they would become.
        """
        n = end.first - self.first
        if n == 0:
            return self.run(layer, h)
        taken = _Taken()
        with contextlib.suppress(_Enough):
            self._call(layer, h, taken)
        past = self._past(layer, self.first, len(h))
        past.update(taken.keys.narrow(-2, 0, n), taken.values.narrow(-2, 0, n))
        return end._call(layer, h[:, n:], past)

    def _past(self, layer: int, columns: int, rows: int) -> Any:
        """Keys and values of a block at the first columns, for copies of the held rows."""
        held = self._held._cache.layers[layer]
        own = type(held)()
        if columns:
            own.update(*(_copies(t.narrow(-2, 0, columns), rows // len(t)) for t in (held.keys, held.values)))
        return own

    @torch.no_grad()
    def _call(self, layer: int, h: Tensor, past: Any) -> Tensor:
        cache = copy.copy(self._held._cache)
        cache.layers = [past if i == layer else other for i, other in enumerate(cache.layers)]
        rows, now = len(h), h.shape[1]
        real = torch.ones(rows, self.first + now, dtype=torch.bool, device=h.device)
        tokens = Tokens(Run(Prompts(real, self.first + now, None)), rows, self.first, now)

        def own(value: Any) -> Any:
            return cache if value is self._given else _for_rows(value, rows)

        with board_of(self._lm).standing(tokens):
            return self._calls[layer].run(h, own)


@torch.no_grad()
def branches(lm: "LanguageModel", held: Held, first: int) -> Branches:
    """What runs the blocks from column `first` on, behind the keys and values that `held` has before it."""
    given = _branch(held._cache)
    for i, layer in enumerate(given.layers):
        given.layers[i] = own = type(layer)()
        if first:
            own.update(*(t[:1].narrow(-2, 0, first) for t in (layer.keys, layer.values)))
    one = Aligned(held.ids[:1], torch.ones_like(held.ids[:1], dtype=torch.bool), first)
    with _recorded(lm.architecture.blocks(lm.net)) as calls:
        inputs = _inputs(lm, one, first, held.ids.shape[1])
        lm.architecture.trunk(lm.net)(**inputs, past_key_values=given, use_cache=True)
    return Branches(first, lm, held, tuple(calls), given)


class _Enough(Exception):
    """Ends a block's call when its keys and values are there."""


class _Taken:
    """Stands for a layer of a cache: keeps a block's keys and values, and ends its call before they are used."""

    keys: Tensor
    values: Tensor

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> None:
        self.keys, self.values = keys, values
        raise _Enough


def _copies(held: Tensor, n: int) -> Tensor:
    return held.repeat(n, *(1 for _ in held.shape[1:]))


def _for_rows(value: Any, rows: int) -> Any:
    """An argument that a block was given for one row, for `rows` rows.

    Tensors begin with the row, or with row × head (ALiBi); vectors count columns.
    """
    if isinstance(value, Tensor) and value.ndim > 1:
        return value.expand(rows, *value.shape[1:]) if value.shape[0] == 1 else _copies(value, rows)
    if isinstance(value, tuple | list):
        return type(value)(_for_rows(item, rows) for item in value)
    if isinstance(value, dict):
        return {name: _for_rows(item, rows) for name, item in value.items()}
    return value


# -- both -----------------------------------------------------------------------------------------------------------


def require_decoder(lm: "LanguageModel") -> None:
    if lm.architecture.kind != "decoder":
        raise UnsupportedOperation(f"{lm.name} is an encoder ({lm.architecture.family}): it has no earlier tokens")


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
