"""Low-Rank Representation Adaptation (LoRRA; Zou et al. 2023, arXiv:2310.01405, algorithm 1): a contrast, trained in.

Enters: a language model; texts, each a prompt and a response, the prompt also in a positive and a negative version, or
directions to move along. Leaves: an `Adapter`, low-rank changes of the model's own matrices with which it represents
the response after the plain prompt as it did before, moved towards the positive version and away from the negative:
h + α(h⁺ − h⁻) + β·v. Training needs peft (the extra `train`); using what was trained does not. The model is as it was.

Layers. Everything here counts blocks from 0 and speaks of sites: the target `resid.post@l` is the output of block l,
which the blocks 0 … l make, so that by default these are adapted, up to the highest target. The published script counts
transformers' `hidden_states`, where entry l is the output of block l−1: its targets 10, 12, …, 20 of 32 are
`resid.post@9`, 11, …, 19, and of the blocks 0 … 20 that it adapts the last never gets a gradient.

Departures: means are over real tokens of responses only (the published code also counts masked ones, as zeros), and
over all tokens of a step, however it is cut into passes; only the adapter's own dropout is active while training.
"""

import contextlib
import copy
import importlib.util
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from reprobe.control.adapters import Adapter, Factors
from reprobe.control.edits import Matrix
from reprobe.control.ledger import ledger_of
from reprobe.control.model_folder import refuse_existing
from reprobe.errors import (
    ArtifactExists,
    IdentityMismatch,
    TrainingFailed,
    UnsupportedOperation,
    UsageError,
)
from reprobe.methods.repe import Streams
from reprobe.model.hooks import board_of, capture
from reprobe.model.language_model import Encoded, LanguageModel, Prompt
from reprobe.model.monitor import checked
from reprobe.model.sites import Site, ranges
from reprobe.model.tail import align
from reprobe.model.text import TokenisedText, tokenise
from reprobe.probing import artifact
from reprobe.probing.artifact import Artifact
from reprobe.probing.direction import Direction
from reprobe.progress import Progress, silent
from reprobe.provenance import digest, rebuilding, versions

