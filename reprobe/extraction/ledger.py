"""What a store says its rows are: which tokens of which prompt, as flat arrays.

Enters: a store's index and tokens. Leaves: a `Ledger`, the sentences that say where the two contradict each other,
and rows computed again from the tokens alone. Does not know what is stored at the sites.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reprobe.errors import UsageError
from reprobe.model.hooks import capture
from reprobe.model.language_model import LanguageModel
from reprobe.model.sites import Site
from reprobe.store import ActivationStore

Ints = NDArray[np.int64]

#: Bytes of activations that one pass may keep; more sites than fit are read in several passes.
PASS_BYTES = 256 * 2**20


@dataclass(frozen=True, eq=False)
class Ledger:
    """Rows and prompts of a store, both numbered from 0.

    Prompt p is `ids[p]` and has the tokens `flat[starts[p]:starts[p+1]]`. Row r is of prompt `owner[r]`, at token
    `position[r]`, or −1 where it is the mean of all the prompt's tokens. `token` and `n_tokens` are what the index
    says of the row (token −1 where it is pooled).
    """

    ids: list[str]
    flat: Ints
    starts: Ints
    owner: Ints
    position: Ints
    token: Ints
    n_tokens: Ints

    @classmethod
    def of(cls, store: ActivationStore) -> "Ledger":
        """The ledger of a store; `UsageError` if it has rows of which nobody recorded what they are the mean of."""
        index, tokens = store.index, store.tokens
        pooled, at = index["position"].null_count(), store.manifest.plan.get("at")
        if pooled and at != "mean":
            what = f"the mean over '{at}'" if at is not None else "means over tokens that its plan does not name"
            raise UsageError(
                f"{store.path} cannot be computed again: {pooled} of its rows are {what}, and which tokens those are "
                "is not recorded. Rows at last, all, mean, index:N and single tokens of spans can be"
            )
        numbered = tokens.select("prompt").with_row_index("number")
        owner = index.select("prompt").join(numbered, on="prompt", how="left", maintain_order="left")["number"]
        lengths = tokens["tokens"].list.len().to_numpy().astype(np.int64)
        return cls(
            ids=tokens["prompt"].to_list(),
            flat=tokens["tokens"].explode().drop_nulls().to_numpy().astype(np.int64),
            starts=np.concatenate([[0], np.cumsum(lengths)]),
            owner=owner.to_numpy().astype(np.int64),
            position=index["position"].fill_null(-1).to_numpy().astype(np.int64),
            token=index["token"].fill_null(-1).to_numpy().astype(np.int64),
            n_tokens=index["n_tokens"].to_numpy().astype(np.int64),
        )

    @property
    def lengths(self) -> Ints:
        """Tokens of each prompt."""
        return np.diff(self.starts)

    @cached_property
    def _by_prompt(self) -> tuple[Ints, Ints]:
        order = np.argsort(self.owner, kind="stable")
        return order, np.searchsorted(self.owner[order], np.arange(len(self.ids) + 1))

    def rows(self, prompt: int) -> Ints:
        """Numbers of the rows of a prompt, ascending."""
        order, starts = self._by_prompt
        return order[starts[prompt] : starts[prompt + 1]]

    def tokens(self, prompt: int) -> Ints:
        """Token ids of a prompt."""
        return self.flat[self.starts[prompt] : self.starts[prompt + 1]]

    def problems(self, lm: LanguageModel) -> Iterator[str]:
        """Where index, tokens and the model's vocabulary contradict each other: one sentence each."""
        lengths = self.lengths
        single = self.position >= 0
        beyond = (self.position < -1) | (self.position >= lengths[self.owner])
        at = np.where(single & ~beyond, self.starts[self.owner] + self.position, 0)
        there = self.flat[at] if len(self.flat) else np.full(len(at), -1)
        yield from self._told("are of prompts without tokens", lengths[self.owner] == 0)
        yield from self._told(
            "have another n_tokens than their prompt has tokens", self.n_tokens != lengths[self.owner]
        )
        yield from self._told("are at positions beyond their prompt", beyond)
        yield from self._told(
            "have another token in the index than their prompt has at that position",
            single & ~beyond & (there != self.token),
        )
        # Ids may have gaps, so a tokenizer's length is not its greatest id and one.
        known = max(lm.tokenizer.get_vocab().values()) + 1
        size = min(known, lm.vocab_size)
        strange = np.flatnonzero((self.flat < 0) | (self.flat >= size))
        if len(strange):
            prompt = int(np.searchsorted(self.starts, strange[0], side="right")) - 1
            yield (
                f"{len(strange)} of {len(self.flat)} stored tokens are not in the vocabulary of {lm.name}, which has "
                f"{size}: the first is {self.flat[strange[0]]} in prompt {self.ids[prompt]!r}"
            )

    def _told(self, what: str, bad: NDArray[np.bool_]) -> Iterator[str]:
        if bad.any():
            first = int(np.flatnonzero(bad)[0])
            prompt = self.ids[int(self.owner[first])]
            yield f"{int(bad.sum())} of {len(bad)} rows {what}: the first is row {first} (prompt {prompt!r})"

    def compute(
        self, lm: LanguageModel, rows: Ints, sites: Sequence[Site], widths: Mapping[Site, int]
    ) -> Iterator[tuple[Site, Tensor]]:
        """These rows as the model gives them now, site by site: (rows, width) in float32 on the host.

        One padded batch, a prompt per row. This is on purpose not the code that extracts: what both agree on is not
        the slip of one.
        """
        prompts, where = np.unique(self.owner[rows], return_inverse=True)
        inputs = padded(lm, [self.tokens(p) for p in prompts])
        mean = self.position[rows] < 0
        spread = np.where(mean, self.lengths[self.owner[rows]], 1)
        target = np.repeat(np.arange(len(rows)), spread)
        within = np.arange(len(target)) - np.repeat(np.cumsum(spread) - spread, spread)
        column = torch.from_numpy(np.where(mean[target], within, self.position[rows][target]))
        owner, into, counts = (torch.from_numpy(x) for x in (where[target], target, spread))

        def select(h: Tensor) -> Tensor:
            found = h[owner.to(h.device), column.to(h.device)]
            if not mean.any():
                return found
            sums = torch.zeros(len(rows), h.shape[-1], device=h.device)
            sums.index_add_(0, into.to(h.device), found.float())
            return sums / counts.to(h.device)[:, None]

        for group in _groups(sites, [4 * len(rows) * widths[site] for site in sites]):
            found = capture(lm, inputs, group, select)
            for site in group:
                yield site, found.pop(site).float().cpu()


def padded(lm: LanguageModel, tokens: Sequence[Ints], *, extra: int = 0, mask: bool = False) -> dict[str, Tensor]:
    """Prompts as the trunk's input, padded on the right, with `extra` columns of nothing but pads.

    Decoders get no attention mask unless `mask` asks for it: a real token does not look to the right.
    """
    lengths = np.array([len(t) for t in tokens])
    ids = np.full((len(tokens), int(lengths.max()) + extra), lm.pad_id, dtype=np.int64)
    for i, row in enumerate(tokens):
        ids[i, : len(row)] = row
    inputs = {"input_ids": torch.from_numpy(ids).to(lm.device)}
    if mask or lm.architecture.kind == "encoder":
        real = (np.arange(ids.shape[1]) < lengths[:, None]).astype(np.int64)
        inputs["attention_mask"] = torch.from_numpy(real).to(lm.device)
    return inputs


def _groups(sites: Sequence[Site], sizes: Sequence[int]) -> Iterator[list[Site]]:
    group: list[Site] = []
    held = 0
    for site, size in zip(sites, sizes, strict=True):
        if group and held + size > PASS_BYTES:
            yield group
            group, held = [], 0
        group.append(site)
        held += size
    if group:
        yield group
