"""What ROME and MEMIT share: prefixes, keys at the subject's last token, and the search for a value that says a fact.

Enters: a language model, facts, a block. Leaves: the facts' prompts run once as far as needed (`Lookup`), and per fact
the vector δ that makes the model continue with the new object when it is added at the subject's last token. Does not
know where δ is put and what becomes of it: that is each method's.

The subject's last token is found by character offsets. What lies below the block and left of that token is computed
once; a step of the search runs the blocks above on the tokens from there on, all prompts in one batch.
"""

import json
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from reprobe.control.edits import EditEffect, WeightEdit
from reprobe.control.ledger import ledger_of, unedited
from reprobe.errors import DataError, UnsupportedOperation, UsageError
from reprobe.methods.moments import OPENINGS, SecondMoment, require_unsteered
from reprobe.model.cache import build, cache_folder
from reprobe.model.hooks import board_of, capture
from reprobe.model.identity import digest_tokenizer
from reprobe.model.language_model import LanguageModel
from reprobe.model.packs import lay_out
from reprobe.model.sites import Site
from reprobe.model.tail import Tail, align, tail_above
from reprobe.model.text import tokenise
from reprobe.prompts.fact import Fact, continuation
from reprobe.provenance import digest, rebuilding, texts

#: Version of how prefixes are sampled.
_PREFIXES = 1
#: Adam's, in the code of ROME and MEMIT.
PUBLISHED_RATE = 0.5


@dataclass(frozen=True)
class Search:
    """How δ is searched: down the gradient for `steps` evaluations at most, until the first part of the loss is below
    `stop` (in the original the whole loss, which at small models stays above it through the last part alone).

    Loss (nats) = mean −log p(new object) over the prefixes + `kl` · KL of the next-token distribution after the
    subject in "{subject} is a" + `decay` · ‖δ‖ / ‖v₀‖². After each step ‖δ‖ is cut to `clamp` · ‖v₀‖. v₀ is the vector
    that δ is added to, at the bare prompt.

    A step is as long as would bring the loss to 0 if it were linear, loss / ‖∇loss‖ (Polyak), and at most
    `stride` · ‖v₀‖. With `rate`, Adam at that rate instead, as published: its first steps go along the signs of the
    gradient, off to the side, so that δ ends about twice as long, and so does all that reaches other subjects.
    """

    steps: int = 20
    rate: float | None = None
    stride: float = 0.5
    stop: float = 0.05
    kl: float = 0.0625
    decay: float = 0.5
    clamp: float = 4.0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.stride <= 0 or self.clamp <= 0 or (self.rate is not None and self.rate <= 0):
            raise UsageError(f"{self}: steps, rate, stride and clamp are positive")


@dataclass(frozen=True)
class Layers:
    """Blocks to edit, where somebody has looked for them."""

    rome: int
    memit: tuple[int, ...]


#: (architecture, blocks, d_model) of the bundled models → blocks to begin with.
_LAYERS = {
    ("llama", 30, 576): Layers(rome=6, memit=(2, 3, 4, 5, 6, 7, 8)),
    ("gemma3_text", 18, 640): Layers(rome=0, memit=(3, 4, 5, 6)),
}


def default_layers(lm: LanguageModel) -> Layers:
    """The blocks to edit in a model that is known; `UsageError` for another."""
    known = _LAYERS.get((lm.architecture.family, lm.n_layers, lm.d_model))
    if known is None:
        raise UsageError(
            f"which blocks of {lm.name} hold facts is not known here: say layer=… (MEMIT: layers=…), found by causal "
            f"tracing or a sweep; its blocks are 0–{lm.n_layers - 1}, and the middle of the first half is a start"
        )
    return known


def require_editable(lm: LanguageModel, layers: Iterable[int]) -> None:
    """Raise unless the model is a plain decoder that has `mlp.neurons` at these blocks."""
    if lm.architecture.kind != "decoder":
        raise UnsupportedOperation(f"{lm.name} is an encoder ({lm.architecture.family}): it cannot be edited")
    if board_of(lm).changed:
        raise UsageError("the model is being steered, and an edit would be fitted to that: edit outside the context")
    for layer in layers:
        if layer < 0:
            raise UsageError(f"layer={layer}: blocks count from 0 to {lm.n_layers - 1}")
        lm.parts.require(Site("mlp.neurons", layer))


