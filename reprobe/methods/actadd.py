"""Activation addition (Turner et al. 2023, arXiv:2308.10248): the difference between two prompts, added to a third.

Enters: a language model and a pair of prompts such as " Love" and " Hate". Leaves: a `Steering` that adds the
difference of their activations, token by token, to the first tokens of any prompt. Does not know hooks or padding.
"""

import numpy as np
import torch

from reprobe.control import Add, Steering
from reprobe.errors import UsageError
from reprobe.model.hooks import capture
from reprobe.model.language_model import Encoded, LanguageModel
from reprobe.model.sites import Site
from reprobe.probing.direction import Direction


def fit(lm: LanguageModel, positive: str, negative: str, *, layer: int, strength: float = 1.0) -> Steering:
    """h[t] + strength · (A⁺[t] − A⁻[t]) at the input of block `layer`, for the first tokens t of every prompt.

    A⁺ and A⁻ are `resid.pre@layer` of the two prompts, each behind a beginning-of-text token (one is put there if the
    tokenizer does not), the shorter one filled up with blanks on its right. The first tokens of a prompt's text get the
    difference that the first tokens of the two texts make, whatever the padding; the beginning-of-text token, where
    prompts have one, stays as it is, since both have the same there. Only prompts are changed: what is generated sees
    it through their keys and values. Where a prompt is the shorter, the rest of the difference is not used. `strength`
    is the paper's coefficient, of the difference itself (GPT-2-XL: layer 6, 5). Raises `UnknownSite`, `UsageError` for
    prompts that are the same or empty, or a tokenizer without a single token for a blank.
    """
    (site,) = lm.sites(Site("resid.pre", layer))
    pair = [_tokens(lm, text) for text in (positive, negative)]
    length = max(map(len, pair))
    blank = _blank(lm) if len(set(map(len, pair))) > 1 else 0
    ids = torch.tensor([t + [blank] * (length - len(t)) for t in pair], device=lm.device)
    batch = Encoded(ids, torch.ones_like(ids, dtype=torch.bool), {})
    high, low = capture(lm, lm.inputs(batch), [site])[site].double().cpu().numpy()
    identity = lm.identity
    # What the prompts to be steered begin with: position 1 is the first token of the text behind a BOS of their own.
    shift = 0 if _adds_bos(lm) else -1
    # Up to their first different token the two prompts hold the same, BOS at least.
    same = next((t for t, (a, b) in enumerate(zip(*ids.tolist(), strict=True)) if a != b), length)
    items = []
    for t in range(same, length):
        difference = high[t] - low[t]
        if np.any(difference):  # the same token at block 0
            v = Direction.from_vector(site, difference, identity=identity, provenance={"token": t})
            items.append(Add(v, strength, tokens=f"prompt:{t + shift}"))
    if not items:
        raise UsageError(f"{positive!r} and {negative!r} make no difference at {site}: they are the same tokens")
    made = {"method": "actadd", "prompts": [positive, negative], "layer": layer, "strength": strength}
    return Steering(*items, name=f"ActAdd {positive!r} − {negative!r}", provenance=made, identity=identity)


def _tokens(lm: LanguageModel, text: str) -> list[int]:
    """A text's tokens behind one beginning-of-text token."""
    ids: list[int] = lm.tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise UsageError("an empty prompt has no activations to add; to contrast with nothing, give a blank")
    first = lm.tokenizer.bos_token_id
    if first is None:
        raise UsageError(
            "the tokenizer has no beginning-of-text token, behind which the two prompts would be read: set "
            "tokenizer.bos_token"
        )
    return [int(first), *map(int, ids)]


def _adds_bos(lm: LanguageModel) -> bool:
    """Whether the tokenizer itself puts a beginning-of-text token before a text."""
    ids: list[int] = lm.tokenizer("a")["input_ids"]
    return bool(ids[0] == lm.tokenizer.bos_token_id)


def _blank(lm: LanguageModel) -> int:
    ids: list[int] = lm.tokenizer(" ", add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise UsageError(
            f"the tokenizer makes {len(ids)} tokens of a blank, so the shorter prompt cannot be filled up with it: "
            "give two prompts with as many tokens"
        )
    return int(ids[0])
