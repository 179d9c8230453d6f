"""Baking: a steering that becomes part of a model's weights, where that is exactly the same.

Enters: a language model and interventions. Leaves: the same network with other weights and biases, an ordinary
transformers model that needs no hooks, is as fast as it was, and that `save_pretrained` writes for stock transformers;
and a `Baked`, which takes all of it out again, bit for bit. Does not know the formulas of operators: it asks them where
they send rows.

How. An operator that acts on every token alike is an affine map of rows, h ↦ M h + c (an Add has M = 1, an Ablate
c = 0), and next to a projection y = W x + b it is part of the projection:

- of what it reads (`attn.heads`, `mlp.neurons`): W ← W M, b ← b + W c. (A bias made of the heads' c alone, as the
  scripts of the ITI paper write it, forgets W.)
- of what it returns to the stream (`attn.out`, `mlp.out`): W ← M W, b ← M b + c. So a directional ablation is
  W ← (1 − v̂v̂ᵀ) W (Arditi et al. 2024, section 4.2).
- of the stream behind it (`resid.mid`, `resid.post`, or `resid.pre` of the next block): M(s + W x + b) + c is the same
  as the line above only where M s = s for the stream s that came in. That is so for an Add, and for an ablation of what
  was ablated from every earlier write, from the embedding on.
- of the embedding (`embed`): every row.
"""

import contextlib
import copy
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from reprobe.control.along import Ablate
from reprobe.control.bundle import Steering
from reprobe.control.operators import Operator
from reprobe.control.steering import fitting
from reprobe.errors import UnsupportedOperation, UsageError
from reprobe.model.language_model import LanguageModel
from reprobe.model.passes import Prompts, Run, Tokens
from reprobe.model.sites import UNIT_PARTS, Site

#: Config settings of transformers' families that give their projections biases.
_BIAS_SETTINGS = ("attention_bias", "mlp_bias", "use_bias", "enable_bias", "bias")
#: What is written has nothing along a unit vector q if |q·W| is below this share of ‖W‖.
_NOTHING = 1e-6
#: Rows of an embedding that are computed at a time.
_AT_ONCE = 4096

#: What is baked into each network, the newest last.
_BAKED: "weakref.WeakKeyDictionary[nn.Module, list[object]]" = weakref.WeakKeyDictionary()


class Baked:
    """What `bake` did to a network. Leaving it as a context, or `revert`, makes the network what it was."""

    def __init__(self, net: nn.Module, undo: contextlib.ExitStack, parameters: tuple[str, ...]) -> None:
        self._net, self._undo, self._mark = net, undo, object()
        #: The parameters that were changed or added, by name.
        self.parameters = parameters
        _BAKED.setdefault(net, []).append(self._mark)

    def revert(self) -> None:
        """Every weight, bias and config value as it was; a second time, nothing. Raises `UsageError` if something else
        was baked in later and is there still."""
        held = _BAKED.get(self._net, [])
        if self._mark not in held:
            return
        if held[-1] is not self._mark:
            raise UsageError("something else was baked into this model later: take that out first")
        held.pop()
        self._undo.close()

    def __enter__(self) -> "Baked":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.revert()

    def __repr__(self) -> str:
        return f"Baked({len(self.parameters)} parameters)"


@torch.no_grad()
def bake(
    lm: LanguageModel, *interventions: Operator | Steering, untie: bool = False, allow_mismatch: bool = False
) -> Baked:
    """Put interventions into the model's own weights, in place. What it computes is then what it computes under
    `steer(lm, *interventions)`, up to the rounding of its weights, and without hooks.

    The change stays until `revert` of what is returned, or to the end of a `with bake(…):`; the originals are kept.
    The model is then another one: its identity changes, and `lm.net.save_pretrained(folder)` writes an ordinary
    checkpoint. Interventions at one site act in the order given. A part of the network that has no bias gets one where
    the family's config can say so (other biases that this brings are written to the checkpoint, as zeros). `untie`
    allows a change of embeddings that the unembedding shares: they become two matrices.

    Raises `UsageError`, the network untouched, where no weight does the same: for a gate, a scope that is not "all", a
    strength per prompt, a restored norm, whatever is no affine map of rows; where a norm stands between a projection
    and the stream; where a bias is needed that the family cannot have; where a stream would have to lose what earlier
    blocks wrote; for embeddings that are tied, unless `untie`. `UnsupportedOperation` for encoders, and for weights
    that are quantised or not in memory. Else as `steer`.
    """
    items = fitting(lm, interventions, allow_mismatch=allow_mismatch)
    if lm.architecture.kind != "decoder":
        raise UnsupportedOperation(f"{lm.name} is an encoder ({lm.architecture.family}): it can be read, not written")
    for item in items:
        if why := _not_one_map(item):
            raise UsageError(f"'{item}' cannot be baked: {why}; keep it as a steering")
    if getattr(lm.net.config, "quantization_config", None) is not None:
        raise UnsupportedOperation(
            f"the weights of {lm.name} are quantised: load it without quantization_config to bake something into them"
        )
    plan = _planned(lm, items, untie)
    with contextlib.ExitStack() as undo:
        _apply(lm.net, plan, undo)
        return Baked(lm.net, undo.pop_all(), tuple(change.name for change in plan.changes))


