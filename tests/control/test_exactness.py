"""Every operator × site × scope × gate × (cache | none) × (padding) × (batch | one): the logits of a plain loop.

The fast tests take, per family, every operator once, with sites, scopes, gates and ways to run in rotation, so that
over the families all pairs occur; the slow ones take the whole product of operators, scopes, gates and ways:

    uv run pytest -m slow tests/control/test_exactness.py
"""

import itertools
from functools import cache

import numpy as np
import pytest
import torch
from control.reference import Sequence, gate_values, logits, noise, states
from tiny import DECODERS

import reprobe as rp

PROMPTS = ["the cat", "a dog is on the mat and", "in the end"]
SPANS = [{"who": (4, 7)}, {"who": (2, 5)}, {"who": (0, 2)}]
SCOPES = ["all", "prompt", "generated", "last", "span:who", "positions:0,2", "positions:-1,-3", "positions:2:11"]
SCOPES += ["prompt:1,3:"]
GATES = ["none", "prompt mean", "prompt last", "token"]
SITES = ["resid.post@1", "attn.heads@1", "resid.mid@1", "mlp.neurons@1.7", "attn.out@1", "resid.pre@1", "mlp.out@1"]
SITES += ["attn.heads@1.2", "embed", "mlp.neurons@1", "final"]
WAYS = ["uncached", "alone", "left", "right", "single"]
NEW = 3
TOLERANCE = 1e-4


# -- operators, each with its formula -----------------------------------------------------------------------------


@cache
def operators(lm, site, size):
    """name → (make(rows, **common), change(h, sequence)); `rows` are the numbers of the prompts that will run.

    `size` is the norm of a typical row at the site: what is put there is of that order.
    """
    width, rng = lm.width(site), np.random.default_rng(5)
    v = rng.normal(size=width)
    v = torch.tensor(v / np.linalg.norm(v))
    d = rp.Direction.from_vector(site, v.numpy(), scale=0.4 * size, offset=0.1 * size)
    each = [0.7, -1.1, 1.6]
    A = torch.tensor(0.7 * np.eye(width) + 0.3 * rng.normal(size=(width, width)) / np.sqrt(width))
    b = torch.tensor(rng.normal(size=width) * size / np.sqrt(width))
    U, V = (torch.tensor(rng.normal(size=(width, 2)) / np.sqrt(width)) for _ in range(2))
    given = torch.tensor(rng.normal(size=(len(PROMPTS), 4, width)) * size / np.sqrt(width))

    def along(h):
        return (h @ v)[:, None]

    def norms(h):
        return h.norm(dim=1, keepdim=True)

    def replaced(values, start):
        def change(h, s):
            out = h.clone()
            for k in range(len(values(s))):
                if 0 <= start(s) + k < len(h):
                    out[start(s) + k] = values(s)[k]
            return out

        return change

    def noisy(h, s):
        rows = [noise(site, 40 + s.row, 0, t, width) for t in range(len(h))]
        return h + 0.2 * norms(h) / width**0.5 * torch.tensor(np.stack(rows))

    return {
        "add": (lambda rows, **k: rp.Add(d, 1.5, **k), lambda h, s: h + 1.5 * d.scale * v),
        "add norm": (lambda rows, **k: rp.Add(d, -0.6, unit="norm", **k), lambda h, s: h - 0.6 * norms(h) * v),
        "add keep_norm": (
            lambda rows, **k: rp.Add(d, size, unit="raw", keep_norm=True, **k),
            lambda h, s: (h + size * v) * norms(h) / norms(h + size * v),
        ),
        "add piecewise": (
            lambda rows, **k: rp.Add(d, 1.2, piecewise=True, **k),
            lambda h, s: h + 1.2 * d.scale * along(h).sign() * v,
        ),
        "add per row": (
            lambda rows, **k: rp.Add(d, [each[i] for i in rows], **k),
            lambda h, s: h + each[s.row] * d.scale * v,
        ),
        "ablate": (lambda rows, **k: rp.Ablate(d, **k), lambda h, s: h - along(h) * v),
        "ablate in part": (lambda rows, **k: rp.Ablate(d, 0.6, **k), lambda h, s: h - 0.6 * along(h) * v),
        "clamp": (
            lambda rows, **k: rp.Clamp(d, 1.3, **k),
            lambda h, s: h + (d.offset + 1.3 * d.scale - along(h)) * v,
        ),
        "clamp to an interval": (
            lambda rows, **k: rp.Clamp(d, low=-0.2 * size, high=0.1 * size, unit="raw", **k),
            lambda h, s: h + (along(h).clamp(-0.2 * size, 0.1 * size) - along(h)) * v,
        ),
        "scale": (lambda rows, **k: rp.Scale(d, 2.5, **k), lambda h, s: h + 1.5 * along(h) * v),
        "scale all": (lambda rows, **k: rp.Scale(site, 0.3, **k), lambda h, s: 0.3 * h),
        "replace": (
            lambda rows, **k: rp.Replace(given[0, 0], site=site, **k),
            lambda h, s: given[0, 0].expand(len(h), -1),
        ),
        "replace from the start": (
            lambda rows, **k: rp.Replace(given[0], site=site, **k),
            replaced(lambda s: given[0], lambda s: 0),
        ),
        "replace at the end": (
            lambda rows, **k: rp.Replace(given[1], site=site, align="end", **k),
            replaced(lambda s: given[1], lambda s: s.n_prompt - 4),
        ),
        "replace by prompt": (
            lambda rows, **k: rp.Replace(given[list(rows)], site=site, **k),
            replaced(lambda s: given[s.row], lambda s: 0),
        ),
        "noise": (
            lambda rows, **k: rp.Noise(0.2, site=site, unit="norm", seed=[40 + i for i in rows], **k),
            noisy,
        ),
        "affine": (lambda rows, **k: rp.Affine(A, b, site=site, **k), lambda h, s: h @ A.T + b),
        "low rank": (
            lambda rows, **k: rp.LowRank(U, V, [0.3, -0.2], site=site, strength=0.9, **k),
            lambda h, s: h + 0.9 * (h @ V + torch.tensor([0.3, -0.2])) @ U.T,
        ),
    }


