"""Causal tracing (Meng et al. 2022, arXiv:2202.05262, section 2): which states carry a fact to the answer.

Enters: a language model and facts that it knows. Leaves: a `TraceGrid`: of each fact, how probable its object is when
the subject is corrupted, and again when the clean state is put back at one token and one block. Three runs of a prompt:

- clean;
- corrupted: Gaussian noise of three standard deviations of the subjects' embeddings is added to the subject's tokens
  at `embed` (`Noise`), in `samples` seeded draws;
- restored: the corrupted run, in which `resid.post` of one token at one block is that of the clean run (`Replace`); for
  `attn.out` and `mlp.out`, whose single contributions are small, at all blocks of a window around that block.

The indirect effect is p(object | restored) − p(object | corrupted), the total effect p(object | clean) − p(object |
corrupted), each the mean over the draws; p of an object of several tokens is the product over them.

What is computed is what a restored state can change, and nothing twice. Left of the restored token t, and below the
restored block l, everything is as in the corrupted run, whose keys and values are kept: so a restored run is the tokens
from t on, in the blocks above l, and runs of one token at several blocks go through each block together. Of a window's
first block only token t changes, which is computed for all tokens at once. Windows that are cut off at block 0 begin
alike and part later. In the last block only the tokens that predict the object are computed, of the others keys and
values. Tokens before the subject have no effect: nothing there was corrupted. The result is that of a whole forward
pass per token and block, but for rounding.
"""

import contextlib
import hashlib
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from reprobe.control import Noise, Replace, steer
from reprobe.control.operators import widened
from reprobe.errors import DataError, UsageError
from reprobe.model.hooks import board_of
from reprobe.model.language_model import LanguageModel
from reprobe.model.packs import BUDGET
from reprobe.model.products import FastProducts
from reprobe.model.sites import Site
from reprobe.model.tail import Branches, Held, branches, hold, require_decoder
from reprobe.model.text import TokenisedText, tokenise
from reprobe.probing.artifact import Artifact, array, read, write
from reprobe.probing.intervals import ClusterBootstrap
from reprobe.progress import Progress, silent
from reprobe.prompts.fact import Fact, continuation
from reprobe.provenance import rebuilding, texts, versions

KIND = "causal trace"
Kind = Literal["resid.post", "attn.out", "mlp.out"]
KINDS: tuple[Kind, ...] = get_args(Kind)
#: What a token is to the subject. A subject of one token is its last, one token after the subject is the last later.
ROLES = ("first subject", "middle subject", "last subject", "first later", "middle later", "last later")


@dataclass(frozen=True)
class Settings:
    """`noise` in standard deviations of the subjects' embeddings, `samples` draws seeded by `seed`; which `kinds` are
    restored, at which `layers` (None: all), the last two kinds in a `window` of so many blocks: of block l those from
    l − window // 2 on."""

    noise: float = 3.0
    samples: int = 10
    window: int = 10
    kinds: tuple[Kind, ...] = KINDS
    layers: tuple[int, ...] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.noise < np.inf:
            raise UsageError(f"noise={self.noise}: a number above 0, of standard deviations; published is 3")
        for name in ("samples", "window"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}={getattr(self, name)}: 1 or more; published is 10")
        if bad := [kind for kind in self.kinds if kind not in KINDS]:
            raise UsageError(f"unknown kind {bad[0]!r}; one of {', '.join(KINDS)}")
        for name in ("kinds", "layers"):
            values = getattr(self, name)
            if values is not None and len(set(values)) < max(1, len(values)):
                raise UsageError(f"{name}={values}: one or more, each once")

    def span(self, kind: Kind, layer: int, n_layers: int) -> tuple[int, int]:
        """The blocks at which a kind is restored for `layer`: the first, and the first after them."""
        if kind == "resid.post":
            return layer, layer + 1
        first = layer - self.window // 2
        return max(0, first), min(n_layers, first + self.window)