def _not_one_map(item: Operator) -> str | None:
    """Why what an intervention does is not one affine map of every token's row; None if it is."""
    if item.when is not None:
        return "weights act always, and it has a gate"
    if item.tokens.kind != "all":
        return f"weights act on every token, and it acts on those of the scope {item.tokens}"
    if isinstance(item.strength, np.ndarray):
        return "weights are the same for all prompts, and it has a strength for each"
    if item.keep_norm:
        return "it gives each row its norm back, and no weight does"
    if not item.affine:
        return "what it makes of a row is no fixed matrix and offset (it goes by a norm, a sign, a limit or a position)"
    return None


class _Map:
    """An intervention as h ↦ M h + c, computed by the intervention itself, in float64."""

    def __init__(self, item: Operator, width: int) -> None:
        self.item = item
        #: M = 1.
        self.only_adds = item.step is not None
        self.c: Float[Tensor, " width"] = self(torch.zeros(1, width, dtype=torch.float64))[0]

    def __call__(self, rows: Float[Tensor, "rows width"]) -> Float[Tensor, "rows width"]:
        tokens = Tokens(Run(Prompts(torch.ones(1, len(rows), dtype=torch.bool), len(rows), {})), 1, 0, len(rows))
        return self.item.changed(rows[None], tokens)[0]

    def linear(self, rows: Float[Tensor, "rows width"]) -> Float[Tensor, "rows width"]:
        """M h of each row."""
        return rows if self.only_adds else self(rows) - self.c.to(rows.device)

    def leaves(self, gone: Sequence[Tensor]) -> bool:
        """Whether M h = h for every row h that has nothing along the unit vectors `gone`."""
        if self.only_adds:
            return True
        # Of a matrix that is not 0 on a space, a normal row of that space sees it with probability 1.
        rows = torch.randn(4, len(self.c), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        if gone:
            U, sizes, _ = torch.linalg.svd(torch.stack(list(gone)).T, full_matrices=False)
            basis = U[:, sizes > 1e-6 * sizes[0]]  # some may depend on each other
            rows = rows - (rows @ basis) @ basis.T
        return bool((self.linear(rows) - rows).abs().max() < 1e-9 * rows.norm())


@dataclass(frozen=True, eq=False)
class _Change:
    """A parameter's new values, in its own dtype; it is a new bias if `added`."""

    name: str
    values: Tensor
    added: bool = False


@dataclass
class _Plan:
    changes: list[_Change] = field(default_factory=list)
    untie: bool = False
    #: Config settings to turn on, and the biases that this adds, with their lengths.
    settings: tuple[str, ...] = ()
    biases: Mapping[str, int] = field(default_factory=dict)


class _Branch:
    """One branch of a block while it is rewritten: it adds scale · (W x + b) to the stream, or a sum over experts.

    `module` is its output projection, None for experts, whose `weights` are (…, d_model, inputs). `blocked` says why
    nothing can be done to what it returns.
    """

    def __init__(
        self, what: str, weights: Mapping[str, Tensor], module: nn.Module | None, scale: float, blocked: str | None
    ) -> None:
        self.what, self.scale, self.blocked = what, scale, blocked
        self._stored, self._module = dict(weights), module
        self._inputs_first = hasattr(module, "nx")  # Conv1D of transformers (GPT-2) stores its matrix like that
        self._wide: dict[str, Tensor] = {}  # what was read, in float64, outputs first
        self._changed: set[str] = set()
        self._stored_bias: Tensor | None = getattr(module, "bias", None)
        self._bias = None if self._stored_bias is None else _double(f"{what}.bias", self._stored_bias)

    def reads(self, f: _Map, part: slice) -> None:
        """Let `f` act on the columns `part` of what the projection reads."""
        for name in self._stored:
            W = self._weight(name)
            columns = W[:, part].clone()
            self._add(columns @ f.c.to(W.device))
            if not f.only_adds:
                eye = torch.eye(columns.shape[1], dtype=W.dtype, device=W.device)
                W[:, part] = columns @ f.linear(eye).T
                self._changed.add(name)

    def returns(self, f: _Map, *, shift: bool = True) -> None:
        """Let `f` act on what the branch adds to the stream; without `shift` only its M."""
        if self.blocked is not None:
            raise UsageError(f"'{f.item}' cannot be baked: {self.blocked}; keep it as a steering")
        if not f.only_adds:
            for name in self._stored:
                W = self._weight(name).transpose(-1, -2)
                W.copy_(f.linear(W.reshape(-1, W.shape[-1])).view_as(W))
                self._changed.add(name)
            if self._bias is not None:
                self._bias = f.linear(self._bias[None])[0]
        if shift and bool(f.c.any()):
            if self._module is None:
                raise UsageError(
                    f"'{f.item}' cannot be baked: {self.what} is a mixture of experts, which has no bias; keep it as a "
                    "steering"
                )
            self._add(f.c / self.scale)

    def writes_nothing_along(self, q: Float[Tensor, " d_model"]) -> bool:
        if self.blocked is not None:
            return False
        matrices = [self._weight(name) for name in self._stored]
        if self._bias is not None:
            matrices.append(self._bias[:, None])
        return all(_nothing_along(W, q) for W in matrices)

    @property
    def changes(self) -> list[_Change]:
        out = []
        for name in self._stored:
            if name in self._changed:
                W = self._wide[name]
                out.append(_Change(name, (W.T if self._inputs_first else W).to(self._stored[name].dtype)))
        if self._bias is not None:
            any_weight = next(iter(self._stored.values()))
            bias, was = self._bias.to(any_weight), self._stored_bias
            if was is None or not torch.equal(bias, was):
                out.append(_Change(f"{self.what}.bias", bias, added=was is None))
        return out

    def _weight(self, name: str) -> Tensor:
        if name not in self._wide:
            W = _double(name, self._stored[name])
            self._wide[name] = W.T.contiguous() if self._inputs_first else W
        return self._wide[name]

    def _add(self, c: Tensor) -> None:
        if bool(c.any()):
            self._bias = c if self._bias is None else self._bias + c.to(self._bias.device)


def _planned(lm: LanguageModel, items: Sequence[Operator], untie: bool) -> _Plan:
    """All new values; raises what `bake` raises."""
    arch, net, plan = lm.architecture, lm.net, _Plan()
    names = {id(module): name for name, module in net.named_modules()}
    at: dict[tuple[str, int | None], list[tuple[_Map, slice]]] = {}
    for item in sorted(items, key=lambda item: item.site.depth):
        site, width = _carrier(item.site), lm.width(item.site)
        first = (site.unit or 0) * width
        at.setdefault((site.part, site.layer), []).append((_Map(item, width), slice(first, first + width)))

    def maps(part: str, layer: int | None = None) -> list[_Map]:
        return [f for f, _ in at.get((part, layer), [])]

    on_stream = [f for (part, _), found in at.items() if part in ("resid.mid", "resid.post") for f, _ in found]
    # Directions that may be gone from the stream; nobody asks where only Adds act on it.
    gone: list[Tensor] = []
    if not all(f.only_adds for f in on_stream):
        ablations = [i for i in items if isinstance(i, Ablate) and i.site.part not in UNIT_PARTS]
        vectors = {i.direction.vector.tobytes(): i.direction.vector for i in ablations}
        gone = [torch.from_numpy(np.array(v)) for v in vectors.values()]
    if embedded := maps("embed"):
        _require_own_embedding(lm, embedded, untie, plan)
    if embedded or gone:
        gone = _embedding(lm, embedded, gone, plan, names)
    last = max((layer for _, layer in at if layer is not None), default=-1)
    for layer in range(last + 1):
        attn, mlp = (_branch(lm, part, layer, names) for part in ("attn.out", "mlp.out"))
        for branch, read, returned in ((attn, "attn.heads", "attn.out"), (mlp, "mlp.neurons", "mlp.out")):
            for f, columns in at.get((read, layer), []):
                branch.reads(f, columns)
            for f in maps(returned, layer):
                branch.returns(f)
        for f in maps("resid.mid", layer):
            _require_leaves(f, gone, layer)
            attn.returns(f)
        parallel = arch.parallel(net.config)
        if not parallel:
            gone = [q for q in gone if attn.writes_nothing_along(q)]
        for f in maps("resid.post", layer):
            _require_leaves(f, gone, layer)
            mlp.returns(f)
            if parallel:
                attn.returns(f, shift=False)
        gone = [q for q in gone if mlp.writes_nothing_along(q) and (not parallel or attn.writes_nothing_along(q))]
        plan.changes += attn.changes + mlp.changes
    _final(lm, maps("final"), plan, names)
    _allow_biases(lm, plan)
    return plan


def _carrier(site: Site) -> Site:
    """The same vector where something writes it: what enters a block is what the block before, or `embed`, returned."""
    if site.part != "resid.pre":
        return site
    assert site.layer is not None
    return Site("embed") if site.layer == 0 else Site("resid.post", site.layer - 1)


def _branch(lm: LanguageModel, part: str, layer: int, names: Mapping[int, str]) -> _Branch:
    arch, net = lm.architecture, lm.net
    reads = Site({"attn.out": "attn.heads", "mlp.out": "mlp.neurons"}[part], layer)
    blocked = None
    if arch.post_norms:
        blocked = (
            f"in {lm.name} a norm stands between the projection and what {part}@{layer} adds to the stream, and what "
            "comes after a norm is no weight's to change"
        )
    scale = arch.tap(net, Site(part, layer)).scale
    if reads.part in arch.block_parts(net, layer):
        module = arch.tap(net, reads).module
        name = names[id(module)]
        return _Branch(name, {f"{name}.weight": module.weight}, module, scale, blocked)  # type: ignore[dict-item]
    block = arch.blocks(net)[layer]
    name = names[id(block)]
    weights = {f"{name}.{path}": block.get_parameter(path) for path in arch.row.expert_outputs}
    return _Branch(f"{part}@{layer} of {lm.name}", weights, None, scale, blocked)


def _require_leaves(f: _Map, gone: Sequence[Tensor], layer: int) -> None:
    if not f.leaves(gone):
        raise UsageError(
            f"'{f.item}' cannot be baked: it changes what earlier blocks wrote to the stream, and no weight of block "
            f"{layer} does. An ablation can be baked where the same direction is ablated from all that was written "
            "before: give Ablate at embed, and at attn.out and mlp.out of every block up to there"
        )


def _require_own_embedding(lm: LanguageModel, maps: Sequence[_Map], untie: bool, plan: _Plan) -> None:
    if lm.architecture.row.embedding_scale(lm.net.config) is None:
        raise UsageError(
            f"'{maps[0].item}' cannot be baked: in {lm.name} a norm stands between the embedding and embed"
        )
    head = lm.net.get_output_embeddings()
    if head is not None and head.weight is lm.net.get_input_embeddings().weight:
        if not untie:
            raise UsageError(
                f"'{maps[0].item}' cannot be baked: the embedding of {lm.name} is also its unembedding, which would "
                "change with it; bake(…, untie=True) makes them two matrices"
            )
        plan.untie = True


def _embedding(
    lm: LanguageModel, maps: Sequence[_Map], gone: Sequence[Tensor], plan: _Plan, names: Mapping[int, str]
) -> list[Tensor]:
    """Put maps into the embedding of tokens (and positions); which of `gone` it has nothing along, then."""
    row = lm.architecture.row
    scale = row.embedding_scale(lm.net.config)
    if scale is None:
        return []
    tables: list[tuple[Any, float | None]] = [(lm.net.get_input_embeddings(), scale)]
    if row.positions is not None:
        tables.append((lm.architecture.stack(lm.net).get_submodule(row.positions), None))
    left = list(gone)
    for table, own_scale in tables:
        name = f"{names[id(table)]}.weight"
        new = torch.empty_like(table.weight)
        for start in range(0, len(new), _AT_ONCE):
            rows = _double(name, table.weight[start : start + _AT_ONCE])
            for f in maps:
                rows = f.linear(rows)
                if own_scale is not None:  # what is added, is added once: with the token
                    rows = rows + f.c.to(rows.device) / own_scale
            left = [q for q in left if _nothing_along(rows.T, q)]
            new[start : start + _AT_ONCE] = rows
        if maps:
            plan.changes.append(_Change(name, new))
    return left


def _final(lm: LanguageModel, maps: Sequence[_Map], plan: _Plan, names: Mapping[int, str]) -> None:
    """What is added after the final norm is a part of its bias."""
    norm: Any = lm.architecture.final_norm(lm.net)
    for f in maps:
        if not f.only_adds or getattr(norm, "bias", None) is None:
            what = "the final norm has no bias" if f.only_adds else "after the final norm only an Add can be baked"
            raise UsageError(f"'{f.item}' cannot be baked: {what}; keep it as a steering")
    if maps:
        name = f"{names[id(norm)]}.bias"
        bias = _double(name, norm.bias) + sum(f.c.to(norm.bias.device) for f in maps)
        plan.changes.append(_Change(name, bias.to(norm.bias.dtype)))


def _allow_biases(lm: LanguageModel, plan: _Plan) -> None:
    """Find the config settings under which the family has the biases that the plan adds."""
    wanted = {change.name for change in plan.changes if change.added}
    if not wanted:
        return
    net, config = lm.net, copy.deepcopy(lm.net.config)
    own = net.state_dict()
    settings: list[str] = []
    # The zeros of an earlier bake.
    biases: dict[str, int] = {name: len(own[name]) for name in wanted if name in own}
    for setting in _BIAS_SETTINGS:
        if wanted <= set(biases) or getattr(config, setting, None) is not False:
            continue
        tried = copy.deepcopy(config)
        setattr(tried, setting, True)
        with torch.device("meta"):
            like = type(net)(tried)
        new = {n: p for n, p in like.named_parameters(remove_duplicate=False) if n not in own and n not in biases}
        if wanted & set(new) and all(name.endswith(".bias") for name in new):
            config = tried
            settings.append(setting)
            biases |= {name: len(p) for name, p in new.items()}
    if missing := sorted(wanted - set(biases)):
        raise UsageError(
            f"this cannot be baked: it needs {missing[0]}, and transformers builds {lm.architecture.family} without "
            f"such a bias, whatever its config says, so that a saved model would lose it; keep it as a steering"
        )
    plan.settings, plan.biases = tuple(settings), biases


def _apply(net: Any, plan: _Plan, undo: contextlib.ExitStack) -> None:
    """Carry a plan out; `undo` gets what takes each step back."""
    if plan.untie:
        head = net.get_output_embeddings()
        shared = head.weight
        undo.callback(setattr, head, "weight", shared)
        head.weight = nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad)
        _set(net.config, "tie_word_embeddings", False, undo)
    for setting in plan.settings:
        _set(net.config, setting, True, undo)
    needed = {change.name for change in plan.changes}
    for name, length in plan.biases.items():
        module = net.get_submodule(name.removesuffix(".bias"))
        if name not in needed:  # what the config promises: a checkpoint has it, and no pass has to add it
            undo.callback(module.register_state_dict_post_hook(_with_zeros(length)).remove)
            continue
        undo.callback(setattr, module, "bias", None)
        module.bias = nn.Parameter(module.weight.new_zeros(length), requires_grad=module.weight.requires_grad)
    for change in plan.changes:
        parameter = net.get_parameter(change.name)
        undo.callback(_copy, parameter, parameter.detach().clone())
        _copy(parameter, change.values)


