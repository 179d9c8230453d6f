"""Directional ablation (Arditi et al. 2024, arXiv:2406.11717): the one direction without which a behaviour is gone.

Enters: a language model, prompts that call for a behaviour (refusal, in the paper) and prompts that do not, a measure
of it. Leaves: a `Search` over positions and blocks, and a `Steering` that takes a direction out of all that writes to
the stream. Does not know what the behaviour is.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from reprobe.control import Ablate, Add, Operator, Scope, Steering, steer
from reprobe.errors import UsageError
from reprobe.model.hooks import capture
from reprobe.model.language_model import LanguageModel, Prompt
from reprobe.model.sites import Site
from reprobe.probing.direction import Direction
from reprobe.progress import Progress, silent

#: Where the stream is written to; the input of a block is what all before it have written.
WRITES = ("resid.pre", "attn.out", "mlp.out")

#: A mean difference of this share of the mean is rounding.
_NOTHING = 1e-6

#: How much of the behaviour the model, as it is at the moment, shows after each prompt.
Behaviour = Callable[[LanguageModel, Sequence[Prompt]], Float[np.ndarray, " prompts"]]


@dataclass(frozen=True)
class NextToken:
    """A behaviour told by the next token: log P − log(1 − P), P the probability that it is one of `tokens`.

    `tokens` are texts of one token each, such as "I" for a refusal's "I cannot …"; a leading blank counts.
    """

    tokens: tuple[str, ...]
    batch: int = 32

    def __call__(self, lm: LanguageModel, prompts: Sequence[Prompt]) -> Float[np.ndarray, " prompts"]:
        logp = _next(lm, prompts, self.batch)
        ids = self.ids(lm)
        inside = logp[:, ids].logsumexp(-1)
        rest = logp.clone()
        rest[:, ids] = -torch.inf
        odds: np.ndarray = (inside - rest.logsumexp(-1)).cpu().numpy()
        return odds

    def ids(self, lm: LanguageModel) -> list[int]:
        """The tokens' numbers; `UsageError` for a text of several tokens, or none."""
        found = []
        for text in self.tokens:
            ids = lm.tokenizer(text, add_special_tokens=False)["input_ids"]
            if len(ids) != 1:
                raise UsageError(f"{text!r} is {len(ids)} tokens of {lm.name}; name single tokens")
            found.append(int(ids[0]))
        if not found:
            raise UsageError("no token was named that would show the behaviour")
        return found


@dataclass(frozen=True)
class Rule:
    """Which candidates may be chosen: those that cost less than `max_kl` nats on prompts that do not call for the
    behaviour, in blocks below the share `max_depth` of all.

    The published code also asks that adding the direction shows the behaviour above even odds: `min_induce=0`, with
    `NextToken`.
    """

    max_kl: float = 0.1
    max_depth: float = 0.8
    min_induce: float | None = None

    def layers(self, n_layers: int) -> list[int]:
        return [layer for layer in range(n_layers) if layer < self.max_depth * n_layers]

    def allows(self, kl: float, induce: float) -> bool:
        return kl < self.max_kl and (self.min_induce is None or induce > self.min_induce)


@dataclass(frozen=True, eq=False)
class Search:
    """Candidates and what each did to the held-out prompts.

    `table` has a row per candidate: `position` (from the prompt's end), `layer`; `bypass`, the mean behaviour on
    prompts that call for it while the direction is ablated; `induce`, that on the other prompts while it is added at
    its block; `kl`, nats between the next-token distributions on the other prompts with and without ablation;
    `allowed`, whether the rule lets it be chosen (never one whose `bypass` or `kl` is no number). `base` is the
    behaviour without steering, (calling for it, others).
    """

    table: pl.DataFrame
    directions: Mapping[tuple[int, int], Direction]
    base: tuple[float, float]

    def best(self) -> Direction:
        """The allowed candidate with the lowest `bypass`; `UsageError` if none is allowed."""
        allowed = self.table.filter("allowed").sort("bypass", "layer", "position")
        if not len(allowed):
            kl, induce = (self.table[c].to_numpy() for c in ("kl", "induce"))
            raise UsageError(
                f"none of {len(self.table)} candidates is allowed: the lowest KL is {kl.min():.3g}, the highest "
                f"induced behaviour {induce.max():.3g}; loosen the rule"
            )
        return self.directions[int(allowed["position"][0]), int(allowed["layer"][0])]


