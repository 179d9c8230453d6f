"""MEMIT (Meng et al. 2023, arXiv:2210.07229): many facts written at once, spread over several down projections.

Enters: a language model, facts, blocks. Leaves: one `WeightEdit` a block; the model is as it was. For each fact a value
z of the last block's output at the subject's last token is found by gradient descent. Then, block by block from the
lowest, with the edits below in place: what is still missing of z is divided by the number of blocks that are left, and
written by least squares (eq. 14 there)

    ΔW = R Kᵀ (λC + K Kᵀ)⁻¹

with the facts' keys K (inputs × facts), the missing parts R (outputs × facts) and C = E[kkᵀ] of ordinary text. With a
norm behind the MLP (Gemma, OLMo), R is first carried back through it. `NullSpace` is AlphaEdit (Fang et al. 2025,
arXiv:2410.02355): the change acts only on directions that ordinary keys hardly use. Solved in float64.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
import scipy.linalg
import torch
from jaxtyping import Float
from torch import Tensor

from reprobe.control.edits import Matrix, WeightEdit
from reprobe.control.ledger import ledger_of
from reprobe.errors import UsageError
from reprobe.methods import editing
from reprobe.methods.editing import Search
from reprobe.methods.moments import SecondMoment, Text, second_moments
from reprobe.methods.rome import RIDGE
from reprobe.model.language_model import LanguageModel
from reprobe.model.sites import Site
from reprobe.progress import Progress, silent
from reprobe.prompts.fact import Fact


@dataclass(frozen=True)
class NullSpace:
    """AlphaEdit: only the `share` of C's eigenvectors that ordinary keys use least may be written on.

    `ridge` is in units of the facts' mean squared key in that space. (The original takes eigenvalues below an absolute
    number, 0.02, which means another thing at every block and model; small models may have none.)
    """

    share: float = 0.5
    ridge: float = 0.01

    def __post_init__(self) -> None:
        if not 0 < self.share < 1 or self.ridge <= 0:
            raise UsageError(f"{self}: share lies between 0 and 1, and the ridge is positive")


@dataclass(frozen=True)
class Settings:
    """`weight` is λ, how much C counts against the facts' keys. None: the width of the keys, since kᵀC⁻¹k is about
    that for ordinary keys (the paper's 15,000 at GPT-J is nearly its width, 16,384). `batch` facts are searched at
    once; the result does not depend on it beyond rounding. Otherwise as for ROME."""

    search: Search = field(default_factory=lambda: Search(clamp=0.75))
    prefixes: int = 5
    bare: float | None = 0.5
    seed: int = 0
    weight: float | None = None
    ridge: float = RIDGE
    null_space: NullSpace | None = None
    batch: int = 8

    def __post_init__(self) -> None:
        if self.batch < 1 or (self.weight is not None and self.weight <= 0):
            raise UsageError(f"batch={self.batch}, weight={self.weight}: both are positive")
        if self.weight is not None and self.null_space is not None:
            raise UsageError(f"weight={self.weight} does nothing in the null space, which is kept whole: give one")


def edit(
    lm: LanguageModel,
    facts: Sequence[Fact],
    *,
    layers: Sequence[int] | None = None,
    moments: Mapping[int, SecondMoment] | Text | None = None,
    settings: Settings | None = None,
    values: Float[Tensor, "facts d_model"] | None = None,
    progress: Progress = silent,
) -> list[WeightEdit]:
    """The edits, one a block in ascending order, that together write all facts.

    `layers` default to those known to work for the bundled models. `moments` are theirs, or the text they are of.
    `values` are those that `find_values` gave for these facts at the last block, where they are known already: finding
    them is most of the work, and neither λ nor the blocks below change them. Each edit carries all facts with their
    effect when all edits are applied; a warning counts those without. Errors are those of `rome.edit`, and `UsageError`
    for no facts, no layers, or values of another shape.
    """
    how = settings or Settings()
    wanted = list(facts)
    where = sorted(set(editing.default_layers(lm).memit if layers is None else layers))
    if not wanted or not where:
        raise UsageError(f"{len(wanted)} facts at {len(where)} blocks: there is nothing to write")
    editing.require_editable(lm, where)
    for fact in wanted:
        _ = fact.wanted
    given = moments if isinstance(moments, Mapping) else second_moments(lm, where, moments, progress=progress)
    editing.require_moments(given, where)
    if values is not None and values.shape != (len(wanted), lm.d_model):
        raise UsageError(f"{len(wanted)} facts need values {len(wanted)} × {lm.d_model}, not {tuple(values.shape)}")
    before = editing.probabilities(lm, wanted)
    prefixes = editing.sample_prefixes(lm, n=how.prefixes, seed=how.seed)
    if values is None:
        values = find_values(lm, wanted, where[-1], how, progress)
    ledger = ledger_of(lm)
    made: list[WeightEdit] = []
    try:
        for i, layer in enumerate(where):
            keys, missing_part = _keys_and_residuals(lm, wanted, prefixes, layer, where[-1], values, how.bare)
            left, right = write(keys, missing_part / (len(where) - i), given[layer], how)
            made.append(
                WeightEdit(
                    Matrix.projection(lm, layer).name,
                    left,
                    right,
                    base=ledger.base,
                    after=ledger.digests,
                    facts=tuple(wanted),
                    provenance={
                        "method": "memit",
                        "layer": layer,
                        "part": [i + 1, len(where)],
                        "settings": asdict(how),
                        "moment": {"digest": given[layer].digest, "tokens": given[layer].n},
                    },
                )
            )
            ledger.apply(made[-1:])
            progress("write", i + 1, len(where))
        after = editing.probabilities(lm, wanted)
    finally:
        held = set(ledger.digests)
        ledger.revert([e for e in made if e.digest in held])
    found = editing.effects(before, after)
    done = [e.measured(found) for e in made]
    editing.warn_without_effect(done)
    return done


def find_values(
    lm: LanguageModel,
    facts: Sequence[Fact],
    layer: int,
    settings: Settings,
    progress: Progress = silent,
) -> Float[Tensor, "facts d_model"]:
    """For each fact the output of block `layer` at the subject's last token that makes the model say its new object,
    in float64."""
    prefixes = editing.sample_prefixes(lm, n=settings.prefixes, seed=settings.seed)
    post = Site("resid.post", layer)
    out = torch.zeros(len(facts), lm.d_model, dtype=torch.float64, device=lm.device)
    # Prompts of like length together: little is padded.
    order = sorted(range(len(facts)), key=lambda i: len(facts[i].prompt))
    for first in range(0, len(order), settings.batch):
        chosen = order[first : first + settings.batch]
        lookup = editing.look_up(lm, [facts[i] for i in chosen], prefixes, layer, [post])
        here = lookup.at_subject(post)

        def place(delta: Tensor, here: Tensor = here) -> Tensor:
            return here + delta.to(here.dtype)

        start = here[lookup.bare]
        found = editing.search(lm, lookup, lookup.tail.seen[post], place, start, settings.search)
        out[chosen] = start.double() + found.delta
        progress("search", first + len(chosen), len(facts))
    return out


def write(
    keys: Float[np.ndarray, "inputs facts"],
    residuals: Float[np.ndarray, "outputs facts"],
    moment: SecondMoment,
    settings: Settings,
) -> tuple[Float[np.ndarray, "outputs rank"], Float[np.ndarray, "inputs rank"]]:
    """The factors of the least-squares change: of rank `facts`, or `outputs` where there are more facts.

    With fewer facts than inputs, one Cholesky decomposition of C and a solve of size `facts` (Woodbury) do the work.
    """
    if moment.width != len(keys):
        raise UsageError(f"a moment of width {moment.width} does not fit keys of width {len(keys)}")
    if settings.null_space is not None:
        right = _in_null_space(keys, moment, settings.null_space)
    else:
        weight = float(moment.width) if settings.weight is None else settings.weight
        woodbury = keys.shape[1] < keys.shape[0]
        right = (by_woodbury if woodbury else directly)(keys, moment, weight, settings.ridge)
    if residuals.shape[1] > residuals.shape[0]:
        return np.eye(len(residuals)), right @ residuals.T
    return residuals, right


def by_woodbury(
    keys: Float[np.ndarray, "inputs facts"], moment: SecondMoment, weight: float, ridge: float
) -> Float[np.ndarray, "inputs facts"]:
    """(λC + K Kᵀ)⁻¹ K = S (1 + Kᵀ S)⁻¹ with S = (λC)⁻¹ K."""
    spread = moment.solve(keys, ridge) / weight
    inner = np.eye(keys.shape[1]) + keys.T @ spread
    out: np.ndarray = scipy.linalg.solve(inner, spread.T, assume_a="pos").T
    return out


def directly(
    keys: Float[np.ndarray, "inputs facts"], moment: SecondMoment, weight: float, ridge: float
) -> Float[np.ndarray, "inputs facts"]:
    """(λC + K Kᵀ)⁻¹ K by a solve of size `inputs`. Raises `UsageError` if that is singular."""
    try:
        out: np.ndarray = scipy.linalg.solve(weight * moment.regularised(ridge) + keys @ keys.T, keys, assume_a="pos")
    except np.linalg.LinAlgError:
        raise UsageError(f"λC + K Kᵀ at {moment.site} is singular with ridge={ridge:g}: give a greater ridge") from None
    return out


def _in_null_space(
    keys: Float[np.ndarray, "inputs facts"], moment: SecondMoment, null: NullSpace
) -> Float[np.ndarray, "inputs facts"]:
    """P K (KᵀP K + ridge)⁻¹ with P the projection on the eigenvectors of C that ordinary keys hardly use."""
    _, vectors = np.linalg.eigh(moment.matrix)  # least used first
    free = vectors[:, : max(1, int(null.share * moment.width))]
    inside = free.T @ keys
    gram = inside.T @ inside
    ridge = null.ridge * np.trace(gram) / len(gram)
    out: np.ndarray = free @ scipy.linalg.solve(gram + ridge * np.eye(len(gram)), inside.T, assume_a="pos").T
    return out


def _keys_and_residuals(
    lm: LanguageModel,
    facts: Sequence[Fact],
    prefixes: Sequence[str],
    layer: int,
    last: int,
    values: Float[Tensor, "facts d_model"],
    bare: float | None,
) -> tuple[Float[np.ndarray, "inputs facts"], Float[np.ndarray, "outputs facts"]]:
    """Keys of block `layer`, means over prefixes, and what its down projection must return in addition so that the
    output of block `last` at the bare prompt becomes `values`, in the network as it is now."""
    neurons, post = Site("mlp.neurons", layer), Site("resid.post", last)
    seen = editing.at_subjects(lm, facts, ["", *prefixes], [neurons, post])
    keys = editing.mean_key(seen[neurons].double().cpu().numpy(), bare)
    residuals = values - seen[post][:, 0].double()
    with torch.no_grad():
        raw = lm.architecture.projection(lm.net, layer)(seen[neurons][:, 0])
    back = carry_back(lm, layer, raw, residuals)
    return keys.T, back.T.cpu().numpy()


def carry_back(
    lm: LanguageModel, layer: int, raw: Float[Tensor, "facts outputs"], step: Float[Tensor, "facts d_model"]
) -> Float[Tensor, "facts outputs"]:
    """What to add to the down projection's output `raw` so that `mlp.out` moves by `step`, in float64.

    Without a post-norm that is `step` itself (over the residual scale). A norm of root mean square reaches the points
    gain · x / rms(x) only, an ellipsoid: there the nearest point is taken, with an x as long as `raw`.
    """
    arch = lm.architecture
    if not arch.post_norms:
        plain: Tensor = step / arch.tap(lm.net, Site("mlp.out", layer)).scale
        return plain
    with torch.no_grad():
        gain = arch.after_projection(lm.net, layer, torch.ones_like(raw[:1])).double()
        goal = arch.after_projection(lm.net, layer, raw).double() + step.double()
    start = raw.detach().double()
    length = start.norm(dim=1, keepdim=True)
    found: Tensor = length * _nearest_on_ellipsoid(gain * raw.shape[1] ** 0.5, goal) - start
    return found


def _nearest_on_ellipsoid(
    axes: Float[Tensor, "1 width"], goal: Float[Tensor, "facts width"]
) -> Float[Tensor, "facts width"]:
    """Unit vectors u with the least ‖axes · u − goal‖.

    u = axes · goal / (axes² + λ), with the only λ above −min axes² at which it has length 1 (found by bisection: gains
    of one norm differ by a factor of hundreds, and a descent does not arrive).
    """
    least = axes.square().min()
    pull, stretch = axes * goal, axes.square() - least
    low = torch.zeros_like(goal[:, :1])
    high = pull.norm(dim=1, keepdim=True) + least
    for _ in range(200):
        middle = (low + high) / 2
        short = (pull / (stretch + middle)).norm(dim=1, keepdim=True) < 1
        low, high = torch.where(short, low, middle), torch.where(short, middle, high)
    u: Tensor = pull / (stretch + high)
    return torch.nn.functional.normalize(u, dim=1)