def _with_zeros(length: int) -> Callable[[Any, dict[str, Tensor], str, Any], None]:
    """A hook that has a module's state tell of a bias of zeros where there is none."""

    def add(module: Any, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
        state.setdefault(f"{prefix}bias", module.weight.new_zeros(length))

    return add


def _set(config: Any, name: str, value: Any, undo: contextlib.ExitStack) -> None:
    undo.callback(setattr, config, name, getattr(config, name))
    setattr(config, name, value)


@torch.no_grad()
def _copy(parameter: Tensor, values: Tensor) -> None:
    parameter.copy_(values)


def _double(name: str, parameter: Any) -> Tensor:
    """A parameter's values in float64: a copy."""
    # torch's quantised layers have a method in its place.
    kept = f"{parameter.dtype} on {parameter.device.type}" if isinstance(parameter, Tensor) else "packed by a quantiser"
    if not isinstance(parameter, Tensor) or not parameter.is_floating_point() or parameter.device.type == "meta":
        raise UnsupportedOperation(
            f"{name} is {kept}: load the model unquantised and in memory to bake something into it"
        )
    return parameter.detach().to(torch.float64, copy=True)


def _nothing_along(W: Float[Tensor, "*more d_model inputs"], q: Float[Tensor, " d_model"]) -> bool:
    return bool((q.to(W.device) @ W).norm() <= _NOTHING * W.norm())
