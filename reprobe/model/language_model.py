"""A transformers model with its tokenizer, its row of the architecture table, and its identity.

Enters: the name of a model (bundled name, hub id, local folder, `.gguf` file), or a network and tokenizer in memory.
Leaves: token batches, logits, log-probabilities, generated text. It wraps the network and never replaces a part of
it. Does not know data sets, stores or directions.
"""

import contextlib
import difflib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import cached_property
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, Literal, get_args, overload

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reprobe.errors import (
    ModelLoadFailed,
    PromptTooLong,
    SelfCheckFailed,
    UnsupportedOperation,
    UsageError,
)
from reprobe.model import bundled, gguf
from reprobe.model.architectures import Architecture, architecture_of, kind_of
from reprobe.model.chat import Messages
from reprobe.model.checks import residuals
from reprobe.model.decoding import Decoding, Scored, TokenScorer
from reprobe.model.hooks import board_of, follow, observe
from reprobe.model.identity import ModelIdentity, digest_template, digest_tokenizer, digest_weights
from reprobe.model.monitor import DirectionLike, Monitor, checked
from reprobe.model.packs import BUDGET, Layout, Packing, Plan, lay_out, plan_packs
from reprobe.model.passes import PackedTokens, Prompts, positions_of
from reprobe.model.sites import LAYER_PARTS, MODEL_PARTS, Parts, Site, expand
from reprobe.model.text import Span, TokenisedText, Truncate, tokenise
from reprobe.progress import Progress, silent

#: Logits in memory at a time while scoring; a vocabulary of 262,144 has 256 rows of them.
_LOGITS_AT_ONCE = 2**26

#: Settings of transformers' `generate` with which row i of a pass need not go on with row i of the pass before, and
#: the value that has no such effect.
_REORDERING = {"num_beams": 1, "assistant_model": None, "prompt_lookup_num_tokens": None}

#: One prompt: plain text, or chat messages.
Prompt = str | Messages
Padding = Literal["left", "right"]


class _Role(IntEnum):
    """What a token of a scored text is: of the prompt, the prompt's last, of the continuation."""

    PROMPT = 0
    LAST = 1
    GENERATED = 2


@dataclass(frozen=True)
class Encoded:
    """A padded batch of prompts on the model's device. All tensors are (rows, columns)."""

    input_ids: Int[Tensor, "rows columns"]
    real: Bool[Tensor, "rows columns"]
    spans: Mapping[str, Bool[Tensor, "rows columns"]]

    @property
    def position_ids(self) -> Int[Tensor, "rows columns"]:
        """Position of each token among its row's real tokens; on pads, that of the token before them, or 0."""
        return positions_of(self.real)

    def row(self, i: int) -> Int[Tensor, " tokens"]:
        """Token ids of prompt i without padding."""
        return self.input_ids[i][self.real[i]]


@dataclass(frozen=True)
class Continued:
    """A continuation as a model ran it: its token ids, and the states at one site from the prompt's last token on.

    At `final`, `states[i]` is what the token `tokens[i]` is predicted from.
    """

    tokens: Int[np.ndarray, " tokens"]
    states: Float[Tensor, "tokens+1 width"]


