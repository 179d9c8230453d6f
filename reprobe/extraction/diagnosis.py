"""What stored rows are, when they are not what their site and token say.

Enters: a store and rows of it that a replay found too far from the model's. Leaves: one sentence per site. It looks
at a few rows only, and asks in turn: were single values changed, was it rounded, is it a multiple, is it another
place of this model (neighbouring blocks, before or after the final norm), another token (the one before, a pad), or
another row? Does not decide whether rows are too far.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from reprobe.extraction.difference import BATCHING, ROUNDING, component_differences, row_differences
from reprobe.extraction.ledger import Ints, Ledger, padded
from reprobe.model.hooks import capture
from reprobe.model.language_model import LanguageModel
from reprobe.model.sites import LAYER_PARTS, MODEL_PARTS, Site
from reprobe.store import ActivationStore

#: At most so many sites, and rows of each, are looked at; evenly spaced among those that failed.
SITES, ROWS = 8, 6
#: Columns of padding behind the longest prompt in which rows of pads are looked for.
PADS = 8
#: What is nearest is worth telling if it is so many times nearer than the row's own place.
_NEARER = 4
#: Rows that are everywhere this near to the model's own are not of another place.
_NEAR = 0.3

Item = TypeVar("Item")

_HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}

#: Ways to have taken the wrong token, in the order in which they are believed; of their own token rows say nothing.
HERE = ""
STEPS = {
    -1: "the token before (position − 1)",
    1: "the token after (position + 1)",
    -2: "the token at position − 2",
    2: "the token at position + 2",
}
FIRST, LAST = "the first token of the prompt", "the last token of the prompt"
PAD_AFTER, PAD_BEFORE = "a padding token after the prompt", "padding before the prompt"
WITHOUT_FIRST = "the mean without the first token"
ROW_BEFORE = "the row before (row − 1): the rows and the index are not in the same order"
ROW_AFTER = "the row after (row + 1): the rows and the index are not in the same order"
_TOKENS = (HERE, *STEPS.values(), PAD_AFTER, PAD_BEFORE, FIRST, LAST, WITHOUT_FIRST, ROW_BEFORE, ROW_AFTER)


def diagnose(
    store: ActivationStore, lm: LanguageModel, ledger: Ledger, beyond: Mapping[Site, Ints], limit: float
) -> dict[Site, str]:
    """A sentence for each of `SITES` of the failed sites; `beyond` holds their rows that are beyond `limit`."""
    return {
        site: _Case.of(store, lm, ledger, site, _spread(beyond[site].tolist(), ROWS), limit).sentence()
        for site in _spread(list(beyond), SITES)
    }


@dataclass(frozen=True, eq=False)
class _Case:
    """Rows of one site as they are stored and as the model gives them, both (rows, width) in float32."""

    store: ActivationStore
    lm: LanguageModel
    ledger: Ledger
    site: Site
    rows: list[int]
    limit: float
    stored: Float[Tensor, "rows width"]
    computed: Float[Tensor, "rows width"]

    @classmethod
    def of(
        cls, store: ActivationStore, lm: LanguageModel, ledger: Ledger, site: Site, rows: list[int], limit: float
    ) -> "_Case":
        stored = store.read(site, rows).float()
        ((_, computed),) = ledger.compute(lm, np.array(rows), [site], {site: stored.shape[1]})
        return cls(store, lm, ledger, site, rows, limit, stored, computed)

    def sentence(self) -> str:
        own = float(row_differences(self.stored, self.computed).median())
        rounded = self._rounded()
        if rounded and own <= BATCHING[rounded] + ROUNDING[rounded]:
            return (
                f"its values are exact {rounded} numbers, though the store holds {self.store.manifest.dtype}: they "
                f"were computed in {rounded}, or rounded to it on the way"
            )
        # Values that went through half precision are found again with what that allows.
        limit = max(self.limit, BATCHING[rounded] + ROUNDING[rounded]) if rounded else self.limit
        return self._damaged() or self._transformed(limit) or self._elsewhere(own, limit)

    def _rounded(self) -> str | None:
        if self.store.manifest.dtype != "float32" or not self.stored.any():
            return None
        exact = (name for name, dtype in _HALF.items() if torch.equal(self.stored.to(dtype).float(), self.stored))
        return next(exact, None)

    def _damaged(self) -> str | None:
        if not self.stored.any():
            return "its rows are all zeros: they were never filled"
        wrong = component_differences(self.stored, self.computed) > self.limit
        width = wrong.shape[1]
        if int(wrong.sum(1).max()) > max(1, width // 100):
            return None
        i = int(wrong.sum(1).argmax())
        component = int(wrong[i].int().argmax())
        return (
            f"only {int(wrong[i].sum())} of {width} components differ in row {self.rows[i]}: component {component} is "
            f"{float(self.stored[i, component]):.6g} in the store and {float(self.computed[i, component]):.6g} here. "
            "Single values were changed; it is not another place of the model"
        )

    def _transformed(self, limit: float) -> str | None:
        if not (self.stored.isfinite().all() and self.computed.isfinite().all()):
            return None
        factor = (self.stored * self.computed).sum(1) / self.computed.square().sum(1)
        common = float(factor.median())
        if float(row_differences(self.stored, common * self.computed).max()) <= limit:
            return f"its rows are {common:.6g} times what this model has there"
        if float(row_differences(self.stored, self.computed - self.computed.mean(1, keepdim=True)).max()) <= limit:
            return "its rows are what this model has there less their mean over the components (centred weights)"
        return None

    def _elsewhere(self, own: float, limit: float) -> str:
        best: _Match | None = None
        # Pads are computed with and without a mask: which of the two a faulty extraction did is not known.
        for mask in (False, True) if self.lm.architecture.kind == "decoder" else (True,):
            found = self._nearest(mask, limit)
            if best is None or (found.matches, -found.median) > (best.matches, -best.median):
                best = found
            if 2 * best.matches >= len(self.rows):
                some = f" ({best.matches} of the {len(self.rows)} rows looked at)"
                return f"its rows are {best.text(self.site)}" + (some if best.matches < len(self.rows) else "")
        assert best is not None
        if own > _NEARER * best.median:
            return (
                f"it fits no place of this model; nearest is {best.text(self.site)} (difference {best.median:.2g}; "
                f"at its own place {own:.2g})"
            )
        if own <= _NEAR:
            return (
                f"its rows are near to what this model has there (typically {own:.2g} away), and no other place or "
                "token is nearer: other weights, precision or kernels"
            )
        return "its rows fit no site of this model and no other token of their prompts: other weights, or other text"

    def _nearest(self, mask: bool, limit: float) -> "_Match":
        """The best of all places and tokens that were tried, the row's own excluded."""
        lm, ledger = self.lm, self.ledger
        width = self.stored.shape[1]
        around = [(max(r - 1, 0), min(r + 1, self.store.rows - 1)) for r in self.rows]
        wanted = [*self.rows, *(r for pair in around for r in pair)]
        prompts = sorted({int(ledger.owner[r]) for r in wanted})
        place = {p: i for i, p in enumerate(prompts)}
        longest = int(ledger.lengths[prompts].max())
        room = PADS if lm.context is None else max(0, min(PADS, lm.context - longest))
        pads = np.full(longest, lm.pad_id)  # a prompt of nothing but pads: what stands left of a left-padded one
        inputs = padded(lm, [*(ledger.tokens(p) for p in prompts), pads], extra=room, mask=mask)
        targets = self.stored.to(lm.device)

        def at(h: Tensor, row: int) -> Tensor:
            position, prompt = int(ledger.position[row]), int(ledger.owner[row])
            mine = h[place[prompt]].float()
            if position >= 0:
                return mine[position : position + 1]
            return mine[: ledger.lengths[prompt]].mean(0, keepdim=True)

        def select(h: Tensor) -> Tensor:
            out = []
            for target, row, (before, after) in zip(targets.to(h.device), self.rows, around, strict=True):
                prompt = int(ledger.owner[row])
                mine = h[place[prompt]].float()
                rest = mine[1 : ledger.lengths[prompt]].mean(0, keepdim=True)
                tried = torch.cat([at(h, row), at(h, before), at(h, after), rest, mine, h[-1].float()])
                out.append(row_differences(target.expand_as(tried), tried))
            return torch.stack(out).cpu()

        found = capture(lm, inputs, [s for s in _all_sites(lm) if lm.width(s) == width], select)
        columns = longest + room
        matches = [
            _Match(site, token, tuple(values))
            for site, differences in found.items()
            for token, values in self._by_token(differences, columns)
            if (site, token) != (self.site, HERE)
        ]
        most = max(m.count(limit) for m in matches)
        kept = [m.counted(limit) for m in matches if m.count(limit) == most]
        least = min(m.median for m in kept)
        # Several names may mean the same vector (resid.post@3 is resid.pre@4): take the most telling.
        return min((m for m in kept if m.median <= 1.001 * least), key=lambda m: m.preference(self.site))

    def _by_token(self, differences: Float[Tensor, "rows tried"], columns: int) -> Iterator[tuple[str, list[float]]]:
        """Differences per way of having taken the wrong token, one number per row; infinite where it has none."""
        ledger = self.ledger
        tried = [row.split([1, 1, 1, 1, columns, columns]) for row in differences]
        prompts = [int(ledger.owner[r]) for r in self.rows]
        lengths = [int(ledger.lengths[p]) for p in prompts]
        positions = [int(ledger.position[r]) for r in self.rows]

        def token(columns_of: Sequence[int | None]) -> list[float]:
            numbers = zip(tried, columns_of, lengths, strict=True)
            return [float(t[4][c]) if c is not None and 0 <= c < n else torch.inf for t, c, n in numbers]

        yield HERE, [float(t[0]) for t in tried]
        for step, text in STEPS.items():
            yield text, token([None if p < 0 else p + step for p in positions])
        yield FIRST, token([0] * len(tried))
        yield LAST, token([n - 1 for n in lengths])
        yield (
            PAD_AFTER,
            [float(t[4][n:].min()) if n < columns else torch.inf for t, n in zip(tried, lengths, strict=True)],
        )
        yield PAD_BEFORE, [float(t[5].min()) for t in tried]
        pooled = [p < 0 and n > 1 for p, n in zip(positions, lengths, strict=True)]
        yield WITHOUT_FIRST, [float(t[3]) if p else torch.inf for t, p in zip(tried, pooled, strict=True)]
        last = self.store.rows - 1
        yield ROW_BEFORE, [float(t[1]) if r > 0 else torch.inf for t, r in zip(tried, self.rows, strict=True)]
        yield ROW_AFTER, [float(t[2]) if r < last else torch.inf for t, r in zip(tried, self.rows, strict=True)]


