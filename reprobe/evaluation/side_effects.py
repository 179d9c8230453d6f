"""What an intervention does that was not asked for: to ordinary text, to what the model writes, to what it knows.

Enters: a language model and interventions. Leaves: `SideEffects`, every measure with and without them, and the change
with its interval. Does not know what the interventions are for.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import polars as pl
from jaxtyping import Float

from reprobe.control import steer
from reprobe.errors import DataError, UsageError
from reprobe.evaluation.choices import multiple_choice
from reprobe.evaluation.effect import Baseline, Interventions, several
from reprobe.evaluation.generation import distinct, fluency
from reprobe.evaluation.means import Mean, interval_of, mean_of
from reprobe.evaluation.passages import NEUTRAL, Passage, Text, surprisals
from reprobe.model.language_model import LanguageModel
from reprobe.progress import Progress, silent
from reprobe.prompts import PromptSet
from reprobe.prompts.fact import continuation

#: Measures of generated text, each a number per text.
_WRITING: dict[str, Callable[[str], float]] = {
    "distinct-1": lambda text: distinct(text, 1),
    "distinct-2": lambda text: distinct(text, 2),
    "n-gram entropy": fluency,
}


@dataclass(frozen=True, eq=False)
class SideEffects:
    """`table` has a row per measure: `measure`, `unit`, `unsteered`, `steered`, `change` with its 95 % interval `low`,
    `high` (null where there is one group only), and `n` of what it was measured on (`over`).

    KL(unsteered ‖ steered), cross-entropy and perplexity are of ordinary text; distinct-n is the share of different
    n-grams, and n-gram entropy ⅓ H₂ + ⅔ H₃, of greedy continuations, which `generations` holds (`prompt`,
    `unsteered`, `steered`); accuracy is on unrelated questions.
    """

    table: pl.DataFrame
    generations: pl.DataFrame


def side_effects(
    lm: LanguageModel,
    interventions: Interventions,
    *,
    texts: Sequence[Text] = NEUTRAL,
    unrelated: PromptSet | str | None = "facts",
    max_new_tokens: int = 40,
    allow_mismatch: bool = False,
    seed: int = 0,
    progress: Progress = silent,
) -> SideEffects:
    """Measure what interventions cost.

    `texts` are ordinary: what is predicted along them is compared, and their prompts are continued by
    `max_new_tokens` (0: none) greedy tokens. `unrelated` holds questions to be still answered: rows with `target` and
    `target_new` count as right where the first is the likelier continuation, rows of true and false answers by MC1;
    None leaves them out. Intervals are over texts, prompts and groups, of the paired change; `seed` is the
    bootstrap's. Raises `DataError` for an `unrelated` of neither kind or with objects missing, `UsageError` for texts
    of one token each, of which none is predicted.
    """
    items = several(interventions)
    questions = PromptSet.load(unrelated) if isinstance(unrelated, str) else unrelated
    answers = None if questions is None else _answers(questions)
    prompts = [text.prompt if isinstance(text, Passage) else text for text in texts]
    steps = 2 + (max_new_tokens > 0) + (answers is not None)

    baseline = Baseline.of(lm, texts)
    if not any(len(run.tokens) for run in baseline.runs):
        raise UsageError("cross-entropy and perplexity need a text of two tokens or more")
    progress("side effects", 1, steps)
    runs = baseline.steered(items, allow_mismatch=allow_mismatch)
    kl = baseline.between(runs, seed=seed)
    rows = [_row("kl", "nats/token", 0.0, kl.mean, kl, len(texts), "texts")]
    rows += _text_losses([surprisals(lm, run) for run in baseline.runs], [surprisals(lm, run) for run in runs], seed)
    progress("side effects", 2, steps)

    written: list[list[str]] = [[], []]
    if max_new_tokens > 0:
        written[0] = lm.generate(prompts, max_new_tokens=max_new_tokens)
        with steer(lm, *items, allow_mismatch=allow_mismatch):
            written[1] = lm.generate(prompts, max_new_tokens=max_new_tokens)
        for name, measure in _WRITING.items():
            before, after = (np.array([measure(text) for text in side]) for side in written)
            unit = "bits" if measure is fluency else "share"
            rows.append(_paired(name, unit, before, after, None, "continuations", seed))
        progress("side effects", 3, steps)
    if answers is not None and questions is not None:
        before, groups = answers(lm)
        with steer(lm, *items, allow_mismatch=allow_mismatch):
            after, _ = answers(lm)
        rows.append(_paired(f"accuracy on {questions.name}", "share", before, after, groups, "questions", seed))
        progress("side effects", steps, steps)
    generations = pl.DataFrame(
        {"prompt": prompts if max_new_tokens > 0 else [], "unsteered": written[0], "steered": written[1]},
        schema=dict.fromkeys(("prompt", "unsteered", "steered"), pl.String),
    )
    return SideEffects(pl.DataFrame(rows, schema_overrides={"low": pl.Float64, "high": pl.Float64}), generations)


_Row = dict[str, str | float | int | None]
#: Right (1.0) or wrong (0.0) per question, and each question's group.
_Answers = Callable[[LanguageModel], tuple[Float[np.ndarray, " questions"], list[str]]]
_Scale = Callable[[np.ndarray], np.ndarray]


def _answers(data: PromptSet) -> _Answers:
    columns = set(data.frame.columns)
    if {"target", "target_new"} <= columns:
        objects = data.frame.select("target", "target_new")
        if lacking := objects.filter(pl.any_horizontal(pl.all().is_null())).height:
            raise DataError(
                f"{data.name}: {lacking} of {objects.height} facts lack a true or a new object (target, target_new): "
                "there is nothing to choose between"
            )
        texts = data.texts
        pairs = [[continuation(t, o) for o in both] for t, both in zip(texts, objects.iter_rows(), strict=True)]

        def facts(lm: LanguageModel) -> tuple[np.ndarray, list[str]]:
            scores = np.stack(lm.logprobs(texts, pairs))
            return (scores[:, 0] > scores[:, 1]).astype(np.float64), data.frame["group"].to_list()

        return facts
    if {"question", "answer"} <= columns:

        def choices(lm: LanguageModel) -> tuple[np.ndarray, list[str]]:
            table = multiple_choice(lm, data).table
            return table["mc1"].to_numpy(), table["group"].to_list()

        return choices
    raise DataError(
        f"{data.name} has neither target and target_new (as facts) nor question and answer (as misconceptions): "
        "there is nothing to be right or wrong about"
    )


def _text_losses(before: Sequence[np.ndarray], after: Sequence[np.ndarray], seed: int) -> list[_Row]:
    """Cross-entropy and perplexity of texts, from the surprisals of their tokens."""
    n = np.array([len(each) for each in before], np.float64)
    sums = [np.array([each.sum() for each in side]) for side in (before, after)]

    def losses(weights: Float[np.ndarray, "texts draws"]) -> list[np.ndarray]:
        return [(side @ weights) / np.maximum(n @ weights, 1.0) for side in sums]

    def change(weights: np.ndarray, scale: _Scale) -> np.ndarray:
        before, after = losses(weights)
        return scale(after) - scale(before)

    rows = []
    scales: tuple[tuple[str, str, _Scale], ...] = (
        ("cross-entropy", "nats/token", np.positive),
        ("perplexity", "", np.exp),
    )
    for name, unit, scale in scales:
        plain, steered = (float(scale(loss)[0]) for loss in losses(np.ones((len(n), 1))))
        low, high = interval_of(partial(change, scale=scale), range(len(n)), seed=seed)
        rows.append(_row(name, unit, plain, steered, Mean(steered - plain, low, high), len(n), "texts"))
    return rows


def _paired(
    name: str, unit: str, before: np.ndarray, after: np.ndarray, groups: list[str] | None, over: str, seed: int
) -> _Row:
    change = mean_of(after - before, groups, seed=seed)
    return _row(name, unit, float(before.mean()), float(after.mean()), change, len(before), over)


def _row(name: str, unit: str, unsteered: float, steered: float, change: Mean, n: int, over: str) -> _Row:
    return {
        "measure": name,
        "unit": unit,
        "unsteered": unsteered,
        "steered": steered,
        "change": change.mean,
        "low": change.low,
        "high": change.high,
        "n": n,
        "over": over,
    }