def require_moments(moments: Mapping[int, SecondMoment], layers: Iterable[int]) -> None:
    """Raise `UsageError` unless there is a second moment of each of these blocks."""
    for layer in layers:
        if layer not in moments:
            raise UsageError(f"no second moment of block {layer}; there are those of {sorted(moments)}")
        if (site := moments[layer].site) != Site("mlp.neurons", layer):
            raise UsageError(f"the second moment given for block {layer} is of {site}")


def sample_prefixes(lm: LanguageModel, *, n: int = 20, seed: int = 0) -> tuple[str, ...]:
    """Beginnings of text that the model writes, half of them short, to stand before a fact's prompt.

    Sampled once for the same model (its base, where it is edited), `n` and `seed`, and kept in the user's cache. Raises
    `UsageError` if they are not there while the model is being steered.
    """
    key = digest([_PREFIXES, ledger_of(lm).base.weights, str(lm.dtype), digest_tokenizer(lm.tokenizer), n, seed])
    file = cache_folder() / "prefixes" / f"{key}.json"

    def make(scratch: Any) -> None:
        require_unsteered(lm)
        openings = [OPENINGS[i % len(OPENINGS)] for i in range(n)]
        with unedited(lm):
            texts = lm.generate(openings, max_new_tokens=10, do_sample=True, top_k=50, seed=seed) if n else []
        # Half of them are cut after about five tokens. A broken character or a new line would be none of the prompt's.
        words = [(a + b).replace("\ufffd", "").split() for a, b in zip(openings, texts, strict=True)]
        cut = [" ".join(w if i % 2 else w[:5]) for i, w in enumerate(words)]
        (scratch / file.name).write_text(json.dumps([text.rstrip(" .") + ". " for text in cut]))

    build(file, make, whole=lambda path: path.is_file())
    with rebuilding(f"{file} is damaged, delete it"):
        return texts(json.loads(file.read_bytes()))


@dataclass(frozen=True, eq=False)
class Lookup:
    """Prompts of facts, each behind every prefix, as rows aligned at the subject's last token, run once.

    `owner[r]` is the fact of row r; row `bare[f]` is fact f's own prompt, row `essence[f]` its "{subject} is a".
    `asked`: (row, column) of each place that predicts a token of a new object, with `targets` and the weight that
    makes the mean over an object's tokens and a fact's rows.
    """

    tail: Tail
    owner: Int[Tensor, " rows"]
    bare: Int[Tensor, " facts"]
    essence: Int[Tensor, " facts"]
    asked: Int[Tensor, "places 2"]
    targets: Int[Tensor, " places"]
    weights: Float[Tensor, " places"]

    @property
    def n_facts(self) -> int:
        return len(self.bare)

    def at_subject(self, site: Site) -> Float[Tensor, "rows width"]:
        """What `site` holds at the subject's last token of every row."""
        return self.tail.seen[site][:, 0]


