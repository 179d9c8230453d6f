"""How good edits are: do they hold, do they generalise, do they spare the rest?

Enters: a language model, facts with true and new objects, edits or a function that makes them. Leaves: one line per
prompt, and from these the scores of the ROME and MEMIT papers with intervals over subjects. Does not know how edits are
made. Works on the bundled `facts` and on CounterFact in both layouts, which `facts_of` reads alike.

- efficacy: after the fact's prompt the new object is likelier than the true one; paraphrase: the same after its
  paraphrases; neighbourhood: after prompts about other subjects *their* true object is likelier than the new one.
- a magnitude is the difference of the two probabilities, in the same order. Probability: exp(mean log-probability of
  an object's tokens).
- score: the harmonic mean of the three shares (S in the papers).
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import polars as pl
from jaxtyping import Float

from reprobe.control.edits import WeightEdit
from reprobe.control.ledger import edited
from reprobe.errors import DataError, UsageError
from reprobe.evaluation.generation import fluency
from reprobe.evaluation.means import Mean, interval_of, mean_of, share_of
from reprobe.model.language_model import LanguageModel
from reprobe.progress import Progress, silent
from reprobe.prompts.fact import Fact, continuation

Kind = Literal["efficacy", "paraphrase", "neighbourhood"]
KINDS: tuple[Kind, ...] = ("efficacy", "paraphrase", "neighbourhood")


@dataclass(frozen=True, eq=False)
class EditScores:
    """Of one state of the model. `shares` and `magnitudes` by kind (those that the facts have prompts for); `score` is
    the harmonic mean of the shares. Intervals are over subjects. `prompts` has one line per prompt: fact, group, kind,
    prompt, p_new, p_true, success."""

    facts: int
    shares: dict[Kind, Mean]
    magnitudes: dict[Kind, Mean]
    score: Mean
    prompts: pl.DataFrame


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Scores without and with edits. Where that was asked for: the perplexity on ordinary text, and the `fluency`
    (bits) of a text that the model writes about each subject; with edits one at a time, the means over facts."""

    before: EditScores
    after: EditScores
    perplexity_before: float | None = None
    perplexity_after: float | None = None
    fluency_before: float | None = None
    fluency_after: float | None = None

    @property
    def table(self) -> pl.DataFrame:
        """One line per measure: before, after, and the interval of each (null where there is one subject only)."""
        rows = []
        for name, one, two in (
            *((k, self.before.shares[k], self.after.shares[k]) for k in self.after.shares),
            *((f"{k} magnitude", self.before.magnitudes[k], self.after.magnitudes[k]) for k in self.after.magnitudes),
            ("score", self.before.score, self.after.score),
        ):
            rows.append(
                {
                    "measure": name,
                    "before": one.mean,
                    "before_low": one.low,
                    "before_high": one.high,
                    "after": two.mean,
                    "after_low": two.low,
                    "after_high": two.high,
                }
            )
        bounds = [f"{state}_{side}" for state in ("before", "after") for side in ("low", "high")]
        return pl.DataFrame(rows, schema_overrides=dict.fromkeys(bounds, pl.Float64))


