"""DoLa: decoding by contrasting layers (Chuang et al. 2023, arXiv:2309.03883).

Enters: a language model, and which of its layers are candidates. Leaves: texts (`lm.generate(…, decoding=DoLa())`),
scores of given continuations, and `Trace`, which says of each token what every layer makes of it.

A *premature* layer j is read out early: p_j = softmax of the unembedding of the final norm of the stream that enters
block j, `resid.pre@j` (transformers' `hidden_states[j]`; 0 is the embedding). The *mature* one is the model's own next
token distribution p_N. Of the candidates that one is taken whose p_j is farthest from p_N, by the Jensen-Shannon
divergence; among the plausible tokens, p_N ≥ α max p_N, the score is log p_N − log p_j.

How it is cheap: only the last token of a pass is read out. Its states at all candidate layers and the final one go
through the unembedding in one product, so that this largest of all matrices is read from memory once, as without DoLa
(where that would take too much memory, early logits are computed when asked for, of the plausible tokens alone if these
suffice). And the divergence is only computed for texts where it can matter. It cannot where one token alone is
plausible, nor, in greedy decoding, where every candidate layer prefers the same token.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reprobe.control.operators import widened
from reprobe.errors import UnsupportedOperation, UsageError
from reprobe.model.hooks import computed, observe
from reprobe.model.language_model import LanguageModel, Prompt
from reprobe.model.sites import Site

Bucket = Literal["high", "low"]
#: What the divergence is over: all tokens, as published, or the plausible ones alone, each side made to sum to 1 there.
Over = Literal["vocabulary", "plausible"]

#: Models of more blocks than this have their candidates in the lowest or highest 20, as in transformers.
_DEEP, _SPAN = 40, 20
#: What an implausible token scores where continuations are compared, as in the published code.
IMPLAUSIBLE = -1000.0
#: A logit whose exponential is 0 and that can still be multiplied by 0.
_NEVER = -1e30
#: Early logits in memory at a time.
_AT_ONCE = 2**24
#: Tokens of the vocabulary that a divergence goes through at a time: what is computed of them stays in the cache, and
#: sums stay exact.
_CHUNK = 2**15
#: Settings of transformers' `generate` with which the scores at hand are not those of the last pass's last token, and
#: the values that have no such effect.
_OTHER_PASSES: Mapping[str, tuple[Any, ...]] = {
    "assistant_model": (None,),
    "prompt_lookup_num_tokens": (None,),
    "guidance_scale": (None, 1, 1.0),
    "penalty_alpha": (None, 0, 0.0),
    "custom_generate": (None,),
}


@dataclass(frozen=True)
class DoLa:
    """Contrast the last layer with an earlier one: `lm.generate(prompts, decoding=DoLa("high"))`.

    `layers` are the candidates: "high" or "low" (every second layer of the upper or lower half; in models of more than
    40 blocks, of the last or first 20; "low" begins at 2 where the embedding is tied to the unembedding), or numbers.
    One number is the static form; of several, one is chosen per token and text. `alpha` is the plausibility bound, in
    (0, 1]. `repetition_penalty` divides a positive contrast by itself and multiplies a negative one, for tokens that
    the text already has, as `generate` does with logits; 1 is none. It replaces that of the model's own settings.
    `jsd="plausible"` chooses the layer by the divergence over the plausible tokens alone: not the published choice,
    and much cheaper.

    `compat="dola"` does as the published code and transformers did: early logits without the final norm (nor the
    family's scale or soft cap), KL(M ‖ p) in place of KL(p ‖ M) in the divergence, averaged over the vocabulary, and
    one layer for all texts of a batch. Raises `UsageError` for values that cannot be.
    """

    layers: Bucket | int | Sequence[int] = "high"
    alpha: float = 0.1
    repetition_penalty: float = 1.2
    jsd: Over = "vocabulary"
    compat: Literal["dola"] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", _checked(self.layers))
        if not 0 < self.alpha <= 1:
            raise UsageError(
                f"alpha={self.alpha}: plausible are tokens of at least alpha × the likeliest; 0 < alpha ≤ 1"
            )
        if not 0 < self.repetition_penalty < np.inf:
            raise UsageError(f"repetition_penalty={self.repetition_penalty}: give a number above 0; 1 is no penalty")
        if self.jsd not in get_args(Over):
            raise UsageError(f"unknown jsd={self.jsd!r}; one of {', '.join(get_args(Over))}")
        if self.compat not in (None, "dola"):
            raise UsageError(f"compat={self.compat!r}: DoLa has None and 'dola'")
        if self.compat and self.jsd != "vocabulary":
            raise UsageError("compat='dola' chooses the layer over the whole vocabulary: leave jsd as it is")

    def candidates(self, lm: LanguageModel) -> tuple[int, ...]:
        """The candidate layers in this model: layer j is what enters block j.

        Raises `UnsupportedOperation` for encoders, `UsageError` for layers that the model does not have.
        """
        if lm.architecture.kind != "decoder":
            raise UnsupportedOperation(
                f"{lm.name} is an encoder ({lm.architecture.family}): it has no next token, so nothing to contrast"
            )
        n = lm.n_layers
        if n < 2:
            raise UsageError(
                f"{lm.name} has a single block: DoLa contrasts the last layer with an earlier one, and there is none"
            )
        if isinstance(self.layers, str):
            found = _bucket(self.layers, n, tied=bool(getattr(lm.net.config, "tie_word_embeddings", False)))
            if not found:
                raise UsageError(
                    f"layers={self.layers!r}: {lm.name} has {n} blocks, too few for such a bucket; name layers, "
                    f"0 to {n - 1}"
                )
            return found
        assert isinstance(self.layers, tuple)
        if (most := max(self.layers)) >= n:
            raise UsageError(
                f"layer {most} is no premature layer of {lm.name}: it has {n} blocks, so there are layers 0 to {n - 1} "
                "(layer j is what enters block j)"
            )
        return self.layers

    # -- texts ------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def generating(
        self, lm: LanguageModel, real: Bool[Tensor, "prompts columns"], told: Mapping[str, Any]
    ) -> Iterator[dict[str, Any]]:
        """What `lm.generate(…, decoding=self)` runs in.

        What `generate`'s other settings forbid (an end that comes too early, bad words) is forbidden first: the
        distributions are then over the other tokens. Processors of the caller come after the contrast. The scores are
        log-probabilities, so that beams add up. Raises `UsageError` for a repetition penalty beside this one's,
        `UnsupportedOperation` for ways to generate that look at other passes (assistants, guidance).
        """
        exits = _Exits(lm, self.candidates(lm), raw=self.compat is not None)
        config = told.get("generation_config") or lm.net.generation_config

        def setting(name: str) -> Any:
            return told.get(name, getattr(config, name, None))

        if told.get("repetition_penalty") not in (None, 1.0):
            raise UsageError(
                "a repetition penalty belongs after the contrast: DoLa(repetition_penalty=…) in place of "
                "lm.generate(…, repetition_penalty=…)"
            )
        for name, usual in _OTHER_PASSES.items():
            if setting(name) not in usual:
                raise UnsupportedOperation(
                    f"{name}={setting(name)!r} runs passes of its own between a token's and its choice, so early "
                    "states would be of other tokens: DoLa goes with greedy decoding, sampling and beams"
                )
        others = list(told.get("logits_processor") or ())
        greedy = not setting("do_sample") and setting("num_beams") in (None, 1) and not others
        pads = real.long().argmax(1)
        with observe(lm, exits.sites, lambda h: h[:, -1]) as seen:
            early = _Early(exits, seen)
            with early.beside_the_mature():
                process = _Contrast(self, early, pads, greedy)
                yield {"repetition_penalty": 1.0, "logits_processor": [process, *others]}

    # -- scores -----------------------------------------------------------------------------------------------

    def logprobs(
        self,
        lm: LanguageModel,
        prompts: Prompt | Sequence[Prompt],
        continuations: Sequence[str] | Sequence[Sequence[str]],
        *,
        plausible: bool = True,
        batch_tokens: int | None = None,
    ) -> list[Float[np.ndarray, " continuations"]]:
        """Scores (nats) of continuations: log p_N − log p_j of each token, summed; in the form of `lm.logprobs`.

        An implausible token scores −1000; with `plausible=False`, as for multiple choice, it scores like the others.
        There is no repetition penalty, and no softmax after the contrast: the numbers compare continuations, they are
        no probabilities. Raises what `lm.logprobs` does.
        """
        traces = self.trace(lm, prompts, continuations, batch_tokens=batch_tokens)
        return [np.array([t.scores(plausible=plausible).sum() for t in group]) for group in traces]

    def trace(
        self,
        lm: LanguageModel,
        prompts: Prompt | Sequence[Prompt],
        continuations: Sequence[str] | Sequence[Sequence[str]],
        *,
        batch_tokens: int | None = None,
    ) -> "list[list[Trace]]":
        """What every candidate layer makes of every token of continuations: a `Trace` of each, in lists per prompt."""
        layers = self.candidates(lm)
        exits = _Exits(lm, layers, raw=self.compat is not None)
        found = lm.scored(prompts, continuations, _TokenNumbers(self, exits), batch_tokens=batch_tokens)
        return [
            [
                Trace(
                    tokens=tuple(lm.tokenizer.decode([int(i)]) for i in one.ids),
                    layers=layers,
                    mature=one.numbers[:, 0],
                    plausible=one.numbers[:, 1] > 0,
                    early=one.numbers[:, 2 : 2 + len(layers)],
                    divergence=one.numbers[:, 2 + len(layers) :],
                )
                for one in group
            ]
            for group in found
        ]


@dataclass(frozen=True, eq=False)
class Trace:
    """A continuation, token by token, under DoLa.

    `tokens` are pieces of text. `mature` is log p_N of each token and `early` log p_j, by candidate layer; `divergence`
    that of p_j from p_N where the token is predicted (nats; with `compat`, the published quantity). `plausible` says
    whether the token is among the plausible ones.
    """

    tokens: tuple[str, ...]
    layers: tuple[int, ...]
    mature: Float[np.ndarray, " tokens"]
    plausible: Bool[np.ndarray, " tokens"]
    early: Float[np.ndarray, "tokens layers"]
    divergence: Float[np.ndarray, "tokens layers"]

    @property
    def chosen(self) -> Int[np.ndarray, " tokens"]:
        """The layer that each token's is contrasted with."""
        chosen: np.ndarray = np.asarray(self.layers)[self.divergence.argmax(1)]
        return chosen

    def scores(self, *, plausible: bool = True) -> Float[np.ndarray, " tokens"]:
        """log p_N − log p_j of each token, j the chosen layer; −1000 where it is implausible, if `plausible`."""
        picked = np.take_along_axis(self.early, self.divergence.argmax(1)[:, None], 1)[:, 0]
        return np.where(self.plausible | (not plausible), self.mature - picked, IMPLAUSIBLE)


# -- the formulas ---------------------------------------------------------------------------------------------------


def plausible_tokens(mature: Float[Tensor, "rows vocab"], alpha: float) -> Bool[Tensor, "rows vocab"]:
    """log p_N ≥ max log p_N + log α, from logits or log-probabilities."""
    # Not `>=`: what is no number stays plausible, and shows in the text as it does without DoLa.
    return ~(mature < mature.amax(-1, keepdim=True) + math.log(alpha))


def divergences(
    mature: Float[Tensor, "rows vocab"],
    early: Float[Tensor, "rows layers vocab"],
    compat: Literal["dola"] | None = None,
) -> Float[Tensor, "rows layers"]:
    """Of logits: JSD(p_N, p_j) = ½ KL(p_N ‖ M) + ½ KL(p_j ‖ M), M = ½ (p_N + p_j), in nats.

    With `compat="dola"`, ½ KL(M ‖ p_N) + ½ KL(M ‖ p_j) divided by the size of the vocabulary.
    """
    return _compared(mature, early, compat).divergence


def _checked(layers: Any) -> Bucket | tuple[int, ...]:
    if isinstance(layers, str):
        if layers not in get_args(Bucket):
            raise UsageError(f"layers={layers!r}: 'high', 'low', a layer's number, or several")
        return layers  # type: ignore[return-value]
    numbers = [layers] if isinstance(layers, int) else list(layers)
    if not numbers:
        raise UsageError("layers is empty: DoLa needs at least one layer to contrast with")
    if bad := [x for x in numbers if isinstance(x, bool) or not isinstance(x, int | np.integer) or x < 0]:
        raise UsageError(f"layers holds {bad[0]!r}: layers are whole numbers from 0, the embedding, up")
    if len(set(numbers)) < len(numbers):
        raise UsageError(f"layers={numbers} names a layer twice")
    return tuple(int(x) for x in numbers)


def _bucket(name: str, n: int, *, tied: bool) -> tuple[int, ...]:
    """The candidates of a model of n blocks. The tied embedding itself would be read out as the last token again."""
    if name == "high":
        return tuple(range(n // 2 if n <= _DEEP else n - _SPAN, n, 2))
    return tuple(range(2 if tied else 0, n // 2 if n <= _DEEP else _SPAN, 2))


# -- early exits ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Exits:
    """The candidate layers of a model, and their logits. `raw`: without final norm, scale and soft cap."""

    lm: LanguageModel
    layers: tuple[int, ...]
    raw: bool

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(Site("resid.pre", j) for j in self.layers)

    def states(self, seen: Mapping[Site, Float[Tensor, "rows d_model"]]) -> Float[Tensor, "rows layers d_model"]:
        """What the unembedding reads of each layer."""
        streams = torch.stack([seen[site].to(self.lm.net.device) for site in self.sites], -2)
        return streams if self.raw else self.lm.architecture.normed(self.lm.net, streams)

    def logits(
        self, states: Float[Tensor, "rows layers d_model"], tokens: Int[Tensor, " tokens"] | None = None
    ) -> Float[Tensor, "rows layers vocab"]:
        return widened(self.lm.architecture.unembed(self.lm.net, states, tokens, raw=self.raw))

    def finished(self, raw: Float[Tensor, "rows layers vocab"]) -> Float[Tensor, "rows layers vocab"]:
        """Logits from what the head returns."""
        return widened(raw if self.raw else self.lm.architecture.finished(self.lm.net, raw))


@dataclass(frozen=True, eq=False)
class _Compared:
    """Rows of a mature distribution against early ones: divergences, and what turns logits into log-probabilities."""

    divergence: Float[Tensor, "rows layers"]
    mature: Float[Tensor, " rows"]
    early: Float[Tensor, "rows layers"]


def _compared(
    mature: Float[Tensor, "rows vocab"],
    early: Float[Tensor, "rows layers vocab"],
    compat: Literal["dola"] | None = None,
    *,
    choose: bool = True,
) -> _Compared:
    """Of finite logits. Without `choose`, no divergence."""
    own = mature.logsumexp(-1)
    top = early.amax(-1, keepdim=True)
    chunks = [slice(start, start + _CHUNK) for start in range(0, mature.shape[-1], _CHUNK)]
    # log p_j is z − log(total), and its mean under p_j mean/total − log(total).
    total, mean, kept = torch.zeros_like(top[..., 0]), torch.zeros_like(top[..., 0]), []
    for c in chunks:
        z = early[..., c] - top
        q = z.exp()
        total += q.sum(-1)
        if choose:
            mean += _dot(q, z)
            kept.append(q)
    sums = top[..., 0] + total.log()
    if not choose:
        return _Compared(torch.zeros_like(sums), own, sums)
    tiny, share = torch.finfo(top.dtype).tiny, total.reciprocal()[..., None]
    entropy, rest = torch.zeros_like(sums), torch.zeros_like(sums)
    for c, q in zip(chunks, kept, strict=True):
        a = mature[:, None, c] - own[:, None, None]
        p = a.exp()
        both = torch.addcmul(p + tiny, q, share)  # 2M, nowhere 0
        entropy -= _dot(both, both.log())
        rest += (p * a).sum(-1) if compat is None else 0.5 * _dot(both, (early[..., c] - sums[..., None]).add_(a))
    if compat is None:
        found = 0.5 * (entropy + rest + mean / total - total.log()) + math.log(2)
    else:
        found = (-0.5 * (entropy + rest) - math.log(2)) / mature.shape[-1]
    return _Compared(found, own, sums)


def _over(
    tokens: Bool[Tensor, "rows vocab"], mature: Float[Tensor, "rows vocab"], early: Float[Tensor, "rows layers vocab"]
) -> Float[Tensor, "rows layers"]:
    """Divergences over some tokens alone."""
    return divergences(mature.masked_fill(~tokens, _NEVER), early.masked_fill(~tokens[:, None], _NEVER))


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.einsum("rlv,rlv->rl", a, b)


def _pieces(rows: int, layers: int, vocabulary: int) -> list[slice]:
    step = max(1, _AT_ONCE // (layers * vocabulary))
    return [slice(start, start + step) for start in range(0, rows, step)]


@dataclass(frozen=True, eq=False)
class _TokenNumbers:
    """A `TokenScorer`: of each token log p_N, whether it is plausible, log p_j by layer, and the divergences there."""

    dola: DoLa
    exits: _Exits

    @property
    def sites(self) -> tuple[Site, ...]:
        return self.exits.sites

    def __call__(
        self,
        final: Float[Tensor, "places d_model"],
        seen: Mapping[Site, Tensor],
        which: Int[np.ndarray, " tokens"],
        ids: Int[np.ndarray, " tokens"],
    ) -> Float[np.ndarray, "tokens numbers"]:
        exits, dola, n = self.exits, self.dola, len(self.exits.layers)
        states = exits.states(seen)
        head = exits.lm.net.get_output_embeddings()
        out = np.zeros((len(ids), 2 + 2 * n))
        for piece in _pieces(len(final), n, int(head.weight.shape[0])):
            mature = widened(exits.lm.unembed(final[piece]))
            early = exits.logits(states[piece])
            plausible = plausible_tokens(mature, dola.alpha)
            found = _compared(mature, early, dola.compat, choose=n > 1 and dola.jsd == "vocabulary")
            divergence = found.divergence
            if n > 1 and dola.jsd == "plausible":
                divergence = _over(plausible, mature, early)
            here = np.flatnonzero((which >= piece.start) & (which < piece.stop))
            row = torch.from_numpy(which[here] - piece.start).to(mature.device)
            token = torch.from_numpy(ids[here]).to(mature.device)
            numbers = [
                (mature[row, token] - found.mature[row])[:, None],
                plausible[row, token][:, None],
                early[row, :, token] - found.early[row],
                divergence[row],
            ]
            out[here] = torch.cat([x.double() for x in numbers], 1).cpu().numpy()
        return out


# -- the next token -------------------------------------------------------------------------------------------------


class _Early:
    """Early logits where the next token is predicted: of the last pass's last tokens, whose streams are in `seen`."""

    def __init__(self, exits: _Exits, seen: Mapping[Site, Tensor]) -> None:
        self._exits, self._seen = exits, seen
        self._raw: Tensor | None = None  # what the head made of all of them, if it did

    @contextlib.contextmanager
    def beside_the_mature(self) -> Iterator[None]:
        """Have the network's head read out all layers wherever it reads out the last one."""
        lm = self._exits.lm
        with contextlib.ExitStack() as stack:
            if lm.architecture.reads_out_directly(lm.net):
                stack.enter_context(computed(lm.net.get_output_embeddings(), self._read_out))
            yield

    def _read_out(self, final: Float[Tensor, "rows columns d_model"]) -> Float[Tensor, "rows _ vocab"]:
        """The head's output for the last tokens."""
        lm, last, self._raw = self._exits.lm, final[:, -1:], None
        together = self.rows * (1 + self.layers)
        if together * len(lm.net.get_output_embeddings().weight) > _AT_ONCE:
            return lm.architecture.unembed(lm.net, last, raw=True)
        states = torch.cat([last, self._states.to(last)], 1)
        raw = lm.architecture.unembed(lm.net, states, raw=True)
        self._raw = raw[:, 1:]
        return raw[:, :1]

    @property
    def rows(self) -> int:
        return len(self._seen[self._exits.sites[0]])

    @property
    def layers(self) -> int:
        return len(self._exits.layers)

    @property
    def _states(self) -> Float[Tensor, "rows layers d_model"]:
        return self._exits.states(self._seen)

    def of(self, tokens: Int[Tensor, " tokens"]) -> Float[Tensor, "rows layers tokens"]:
        """Logits of some tokens."""
        if self._raw is not None:
            return self._exits.finished(self._raw[..., tokens])
        return self._exits.logits(self._states, tokens)

    def whole(
        self, rows: Int[Tensor, " some"], layers: Int[Tensor, " some"] | None
    ) -> Float[Tensor, "some layers vocab"]:
        """Logits of all tokens, for some rows in their order: at all layers, or at one each."""
        source = self._states if self._raw is None else self._raw
        if layers is not None:
            source = source[rows, layers][:, None]
        elif len(rows) < len(source):
            source = source[rows]
        return self._exits.logits(source) if self._raw is None else self._exits.finished(source)


class _Contrast:
    """A logits processor: log-probabilities of the next token after the contrast.

    `early` is of the pass that the scores are of; `pads` counts the pads before each prompt. With `greedy` only the
    best token of each row needs to be right, and is.
    """

    def __init__(self, dola: DoLa, early: _Early, pads: Int[Tensor, " prompts"], greedy: bool) -> None:
        self._dola, self._early, self._pads, self._greedy = dola, early, pads, greedy

    def __call__(self, ids: Int[Tensor, "rows columns"], scores: Float[Tensor, "rows vocab"]) -> Tensor:
        if self._early.rows != len(scores):
            raise UnsupportedOperation(
                f"the last pass had {self._early.rows} rows, but {len(scores)} are to be scored: DoLa goes with greedy "
                "decoding, sampling and beams"
            )
        plausible = plausible_tokens(scores, self._dola.alpha)
        # Of the vocabulary only what is plausible in some row goes on.
        tokens = plausible.nonzero()[:, 1].unique()  # type: ignore[no-untyped-call]
        plausible = plausible[:, tokens]
        early = self._early.of(tokens).to(scores.device)
        mature = scores[:, tokens].masked_fill(~plausible, -torch.inf)
        gaps = mature[:, None] - early  # the contrast of each layer, but for a constant
        repeated = self._repeated(ids, tokens, scores.shape[1]) & plausible
        found = self._decide(scores, mature, early, gaps, repeated)
        out = torch.full_like(scores, -torch.inf)
        out[:, tokens] = found.log_softmax(-1).to(scores.dtype)
        return out

    def _decide(
        self,
        scores: Float[Tensor, "rows vocab"],
        mature: Float[Tensor, "rows tokens"],
        early: Float[Tensor, "rows layers tokens"],
        gaps: Float[Tensor, "rows layers tokens"],
        repeated: Bool[Tensor, "rows tokens"],
    ) -> Float[Tensor, "rows tokens"]:
        """The penalised contrast, up to a constant; of a row that is settled without more, any with its best token."""
        dola, rows = self._dola, torch.arange(len(gaps), device=gaps.device)
        several = (mature > -torch.inf).sum(1) > 1
        certain, settled = self._settled(gaps, mature > -torch.inf, repeated)
        chosen = torch.zeros_like(rows)
        constant = torch.full(gaps.shape[:1], torch.nan, dtype=gaps.dtype, device=gaps.device)
        if gaps.shape[1] > 1 and bool((open_ := several & ~settled).any()):
            if dola.jsd == "plausible":
                chosen = _over(mature > -torch.inf, mature, early).argmax(1)
            else:
                # The published code looks at all texts of a batch together.
                which = rows if dola.compat else rows[open_]
                compared = self._whole(scores, which)
                if dola.compat:
                    chosen = compared.divergence.mean(0).argmax().expand_as(rows)
                else:
                    chosen[open_] = compared.divergence.argmax(1)
                constant[which] = compared.early.gather(1, chosen[which, None])[:, 0] - compared.mature
        # A penalty asks for the contrast's sign, and so for its constant.
        lacking = several & ~certain[rows, chosen] & constant.isnan()
        if bool(lacking.any()):
            compared = self._whole(scores, rows[lacking], chosen[lacking])
            constant[lacking] = compared.early[:, 0] - compared.mature
        contrast = gaps[rows, chosen] + constant.nan_to_num(0.0)[:, None]
        punished = torch.where(contrast < 0, contrast * dola.repetition_penalty, contrast / dola.repetition_penalty)
        return torch.where(repeated & ~constant.isnan()[:, None], punished, contrast)

    def _settled(
        self,
        gaps: Float[Tensor, "rows layers tokens"],
        plausible: Bool[Tensor, "rows tokens"],
        repeated: Bool[Tensor, "rows tokens"],
    ) -> tuple[Bool[Tensor, "rows layers"], Bool[Tensor, " rows"]]:
        """Where the result does not depend on the contrast's constant, and where not on the layer either."""
        none = ~repeated.any(1, keepdim=True)
        if not self._greedy:
            return none.expand(gaps.shape[:2]), torch.zeros_like(none[:, 0])
        # Penalised alike, tokens keep their order; and one that is best without a penalty on it stays so.
        best = gaps.argmax(-1)
        certain = none | (repeated == plausible).all(1, keepdim=True)
        if self._dola.repetition_penalty > 1:
            certain = certain | ~repeated.gather(1, best)
        certain = certain.expand(gaps.shape[:2])
        return certain, certain.all(1) & (best == best[:, :1]).all(1)

    def _whole(
        self,
        scores: Float[Tensor, "rows vocab"],
        rows: Int[Tensor, " some"],
        layers: Int[Tensor, " some"] | None = None,
    ) -> _Compared:
        """Some rows over the whole vocabulary: at all layers, or at one each, and then without divergences."""
        parts = []
        for piece in _pieces(len(rows), self._early.layers if layers is None else 1, scores.shape[1]):
            which, of = rows[piece], None if layers is None else layers[piece]
            mature, early = scores[which], self._early.whole(which, of).to(scores.device)
            gone = (mature == -torch.inf).nonzero()  # what other settings forbid is in neither distribution
            if len(gone):
                mature[gone[:, 0], gone[:, 1]] = _NEVER
                early[gone[:, 0], :, gone[:, 1]] = _NEVER
            parts.append(_compared(mature, early, self._dola.compat, choose=layers is None))
        return _Compared(*(torch.cat([getattr(p, name) for p in parts]) for name in ("divergence", "mature", "early")))

    def _repeated(
        self, ids: Int[Tensor, "rows columns"], tokens: Int[Tensor, " tokens"], vocabulary: int
    ) -> Bool[Tensor, "rows tokens"]:
        """Which tokens a row's text already has, pads before it apart; none where no penalty is asked for."""
        if self._dola.repetition_penalty == 1:
            return torch.zeros(len(ids), len(tokens), dtype=torch.bool, device=ids.device)
        pads = self._pads.to(ids.device).repeat_interleave(len(ids) // len(self._pads))
        before = torch.arange(ids.shape[1], device=ids.device)[None] < pads[:, None]
        known = torch.zeros(len(ids), vocabulary + 1, dtype=torch.bool, device=ids.device)
        known.scatter_(1, ids.masked_fill(before, vocabulary).clamp(max=vocabulary), True)
        return known[:, tokens]
