"""From a site to the module that carries it: the rows of `families` applied to a network.

Enters: a transformers network and a `Site`. Leaves: a `Tap` (a module and a side), widths, the parts that a
network has, logits from its final state. Does not know hooks, prompts or what is done with an activation.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from reprobe.errors import UnsupportedModel, UnsupportedOperation
from reprobe.model.families import FAMILIES, Family, Kind, Place, Side
from reprobe.model.products import linear
from reprobe.model.sites import Parts, Site, ranges

#: Attention implementations of transformers that take a prepared mask as it is.
_TAKE_MASKS = ("eager", "sdpa")
_BLOCK_IN = Place("", "in")
_BLOCK_OUT = Place("", "out")


@dataclass(frozen=True)
class Tap:
    """Where a site's vector passes: `scale` × (first argument | first output) of `module`.

    The tensor is (batch, seq, width); with `flat` it is (batch × seq, width). It is the network's own tensor,
    only valid while the hook runs: Falcon goes on to add attn.out onto the tensor of mlp.out in place.
    Reading `resid.mid` is exact, but a new tensor put there reaches only the branch that its module opens,
    not the stream: write `attn.out` instead.
    """

    module: nn.Module
    side: Side
    scale: float = 1.0
    flat: bool = False


@dataclass(frozen=True)
class Architecture:
    """A family's row, with what depends on the network's config settled. Made by `architecture_of`.

    `forest`: tokens mix through the attention mask and position_ids alone and none sees a later one, and the
    attention implementation takes a mask as it is, so that prompts with a common prefix can share it.
    """

    family: str
    row: Family
    forest: bool

    @property
    def kind(self) -> Kind:
        """ "encoder" networks can be read, not written."""
        return self.row.kind

    @property
    def takes_positions(self) -> bool:
        """Whether the trunk takes position_ids, counted from 0; where there are pads it needs them then."""
        return self.row.takes_positions

    @property
    def post_norms(self) -> bool:
        """Whether a norm stands between the output projections of a block and the stream."""
        return self.row.post_norms

    def parallel(self, config: Any) -> bool:
        """Whether attention and MLP of a block read the same stream; there is no `resid.mid` then."""
        return self.row.parallel(config)

    def context(self, config: Any) -> int | None:
        """The longest prompt in tokens, None where the architecture sets no limit."""
        return self.row.context(config)

    def alone_beyond(self, config: Any) -> int | None:
        """Prompts of more tokens than this must not share a pass with shorter ones; None where that never matters.

        Rotary embeddings of the type longrope choose their frequencies by the longest position of the whole pass.
        """
        rotary = getattr(config, "rope_parameters", None) or {}
        kinds = [rotary, *(v for v in rotary.values() if isinstance(v, Mapping))]  # one, or one per layer type
        limits = [k["original_max_position_embeddings"] for k in kinds if k.get("rope_type") == "longrope"]
        return min(map(int, limits), default=None)

    def tree_masks(
        self, net: Any, ends: Int[Tensor, "rows columns"], positions: Int[Tensor, "rows columns"]
    ) -> Tensor | dict[str, Tensor]:
        """The attention mask of rows of prefix trees, as the trunk takes it: a token sees itself and its ancestors.

        `ends[r, k]` is the first column that is not k itself or a descendant of it; `positions` are depths. Shape
        (rows, 1, columns, columns), 0 or the lowest number of the network's dtype; or a mapping from layer type to
        such a mask.
        """
        columns = torch.arange(ends.shape[1], device=ends.device)
        query, key = columns[None, :, None], columns[None, None, :]
        sees = (query >= key) & (query < ends[:, None, :])
        window = self.row.window(net.config)

        def additive(mask: Tensor) -> Tensor:
            zero = torch.zeros((), dtype=net.dtype, device=mask.device)
            return torch.where(mask, zero, torch.finfo(net.dtype).min)[:, None]

        near = sees if window is None else sees & (positions[:, :, None] - positions[:, None, :] < window)
        if not self.row.mask_per_layer_type:
            return additive(near)
        return {"full_attention": additive(sees), "sliding_attention": additive(near)}

    # -- modules ---------------------------------------------------------------------------------------------

    def trunk(self, net: Any) -> nn.Module:
        """The network without its head; takes input_ids, attention_mask and position_ids."""
        body: nn.Module = net.base_model
        return body

    def blocks(self, net: Any) -> list[nn.Module]:
        """The blocks, first to last."""
        found = _find(self.stack(net), self.row.blocks, self.family)
        return list(found.children())

    def final_norm(self, net: Any) -> nn.Module | None:
        """The norm after the last block, None where the network ends with the block."""
        return None if self.row.final is None else _find(self.stack(net), self.row.final, self.family)

    def sum_norms(self, net: Any, layer: int) -> tuple[nn.Module, nn.Module] | None:
        """The norms on a block's stream, after attention and after the MLP; None where there are none."""
        if self.row.sum_norms is None:
            return None
        attn, mlp = (_find(self.blocks(net)[layer], path, self.family) for path in self.row.sum_norms)
        return attn, mlp

    def head(self, net: Any) -> list[nn.Module]:
        """The modules from `final` to raw logits, in order. Raises `UnsupportedOperation` without a head."""
        try:
            return [net.get_submodule(path) for path in self.row.head]
        except AttributeError:
            auto = "AutoModelForCausalLM" if self.kind == "decoder" else "AutoModelForMaskedLM"
            raise UnsupportedOperation(
                f"this {type(net).__name__} has no language-modelling head, so no logits; load it with {auto}"
            ) from None

    def stack(self, net: Any) -> nn.Module:
        """The module that runs the blocks: the trunk or a part of it, called in every pass, head or not."""
        return _find(self.trunk(net), self.row.stack, self.family)

    # -- sites -----------------------------------------------------------------------------------------------

    def parts(self, net: Any, name: str) -> Parts:
        """The sites of a network that people know as `name`.

        Raises `UnsupportedModel` if a block has no module where the row says there is one.
        """
        places = [self._places(net, block) for block in self.blocks(net)]
        units = {"attn.heads": int(net.config.num_attention_heads)}
        for block, of_block in zip(self.blocks(net), places, strict=True):
            for part, place in of_block.items():
                module = _find(block, place.path, self.family)
                if part == "mlp.neurons":
                    units[part] = _in_width(module)
        why = []
        if self.parallel(net.config):
            why.append("attention and MLP of a parallel block read the same stream, nothing is between them")
        experts = [layer for layer, of_block in enumerate(places) if "mlp.neurons" not in of_block]
        if experts:
            why.append(f"a mixture of experts has no one layer of neurons: blocks {ranges(experts)}")
        return Parts(name, tuple(frozenset(of_block) for of_block in places), units, "; ".join(why))

    def block_parts(self, net: Any, layer: int) -> frozenset[str]:
        """The parts that block `layer` has."""
        return frozenset(self._places(net, self.blocks(net)[layer]))

    def tap(self, net: Any, site: Site) -> Tap:
        """Where `site` passes; of a narrowed site, where the whole vector does.

        Raises `UnknownSite` if the network has no such site.
        """
        if site.layer is None:
            return self._end_tap(net, site)
        blocks = self.blocks(net)
        places = self._places(net, blocks[site.layer]) if site.layer < len(blocks) else {}
        if site.part not in places:
            self.parts(net, f"this {self.family} network").require(site)  # raises, and says what exists
        block, place = blocks[site.layer], places[site.part]
        scale = self.row.residual_scale(net.config) if site.part in ("attn.out", "mlp.out") else 1.0
        return Tap(_find(block, place.path, self.family), place.side, scale, place.flat)

    def projection(self, net: Any, layer: int) -> nn.Module:
        """The down projection of block `layer`, which reads `mlp.neurons`. Raises `UnknownSite` if it has none."""
        return self.tap(net, Site("mlp.neurons", layer)).module

    def queries_values(self, net: Any) -> tuple[str, ...]:
        """Paths, from a block, of the linear layers that make its queries and values, and where fused its keys."""
        return self.row.queries_values(net.config)

    def after_projection(
        self, net: Any, layer: int, raw: Float[Tensor, "*rows d_model"]
    ) -> Float[Tensor, "*rows d_model"]:
        """`mlp.out` of block `layer`, given what its down projection returns: after the post-norm, if there is one."""
        tap = self.tap(net, Site("mlp.out", layer))
        out: Tensor = tap.module(raw) if self.post_norms else raw
        return out * tap.scale

    def width(self, net: Any, site: Site) -> int:
        """Components of the vector at `site`: of one head or neuron, where the site is narrowed to one."""
        if site.part == "mlp.neurons":
            return _in_width(self.tap(net, site).module) if site.unit is None else 1
        if site.part == "attn.heads":
            whole = _in_width(self.tap(net, site).module)
            return whole if site.unit is None else whole // int(net.config.num_attention_heads)
        return int(net.config.hidden_size)

    def _end_tap(self, net: Any, site: Site) -> Tap:
        if site.part == "embed":
            return Tap(self.blocks(net)[0], "in")
        return Tap(self.final_norm(net) or self.blocks(net)[-1], "out")

    def _places(self, net: Any, block: nn.Module) -> Mapping[str, Place]:
        absent = {"resid.mid"} if self.parallel(net.config) else set()
        if self._has_experts(block):
            absent.add("mlp.neurons")
        inner = {part: place for part, place in self.row.places.items() if part not in absent}
        return {"resid.pre": _BLOCK_IN, "resid.post": _BLOCK_OUT} | inner

    def _has_experts(self, block: nn.Module) -> bool:
        return self.row.experts is not None and self.row.experts in dict(block.named_modules())

    # -- logits ----------------------------------------------------------------------------------------------

    def normed(self, net: Any, h: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
        """A state of the stream as the final norm would hand it to the unembedding.

        The norm's arithmetic alone: hooks on the module, which are meant for the network's own passes, do not run.
        """
        norm = self.final_norm(net)
        if norm is None:
            return h
        out: Tensor = norm.forward(h.to(next((p.device for p in norm.parameters()), h.device)))
        return out

    def unembed(
        self,
        net: Any,
        h: Float[Tensor, "*rows d_model"],
        tokens: Int[Tensor, " tokens"] | None = None,
        *,
        raw: bool = False,
    ) -> Float[Tensor, "*rows vocab"]:
        """Logits from vectors at `final`, with the family's scale or soft cap, or `raw`, as the head's modules return.

        `tokens`: of these tokens only, (*rows, tokens). For encoders these are the logits of the
        masked-language-modelling head. `h` is moved to the network's device and dtype. Raises `UnsupportedOperation`
        without a head.
        """
        *before, last = self.head(net)
        h = h.to(device=net.device, dtype=net.dtype)
        for module in before:
            h = module(h)
        logits = _read_out(last, h, tokens)
        return logits if raw else self.finished(net, logits)

    def reads_out_directly(self, net: Any) -> bool:
        """Whether the last of the head's modules is a plain matrix at hand, which `unembed` multiplies by itself."""
        return _plain(self.head(net)[-1], net.device)

    def finished(self, net: Any, raw: Float[Tensor, "*rows vocab"]) -> Float[Tensor, "*rows vocab"]:
        """Logits from what the head's modules return: with the family's scale or soft cap, which act on each alone."""
        return self.row.logits(raw, net.config)


def architecture_of(net: Any) -> Architecture:
    """The architecture of a transformers network.

    Raises `UnsupportedModel` if its family has no row, or if it is a variant that the row does not cover.
    """
    config = getattr(net, "config", None)
    name, row = _row(config)
    for what, applies in row.not_covered.items():
        if applies(config):
            raise UnsupportedModel(
                f"this {name} network is a variant whose sites are not where reprobe looks for them: {what}"
            )
    takes_masks = getattr(config, "_attn_implementation", "eager") in _TAKE_MASKS
    return Architecture(name, row, row.forest(config) and takes_masks)


def kind_of(config: Any) -> Kind:
    """Whether a transformers config describes a decoder or an encoder. Raises `UnsupportedModel`."""
    return _row(config)[1].kind


def _row(config: Any) -> tuple[str, Family]:
    name = str(getattr(config, "model_type", "none"))
    if name not in FAMILIES:
        raise UnsupportedModel(
            f"reprobe does not know where the sites of a model of the family {name!r} are; it knows "
            f"{', '.join(FAMILIES)}. A new family is a new row in reprobe/model/families.py"
        )
    return name, FAMILIES[name]


def _find(module: nn.Module, path: str, family: str) -> nn.Module:
    try:
        return module.get_submodule(path)
    except AttributeError as e:
        raise UnsupportedModel(
            f"this network is not built as transformers builds {family}: {type(module).__name__} has no "
            f"module {path!r} ({e})"
        ) from None


def _in_width(projection: Any) -> int:
    # Conv1D of transformers (GPT-2) calls it nx; other linear layers, quantised ones included, in_features.
    return int(projection.in_features if hasattr(projection, "in_features") else projection.nx)


def _plain(head: nn.Module, device: torch.device) -> TypeGuard[nn.Linear]:
    # Of a head that is quantised, adapted or kept elsewhere only the whole is sure to be right.
    return type(head) is nn.Linear and head.weight.device == device


def _read_out(head: nn.Module, h: Tensor, tokens: Tensor | None) -> Tensor:
    """The output of the head for some tokens only (None: for all)."""
    if not _plain(head, h.device):
        out: Tensor = head(h)
        return out if tokens is None else out[..., tokens]
    weight: Tensor = head.weight
    bias: Tensor | None = head.bias
    if tokens is not None:
        weight, bias = weight[tokens], None if bias is None else bias[tokens]
    return linear(h, weight, bias)
