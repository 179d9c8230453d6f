"""Representation Engineering (Zou et al. 2023, arXiv:2310.01405): scanning a text with reading vectors.

Enters: a language model, a text, one direction per block. Leaves: a `Scan`, the score of every token at every block.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from reprobe.model.hooks import capture
from reprobe.model.language_model import LanguageModel
from reprobe.model.monitor import checked
from reprobe.model.sites import Site
from reprobe.probing.direction import Direction


@dataclass(frozen=True)
class Scan:
    """LAT scan (section 4.3 there): `scores[i, t]` is token t read at `sites[i]`, in units of that direction's scale.

    Positive is the direction's positive class. `tokens` are the pieces of text, special tokens by name.
    """

    tokens: tuple[str, ...]
    sites: tuple[Site, ...]
    scores: Float[np.ndarray, "sites tokens"]


def scan(lm: LanguageModel, text: str, directions: Mapping[Site, Direction], *, allow_mismatch: bool = False) -> Scan:
    """Read every token of `text` at every direction's site.

    A score is (h·v̂ − offset) / scale. Raises `IdentityMismatch` for directions of another model, `UsageError` for one
    that stands under another site than its own or does not fit its site, `UnknownSite`.
    """
    checked(lm, directions, "a scan", allow_mismatch=allow_mismatch)
    sites = tuple(sorted(directions, key=lambda s: (-1 if s.layer is None else s.layer, s)))
    batch = lm.encode(text)
    seen = capture(lm, lm.inputs(batch), sites)
    scores = [directions[s].score(seen[s][0].float().cpu().numpy()) / directions[s].scale for s in sites]
    tokens = tuple(lm.tokenizer.decode([int(t)]) for t in batch.row(0))
    return Scan(tokens, sites, np.stack(scores).astype(np.float32))