class LanguageModel:
    """A model ready to be read and controlled. Make one with `load`, or around a network in memory.

    `net` must be a transformers model of a supported family with its head (or, for encoders, also without);
    raises `UnsupportedModel` otherwise. The network is put in evaluation mode.
    """

    def __init__(self, net: Any, tokenizer: Any, *, name: str, revision: str | None = None) -> None:
        self.architecture: Architecture = architecture_of(net)
        self.net = net.eval()
        self.tokenizer = tokenizer
        self.name = name
        self.revision = revision
        self.parts: Parts = self.architecture.parts(net, name)

    @classmethod
    def load(
        cls,
        name: str | Path,
        *,
        revision: str | None = None,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
        device_map: Any = None,
        attn_implementation: str | None = None,
        quantization_config: Any = None,
        progress: Progress = silent,
    ) -> "LanguageModel":
        """Load a model.

        `name` is a bundled name (`smollm2-135m`, `gemma3-270m`), a `.gguf` file (dequantised once into the cache),
        a local folder, or a hub id (`revision` is a branch, tag or commit there). `dtype` ("float32", "bfloat16",
        "float16"; default: as the checkpoint says, float32 for bundled and GGUF weights). `device` defaults to CUDA
        where there is one, under torchrun to the process's own GPU (LOCAL_RANK). `device_map`,
        `attn_implementation` and `quantization_config` go to transformers as they are; with the first or the last,
        transformers places the network, and `device` is refused. Raises `FetchFailed`, `ModelLoadFailed`,
        `UnsupportedModel`, and `UsageError` for a dtype or device that there is not.
        """
        options: dict[str, Any] = {"dtype": _dtype(dtype) if dtype is not None else "auto"}
        place = None if device is None else _device(device)
        placed = device_map is not None or quantization_config is not None
        if placed and place is not None:
            raise UsageError(
                f"device={str(device)!r} does not go with device_map or quantization_config, with which transformers "
                f"places the network: leave it out, or say device_map={{'': {str(device)!r}}}"
            )
        source, label = _resolve(str(name), progress)
        local = Path(source).is_dir()
        if revision is not None and local:
            raise UsageError(f"revision={revision!r} names a hub revision, but {name} is a local model")
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

        where: dict[str, Any] = {"revision": revision} if revision is not None else {}
        for key, value in (
            ("device_map", device_map),
            ("attn_implementation", attn_implementation),
            ("quantization_config", quantization_config),
        ):
            if value is not None:
                options[key] = value
        try:
            with quiet_transformers():
                config = AutoConfig.from_pretrained(source, **where)
                encoder = kind_of(config) == "encoder"
                auto = AutoModelForMaskedLM if encoder else AutoModelForCausalLM
                net = auto.from_pretrained(source, **where, **options)
                tokenizer = AutoTokenizer.from_pretrained(source, **where)
        except UsageError:
            raise
        except Exception as e:  # transformers raises many kinds for the same few causes
            raise ModelLoadFailed(_why_not(str(name), local, e)) from e
        if not placed:
            net = net.to(_own_device() if place is None else place)
        commit = getattr(net.config, "_commit_hash", None)
        return cls(net, tokenizer, name=label, revision=commit or revision)

    # -- what it is -------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where token ids go: the device of the input embedding."""
        weight: Tensor = self.net.get_input_embeddings().weight
        return weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the activations that the blocks pass on."""
        dtype: torch.dtype = self.net.dtype
        return dtype

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return self.parts.n_layers

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.architecture.width(self.net, Site("embed"))

    @cached_property
    def context(self) -> int | None:
        """The longest prompt in tokens, None where the architecture sets no limit."""
        return self.architecture.context(self.net.config)

    @property
    def vocab_size(self) -> int:
        """Rows of the input embedding: token ids are below it, but not every one need be the tokenizer's."""
        return int(self.net.get_input_embeddings().weight.shape[0])

    @property
    def identity(self) -> ModelIdentity:
        """Which model this is, computed from what is loaded now: edited weights have another identity."""
        quantiser = getattr(self.net.config, "quantization_config", None)
        method = getattr(quantiser, "quant_method", None) if quantiser is not None else None
        return ModelIdentity(
            name=self.name,
            revision=self.revision,
            architecture=self.architecture.family,
            n_layers=self.n_layers,
            d_model=self.d_model,
            weights=digest_weights(self.net),
            tokenizer=digest_tokenizer(self.tokenizer),
            template=digest_template(self.tokenizer),
            dtype=str(self.dtype).removeprefix("torch."),
            quantization=None if method is None else str(getattr(method, "value", method)),
        )

    def sites(self, sites: Site | str | Iterable[Site | str]) -> tuple[Site, ...]:
        """Sites of this model from sites, names or patterns; raises `UnknownSite`."""
        return expand(sites, self.parts)

    def width(self, site: Site | str) -> int:
        """Number of components of the vector at a site; raises `UnknownSite`."""
        return self.architecture.width(
            self.net, self.parts.require(Site.parse(site) if isinstance(site, str) else site)
        )

    # -- text in ----------------------------------------------------------------------------------------------

    def encode(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        spans: Sequence[Mapping[str, Span]] | None = None,
        padding: Padding = "left",
        truncate: Truncate | None = None,
    ) -> Encoded:
        """Prompts as one padded batch of tokens on the model's device.

        Chat messages are rendered with the tokenizer's template. `spans` names character ranges, one mapping per
        prompt. Raises `PromptTooLong` for prompts beyond the context unless `truncate` says which side to cut.
        """
        return self._pad(self._tokenise(prompts, spans, truncate), padding)

    def _tokenise(
        self,
        prompts: Prompt | Sequence[Prompt],
        spans: Sequence[Mapping[str, Span]] | None,
        truncate: Truncate | None = None,
        room: int = 0,
    ) -> list[TokenisedText]:
        batch = _batch(prompts)
        _require_spans(spans, batch)
        limit = None if self.context is None else self.context - room
        if limit is not None and limit < 1:
            raise PromptTooLong(
                f"{room} new tokens leave no room for a prompt: the context of {self.name} is {self.context} tokens"
            )
        return tokenise(self.tokenizer, batch, spans=spans, context=limit, truncate=truncate)

    def _pad(self, rows: Sequence[TokenisedText], padding: Padding) -> Encoded:
        if padding not in get_args(Padding):
            raise UsageError(f"padding={padding!r}: one of {', '.join(get_args(Padding))}")
        width = max(len(r.ids) for r in rows)
        return self._lay(rows, [width - len(r.ids) if padding == "left" else 0 for r in rows], width)

    def _lay(self, rows: Sequence[TokenisedText], starts: Sequence[int], width: int) -> Encoded:
        """Rows of `width` columns, each text from its start on, and pads around it."""
        ids = np.full((len(rows), width), self.pad_id, dtype=np.int64)
        real = np.zeros((len(rows), width), dtype=bool)
        names = {name for r in rows for name in r.spans}
        spans = {name: np.zeros((len(rows), width), dtype=bool) for name in names}
        for i, (r, start) in enumerate(zip(rows, starts, strict=True)):
            ids[i, start : start + len(r.ids)] = r.ids
            real[i, start : start + len(r.ids)] = True
            for name, tokens in r.spans.items():
                spans[name][i, start + np.asarray(tokens, dtype=np.int64)] = True
        put = {name: torch.from_numpy(mask).to(self.device) for name, mask in spans.items()}
        return Encoded(torch.from_numpy(ids).to(self.device), torch.from_numpy(real).to(self.device), put)

    @property
    def pad_id(self) -> int:
        """The token that fills padding; it is masked everywhere, so any token of the vocabulary will do."""
        for token in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        return 0

    @property
    def no_cache(self) -> dict[str, bool]:
        """The trunk's keyword that turns the key-value cache off; encoders have none."""
        return {"use_cache": False} if self.architecture.kind == "decoder" else {}

    def inputs(self, batch: Encoded) -> dict[str, Tensor]:
        """A batch as the keyword arguments of the network."""
        out = {"input_ids": batch.input_ids, "attention_mask": batch.real.long()}
        if self.architecture.takes_positions:
            # Stock models count pads as positions if they are not told otherwise.
            out["position_ids"] = batch.position_ids
        return out

    def plan(
        self, tokens: np.ndarray, starts: np.ndarray, *, packing: Packing = "forest", budget: int | None = None
    ) -> Plan:
        """How prompts with the token ids `tokens[starts[i]:starts[i + 1]]` run on this model; see `plan_packs`.

        Where the architecture cannot share prefixes, "forest" means "padded". `budget` defaults to the device's.
        """
        if packing == "forest" and not self.architecture.forest:
            packing = "padded"
        return plan_packs(
            tokens,
            starts,
            packing=packing,
            budget=BUDGET.get(self.device.type, BUDGET["cpu"]) if budget is None else budget,
            alone_beyond=self.architecture.alone_beyond(self.net.config),
        )

    def pack_inputs(self, layout: Layout) -> dict[str, Any]:
        """A pack as the keyword arguments of the trunk."""
        inputs: dict[str, Any] = {"input_ids": torch.from_numpy(layout.ids).to(self.device)}
        if layout.ends is not None:
            ends, positions = (torch.from_numpy(a).to(self.device) for a in (layout.ends, layout.positions))
            inputs |= {
                "position_ids": positions,
                "attention_mask": self.architecture.tree_masks(self.net, ends, positions),
            }
        elif self.architecture.kind == "encoder":
            inputs["attention_mask"] = torch.from_numpy(layout.real.astype(np.int64)).to(self.device)
        # Decoders need no mask for rows of one prompt: padding is on the right, where no real token looks.
        return inputs

    @contextlib.contextmanager
    def _told(self, batch: Encoded, ends: frozenset[int] = frozenset(), filler: int | None = None) -> Iterator[None]:
        told = Prompts(batch.real, int(batch.real.shape[1]), batch.spans, batch.input_ids, ends, filler)
        with board_of(self).told(told):
            yield

    @contextlib.contextmanager
    def monitor(
        self,
        directions: DirectionLike | Iterable[DirectionLike] | Mapping[Site, DirectionLike],
        *,
        allow_mismatch: bool = False,
    ) -> Iterator[Monitor]:
        """Score every token at the directions' sites, in whatever the model does inside the context.

        A score is (h·v̂ − offset) / scale, as a live probe reads it: of the activation that the rest of the network
        sees, after any steering. Activations are not kept. What was read is in the yielded `Monitor`. Raises
        `UnknownSite`, `IdentityMismatch` for directions of another model (unless `allow_mismatch`), `UsageError` for
        one of another width, and inside, `UnsupportedOperation` for `lm.logprobs` and for beams.
        """
        monitor = Monitor(self, checked(self, directions, "a monitor", allow_mismatch=allow_mismatch))
        with follow(self, monitor.observers, monitor.begin):
            yield monitor

    # -- numbers out ------------------------------------------------------------------------------------------

    @overload
    def logits(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        at: Literal["last"] = "last",
        spans: Sequence[Mapping[str, Span]] | None = None,
        padding: Padding = "left",
    ) -> Float[Tensor, "prompts vocab"]: ...
    @overload
    def logits(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        at: Literal["all"],
        spans: Sequence[Mapping[str, Span]] | None = None,
        padding: Padding = "left",
    ) -> list[Float[Tensor, "tokens vocab"]]: ...
    @torch.no_grad()
    def logits(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        at: Literal["last", "all"] = "last",
        spans: Sequence[Mapping[str, Span]] | None = None,
        padding: Padding = "left",
    ) -> Tensor | list[Tensor]:
        """Next-token logits after the last token of each prompt, (prompts, vocab); or with `at="all"` after every
        token, one (tokens, vocab) tensor per prompt. Padding never changes them."""
        if at not in ("last", "all"):
            raise UsageError(f"at={at!r}: one of last, all")
        batch = self.encode(prompts, spans=spans, padding=padding)
        hidden = self._run(batch)
        if at == "all":
            return [self.unembed(h[real]) for h, real in zip(hidden, batch.real.to(hidden.device), strict=True)]
        columns = torch.arange(batch.real.shape[1], device=batch.real.device)
        last = (columns * batch.real).amax(1)
        return self.unembed(hidden[torch.arange(len(hidden), device=hidden.device), last.to(hidden.device)])

    def _run(self, batch: Encoded) -> Float[Tensor, "rows columns d_model"]:
        """The stack of blocks on a batch; returns the state after the final norm."""
        with self._told(batch):
            out = self.architecture.trunk(self.net)(**self.inputs(batch), **self.no_cache)
        hidden: Tensor = out.last_hidden_state
        return hidden

    def unembed(
        self, h: Float[Tensor, "*rows d_model"], tokens: Int[Tensor, " tokens"] | None = None
    ) -> Float[Tensor, "*rows vocab"]:
        """Logits from vectors at `final` (after the final norm), with the family's scale and soft cap.

        With `tokens`, theirs only, (*rows, tokens): no more is computed.
        """
        return self.architecture.unembed(self.net, h, tokens)

    @torch.no_grad()
    def logprobs(
        self,
        prompts: Prompt | Sequence[Prompt],
        continuations: Sequence[str] | Sequence[Sequence[str]],
        *,
        mean: bool = False,
        spans: Sequence[Mapping[str, Span]] | None = None,
        batch_tokens: int | None = None,
    ) -> list[np.ndarray]:
        """Log-probability (nats) of continuations, summed over their tokens, or with `mean` averaged over them.

        One list of continuations per prompt → one float64 array per prompt. A continuation is tokenised together
        with its prompt and found again by character offsets, so a token that straddles the seam counts as the
        continuation's. For interventions the continuation's tokens count as generated, and what differs from prompt to
        prompt (a gate, a strength per row) is the prompt's. A leading blank belongs to the continuation. Beginnings
        that texts share are computed once, where the architecture allows it. `spans` names character ranges, one
        mapping per prompt, for interventions on them.
        `batch_tokens` bounds the tokens of one forward pass. Raises `PromptTooLong`.
        """
        self._need_decoder("logprobs")
        rows, prompt, lengths = self._continued_rows(prompts, continuations, spans)
        each = self._scores(rows, prompt, len(lengths), batch_tokens)
        scores = (own.mean() if mean else own.sum() for own in each)
        return [np.fromiter(islice(scores, n), np.float64, n) for n in lengths]

    @torch.no_grad()
    def scored(
        self,
        prompts: Prompt | Sequence[Prompt],
        continuations: Sequence[str] | Sequence[Sequence[str]],
        scorer: TokenScorer,
        *,
        batch_tokens: int | None = None,
    ) -> list[list[Scored]]:
        """What `scorer` makes of every token of continuations, in the passes of `logprobs` and under its rules.

        One list of continuations per prompt → one list per prompt.
        """
        self._need_decoder("scored")
        rows, prompt, lengths = self._continued_rows(prompts, continuations)
        each = self._scores(rows, prompt, len(lengths), batch_tokens, scorer)
        found = (Scored(r.ids[r.suffix :], own) for r, own in zip(rows, each, strict=True))
        return [list(islice(found, n)) for n in lengths]

    def _continued_rows(
        self,
        prompts: Prompt | Sequence[Prompt],
        continuations: Sequence[str] | Sequence[Sequence[str]],
        spans: Sequence[Mapping[str, Span]] | None = None,
    ) -> tuple[list[TokenisedText], Int[np.ndarray, " rows"], list[int]]:
        """A row per continuation, the number of its prompt, and how many continuations each prompt has."""
        batch = _batch(prompts)
        lists: list[Any] = [continuations] if isinstance(prompts, str) or _is_chat(prompts) else list(continuations)
        if len(lists) != len(batch) or any(isinstance(c, str) for c in lists):
            raise UsageError(f"{len(batch)} prompts need {len(batch)} lists of continuations, got {len(lists)} items")
        _require_spans(spans, batch)
        flat = [(i, c) for i, group in enumerate(lists) for c in group]
        if not flat:
            raise UsageError(f"{len(batch)} prompts, and no continuation of any: there is nothing to score")
        rows = self._continue([(batch[i], c) for i, c in flat], None if spans is None else [spans[i] for i, _ in flat])
        return rows, np.asarray([i for i, _ in flat]), [len(group) for group in lists]

    @torch.no_grad()
    def perplexity(self, texts: str | Sequence[str], *, batch_tokens: int | None = None) -> float:
        """exp of the mean surprisal (nats) per token of texts, each token given those of its text before it.

        A text's first token has nothing before it and does not count; a beginning-of-text token is such a first
        token. Texts beyond the context are cut at its end. Raises `UsageError` if no text has two tokens.
        """
        self._need_decoder("perplexity")
        rows = tokenise(self.tokenizer, _batch(texts), context=self.context, truncate="right")
        scored = [replace(row, suffix=1) for row in rows if len(row.ids) > 1]
        if not scored:
            raise UsageError("perplexity needs a text of two tokens or more")
        each = self._scores(scored, np.arange(len(scored)), len(scored), batch_tokens)
        return float(np.exp(-np.concatenate(each).mean()))

    def _scores(
        self,
        rows: Sequence[TokenisedText],
        prompt: Int[np.ndarray, " rows"],
        n_prompts: int,
        batch_tokens: int | None,
        scorer: TokenScorer | None = None,
    ) -> list[Float[np.ndarray, " tokens *numbers"]]:
        """Log-probability of each of a row's tokens from `suffix` on, in float64; row i is of prompt `prompt[i]`.

        Or, with a `scorer`, its numbers.
        """
        board = board_of(self)
        # What must not be shared is made a part of a token's number: its role, and where an intervention asks for the
        # prompt, the prompt's tokens (which may depend on the continuation, at the seam).
        sequences, sequence = _beginnings(rows, prompt) if board.by_prompt else ([], np.zeros(len(rows), np.int64))
        vocabulary = self.vocab_size
        numbers = np.concatenate(
            [(r.ids + s * vocabulary) * len(_Role) + _roles(r) for r, s in zip(rows, sequence, strict=True)]
        )
        starts = np.concatenate([[0], np.cumsum([len(r.ids) for r in rows])])
        plan = self.plan(numbers, starts, budget=batch_tokens)
        named = sorted(set.intersection(*(set(r.spans) for r in rows)))
        out = [np.zeros(0)] * len(rows)
        memory: dict[Any, Any] = {}
        for k in range(plan.n_packs):
            layout = lay_out(plan, k, numbers, starts)
            texts = [rows[p] for p in plan.pack(k)]
            told = PackedTokens(
                at=self._put(layout.at),
                of=self._put(np.repeat(prompt[plan.pack(k)], np.diff(layout.starts))),
                n_prompts=n_prompts,
                memory=memory,
                spans={name: self._put(_in_pack(layout, [r.spans[name] for r in texts])) for name in named},
                **self._roles_of(layout, sequences),
            )
            layout = replace(layout, ids=layout.ids // len(_Role) % vocabulary)
            with contextlib.ExitStack() as stack:
                seen = {} if scorer is None else stack.enter_context(observe(self, scorer.sites))
                stack.enter_context(board.told(told))
                hidden = self.architecture.trunk(self.net)(**self.pack_inputs(layout), **self.no_cache)
            prompts = plan.pack(k)
            # Continuation tokens, and the places before them, which predict them; of a place all share the logits.
            asked = np.concatenate(
                [np.arange(a + rows[p].suffix, b) for p, (a, b) in zip(prompts, pairwise(layout.starts), strict=True)]
            )
            places, which = np.unique(layout.at[asked - 1], return_inverse=True)
            targets = layout.ids.ravel()[layout.at[asked]]

            def there(h: Tensor, places: np.ndarray = places) -> Tensor:
                return h.flatten(0, 1)[torch.from_numpy(places).to(h.device)]

            final = there(hidden.last_hidden_state)
            if scorer is None:
                each = self.token_logprobs(final, which, targets)
            else:
                each = scorer(final, {site: there(h) for site, h in seen.items()}, which, targets)
            cuts = np.cumsum([len(rows[p].ids) - rows[p].suffix for p in prompts])[:-1]
            for p, own in zip(prompts, np.split(each, cuts), strict=True):
                out[p] = own
        return out

    def _roles_of(self, layout: Layout, sequences: Sequence[tuple[int, int]]) -> dict[str, Any]:
        """What the numbers of a pack's tokens in `_scores` say besides their ids, as `PackedTokens` takes it."""
        roles = layout.ids % len(_Role)
        out: dict[str, Any] = {
            "real": self._put(layout.real),
            "generated": self._put(layout.real & (roles == _Role.GENERATED)),
            "last": self._put(layout.real & (roles >= _Role.LAST)),
            "positions": self._put(layout.positions),
            "trivial": bool(layout.real.all()),
        }
        if sequences:
            sequence = layout.ids // (len(_Role) * self.vocab_size)
            prompt, lengths = np.asarray(sequences, np.int64).T
            out["sequence"] = self._put(sequence)
            out["prompt"], out["lengths"] = self._put(prompt[sequence]), self._put(lengths[sequence])
        return out

    def _put(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device)

    def token_logprobs(
        self, states: Float[Tensor, "places d_model"], which: np.ndarray, targets: np.ndarray
    ) -> Float[np.ndarray, " tokens"]:
        """Log-probability (nats, float64) of each target token after the state, at `final`, that `which` names."""
        out = np.zeros(len(targets))
        step = max(1, _LOGITS_AT_ONCE // self.vocab_size)
        for start in range(0, len(states), step):
            logits = self.unembed(states[start : start + step]).float()
            here = np.flatnonzero((which >= start) & (which < start + step))
            row = torch.from_numpy(which[here] - start).to(logits.device)
            target = torch.from_numpy(targets[here]).to(logits.device)
            out[here] = (logits[row, target].double() - logits.logsumexp(-1).double()[row]).cpu().numpy()
        return out

    @torch.no_grad()
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        max_new_tokens: int = 40,
        spans: Sequence[Mapping[str, Span]] | None = None,
        seed: int | None = None,
        decoding: Decoding | None = None,
        **options: Any,
    ) -> list[str]:
        """Continuations of prompts as text, without the prompt; greedy unless `do_sample=True` or `num_beams=…`.

        `decoding` is another way to score the next token (`methods.dola.DoLa`). `options` go to transformers'
        `generate`, and come before what a `generation_config` among them says; so do `max_new_tokens` and greediness,
        given or not. With `num_return_sequences=k`, k texts per prompt follow each other. `seed` makes sampling
        repeatable and leaves the global random state as it was. Raises `PromptTooLong` if prompt and new tokens do not
        fit the context.
        """
        self._need_decoder("generate")
        if max_new_tokens < 1:
            raise UsageError(f"max_new_tokens={max_new_tokens}: 1 or more")
        for ours in ("input_ids", "inputs", "attention_mask"):
            if ours in options:
                raise UsageError(f"{ours} is made from the prompts; pass text to lm.generate")
        if "max_length" in options:
            raise UsageError("max_length counts the prompt's tokens too, and gives way: say max_new_tokens")
        batch = self._pad(self._tokenise(prompts, spans, room=max_new_tokens), "left")
        settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": max_new_tokens} | options
        if not settings["do_sample"]:
            # A checkpoint's sampling settings mean nothing to greedy decoding, and transformers warns of them.
            settings = {"temperature": None, "top_p": None, "top_k": None} | settings
        config = settings.get("generation_config") or self.net.generation_config

        def chosen(name: str) -> Any:
            return settings.get(name, getattr(config, name, None))

        other = [name for name, usual in _REORDERING.items() if chosen(name) not in (None, usual)]
        if other and board_of(self).followed:
            raise UnsupportedOperation(
                f"{other[0]} reorders or discards rows between passes, so what is read while monitoring could not be "
                "given to a text; sample with num_return_sequences instead, or monitor lm.logits of the finished texts"
            )
        one_by_one = chosen("stop_strings") or chosen("stopping_criteria")
        devices = [self.device] if self.device.type == "cuda" else []
        with (
            self._told(batch, _ids(chosen("eos_token_id")), self.pad_id if one_by_one else None),
            torch.random.fork_rng(devices, enabled=seed is not None),
            quiet_transformers(),
            contextlib.nullcontext({}) if decoding is None else decoding.generating(self, batch.real, settings) as own,
        ):
            if seed is not None:
                torch.manual_seed(seed)
            out = self.net.generate(
                input_ids=batch.input_ids, attention_mask=batch.real.long(), pad_token_id=self.pad_id, **settings | own
            )
        tokens = out if isinstance(out, Tensor) else out.sequences  # of return_dict_in_generate
        new = tokens[:, batch.input_ids.shape[1] :]
        texts: list[str] = self.tokenizer.batch_decode(new, skip_special_tokens=True)
        return texts

    @torch.no_grad()
    def continued(
        self,
        prompts: Prompt | Sequence[Prompt],
        continuations: str | Sequence[str],
        *,
        site: Site | str = "final",
        batch_tokens: int | None = None,
        in_step: bool = False,
    ) -> list[Continued]:
        """States at one site along given continuations, one continuation per prompt.

        Tokens and their roles are those of `logprobs`: for interventions the continuation's count as generated.
        `batch_tokens` bounds the tokens of one forward pass; with `in_step` all texts run in one, in the order given.
        Raises `UnknownSite`, `PromptTooLong`.
        """
        self._need_decoder("continued")
        batch = _batch(prompts)
        given = [continuations] if isinstance(continuations, str) else list(continuations)
        if len(given) != len(batch):
            raise UsageError(f"{len(batch)} prompts need as many continuations, got {len(given)}")
        (where,) = self.sites(site)
        rows = self._continue(list(zip(batch, given, strict=True)))
        starts = np.concatenate([[0], np.cumsum([len(r.ids) for r in rows])])
        plan = self.plan(np.concatenate([r.ids for r in rows]), starts, packing="padded", budget=batch_tokens)
        packs = [np.arange(len(rows))] if in_step else [plan.pack(k) for k in range(plan.n_packs)]
        found: dict[int, Tensor] = {}
        with observe(self, where) as seen:
            for numbers in packs:
                texts = [rows[i] for i in numbers]
                # Pads on both sides, so that all continuations begin at one column.
                width = max(r.suffix for r in texts)
                columns = width + max(len(r.ids) - r.suffix for r in texts)
                padded = self._lay(texts, [width - r.suffix for r in texts], columns)
                told = Prompts(padded.real, width, {}, padded.input_ids)
                if not in_step:
                    told = replace(told, numbers=self._put(np.asarray(numbers, np.int64)), given=len(rows))
                with board_of(self).told(told):
                    self.architecture.trunk(self.net)(**self.inputs(padded), **self.no_cache)
                for states, i, r in zip(seen[where], numbers, texts, strict=True):
                    found[int(i)] = states[width - 1 : width + len(r.ids) - r.suffix].clone()
        return [Continued(row.ids[row.suffix :], found[i]) for i, row in enumerate(rows)]

    def _continue(
        self, pairs: Sequence[tuple[Prompt, str]], spans: Sequence[Mapping[str, Span]] | None = None
    ) -> list[TokenisedText]:
        """Prompts, tokenised together with a continuation each; spans are of the prompts, one mapping per pair."""
        if any(not continuation for _, continuation in pairs):
            raise UsageError("an empty continuation has no log-probability")
        rows = tokenise(
            self.tokenizer,
            [prompt for prompt, _ in pairs],
            suffixes=[continuation for _, continuation in pairs],
            spans=spans,
            context=self.context,
            truncate=None,
        )
        if min(r.suffix for r in rows) < 1:
            raise UsageError(
                "the first token of a continuation has nothing before it: give a prompt, or a tokenizer that adds "
                "a beginning-of-text token"
            )
        return rows

    def _need_decoder(self, what: str) -> None:
        if self.architecture.kind != "decoder":
            raise UnsupportedOperation(f"{self.name} is an encoder ({self.architecture.family}): it has no {what}")

    # -- proof ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def check(self, *, tolerance: float | None = None, seed: int = 0) -> dict[str, float]:
        """Test on random tokens that every site is where it says (`resid.pre + attn.out = resid.mid` and so on).

        Returns the worst relative deviation per identity. `tolerance` defaults to 1e-4 for float32 and 0.05 for
        half precision. Raises `SelfCheckFailed` with the identities that do not hold.
        """
        limit = tolerance if tolerance is not None else (1e-4 if self.dtype in (torch.float32, torch.float64) else 0.05)
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, self.vocab_size, (2, 7), generator=generator).to(self.device)
        every = [Site(p) for p in MODEL_PARTS]
        every += [Site(p, i) for i, have in enumerate(self.parts.of_layer) for p in LAYER_PARTS if p in have]
        batch = Encoded(ids, torch.ones_like(ids, dtype=torch.bool), {})
        with observe(self, every) as seen:
            out = self.net(**self.inputs(batch), **self.no_cache)
        worst = residuals(self.architecture, self.net, seen, getattr(out, "logits", None))
        bad = {name: value for name, value in worst.items() if not value <= limit}
        if bad:
            lines = ", ".join(f"{name} off by {value:.2g}" for name, value in bad.items())
            raise SelfCheckFailed(f"sites of {self.name} cannot be trusted (limit {limit:g}): {lines}")
        return worst


