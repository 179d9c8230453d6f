"""What an intervention does: how far it moves what is wanted, and how far it moves everything else.

Enters: a language model, interventions, prompts. Leaves: numbers and a table of effect against side effect. Every
strength is measured in the same model, with and without the intervention. Does not know where a direction came from.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
import torch
from scipy.special import logsumexp

from reprobe.control import Operator, Steering, steer
from reprobe.errors import UsageError
from reprobe.model.language_model import LanguageModel
from reprobe.progress import Progress, silent


@dataclass(frozen=True)
class Contrast:
    """Two sets of continuations whose odds measure a behaviour, e.g. words of two moods after "She felt".

    Continuations carry their leading blank. Each prompt's log-odds are log Σp(positive) − log Σp(negative), in nats.
    """

    prompts: tuple[str, ...]
    positive: tuple[str, ...]
    negative: tuple[str, ...]

    def __post_init__(self) -> None:
        if not (self.prompts and self.positive and self.negative):
            raise UsageError("a contrast needs at least one prompt and one continuation on each side")
        if shared := set(self.positive) & set(self.negative):
            raise UsageError(f"continuations on both sides of a contrast: {', '.join(sorted(shared))}")


def log_odds(lm: LanguageModel, contrast: Contrast) -> np.ndarray:
    """Log-odds (nats) of the positive against the negative continuations, one per prompt."""
    both = [*contrast.positive, *contrast.negative]
    scores = np.stack(lm.logprobs(list(contrast.prompts), [both] * len(contrast.prompts)))
    n = len(contrast.positive)
    odds: np.ndarray = logsumexp(scores[:, :n], axis=1) - logsumexp(scores[:, n:], axis=1)
    return odds


def divergence(lm: LanguageModel, texts: Sequence[str], *interventions: Operator | Steering) -> float:
    """Mean KL(unsteered ‖ steered) of the next-token distributions, in nats per token of `texts`.

    The price of an intervention on text it is not meant for. 0 without interventions.
    """
    total, count = 0.0, 0
    for text in texts:
        plain = lm.logits(text, at="all")[0]
        with steer(lm, *interventions):
            steered = lm.logits(text, at="all")[0]
        p, q = torch.log_softmax(plain.double(), -1), torch.log_softmax(steered.double(), -1)
        total += float((p.exp() * (p - q)).sum())
        count += len(p)
    return total / count


def dose_response(
    lm: LanguageModel,
    interventions: Callable[[float], Sequence[Operator | Steering]],
    strengths: Sequence[float],
    *,
    contrast: Contrast,
    neutral: Sequence[str],
    story: str,
    max_new_tokens: int = 40,
    progress: Progress = silent,
) -> pl.DataFrame:
    """Effect, side effect and sample text at each strength.

    `interventions(strength)` makes the interventions. Columns: `strength`; `log_odds`, the mean over the contrast's
    prompts, with `log_odds_sd`, the standard deviation over them of the change against strength 0; `kl`, nats per
    token on the `neutral` texts; `text`, the greedy continuation of `story`.
    """
    base = log_odds(lm, contrast)
    rows = []
    for i, strength in enumerate(strengths):
        items = list(interventions(strength))
        with steer(lm, *items):
            odds = log_odds(lm, contrast)
            text = lm.generate(story, max_new_tokens=max_new_tokens)[0]
        rows.append(
            {
                "strength": float(strength),
                "log_odds": float(odds.mean()),
                "log_odds_sd": float((odds - base).std()),
                "kl": divergence(lm, neutral, *items),
                "text": text,
            }
        )
        progress("steer", i + 1, len(strengths))
    return pl.DataFrame(rows)
