"""Constrained fine-tuning (FT-L; Zhu et al. 2020, arXiv:2012.00363, as in the ROME paper): the baseline for edits.

Enters: a language model, a fact, a block. Leaves: a `WeightEdit` of the same matrix that ROME edits; the model is as
it was. Adam on −log p(new object) after the bare prompt, each weight kept within ± `norm` of where it was.
"""

from dataclasses import asdict, dataclass

import numpy as np
import torch

from reprobe.control.edits import Matrix, WeightEdit
from reprobe.control.ledger import edited, ledger_of
from reprobe.errors import UsageError
from reprobe.methods import editing
from reprobe.model.language_model import LanguageModel
from reprobe.model.sites import Site
from reprobe.model.tail import align, tail_above
from reprobe.model.text import tokenise
from reprobe.prompts.fact import Fact, continuation


@dataclass(frozen=True)
class Settings:
    """Adam at `rate` for `steps` at most, until the loss (nats) is below `stop`; `norm` bounds each weight's change.

    These are published for GPT-2 XL. How far a weight must move depends on the model: in SmolLM2 5e-4 writes nothing
    and 8e-3 (for rate and norm) does.
    """

    steps: int = 25
    rate: float = 5e-4
    stop: float = 0.01
    norm: float = 5e-4

    def __post_init__(self) -> None:
        if self.steps < 1 or self.rate <= 0 or self.norm <= 0:
            raise UsageError(f"{self}: steps, rate and norm are positive")


def edit(lm: LanguageModel, fact: Fact, *, layer: int | None = None, settings: Settings | None = None) -> WeightEdit:
    """The edit that fine-tuning one down projection comes to. Errors and warnings are those of `rome.edit`.

    The blocks below are computed once. The change has full rank.
    """
    how = settings or Settings()
    where = editing.default_layers(lm).rome if layer is None else layer
    editing.require_editable(lm, [where])
    neurons, post = Site("mlp.neurons", where), Site("resid.post", where)
    (row,) = tokenise(
        lm.tokenizer, [fact.prompt], suffixes=[continuation(fact.prompt, fact.wanted)], context=lm.context
    )
    tail = tail_above(lm, align(lm, [row.ids[:-1]], [0]), where, [neurons, post])
    asked = slice(row.suffix - 1, len(row.ids) - 1)
    targets = torch.from_numpy(row.ids[row.suffix :]).to(lm.device)
    before = editing.probabilities(lm, [fact])
    matrix = Matrix.projection(lm, where)
    module = lm.architecture.projection(lm.net, where)
    keys = tail.seen[neurons]
    with torch.no_grad():
        raw = module(keys)
        rest = tail.seen[post] - lm.architecture.after_projection(lm.net, where, raw)
    change = torch.zeros(raw.shape[-1], keys.shape[-1], device=lm.device, requires_grad=True)
    adam = torch.optim.Adam([change], lr=how.rate)
    for _ in range(how.steps):
        out = (raw.float() + keys.float() @ change.T).to(raw.dtype)
        end = tail.run(rest + lm.architecture.after_projection(lm.net, where, out))
        logp = lm.unembed(end[0, asked]).float().log_softmax(-1)
        loss = -logp.gather(1, targets[:, None]).mean()
        if float(loss.detach()) < how.stop:
            break
        (change.grad,) = torch.autograd.grad(loss, change)
        adam.step()
        with torch.no_grad():
            change.clamp_(-how.norm, how.norm)
    left, right = _factors(change.detach().double().cpu().numpy())
    ledger = ledger_of(lm)
    made = WeightEdit(
        matrix.name,
        left,
        right,
        base=ledger.base,
        after=ledger.digests,
        facts=(fact,),
        provenance={"method": "finetune", "layer": where, "settings": asdict(how)},
    )
    with edited(lm, made):
        after = editing.probabilities(lm, [fact])
    made = made.measured(editing.effects(before, after))
    editing.warn_without_effect([made])
    return made


def _factors(change: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A full matrix as a product, the identity on its shorter side."""
    outputs, inputs = change.shape
    return (np.eye(outputs), change.T) if outputs <= inputs else (change, np.eye(inputs))
