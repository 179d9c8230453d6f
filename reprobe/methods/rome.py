"""ROME (Meng et al. 2022, arXiv:2202.05262): one fact written into one down projection by a rank-one edit.

Enters: a language model, a fact, a block. Leaves: a `WeightEdit`; the model is as it was. The MLP is read as a linear
memory W k ↦ v. The key k* is what the down projection reads at the subject's last token, averaged over the bare prompt
(half) and sampled prefixes (half); the value v* is what it should return there, found by gradient descent; then (eq. 2)

    ΔW = (v* − W k*) (C⁻¹k*)ᵀ / (k*·C⁻¹k*),    so that (W + ΔW) k* = v* exactly.

The published code computes v* − W k and k·C⁻¹k with the key of the bare prompt, and only C⁻¹k* with the averaged one;
such edits sometimes destroy a model (Gupta et al. 2024, "Rebuilding ROME", arXiv:2403.07175). Here k* stands in all
three places; `compat="rome"` gives the published form.
"""

from dataclasses import asdict, dataclass, field, replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from reprobe.control.edits import Matrix, WeightEdit
from reprobe.control.ledger import edited, ledger_of
from reprobe.errors import UsageError
from reprobe.methods import editing
from reprobe.methods.editing import PUBLISHED_RATE, Search
from reprobe.methods.moments import SecondMoment, Text, second_moments
from reprobe.model.language_model import LanguageModel
from reprobe.model.sites import Site
from reprobe.progress import Progress, silent
from reprobe.prompts.fact import Fact

#: The ridge on C, in units of the median neuron's mean square.
RIDGE = 0.01


@dataclass(frozen=True)
class Settings:
    """`prefixes` sampled with `seed` stand before the prompt in turn: all of them for the key, the first `searched` for
    the value (in the original all, which takes twice as long). `bare` is the weight of the bare prompt in the key: a
    short subject that begins a text has another key there than elsewhere, and with 1/21 of the mean (None: all count
    alike, as in the original) the edit misses it. `ridge` is that of `SecondMoment.solve`; `compat="rome"` is the
    published form (see above), with equal weights and Adam's search."""

    search: Search = field(default_factory=Search)
    prefixes: int = 20
    searched: int = 5
    bare: float | None = 0.5
    seed: int = 0
    ridge: float = RIDGE
    compat: Literal["rome"] | None = None

    def __post_init__(self) -> None:
        if self.bare is not None and not 0 < self.bare <= 1:
            raise UsageError(f"bare={self.bare}: a weight above 0 and at most 1, or None")
        if self.prefixes < 0 or self.searched < 0:
            raise UsageError(f"prefixes={self.prefixes}, searched={self.searched}: numbers of prefixes, 0 or more")
        if self.compat not in (None, "rome"):
            raise UsageError(f"compat={self.compat!r}; None, or 'rome' for the published form")

    @property
    def searching(self) -> Search:
        """`search`, and with Adam as published for `compat="rome"`."""
        if self.compat == "rome" and self.search.rate is None:
            return replace(self.search, rate=PUBLISHED_RATE)
        return self.search


@dataclass(frozen=True, eq=False)
class Association:
    """What an edit shall write: `key` k* → `value` v*, both float64.

    `bare_key` is the key of the bare prompt alone. `value` is what the down projection returns, its bias included.
    `loss`, `probability` and `steps` are the search's.
    """

    layer: int
    key: Float[np.ndarray, " inputs"]
    bare_key: Float[np.ndarray, " inputs"]
    value: Float[np.ndarray, " outputs"]
    loss: float
    probability: float
    steps: int