def _resolve(name: str, progress: Progress) -> tuple[str, str]:
    """(folder or hub id, name for people)."""
    if name in bundled.NAMES:
        return str(bundled.fetch(name, progress)), name
    path = Path(name).expanduser()
    if name.endswith(".gguf"):
        if not path.is_file():
            raise ModelLoadFailed(f"{name}: no such file")
        return str(gguf.convert(path, progress=progress)), path.stem
    if path.is_dir():
        if not (path / "config.json").is_file():
            if (path / "adapter_config.json").is_file():
                raise ModelLoadFailed(
                    f"{name} holds an adapter, not a model: load the model that it is for, and put it on with "
                    f"edited(lm, Adapter.load({name!r}).edits()), or merge it: reprobe edit apply MODEL {name} --to NEW"
                )
            raise ModelLoadFailed(f"{name} is a folder without config.json: not a saved transformers model")
        return str(path), path.name
    if path.is_file():
        raise ModelLoadFailed(f"{name} is a file: a model is the folder of its config.json, or a .gguf file")
    if path.is_absolute() or name.startswith(("./", "../", "~")) or name.count("/") > 1:
        raise ModelLoadFailed(f"{name}: no such folder")
    return name, name


def _why_not(name: str, local: bool, e: Exception) -> str:
    first = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
    if local or name in bundled.NAMES or name.endswith(".gguf"):
        return f"{name} could not be loaded: {first}"
    near = difflib.get_close_matches(name, bundled.NAMES, n=1)
    return (
        f"{name!r} could not be loaded{f'. Did you mean {near[0]!r}?' if near else f': {first}'}\n"
        f"It was looked up as a hub id, since it is no bundled name ({', '.join(bundled.NAMES)}), no local folder and "
        "no .gguf file. Check the spelling, your network, and `hf auth login` for gated models."
    )


