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


class FastProducts(TorchFunctionMode):
    """A context in which `torch.nn.functional.linear` takes oneDNN where that is faster."""

    def __init__(self) -> None:
        super().__init__()
        onednn: Any = torch.backends.mkldnn  # torch's name for it is of old
        wide = torch.backends.cpu.get_cpu_capability() == "AVX512" and onednn.is_available()
        self._linear = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if wide else None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if func is torch.nn.functional.linear and self._linear is not None:
            x, weight, bias = _arguments(*args, **given)
            plain = (t is None or (t.dtype == torch.float32 and t.device.type == "cpu") for t in (x, weight, bias))
            if all(plain) and x.numel() and not torch.is_grad_enabled():
                return self._linear(x, weight, bias, "none", [], "")
        return func(*args, **given)


def _arguments(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:  # noqa: A002
    return input, weight, bias