@dataclass(frozen=True)
class Answer:
    """What a model says to a fact's prompt: `said`, greedily and as long as the true object, which has `probability`;
    `known` if that is the true object."""

    fact: Fact
    said: str
    probability: float
    known: bool


@dataclass(frozen=True, eq=False)
class Trace:
    """One fact. `tokens` are those of its prompt, tokens `subject[0]` … `subject[1]` − 1 the subject's.

    `clean` and `corrupted` are the probabilities of the object, `restored[k, i, t]` that with the k-th kind restored at
    token t and the i-th layer traced.
    """

    fact: Fact
    tokens: tuple[str, ...]
    subject: tuple[int, int]
    clean: float
    corrupted: float
    restored: Float[np.ndarray, "kinds layers tokens"]

    @property
    def total_effect(self) -> float:
        return self.clean - self.corrupted

    @property
    def effects(self) -> Float[np.ndarray, "kinds layers tokens"]:
        """The indirect effects."""
        return self.restored - self.corrupted

    @property
    def roles(self) -> tuple[str | None, ...]:
        """One of `ROLES` for each token, None before the subject."""
        (first, stop), n = self.subject, len(self.tokens)
        out: list[str | None] = [None] * first
        for begin, end, what in ((first, stop, "subject"), (stop, n, "later")):
            names = [f"middle {what}"] * (end - begin)
            if names:
                names[0], names[-1] = f"first {what}", f"last {what}"
            out += names
        return tuple(out)