def score_facts(lm: LanguageModel, facts: Sequence[Fact]) -> pl.DataFrame:
    """Every prompt of every fact on the model as it is now: p_new, p_true, and whether it is as it shall be.

    Raises `DataError`, naming the facts, where an object is missing; `UsageError` without facts.
    """
    if not facts:
        raise UsageError("no facts were given to be scored")
    if lacking := [f.id or f.prompt for f in facts if f.new is None or f.true is None]:
        raise DataError(f"{len(lacking)} of {len(facts)} facts lack a true or a new object: {', '.join(lacking[:5])}")
    lines: list[tuple[Fact, Kind, str, str, str]] = []
    for fact in facts:
        new, true = str(fact.new), str(fact.true)
        lines.append((fact, "efficacy", fact.prompt, new, true))
        lines += [(fact, "paraphrase", p, new, true) for p in fact.paraphrases]
        lines += [(fact, "neighbourhood", n.prompt, new, n.true) for n in fact.neighbours]
    found = np.exp(
        np.stack(
            lm.logprobs(
                [prompt for _, _, prompt, _, _ in lines],
                [[continuation(prompt, o) for o in (new, true)] for _, _, prompt, new, true in lines],
                mean=True,
            )
        )
    )
    return pl.DataFrame(
        {
            "fact": [f.id or f.prompt for f, *_ in lines],
            "group": [f.group or f.subject for f, *_ in lines],
            "kind": [kind for _, kind, *_ in lines],
            "prompt": [prompt for _, _, prompt, _, _ in lines],
            "p_new": found[:, 0],
            "p_true": found[:, 1],
        }
    ).with_columns(
        success=pl.when(pl.col("kind") == "neighbourhood")
        .then(pl.col("p_true") > pl.col("p_new"))
        .otherwise(pl.col("p_new") > pl.col("p_true"))
    )


def summarise(prompts: pl.DataFrame, *, seed: int = 0) -> EditScores:
    """Shares, magnitudes and their harmonic mean from the lines of `score_facts`.

    A fact counts once in each share, whatever the number of its prompts; intervals are over subjects (Wilson with
    effective size for shares of single prompts, BCa bootstrap else).
    """
    sign = pl.when(pl.col("kind") == "neighbourhood").then(-1).otherwise(1)
    per_fact = (
        prompts.with_columns(magnitude=sign * (pl.col("p_new") - pl.col("p_true")))
        .group_by("group", "fact", "kind", maintain_order=True)
        .agg(pl.col("success").mean(), pl.col("magnitude").mean())
    )
    shares: dict[Kind, Mean] = {}
    magnitudes: dict[Kind, Mean] = {}
    for kind in KINDS:
        own = per_fact.filter(pl.col("kind") == kind)
        if own.height:
            groups, success = own["group"].to_list(), own["success"].to_numpy()
            single = np.isin(success, (0.0, 1.0)).all()
            shares[kind] = share_of(success, groups) if single else mean_of(success, groups, seed=seed)
            magnitudes[kind] = mean_of(own["magnitude"].to_numpy(), groups, seed=seed)
    return EditScores(
        facts=prompts["fact"].n_unique(),
        shares=shares,
        magnitudes=magnitudes,
        score=_harmonic(per_fact, list(shares), seed),
        prompts=prompts,
    )


def evaluate(
    lm: LanguageModel,
    facts: Sequence[Fact],
    make: Callable[[Fact], WeightEdit | Iterable[WeightEdit]],
    *,
    texts: Sequence[str] = (),
    write: int = 0,
    seed: int = 0,
    progress: Progress = silent,
) -> Evaluation:
    """Facts edited one at a time, each on the model as it is: make the edits, apply, score that fact, revert.

    `texts` are ordinary text for the perplexity, `write` the tokens of the texts for the fluency (none, 0: not
    measured).
    """
    before = _State.of(lm, facts, texts, write, seed)
    after: list[_State] = []
    for i, fact in enumerate(facts):
        made = make(fact)
        with edited(lm, made):
            after.append(_State.of(lm, [fact], texts, write, seed))
        progress("evaluate", i + 1, len(facts))
    return _evaluation(before, _State.joined(after), seed)


def evaluate_together(
    lm: LanguageModel,
    facts: Sequence[Fact],
    edits: WeightEdit | Iterable[WeightEdit],
    *,
    texts: Sequence[str] = (),
    write: int = 0,
    seed: int = 0,
) -> Evaluation:
    """Scores of facts without and with edits that are applied all at once, as MEMIT's are; else as `evaluate`.

    Neighbours that the edits write about are left out: see `spared`.
    """
    made = [edits] if isinstance(edits, WeightEdit) else list(edits)
    scored = spared(facts, [fact for edit in made for fact in edit.facts])
    before = _State.of(lm, scored, texts, write, seed)
    with edited(lm, made):
        after = _State.of(lm, scored, texts, write, seed)
    return _evaluation(before, after, seed)


