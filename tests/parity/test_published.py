"""Every published method against its formula, written a second time in float64: the list, one row a method.

A row gives what the library finds and what the formula gives on the same data: vectors, whose cosine must be at least
0.99999, and decisions, which must be equal. Where a method has `compat` values, each is a row of its own, and the
values differ from the default. Where a formula needs a network, it is the plain loop of that method's own tests, which
go further than this table: all families, paddings, caches and edge cases.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from methods import test_dola as dola_by_hand
from methods import test_iti as iti_by_hand
from methods import test_memit as memit_by_hand
from methods import test_rome as rome_by_hand
from methods.tracing_naive import naive
from tiny import tiny_model

import reprobe as rp
from reprobe.control.edits import Matrix
from reprobe.methods import iti, memit, rome, tracing
from reprobe.methods.moments import second_moments
from reprobe.model.sites import Site

pytestmark = pytest.mark.filterwarnings("ignore:the second moment", "ignore:.*have no effect")
own_cache = rome_by_hand.own_cache

COSINE = 0.99999


@dataclass(frozen=True)
class Found:
    """Vectors (or anything that is compared by direction) and decisions, of the library and of the formula."""

    ours: Any
    theirs: Any
    decisions: tuple[Any, Any]


def data(seed: int = 0, n: int = 60, width: int = 11) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs of a positive and a negative row: X (2n, width), y, and the pair of each row; axes of unequal spread."""
    rng = np.random.default_rng(seed)
    y, pairs = np.tile([1, 0], n), np.repeat(np.arange(n), 2)
    spread = rng.normal(size=(width, width)) * np.linspace(2, 0.2, width)
    X = np.repeat(rng.normal(size=(n, width)), 2, axis=0) @ spread + rng.normal(size=(2 * n, width))
    return X + np.outer(y - 0.5, rng.normal(size=width)) + 3.0, y, pairs


def unit(v: np.ndarray) -> np.ndarray:
    return v / np.sqrt(sum(x * x for x in v))


def first_axis(rows: np.ndarray) -> np.ndarray:
    """The eigenvector of the largest eigenvalue of Σ rᵀr, by power iteration."""
    scatter = sum(np.outer(r, r) for r in rows)
    v = np.linspace(1, 2, rows.shape[1])
    for _ in range(20_000):
        v = unit(scatter @ v)
    return v


# -- reading ---------------------------------------------------------------------------------------------------------


def lat(compat: str | None) -> Found:
    """Zou et al. 2023: the first principal axis of the pairs' differences, signed by the majority of pairs."""
    X, y, pairs = data()
    reader = rp.PCAReader(compat=compat, seed=4).fit(X, y, pairs=pairs)
    delta = X[::2] - X[1::2]
    spread = delta.copy()
    if compat == "repe":  # each difference turned round at random
        spread = spread * np.random.default_rng(4).choice([-1.0, 1.0], size=(len(delta), 1))
    if compat is not None:
        spread = spread - sum(spread) / len(spread)
    v = first_axis(spread)
    v = v if sum(np.sign(d @ v) for d in delta) >= 0 else -v
    middle = sum(X) / len(X) @ v
    return Found(reader.direction_.vector, v, (reader.predict(X) == 1, X @ v > middle))


def cluster_mean() -> Found:
    """Zou et al. 2023, cluster mean: the difference of the class means; the threshold is the mean of all rows."""
    X, y, _ = data()
    reader = rp.ClusterMean().fit(X, y)
    means = [sum(X[y == c]) / sum(y == c) for c in (0, 1)]
    v = unit(means[1] - means[0])
    return Found(reader.direction_.vector, v, (reader.predict(X) == 1, X @ v > (sum(X) / len(X)) @ v))


def mass_mean(whiten: bool) -> Found:
    """Marks & Tegmark 2023: θ = μ⁺ − μ⁻, or Σ⁻¹θ with Σ pooled within the classes; the threshold is the midpoint."""
    X, y, _ = data()
    reader = rp.MeanDifference(whiten=whiten).fit(X, y)
    high, low = (sum(X[y == c]) / sum(y == c) for c in (1, 0))
    theta = high - low
    if whiten:
        within = [x - (high if c else low) for x, c in zip(X, y, strict=True)]
        theta = np.linalg.inv(sum(np.outer(r, r) for r in within) / len(X)) @ theta
    return Found(reader.direction_.vector, unit(theta), (reader.predict(X) == 1, X @ theta > (high + low) / 2 @ theta))