def fit(
    lm: LanguageModel,
    calling: Sequence[Prompt],
    others: Sequence[Prompt],
    behaviour: Behaviour,
    *,
    positions: Iterable[int] | None = None,
    layers: Iterable[int] | None = None,
    rule: Rule = Rule(),
    held_out: float = 0.2,
    seed: int = 0,
    batch: int = 32,
    progress: Progress = silent,
) -> Steering:
    """The ablation of the best candidate of `search`, whose arguments and errors these are."""
    found = search(
        lm,
        calling,
        others,
        behaviour,
        positions=positions,
        layers=layers,
        rule=rule,
        held_out=held_out,
        seed=seed,
        batch=batch,
        progress=progress,
    )
    return ablation(lm, found.best())


def ablation(lm: LanguageModel, direction: Direction, *, tokens: Scope | str = "all") -> Steering:
    """h − (h·r̂)r̂ at every block's input, attention output and MLP output: no block can write along r̂ any more.

    The outputs are what is added to the stream, after a post-norm where the model has one. Raises `UsageError` for a
    direction that is not of the stream's width.
    """
    if direction.width != lm.d_model:
        raise UsageError(f"{direction!r} is not of the stream, which is {lm.d_model} wide in {lm.name}")
    return Steering(
        *_ablations(lm, direction, tokens),
        name="directional ablation",
        provenance={"method": "directional ablation", "direction": direction.to_json()},
        identity=lm.identity,
    )


def search(
    lm: LanguageModel,
    calling: Sequence[Prompt],
    others: Sequence[Prompt],
    behaviour: Behaviour,
    *,
    positions: Iterable[int] | None = None,
    layers: Iterable[int] | None = None,
    rule: Rule = Rule(),
    held_out: float = 0.2,
    seed: int = 0,
    batch: int = 32,
    progress: Progress = silent,
) -> Search:
    """Mean differences of `calling` − `others` at the inputs of blocks, each tried on prompts it was not made from.

    `positions` are tokens from the prompt's end, −1 the last; by default all that a chat template puts after the
    message, or −1 for plain text. `layers` are by default those below 0.8 of the depth; of others given, none at or
    above it is allowed. `held_out` is the share of either side that is drawn by `seed` for the trial, the paper's
    validation set. Prompts run `batch` at a time. Raises `UsageError` for too few prompts, or ones shorter than the
    positions asked for.
    """
    training, trial = zip(*(_parted(side, held_out, seed) for side in (calling, others)), strict=True)
    where = sorted(set(_endings(lm, training) if positions is None else positions))
    if not where or where[0] >= 0 or where[-1] >= 0:
        raise UsageError(f"positions are counted from the prompt's end, −1 the last token, not {where}")
    depth = rule.layers(lm.n_layers)
    sites = lm.sites(Site("resid.pre", layer) for layer in sorted(set(depth if layers is None else layers)))
    high, low = (_means(lm, side, sites, where, batch) for side in training)
    identity = lm.identity
    base_next = _next(lm, trial[1], batch)
    base = float(behaviour(lm, trial[0]).mean()), float(behaviour(lm, trial[1]).mean())
    rows, directions = [], {}
    candidates = [(i, p, s) for s in sites for i, p in enumerate(where)]
    progress("refusal", 0, len(candidates))
    for done, (i, position, site) in enumerate(candidates):
        layer = site.layer or 0
        difference = high[site][i] - low[site][i]
        if np.linalg.norm(difference) <= _NOTHING * np.linalg.norm(high[site][i]):
            continue  # the same tokens up to here, as a template's at block 0
        said = {"position": position, "rows": [len(side) for side in training]}
        r = Direction.from_vector(site, difference, identity=identity, provenance=said)
        with steer(lm, *_ablations(lm, r)):
            bypass = float(behaviour(lm, trial[0]).mean())
            kl = _divergence(base_next, _next(lm, trial[1], batch))
        with steer(lm, Add(r)):
            induce = float(behaviour(lm, trial[1]).mean())
        allowed = layer in depth and bool(np.isfinite(bypass)) and rule.allows(kl, induce)
        rows.append(
            {"position": position, "layer": layer, "bypass": bypass, "induce": induce, "kl": kl, "allowed": allowed}
        )
        measured = {"bypass": bypass, "induce": induce, "kl": kl}
        directions[position, layer] = dataclasses.replace(
            r, metrics={name: value for name, value in measured.items() if np.isfinite(value)}
        )
        progress("refusal", done + 1, len(candidates))
    if not rows:
        raise UsageError("the two sides do not differ at any position and block: are they the same prompts?")
    return Search(pl.DataFrame(rows), directions, base)


