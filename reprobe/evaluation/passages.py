"""Ordinary text, and what a model predicts along it.

Enters: a language model and texts. Leaves: for each text the states that predictions are made from, and sums over its
tokens: KL divergence from another run, cross-entropy. Does not know what, if anything, steers the model.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from reprobe.errors import UsageError
from reprobe.model.hooks import capture
from reprobe.model.language_model import Continued, LanguageModel
from reprobe.model.sites import Site

#: Numbers of float64 in memory at a time; a vocabulary of 262,144 has 32 rows of them.
_AT_ONCE = 2**23


@dataclass(frozen=True)
class Passage:
    """A prompt and how it goes on. The continuation carries its leading blank, and its tokens count as generated, so
    that every scope of an intervention has tokens to act on. Only predictions of its tokens are measured."""

    prompt: str
    continuation: str

    @classmethod
    def of(cls, text: str) -> "Passage":
        """A text cut after its first word, so that nearly all of it is measured; `UsageError` if it has no other."""
        head, blank, rest = text.strip().partition(" ")
        if not rest:
            raise UsageError(f"{text!r} has one word only: nothing follows that could be predicted")
        return cls(head, blank + rest)


#: A text to measure on. A string is a prompt: all its tokens are given, and predictions after each are measured.
Text = str | Passage

#: Ordinary sentences about nothing in particular: what steering should leave alone.
NEUTRAL = (
    Passage("The library opens at nine in the morning", " and closes at six. Books can be borrowed for three weeks."),
    Passage("To make tea, boil the water,", " pour it over the leaves and wait for four minutes before you drink it."),
    Passage("The river rises in the hills,", " flows past two towns and reaches the sea after ninety kilometres."),
    Passage("A bicycle chain should be cleaned", " every few weeks, because dust and sand wear down the metal."),
    Passage("The meeting has been moved", " to Thursday afternoon, since two members of the group are travelling."),
    Passage("Wheat is sown in autumn or in spring", " and harvested in summer, when the grain is dry and hard."),
    Passage("The train from the north arrives", " on platform four. Passengers who change here have ten minutes."),
    Passage("Glass is made from sand,", " which is melted at a very high temperature and then cooled slowly."),
    Passage("She measured the window twice", " before she ordered the curtains, and wrote the numbers on a card."),
    Passage("The software stores each file", " under a new name, so that older versions can be opened later."),
    Passage("In the second half of the century", " many families moved from the villages to the cities to find work."),
    Passage("The recipe calls for two eggs,", " a cup of flour, half a cup of milk and a little salt."),
    Passage("Most birds that nest in these trees", " leave in September and come back when the days get longer."),
    Passage("The bridge was closed for repairs", " in March, and traffic was sent around it through the valley."),
    Passage("A triangle with three equal sides", " has three equal angles, and each of them is sixty degrees."),
    Passage("The committee read the report", " and asked for a shorter summary with a table of the main costs."),
)


def runs(lm: LanguageModel, texts: Sequence[Text], site: Site | str = "final") -> list[Continued]:
    """What the model makes of each text, in the order given: tokens, and states at a site.

    Of a passage, `states[i]` at `final` predicts `tokens[i]`, and the last state what would follow; of a string, the
    states are those of all its tokens, of which the first is not predicted. Raises `UsageError` without texts.
    """
    if not texts:
        raise UsageError("no texts were given to measure on")
    passages = [text for text in texts if isinstance(text, Passage)]
    pairs = [p.prompt for p in passages], [p.continuation for p in passages]
    found = iter(lm.continued(*pairs, site=site) if passages else ())
    return [next(found) if isinstance(text, Passage) else _prompt(lm, text, site) for text in texts]


def last_states(lm: LanguageModel, texts: Sequence[Text], site: Site | str) -> Float[Tensor, "texts width"]:
    """The state of each text's last token at a site."""
    return torch.stack([run.states[-1] for run in runs(lm, texts, site)])


def _prompt(lm: LanguageModel, text: str, site: Site | str) -> Continued:
    batch, (where,) = lm.encode(text), lm.sites(site)
    return Continued(batch.row(0)[1:].cpu().numpy(), capture(lm, lm.inputs(batch), [where])[where][0])


def measured(text: Text, run: Continued) -> Float[Tensor, "tokens d_model"]:
    """The states whose predictions are measured: all of a string's, of a passage those that predict its tokens."""
    return run.states[: len(run.tokens)] if isinstance(text, Passage) else run.states


@torch.no_grad()
def divergences(
    lm: LanguageModel, plain: Float[Tensor, "tokens d_model"], steered: Float[Tensor, "tokens d_model"]
) -> Float[np.ndarray, " tokens"]:
    """KL(plain ‖ steered) of the next-token distributions after each state, in nats, computed in float64."""
    terms = []
    for rows in _blocks(lm, len(plain)):
        p, q = (lm.unembed(states[rows]).double().log_softmax(-1) for states in (plain, steered))
        # A token that is impossible in both distributions adds nothing, and 0 · (−∞ + ∞) is not a number.
        terms.append(torch.where(p == q, 0.0, p.exp() * (p - q)).sum(-1).cpu().numpy())
    each: np.ndarray = np.concatenate(terms)
    return each


@torch.no_grad()
def surprisals(lm: LanguageModel, run: Continued) -> Float[np.ndarray, " tokens"]:
    """−log p of each token of a run, in nats, computed in float64; none for a string of one token."""
    terms = [np.empty(0)]
    for rows in _blocks(lm, len(run.tokens)):
        logp = lm.unembed(run.states[rows]).double().log_softmax(-1)
        targets = torch.from_numpy(run.tokens[rows]).to(logp.device)
        terms.append(-logp.gather(-1, targets[:, None])[:, 0].cpu().numpy())
    each: np.ndarray = np.concatenate(terms)
    return each


def _blocks(lm: LanguageModel, n: int) -> Iterator[slice]:
    step = max(1, _AT_ONCE // lm.vocab_size)
    return (slice(start, start + step) for start in range(0, n, step))