@dataclass(frozen=True, eq=False)
class TraceGrid:
    """Traces of facts. `std` is the standard deviation of the noise, in units of `embed`."""

    traces: tuple[Trace, ...]
    settings: Settings
    layers: tuple[int, ...]
    std: float
    provenance: Mapping[str, Any]

    @cached_property
    def table(self) -> pl.DataFrame:
        """One line per fact, kind, layer and token: `effect` = `restored` − `corrupted`."""
        frames = []
        for number, trace in enumerate(self.traces):
            kinds, layers, tokens = trace.restored.shape
            frames.append(
                pl.DataFrame(
                    {
                        "fact": np.full(trace.restored.size, number),
                        "kind": np.repeat(np.array(self.settings.kinds), layers * tokens),
                        "layer": np.tile(np.repeat(np.array(self.layers), tokens), kinds),
                        "token": np.tile(np.arange(tokens), kinds * layers),
                        "text": list(trace.tokens) * (kinds * layers),
                        "role": list(trace.roles) * (kinds * layers),
                        "restored": trace.restored.ravel(),
                        "effect": trace.effects.ravel(),
                    },
                    schema_overrides={"role": pl.String},
                )
            )
        return pl.concat(frames)

    @cached_property
    def facts(self) -> pl.DataFrame:
        """One line per fact: its prompt, subject and object, and the probabilities of the object."""
        return pl.DataFrame(
            [
                {
                    "fact": i,
                    "id": t.fact.id,
                    "group": t.fact.group,
                    "prompt": t.fact.prompt,
                    "subject": t.fact.subject,
                    "object": t.fact.true,
                    "clean": t.clean,
                    "corrupted": t.corrupted,
                    "total_effect": t.total_effect,
                }
                for i, t in enumerate(self.traces)
            ]
        )

    @cached_property
    def averages(self) -> pl.DataFrame:
        """One line per kind, role and layer: the mean indirect effect over the `n` facts that have such a token, each
        the mean over its own, with its 95 % interval over groups of facts (null where there is one group only)."""
        lines: list[dict[str, Any]] = []
        for role in ROLES:
            have = [i for i, t in enumerate(self.traces) if role in t.roles]
            if not have:
                continue
            own = [self.traces[i].effects[..., [r == role for r in self.traces[i].roles]].mean(-1) for i in have]
            interval = _Interval([self._groups[i] for i in have])
            for k, j in np.ndindex(len(self.settings.kinds), len(self.layers)):
                mean, low, high = interval.of(np.array([effects[k, j] for effects in own]))
                where = {"kind": self.settings.kinds[k], "role": role, "layer": self.layers[j], "n": len(have)}
                lines.append(where | {"effect": mean, "effect_low": low, "effect_high": high})
        numbers = dict.fromkeys(("effect", "effect_low", "effect_high"), pl.Float64)
        order = pl.col("kind").replace_strict(list(KINDS), range(len(KINDS)))
        return pl.DataFrame(lines, schema_overrides=numbers).sort(order, maintain_order=True)

    @cached_property
    def totals(self) -> pl.DataFrame:
        """The means over facts of `clean`, `corrupted` and `total_effect`, with intervals as in `averages`."""
        interval = _Interval(self._groups)
        lines = []
        for name in ("clean", "corrupted", "total_effect"):
            mean, low, high = interval.of(self.facts[name].to_numpy())
            lines.append({"measure": name, "n": len(self.traces), "mean": mean, "low": low, "high": high})
        return pl.DataFrame(lines, schema_overrides={"low": pl.Float64, "high": pl.Float64})

    def peak(self, kind: Kind, role: str) -> dict[str, Any]:
        """The line of `averages` with the greatest effect of a kind at a role; of equals the first block's. Raises
        `UsageError` if there is none."""
        lines = self.averages.filter((pl.col("kind") == kind) & (pl.col("role") == role))
        if not len(lines):
            raise UsageError(f"no {kind} of a {role} token was traced; kinds: {', '.join(self.settings.kinds)}")
        return lines.sort("effect", descending=True, maintain_order=True).row(0, named=True)

    @property
    def peaks(self) -> list[dict[str, Any]]:
        """The `peak` of every kind and role that was traced, in the order of `averages`."""
        pairs = self.averages.select("kind", "role").unique(maintain_order=True)
        return [self.peak(kind, role) for kind, role in pairs.iter_rows()]

    @property
    def _groups(self) -> list[str]:
        return [t.fact.group or f"{i}" for i, t in enumerate(self.traces)]

    # -- files and figures -------------------------------------------------------------------------------------

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write one safetensors file, whole or not at all; `ArtifactExists` unless `overwrite`."""
        header = {
            "settings": asdict(self.settings),
            "layers": list(self.layers),
            "std": self.std,
            "provenance": dict(self.provenance),
            "traces": [
                {
                    "fact": t.fact.to_json(),
                    "tokens": list(t.tokens),
                    "subject": list(t.subject),
                    "clean": t.clean,
                    "corrupted": t.corrupted,
                }
                for t in self.traces
            ],
        }
        arrays = {f"restored.{i}": t.restored for i, t in enumerate(self.traces)}
        write(Path(path), KIND, Artifact(header, arrays), overwrite=overwrite)
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> "TraceGrid":
        """What `save` wrote. Raises `ArtifactMissing`, `CorruptArtifact`, or `UsageError`."""
        found = read(Path(path), KIND)
        with rebuilding(f"{path} is not a causal trace"):
            header = found.header
            known: dict[str, Any] = {
                k: tuple(v) if isinstance(v, list) else v for k, v in dict(header["settings"]).items()
            }
            settings = Settings(**known)
            layers = tuple(operator.index(layer) for layer in header["layers"])
            traces = []
            for i, t in enumerate(header["traces"]):
                tokens, (first, stop) = texts(t["tokens"]), map(operator.index, t["subject"])
                if not 0 <= first < stop <= len(tokens):
                    raise ValueError(f"tokens {first}–{stop} of {len(tokens)} are no subject")
                restored = array(found.arrays, f"restored.{i}", "f", len(settings.kinds), len(layers), len(tokens))
                traces.append(
                    Trace(
                        Fact.from_json(t["fact"]),
                        tokens,
                        (first, stop),
                        float(t["clean"]),
                        float(t["corrupted"]),
                        restored,
                    )
                )
            if len({t.restored.dtype for t in traces}) != 1 or not layers or min(layers) < 0:
                raise ValueError("it has no facts, no layers, or numbers of several kinds")
            return cls(tuple(traces), settings, layers, float(header["std"]), dict(header["provenance"]))

    def plot(self) -> Any:
        """A matplotlib `Figure`: the mean effect of every role and block, a panel per kind. `reprobe.report` has the
        maps of single facts, and curves with intervals."""
        from matplotlib.figure import Figure

        kinds = self.settings.kinds
        figure = Figure(figsize=(4.6 * len(kinds), 3.0), layout="constrained")
        for axes, kind in zip(figure.subplots(1, len(kinds), squeeze=False, sharey=True)[0], kinds, strict=True):
            lines = self.averages.filter(pl.col("kind") == kind)
            roles = lines["role"].unique(maintain_order=True).to_list()
            values = lines["effect"].to_numpy().reshape(len(roles), -1)
            image = axes.imshow(values, aspect="auto", cmap="Purples", vmin=0.0)
            axes.set(title=f"{kind} restored", xlabel="block")
            axes.set_yticks(range(len(roles)), roles)
            step = -(-len(self.layers) // 8)
            axes.set_xticks(range(0, len(self.layers), step), [str(layer) for layer in self.layers[::step]])
            figure.colorbar(image, ax=axes, label="mean indirect effect" if kind == kinds[-1] else None)
        return figure


class _Interval:
    """Means over facts, with bounds over their groups; one set of resamples serves every mean."""

    def __init__(self, groups: Sequence[str]) -> None:
        number = {group: i for i, group in enumerate(dict.fromkeys(groups))}
        codes = np.array([number[group] for group in groups])
        self._draws = ClusterBootstrap.draw(codes, seed=0) if len(number) > 1 else None

    def of(self, values: Float[np.ndarray, " facts"]) -> tuple[float, float | None, float | None]:
        if self._draws is None:
            return float(values.mean()), None, None
        tiny = np.finfo(float).tiny  # for draws without any fact
        low, high = self._draws.bounds(lambda drawn: (values @ drawn) / np.maximum(drawn.sum(0), tiny))
        return float(values.mean()), float(low), float(high)


# -- what the model knows -------------------------------------------------------------------------------------------


@torch.no_grad()
def ask(lm: LanguageModel, facts: Sequence[Fact]) -> list[Answer]:
    """What the model says to each fact's prompt. Raises `DataError` for a fact without a true object."""
    objects = [continuation(fact.prompt, _true(fact)) for fact in facts]
    out = []
    for fact, run in zip(facts, lm.continued([f.prompt for f in facts], objects) if facts else [], strict=True):
        states = run.states[:-1]
        said = lm.unembed(states).argmax(-1).cpu().numpy()
        each = lm.token_logprobs(states, np.arange(len(said)), run.tokens)
        text = str(lm.tokenizer.decode(said)).strip()
        out.append(Answer(fact, text, float(np.exp(each.sum())), bool((said == run.tokens).all())))
    return out