def _own_device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def _device(device: str | torch.device) -> torch.device:
    """A device that tensors can be put on; raises `UsageError` otherwise."""
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as e:  # what torch raises depends on how it was built
        gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)]
        raise UsageError(f"device {str(device)!r} cannot be used; this machine has {', '.join(['cpu', *gpus])}") from e
    return place


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in names:
        raise UsageError(f"unknown dtype {dtype!r}; one of {', '.join(names)}")
    return names[dtype]


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' bars and advice off the terminal, and give its settings back after."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _ids(told: int | Sequence[int] | None) -> frozenset[int]:
    """Token ids from a setting that is one, several or none."""
    return frozenset() if told is None else frozenset([told] if isinstance(told, int) else map(int, told))


def _roles(row: TokenisedText) -> np.ndarray:
    roles = np.full(len(row.ids), _Role.GENERATED)
    roles[: row.suffix] = _Role.PROMPT
    roles[row.suffix - 1] = _Role.LAST
    return roles


def _in_pack(layout: Layout, tokens: Sequence[Int[np.ndarray, " in_span"]]) -> Bool[np.ndarray, "rows columns"]:
    """Which places of a pack hold the given tokens of its texts."""
    mask = np.zeros(layout.real.size, np.bool_)
    for start, own in zip(layout.starts, tokens, strict=False):
        mask[layout.at[start + np.asarray(own, np.int64)]] = True
    return mask.reshape(layout.real.shape)


