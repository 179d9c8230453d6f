"""What steering should compute, written a second time: one unpadded prompt, one pass, no cache, plain hooks.

Formulas are in float64, token by token where that is clearer. Shared with the library are only the places of sites
(`Architecture.tap`, which its own tests prove) and the numbers of directions.
"""

import contextlib
import hashlib
import math
from dataclasses import dataclass

import numpy as np
import torch

import reprobe as rp

MASK64 = 2**64 - 1


@dataclass
class Sequence:
    """One prompt (number `row` of its batch) with what follows it."""

    row: int
    ids: list[int]
    n_prompt: int
    spans: dict[str, set[int]]

    def in_scope(self, scope):
        """Token numbers; written from the words of the documentation."""
        every, n = range(len(self.ids)), self.n_prompt
        kind, _, name = scope.partition(":")
        if kind == "positions" or (kind == "prompt" and name):
            chosen = set()
            for piece in name.split(","):
                if ":" in piece:
                    start, stop = (int(x) if x else None for x in piece.split(":"))
                    explicit = range(start or 0, stop) if stop is not None and stop > 0 and (start or 0) >= 0 else ()
                    chosen |= {*explicit, *list(range(n))[slice(start, stop)]}
                else:
                    chosen.add(int(piece) if int(piece) >= 0 else n + int(piece))
            return {t for t in every if t in chosen and (kind == "positions" or t < n)}
        return {
            "all": set(every),
            "prompt": set(range(n)),
            "generated": set(range(n, len(self.ids))),
            "last": set(range(n - 1, len(self.ids))),
            "span": self.spans.get(name, set()),
        }[kind]


def measured(gate, h):
    """The gate's measure of one row in float64."""
    along = float(h @ torch.tensor(gate.direction.vector))
    if gate.measure == "score":
        return (along - gate.direction.offset) / gate.direction.scale
    cosine = along / float(h.norm())
    return cosine if gate.measure == "cosine" else abs(cosine)


def gate_values(gate, h, sequence):
    """The measure of each token: its own, or that of its prompt's mean."""
    if gate.at == "token":
        return [measured(gate, row) for row in h]
    over = sorted(t for t in sequence.in_scope(str(gate.over)) if t < sequence.n_prompt)
    return [measured(gate, h[over].mean(0))] * len(h)


def opens(gate, value):
    return (gate.above is None or value > gate.above) and (gate.below is None or value < gate.below)


@contextlib.contextmanager
def at_site(lm, site, look):
    """Call `look(h)`, h (tokens, width) in float64, at a site; what it returns (None: nothing) is put there."""
    part = None
    if site.unit is not None:
        width = lm.width(site)
        part = slice(site.unit * width, (site.unit + 1) * width)
    whole = site.whole
    handles, pre = [], {}
    if site.part == "resid.mid":
        whole = rp.Site("attn.out", site.layer)
        block = lm.architecture.blocks(lm.net)[site.layer]

        def keep(module, args, kwargs):
            pre["h"] = (args[0] if args else kwargs["hidden_states"])[0].double()

        handles.append(block.register_forward_pre_hook(keep, with_kwargs=True))
    tap = lm.architecture.tap(lm.net, whole)

    def put(raw):
        row = (raw if raw.ndim == 2 else raw[0]).double()
        value = pre["h"] + row * tap.scale if pre else row * tap.scale
        new = look(value if part is None else value[:, part])
        if new is None:
            return raw
        if part is not None:
            new = torch.cat([value[:, : part.start], new, value[:, part.stop :]], 1)
        out = (row + (new - value) / tap.scale).to(raw.dtype)
        return out if raw.ndim == 2 else out[None]

    if tap.side == "in":

        def before(module, args, kwargs):
            if args:
                return (put(args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": put(kwargs["hidden_states"])}

        handles.append(tap.module.register_forward_pre_hook(before, with_kwargs=True))
    else:

        def after(module, args, out):
            return put(out) if isinstance(out, torch.Tensor) else (put(out[0]), *out[1:])

        handles.append(tap.module.register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def logits(lm, sequence, *edits):
    """(tokens, vocab) with the edits: each is (site, scope, gate or None, change), change(h, sequence) → h′."""
    opened = {}
    with contextlib.ExitStack() as stack, torch.no_grad():
        for number, (site, scope, gate, change) in enumerate(edits):

            def decide(h, number=number, gate=gate):
                opened[number] = [opens(gate, value) for value in gate_values(gate, h, sequence)]

            def edit(h, number=number, scope=scope, gate=gate, change=change):
                new, out = change(h, sequence), h.clone()
                for t in sequence.in_scope(scope):
                    if gate is None or opened[number][t]:
                        out[t] = new[t]
                return out

            if gate is not None:
                stack.enter_context(at_site(lm, gate.site, decide))
            stack.enter_context(at_site(lm, site, edit))
        return lm.net(input_ids=torch.tensor([sequence.ids], device=lm.device), use_cache=False).logits[0]


def states(lm, sequence, site):
    """(tokens, width) at a site of the unsteered model, float64."""
    seen = []
    with at_site(lm, site, lambda h: seen.append(h.clone())), torch.no_grad():
        lm.net(input_ids=torch.tensor([sequence.ids], device=lm.device), use_cache=False)
    return seen[0]


def noise(site, seed, prompt, position, width):
    """Standard normal numbers of one token, in Python's whole numbers."""

    def mixed(x):
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK64
        return x ^ (x >> 31)

    golden = 0x9E3779B97F4A7C15
    start = int.from_bytes(hashlib.blake2b(f"{site} {seed} {prompt}".encode(), digest_size=8).digest(), "little")
    key = mixed(start + position * golden & MASK64)
    uniform = [((mixed(key + k * golden & MASK64) >> 40) + 0.5) / 2**24 for k in range(1, 2 * width + 1)]
    pairs = zip(uniform[:width], uniform[width:], strict=True)
    return np.array([math.sqrt(-2 * math.log(u)) * math.cos(2 * math.pi * v) for u, v in pairs])