def known(lm: LanguageModel, facts: Sequence[Fact], *, limit: int | None = None) -> list[Fact]:
    """The facts whose true object the model says, greedily; the first `limit` of them."""
    found: list[Fact] = []
    for start in range(0, len(facts), _ASKED_AT_ONCE):
        found += [a.fact for a in ask(lm, facts[start : start + _ASKED_AT_ONCE]) if a.known]
        if limit is not None and len(found) >= limit:
            return found[:limit]
    return found


#: Facts that `known` asks before it looks whether they are enough.
_ASKED_AT_ONCE = 64
#: Unknown facts that an error lists.
_LISTED = 5


def _true(fact: Fact) -> str:
    if fact.true is None:
        raise DataError(f"the fact {fact.id or fact.prompt!r} about {fact.subject!r} has no true object to be traced")
    return fact.true


def _require_known(lm: LanguageModel, facts: Sequence[Fact]) -> None:
    unknown = [answer for answer in ask(lm, facts) if not answer.known]
    if unknown:
        listed = [
            f"{a.fact.prompt!r}: {a.fact.true!r} has probability {a.probability:.3g}, and it says {a.said!r}"
            for a in unknown[:_LISTED]
        ]
        if len(unknown) > _LISTED:
            listed.append(f"… and {len(unknown) - _LISTED} more")
        raise UsageError(
            f"{lm.name} does not know {len(unknown)} of {len(facts)} facts, and there is nothing to trace then:\n"
            + "\n".join(f"  {line}" for line in listed)
            + "\nTrace those that it knows (tracing.known(lm, facts); --unknown drop), or these too (unknown='keep')"
        )


