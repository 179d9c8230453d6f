"""Blocks that are run again give what the whole network gives: on every decoder family."""

import numpy as np
import pytest
import tiny
import torch

import reprobe as rp
from reprobe.errors import UnsupportedOperation
from reprobe.model.sites import Site
from reprobe.model.tail import align, branches, hold, tail_above
from reprobe.model.text import tokenise

#: One begins with the token that is changed, one has it far from the left, one ends with it.
TEXTS = ("on the mat is a cat", "the theory of the other and the rest is on", "in the end of")
AT = (0, 6, -1)


def rows_of(lm):
    rows = [t.ids for t in tokenise(lm.tokenizer, TEXTS)]
    return rows, [a % len(row) for a, row in zip(AT, rows, strict=True)]


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("family", tiny.DECODERS)
def test_a_tail_on_the_networks_own_values_gives_the_networks_own_end(tiny_lm, family, bos):
    lm = tiny_lm(family, bos)
    rows, at = rows_of(lm)
    site = Site("resid.post", 1)
    tail = tail_above(lm, align(lm, rows, at), 1, [site])
    with torch.no_grad():
        got = lm.unembed(tail.run(tail.seen[site]))
        again = lm.unembed(tail.run(tail.seen[site]))
    assert torch.equal(got, again), "running leaves nothing behind"
    for i, (text, a) in enumerate(zip(TEXTS, at, strict=True)):
        want = lm.logits(text, at="all")[0][a:]
        torch.testing.assert_close(got[i, : len(want)], want, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", tiny.DECODERS)
def test_a_change_in_the_tail_is_the_same_change_in_the_network(tiny_lm, family):
    """An intervention at the chosen token, through the hooks, against the tail."""
    lm = tiny_lm(family)
    rows, at = rows_of(lm)
    site = Site("resid.post", 0)
    tail = tail_above(lm, align(lm, rows, at), 0, [site])
    step = torch.from_numpy(np.random.default_rng(0).normal(size=lm.d_model)).float()
    h = tail.seen[site].clone()
    h[:, 0] += step
    with torch.no_grad():
        got = lm.unembed(tail.run(h))
    for i, (row, a) in enumerate(zip(rows, at, strict=True)):
        mask = torch.zeros(len(row), 1)
        mask[a] = 1.0
        handle = lm.architecture.blocks(lm.net)[0].register_forward_hook(
            lambda m, args, out, mask=mask: out + mask * step if torch.is_tensor(out) else (out[0] + mask * step,)
        )
        try:
            with torch.no_grad():
                want = lm.net(input_ids=torch.from_numpy(row)[None]).logits[0, a:]
        finally:
            handle.remove()
        torch.testing.assert_close(got[i, : len(want)], want, atol=2e-5, rtol=1e-4)
        assert (want - lm.logits(TEXTS[i], at="all")[0][a:]).abs().max() > 1e-3


@pytest.mark.parametrize("family", tiny.DECODERS)
def test_the_projection_and_what_follows_it_give_mlp_out(tiny_lm, family):
    lm = tiny_lm(family)
    for layer in (i for i, have in enumerate(lm.parts.of_layer) if "mlp.neurons" in have):
        neurons, out = Site("mlp.neurons", layer), Site("mlp.out", layer)
        with torch.no_grad(), rp.observe(lm, [neurons, out]) as seen:
            lm.net(input_ids=torch.arange(5, 14)[None])
            raw = lm.architecture.projection(lm.net, layer)(seen[neurons])
            torch.testing.assert_close(
                lm.architecture.after_projection(lm.net, layer, raw), seen[out], atol=1e-6, rtol=1e-5
            )


@pytest.mark.parametrize("first", [0, 3, -1])
@pytest.mark.parametrize("family", tiny.DECODERS)
def test_branches_are_the_blocks_of_the_network_behind_the_rows_held(tiny_lm, family, first):
    """Two rows with noise, held once; three copies of each, block by block, are the same rows again, and the last block
    has its last tokens without the others."""
    lm = tiny_lm(family)
    ids = torch.from_numpy(tokenise(lm.tokenizer, [TEXTS[1]])[0].ids)[None].expand(2, -1)
    n, last = ids.shape[1], lm.n_layers - 1
    first %= n
    posts = [Site("resid.post", layer) for layer in range(lm.n_layers)]
    with rp.steer(lm, rp.Noise(0.7, site="embed", tokens="positions:0:3")):
        held = hold(lm, ids, [Site("embed"), *posts])
    assert (held.seen[posts[0]][0] != held.seen[posts[0]][1]).any()
    here, end = branches(lm, held, first), branches(lm, held, n - 1)
    h = held.seen[Site("embed")][:, first:].repeat(3, 1, 1)
    for layer, post in enumerate(posts):
        want = held.seen[post][:, first:].repeat(3, 1, 1)
        if layer == last:
            ending = here.run_end(layer, h, end)
            torch.testing.assert_close(ending, want[:, -1:], atol=2e-5, rtol=1e-4)
        h = here.run(layer, h)
        torch.testing.assert_close(h, want, atol=2e-5, rtol=1e-4)


def test_interventions_act_on_branches_at_positions_of_the_text(tiny_lm):
    lm = tiny_lm("opt")  # its MLP sees all tokens in one row
    ids = torch.from_numpy(tokenise(lm.tokenizer, [TEXTS[1]])[0].ids)[None]
    held = hold(lm, ids, [Site("resid.post", 0), Site("resid.post", 1)])
    site, given = Site("mlp.out", 1), held.seen[Site("resid.post", 0)]
    with rp.steer(lm, rp.Scale(site, 0.0, tokens="positions:4")):
        want = hold(lm, ids, [Site("resid.post", 1)]).seen[Site("resid.post", 1)]
        got = branches(lm, held, 2).run(1, given[:, 2:].repeat(2, 1, 1))
    torch.testing.assert_close(got, want[:, 2:].repeat(2, 1, 1), atol=2e-5, rtol=1e-4)
    assert (want[:, 4] != held.seen[Site("resid.post", 1)][:, 4]).any()


def test_encoders_and_steered_models_have_no_tail(tiny_lm):
    lm = tiny_lm("bert")
    rows, at = rows_of(lm)
    with pytest.raises(UnsupportedOperation, match="encoder"):
        tail_above(lm, align(lm, rows, at), 0, [])
    lm = tiny_lm("llama")
    rows, at = rows_of(lm)
    direction = rp.Direction.from_vector("resid.post@1", np.ones(lm.d_model), scale=1.0)
    with rp.steer(lm, rp.Add(direction)), pytest.raises(UnsupportedOperation, match="steered"):
        tail_above(lm, align(lm, rows, at), 0, [])