#: The published targets, as outputs of blocks, and the depth of the model that they are of.
_TARGETS, _DEPTH = (9, 11, 13, 15, 17, 19), 32
#: Bytes of targets that a training keeps; what goes beyond is computed again each time that it is needed.
_KEEP = 2**30
_CHECKPOINT = "lorra checkpoint"
#: Kinds of random numbers, beside the seed.
_START, _ORDER, _DROPOUT = range(3)
#: What a training keeps of each parameter: itself, and Adam's running means of its gradient and of its square.
_KEPT = ("parameter", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Settings:
    """How to train; the defaults are the published ones.

    Targets: `alpha` is α, `beta` the strength of directions in units of their scale. `sites` are `resid.post` sites or
    patterns; by default the directions' own, or else every second block between 28 % and 60 % of the depth. Of each
    response the first `max_tokens` tokens count.
    Adapter: `rank`, `lora_alpha` and `dropout` of LoRA on `modules` (ends of paths such as "q_proj" or "mlp.down_proj";
    by default the layers that make queries and values, and where these are one, keys) of `blocks` (by default 0 up to
    the highest target).
    Training: `steps` of Adam at `rate`; each takes `batch` × `accumulate` texts, `batch` of them in one pass. `seed`
    decides the start, the order of the texts and the dropout.
    """

    alpha: float = 5.0
    beta: float = 1.0
    sites: str | tuple[str, ...] | None = None
    blocks: tuple[int, ...] | None = None
    modules: tuple[str, ...] | None = None
    rank: int = 8
    lora_alpha: int = 16
    dropout: float = 0.05
    steps: int = 70
    batch: int = 16
    accumulate: int = 1
    rate: float = 3e-4
    max_tokens: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        counts = ("rank", "steps", "batch", "accumulate", "max_tokens")
        if bad := [name for name in counts if getattr(self, name) < 1]:
            raise UsageError(f"{bad[0]}={getattr(self, bad[0])}: at least 1 is needed")
        if not (self.rate > 0 and np.isfinite(self.rate) and self.lora_alpha > 0 and 0 <= self.dropout < 1):
            raise UsageError(
                f"rate={self.rate}, lora_alpha={self.lora_alpha}, dropout={self.dropout}: the first two are positive, "
                "dropout is from 0 to below 1"
            )
        if not (np.isfinite(self.alpha) and np.isfinite(self.beta)) or (self.alpha == 0 and self.beta == 0):
            raise UsageError(f"alpha={self.alpha} and beta={self.beta} ask for no change")
        if self.seed < 0:
            raise UsageError(f"seed={self.seed}: a seed is not negative")


def templated(prompts: Sequence[str], template: str = "{}", *, chat: bool = False) -> list[Prompt]:
    """Each prompt put into a template, in the place of `{}`: one of the three versions that make `Streams`.

    With `chat` each becomes a user's message, for the tokenizer's own template.
    """
    texts = [template.replace("{}", prompt) for prompt in prompts]
    return [[{"role": "user", "content": text}] for text in texts] if chat else list(texts)


def train(
    lm: LanguageModel,
    prompts: Streams | Sequence[Prompt],
    responses: Sequence[str],
    *,
    to: str | Path,
    directions: Direction | Iterable[Direction] | Mapping[Site, Direction] | None = None,
    settings: Settings | None = None,
    resume: bool = False,
    checkpoint: int = 10,
    allow_mismatch: bool = False,
    progress: Progress = silent,
) -> Adapter:
    """Train an adapter and write it to the new folder `to`; see `Adapter` for what can be done with it.

    `prompts` are `Streams` (base, positive and negative versions; see `templated`), or plain prompts if there
    are `directions` only. A leading blank belongs to the response. The loss is the mean over sites and response tokens
    of ‖h_adapted − [h + α(h⁺ − h⁻) + β·scale·v̂]‖₂; the adapter starts as no change, so that the first is the length
    of the way.

    Every `checkpoint` steps the state is written beside `to` (`to` + ".checkpoint.safetensors"); `resume` goes on with
    it, to the same adapter as without the break, or returns an adapter that is finished. Raises `ArtifactExists` if
    something stands there and `resume` is not given, `IdentityMismatch` if what stands there is of another training or
    directions are of another model (unless `allow_mismatch`), `UsageError`, `UnsupportedOperation` for encoders,
    quantised matrices and steered models, `TrainingFailed`.
    """
    require_peft()
    how = settings or Settings()
    if checkpoint < 1:
        raise UsageError(f"checkpoint={checkpoint}: a checkpoint is written every 1 or more steps")
    target = Path(to)
    if not resume:
        require_new(target)
    if lm.architecture.kind != "decoder":
        raise UnsupportedOperation(f"{lm.name} is an encoder ({lm.architecture.family}): it writes no responses")
    if board_of(lm).changed or board_of(lm).followed:
        raise UnsupportedOperation("the model is being steered or monitored: leave that context first")
    along = {} if directions is None else dict(checked(lm, directions, "LoRRA", allow_mismatch=allow_mismatch))
    if not isinstance(prompts, Streams) and not along:
        raise UsageError("there is nothing to move towards: give Streams (three versions of the prompts) or directions")
    sites = _targets(lm, how, along)
    texts = _texts(lm, prompts, responses, how)
    config = _config(lm, how, sites)
    plan = _plan(lm, how, sites, texts, along, config)

    unfinished = _unfinished(target)
    if target.exists():  # only with resume
        found = Adapter.load(target)
        _require_same(found.provenance.get("plan", {}), plan, target)
        unfinished.unlink(missing_ok=True)
        return found
    training = _Training(lm, how, sites, texts, along, config)
    if unfinished.exists():
        training.take_up(unfinished, plan)
    while training.done < how.steps:
        loss = training.step()
        if training.done % checkpoint == 0 and training.done < how.steps:
            training.put_down(unfinished, plan)
        progress(f"train: loss {loss:.4g}", training.done, how.steps)
    made = training.adapter(plan)
    made.save(target)
    unfinished.unlink(missing_ok=True)
    return made


def require_peft() -> None:
    """Raise `UsageError` where peft is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise UsageError(
            "training an adapter needs peft, which is not installed: pip install 'reprobe-lm[train]' (from a checkout: "
            "uv sync --extra train). Using a trained one does not"
        )


def require_new(to: str | Path) -> None:
    """Raise `ArtifactExists` if an adapter cannot be trained to `to` without `resume`."""
    target, unfinished = Path(to), _unfinished(Path(to))
    refuse_existing(target)
    if unfinished.exists():
        raise ArtifactExists(
            f"{unfinished} is left of a training that was not finished: go on with resume=True (--resume), or delete it"
        )


def _unfinished(target: Path) -> Path:
    """Where the checkpoint of a training is."""
    return target.with_name(f"{target.name}.checkpoint.safetensors")


def default_targets(n_layers: int) -> tuple[Site, ...]:
    """The published target blocks, at the same shares of the depth (published: of 32 blocks)."""
    layers = (round((layer + 1) * n_layers / _DEPTH) - 1 for layer in _TARGETS)
    return tuple(Site("resid.post", layer) for layer in dict.fromkeys(max(0, layer) for layer in layers))


# -- what is asked for --------------------------------------------------------------------------------------------


def _targets(lm: LanguageModel, how: Settings, along: Mapping[Site, Any]) -> tuple[Site, ...]:
    """The target sites, lowest first."""
    found = (tuple(along) or default_targets(lm.n_layers)) if how.sites is None else lm.sites(how.sites)
    for site in (*found, *along):
        if site.part != "resid.post":
            other = f" ({site} is resid.post@{site.layer - 1})" if site.part == "resid.pre" and site.layer else ""
            raise UsageError(f"{site}: an adapter moves the stream; its targets are resid.post sites{other}")
    if lacking := [str(site) for site in along if site not in found]:
        raise UsageError(f"there is a direction at {lacking[0]}, which is not among the targets; add it to sites")
    return tuple(sorted(found, key=lambda site: site.layer or 0))


@dataclass(frozen=True, eq=False)
class _Texts:
    """The tokens of the texts: `versions[0]` after the plain prompt, then after the positive and the negative one, if
    there are such. `suffix` is the first token of a response, and all versions of one have the same."""

    versions: tuple[tuple[TokenisedText, ...], ...]

    def __len__(self) -> int:
        return len(self.versions[0])

    @property
    def digest(self) -> str:
        return digest([[[row.ids.tolist(), int(row.suffix)] for row in rows] for rows in self.versions])


def _texts(lm: LanguageModel, prompts: Streams | Sequence[Prompt], responses: Sequence[str], how: Settings) -> _Texts:
    given: tuple[Sequence[Prompt], ...] = prompts.rows if isinstance(prompts, Streams) else (prompts,)
    if isinstance(responses, str) or isinstance(given[0], str) or len(given[0]) != len(responses) or not responses:
        raise UsageError(f"as many responses as prompts make texts to train on: {len(given[0])} and {len(responses)}")
    if any(not response for response in responses):
        raise UsageError(f"response {list(responses).index('')} is empty: there is no token to move")
    found: list[tuple[TokenisedText, ...]] = []
    for version in given:
        coded = tokenise(lm.tokenizer, version, suffixes=responses, context=lm.context, truncate="right")
        if first := [i for i, row in enumerate(coded) if row.suffix < 1]:
            raise UsageError(
                f"response {first[0]} has nothing before it: give a prompt, or a tokenizer that adds a "
                "beginning-of-text token"
            )
        found.append(tuple(replace(row, ids=row.ids[: row.suffix + how.max_tokens]) for row in coded))
    for which, rows in zip(("positive", "negative"), found[1:], strict=False):
        for i, (plain, row) in enumerate(zip(found[0], rows, strict=True)):
            if not np.array_equal(plain.ids[plain.suffix :], row.ids[row.suffix :]):
                raise UsageError(
                    f"response {i} has other tokens after its {which} prompt than after its base prompt: let the "
                    "prompts end alike (or shorten them, if they leave no room in the context)"
                )
    if len(found) == 3 and all(np.array_equal(a.ids, b.ids) for a, b in zip(found[1], found[2], strict=True)):
        raise UsageError("the positive and the negative prompts are the same: there is no contrast")
    return _Texts(tuple(found))


def _config(lm: LanguageModel, how: Settings, sites: Sequence[Site]) -> Any:
    """peft's configuration. Raises `UsageError` for blocks or modules that cannot be adapted or would never learn."""
    from peft import LoraConfig

    highest = sites[-1].layer or 0
    blocks = tuple(range(highest + 1)) if how.blocks is None else tuple(sorted(set(how.blocks)))
    if not blocks or blocks[0] < 0 or blocks[-1] > highest:
        raise UsageError(
            f"blocks {', '.join(map(str, blocks)) or 'none'} cannot be adapted: the highest target is {sites[-1]}, "
            f"made by blocks {ranges(range(highest + 1))}"
        )
    ends = how.modules or lm.architecture.queries_values(lm.net)
    paths = {module: path for path, module in lm.net.named_modules()}
    for block in blocks:
        inside = dict(lm.architecture.blocks(lm.net)[block].named_modules())
        linear = [path for path, module in inside.items() if getattr(getattr(module, "weight", None), "ndim", 0) == 2]
        for end in ends:
            chosen = [path for path in linear if f".{path}".endswith(f".{end}")]
            if not chosen:
                raise UsageError(f"no linear layer of block {block} is called {end!r}; they are: {', '.join(linear)}")
            for path in chosen:
                # Quantised or shared matrices are refused here, and not when the adapter is to be used.
                conv = Matrix.of(lm, f"{paths[inside[path]]}.weight").inputs_first
    return LoraConfig(
        r=how.rank,
        lora_alpha=how.lora_alpha,
        lora_dropout=how.dropout,
        target_modules=list(ends),
        layers_to_transform=list(blocks),
        layers_pattern=lm.architecture.row.blocks.rpartition(".")[2],
        fan_in_fan_out=conv,
        task_type="CAUSAL_LM",
        base_model_name_or_path=lm.net.name_or_path or None,
    )


def _plan(
    lm: LanguageModel, how: Settings, sites: Sequence[Site], texts: _Texts, along: Mapping[Site, Any], config: Any
) -> dict[str, Any]:
    """All that decides the result, as plain JSON: equal plans train equal adapters."""
    ledger = ledger_of(lm)
    chosen = {
        "sites": [str(site) for site in sites],
        "blocks": sorted(config.layers_to_transform),
        "modules": sorted(config.target_modules),
    }
    base = {k: v for k, v in ledger.base.to_json().items() if k not in ("name", "revision")}
    return {
        "settings": asdict(how) | chosen,
        "model": base | {"edits": list(ledger.digests)},
        "texts": {"number": len(texts), "versions": len(texts.versions), "sha256": texts.digest},
        "directions": {str(site): digest(direction.step.tolist()) for site, direction in along.items()},
    }


def _require_same(there: Mapping[str, Any], here: Mapping[str, Any], place: Path) -> None:
    known = {part: dict(there.get(part, {})) for part in here}  # an adapter need not come from a training
    lines = [
        f"  {part}, {name}: {known[part].get(name)} there, {here[part].get(name)} here"
        for part in here
        for name in sorted({*known[part], *here[part]})
        if known[part].get(name) != here[part].get(name)
    ]
    if lines:
        raise IdentityMismatch(f"{place} is of another training:\n" + "\n".join(lines))


# -- training -----------------------------------------------------------------------------------------------------


class _Training:
    """An adapter on the way: a twin of the network that shares its tensors and has the low-rank layers, and Adam.

    What is random in a step depends on the seed and the number of the step alone, so that parameters, Adam's means and
    the losses are all there is to a checkpoint.
    """

    def __init__(
        self,
        lm: LanguageModel,
        how: Settings,
        sites: tuple[Site, ...],
        texts: _Texts,
        along: Mapping[Site, Any],
        config: Any,
    ) -> None:
        from peft import inject_adapter_in_model

        self._lm, self._how, self._sites, self._texts, self._config = lm, how, sites, texts, config
        self.losses: list[float] = []
        self._targets: dict[int, Tensor] = {}
        twin = _twin(lm.net)
        with self._drawn(_START):
            inject_adapter_in_model(config, twin)
        self._twin = LanguageModel(twin, lm.tokenizer, name=lm.name)
        for name, module in twin.named_modules():
            if name.endswith("lora_dropout"):
                module.train()
        self._parameters = {name: p for name, p in twin.named_parameters() if p.requires_grad}
        for p in self._parameters.values():
            p.data = p.data.to(_wide(lm.dtype))
        self._adam = torch.optim.Adam(self._parameters.values(), lr=how.rate)
        width, wide = lm.d_model, _wide(lm.dtype)
        shifts = [along[s].step * how.beta if s in along else np.zeros(width) for s in sites]
        self._shift = torch.from_numpy(np.stack(shifts)).to(device=lm.device, dtype=wide)[:, None] if along else None

    @property
    def done(self) -> int:
        """Steps so far."""
        return len(self.losses)

    def step(self) -> float:
        """One step of Adam; returns the loss before it."""
        how, number = self._how, self.done
        order = _order(len(self._texts), how.seed, number * how.batch * how.accumulate)
        passes = [list(islice(order, how.batch)) for _ in range(how.accumulate)]
        plain = self._texts.versions[0]
        terms = len(self._sites) * sum(len(plain[i].ids) - plain[i].suffix for i in chain(*passes))
        total = 0.0
        self._adam.zero_grad()
        with self._drawn(_DROPOUT, number):
            for chosen in passes:
                part = self._distances(chosen).sum() / terms
                torch.autograd.backward(part)
                total += float(part.detach())
        if not np.isfinite(total):
            raise TrainingFailed(
                f"the loss of step {number} is {total}: a lower rate than {how.rate} or a smaller alpha than "
                f"{how.alpha} may help; half precision may not hold h + α(h⁺ − h⁻)"
            )
        self._adam.step()
        self.losses.append(total)
        return total

    def _distances(self, chosen: Sequence[int]) -> Float[Tensor, "sites tokens"]:
        """How far each response token of these texts is from its target."""
        target = torch.cat([self._target(i) for i in chosen], dim=1)
        moved = _states(self._twin, [self._texts.versions[0][i] for i in chosen], self._sites, gradients=True)
        distances: Tensor = torch.linalg.vector_norm(moved - target, dim=-1)
        return distances

    def _target(self, text: int) -> Float[Tensor, "sites tokens d_model"]:
        """h + α(h⁺ − h⁻) + β·scale·v̂ of one text, whose versions run together and with no other text: so it is the same
        whenever it is computed."""
        if text in self._targets:
            return self._targets[text]
        rows = [version[text] for version in self._texts.versions]
        plain, *contrast = _states(self._lm, rows, self._sites).chunk(len(rows), dim=1)
        target = plain + self._how.alpha * (contrast[0] - contrast[1]) if contrast else plain
        if self._shift is not None:
            target = target + self._shift
        if (len(self._targets) + 1) * target.nbytes <= _KEEP:
            self._targets[text] = target
        return target

    def _drawn(self, *of: int) -> contextlib.AbstractContextManager[None]:
        return _seeded(self._lm.device, [self._how.seed, *of])

    def adapter(self, plan: Mapping[str, Any]) -> Adapter:
        """What was learned, as it is now."""
        config = {k: sorted(v) if isinstance(v, set) else v for k, v in self._config.to_dict().items()}
        ledger = ledger_of(self._lm)
        found = {name: p.detach().cpu().numpy().copy() for name, p in self._parameters.items()}
        ends = {side: f".{side}.default.weight" for side in ("lora_A", "lora_B")}
        paths = [name.removesuffix(ends["lora_A"]) for name in found if name.endswith(ends["lora_A"])]
        return Adapter(
            config=config | {"inference_mode": True},
            factors={path: Factors(found[path + ends["lora_A"]], found[path + ends["lora_B"]]) for path in paths},
            base=ledger.base,
            after=ledger.digests,
            losses=tuple(self.losses),
            provenance={"method": "lorra", "plan": dict(plan), "versions": versions()},
        )

    def put_down(self, path: Path, plan: Mapping[str, Any]) -> None:
        """Write a checkpoint, over the one before."""
        arrays: dict[str, np.ndarray] = {}
        for name, p in self._parameters.items():
            kept = {"parameter": p.detach()} | {k: self._adam.state[p][k] for k in _KEPT[1:]}
            arrays |= {f"{name} {k}": tensor.cpu().numpy() for k, tensor in kept.items()}
        artifact.write(path, _CHECKPOINT, Artifact({"plan": plan, "losses": self.losses}, arrays), overwrite=True)

    def take_up(self, path: Path, plan: Mapping[str, Any]) -> None:
        """Go on where a checkpoint was written. Raises `IdentityMismatch` if it is of another training."""
        found = artifact.read(path, _CHECKPOINT)
        with rebuilding(f"{path} is no whole checkpoint"):
            before = dict(found.header["plan"])
            losses = [float(loss) for loss in found.header["losses"]]
        _require_same(before, plan, path)
        self.losses = losses
        state = {}
        for i, (name, p) in enumerate(self._parameters.items()):
            with rebuilding(f"{path} is no whole checkpoint"):
                kept = (artifact.array(found.arrays, f"{name} {k}", "f", *p.shape) for k in _KEPT)
                own, *means = (torch.from_numpy(array.copy()) for array in kept)
            p.data.copy_(own)
            state[i] = {"step": torch.tensor(float(self.done))} | dict(zip(_KEPT[1:], means, strict=True))
        self._adam.load_state_dict(self._adam.state_dict() | {"state": state})


def _states(
    lm: LanguageModel, rows: Sequence[TokenisedText], sites: Sequence[Site], *, gradients: bool = False
) -> Float[Tensor, "sites tokens d_model"]:
    """The response tokens of texts at sites, text by text, in float32 at least."""
    batch = align(lm, [row.ids for row in rows], [row.suffix for row in rows])
    response = batch.real[:, batch.first :]

    def responses(h: Tensor) -> Tensor:
        return h[:, batch.first :][response.to(h.device)]

    inputs = lm.inputs(Encoded(batch.input_ids, batch.real, {}))
    seen = capture(lm, inputs, sites, responses, gradients=gradients)
    return torch.stack([seen[site].to(device=lm.device, dtype=_wide(lm.dtype)) for site in sites])


def _order(n: int, seed: int, start: int) -> Iterator[int]:
    """Numbers of texts from place `start` on, in an order in which each comes once before any comes again."""
    epochs = (np.random.default_rng([seed, _ORDER, epoch]).permutation(n) for epoch in count(start // n))
    return islice(map(int, chain.from_iterable(epochs)), start % n, None)


@contextlib.contextmanager
def _seeded(device: torch.device, of: Sequence[int]) -> Iterator[None]:
    """torch draws from this seed inside, and its random state is as it was after."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(int(np.random.SeedSequence(list(of)).generate_state(1, np.uint64)[0] >> 1))
        yield


def _twin(net: nn.Module) -> nn.Module:
    """A network of its own modules that shares every tensor with `net`, and asks for no gradient."""
    shared: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in net.parameters()}
    shared |= {id(b): b for b in net.buffers()}
    return copy.deepcopy(net, shared)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