# -- tracing --------------------------------------------------------------------------------------------------------


def trace(
    lm: LanguageModel,
    facts: Fact | Sequence[Fact],
    *,
    settings: Settings | None = None,
    sigma: float | None = None,
    unknown: Literal["refuse", "keep"] = "refuse",
    progress: Progress = silent,
) -> TraceGrid:
    """Trace each fact at every token, block and kind.

    `sigma` is the standard deviation of the subjects' embeddings (default: that of these facts, `subject_sigma`). The
    noise of a fact depends on its prompt and the seed alone. Facts that the model does not know are refused unless
    `unknown="keep"`. Raises `DataError` for a fact without a true object, or whose subject and object share a token;
    `UnknownSite` for layers that the model lacks; `UsageError` while the model is being steered; `PromptTooLong`;
    `UnsupportedOperation` for encoders.
    """
    given, how = [facts] if isinstance(facts, Fact) else list(facts), settings or Settings()
    if not given:
        raise UsageError("no facts were given")
    if unknown not in ("refuse", "keep"):
        raise UsageError(f"unknown={unknown!r}: 'refuse' facts that the model does not know, or 'keep' them")
    require_decoder(lm)
    if board_of(lm).changed:
        raise UsageError("the model is being steered, and the trace would be of that: trace outside the context")
    layers = tuple(range(lm.n_layers)) if how.layers is None else how.layers
    for layer in layers:
        if layer < 0:
            raise UsageError(f"layer {layer}: blocks count from 0 to {lm.n_layers - 1}")
        for kind in how.kinds:
            lm.parts.require(Site(kind, layer))
    rows = _tokenised(lm, given)
    if unknown == "refuse":
        _require_known(lm, given)
    std = how.noise * (_sigma(lm, rows) if sigma is None else sigma)
    if not 0 < std < np.inf:
        raise UsageError(f"noise with a standard deviation of {std} corrupts nothing; sigma is a number above 0")
    traces = []
    with FastProducts(), torch.no_grad():
        for i, (fact, row) in enumerate(zip(given, rows, strict=True)):
            progress("tracing facts", i, len(given))
            traces.append(_trace(lm, fact, row, how, layers, std))
    progress("tracing facts", len(given), len(given))
    return TraceGrid(
        tuple(traces),
        how,
        layers,
        std,
        {"method": "causal tracing", "identity": lm.identity.to_json(), "versions": versions()},
    )


def corruption(fact: Fact, subject: tuple[int, int], settings: Settings, std: float) -> Noise:
    """The noise on a fact's subject, its tokens `subject[0]` … `subject[1]` − 1, in a batch of one row per draw.

    Seeded by the setting's seed and the prompt alone: facts have draws of their own.
    """
    digest = hashlib.blake2b(f"{settings.seed} {fact.prompt}".encode(), digest_size=6).digest()
    seeds = tuple(int.from_bytes(digest, "little") + i for i in range(settings.samples))
    return Noise(std, site="embed", seed=seeds, tokens=f"positions:{subject[0]}:{subject[1]}")


def subject_sigma(lm: LanguageModel, facts: Sequence[Fact]) -> float:
    """Standard deviation of all components of the embeddings of all subjects' tokens, without positions', as `embed`
    has them."""
    return _sigma(lm, _tokenised(lm, facts))