def edit(
    lm: LanguageModel,
    fact: Fact | None = None,
    *,
    subject: str = "",
    prompt: str = "",
    target: str = "",
    layer: int | None = None,
    moment: SecondMoment | Text | None = None,
    settings: Settings | None = None,
    progress: Progress = silent,
) -> WeightEdit:
    """The edit that makes the model continue the fact's prompt with its new object.

    Give a `Fact`, or `subject`, `prompt` (with the subject, or {} for it) and `target`. `layer` defaults to the block
    known to work for the bundled models. `moment` is the block's second moment, or the text it is of (default: sampled
    from the model; minutes on first use, then cached). The edit carries its measured effect; a warning says if there
    is none. Raises `DataError` for a subject that is not in its prompt or an empty target, `UnknownSite` for a block
    beyond the model or without `mlp.neurons`, `UsageError` for a singular moment, or one of another block or width.
    """
    if (fact is None) != bool(subject or prompt or target):
        raise UsageError("give a fact, or subject, prompt and target")
    what = fact or Fact.of(subject=subject, prompt=prompt, new=target)
    how = settings or Settings()
    where = editing.default_layers(lm).rome if layer is None else layer
    editing.require_editable(lm, [where])
    if isinstance(moment, SecondMoment):
        found = moment
        editing.require_moments({where: found}, [where])
    else:
        found = second_moments(lm, [where], moment, progress=progress)[where]
    before = editing.probabilities(lm, [what])
    association = associate(lm, what, where, how)
    matrix = Matrix.projection(lm, where)
    left, right = rank_one(association, found, matrix, bias_of(lm, where), how)
    ledger = ledger_of(lm)
    made = WeightEdit(
        matrix.name,
        left,
        right,
        base=ledger.base,
        after=ledger.digests,
        facts=(what,),
        provenance={
            "method": "rome",
            "layer": where,
            "settings": asdict(how),
            "moment": {"digest": found.digest, "tokens": found.n, "text": dict(found.text)},
            "search": {
                "loss": association.loss,
                "probability": association.probability,
                "steps": association.steps,
            },
        },
    )
    with edited(lm, made):
        after = editing.probabilities(lm, [what])
    made = made.measured(editing.effects(before, after))
    editing.warn_without_effect([made])
    return made


def associate(lm: LanguageModel, fact: Fact, layer: int, settings: Settings) -> Association:
    """The key and the value of a fact at a block."""
    neurons, post = Site("mlp.neurons", layer), Site("resid.post", layer)
    prefixes = editing.sample_prefixes(lm, n=settings.prefixes, seed=settings.seed)
    keys = editing.at_subjects(lm, [fact], ["", *prefixes], [neurons])[neurons][0].double().cpu().numpy()
    lookup = editing.look_up(lm, [fact], prefixes[: settings.searched], layer, [neurons, post])
    stream = lookup.tail.seen[post]
    with torch.no_grad():
        raw = lm.architecture.projection(lm.net, layer)(lookup.at_subject(neurons))
        rest = stream[:, 0] - lm.architecture.after_projection(lm.net, layer, raw)
    start = raw[lookup.bare]

    def place(delta: Tensor) -> Tensor:
        return rest + lm.architecture.after_projection(lm.net, layer, (raw + delta).to(raw.dtype))

    found = editing.search(lm, lookup, stream, place, start, settings.searching)
    return Association(
        layer,
        editing.mean_key(keys, None if settings.compat == "rome" else settings.bare),
        keys[0],
        (start[0].double() + found.delta[0]).cpu().numpy(),
        float(found.loss[0]),
        float(found.probability[0]),
        found.steps,
    )


def rank_one(
    association: Association,
    moment: SecondMoment,
    matrix: Matrix,
    bias: Float[np.ndarray, " outputs"],
    settings: Settings,
) -> tuple[Float[np.ndarray, "outputs 1"], Float[np.ndarray, "inputs 1"]]:
    """The factors of ΔW. Raises `UsageError` for a moment of another width."""
    if moment.width != len(association.key):
        raise UsageError(f"a moment of width {moment.width} does not fit keys of width {len(association.key)}")
    direction = moment.solve(association.key, settings.ridge)
    direction = direction / np.linalg.norm(direction)
    key = association.bare_key if settings.compat == "rome" else association.key
    residual = association.value - bias - matrix.values.cpu().numpy() @ key
    return (residual / (direction @ key))[:, None], direction[:, None]


def bias_of(lm: LanguageModel, layer: int) -> Float[np.ndarray, " outputs"]:
    """The bias of a block's down projection; zeros where it has none."""
    module = lm.architecture.projection(lm.net, layer)
    bias = getattr(module, "bias", None)
    outputs = Matrix.projection(lm, layer).values.shape[0]
    values: np.ndarray = np.zeros(outputs) if bias is None else bias.detach().double().cpu().numpy()
    return values
