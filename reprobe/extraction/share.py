"""Which shards of a store one of several processes writes.

Enters: rank and world, given or from the environment of torchrun and of SLURM arrays; the cost of each shard. Leaves:
a contiguous range of shards. Every shard has exactly one owner, and who owns it depends on nothing else: that is all
that torchrun, SLURM arrays or a cluster need to write one store together.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from reprobe.errors import UsageError


@dataclass(frozen=True)
class Share:
    """Process `rank` (from 0) of `world`."""

    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world:
            raise UsageError(f"rank {self.rank} of {self.world}: ranks count from 0 to {self.world - 1}")

    @classmethod
    def of_environment(cls, variables: Mapping[str, str] = os.environ) -> "Share":
        """The share that torchrun (RANK, WORLD_SIZE) and a SLURM array (SLURM_ARRAY_TASK_…) give this process.

        Where both are set, each task of the array is a torchrun of its own. Raises `UsageError` for a SLURM array
        whose task numbers are not evenly spaced, since a task cannot know its place in it.
        """
        share = cls()
        if "SLURM_ARRAY_TASK_ID" in variables:
            task, first, count, step = (
                _number(variables, f"SLURM_ARRAY_TASK_{name}", default)
                for name, default in (("ID", None), ("MIN", 0), ("COUNT", None), ("STEP", 1))
            )
            place, rest = divmod(task - first, step)
            if rest or not 0 <= place < count:
                raise UsageError(
                    f"SLURM_ARRAY_TASK_ID={task} is no regular step of an array of {count} from {first} by {step}: "
                    "number the array evenly (--array=0-7), or say rank and world yourself"
                )
            share = cls(place, count)
        if "RANK" in variables and "WORLD_SIZE" in variables:
            rank, world = (_number(variables, name, None) for name in ("RANK", "WORLD_SIZE"))
            share = cls(share.rank * world + rank, share.world * world)
        return share

    def shards(self, cost: Float[np.ndarray, " shards"]) -> range:
        """The shards that this process owns, given what each costs: neighbours, so that packs are rarely run twice,
        and about as much work as any other process has."""
        ends = np.cumsum(cost)
        owner = np.floor((ends - cost / 2) / ends[-1] * self.world).clip(0, self.world - 1)
        first, stop = np.searchsorted(owner, [self.rank, self.rank + 1])
        return range(int(first), int(stop))


def _number(variables: Mapping[str, str], name: str, default: int | None) -> int:
    text = variables.get(name)
    if text is None and default is not None:
        return default
    try:
        return int(text or "")
    except ValueError:
        raise UsageError(f"{name}={text!r} in the environment is not a whole number") from None
