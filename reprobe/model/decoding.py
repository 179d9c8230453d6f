"""What a way to choose tokens that looks inside the model must offer to `lm.generate` and `lm.scored`.

Enters: nothing. Leaves: two protocols, which methods fill, and `Scored`. Does not know any method.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reprobe.model.sites import Site

if TYPE_CHECKING:
    from reprobe.model.language_model import LanguageModel


class Decoding(Protocol):
    """A way to choose the next token: `lm.generate(prompts, decoding=…)`."""

    def generating(
        self, lm: "LanguageModel", real: Bool[Tensor, "prompts columns"], told: Mapping[str, Any]
    ) -> AbstractContextManager[dict[str, Any]]:
        """A context in which `generate` of transformers decodes in this way if it is given the yielded settings.

        `real` marks the prompts' tokens that are not pads; `told` are the settings that the caller gave.
        """
        ...


class TokenScorer(Protocol):
    """Numbers about given tokens, made from states of the pass that predicts them."""

    @property
    def sites(self) -> Sequence[Site]:
        """What it reads, beside `final`."""
        ...

    def __call__(
        self,
        final: Float[Tensor, "places d_model"],
        seen: Mapping[Site, Float[Tensor, "places width"]],
        which: Int[np.ndarray, " tokens"],
        ids: Int[np.ndarray, " tokens"],
    ) -> Float[np.ndarray, "tokens numbers"]:
        """Numbers of each token `ids[i]`, which is predicted at the place `which[i]`, from the states at the places."""
        ...


@dataclass(frozen=True, eq=False)
class Scored:
    """A continuation's token ids, and what a `TokenScorer` made of each."""

    ids: Int[np.ndarray, " tokens"]
    numbers: Float[np.ndarray, "tokens numbers"]
