"""How the tokens at units' tops overlap with concepts, and how they would by chance.

Enters: `Counts`, concept masks. Leaves: numbers of common tokens, intersections over unions, and the null of a unit's
largest one. Does not know models.

The null rotates all masks together along the stream: concepts keep their sizes, their runs and what they have in
common, and lose what they have to do with the units. The largest of many is above any single one by chance alone, so
that it is the largest over all concepts whose null is drawn.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag

from reprobe.errors import UsageError
from reprobe.methods.counting import Counts
from reprobe.progress import Progress, silent

#: Rotations are by at least this share of the stream in either direction: neighbours of a token are much like it.
LEAST_SHIFT = 0.02


def common(
    counts: Sequence[Counts], concepts: Bool[np.ndarray, "counted concepts"]
) -> Int[np.ndarray, "units concepts"]:
    """How many of the tokens at each unit's top are of each concept."""
    table = _table(concepts)
    found: np.ndarray = np.concatenate([_common(c, table) for c in counts]).astype(np.int32)
    return found


def iou(
    hits: Int[np.ndarray, "units concepts"], active: Int[np.ndarray, " units"], sizes: Int[np.ndarray, " concepts"]
) -> Float[np.ndarray, "units concepts"]:
    """|M ∩ C| / |M ∪ C|; a unit that is never above its threshold has 0."""
    union = active[:, None] + sizes[None, :] - hits
    found: np.ndarray = (hits / np.maximum(union, 1)).astype(np.float32)
    return found


def chance(
    counts: Sequence[Counts],
    concepts: Bool[np.ndarray, "counted concepts"],
    permutations: int,
    *,
    seed: int = 0,
    progress: Progress = silent,
) -> Float[np.ndarray, "permutations units"]:
    """Each unit's largest IoU over all concepts, the masks rotated anew in each permutation."""
    n = len(concepts)
    sizes, active = concepts.sum(0), np.concatenate([(c.tokens >= 0).sum(1) for c in counts])
    out = np.empty((permutations, len(active)), np.float32)
    for p, shift in enumerate(shifts(n, permutations, seed)):
        table = _table(np.roll(concepts, shift, axis=0))
        hits = np.concatenate([_common(c, table) for c in counts])
        out[p] = iou(hits, active, sizes).max(1)
        progress("chance", p + 1, permutations)
    return out


def shifts(n: int, permutations: int, seed: int) -> Int[np.ndarray, " permutations"]:
    """By how many tokens each permutation rotates a stream of n: no two alike, none near 0."""
    least = max(1, round(LEAST_SHIFT * n))
    room = n - 2 * least + 1
    if permutations < 0 or permutations > room:
        raise UsageError(f"permutations={permutations}: a stream of {n:,} tokens has 0–{max(room, 0):,} rotations")
    found: np.ndarray = least + np.random.default_rng(seed).choice(max(room, 1), permutations, replace=False)
    return found


def _table(concepts: Bool[np.ndarray, "counted concepts"]) -> Float[Tensor, "counted+1 concepts"]:
    """Masks as numbers to add up; the last line, of no concept, is for tokens that are none (−1)."""
    table = np.zeros((len(concepts) + 1, concepts.shape[1]), np.float32)
    table[:-1] = concepts
    return torch.from_numpy(table)


def _common(counts: Counts, table: Float[Tensor, "counted+1 concepts"]) -> Int[np.ndarray, "units concepts"]:
    # Each unit's tokens are a bag of lines of the table. Sums of ones are exact in float32 up to 2²⁴.
    tokens = torch.from_numpy(np.where(counts.tokens < 0, len(table) - 1, counts.tokens))
    sums = embedding_bag(tokens, table, mode="sum")
    found: np.ndarray = sums.numpy().astype(np.int32)
    return found
