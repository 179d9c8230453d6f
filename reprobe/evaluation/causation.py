"""Does a unit cause what it detects? Detectors clamped or ablated, against random units that are as active.

Enters: a language model, a `Dissection` of it. Leaves: how the log-probability of each concept's tokens changes, with
intervals, and the same for random units of the same sites. Does not know how detectors were found.

*Stimulate*: every detector is clamped at its threshold, the top quantile of its values, on all tokens of neutral
sentences; measured is log Σ p of the concept's tokens as the next one, in nats. They are the entries of the vocabulary
of which at least half of the occurrences in the stream are of the concept.
*Ablate*: every detector is set to 0 on text of the stream in which the concept occurs; measured is log p of the tokens
that are of the concept, each after what precedes it.

A detector that causes what it detects raises the first and lowers the second more than the random units do.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import polars as pl
import torch
from jaxtyping import Float, Int
from torch import Tensor

from reprobe.control import Ablate, Clamp, Operator, steer
from reprobe.errors import UsageError
from reprobe.evaluation.means import Mean, mean_of
from reprobe.evaluation.passages import NEUTRAL, Passage
from reprobe.methods.dissected import Dissection
from reprobe.model.hooks import capture
from reprobe.model.language_model import Encoded, LanguageModel
from reprobe.model.sites import Site
from reprobe.progress import Progress, silent

Act = Literal["stimulate", "ablate"]

#: Random units are drawn among this many times as many that are nearest in activity.
_POOL = 4
#: Tokens of the stream around one of a concept that are run: so many before it, so many from it on.
_BEFORE, _AFTER = 24, 8
#: Of the neutral sentences every third token is measured, from this one on.
_FIRST, _EVERY = 2, 3
#: Logits in memory at a time.
_AT_ONCE = 2**24


@dataclass(frozen=True, eq=False)
class Causation:
    """`table`: one line per concept and act. `left_out`: why concepts have none.

    Columns: concept, kind, act, units (names of the detectors), texts, positions; effect, the mean change (nats) by the
    detectors, with effect_low, effect_high; control, the mean change by the sets of random units; difference,
    with difference_low, difference_high (95 %, over texts); rank, the share of sets (the detectors' own among them)
    whose change is at least as far in the direction expected.
    """

    table: pl.DataFrame
    left_out: Mapping[str, str]

    @property
    def summary(self) -> pl.DataFrame:
        """One line an act: concepts, the mean effect, control and difference over concepts with an interval over
        concepts, and how many concepts' differences lie beyond 0 with their whole interval, to either side."""
        lines = []
        for act in get_args(Act):
            rows = self.table.filter(pl.col("act") == act)
            if not rows.height:
                continue
            difference = mean_of(rows["difference"].to_numpy())
            lines.append(
                {
                    "act": act,
                    "concepts": rows.height,
                    "effect": rows["effect"].mean(),
                    "control": rows["control"].mean(),
                    "difference": difference.mean,
                    "difference_low": difference.low,
                    "difference_high": difference.high,
                    "above 0": rows.filter(pl.col("difference_low") > 0).height,
                    "below 0": rows.filter(pl.col("difference_high") < 0).height,
                }
            )
        return pl.DataFrame(lines)


def causes(
    lm: LanguageModel,
    dissection: Dissection,
    concepts: Iterable[str] | None = None,
    *,
    most: int = 5,
    controls: int = 8,
    acts: Sequence[Act] = get_args(Act),
    neutral: Sequence[Passage] = NEUTRAL,
    rows: int = 16,
    seed: int = 0,
    allow_mismatch: bool = False,
    progress: Progress = silent,
) -> Causation:
    """Clamp and ablate the detectors of each concept, its `most` best, all at once.

    `concepts` default to all that have a detector. A control is a set of other units, one for each detector, at the
    same site, near it in threshold and standard deviation, no detector of the concept; there are `controls` of them.
    `rows` texts of the stream are ablated on. Raises `IdentityMismatch` for a dissection of another model, `UsageError`
    for a concept that no unit detects, or a site without enough other units.
    """
    dissection.identity.require_same(lm.identity, "the dissection", allow_mismatch=allow_mismatch)
    if most < 1 or controls < 1 or rows < 1 or not acts or not set(acts) <= set(get_args(Act)):
        raise UsageError(f"most={most}, controls={controls}, rows={rows}: 1 or more; acts={acts!r}: {get_args(Act)}")
    limit = dissection.settings.detector
    chosen, left_out = [], {}
    for name in dissection.names if concepts is None else concepts:
        detectors = np.argsort(-dissection.iou[:, dissection.concept(name)], kind="stable")[:most]
        detectors = detectors[dissection.iou[detectors, dissection.concept(name)] > limit]
        if len(detectors):
            chosen.append((name, detectors))
        elif concepts is None:
            left_out[name] = "no unit detects it"
        else:
            raise UsageError(f"no unit has an IoU above {limit:g} with the concept {name!r}: nothing to stimulate")
    lines = []
    sentences = _sentences(lm, neutral)
    for i, (name, detectors) in enumerate(chosen):
        rng = np.random.default_rng([seed, dissection.concept(name)])
        try:
            others = _others(dissection, dissection.concept(name), detectors, controls, rng)
        except UsageError as error:
            if concepts is not None:
                raise
            left_out[name] = str(error)
            continue
        for act in acts:
            task = _task(lm, dissection, name, act, sentences, rows, rng)
            if isinstance(task, str):
                left_out[f"{name}, {act}"] = task
                continue
            plain = task.score(lm)
            sets = [detectors, *others.T]
            changes = [task.score(lm, _operators(dissection, units, act)) - plain for units in sets]
            lines.append(_line(dissection, name, act, detectors, task, changes))
        progress("causes", i + 1, len(chosen))
    return Causation(pl.DataFrame(lines, schema=_SCHEMA), left_out)


_SCHEMA: dict[str, Any] = {
    **dict.fromkeys(("concept", "kind", "act", "units"), pl.String),
    **dict.fromkeys(("texts", "positions"), pl.Int64),
    **dict.fromkeys(("effect", "effect_low", "effect_high", "control"), pl.Float64),
    **dict.fromkeys(("difference", "difference_low", "difference_high", "rank"), pl.Float64),
}


@dataclass(frozen=True, eq=False)
class _Task:
    """Texts, the places after which a prediction is measured, and what is wanted there: one token each, or the same
    several for all."""

    batch: Encoded
    row: Int[np.ndarray, " places"]
    column: Int[np.ndarray, " places"]
    wanted: Int[np.ndarray, " any"]
    together: bool

    @torch.no_grad()
    def score(self, lm: LanguageModel, operators: Sequence[Operator] = ()) -> Float[np.ndarray, " places"]:
        """Log-probability of what is wanted at each place, in nats."""
        final = Site("final")
        with steer(lm, *operators):
            states = capture(lm, lm.inputs(self.batch), [final])[final]
        states = states[torch.from_numpy(self.row).to(states.device), torch.from_numpy(self.column).to(states.device)]
        step = max(1, _AT_ONCE // lm.vocab_size)
        return np.concatenate([self._scores(lm, states, a, a + step) for a in range(0, len(states), step)])

    def _scores(self, lm: LanguageModel, states: Tensor, first: int, last: int) -> Float[np.ndarray, " places"]:
        logits = lm.unembed(states[first:last]).float()
        wanted = torch.from_numpy(self.wanted if self.together else self.wanted[first:last]).to(logits.device)
        of = logits[:, wanted].logsumexp(-1) if self.together else logits.gather(-1, wanted[:, None])[:, 0]
        found: np.ndarray = (of.double() - logits.logsumexp(-1).double()).cpu().numpy()
        return found


def _sentences(lm: LanguageModel, neutral: Sequence[Passage]) -> tuple[Encoded, np.ndarray, np.ndarray]:
    """Neutral sentences, and the places that are measured in them."""
    if not neutral:
        raise UsageError("there are no neutral sentences to stimulate on")
    batch = lm.encode([p.prompt + p.continuation for p in neutral], padding="right", truncate="right")
    column, places = np.arange(batch.real.shape[1]), batch.real.cpu().numpy()
    row, at = np.nonzero(places & (column >= _FIRST) & ((column - _FIRST) % _EVERY == 0))
    if not len(row):
        raise UsageError(f"no neutral sentence has more than {_FIRST} tokens: there is no place to stimulate at")
    return batch, row, at


def _task(
    lm: LanguageModel,
    dissection: Dissection,
    name: str,
    act: Act,
    sentences: tuple[Encoded, np.ndarray, np.ndarray],
    rows: int,
    rng: np.random.Generator,
) -> "_Task | str":
    """What is measured; or why nothing can be."""
    if act == "stimulate":
        tokens = vocabulary(dissection, name)
        return _Task(*sentences, tokens, True) if len(tokens) else "no entry of the vocabulary is its own"
    stream, of = dissection.stream, dissection.of[:, dissection.concept(name)]
    is_of = np.zeros(len(stream.ids), np.bool_)
    is_of[stream.places[of]] = True
    # The first token of a row is predicted from nothing.
    is_of[stream.starts[:-1]] = False
    among = np.unique(stream.row[is_of])
    if len(among) < 2:
        return "it occurs in one row of the stream only"
    texts, targets = [], []
    for r in np.sort(rng.choice(among, min(rows, len(among)), replace=False)):
        start, stop = int(stream.starts[r]), int(stream.starts[r + 1])
        at = int(rng.choice(np.flatnonzero(is_of[start:stop]))) + start
        first, last = max(start, at - _BEFORE), min(stop, at + _AFTER)
        own = np.flatnonzero(is_of[first:last])
        texts.append(stream.ids[first:last])
        targets.append(own[own > 0])
    width = max(map(len, texts))
    ids, real = np.full((len(texts), width), lm.pad_id), np.zeros((len(texts), width), np.bool_)
    for i, text in enumerate(texts):
        ids[i, : len(text)], real[i, : len(text)] = text, True
    batch = Encoded(torch.from_numpy(ids).to(lm.device), torch.from_numpy(real).to(lm.device), {})
    row = np.repeat(np.arange(len(texts)), [len(t) for t in targets])
    column = np.concatenate(targets)
    return _Task(batch, row, column - 1, ids[row, column], False)


def vocabulary(dissection: Dissection, concept: str) -> Int[np.ndarray, " tokens"]:
    """Token ids of which at least half of the occurrences in the stream are of the concept."""
    ids = dissection.stream.ids[dissection.stream.places]
    every = np.bincount(ids)
    own = np.bincount(ids[dissection.of[:, dissection.concept(concept)]], minlength=len(every))
    return np.flatnonzero((own > 0) & (2 * own >= every))


def _operators(dissection: Dissection, units: Int[np.ndarray, " units"], act: Act) -> list[Operator]:
    out: list[Operator] = []
    for u in units:
        which = int(dissection.reading_of[u])
        first = int(np.flatnonzero(dissection.reading_of == which)[0])
        direction = dissection.readings[which].direction(int(u) - first)
        value = float(dissection.threshold[u])
        out.append(Clamp(direction, value, unit="raw") if act == "stimulate" else Ablate(direction))
    return out


def _others(
    dissection: Dissection, c: int, detectors: Int[np.ndarray, " detectors"], controls: int, rng: np.random.Generator
) -> Int[np.ndarray, "detectors controls"]:
    """For each detector, units of the same site that are as active and detect the concept not; none twice."""
    free = dissection.iou[:, c] <= dissection.settings.detector
    out = np.empty((len(detectors), controls), np.int64)
    activity = np.stack([dissection.threshold, dissection.sd], axis=1).astype(np.float64)
    for i, u in enumerate(detectors):
        here = dissection.reading_of == dissection.reading_of[u]
        others = np.flatnonzero(here & free & (dissection.sd > 0))
        if len(others) < controls:
            raise UsageError(
                f"{dissection.readings[dissection.reading_of[u]].site} has {len(others)} units left that could be "
                f"controls of {dissection.unit_names[u]}, and {controls} are asked for"
            )
        spread = activity[here].std(0)
        apart = (((activity[others] - activity[u]) / np.where(spread > 0, spread, 1.0)) ** 2).sum(1)
        near = others[np.argsort(apart, kind="stable")[: _POOL * controls]]
        out[i] = rng.choice(near, controls, replace=False)
        free[out[i]] = False
    return out


def _line(
    dissection: Dissection,
    name: str,
    act: Act,
    detectors: Int[np.ndarray, " detectors"],
    task: _Task,
    changes: Sequence[Float[np.ndarray, " places"]],
) -> dict[str, object]:
    own, others = changes[0], np.stack(changes[1:])
    groups = task.row.tolist()
    effect: Mean = mean_of(own, groups)
    difference: Mean = mean_of(own - others.mean(0), groups)
    sign = 1 if act == "stimulate" else -1
    as_far = (sign * others.mean(1) >= sign * own.mean()).sum()
    return {
        "concept": name,
        "kind": dissection.asked[dissection.concept(name)].kind,
        "act": act,
        "units": ", ".join(dissection.unit_names[u] for u in detectors),
        "texts": len(set(groups)),
        "positions": len(groups),
        "effect": effect.mean,
        "effect_low": effect.low,
        "effect_high": effect.high,
        "control": float(others.mean()),
        "difference": difference.mean,
        "difference_low": difference.low,
        "difference_high": difference.high,
        "rank": float((1 + as_far) / (1 + len(others))),
    }
