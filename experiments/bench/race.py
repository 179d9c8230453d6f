"""Timing sides against each other in one process.

Enters: named functions. Leaves: their times, taken in turn, so that a change in the machine meets all sides. Does not
know what the functions do.
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Side:
    """What is timed: `run()` works through `tokens` real tokens.

    If it runs a sample only, `of_tokens` is the number of tokens of the whole, to which its time is scaled.
    """

    name: str
    run: Callable[[], object]
    tokens: int
    of_tokens: int | None = None


@dataclass(frozen=True)
class Timing:
    """Seconds that a side would take for the whole, one per repeat. The fastest repeat is the one that counts: what
    else the machine does can only add to it."""

    name: str
    tokens: int
    of_tokens: int
    seconds: tuple[float, ...]

    @property
    def best(self) -> float:
        return min(self.seconds)

    @property
    def tokens_per_second(self) -> float:
        return self.of_tokens / self.best


def say(line: str) -> None:
    """How far a benchmark is, on stderr."""
    print(line, file=sys.stderr, flush=True)


def race(sides: Sequence[Side], repeats: int, *, tidy: Callable[[], object] = lambda: None) -> dict[str, Timing]:
    """Run all sides in turn, `repeats` times; each round begins with another side. `tidy` runs off the clock."""
    seconds: dict[str, list[float]] = {side.name: [] for side in sides}
    for k in range(repeats):
        first = k % len(sides)
        for side in [*sides[first:], *sides[:first]]:
            start = time.perf_counter()
            side.run()
            took = time.perf_counter() - start
            tidy()
            whole = side.tokens if side.of_tokens is None else side.of_tokens
            seconds[side.name].append(took * whole / side.tokens)
            say(f"round {k + 1} of {repeats}: {side.name}: {took:.2f} s")
    return {
        side.name: Timing(side.name, side.tokens, side.of_tokens or side.tokens, tuple(seconds[side.name]))
        for side in sides
    }