def spared(facts: Sequence[Fact], written: Iterable[Fact]) -> list[Fact]:
    """The facts without neighbours whose prompts name a subject that is written about.

    The neighbours of one fact are often the subjects of others in the same set (the Louvre, where the Eiffel Tower is
    moved): that an edit changes what is said of its own subject is no harm to a neighbour.
    """
    subjects = {fact.subject for fact in written}
    named = re.compile("|".join(rf"(?<!\w){re.escape(s)}(?!\w)" for s in sorted(subjects)) or r"(?!)")
    return [replace(f, neighbours=tuple(n for n in f.neighbours if not named.search(n.prompt))) for f in facts]


@dataclass(frozen=True, eq=False)
class _State:
    """What is measured of a model in one state."""

    lines: pl.DataFrame
    perplexity: float | None
    fluency: float | None

    @classmethod
    def of(cls, lm: LanguageModel, facts: Sequence[Fact], texts: Sequence[str], write: int, seed: int) -> "_State":
        written = generate_about(lm, facts, max_new_tokens=write, seed=seed) if write else []
        return cls(
            score_facts(lm, facts),
            lm.perplexity(texts) if texts else None,
            float(np.mean([fluency(text) for text in written])) if written else None,
        )

    @classmethod
    def joined(cls, states: Sequence["_State"]) -> "_State":
        def mean(values: Iterable[float | None]) -> float | None:
            known = [v for v in values if v is not None]
            return float(np.mean(known)) if known else None

        return cls(
            pl.concat([s.lines for s in states]),
            mean(s.perplexity for s in states),
            mean(s.fluency for s in states),
        )


def _evaluation(before: _State, after: _State, seed: int) -> Evaluation:
    return Evaluation(
        summarise(before.lines, seed=seed),
        summarise(after.lines, seed=seed),
        before.perplexity,
        after.perplexity,
        before.fluency,
        after.fluency,
    )


def consistency(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Mean cosine similarity of each generated text with its reference texts joined, as vectors of words weighted by
    inverse document frequency over all references (TF-IDF)."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    if len(texts) != len(references) or not texts:
        raise UsageError(f"{len(texts)} texts need as many sets of references, not {len(references)}")
    joined = [" ".join(r) for r in references]
    vectoriser = TfidfVectorizer().fit(joined)
    a, b = vectoriser.transform(texts), vectoriser.transform(joined)
    return float(np.mean(np.asarray(a.multiply(b).sum(axis=1))))


def generate_about(lm: LanguageModel, facts: Sequence[Fact], *, max_new_tokens: int = 60, seed: int = 0) -> list[str]:
    """One text per fact, sampled from a beginning about its subject (its first generation prompt, else its prompt)."""
    prompts = [f.generation_prompts[0] if f.generation_prompts else f.prompt for f in facts]
    texts = lm.generate(prompts, max_new_tokens=max_new_tokens, do_sample=True, top_k=50, seed=seed)
    return [a + b for a, b in zip(prompts, texts, strict=True)]


def _harmonic(per_fact: pl.DataFrame, kinds: Sequence[Kind], seed: int) -> Mean:
    """The harmonic mean of the shares; its interval resamples subjects with all that belongs to them."""
    kind = per_fact["kind"].to_numpy()
    success = per_fact["success"].to_numpy().astype(float)

    def score(weights: Float[np.ndarray, "rows draws"]) -> Float[np.ndarray, " draws"]:
        shares = []
        with np.errstate(invalid="ignore", divide="ignore"):
            for name in kinds:
                own = weights[kind == name].astype(float)
                shares.append(success[kind == name] @ own / own.sum(axis=0))
            stacked = np.stack(shares)
            out: np.ndarray = np.where((stacked > 0).all(axis=0), len(kinds) / (1 / stacked).sum(axis=0), 0.0)
        return np.where(np.isnan(stacked).any(axis=0), np.nan, out)

    return Mean(
        float(score(np.ones((len(success), 1)))[0]), *interval_of(score, per_fact["group"].to_list(), seed=seed)
    )