def _tokenised(lm: LanguageModel, facts: Sequence[Fact]) -> list[TokenisedText]:
    """Each prompt with its object; raises `DataError` where that cannot be told from the subject."""
    rows = tokenise(
        lm.tokenizer,
        [fact.prompt for fact in facts],
        spans=[{"subject": fact.span} for fact in facts],
        suffixes=[continuation(fact.prompt, _true(fact)) for fact in facts],
        context=lm.context,
    )
    for fact, row in zip(facts, rows, strict=True):
        if row.spans["subject"][-1] >= row.suffix:
            raise DataError(f"the subject and the object of {fact.prompt!r} → {fact.true!r} share a token")
    return rows


@torch.no_grad()
def _sigma(lm: LanguageModel, rows: Sequence[TokenisedText]) -> float:
    ids = torch.from_numpy(np.concatenate([row.ids[row.spans["subject"]] for row in rows])).to(lm.device)
    scale = lm.architecture.row.embedding_scale(lm.net.config)
    if scale is None:  # a norm stands between: what enters the first block is what the norm makes of them
        vectors = hold(lm, ids[:, None], [Site("embed")]).seen[Site("embed")]
    else:
        vectors = lm.net.get_input_embeddings().weight[ids] * scale
    return float(vectors.double().std(correction=0))


@dataclass(frozen=True)
class _Restored:
    """A state restored at one token around `layer`: runs begin after block `start`, and end to be held there before
    block `stop`. Where another run of the same start is held longer, this one is its copy until then."""

    layer: int
    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class _Fact:
    """The clean and the corrupted run of a fact's prompt, with all but the last token of its object."""

    lm: LanguageModel
    clean: Held
    noisy: Held
    first: int
    asked: int
    targets: np.ndarray
    _branches: dict[int, Branches] = field(default_factory=dict)

    def at(self, column: int) -> Branches:
        """The blocks for the columns from here on, behind the corrupted run."""
        if column not in self._branches:
            self._branches[column] = branches(self.lm, self.noisy, column)
        return self._branches[column]

    def stream(self, depth: int) -> Float[Tensor, "samples columns d_model"]:
        """The corrupted run's input of block `depth`, which is the output of the one before."""
        return self.noisy.seen[Site("resid.post", depth - 1) if depth else Site("embed")]

    def probability(self, end: Float[Tensor, "rows asked d_model"]) -> Float[np.ndarray, " rows"]:
        """Probability of the object, given the states after the final norm that predict its tokens."""
        rows = end.shape[0]
        each = self.lm.token_logprobs(end.flatten(0, 1), np.arange(rows * self.asked), np.tile(self.targets, rows))
        out: np.ndarray = np.exp(each.reshape(rows, self.asked).sum(1))
        return out

    @contextlib.contextmanager
    def restoring(self, kind: Kind, layer: int, tokens: str, rows: Sequence[bool]) -> Iterator[None]:
        """Put the clean state at a site back, in the rows (each of all samples) for which that is said."""
        site = Site(kind, layer)
        if kind == "resid.post" or not any(rows):
            yield
            return
        strength = 1.0 if all(rows) else np.repeat(np.asarray(rows, np.float64), len(self.noisy.ids))
        values = widened(self.clean.seen[site][0]).cpu().numpy()
        with steer(self.lm, Replace(values, site=site, tokens=tokens, strength=strength)):
            yield


