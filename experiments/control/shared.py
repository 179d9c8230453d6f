"""What the recipes of control share: questions, folds, one price for all methods, tables.

Enters: a language model, prompts, what a method makes of a strength. Leaves: steerings that all cost the same KL on
neutral text, one number per question or prompt with and without them, and their means with intervals. Does not know
any method.

Strengths are found on `TUNING`; off-topic perplexity is taken on `OFF_TOPIC`, passages that tuned nothing. Whatever
else is chosen (heads, blocks, directions, thresholds) is chosen in the development fold of a seed, and measured on the
questions or prompts of the other.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

import reprobe as rp
from reprobe.errors import TargetUnreachable
from reprobe.evaluation import NEUTRAL
from reprobe.evaluation.effect import Baseline
from reprobe.evaluation.means import mean_of
from reprobe.evaluation.passages import surprisals
from reprobe.evaluation.strength import search
from reprobe.probing import group_folds, write_table

SEEDS = (0, 1, 2)
#: KL(unsteered ‖ steered) in nats per token that every method pays on neutral text.
PRICE = 0.1
TUNING = NEUTRAL[::3]
OFF_TOPIC = tuple(passage for passage in NEUTRAL if passage not in TUNING)
#: Without examples before a question: a recipe asks hundreds of times.
PRIMER = ""


@dataclass(frozen=True)
class Setting:
    """Where a recipe runs: its model, a folder for stores, and how many questions and pairs it takes."""

    lm: rp.LanguageModel
    stores: Path
    n: int
    seeds: Sequence[int]

    def store(self, name: str, data: rp.PromptSet, **how: Any) -> rp.ActivationStore:
        return rp.extract(self.lm, data, to=self.stores / f"{name}.reprobe", overwrite=True, **how)


def questions(n: int) -> rp.PromptSet:
    """`n` of our `misconceptions`, drawn once, each with its best and another true answer and two false ones."""
    data = rp.PromptSet.load("misconceptions")
    groups = data.frame["group"].unique(maintain_order=True).to_list()
    kept = {groups[i] for i in np.random.default_rng(0).permutation(len(groups))[:n]}
    frame = data.frame.filter(pl.col("group").is_in(list(kept)))
    frame = frame.sort(["group", "label", "best"], descending=[False, True, True], maintain_order=True)
    frame = frame.group_by("group", "label", maintain_order=True).head(2)
    # Texts as multiple choice lays them out; the blank before "A:" becomes a line's end, so that spans stay right.
    return rp.PromptSet(frame.with_columns(pl.col("text").str.replace("? A: ", "?\nA: ", literal=True)), data.name)


def halves(groups: Iterable[str], seed: int) -> tuple[tuple[list[str], list[str]], tuple[list[str], list[str]]]:
    """Two folds of whole groups, each as (development, test); the second is the first turned round."""
    names = sorted(set(groups))
    fold = group_folds(names, np.zeros(len(names), dtype=int), 2, seed)
    a, b = ([name for name, k in zip(names, fold, strict=True) if k == side] for side in (0, 1))
    return (a, b), (b, a)


# -- one price for all ----------------------------------------------------------------------------------------------


@cache
def baseline_of(lm: rp.LanguageModel, texts: tuple[rp.Passage, ...]) -> Baseline:
    return Baseline.of(lm, texts)


@dataclass(frozen=True)
class Priced:
    """A strength, the KL it costs on `TUNING`, and whether that is `PRICE`; if not, it was the nearest below."""

    strength: float
    kl: float
    reached: bool


def at_price(price: Callable[[float], float], *, start: float = 1.0) -> Priced:
    tried: list[tuple[float, float]] = []

    def noted(strength: float) -> float:
        tried.append((strength, price(strength)))
        return tried[-1][1]

    try:
        search(noted, PRICE, start=start)
    except TargetUnreachable:
        affordable = [t for t in tried if t[1] <= PRICE] or tried
        return Priced(*max(affordable, key=lambda t: t[1]), reached=False)
    return Priced(*tried[-1], reached=True)


def priced(lm: rp.LanguageModel, make: Callable[[float], rp.Steering], *, start: float = 1.0) -> Priced:
    """The strength at which a steering costs `PRICE`."""
    baseline = baseline_of(lm, TUNING)
    return at_price(lambda strength: baseline.divergence(make(strength)).mean, start=start)


def off_topic(lm: rp.LanguageModel, steering: rp.Steering) -> float:
    """How many times as high the perplexity on `OFF_TOPIC` is with a steering."""
    baseline = baseline_of(lm, OFF_TOPIC)
    plain, steered = (
        np.concatenate([surprisals(lm, run) for run in runs]) for runs in (baseline.runs, baseline.steered(steering))
    )
    return float(np.exp(steered.mean() - plain.mean()))


# -- outcomes -------------------------------------------------------------------------------------------------------


@dataclass
class Outcomes:
    """Numbers per question (or prompt) of every method, seed and fold, and what each run chose and paid."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    runs: list[dict[str, Any]] = field(default_factory=list)

    def add(
        self,
        method: str,
        seed: int,
        fold: int,
        before: Mapping[str, Mapping[str, float]],
        after: Mapping[str, Mapping[str, float]],
        **run: Any,
    ) -> None:
        """`before` and `after`: metric → question → number; of `before`, which has more questions, those of `after`."""
        where = {"method": method, "seed": seed, "fold": fold}
        changes = {}
        for metric, values in after.items():
            for item, value in values.items():
                self.rows.append(
                    where | {"metric": metric, "item": item, "before": before[metric][item], "after": value}
                )
            changes[metric] = float(np.mean([value - before[metric][item] for item, value in values.items()]))
        self.runs.append(where | run | {f"change in {metric}": value for metric, value in changes.items()})

    def summary(self) -> pl.DataFrame:
        """Per method and metric the mean change with its interval over the questions, each the mean of its seeds."""
        frame = pl.DataFrame(self.rows).with_columns(change=pl.col("after") - pl.col("before"))
        kls = pl.DataFrame(self.runs).group_by("method").agg(pl.col("kl").mean()) if "kl" in self.runs[0] else None
        out = []
        for (method, metric), rows in frame.group_by("method", "metric", maintain_order=True):
            items = rows.group_by("item", maintain_order=True).agg(pl.col("before", "after", "change").mean())
            found = mean_of(items["change"].to_numpy())
            seeds = rows.group_by("seed", maintain_order=True).agg(pl.col("change").mean())["change"]
            out.append(
                {
                    "method": method,
                    "metric": metric,
                    "unsteered": items["before"].mean(),
                    "steered": items["after"].mean(),
                    "change": found.mean,
                    "low": found.low,
                    "high": found.high,
                    "n": items.height,
                    "seed by seed": " ".join(f"{value:+.3f}" for value in seeds),
                }
            )
        table = pl.DataFrame(out)
        return table if kls is None else table.join(kls, on="method", how="left", maintain_order="left")

    def save(self, out: Path, name: str) -> list[str]:
        """Tables as files, and the summary as lines of Markdown; without an outcome, no file and one line."""
        if not self.rows:
            return ["No outcome."]
        write_table(self.summary(), out / f"{name}.csv", overwrite=True)
        write_table(pl.DataFrame(self.runs, infer_schema_length=None), out / f"{name}-runs.csv", overwrite=True)
        lines = ["| method | metric | unsteered | steered | change | seed by seed | KL | n |", "|---" * 8 + "|"]
        for row in self.summary().iter_rows(named=True):
            kl = "–" if row.get("kl") is None else f"{row['kl']:.3f}"
            lines.append(
                f"| {row['method']} | {row['metric']} | {row['unsteered']:.3f} | {row['steered']:.3f} | "
                f"{row['change']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}] | {row['seed by seed']} | {kl} | "
                f"{row['n']} |"
            )
        return lines


