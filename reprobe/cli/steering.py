"""What `reprobe steer` does between the library's calls: prompts continued with and without steering, and the chat.

Enters: a language model, a steering (from a file of a direction or of a `Steering`), prompts or typed lines. Leaves:
texts, a score per token, prices. Does not know options or exit codes; `reprobe.cli.steer` does.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from jaxtyping import Float

import reprobe as rp
from reprobe.errors import ReprobeError, UsageError
from reprobe.evaluation.effect import Baseline
from reprobe.probing import artifact

#: Prompts that are continued together.
_AT_ONCE = 16
COMMANDS = "/strength X, /off, /on, /quit"


@dataclass(frozen=True, eq=False)
class Steerer:
    """What a file steers with: the steering of a strength, and the strength where none is given."""

    of: Callable[[float], rp.Steering]
    default: float

    def __call__(self, strength: float | None) -> rp.Steering:
        return self.of(self.default if strength is None else strength)


def load(path: Path, *, ablate: bool, site: str | None, tokens: str | None, otherwise: str = "all") -> Steerer:
    """A direction, to be added (by default 4 scales of it) or ablated on `tokens` (None: on those of `otherwise`); or a
    `Steering`, times a strength (by default 1).

    Raises `UsageError` if a `Steering`, whose file says all the rest, is told where and on what to act.
    """
    if artifact.kind_of(path) == "steering":
        if ablate or site is not None or tokens is not None:
            raise UsageError(
                f"{path} holds a steering, which says itself what is done where: --ablate, --site and --tokens are "
                "for a direction"
            )
        steering = rp.Steering.load(path)
        return Steerer(lambda strength: strength * steering, 1.0)
    direction, operator = rp.Direction.load(path), rp.Ablate if ablate else rp.Add

    def of(strength: float) -> rp.Steering:
        return rp.Steering(operator(direction, strength, site=site, tokens=tokens or otherwise), name=path.stem)

    return Steerer(of, 1.0 if ablate else 4.0)


def done_by(*steerings: rp.Steering) -> list[str]:
    """What steerings do, in words, for the tables of what that does."""
    return [
        f"{item}" + ("" if isinstance(item.strength, np.ndarray) else f", strength {item.strength:g}")
        for steering in steerings
        for item in steering.interventions
    ]


def per_question(plain: rp.Choices, steered: rp.Choices) -> pl.DataFrame:
    """A line per question, with the metrics of the plain model and, as NAME_steered, of the steered."""
    own = steered.table.select(rp.evaluation.METRICS).rename(lambda metric: f"{metric}_steered")
    return plain.table.hstack(own)


def read_by(steering: rp.Steering) -> list[rp.Direction]:
    """The directions along which a steering acts, where it acts: with these a text is scored."""
    found: dict[tuple[rp.Site, bytes], rp.Direction] = {}
    for item in steering.interventions:
        direction = item.target if isinstance(item, rp.Scale) else getattr(item, "direction", None)
        if isinstance(direction, rp.Direction):
            found.setdefault((item.site, direction.vector.tobytes()), direction.at(item.site))
    return list(found.values())


@dataclass(frozen=True, eq=False)
class Reply:
    """A generated text, and the mean score of the directions at each of its tokens that the model read on.

    The last token is never read, so it has no score; without directions there are none at all.
    """

    text: str
    tokens: tuple[str, ...]
    scores: Float[np.ndarray, " tokens"]

    @property
    def scored(self) -> str:
        """The tokens with their scores, on one line."""
        return "".join(f"{t!r:.40}"[1:-1] + f"({s:+.1f})" for t, s in zip(self.tokens, self.scores, strict=True))

    def to_json(self) -> list[dict[str, object]]:
        return [{"token": t, "score": round(float(s), 3)} for t, s in zip(self.tokens, self.scores, strict=True)]


def replies(
    lm: rp.LanguageModel,
    prompts: Sequence[object],
    steering: rp.Steering | None,
    directions: Sequence[rp.Direction],
    *,
    max_new_tokens: int,
    allow_mismatch: bool,
) -> list[Reply]:
    """Greedy continuations of prompts (texts or chats) under a steering, scored with directions."""
    items = [] if steering is None else [steering]
    batch: list[object] = list(prompts)
    with rp.steer(lm, *items, allow_mismatch=allow_mismatch):
        if not directions:
            texts = lm.generate(batch, max_new_tokens=max_new_tokens)  # type: ignore[arg-type]
            return [Reply(text, (), np.zeros(0)) for text in texts]
        with lm.monitor(directions, allow_mismatch=allow_mismatch) as monitor:
            texts = lm.generate(batch, max_new_tokens=max_new_tokens)  # type: ignore[arg-type]
    out = []
    for text, reading in zip(texts, monitor.readings, strict=True):
        new = np.flatnonzero(reading.generated)
        out.append(Reply(text, tuple(reading.tokens[i] for i in new), reading.scores[:, new].mean(0)))
    return out


@dataclass(frozen=True, eq=False)
class Compared:
    """A prompt's continuation without and with steering, and KL(unsteered ‖ steered) on the unsteered text."""

    prompt: str
    unsteered: str
    steered: Reply
    kl: float