def _beginnings(
    rows: Sequence[TokenisedText], prompt: Int[np.ndarray, " rows"]
) -> tuple[list[tuple[int, int]], Int[np.ndarray, " rows"]]:
    """The distinct prompts as tokens, each as (prompt, tokens), and the number of each row's."""
    found: dict[tuple[int, bytes], int] = {}
    number = [
        found.setdefault((int(p), r.ids[: r.suffix].tobytes()), len(found)) for r, p in zip(rows, prompt, strict=True)
    ]
    return [(p, len(ids) // rows[0].ids.itemsize) for p, ids in found], np.asarray(number, np.int64)


def _require_spans(spans: Sequence[Mapping[str, Span]] | None, batch: Sequence[Prompt]) -> None:
    if spans is not None and len(spans) != len(batch):
        raise UsageError(f"{len(batch)} prompts but {len(spans)} span mappings; give one mapping per prompt")


def _is_chat(prompt: Any) -> bool:
    listed = not isinstance(prompt, str | Mapping) and hasattr(prompt, "__len__") and hasattr(prompt, "__getitem__")
    return listed and len(prompt) > 0 and isinstance(prompt[0], Mapping)


def _batch(prompts: Any) -> list[Prompt]:
    if isinstance(prompts, str) or _is_chat(prompts):
        return [prompts]
    batch = list(prompts) if isinstance(prompts, Iterable) and not isinstance(prompts, Mapping) else [prompts]
    if not batch:
        raise UsageError("no prompts were given")
    if strange := [p for p in batch if not (isinstance(p, str) or _is_chat(p))]:
        raise UsageError(
            f"a prompt is text or a list of chat messages (of a PromptSet: .texts), not {strange[0]!r:.80}"
        )
    return batch