def look_up(
    lm: LanguageModel, facts: Sequence[Fact], prefixes: Sequence[str], layer: int, sites: Sequence[Site]
) -> Lookup:
    """Run the facts' prompts, bare and behind prefixes, as far as they do not depend on an edit at block `layer`.

    Raises `DataError` if a new object and the subject share a token, `PromptTooLong`.
    """
    fronts = ["", *prefixes]
    texts, spans = _behind(fronts, facts)
    ends = [continuation(fact.prompt, fact.wanted) for fact in facts for _ in fronts]
    prompts = tokenise(lm.tokenizer, texts, spans=spans, suffixes=ends, context=lm.context)
    essences = tokenise(
        lm.tokenizer,
        [f"{fact.subject} is a" for fact in facts],
        spans=[{"subject": (0, len(fact.subject))} for fact in facts],
        context=lm.context,
    )
    rows, at, asked, targets, weights = [], [], [], [], []
    for r, row in enumerate(prompts):
        subject, n_target = int(row.spans["subject"][-1]), len(row.ids) - row.suffix
        if subject >= row.suffix:
            raise DataError(f"the subject and the object of {texts[r] + ends[r]!r} share a token")
        rows.append(row.ids[:-1])  # the last token of the object predicts nothing that is asked
        at.append(subject)
        asked += [(r, row.suffix - 1 + j - subject) for j in range(n_target)]
        targets += row.ids[row.suffix :].tolist()
        weights += [1 / (n_target * len(fronts))] * n_target
    for row in essences:
        at.append(int(row.spans["subject"][-1]))
        rows.append(row.ids[: at[-1] + 1])  # later tokens do not change what is read at this one
    owner = [f for f in range(len(facts)) for _ in fronts] + list(range(len(facts)))
    tail = tail_above(lm, align(lm, rows, at), layer, sites)
    return Lookup(
        tail,
        *(
            torch.tensor(values, device=lm.device)
            for values in (
                owner,
                [f * len(fronts) for f in range(len(facts))],
                [len(prompts) + f for f in range(len(facts))],
                asked,
                targets,
                weights,
            )
        ),
    )


@dataclass(frozen=True, eq=False)
class Found:
    """What the search found: `delta` (facts, width), and per fact the last loss (nats) and the mean probability of
    the new object's tokens over the prompts; `steps` evaluations were made."""

    delta: Float[Tensor, "facts width"]
    loss: Float[np.ndarray, " facts"]
    probability: Float[np.ndarray, " facts"]
    steps: int


def search(
    lm: LanguageModel,
    lookup: Lookup,
    stream: Float[Tensor, "rows columns d_model"],
    place: Callable[[Float[Tensor, "rows width"]], Float[Tensor, "rows d_model"]],
    start: Float[Tensor, "facts width"],
    settings: Search,
) -> Found:
    """The δ of each fact. `stream` is the output of the edited block; `place` gives its value at the subject's last
    token for the δ of each row; `start` is v₀."""
    delta = torch.zeros_like(start, dtype=torch.float32, requires_grad=True)
    adam = None if settings.rate is None else torch.optim.Adam([delta], lr=settings.rate)
    size = start.float().norm(dim=1)
    fact_of = lookup.owner[lookup.asked[:, 0]]
    before: Tensor | None = None
    done = torch.zeros(lookup.n_facts, dtype=torch.bool, device=start.device)
    held = delta.detach().clone()
    for step in range(settings.steps):
        new = place(delta[lookup.owner]).to(stream.dtype)
        end = lookup.tail.run(torch.cat([new[:, None], stream[:, 1:]], dim=1))
        logp = lm.unembed(end[lookup.asked[:, 0], lookup.asked[:, 1]]).float().log_softmax(-1)
        each = -logp.gather(1, lookup.targets[:, None])[:, 0] * lookup.weights
        nll = torch.zeros_like(size).index_add(0, fact_of, each)
        now = lm.unembed(end[lookup.essence, 0]).float().log_softmax(-1)
        before = now.detach() if before is None else before
        kl = (now.exp() * (now - before)).sum(-1)
        # The norm has no gradient at 0, where the search begins.
        length = (delta.square().sum(1) + 1e-30).sqrt()
        loss = nll + settings.kl * kl + settings.decay * length / size.square()
        done |= nll.detach() < settings.stop
        if bool(done.all()) or step == settings.steps - 1:
            break
        held[done] = delta.detach()[done]
        (slope,) = torch.autograd.grad(loss.sum(), delta)
        if adam is not None:
            delta.grad = slope
            adam.step()
        with torch.no_grad():
            if adam is None:
                steep = slope.norm(dim=1).clamp(min=1e-30)
                stride = torch.minimum(loss.clamp(min=0) / steep, settings.stride * size)
                delta -= (stride / steep)[:, None] * slope
            limit = settings.clamp * size
            delta *= (limit / delta.norm(dim=1).clamp(min=1e-30)).clamp(max=1.0)[:, None]
            delta[done] = held[done]
    return Found(
        delta.detach().double(),
        loss.detach().double().cpu().numpy(),
        torch.exp(-nll.detach().double()).cpu().numpy(),
        step + 1,
    )


