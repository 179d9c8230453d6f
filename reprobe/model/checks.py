"""The identities that prove that sites are where they say.

Enters: an architecture, its network, activations captured in one forward pass, and the logits of that pass.
Leaves: per identity, by how much it fails at worst. Does not know how the activations were captured, nor how
much is tolerable.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from reprobe.errors import UsageError
from reprobe.model.architectures import Architecture
from reprobe.model.sites import Site


@dataclass(frozen=True)
class Identity:
    """`compute` of the activations at `inputs` equals the activation at `output`."""

    name: str
    inputs: tuple[Site, ...]
    compute: Callable[..., Tensor]
    output: Site


@torch.no_grad()
def residuals(
    architecture: Architecture,
    net: Any,
    captured: Mapping[Site, Float[Tensor, "batch seq _"]],
    logits: Float[Tensor, "batch seq vocab"] | None,
) -> dict[str, float]:
    """The worst relative deviation of each identity, over all blocks.

    An identity `left = right` deviates by max |left − right| / max |right|, taken in float32; rounding of the
    network's dtype is part of it. `captured` holds whole sites (not narrowed to a unit) of one forward pass,
    in the network's dtype. Identities of which it lacks a site are left out, and without `logits` that of the
    head. NaN anywhere gives NaN. Raises `UsageError` if no identity can be tested.
    """
    # A copy, since norms and projections are called again below: where hooks still record into `captured`,
    # what was recorded would be replaced by the very thing it is compared with.
    h = dict(captured)
    worst: dict[str, Tensor] = {}

    def compare(name: str, left: Tensor, right: Tensor) -> None:
        here = _deviation(left, right)
        worst[name] = torch.maximum(worst.get(name, here), here)  # unlike max(), keeps NaN

    for identity in identities(architecture, net):
        if identity.output in h and all(site in h for site in identity.inputs):
            left = identity.compute(*(h[site] for site in identity.inputs))
            compare(identity.name, left, h[identity.output])
    if logits is not None and Site("final") in h:
        compare("unembed(final) = logits", architecture.unembed(net, h[Site("final")]), logits)
    if not worst:
        raise UsageError(
            "the captured sites are not enough to test an identity; capture for instance resid.pre@0, "
            "attn.out@0, mlp.out@0 and resid.post@0, and resid.mid@0 where there is one"
        )
    return {name: float(value) for name, value in worst.items()}


def identities(architecture: Architecture, net: Any) -> Iterator[Identity]:
    """The identities between sites of a network, block by block."""
    n_layers = len(architecture.blocks(net))
    embed, final, last = Site("embed"), Site("final"), Site("resid.post", n_layers - 1)
    yield Identity("embed = resid.pre@0", (embed,), _same, Site("resid.pre", 0))
    for layer in range(n_layers):
        if architecture.parallel(net.config):
            yield from _parallel_block(layer)
        else:
            yield from _sequential_block(architecture, net, layer)
        yield from _projections(architecture, net, layer)
        if layer + 1 < n_layers:
            post, pre = Site("resid.post", layer), Site("resid.pre", layer + 1)
            yield Identity("resid.post = next resid.pre", (post,), _same, pre)
    norm = architecture.final_norm(net)
    if norm is None:
        yield Identity("last resid.post = final", (last,), _same, final)
    else:
        yield Identity("norm(last resid.post) = final", (last,), norm, final)


def _parallel_block(layer: int) -> Iterator[Identity]:
    pre, attn, mlp, post = _sites(layer, "resid.pre", "attn.out", "mlp.out", "resid.post")
    yield Identity("resid.pre + attn.out + mlp.out = resid.post", (pre, attn, mlp), _sum, post)


def _sequential_block(architecture: Architecture, net: Any, layer: int) -> Iterator[Identity]:
    pre, attn, mid, mlp, post = _sites(layer, "resid.pre", "attn.out", "resid.mid", "mlp.out", "resid.post")
    norms = architecture.sum_norms(net, layer)
    if norms is None:
        yield Identity("resid.pre + attn.out = resid.mid", (pre, attn), _sum, mid)
        yield Identity("resid.mid + mlp.out = resid.post", (mid, mlp), _sum, post)
    else:
        yield Identity("norm(resid.pre + attn.out) = resid.mid", (pre, attn), _normed(norms[0]), mid)
        yield Identity("norm(resid.mid + mlp.out) = resid.post", (mid, mlp), _normed(norms[1]), post)


def _projections(architecture: Architecture, net: Any, layer: int) -> Iterator[Identity]:
    for inner, outer in (("attn.heads", "attn.out"), ("mlp.neurons", "mlp.out")):
        source, target = _sites(layer, inner, outer)
        if inner not in architecture.block_parts(net, layer):
            continue
        out = architecture.tap(net, target)
        steps, left = [architecture.tap(net, source).module], f"projection({inner})"
        if architecture.post_norms:
            steps, left = [*steps, out.module], f"norm({left})"
        yield Identity(f"{left} = {outer}", (source,), _chain(steps, out.scale), target)


def _sites(layer: int, *parts: str) -> list[Site]:
    return [Site(part, layer) for part in parts]


def _same(h: Tensor) -> Tensor:
    return h


def _sum(*terms: Tensor) -> Tensor:
    return torch.stack([term.float() for term in terms]).sum(0)


def _normed(norm: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda a, b: norm(a + b)


def _chain(steps: Sequence[Callable[[Tensor], Tensor]], scale: float) -> Callable[[Tensor], Tensor]:
    def run(h: Tensor) -> Tensor:
        for step in steps:
            h = step(h)
        return h * scale

    return run


def _deviation(left: Tensor, right: Tensor) -> Tensor:
    right = right.detach().float()
    left = left.detach().float().to(right.device)
    return ((left - right).abs().max() / right.abs().max().clamp(min=torch.finfo(torch.float32).tiny)).cpu()
