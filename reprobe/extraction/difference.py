"""How far apart two computations of a row are, and how far rounding alone may take them.

Enters: rows as they were stored and as they were computed again; names of dtypes. Leaves: relative differences, of
components and of rows, and the tolerance that separates rounding from another activation. Does not know where rows
come from.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from reprobe.errors import UsageError

#: The row difference that is put down to the composition of the batch, by the dtype of the computation: two to three
#: times the worst that was measured (1.5e-5, 0.018, 0.075). Measured were all parts of all blocks of SmolLM2-135M and
#: Gemma3-270M at every token of 24 statements, and of tiny models of every family; packs of 512 tokens against one
#: prompt at a time. Of neighbouring tokens of the two the nearest are 0.35 apart.
BATCHING = {"float32": 5e-5, "float16": 0.04, "bfloat16": 0.15}
#: Half the distance between neighbouring numbers: what storing a value in a dtype changes it by, relative to itself.
ROUNDING = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-9}

#: Share of a row's components that may be massive without setting the scale by which the others are judged.
_MASSIVE = 0.01
#: How many times the root mean square the greatest difference of rounding may be.
_PEAK = 20


def tolerance_of(*computed: str, stored: str) -> float:
    """The greatest row difference of equal activations that were computed in these dtypes and stored in another.

    Raises `UsageError` for a dtype whose rounding has not been measured.
    """
    if unknown := [dtype for dtype in computed if dtype not in BATCHING]:
        raise UsageError(
            f"no tolerance is known for activations computed in {unknown[0]}; it is for {', '.join(BATCHING)}. "
            "Say one: tolerance=1e-3 (--tolerance)"
        )
    return max(BATCHING[dtype] for dtype in computed) + ROUNDING[stored]


def component_differences(
    stored: Float[Tensor, "rows width"], computed: Float[Tensor, "rows width"]
) -> Float[Tensor, "rows width"]:
    """|stored − computed| of each component, relative to the greater of its own magnitude and its row's scale.

    A row's scale is the root mean square of its computed components, the largest 1 % of them cut down to the next.
    So a few massive components, which residual streams have, neither hide a difference elsewhere nor raise an alarm
    by their own rounding. 0 where both are the same (also the same infinity, or both NaN), infinite where only one
    is a number.
    """
    a, b = stored.float(), computed.float()
    size = b.abs().nan_to_num(0.0, posinf=torch.finfo(torch.float32).max)
    massive = min(math.ceil(_MASSIVE * size.shape[1]), size.shape[1] - 1)
    most = size.topk(massive + 1, dim=1).values[:, -1:]
    # Rows of all but zeros (neurons behind a ReLU) have no ordinary components: there the whole row sets the scale.
    scale = _rms(torch.where(most > 0, size.clamp(max=most), size))
    relative = ((a - b).abs() / torch.maximum(size, scale)).nan_to_num(torch.inf, posinf=torch.inf)
    return relative.masked_fill((a == b) | (a.isnan() & b.isnan()), 0.0)


def row_differences(
    stored: Float[Tensor, "rows width"], computed: Float[Tensor, "rows width"]
) -> Float[Tensor, " rows"]:
    """The root mean square of each row's `component_differences`, or a twentieth of the greatest where that is more.

    The mean is what tells one place of a model from another in half precision, where single components differ by
    chance; the greatest is what one damaged value shows in.
    """
    each = component_differences(stored, computed)
    return torch.maximum(_rms(each)[:, 0], each.amax(1) / _PEAK)


def _rms(values: Tensor) -> Tensor:
    return values.square().mean(1, keepdim=True).sqrt()
