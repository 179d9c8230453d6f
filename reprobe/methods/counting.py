"""One pass over a stream: of every unit the tokens at its top, and its sums over each concept's tokens.

Enters: a language model, readings, a `TokenStream`, concept masks. Leaves: `Counts`, one for each reading. Beginnings
that rows share are computed once and count as often as they occur. Does not know IoU or what a detector is.

Memory: 14 bytes for each unit and token that is kept (see `sketch`), 8 for each unit and concept, and one pack's
activations. Nothing grows with the stream but the number of tokens kept, which the quantile sets.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reprobe.errors import UsageError
from reprobe.methods import sketch
from reprobe.methods.sketch import TopValues
from reprobe.methods.stream import TokenStream
from reprobe.methods.units import Reading
from reprobe.model.hooks import visit
from reprobe.model.language_model import LanguageModel
from reprobe.model.packs import Layout, lay_out
from reprobe.model.sites import Site
from reprobe.progress import Progress, silent


@dataclass(frozen=True, eq=False)
class Counts:
    """What one pass leaves of the units at one site. k is the number of tokens that may be above a threshold.

    `threshold` is the smallest value that at most k tokens exceed: the (k + 1)-th largest. `tokens` are the numbers of
    those that exceed it, by falling value, −1 where there are fewer than k (ties at the threshold are below it), and
    `values` theirs. `sums[u, c]` adds up unit u over the tokens of concept c, `total` and `squares` over all counted
    ones.
    """

    reading: Reading
    threshold: Float[np.ndarray, " units"]
    tokens: Int[np.ndarray, "units k"]
    values: Float[np.ndarray, "units k"]
    sums: Float[np.ndarray, "units concepts"]
    total: Float[np.ndarray, " units"]
    squares: Float[np.ndarray, " units"]


@dataclass(frozen=True, eq=False)
class Pack:
    """The tokens of one pass by their place in its flattened rows: those at place p have the numbers
    `numbers[first[p]:first[p] + times[p]]`. `weights` says how often a token of each concept, and in its last column
    any counted token, stands at a place."""

    times: Int[np.ndarray, " places"]
    first: Int[np.ndarray, " places"]
    numbers: Int[np.ndarray, " counted"]
    weights: Float[Tensor, "places concepts+1"]

    @classmethod
    def of(
        cls, layout: Layout, prompts: Int[np.ndarray, " prompts"], stream: TokenStream, concepts: np.ndarray
    ) -> "Pack":
        lengths = np.diff(layout.starts)
        token = np.repeat(stream.starts[prompts] - layout.starts[:-1], lengths) + np.arange(len(layout.at))
        number = stream.numbers[token]
        place, number = layout.at[number >= 0], number[number >= 0]
        order = np.argsort(place, kind="stable")
        place, number = place[order], number[order]
        times = np.bincount(place, minlength=layout.ids.size)
        first = np.cumsum(times) - times
        rows = np.ones((len(number), concepts.shape[1] + 1), np.float32)
        rows[:, :-1] = concepts[number]
        weights = np.zeros((layout.ids.size, rows.shape[1]), np.float32)
        used = np.flatnonzero(times)
        if len(used):
            weights[used] = np.add.reduceat(rows, first[used], axis=0)
        return cls(times, first, number, torch.from_numpy(weights))


class Counter:
    """The units of one reading while their activations pass."""

    def __init__(self, reading: Reading, keep: int, concepts: int, device: torch.device) -> None:
        self.reading, self.top = reading, TopValues(reading.n, keep)
        self.sums = torch.zeros(concepts + 1, reading.n, dtype=torch.float64, device=device)
        self.squares = torch.zeros(reading.n, dtype=torch.float64, device=device)

    def see(self, h: Tensor, pack: Pack) -> None:
        flat = self.reading.values(h)
        weights = pack.weights.to(flat.device)
        self.sums += (weights.T @ flat).to(self.sums.device)
        self.squares += (weights[:, -1] @ flat.square()).to(self.squares.device)
        above = (flat > torch.from_numpy(self.top.floor).to(flat.device)).flatten()
        # numpy finds the few that are true among many several times faster than torch does on a CPU.
        on_cpu = above.device.type == "cpu"
        at = np.flatnonzero(above.numpy()) if on_cpu else above.nonzero().flatten().cpu().numpy()
        value = flat.flatten()[torch.from_numpy(at).to(flat.device)].cpu().numpy()
        place, unit = np.divmod(at, self.reading.n)
        times = pack.times[place]
        which = np.repeat(np.arange(len(place)), times)
        within = np.arange(len(which)) - np.repeat(np.cumsum(times) - times, times)
        self.top.add(unit[which], pack.numbers[pack.first[place[which]] + within], value[which])

    def counts(self, lm: LanguageModel) -> Counts:
        sums = self.sums.cpu().numpy().T
        if not (np.isfinite(sums).all() and torch.isfinite(self.squares).all()):
            raise UsageError(
                f"activations at {self.reading.site} of {lm.name} are not finite in {lm.dtype}: load the model in "
                "float32 or bfloat16"
            )
        values, tokens = self.top.largest()
        threshold = values[:, -1]
        inside = values[:, :-1] > threshold[:, None]
        return Counts(
            self.reading,
            threshold,
            np.where(inside, tokens[:, :-1], -1).astype(np.int32),
            values[:, :-1],
            sums[:, :-1],
            sums[:, -1],
            self.squares.cpu().numpy(),
        )


def count(
    lm: LanguageModel,
    readings: Sequence[Reading],
    stream: TokenStream,
    concepts: Bool[np.ndarray, "counted concepts"],
    k: int,
    *,
    memory: int,
    progress: Progress = silent,
) -> list[Counts]:
    """Run the stream through the model once and count. `k` tokens may exceed a threshold.

    Raises `UsageError` if that takes more than `memory` bytes, or if activations are not finite.
    """
    units = sum(r.n for r in readings)
    needed = sketch.BYTES * units * (k + 1)
    if needed > memory:
        raise UsageError(
            f"the tops of {units:,} units, {k:,} tokens each, take {needed / 1e9:.1f} GB, and {memory / 1e9:.1f} "
            "GB are allowed (memory=…): read fewer sites at a time, fewer tokens, or a smaller quantile, or allow more"
        )
    counters = {r.site: Counter(r, k + 1, concepts.shape[1], lm.device) for r in readings}
    sites = list(counters)
    plan = lm.plan(stream.ids, stream.starts)
    done = 0
    for p in range(plan.n_packs):
        layout = lay_out(plan, p, stream.ids, stream.starts)
        pack = Pack.of(layout, plan.pack(p), stream, concepts)

        def see(site: Site, h: Tensor, pack: Pack = pack) -> None:
            counters[site].see(h, pack)

        visit(lm, lm.pack_inputs(layout), sites, see)
        done += len(layout.at)
        progress("dissect", done, len(stream.ids))
    # One at a time: what is sorted out takes as much room as what it comes from.
    return [counters.pop(site).counts(lm) for site in sites]