@torch.no_grad()
def at_subjects(
    lm: LanguageModel, facts: Sequence[Fact], fronts: Sequence[str], sites: Sequence[Site]
) -> dict[Site, Float[Tensor, "facts fronts width"]]:
    """What sites hold at the subject's last token of each fact behind each front. Fronts are shared beginnings."""
    texts, spans = _behind(fronts, facts)
    rows = tokenise(lm.tokenizer, texts, spans=spans, context=lm.context)
    ids = [row.ids[: row.spans["subject"][-1] + 1] for row in rows]
    tokens, starts = np.concatenate(ids), np.concatenate([[0], np.cumsum([len(r) for r in ids])])
    plan = lm.plan(tokens, starts)
    out = {site: torch.zeros(len(ids), lm.width(site), dtype=lm.dtype, device=lm.device) for site in sites}
    for k in range(plan.n_packs):
        layout = lay_out(plan, k, tokens, starts)
        places = torch.from_numpy(layout.at[layout.starts[1:] - 1]).to(lm.device)

        def select(h: Tensor, places: Tensor = places) -> Tensor:
            return h.flatten(0, 1)[places.to(h.device)]

        for site, found in capture(lm, lm.pack_inputs(layout), sites, select).items():
            out[site][torch.from_numpy(plan.pack(k)).to(lm.device)] = found.to(lm.device)
    return {site: values.reshape(len(facts), len(fronts), -1) for site, values in out.items()}


def mean_key(keys: Float[np.ndarray, "*facts fronts inputs"], bare: float | None) -> Float[np.ndarray, "*facts inputs"]:
    """The mean of a fact's keys, the first of which, the bare prompt's, has the weight `bare` (None: all alike)."""
    n = keys.shape[-2]
    if bare is None or n == 1:
        alike: np.ndarray = keys.mean(axis=-2)
        return alike
    weighted: np.ndarray = bare * keys[..., 0, :] + (1 - bare) * keys[..., 1:, :].mean(axis=-2)
    return weighted


def probabilities(lm: LanguageModel, facts: Sequence[Fact]) -> Float[np.ndarray, " facts"]:
    """Probability of each fact's new object after its prompt: exp(mean log-probability of its tokens)."""
    found = lm.logprobs([f.prompt for f in facts], [[continuation(f.prompt, f.wanted)] for f in facts], mean=True)
    out: np.ndarray = np.exp(np.concatenate(found))
    return out


def _behind(fronts: Sequence[str], facts: Sequence[Fact]) -> tuple[list[str], list[dict[str, tuple[int, int]]]]:
    """Each fact's prompt behind each front, and where its subject then stands."""
    both = [(front, fact) for fact in facts for front in fronts]
    spans = [{"subject": (len(front) + fact.span[0], len(front) + fact.span[1])} for front, fact in both]
    return [front + fact.prompt for front, fact in both], spans


def effects(before: Float[np.ndarray, " facts"], after: Float[np.ndarray, " facts"]) -> tuple[EditEffect, ...]:
    """Probabilities of the new objects before and after, fact by fact."""
    return tuple(EditEffect(float(b), float(a)) for b, a in zip(before, after, strict=True))


def warn_without_effect(edits: Sequence[WeightEdit]) -> None:
    """Warn of facts that an edit does not write."""
    first = edits[0]
    missed = [(f, e) for f, e in zip(first.facts, first.effects, strict=True) if not e.found]
    if missed:
        fact, effect = missed[0]
        warnings.warn(
            f"{len(missed)} of {len(first.facts)} edits have no effect: {fact.prompt!r} → {fact.new!r} has the "
            f"probability {effect.before:.3g} before and {effect.after:.3g} after (another layer, or more steps?)",
            UserWarning,
            stacklevel=3,
        )
