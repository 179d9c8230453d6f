"""What an intervention does: how far it moves what is wanted, and how far it moves everything else.

Enters: a language model, interventions, prompts. Leaves: numbers and a table of effect against side effect. Every
strength is measured in the same model, with and without the intervention. Does not know where a direction came from.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
import polars as pl
from jaxtyping import Float
from scipy.special import logsumexp

from reprobe.control import Operator, Steering, steer
from reprobe.errors import UsageError
from reprobe.evaluation.means import Mean, mean_of
from reprobe.evaluation.passages import NEUTRAL, Text, divergences, last_states, measured, runs
from reprobe.model.language_model import Continued, LanguageModel
from reprobe.probing.direction import Direction
from reprobe.progress import Progress, silent

#: One thing that `steer` takes, or several.
Interventions = Operator | Steering | Sequence[Operator | Steering]


def several(interventions: Interventions) -> list[Operator | Steering]:
    """Interventions as a list for `steer`."""
    return list(interventions) if isinstance(interventions, Sequence) else [interventions]


class Scorer(Protocol):
    """What `dose_response` measures: a function of the model as it is at the moment, steered or not.

    One number per prompt, in the same order at every call. Its column in the table is its attribute `name`, or else
    `effect`.
    """

    def __call__(self, lm: LanguageModel, /) -> Float[np.ndarray, " prompts"]: ...


@dataclass(frozen=True)
class Contrast:
    """Two sets of continuations whose odds measure a behaviour, e.g. words of two moods after "She felt".

    Continuations carry their leading blank. Each prompt's log-odds are log Σp(positive) − log Σp(negative), in nats.
    """

    name: ClassVar[str] = "log_odds"
    prompts: tuple[str, ...]
    positive: tuple[str, ...]
    negative: tuple[str, ...]

    def __call__(self, lm: LanguageModel) -> Float[np.ndarray, " prompts"]:
        return log_odds(lm, self)

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


@dataclass(frozen=True)
class Readout:
    """A direction's own reading of texts at their last token, (h·v̂ − offset) / scale, as something to score.

    Use a direction fitted on other data than the one that steers: a direction reads at once what it adds itself.
    Where a text is a `Passage`, its continuation counts as generated; a string is all prompt.
    """

    name: ClassVar[str] = "readout"
    direction: Direction
    texts: tuple[Text, ...]
    allow_mismatch: bool = False

    def __post_init__(self) -> None:
        if self.direction.site is None:
            raise UsageError("the direction has no site of its own to be read at: direction.at('resid.post@…')")

    def __call__(self, lm: LanguageModel) -> Float[np.ndarray, " texts"]:
        d, site = self.direction, self.direction.site
        assert site is not None
        if d.identity is not None:
            d.identity.require_same(lm.identity, f"the direction at {site}", allow_mismatch=self.allow_mismatch)
        read: np.ndarray = d.score(last_states(lm, self.texts, site).double().cpu().numpy()) / d.scale
        return read


@dataclass(frozen=True, eq=False)
class Baseline:
    """Texts as the model runs them without further interventions, computed once, for steered runs to be compared
    with."""

    lm: LanguageModel
    texts: tuple[Text, ...]
    runs: tuple[Continued, ...]

    @classmethod
    def of(cls, lm: LanguageModel, texts: Sequence[Text]) -> "Baseline":
        return cls(lm, tuple(texts), tuple(runs(lm, texts)))

    def steered(self, interventions: Interventions, *, allow_mismatch: bool = False) -> tuple[Continued, ...]:
        """The same texts with interventions."""
        with steer(self.lm, *several(interventions), allow_mismatch=allow_mismatch):
            return tuple(runs(self.lm, self.texts))

    def divergence(self, interventions: Interventions, *, allow_mismatch: bool = False) -> Mean:
        """Mean KL(unsteered ‖ steered), nats per token, with an interval over the texts."""
        return self.between(self.steered(interventions, allow_mismatch=allow_mismatch))

    def between(self, steered: Sequence[Continued], *, seed: int = 0) -> Mean:
        """Mean KL of runs of the same texts from these."""
        each = [
            divergences(self.lm, measured(text, plain), measured(text, other))
            for text, plain, other in zip(self.texts, self.runs, steered, strict=True)
        ]
        return mean_of(np.array([e.mean() for e in each]), weights=np.array([len(e) for e in each], float), seed=seed)


def divergence(lm: LanguageModel, texts: Sequence[Text], *interventions: Operator | Steering) -> float:
    """Mean KL(unsteered ‖ steered) of the next-token distributions, in nats per token of `texts`.

    The price of an intervention on text it is not meant for. 0 without interventions. A string counts as prompt, all
    of it; of a `Passage` only the continuation is measured, which counts as generated.
    """
    return Baseline.of(lm, texts).divergence(interventions).mean


def dose_response(
    lm: LanguageModel,
    interventions: Callable[[float], Interventions],
    strengths: Sequence[float],
    *,
    scorer: Scorer,
    neutral: Sequence[Text] = NEUTRAL,
    story: str | None = None,
    max_new_tokens: int = 40,
    progress: Progress = silent,
) -> pl.DataFrame:
    """Effect and side effect at each strength, with 95 % intervals over the prompts (null for a single one).

    `interventions(strength)` makes the interventions. `scorer` is a `Contrast` (log-odds of words), a `Readout` (a
    held-out direction), a `ChoiceScore` (multiple choice), or any function of the model. Columns: `strength`; NAME,
    the mean of the scorer's numbers, with NAME`_low`, NAME`_high` (NAME: the scorer's `name`, or `effect`); `change`,
    the mean change against the unsteered model, with `change_low`, `change_high`, and NAME`_sd`, its standard
    deviation over the prompts; `kl`, nats per token on the `neutral` texts, with `kl_low`, `kl_high`; with a `story`,
    `text`, its greedy continuation.
    """
    name = str(getattr(scorer, "name", "effect"))
    base = _scored(scorer, lm, name, "without steering")
    baseline = Baseline.of(lm, neutral)
    rows = []
    for i, strength in enumerate(strengths):
        items = several(interventions(strength))
        with steer(lm, *items):
            scores = _scored(scorer, lm, name, f"at strength {strength:g}")
            text = None if story is None else lm.generate(story, max_new_tokens=max_new_tokens)[0]
        if len(scores) != len(base):
            raise UsageError(
                f"the scorer {name} gave {len(base)} numbers without steering and {len(scores)} at strength "
                f"{strength:g}: it must score the same prompts every time"
            )
        row: dict[str, float | str | None] = {"strength": float(strength)}
        for key, found in (
            (name, mean_of(scores)),
            ("change", mean_of(scores - base)),
            ("kl", baseline.divergence(items)),
        ):
            row |= {key: found.mean, f"{key}_low": found.low, f"{key}_high": found.high}
        row[f"{name}_sd"] = float((scores - base).std())
        rows.append(row if text is None else row | {"text": text})
        progress("steer", i + 1, len(strengths))
    bounds = [f"{key}_{side}" for key in (name, "change", "kl") for side in ("low", "high")]
    return pl.DataFrame(rows, schema_overrides=dict.fromkeys(bounds, pl.Float64))


def _scored(scorer: Scorer, lm: LanguageModel, name: str, when: str) -> Float[np.ndarray, " prompts"]:
    scores = np.asarray(scorer(lm), np.float64)
    if scores.ndim != 1 or not scores.size or not np.isfinite(scores).all():
        raise UsageError(
            f"{when} the scorer {name} gave {scores.size} numbers in the shape {scores.shape}, "
            f"{np.isfinite(scores).sum()} of them finite: it must give one finite number per prompt"
        )
    return scores
