"""`reprobe steer`: prompts continued with and without steering, the chat, and the strength of a price."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from reprobe.cli.inputs import load_model, passages, read_lines
from reprobe.cli.options import (
    Act,
    ActAt,
    AsJson,
    Device,
    Dtype,
    MaxNewTokens,
    Mismatch,
    Model,
    Overwrite,
    Remove,
    Revision,
    Scope,
    Strength,
    Texts,
    ToTable,
)
from reprobe.cli.outputs import new_table
from reprobe.cli.show import say, show, show_json
from reprobe.cli.verb import verb
from reprobe.errors import UsageError


class _Steer(TyperGroup):
    """`reprobe steer MODEL PROMPT` beside `reprobe steer tune`: what is no subcommand is a prompt's."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, args if args and args[0] in self.commands else ["prompt", *args])


steer_app = typer.Typer(
    name="steer", cls=_Steer, short_help="Continue a prompt with and without steering; tune a strength."
)


@steer_app.command("prompt")
@verb('reprobe steer smollm2-135m "She opened the letter and" --direction happiness.safetensors --strength 4')
def steer(
    model: Model,
    direction: Act,
    prompt: Annotated[str | None, typer.Argument(help="The text to continue.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="A file of texts to continue: one a line, or .jsonl, .json, .csv, .parquet.")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Answer what is typed; /strength X, /off and /on change the steering.")
    ] = False,
    strength: Strength = None,
    ablate: Remove = False,
    site: ActAt = None,
    tokens: Scope = None,
    max_new_tokens: MaxNewTokens = 40,
    dtype: Dtype = None,
    device: Device = None,
    revision: Revision = None,
    allow_mismatch: Mismatch = False,
    as_json: AsJson = False,
) -> None:
    """Continue a prompt with and without steering, with a score per token, and say how far apart the two models are.

    The file is a direction or a steering. With --chat, talk to the steered model. `reprobe steer tune` finds the
    strength of a wanted price.
    """
    if (prompt is not None) + (prompts is not None) + chat != 1:
        raise UsageError("give one of these: a PROMPT, --prompts FILE, or --chat")
    if chat and as_json:
        raise UsageError("--chat is for people: without --json")
    from reprobe.cli import steering as run

    steerer = run.load(direction, ablate=ablate, site=site, tokens=tokens)
    item = steerer(strength)
    texts = [prompt or ""] if prompts is None else _prompts(prompts)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "allow_mismatch": allow_mismatch}
    lm = load_model(model, dtype=dtype, device=device, revision=revision)
    if chat:
        run.chat(lm, steerer, strength, read=_typed, show=typer.echo, say=say, **options)
        return
    results = run.compared(lm, texts, item, **options)
    rows = [
        {
            "unsteered": r.unsteered,
            "steered": r.steered.text,
            "scores": r.steered.to_json() if as_json else r.steered.scored,
            "KL on the unsteered text, nats per token": round(r.kl, 4),
        }
        for r in results
    ]
    if prompts is None:
        show(rows[0], as_json)
        return
    rows = [{"prompt": r.prompt, **row} for r, row in zip(results, rows, strict=True)]
    if as_json:
        show_json(rows)
        return
    for i, row in enumerate(rows):
        typer.echo(nl=i > 0)
        show(row)


@steer_app.command("tune")
@verb("reprobe steer tune smollm2-135m --direction happiness.safetensors --target-kl 0.1")
def steer_tune(
    model: Model,
    direction: Act,
    target_kl: Annotated[float, typer.Option(help="KL from the unsteered model, in nats per token.")],
    away: Annotated[bool, typer.Option("--away", help="Steer away: look among negative strengths.")] = False,
    site: ActAt = None,
    tokens: Scope = None,
    texts: Texts = None,
    to_table: ToTable = None,
    dtype: Dtype = None,
    device: Device = None,
    revision: Revision = None,
    allow_mismatch: Mismatch = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Find the strength at which adding a direction costs a given KL on ordinary text (± 5 %, 8 evaluations).

    Of a steering it is the factor by which all its strengths are multiplied. Exit 1 if no strength reaches the KL.
    """
    import reprobe as rp
    from reprobe.cli import steering as run
    from reprobe.probing import write_table
    from reprobe.progress import terminal

    new_table(to_table, overwrite)
    steerer, given = run.load(direction, ablate=False, site=site, tokens=tokens), passages(texts)
    lm = load_model(model, dtype=dtype, device=device, revision=revision)
    with terminal() as progress:
        found = rp.tune(
            lm,
            steerer,
            target_kl,
            texts=given,
            start=-1.0 if away else 1.0,
            allow_mismatch=allow_mismatch,
            progress=progress,
        )
    told = {"strength": found.strength, "kl": found.kl, "kl_low": found.kl_low, "kl_high": found.kl_high}
    if to_table is not None:
        done = run.done_by(steerer(found.strength))
        about = {"model": lm.identity.to_json(), "interventions": done, "target_kl": target_kl, **told}
        write_table(found.tried, to_table, overwrite=overwrite, about=about)
    show(told | {"target_kl": target_kl, "evaluations": found.tried.height}, as_json)


def _typed() -> str | None:
    """A line from the terminal or a pipe; None at its end."""
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None


def _prompts(path: Path) -> list[str]:
    """The texts of a prompt file, or of any other file one a line."""
    from reprobe.prompts import PromptSet
    from reprobe.prompts.load import SUFFIXES

    return PromptSet.load(str(path)).texts if path.suffix in SUFFIXES else read_lines(path)
