"""Which prompts run together, and how they lie in the rows of one forward pass.

Enters: token ids of prompts as flat arrays, a kind of packing, a token budget. Leaves: a `Plan` (which prompts run in
which pack, in which order), and of each pack a `Layout` (the token ids, positions and tree structure that the network
gets, and where each prompt's tokens are found in it). Both are pure functions of their arguments, because in low
precision a value depends on the batch it was computed in: the same plan gives the same bytes, also after a resume.
Does not know text, networks, sites or stores.

A *forest* pack computes every shared prefix once. Prompts in lexicographic order of their tokens form prefix trees; a
row of the pack holds one or several trees, its tokens in depth-first order, each at the position of its depth and
seeing its ancestors only. In that order a token's descendants are the tokens from itself up to some end, so one number
per token, `ends`, says all that the attention mask needs.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

import numpy as np
from jaxtyping import Int
from numpy.typing import NDArray

from reprobe.errors import UsageError

#: forest: shared prefixes once; padded: one prompt per row, rows of like length; single: one prompt per pass.
Packing = Literal["forest", "padded", "single"]
Ints = NDArray[np.int64]

#: Places of one pack unless the caller says otherwise: larger packs feed a GPU, smaller ones fit a CPU's cache.
BUDGET = {"cpu": 512, "cuda": 16384}
#: A forest's row takes prompts up to so many tokens: rows this long are filled well, and attention over them costs
#: little beside the rest of a block.
ROW_TOKENS = 64
#: At rows of about this length attention costs as much as the rest of a block. Of 64 to 256 and 512 to 2048 these two
#: were the fastest on question-answer pairs, by 4 % (SmolLM2, 2 cores).
_ATTENTION_TOKENS = 1024
#: No row grows beyond this for the sake of sharing: masks take the square of it.
_LONGEST_ROW = 4096


@dataclass(frozen=True, eq=False)
class Plan:
    """Prompts in running order, cut into rows, and rows cut into packs.

    `order[i]` is the number (in the prompt set) of the i-th prompt to run; row r holds the prompts
    `order[row_cuts[r]:row_cuts[r + 1]]`, pack k the rows `pack_cuts[k]` … `pack_cuts[k + 1] − 1`. `shared[i]` is how
    many leading tokens the i-th prompt shares with the one before it in its row (0 for the first of a row).
    """

    packing: Packing
    order: Int[np.ndarray, " prompts"]
    shared: Int[np.ndarray, " prompts"]
    row_cuts: Int[np.ndarray, " rows+1"]
    pack_cuts: Int[np.ndarray, " packs+1"]

    @property
    def n_packs(self) -> int:
        return len(self.pack_cuts) - 1

    @property
    def cuts(self) -> Int[np.ndarray, " packs+1"]:
        """Pack k holds the prompts `order[cuts[k]:cuts[k + 1]]`."""
        cuts: Ints = self.row_cuts[self.pack_cuts]
        return cuts

    def pack(self, k: int) -> Int[np.ndarray, " prompts"]:
        """Numbers of the prompts of pack k."""
        return self.order[self.cuts[k] : self.cuts[k + 1]]

    def computed(self, lengths: Int[np.ndarray, " prompts"]) -> Int[np.ndarray, " packs"]:
        """Tokens that each pack computes, given the tokens of each prompt; padding not counted."""
        return np.add.reduceat(lengths[self.order] - self.shared, self.cuts[:-1])

    def size(self, lengths: Int[np.ndarray, " prompts"]) -> Int[np.ndarray, " packs"]:
        """Places of each pack, rows × longest row, padding included."""
        rows = np.add.reduceat(lengths[self.order] - self.shared, self.row_cuts[:-1])
        return np.diff(self.pack_cuts) * np.maximum.reduceat(rows, self.pack_cuts[:-1])


@dataclass(frozen=True, eq=False)
class Layout:
    """One pack as the network gets it.

    `ids` and `positions` are (rows, columns), 0 on padding, which is on the right; `real` marks real tokens. Token j
    of the pack's i-th prompt is computed at `at[starts[i] + j]`, an index into the flattened rows. `ends[r, c]` is the
    first column of row r that is not c itself or a token below it in its tree; None where every row is one prompt.
    """

    ids: Int[np.ndarray, "rows columns"]
    positions: Int[np.ndarray, "rows columns"]
    real: NDArray[np.bool_]
    at: Int[np.ndarray, " tokens"]
    starts: Int[np.ndarray, " prompts+1"]
    ends: Int[np.ndarray, "rows columns"] | None


def plan_packs(
    tokens: NDArray[np.integer],
    starts: Int[np.ndarray, " prompts+1"],
    *,
    packing: Packing,
    budget: int,
    alone_beyond: int | None = None,
) -> Plan:
    """The plan for prompts with the tokens `tokens[starts[i]:starts[i + 1]]`, none of them empty.

    A pack has at most `budget` places (rows × longest row); a row that is longer by itself runs alone. Prompts of more
    than `alone_beyond` tokens run in a pack of their own. Rows run longest first, so that a run that does not fit the
    memory fails at once. Raises `UsageError` for a budget below 1 or an unknown packing.
    """
    if packing not in get_args(Packing):
        raise UsageError(f"pack={packing!r}: one of {', '.join(get_args(Packing))}")
    if budget < 1:
        raise UsageError(f"a token budget of {budget} holds no token; give 1 or more")
    lengths = np.diff(starts)
    if packing == "forest":
        order, shared, firsts = _trees(tokens, starts, budget, alone_beyond)
    else:
        order = np.argsort(-lengths, kind="stable")
        shared, firsts = np.zeros(len(order), np.int64), np.arange(len(order))
    widths = np.add.reduceat(lengths[order] - shared, firsts)
    # Rows by falling length: rows of a pack are then of like length, and little is padded.
    by_width = np.argsort(-widths, kind="stable")
    counts = np.diff(firsts, append=len(order))[by_width]
    row_cuts = np.concatenate([[0], np.cumsum(counts)])
    within = np.repeat(firsts[by_width] - row_cuts[:-1], counts) + np.arange(len(order))
    order, shared, widths = order[within], shared[within], widths[by_width]
    pack_cuts = [0]
    for r in range(1, len(widths)):
        first = pack_cuts[-1]
        alone = alone_beyond is not None and widths[first] > alone_beyond
        if packing == "single" or alone or (r + 1 - first) * widths[first] > budget:
            pack_cuts.append(r)
    return Plan(packing, order, shared, row_cuts, np.asarray([*pack_cuts, len(widths)]))


def _trees(tokens: NDArray[np.integer], starts: Ints, budget: int, alone_beyond: int | None) -> tuple[Ints, Ints, Ints]:
    """Prompts in lexicographic order, how many tokens each shares with the one before, and the first of each row."""
    big_endian = tokens.astype(f">u{tokens.dtype.itemsize}")  # whose bytes sort as the numbers do
    keys = [big_endian[a:b].tobytes() for a, b in pairwise(starts)]
    order = np.asarray(sorted(range(len(keys)), key=keys.__getitem__), np.int64)
    shared = np.zeros(len(order), np.int64)
    firsts: list[int] = []
    filled, before = 0, tokens[:0]
    for i, p in enumerate(order):
        prompt = tokens[starts[p] : starts[p + 1]]
        common = _common(before, prompt)
        new = len(prompt) - common
        alone = alone_beyond is not None and max(len(before), len(prompt)) > alone_beyond
        # A prompt may lengthen a row beyond ROW_TOKENS if what it shares is worth the longer attention.
        worth = new * (1 + 2 * filled / _ATTENTION_TOKENS) <= len(prompt)
        limit = max(ROW_TOKENS, min(budget, _LONGEST_ROW), min(4 * len(prompt), _LONGEST_ROW)) if worth else ROW_TOKENS
        if not firsts or alone or filled + new > limit:
            firsts.append(i)
            filled, common = 0, 0
            new = len(prompt)
        shared[i] = common
        filled += new
        before = prompt
    return order, shared, np.asarray(firsts, np.int64)


def _common(a: NDArray[np.integer], b: NDArray[np.integer]) -> int:
    """Length of the longest common prefix."""
    n = min(len(a), len(b))
    differ = a[:n] != b[:n]
    at = int(differ.argmax()) if n else 0
    return at if n and differ[at] else n


def lay_out(plan: Plan, k: int, tokens: NDArray[np.integer], starts: Int[np.ndarray, " prompts+1"]) -> Layout:
    """The rows of pack k, for the tokens that the plan was made for."""
    rows = range(int(plan.pack_cuts[k]), int(plan.pack_cuts[k + 1]))
    first, last = int(plan.row_cuts[rows.start]), int(plan.row_cuts[rows.stop])
    prompts = plan.order[first:last]
    lengths = starts[prompts + 1] - starts[prompts]
    new = lengths - plan.shared[first:last]
    row_firsts = plan.row_cuts[rows.start : rows.stop] - first
    columns = int(np.add.reduceat(new, row_firsts).max())
    ids = np.zeros((len(rows), columns), np.int64)
    positions = np.zeros((len(rows), columns), np.int64)
    real = np.zeros((len(rows), columns), np.bool_)
    trees = len(prompts) > len(rows)
    ends = np.tile(np.arange(1, columns + 1), (len(rows), 1)) if trees else None
    places: list[Ints] = []
    for r, (a, b) in enumerate(zip(row_firsts, [*row_firsts[1:], len(prompts)], strict=True)):
        filled, path = 0, np.zeros(0, np.int64)
        for i in range(a, b):
            common = int(plan.shared[first + i])
            if ends is not None:
                ends[r, path[common:]] = filled  # nothing comes below these any more
            stop = filled + int(new[i])
            ids[r, filled:stop] = tokens[starts[prompts[i]] + common : starts[prompts[i] + 1]]
            positions[r, filled:stop] = np.arange(common, lengths[i])
            path = np.concatenate([path[:common], np.arange(filled, stop)])
            places.append(path + r * columns)
            filled = stop
        if ends is not None:
            ends[r, path] = filled
        real[r, :filled] = True
    return Layout(ids, positions, real, np.concatenate(places), np.concatenate([[0], np.cumsum(lengths)]), ends)
