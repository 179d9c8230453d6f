"""Matrix products on the CPU by the faster of two libraries that torch brings.

Enters: float32 tensors, as the network's linear layers multiply them. Leaves: the same products, by oneDNN instead of
MKL. MKL uses the wide instructions (AVX-512) on Intel's processors only, oneDNN on all that have them: on an AMD
processor with them it was 2.3 times as fast (240 against 104 GFLOP/s a core), and where a few rows meet a large matrix,
which is read once from memory, 1.7 times. Both compute in float32; the order of summation differs, so results differ by
rounding. Does not know models: layers that multiply in another way (Conv1D of transformers), other dtypes, other
devices, and whatever needs a gradient stay as they are.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

#: Bytes of weights that are kept a second time, in the order of oneDNN's loops: 8 % faster than as they are.
PACKED = 2**30
#: Up to so many rows, matrix × rows is the fastest way through a large matrix, with oneDNN at hand and without.
_FEW, _FEW_WITHOUT = 4, 8


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b, as `torch.nn.functional.linear` but for rounding, the fastest way there is without a copy of W."""
    if not _plain(x, weight, bias):
        return torch.nn.functional.linear(x, weight, bias)
    fast = None if torch.is_grad_enabled() else _onednn()
    rows = x.numel() // x.shape[-1]
    if 2 <= rows <= (_FEW_WITHOUT if fast is None else _FEW):
        out = (weight @ x.reshape(rows, -1).T).T.reshape(*x.shape[:-1], -1)
        return out if bias is None else out + bias
    if fast is None:
        return torch.nn.functional.linear(x, weight, bias)
    product: Tensor = fast(x, weight, bias, "none", [], "")
    return product


@cache
def _onednn() -> Any:
    """oneDNN's product, where it is the faster one; else None."""
    onednn: Any = torch.backends.mkldnn  # torch's name for it is of old
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512" and onednn.is_available()
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None) if wide else None


def _plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    if x.numel() == 0 or type(weight) not in (Tensor, torch.nn.Parameter):  # quantisers' tensors multiply by themselves
        return False
    return all(t is None or (t.dtype == torch.float32 and t.is_cpu) for t in (x, weight, bias))


class FastProducts(TorchFunctionMode):
    """A context in which `torch.nn.functional.linear` takes oneDNN where that is faster.

    Weights must not change inside: up to `PACKED` bytes of them are copied when they are first met.
    """

    def __init__(self) -> None:
        super().__init__()
        self._packed: dict[int, tuple[Tensor, Tensor]] = {}  # by id; the weight is kept, so that its id stays its own
        self._room = PACKED

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if func is torch.nn.functional.linear:
            x, weight, bias = _arguments(*args, **given)
            if not torch.is_grad_enabled() and _plain(x, weight, bias) and (fast := _onednn()) is not None:
                packed = self._order(weight)
                return linear(x, weight, bias) if packed is None else fast(x, packed, bias, "none", [], "")
        return func(*args, **given)

    def __exit__(self, *error: Any) -> None:
        self._packed.clear()
        self._room = PACKED
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def _order(self, weight: Tensor) -> Tensor | None:
        """The weight in the order that oneDNN would have it; None where there is no room for a copy."""
        if id(weight) not in self._packed:
            if weight.nbytes > self._room:
                return None
            self._room -= weight.nbytes
            self._packed[id(weight)] = weight, torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 512)
        return self._packed[id(weight)][1]


def _arguments(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:  # noqa: A002
    return input, weight, bias