def compared(
    lm: rp.LanguageModel, prompts: Sequence[str], steering: rp.Steering, *, max_new_tokens: int, allow_mismatch: bool
) -> list[Compared]:
    """Continue prompts with and without a steering."""
    directions, out = read_by(steering), []
    for start in range(0, len(prompts), _AT_ONCE):
        some = prompts[start : start + _AT_ONCE]
        plain = lm.generate(some, max_new_tokens=max_new_tokens)
        steered = replies(lm, some, steering, directions, max_new_tokens=max_new_tokens, allow_mismatch=allow_mismatch)
        for prompt, text, reply in zip(some, plain, steered, strict=True):
            # What was generated counts as generated, so that every scope has its price.
            base = Baseline.of(lm, [rp.Passage(prompt, text) if text else prompt])
            kl = base.divergence(steering, allow_mismatch=allow_mismatch).mean
            out.append(Compared(prompt, text, reply, kl))
    return out


def chat(
    lm: rp.LanguageModel,
    steerer: Steerer,
    strength: float | None,
    *,
    read: Callable[[], str | None],
    show: Callable[[str], None],
    say: Callable[[str], None],
    max_new_tokens: int,
    allow_mismatch: bool,
) -> None:
    """Answer typed lines until `read` returns None or "/quit".

    With a chat template the lines are a conversation; without one each line is continued by itself. `show` gets texts
    and scores, `say` everything else.
    """
    strength = steerer.default if strength is None else strength
    talks = getattr(lm.tokenizer, "chat_template", None) is not None
    say(f"{lm.name}: " + ("a conversation" if talks else "no chat template, so each line is continued by itself"))
    say(f"{COMMANDS}; strength {strength:g}")
    on, messages = True, list[dict[str, str]]()
    while (line := read()) is not None:
        command, _, value = line.strip().partition(" ")
        match command:
            case "":
                continue
            case "/quit":
                return
            case "/on" | "/off":
                on = command == "/on"
                say(f"steering is {command[1:]}" + (f", strength {strength:g}" if on else ""))
                continue
            case "/strength":
                try:
                    steerer(float(value))
                except ValueError as e:  # no number, or none to steer with
                    say(f"/strength {value}: {e if isinstance(e, ReprobeError) else 'give a number'}")
                    continue
                strength, on = float(value), True
                say(f"strength {strength:g}")
                continue
            case _ if command.startswith("/"):
                say(f"there is no {command}: {COMMANDS}")
                continue
        steering = steerer(strength)
        asked = [*messages, {"role": "user", "content": line.strip()}]
        try:
            (reply,) = replies(
                lm,
                [asked if talks else line],
                steering if on else None,
                read_by(steering),
                max_new_tokens=max_new_tokens,
                allow_mismatch=allow_mismatch,
            )
        except ReprobeError as e:  # too long a conversation, say: it goes on without this line
            say(f"{type(e).__name__}: {e}")
            continue
        show(reply.text.strip() if talks else reply.text)
        if reply.tokens:
            show(f"  {reply.scored}")
        if talks:
            messages = [*asked, {"role": "assistant", "content": reply.text.strip()}]