def _ablations(lm: LanguageModel, direction: Direction, tokens: Scope | str = "all") -> list[Operator]:
    sites = lm.sites(f"{part}@*" for part in WRITES)
    return [Ablate(direction, site=site, tokens=tokens) for site in sorted(sites, key=lambda s: s.depth)]


def _parted(prompts: Sequence[Prompt], held_out: float, seed: int) -> tuple[list[Prompt], list[Prompt]]:
    """(training, held out), both in the order given."""
    if isinstance(prompts, str) or not 0 < held_out < 1:
        raise UsageError(f"prompts are a list, of which a share between 0 and 1 is held out, not {held_out}")
    n = max(1, round(held_out * len(prompts)))
    if len(prompts) <= n:
        raise UsageError(f"{len(prompts)} prompts cannot be parted into some to fit on and {n} to try on")
    chosen = set(np.random.default_rng(seed).permutation(len(prompts))[:n].tolist())
    return [p for i, p in enumerate(prompts) if i not in chosen], [p for i, p in enumerate(prompts) if i in chosen]


def _endings(lm: LanguageModel, sides: Sequence[Sequence[Prompt]]) -> range:
    """The tokens that follow the message in every prompt, from the end; −1 alone for plain text."""
    counts = []
    for prompt in (p for side in sides for p in side):
        if isinstance(prompt, str):
            return range(-1, 0)
        batch = lm.encode([prompt], spans=[{"message": (0, len(prompt[-1]["content"]))}])
        said = batch.spans["message"][0].nonzero().flatten()
        counts.append(batch.real.shape[1] - 1 - int(said.max()))
    return range(-max(1, min(counts)), 0)


def _means(
    lm: LanguageModel, prompts: Sequence[Prompt], sites: Sequence[Site], positions: Sequence[int], batch: int
) -> dict[Site, Float[np.ndarray, "positions width"]]:
    """The mean over prompts of the activations at each position from the end, in float64."""
    total = {site: np.zeros((len(positions), lm.d_model)) for site in sites}
    for start in range(0, len(prompts), batch):
        encoded = lm.encode(list(prompts[start : start + batch]), padding="left")
        if int(encoded.real.sum(1).min()) < -positions[0]:
            raise UsageError(f"position {positions[0]} from the end is before the first token of some prompts")

        def last(h: Tensor) -> Tensor:
            return h[:, positions]

        for site, h in capture(lm, lm.inputs(encoded), sites, last).items():
            total[site] += h.double().sum(0).cpu().numpy()
    return {site: sums / len(prompts) for site, sums in total.items()}


def _next(lm: LanguageModel, prompts: Sequence[Prompt], batch: int) -> Float[Tensor, "prompts vocab"]:
    """Log-probabilities of the token after each prompt, in float64."""
    parts = [lm.logits(list(prompts[i : i + batch])) for i in range(0, len(prompts), batch)]
    return torch.cat(parts).double().log_softmax(-1)


def _divergence(p: Float[Tensor, "prompts vocab"], q: Float[Tensor, "prompts vocab"]) -> float:
    """Mean KL(p ‖ q) in nats; tokens that are impossible in both add nothing."""
    return float(torch.where(p == q, 0.0, p.exp() * (p - q)).sum(-1).mean())
