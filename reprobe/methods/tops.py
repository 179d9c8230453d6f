"""The places in a stream that are shown of a unit: where its value is largest, no two alike, with their surroundings.

Enters: a `TokenStream`, `Counts`. Leaves: for each unit some of the tokens at its top, and which tokens around each are
also there. Does not know concepts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int, UInt64

from reprobe.methods.counting import Counts
from reprobe.methods.stream import TokenStream

#: Tokens shown before and after the one at the top.
AROUND = 14
#: How many of a unit's largest are looked through for different places, for each that is wanted.
_LOOKED = 12
#: Places with these many equal tokens up to their own are alike.
_ALIKE = 6
#: Membership marks in memory at a time.
_AT_ONCE = 2**25


@dataclass(frozen=True, eq=False)
class Shown:
    """`tokens[u, i]` is the number of the i-th token shown of unit u, −1 where there is none, `values` its value; bit j
    of `marks` says whether the token j − AROUND places after it is above the unit's threshold as well."""

    tokens: Int[np.ndarray, "units shown"]
    values: Float[np.ndarray, "units shown"]
    marks: Int[np.ndarray, "units shown"]


def shown(stream: TokenStream, counts: Sequence[Counts], most: int) -> Shown:
    """Up to `most` tokens of each unit, by falling value: no two in one row of the stream or after the same words."""
    parts = [_shown(stream, c, most) for c in counts]
    return Shown(*(np.concatenate([getattr(p, f) for p in parts]) for f in ("tokens", "values", "marks")))


def _shown(stream: TokenStream, counts: Counts, most: int) -> Shown:
    looked = counts.tokens[:, : most * _LOOKED]
    rows, alike = stream.row[stream.places], _contexts(stream)[stream.places]
    tokens = np.full((len(looked), most), -1, np.int32)
    values = np.full((len(looked), most), np.nan, np.float32)
    for u, candidates in enumerate(looked):
        known: set[tuple[str, int]] = set()
        i = 0
        for rank, token in enumerate(candidates):
            keys = {("row", int(rows[token])), ("context", int(alike[token]))}
            if i == most or token < 0:
                break
            if known & keys:
                continue
            known |= keys
            tokens[u, i], values[u, i] = token, counts.values[u, rank]
            i += 1
    return Shown(tokens, values, _marks(stream, counts, tokens))


def _contexts(stream: TokenStream) -> UInt64[np.ndarray, " tokens"]:
    """A number for each token that is equal where the last `_ALIKE` tokens of its row up to itself are."""
    ids = stream.ids.astype(np.uint64)
    out = np.zeros(len(ids), np.uint64)
    within = np.arange(len(ids)) - stream.starts[stream.row]
    for back in range(_ALIKE - 1, -1, -1):
        # FNV's prime; what lies before a row's beginning is 0.
        earlier = np.where(within >= back, np.roll(ids, back) + np.uint64(1), np.uint64(0))
        out = (out ^ earlier) * np.uint64(0x100000001B3)
    return out


def _marks(
    stream: TokenStream, counts: Counts, tokens: Int[np.ndarray, "units shown"]
) -> Int[np.ndarray, "units shown"]:
    marks = np.zeros(tokens.shape, np.uint32)
    reach = np.arange(-AROUND, AROUND + 1)
    n, total = stream.n, len(stream.ids)
    step = max(1, _AT_ONCE // (n + 1))
    for first in range(0, len(tokens), step):
        rows = slice(first, first + step)
        inside = np.zeros((len(tokens[rows]), n + 1), np.bool_)
        np.put_along_axis(inside, counts.tokens[rows].astype(np.int64), True, axis=1)
        inside[:, n] = False  # where −1 points to
        place = stream.places[tokens[rows]][..., None] + reach
        within = np.clip(place, 0, total - 1)
        same = (place == within) & (stream.row[within] == stream.row[stream.places[tokens[rows]]][..., None])
        number = np.where(same, stream.numbers[within], n)
        above = np.take_along_axis(inside, number.reshape(len(number), -1) % (n + 1), axis=1).reshape(number.shape)
        bits = (above.astype(np.uint32) << np.arange(len(reach), dtype=np.uint32)).sum(-1, dtype=np.uint32)
        marks[rows] = np.where(tokens[rows] < 0, 0, bits)
    return marks
