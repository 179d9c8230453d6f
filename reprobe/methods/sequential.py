"""Edits one after another, each made on the model that the earlier ones left, with a guard against its collapse.

Enters: a language model, facts, a function that makes the edits of one fact, a guard. Leaves: a model whose ledger
holds the edits, and a `Run`: what was applied, the perplexities on the way, and why it stopped. Does not know how an
edit is made.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from reprobe.control.edits import WeightEdit
from reprobe.control.ledger import ledger_of
from reprobe.errors import UsageError
from reprobe.model.language_model import LanguageModel
from reprobe.progress import Progress, silent
from reprobe.prompts.fact import Fact

Make = Callable[[LanguageModel, Fact], WeightEdit | list[WeightEdit]]


@dataclass(frozen=True)
class Guard:
    """Stop when the perplexity on `texts` is more than `limit` times what it was before the first edit.

    Measured after every `every` facts and after the last. The edits since the last measurement within the limit are
    then reverted.
    """

    texts: tuple[str, ...]
    limit: float = 2.0
    every: int = 10

    def __post_init__(self) -> None:
        if not self.texts or self.limit <= 1 or self.every < 1:
            raise UsageError(
                f"a guard needs texts, a limit above 1 and every ≥ 1, not {len(self.texts)} texts, "
                f"limit={self.limit}, every={self.every}"
            )


@dataclass(frozen=True)
class Checked:
    """The perplexity after so many facts."""

    facts: int
    perplexity: float


@dataclass(frozen=True, eq=False)
class Run:
    """`edits[i]` are those of the i-th fact that is still in the model; `checked` the perplexities, the first before
    any edit; `stopped` says why not all facts were written, None if they were."""

    edits: tuple[tuple[WeightEdit, ...], ...]
    checked: tuple[Checked, ...]
    stopped: str | None


def sequential(
    lm: LanguageModel, facts: Sequence[Fact], make: Make, guard: Guard, *, progress: Progress = silent
) -> Run:
    """Write facts one after another into the model; they stay in it, and its ledger takes them out.

    `make` is for example `lambda lm, fact: rome.edit(lm, fact, moment=moment)`. If the guard's limit is passed, the
    run says so in `stopped` and the model is left as at the last good measurement. If `make` raises, what was applied
    stays, and the error passes through.
    """
    ledger = ledger_of(lm)
    checked = [Checked(0, lm.perplexity(guard.texts))]
    allowed = guard.limit * checked[0].perplexity
    applied: list[tuple[WeightEdit, ...]] = []
    good = 0
    for i, fact in enumerate(facts):
        made = make(lm, fact)
        edits = (made,) if isinstance(made, WeightEdit) else tuple(made)
        ledger.apply(edits)
        applied.append(edits)
        progress("edit", i + 1, len(facts))
        if (i + 1) % guard.every and i + 1 < len(facts):
            continue
        checked.append(Checked(i + 1, lm.perplexity(guard.texts)))
        if not checked[-1].perplexity <= allowed:  # NaN is a collapse, too
            ledger.revert([edit for edits in applied[good:] for edit in edits])
            return Run(
                tuple(applied[:good]),
                tuple(checked),
                f"after {i + 1} of {len(facts)} facts the perplexity is {checked[-1].perplexity:.4g}, more than "
                f"{guard.limit:g} times the {checked[0].perplexity:.4g} before: the last {i + 1 - good} were reverted",
            )
        good = i + 1
    return Run(tuple(applied), tuple(checked), None)
