"""How varied a text is: distinct n-grams, and the entropy of n-grams. What a model that repeats itself loses.

Enters: texts, as a model wrote them. Leaves: numbers per text. Words are runs of letters and digits, and every other
mark by itself; case counts. Does not know models.
"""

import re
from collections import Counter

import numpy as np

_WORD = re.compile(r"\w+|[^\w\s]")


def distinct(text: str, n: int) -> float:
    """Share of a text's n-grams of words that are different ones (Li et al. 2016), 0 for fewer than n words."""
    counts = _ngrams(text, n)
    return len(counts) / counts.total() if counts else 0.0


def entropy(text: str, n: int) -> float:
    """Entropy in bits of a text's n-grams of words; 0 if they are all the same, or there are none."""
    counts = np.array(list(_ngrams(text, n).values()), np.float64)
    share = counts / counts.sum() if counts.size else np.ones(1)
    # Of one n-gram alone the sum is −0.
    return abs(float(share @ np.log2(share)))


def fluency(text: str) -> float:
    """⅓ H₂ + ⅔ H₃ in bits, H₂ and H₃ the entropies of word pairs and triples (Zhang et al. 2018; as weighted by Meng
    et al. 2022, whose code takes the mean of ⅔ H₂ and 4⁄3 H₃)."""
    return (entropy(text, 2) + 2 * entropy(text, 3)) / 3


def _ngrams(text: str, n: int) -> Counter[tuple[str, ...]]:
    words = _WORD.findall(text)
    return Counter(zip(*(words[i:] for i in range(n)), strict=False))
