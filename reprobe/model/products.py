"""Matrix products on the CPU by the faster of two libraries that torch brings.

Enters: float32 tensors, as the network's linear layers multiply them. Leaves: the same products, by oneDNN instead of
MKL. MKL uses the wide instructions (AVX-512) on Intel's processors only, oneDNN on all that have them: on an AMD
processor with them it was 2.3 times as fast (240 against 104 GFLOP/s a core). Both compute in float32; the order of
summation differs, so results differ by rounding. Does not know models: layers that multiply in another way (Conv1D of
transformers), other dtypes, other devices, and whatever needs a gradient stay as they are.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

#: Bytes of weights that are kept a second time, in the order of oneDNN's loops: 8 % faster than as they are.
PACKED = 2**30


class FastProducts(TorchFunctionMode):
    """A context in which `torch.nn.functional.linear` takes oneDNN where that is faster.

    Weights must not change inside: up to `PACKED` bytes of them are copied when they are first met.
    """

    def __init__(self) -> None:
        super().__init__()
        onednn: Any = torch.backends.mkldnn  # torch's name for it is of old
        wide = torch.backends.cpu.get_cpu_capability() == "AVX512" and onednn.is_available()
        self._linear = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if wide else None
        self._packed: dict[int, tuple[Tensor, Tensor]] = {}  # by id; the weight is kept, so that its id stays its own
        self._room = PACKED

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if func is torch.nn.functional.linear and self._linear is not None:
            x, weight, bias = _arguments(*args, **given)
            plain = (t is None or (t.dtype == torch.float32 and t.device.type == "cpu") for t in (x, weight, bias))
            if all(plain) and x.numel() and not torch.is_grad_enabled():
                return self._linear(x, self._order(weight), bias, "none", [], "")
        return func(*args, **given)

    def __exit__(self, *error: Any) -> None:
        self._packed.clear()
        self._room = PACKED
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def _order(self, weight: Tensor) -> Tensor:
        """The weight in the order that oneDNN would have it, or as it is where there is no room for a copy."""
        if id(weight) not in self._packed:
            if weight.nbytes > self._room:
                return weight
            self._room -= weight.nbytes
            self._packed[id(weight)] = weight, torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 512)
        return self._packed[id(weight)][1]


def _arguments(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:  # noqa: A002
    return input, weight, bias