def choices(lm: rp.LanguageModel, data: rp.PromptSet) -> dict[str, dict[str, float]]:
    """MC1 and MC2 of each question, of the model as it is."""
    table = rp.multiple_choice(lm, data, primer=PRIMER).table
    return {metric: dict(zip(table["group"], table[metric], strict=True)) for metric in ("mc1", "mc2")}


@dataclass(frozen=True)
class Words:
    """Log-odds (nats) that the next token is one of a set of words rather than one of another; single tokens each."""

    positive: tuple[str, ...]
    negative: tuple[str, ...]

    def __call__(self, lm: rp.LanguageModel, prompts: Sequence[str]) -> dict[str, dict[str, float]]:
        logp = lm.logits(list(prompts)).double()
        odds = logp[:, self.ids(lm, self.positive)].logsumexp(-1) - logp[:, self.ids(lm, self.negative)].logsumexp(-1)
        return {"log-odds": dict(zip(prompts, odds.tolist(), strict=True))}

    @staticmethod
    def ids(lm: rp.LanguageModel, words: Sequence[str]) -> list[int]:
        ids = [lm.tokenizer(f" {word}", add_special_tokens=False)["input_ids"] for word in words]
        if long := [word for word, own in zip(words, ids, strict=True) if len(own) != 1]:
            raise SystemExit(f"not one token of {lm.name}: {', '.join(long)}")
        return [own[0] for own in ids]


HAPPY = Words(
    ("happy", "glad", "proud", "relieved", "good", "great", "wonderful", "grateful"),
    ("sad", "lonely", "lost", "empty", "upset", "bad", "terrible", "awful"),
)
#: What follows a scene, so that the next word says how it felt.
ENDING = " It made me feel"


def scenes(n: int) -> rp.PromptSet:
    """`n` pairs of our `emotions` in the first person, each scene followed by `ENDING`."""
    data = rp.PromptSet.load("emotions")
    frame = data.frame.filter(pl.col("person") == "first")
    pairs = frame["pair"].unique(maintain_order=True).to_list()
    kept = [pairs[i] for i in np.random.default_rng(0).permutation(len(pairs))[:n]]
    frame = frame.filter(pl.col("pair").is_in(kept)).with_columns(pl.col("text") + ENDING)
    return rp.PromptSet(frame, data.name)


def share_of(lm: rp.LanguageModel, low: float, high: float, step: int = 1) -> list[int]:
    """Blocks from one share of the depth to another."""
    return list(range(round(low * lm.n_layers), round(high * lm.n_layers), step))


def randomised(steering: rp.Steering, seed: int) -> rp.Steering:
    """The same `Add`s with random vectors: as many, as long, at the same sites and tokens."""
    rng = np.random.default_rng([seed, 7])
    items = []
    for item in steering.interventions:
        assert isinstance(item, rp.Add)
        v = rng.normal(size=item.direction.width)
        d = rp.Direction.from_vector(item.site, v, scale=item.direction.scale)
        items.append(rp.Add(d, item.strength, tokens=item.tokens))
    return rp.Steering(*items, name=f"random, as {steering.name}")


os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no recipe asks a hub for anything