def ccs() -> Found:
    """Burns et al. 2022: AdamW on (p0 − (1 − p1))² + min(p0, p1)² over sides normalised apart, lowest of the starts."""
    X, y, pairs = data(seed=1)
    sides, steps, restarts = np.tile([True, False], len(y) // 2), 60, 3
    turned = np.random.default_rng(0).integers(0, 2, len(y) // 2).astype(bool)  # which side is true
    y = np.where(np.repeat(turned, 2), 1 - y, y)
    X = X + np.outer(2.0 * (2 * y - 1), np.linspace(-1, 1, X.shape[1]))
    reader = rp.CCSReader(restarts=restarts, steps=steps, seed=3).fit(X, y, pairs=pairs, sides=sides)
    x0, x1 = X[~sides], X[sides]
    x0, x1 = x0 - x0.mean(0), x1 - x1.mean(0)
    std = np.sqrt((np.mean(x0**2, 0) + np.mean(x1**2, 0)) / 2)
    z0, z1 = torch.from_numpy(x0 / std), torch.from_numpy(x1 / std)
    width = X.shape[1]
    starts = torch.rand(width + 1, restarts, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    ends = []
    for start in ((starts * 2 - 1) / width**0.5).T:
        theta = start.clone().requires_grad_()
        search = torch.optim.AdamW([theta], lr=0.01, weight_decay=0.01)
        for step in range(steps + 1):
            p0, p1 = (torch.sigmoid(z @ theta[:-1] + theta[-1]) for z in (z0, z1))
            loss = ((p0 - (1 - p1)) ** 2 + torch.minimum(p0, p1) ** 2).mean()
            if step < steps:
                search.zero_grad()
                loss.backward()
                search.step()
        ends.append((float(loss.detach()), theta.detach().numpy(), ((p1 + 1 - p0) / 2).detach().numpy()))
    _, theta, probability = min(ends, key=lambda end: end[0])
    truth = y[sides] == 1
    right = np.mean((probability > 0.5) == truth)
    sign = 1 if right >= 0.5 else -1  # labels decide it
    probability = probability if sign > 0 else 1 - probability
    return Found(
        reader.direction_.vector,
        unit(sign * theta[:-1] / std),
        (reader.pair_probability(X[~sides], X[sides]) > 0.5, probability > 0.5),
    )


def leace() -> Found:
    """Belrose et al. 2023: x − W⁺ P W (x − μ), W = Σxx^(−1/2), P onto the columns of W Σxz."""
    X, y, _ = data()
    centred, z = X - X.mean(0), y - y.mean()
    values, axes = np.linalg.eigh(centred.T @ centred / len(X))
    W, back = (axes @ np.diag(values**power) @ axes.T for power in (-0.5, 0.5))
    u = unit(W @ (centred.T @ z / len(X)))
    want = np.array([x - back @ (u * (u @ W @ c)) for x, c in zip(X, centred, strict=True)])
    got = rp.LEACE().fit(X, y).transform(X)
    # What is decided of erased rows is nothing: the classes have one mean.
    means = [[bool(np.allclose(rows[y == 1].mean(0), rows[y == 0].mean(0), atol=1e-6))] for rows in (got, want)]
    return Found(got - X, want - X, (means[0], means[1]))


# -- control and decoding ---------------------------------------------------------------------------------------------


def iti_heads(compat: str | None) -> Found:
    """Li et al. 2023: heads ranked by the validation accuracy of logistic probes, mass means, σ along them."""
    store = iti_by_hand.answers()
    ours, theirs, ranks = [], [], ([], [])
    for ranking in iti.head_ranking(store, compat=compat):
        wanted = iti_by_hand.recipe(store, ranking, sigma_over_all=compat == "honest_llama")
        order = sorted(wanted, key=lambda site: (-wanted[site][0], site.layer, site.unit))
        ranks[0].extend(map(str, ranking.sites))
        ranks[1].extend(map(str, order))
        for site in order:
            ours.append(ranking.directions[site].step)
            theirs.append(wanted[site][1] * wanted[site][2])
    return Found(np.array(ours), np.array(theirs), ranks)


def dola(compat: str | None) -> Found:
    """Chuang et al. 2023: log-probabilities of the contrast with the most divergent layer, and the greedy tokens."""
    how = rp.DoLa([1, 2, 3, 4, 5, 6], compat=compat)
    tokens, want = dola_by_hand.Reference("llama", how, forbidden=[tiny.EOS]).decoded(dola_by_hand.PROMPTS, 4)
    ids, got = dola_by_hand.scored(dola_by_hand.model("llama"), dola_by_hand.PROMPTS, how, 4)
    finite = want > -torch.inf
    assert torch.equal(finite, got > -torch.inf), "other tokens are plausible"
    theirs = torch.where(finite, want, 0.0).flatten(1).numpy()
    return Found(torch.where(finite, got.double(), 0.0).flatten(1).numpy(), theirs, (ids, tokens))


# -- facts ----------------------------------------------------------------------------------------------------------


def exact() -> rp.LanguageModel:
    return tiny_model("llama", dtype=torch.float64)


def ridged(c: np.ndarray) -> np.ndarray:
    """C with a tenth of the median neuron's mean square on its diagonal: our departure, as C has too few rows here."""
    return c + 0.1 * np.median([v for v in np.diag(c) if v > 0]) * np.eye(len(c))


def causal_tracing() -> Found:
    """Meng et al. 2022: indirect effects of every state, each by a whole forward pass."""
    lm = tiny_model()
    fact, settings = rp.Fact.of(subject="the cat", prompt="it is {} on the", true="mat"), tracing.Settings(samples=2)
    grid = tracing.trace(lm, fact, settings=settings, unknown="keep")
    _, corrupted, restored = naive(lm, fact, settings, grid.std)
    effects = restored - corrupted
    peaks = [e.reshape(len(e), -1).argmax(1).tolist() for e in (grid.traces[0].effects, effects)]
    return Found(grid.traces[0].effects.reshape(3, -1), effects.reshape(3, -1), (peaks[0], peaks[1]))


def rome_edit(compat: str | None) -> Found:
    """Meng et al. 2022: ΔW = (v* − W k) (C⁻¹k*)ᵀ / (k · C⁻¹k*), k = k*, or the bare prompt's key as published."""
    lm, layer, fact = exact(), 1, rome_by_hand.FACT
    how = rome.Settings(search=rome_by_hand.QUICK.search, prefixes=3, ridge=0.1, compat=compat)
    moment = second_moments(lm, [layer], rome_by_hand.TEXT)[layer]
    edit = rome.edit(lm, fact, layer=layer, moment=moment, settings=how)
    keys = []
    for front in ("", *rome_by_hand.PREFIXES[:3]):
        span = {"subject": (fact.span[0] + len(front), fact.span[1] + len(front))}
        batch = lm.encode(front + fact.prompt, spans=[span])
        with torch.no_grad(), rp.observe(lm, Site("mlp.neurons", layer)) as seen:
            lm.net(input_ids=batch.input_ids)
        keys.append(seen[Site("mlp.neurons", layer)][0][batch.spans["subject"][0]][-1].numpy())
    # Published: every prompt counts alike for k*, and the bare one stands in the residual and the division.
    key = sum(keys) / 4 if compat == "rome" else 0.5 * keys[0] + 0.5 * sum(keys[1:]) / 3
    used = keys[0] if compat == "rome" else key
    value = rome.associate(lm, fact, layer, how).value  # the search has a test of its own against whole forward passes
    projection = lm.architecture.projection(lm.net, layer)
    with torch.no_grad():
        missing = value - projection(torch.from_numpy(used)).numpy()
    c = ridged(moment.matrix)
    spread = np.linalg.inv(c) @ key
    want = np.outer(missing, spread) / (used @ spread)
    return Found(edit.left @ edit.right.T, want, _greedy(lm, [edit], want, fact))


def memit_edit() -> Found:
    """Meng et al. 2023: Δ = R Kᵀ (λC + KKᵀ)⁻¹ at one block, for several facts at once."""
    lm, layer, facts = exact(), 1, memit_by_hand.FACTS
    how = memit.Settings(search=memit_by_hand.Search(steps=4, clamp=0.75), prefixes=0, weight=7.0, ridge=0.1)
    moment = second_moments(lm, [layer], memit_by_hand.TEXT)
    (edit,) = memit.edit(lm, facts, layers=[layer], moments=moment, settings=how)
    keys, ends = [], []
    for fact in facts:
        batch = lm.encode(fact.prompt, spans=[{"subject": fact.span}])
        with torch.no_grad(), rp.observe(lm, [f"mlp.neurons@{layer}", f"resid.post@{layer}"]) as seen:
            lm.net(input_ids=batch.input_ids)
        at = int(batch.spans["subject"][0].nonzero().max())
        keys.append(seen[Site("mlp.neurons", layer)][0, at].numpy())
        ends.append(seen[Site("resid.post", layer)][0, at].numpy())
    K = np.array(keys).T
    R = (memit.find_values(lm, facts, layer, how).double().numpy() - np.array(ends)).T
    c = ridged(moment[layer].matrix)
    want = R @ K.T @ np.linalg.inv(7.0 * c + K @ K.T)
    return Found(edit.left @ edit.right.T, want, _greedy(lm, [edit], want, facts[0]))


def _greedy(lm: rp.LanguageModel, edits: list[rp.WeightEdit], change: np.ndarray, fact: rp.Fact) -> tuple[Any, Any]:
    """What the edited network says, and what one says into which the formula's matrix was put by hand."""
    with rp.edited(lm, edits):
        ours = lm.generate(fact.prompt, max_new_tokens=4)
    weight = Matrix.projection(lm, 1).weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight += torch.from_numpy(change)
        theirs = lm.generate(fact.prompt, max_new_tokens=4)
        weight.copy_(before)
    return ours, theirs


#: The list. A method with `compat` has a row for the default and for each value.
PARITY: dict[str, Callable[[], Found]] = {
    "LAT": lambda: lat(None),
    "LAT, compat=repe": lambda: lat("repe"),
    "LAT, compat=repeng": lambda: lat("repeng"),
    "cluster mean": cluster_mean,
    "mass-mean": lambda: mass_mean(False),
    "mass-mean, whitened": lambda: mass_mean(True),
    "CCS": ccs,
    "LEACE": leace,
    "ITI": lambda: iti_heads(None),
    "ITI, compat=honest_llama": lambda: iti_heads("honest_llama"),
    "DoLa": lambda: dola(None),
    "DoLa, compat=dola": lambda: dola("dola"),
    "causal tracing": causal_tracing,
    "ROME": lambda: rome_edit(None),
    "ROME, compat=rome": lambda: rome_edit("rome"),
    "MEMIT": memit_edit,
}


@functools.cache
def found(method: str) -> Found:
    return PARITY[method]()


@pytest.mark.parametrize("method", PARITY)
def test_the_library_finds_what_the_published_formula_gives(method: str) -> None:
    both = found(method)
    ours, theirs = (np.atleast_2d(np.asarray(v, dtype=np.float64)) for v in (both.ours, both.theirs))
    assert ours.shape == theirs.shape
    alive = np.linalg.norm(theirs, axis=1) > 1e-12
    for a, b in zip(ours[alive], theirs[alive], strict=True):
        assert unit(a) @ unit(b) >= COSINE
        assert np.linalg.norm(a) == pytest.approx(np.linalg.norm(b), rel=1e-3)
    assert np.asarray(both.decisions[0]).tolist() == np.asarray(both.decisions[1]).tolist()


@pytest.mark.parametrize("method", [name for name in PARITY if "compat" in name])
def test_a_compat_value_is_another_result_than_the_default(method: str) -> None:
    plain, original = (np.atleast_2d(found(name).ours) for name in (method.partition(",")[0], method))
    assert plain.shape == original.shape
    assert not np.allclose(plain, original, rtol=1e-3, atol=1e-6 * np.abs(plain).max())
