"""Which prompts run together, in which order.

Enters: the number of tokens of each prompt, and a budget. Leaves: a `Plan`. A pure function of its arguments,
because in low precision a value depends on the batch it was computed in: the same plan gives the same bytes, also
after a resume. Does not know tokens, models or stores.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from reprobe.errors import UsageError


@dataclass(frozen=True)
class Plan:
    """Prompts in running order, cut into packs.

    `order[i]` is the number (in the prompt set) of the i-th prompt to run; pack k holds `order[cuts[k]:cuts[k+1]]`.
    """

    order: Int[np.ndarray, " prompts"]
    cuts: Int[np.ndarray, " packs+1"]

    @property
    def n_packs(self) -> int:
        return len(self.cuts) - 1

    def pack(self, k: int) -> Int[np.ndarray, " prompts"]:
        """Numbers of the prompts of pack k."""
        return self.order[self.cuts[k] : self.cuts[k + 1]]


def padded_plan(lengths: Int[np.ndarray, " prompts"], budget: int) -> Plan:
    """Packs of prompts of like length whose padded size (rows × longest) stays within `budget` tokens.

    Longest first, so that a run that does not fit the memory fails at once; equal lengths in their given order. A
    prompt longer than the budget runs alone. Raises `UsageError` for a budget below 1.
    """
    if budget < 1:
        raise UsageError(f"a token budget of {budget} holds no token; give 1 or more")
    order = np.argsort(-lengths.astype(np.int64), kind="stable")
    cuts = [0]
    for i in range(len(order)):
        longest = int(lengths[order[cuts[-1]]])
        if i > cuts[-1] and (i + 1 - cuts[-1]) * longest > budget:
            cuts.append(i)
    return Plan(order, np.asarray([*cuts, len(order)]))
