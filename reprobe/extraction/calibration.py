"""How many tokens one forward pass should hold on this device.

Enters: a language model. Leaves: a token budget, found by running its first block on packs of several sizes. Does not
know prompts: what is measured is the device and the width of the model.
"""

import time
import weakref
from itertools import pairwise

import torch
from torch import nn

from reprobe.model.hooks import capture
from reprobe.model.language_model import LanguageModel
from reprobe.model.packs import BUDGET
from reprobe.model.sites import Site

#: Budgets that are tried, by device, ascending.
CANDIDATES = {"cpu": (256, 512, 1024, 2048), "cuda": (4096, 8192, 16384, 32768, 65536)}
#: A larger pack must be faster by this much, since it takes more memory and leaves shards coarser.
_GAIN = 1.03
#: Passes over the largest candidate from which on calibrating costs less than it can give.
_WORTH = 16
_ROW = 64
_FOUND: "weakref.WeakKeyDictionary[nn.Module, dict[tuple[str, str, int], int]]" = weakref.WeakKeyDictionary()


def token_budget(lm: LanguageModel, n_tokens: int) -> int:
    """The budget for a run of `n_tokens` tokens: the device's usual one if that is too little to measure.

    Measured once per network, device, dtype and number of threads. Takes well under a hundredth of such a run.
    """
    kind = lm.device.type if lm.device.type in CANDIDATES else "cpu"
    candidates = CANDIDATES[kind]
    if n_tokens < _WORTH * candidates[-1]:
        return BUDGET[kind]
    found = _FOUND.setdefault(lm.net, {})
    key = (str(lm.device), str(lm.dtype), torch.get_num_threads())
    if key not in found:
        found[key] = _fastest(lm, candidates)
    return found[key]


def _fastest(lm: LanguageModel, candidates: tuple[int, ...]) -> int:
    """The smallest candidate that no larger one beats by more than `_GAIN`."""
    _seconds(lm, candidates[0])  # the first pass also pays for what a device sets up once
    rates = {}
    for budget in candidates:
        try:
            rates[budget] = budget / min(_seconds(lm, budget), _seconds(lm, budget))
        except torch.cuda.OutOfMemoryError:
            break
    best = candidates[0]
    for _, larger in pairwise(rates):
        if rates[larger] > _GAIN * rates[best]:
            best = larger
    return best


def _seconds(lm: LanguageModel, budget: int) -> float:
    """Time of one block on `budget` tokens."""
    ids = torch.arange(budget, device=lm.device).reshape(-1, min(_ROW, budget))
    inputs = {"input_ids": ids % lm.vocab_size}
    _wait(lm.device)
    start = time.perf_counter()
    capture(lm, inputs, (Site("resid.post", 0),), lambda h: h[:, -1])
    _wait(lm.device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