def _trace(
    lm: LanguageModel, fact: Fact, row: TokenisedText, how: Settings, layers: Sequence[int], std: float
) -> Trace:
    ids = torch.from_numpy(row.ids[:-1]).to(lm.device)  # the object's last token predicts nothing that is asked
    first, stop = int(row.spans["subject"][0]), int(row.spans["subject"][-1]) + 1
    posts = [Site("resid.post", layer) for layer in range(lm.n_layers)]
    contributions = [Site(kind, p.layer) for kind in how.kinds if kind != "resid.post" for p in posts]
    clean = hold(lm, ids[None], [*posts, *contributions])
    with steer(lm, corruption(fact, (first, stop), how, std)):
        noisy = hold(lm, ids.expand(how.samples, -1), [Site("embed"), *posts])
    known = _Fact(lm, clean, noisy, first, len(row.ids) - row.suffix, row.ids[row.suffix :])
    corrupted = float(known.probability(noisy.end[:, row.suffix - 1 :]).mean())
    restored = np.full((len(how.kinds), len(layers), row.suffix), corrupted)
    plans = [[_Restored(layer, *how.span(kind, layer, lm.n_layers)) for layer in layers] for kind in how.kinds]
    begun = [_begun(known, kind, {run.start for run in plan}) for kind, plan in zip(how.kinds, plans, strict=True)]
    for t in range(first, row.suffix):
        here, ending = known.at(t), known.at(row.suffix - 1)
        size = max(1, BUDGET.get(lm.device.type, BUDGET["cpu"]) // (how.samples * (len(ids) - t)))
        for k, kind in enumerate(how.kinds):
            order = sorted(plans[k], key=lambda run: run.layer)
            for runs in (order[i : i + size] for i in range(0, len(order), size)):
                for run, p in _probabilities(known, kind, runs, begun[k], here, ending).items():
                    restored[k, layers.index(run.layer), t] = p
    tokens = tuple(str(lm.tokenizer.decode([int(i)])) for i in row.ids[: row.suffix])
    return Trace(
        fact, tokens, (first, stop), float(known.probability(clean.end[:, row.suffix - 1 :])[0]), corrupted, restored
    )


def _begun(known: _Fact, kind: Kind, starts: set[int]) -> dict[int, Float[Tensor, "samples columns d_model"]]:
    """After each block where runs begin, the state that a token has when it alone was restored in that block.

    In its first block a restored token changes no other: they read what it was before. So one run, in which all tokens
    are restored, has them all.
    """
    if kind == "resid.post":
        n = len(known.noisy.ids)
        return {start: known.clean.seen[Site(kind, start)].expand(n, -1, -1)[:, known.first :] for start in starts}
    out = {}
    for start in starts:
        with known.restoring(kind, start, "all", [True]):
            out[start] = known.at(known.first).run(start, known.stream(start)[:, known.first :])
    return out


def _probabilities(
    known: _Fact,
    kind: Kind,
    runs: Sequence[_Restored],
    begun: Mapping[int, Float[Tensor, "samples columns d_model"]],
    here: Branches,
    ending: Branches,
) -> dict[_Restored, float]:
    """The object's mean probability in runs with token `here.first` restored; `runs` in the order of their starts."""
    t, last = here.first, known.lm.n_layers - 1
    samples = len(known.noisy.ids)
    leaders = {start: max(same, key=lambda run: run.stop) for start, same in groupby(runs, key=lambda run: run.start)}
    held: list[_Restored] = []
    h = known.stream(0)[:0]
    for depth in range(runs[0].start, last + 1):
        if held:
            with known.restoring(kind, depth, f"positions:{t}", [run.stop > depth for run in held]):
                h = here.run_end(depth, h, ending) if depth == last else here.run(depth, h)
        parts = [h] if held else []
        for run in runs:
            leader = leaders[run.start]
            if run.start == depth and (run is leader or run.stop == depth + 1):
                state = torch.cat([begun[depth][:, t - known.first, None], known.stream(depth + 1)[:, t + 1 :]], 1)
                parts.append(state[:, ending.first - t :] if depth == last else state)
            elif run is not leader and run.start < depth and run.stop == depth + 1:
                at = held.index(leader) * samples
                parts.append(h[at : at + samples])
            else:
                continue
            held.append(run)
        h = torch.cat(parts) if len(parts) > 1 else parts[0]
    norm = known.lm.architecture.final_norm(known.lm.net)
    found = known.probability(h if norm is None else norm(h)).reshape(len(held), samples).mean(1)
    return dict(zip(held, map(float, found), strict=True))
