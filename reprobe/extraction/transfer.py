"""From the device to the host while the device goes on.

Enters: a stream of packs' selected activations on the device. Leaves: the same on the host. On a GPU the copies run on
a stream of their own into pinned memory, and a pack is handed on only when the next one has been queued, so that the
device never waits for the host; at most `AHEAD` packs' selected activations are alive at once. Elsewhere a tensor is
on the host already.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor

#: Packs whose selected activations are in memory at once.
AHEAD = 2

Key = TypeVar("Key")
Name = TypeVar("Name")


def on_host(
    packs: Iterable[tuple[Key, Mapping[Name, Tensor]]], device: torch.device
) -> Iterator[tuple[Key, dict[Name, Tensor]]]:
    """The packs in their order, with their tensors on the host."""
    if device.type != "cuda":
        for key, values in packs:
            yield key, {name: tensor.cpu() for name, tensor in values.items()}
        return
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    waiting: deque[tuple[Key, Callable[[], dict[Name, Tensor]]]] = deque()
    for key, values in packs:
        waiting.append((key, _copied(values, stream)))
        if len(waiting) == AHEAD:
            done, finish = waiting.popleft()
            yield done, finish()
    for done, finish in waiting:
        yield done, finish()


def _copied(values: Mapping[Name, Tensor], stream: torch.cuda.Stream) -> Callable[[], dict[Name, Tensor]]:
    """Start copying; what is returned waits for the end and gives the copies."""
    host: dict[Name, Tensor] = {}
    events: list[torch.cuda.Event] = []
    for name, tensor in values.items():
        if tensor.device.type != "cuda":  # a model may be spread over devices, the host among them
            host[name] = tensor
            continue
        side = stream if tensor.device == stream.device else torch.cuda.Stream(tensor.device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(side):
            host[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            host[name].copy_(tensor, non_blocking=True)
            tensor.record_stream(side)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(side)
        events.append(event)

    def finish() -> dict[Name, Tensor]:
        for event in events:
            event.synchronize()
        return host

    return finish
