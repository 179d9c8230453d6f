"""Representation Engineering (Zou et al. 2023, arXiv:2310.01405): reading vectors and contrast vectors.

Enters: one direction per block, or prompts that come in three versions. Leaves: a `Scan`, the score of every token at
every block; a `Steering` that controls along reading vectors; a `Steering` of contrast vectors, with what runs a text
under three prompts in step.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from reprobe.control import Ablate, Add, AddContrast, Scope, Steering, steer
from reprobe.control.along import AddUnit
from reprobe.errors import UnsupportedOperation, UsageError
from reprobe.model.hooks import capture
from reprobe.model.language_model import LanguageModel, Prompt
from reprobe.model.monitor import checked
from reprobe.model.products import FastProducts
from reprobe.model.sites import Site, ranges
from reprobe.probing.direction import Direction

Manner = Literal["linear", "piecewise", "projection"]


@dataclass(frozen=True)
class Scan:
    """LAT scan (section 4.3 there): `scores[i, t]` is token t read at `sites[i]`, in units of that direction's scale.

    Positive is the direction's positive class. `tokens` are the pieces of text, special tokens by name.
    """

    tokens: tuple[str, ...]
    sites: tuple[Site, ...]
    scores: Float[np.ndarray, "sites tokens"]


def scan(lm: LanguageModel, text: str, directions: Mapping[Site, Direction], *, allow_mismatch: bool = False) -> Scan:
    """Read every token of `text` at every direction's site.

    A score is (h·v̂ − offset) / scale. Raises `IdentityMismatch` for directions of another model, `UsageError` for one
    that stands under another site than its own or does not fit its site, `UnknownSite`.
    """
    checked(lm, directions, "a scan", allow_mismatch=allow_mismatch)
    sites = tuple(sorted(directions, key=lambda s: (-1 if s.layer is None else s.layer, s)))
    batch = lm.encode(text)
    seen = capture(lm, lm.inputs(batch), sites)
    scores = [directions[s].score(seen[s][0].float().cpu().numpy()) / directions[s].scale for s in sites]
    tokens = tuple(lm.tokenizer.decode([int(t)]) for t in batch.row(0))
    return Scan(tokens, sites, np.stack(scores).astype(np.float32))


# -- reading vectors ------------------------------------------------------------------------------------------------


def control(
    directions: Mapping[Site, Direction],
    strength: float = 1.0,
    *,
    manner: Manner = "linear",
    layers: Iterable[int] | None = None,
    unit: AddUnit = "scale",
    keep_norm: bool = False,
    tokens: Scope | str = "all",
) -> Steering:
    """Control along reading vectors, one per control layer (section 5.1 there): `control(grid.directions, 2)`.

    `manner` is "linear", h + c·v̂; "piecewise", h + c·sign(h·v̂)·v̂; or "projection", h − c·(h·v̂)v̂, which at
    `strength` 1 removes all that lies along v̂. For the first two c is `strength` in the unit of `Add`: by default each
    direction's scale; `unit="raw"` is the published code's coefficient of a unit vector. `layers` are the control
    layers, by default all that have a direction. `keep_norm` gives each token its norm back. Raises `UsageError` for
    layers without a direction, or without any.
    """
    if manner not in get_args(Manner):
        raise UsageError(f"unknown manner {manner!r}; one of {', '.join(get_args(Manner))}")
    by_layer: dict[int | None, list[tuple[Site, Direction]]] = {}
    for site, direction in directions.items():
        by_layer.setdefault(site.layer, []).append((site, direction))
    wanted: list[int | None] = list(by_layer) if layers is None else list(layers)
    if lacking := [layer for layer in wanted if layer not in by_layer]:
        have = ranges(sorted(layer for layer in by_layer if layer is not None))
        raise UsageError(f"no direction was given for block {lacking[0]}; there are directions for blocks {have}")
    if not wanted:
        raise UsageError("control along reading vectors needs at least one direction")
    items: list[Ablate | Add] = []
    for site, d in (pair for layer in dict.fromkeys(wanted) for pair in by_layer[layer]):
        if manner == "projection":
            items.append(Ablate(d, strength, site=site, tokens=tokens, keep_norm=keep_norm))
        else:
            piecewise = manner == "piecewise"
            items.append(
                Add(d, strength, site=site, tokens=tokens, unit=unit, piecewise=piecewise, keep_norm=keep_norm)
            )
    made = {"method": "repe reading vectors", "manner": manner, "strength": strength}
    return Steering(*items, name=f"RepE, {manner}", provenance=made)


# -- contrast vectors -----------------------------------------------------------------------------------------------


def contrast(
    lm: LanguageModel,
    sites: Site | str | Iterable[Site | str],
    alpha: float,
    *,
    tokens: Scope | str = "last",
    keep_norm: bool = False,
    compat: Literal["repe"] | None = None,
) -> Steering:
    """Contrast-vector control: h + α(h⁺ − h⁻) at `sites`, h⁺ and h⁻ of the same token under two other prompts.

    The three prompts of a text run as three rows of one batch, in step, so that with a key-value cache a new token
    costs one pass of one token each: use `generate` and `logprobs` of this module, which lay the rows out. `tokens`
    are those of the base prompt that are changed; where they reach into the prompt ("last" does, by one token), the
    three prompts must end alike. By default only the base rows change, so that h⁺ − h⁻ is what the two prompts make of
    the text; with `compat="repe"` the contrast is added to all three, as in the published code, and compounds from
    layer to layer. Raises `UnknownSite`, `UsageError`.
    """
    if compat not in (None, "repe"):
        raise UsageError(f"compat={compat!r}: contrast has None and 'repe'")
    identity, chosen = lm.identity, lm.sites(sites)
    items = [
        AddContrast(
            site=site,
            strength=alpha,
            into="all" if compat == "repe" else "base",
            tokens=tokens,
            keep_norm=keep_norm,
            identity=identity,
        )
        for site in chosen
    ]
    made = {"method": "repe contrast vectors", "sites": [str(s) for s in chosen], "alpha": alpha, "compat": compat}
    return Steering(*items, name="RepE, contrast", provenance=made, identity=identity)


@dataclass(frozen=True)
class Streams:
    """Texts under three prompts each: their own, a positive and a negative one. Prompt i of all three is of text i.

    Raises `UsageError` unless there are as many of each.
    """

    base: Sequence[Prompt]
    positive: Sequence[Prompt]
    negative: Sequence[Prompt]

    def __post_init__(self) -> None:
        counts = [len(prompts) for prompts in self.rows]
        if not counts[0] or len(set(counts)) > 1 or any(isinstance(prompts, str) for prompts in self.rows):
            raise UsageError(
                f"three lists of prompts, as long as each other, make streams: there are {counts[0]} base prompts, "
                f"{counts[1]} positive and {counts[2]} negative ones"
            )

    @property
    def rows(self) -> tuple[Sequence[Prompt], Sequence[Prompt], Sequence[Prompt]]:
        return self.base, self.positive, self.negative


def generate(
    lm: LanguageModel,
    steering: Steering,
    streams: Streams,
    *,
    max_new_tokens: int = 40,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int | None = None,
    allow_mismatch: bool = False,
    **options: Any,
) -> list[str]:
    """Continuations of the base prompts, as text, under contrast control; greedy unless `do_sample`.

    The base row chooses each token, and the other two go on with the same one. On the CPU, a copy of the weights (up to
    1 GiB) is made to be multiplied faster. `options` go to `lm.generate`. Raises `UnsupportedOperation` for beams and
    for several sequences per prompt, and what `steer` and `lm.generate` do.
    """
    for name in ("num_beams", "num_return_sequences"):
        if options.get(name, 1) != 1:
            raise UnsupportedOperation(f"{name}={options[name]}: contrast streams run one sequence per prompt, in step")
    follow = _Follow(len(streams.base), (temperature, top_p) if do_sample else None)
    options |= {"logits_processor": [*options.get("logits_processor", ()), follow], "seed": seed}
    prompts = [prompt for rows in streams.rows for prompt in rows]
    # Three rows take MKL two to three times as long as one; oneDNN about as long.
    with steer(lm, steering, allow_mismatch=allow_mismatch), FastProducts():
        texts = lm.generate(prompts, max_new_tokens=max_new_tokens, **options)
    return texts[: len(streams.base)]


@torch.no_grad()
def logprobs(
    lm: LanguageModel,
    steering: Steering,
    streams: Streams,
    continuations: Sequence[Sequence[str]],
    *,
    allow_mismatch: bool = False,
) -> list[Float[np.ndarray, " continuations"]]:
    """Log-probabilities (nats) of continuations of the base prompts under contrast control, as `lm.logprobs` has them.

    The continuations of one prompt run in one pass of three rows each. Raises `UsageError` unless there is a list of
    continuations per text, or where a continuation has other tokens after one prompt than after another.
    """
    if len(continuations) != len(streams.base) or any(isinstance(c, str) for c in continuations):
        raise UsageError(
            f"{len(streams.base)} texts need as many lists of continuations, got {len(continuations)} items"
        )
    out = []
    with steer(lm, steering, allow_mismatch=allow_mismatch):
        for *prompts, given in zip(*streams.rows, continuations, strict=True):
            n = len(given)
            rows = [prompt for prompt in prompts for _ in range(n)]
            runs = lm.continued(rows, [*given] * 3, in_step=True)
            for run, other in ((runs[i], runs[i + k * n]) for i in range(n) for k in (1, 2)):
                if not np.array_equal(run.tokens, other.tokens):
                    raise UsageError(
                        "a continuation has other tokens after one prompt than after another: let the three prompts "
                        "end alike"
                    )
            each = (lm.token_logprobs(run.states[:-1], np.arange(len(run.tokens)), run.tokens) for run in runs[:n])
            out.append(np.array([one.sum() for one in each]))
    return out


class _Follow:
    """A logits processor: all three rows of a text take the token that its base row takes."""

    def __init__(self, n: int, sampling: tuple[float, float] | None) -> None:
        from transformers import TemperatureLogitsWarper, TopPLogitsWarper

        self._n, self._sampling = n, sampling is not None
        temperature, top_p = sampling or (1.0, 1.0)
        if not 0 < temperature < np.inf or not 0 < top_p <= 1:
            raise UsageError(f"no token can be drawn at temperature={temperature} and top_p={top_p}")
        self._warpers = [TemperatureLogitsWarper(float(temperature)), TopPLogitsWarper(float(top_p))]

    def __call__(self, ids: Int[Tensor, "rows columns"], scores: Float[Tensor, "rows vocab"]) -> Tensor:
        base = scores[: self._n]
        if self._sampling:
            for warper in self._warpers:
                base = warper(ids[: self._n], base)
            drawn = torch.multinomial(base.float().softmax(-1), 1)
            base = torch.full_like(base, -torch.inf).scatter(1, drawn, 0.0)
        return base.repeat(3, 1)