@dataclass(frozen=True)
class _Match:
    """A site and token of the model, how far each looked-at row is from it, and how many rows it fits."""

    site: Site
    token: str
    differences: tuple[float, ...]
    matches: int = 0

    @property
    def median(self) -> float:
        return float(torch.tensor(self.differences).median())

    def count(self, limit: float) -> int:
        return sum(d <= limit for d in self.differences)

    def counted(self, limit: float) -> "_Match":
        return _Match(self.site, self.token, self.differences, self.count(limit))

    def preference(self, own: Site) -> tuple[int, bool, int]:
        """The fewest assumptions first: the same token, the same part, the nearest block."""
        return _TOKENS.index(self.token), self.site.part != own.part, abs((self.site.layer or 0) - (own.layer or 0))

    def text(self, own: Site) -> str:
        if self.site == own:
            return f"those of {self.token}"
        norm = ", after the final norm" if self.site.part == "final" else ""
        of = f", of {self.token}" if self.token != HERE else ""
        return f"what this model has at '{self.site}'{norm}{of}"


def _all_sites(lm: LanguageModel) -> list[Site]:
    blocks = [Site(part, i) for i, have in enumerate(lm.parts.of_layer) for part in LAYER_PARTS if part in have]
    return [*blocks, *(Site(part) for part in MODEL_PARTS)]


def _spread(items: list[Item], n: int) -> list[Item]:
    """At most `n` of the items, evenly spaced, first and last among them."""
    if len(items) <= n:
        return items
    return [items[i * (len(items) - 1) // (n - 1)] for i in range(n)]