OPERATORS = ["add", "add norm", "add keep_norm", "add piecewise", "add per row", "ablate", "ablate in part", "clamp"]
OPERATORS += ["clamp to an interval", "scale", "scale all", "replace", "replace from the start", "replace at the end"]
OPERATORS += ["replace by prompt", "noise", "affine", "low rank"]


def gate_for(lm, kind, site, sequences):
    """A gate that is open for some and closed for others, with its threshold where no measure is near."""
    if kind == "none":
        return None
    same_place = site.part in ("embed", "resid.mid") or site.unit is not None
    where = site if same_place else rp.Site("resid.pre", site.layer or 1)
    rng = np.random.default_rng(9)
    d = rp.Direction.from_vector(where, rng.normal(size=lm.width(where)), scale=1.7, offset=0.2)
    options = {
        "prompt mean": {"measure": "score", "over": "positions:1:"},
        "prompt last": {"measure": "cosine", "over": "last"},
        "token": {"measure": "abs_cosine", "at": "token"},
    }[kind]
    if lm.width(where) == 1:
        options["measure"] = "score"  # a cosine of one number is its sign
    values = []
    for s in sequences:
        found = gate_values(rp.When(d, above=0.0, **options), states(lm, s, where), s)
        values += found if kind == "token" else found[:1]
    values = sorted(values)
    middle = values[len(values) // 4 : -(len(values) // 4) or None] if kind == "token" else values
    gap = max(range(len(middle) - 1), key=lambda i: middle[i + 1] - middle[i])
    return rp.When(d, below=(middle[gap] + middle[gap + 1]) / 2, **options)


# -- runs ---------------------------------------------------------------------------------------------------------


def generated(lm, rows, **options):
    """Logits of each step, (rows, steps, vocab), and the tokens, prompts first, without padding."""
    seen, kept = [], {}

    def record(ids, scores):
        seen.append(scores.clone())
        kept["ids"] = ids
        return scores

    lm.generate(
        [PROMPTS[i] for i in rows],
        spans=[SPANS[i] for i in rows],
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        logits_processor=[record],
        **options,
    )
    real = lm.encode([PROMPTS[i] for i in rows]).real
    tokens = [kept["ids"][k][int((~real[k]).sum()) :].tolist() for k in range(len(rows))]
    return torch.stack(seen, 1), tokens


def sequences_of(lm, tokens=None):
    out = []
    for row, (prompt, spans) in enumerate(zip(PROMPTS, SPANS, strict=True)):
        one = lm.encode(prompt, spans=[spans])
        ids = one.input_ids[0].tolist()
        marked = {name: set(mask[0].nonzero().flatten().tolist()) for name, mask in one.spans.items()}
        out.append(Sequence(row, ids if tokens is None else tokens[row], len(ids), marked))
    return out


def same(got, want):
    got, want = (torch.as_tensor(x).detach() for x in (got, want))
    allowed = got > -np.inf  # the end token is forbidden while generating
    worst = float((got - want)[allowed].abs().max())
    return worst <= TOLERANCE * max(1.0, float(want.abs().max()))


@cache
def setting(lm, site):
    """The prompts as sequences, and the norm of a typical row at a site."""
    prompts = sequences_of(lm)
    return prompts, float(torch.cat([states(lm, s, site) for s in prompts]).norm(dim=1).mean())


@cache
def gate_of(lm, kind, site):
    """A gate, and for each prompt whether it is open (None: that differs from token to token)."""
    prompts, _ = setting(lm, site)
    gate = gate_for(lm, kind, site, prompts)
    if gate is None or gate.at == "token":
        return gate, [gate is None or None] * len(prompts)
    return gate, [gate_values(gate, states(lm, s, gate.site), s)[0] < gate.below for s in prompts]


def reached(name, s):
    """The tokens that an operator may change: all, or those for which it has one of its four rows."""
    starts = {"replace from the start": 0, "replace by prompt": 0, "replace at the end": s.n_prompt - 4}
    everything = set(range(len(s.ids)))
    return everything & set(range(starts[name], starts[name] + 4)) if name in starts else everything


def check(lm, name, site, scope, kind, ways, who=None):
    """`who` is the prompt that runs by itself in the ways that have one alone; by default each in turn."""
    _, size = setting(lm, site)
    make, change = operators(lm, site, size)[name]
    gate, opened = gate_of(lm, kind, site)
    every = range(len(PROMPTS))
    some = every if who is None else [who]

    def item(rows):
        return make(rows, tokens=scope, when=gate)

    with rp.steer(lm, item(every)) as done:
        cached, tokens = generated(lm, every)
    whole = sequences_of(lm, tokens)
    # What follows a token changes nothing before it: the prompts' logits are the first of these.
    plain = [logits(lm, s, (site, scope, gate, change)) for s in whole]
    expected = [x[s.n_prompt - 1 :] for x, s in zip(plain, whole, strict=True)]
    assert all(same(cached[i], expected[i]) for i in every), "cached"
    if kind != "token":  # which generated tokens a gate lets through depends on what was steered before
        in_scope = [len(s.in_scope(scope) & reached(name, s)) for s in whole]
        assert done[0].tokens == sum(n for n, is_open in zip(in_scope, opened, strict=True) if is_open)
    if "uncached" in ways:
        with rp.steer(lm, item(every)):
            found, again = generated(lm, every, use_cache=False)
        assert again == tokens
        assert all(same(found[i], expected[i]) for i in every), "uncached"
    if "alone" in ways:
        for i in some:
            with rp.steer(lm, item([i])):
                found, again = generated(lm, [i])
            assert again == [tokens[i]]
            assert same(found[0], expected[i]), "alone"
    expected = [x[: s.n_prompt] for x, s in zip(plain, whole, strict=True)]
    for side in {"left", "right"} & set(ways):
        with rp.steer(lm, item(every)):
            found = lm.logits(PROMPTS, at="all", spans=SPANS, padding=side)
        assert all(same(found[i], expected[i]) for i in every), side
    if "single" in ways:
        for i in some:
            with rp.steer(lm, item([i])):
                assert same(lm.logits(PROMPTS[i], at="all", spans=[SPANS[i]])[0], expected[i]), "single"


def sites_of(lm):
    return [rp.Site.parse(s) for s in SITES if "@" not in s or s.partition("@")[0] in lm.parts.of_layer[1]]


@pytest.mark.parametrize("name", DECODERS)
def test_steered_logits_are_those_of_a_plain_loop(tiny_lm, name):
    lm, turn = tiny_lm(name), DECODERS.index(name)
    sites = sites_of(lm)
    for k, operator in enumerate(OPERATORS):
        site, scope = sites[(turn + k) % len(sites)], SCOPES[(4 * turn + k) % len(SCOPES)]
        gate, way = GATES[(turn + k // 2) % len(GATES)], WAYS[(2 * turn + k) % len(WAYS)]
        check(lm, operator, site, scope, gate, [way])


@pytest.mark.models
@pytest.mark.parametrize("name", ["smollm2-135m", "gemma3-270m"])
def test_steered_logits_of_a_real_model_are_those_of_a_plain_loop(real_lm, name):
    lm = real_lm(name)
    for operator, site, scope, gate, way in (
        ("add", "resid.post@12", "all", "prompt mean", "uncached"),
        ("add per row", "attn.heads@7.2", "generated", "none", "alone"),
        ("clamp", "mlp.out@10", "positions:-1,-3", "token", "left"),
    ):
        check(lm, operator, rp.Site.parse(site), scope, gate, [way], who=1)


@pytest.mark.slow
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("name", DECODERS)
def test_steered_logits_are_those_of_a_plain_loop_for_every_scope_gate_and_way(tiny_lm, name, operator):
    lm, sites = tiny_lm(name), sites_of(tiny_lm(name))
    for turn, (scope, gate) in enumerate(itertools.product(SCOPES, GATES)):
        # Which prompt runs by itself is no part of the product: they take turns.
        site, who = sites[(turn + OPERATORS.index(operator)) % len(sites)], turn % len(PROMPTS)
        check(lm, operator, site, scope, gate, WAYS, who)
