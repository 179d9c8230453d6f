"""The verb `reprobe lorra`: a contrast of two prompts, or directions, trained into a low-rank adapter."""

from pathlib import Path
from typing import Annotated

import typer

from reprobe.cli.inputs import load_model, parse_layers
from reprobe.cli.options import AsJson, Data, Device, Dtype, Mismatch, Model, Revision, first_of, seed_of
from reprobe.cli.outputs import new_folder
from reprobe.cli.show import show
from reprobe.cli.verb import verb
from reprobe.errors import UnknownData, UsageError


@verb(
    'reprobe lorra smollm2-135m emotions --base "Here is a scene." --positive "Here is a very happy scene." '
    '--negative "Here is a very sad scene." --steps 40 --to cheerful\n'
    "reprobe edit apply smollm2-135m cheerful --to cheerful-model",
    resumable=True,
)
def lorra(
    model: Model,
    data: Data,
    to: Annotated[Path, typer.Option(help="A new folder for the adapter, as peft loads it.")],
    positive: Annotated[
        str | None, typer.Option(help="What to move towards: a prompt; {} stands for the row's own (--prompts).")
    ] = None,
    negative: Annotated[str | None, typer.Option(help="What to move away from; {} as above.")] = None,
    base: Annotated[str, typer.Option(help="The prompt after which the model shall be moved; {} as above.")] = "{}",
    direction: Annotated[
        list[Path] | None, typer.Option(help="Move along this direction (.safetensors) too, or only. Repeatable.")
    ] = None,
    prompts: Annotated[str | None, typer.Option(help="Column of the rows' own prompts; default: none.")] = None,
    responses: Annotated[str, typer.Option(help="Column of the responses, whose tokens are moved.")] = "text",
    chat: Annotated[bool, typer.Option("--chat", help="Prompts are a user's messages.")] = False,
    limit: Annotated[int | None, first_of("rows")] = None,
    alpha: Annotated[float, typer.Option(help="How far: this many times the contrast.")] = 5.0,
    beta: Annotated[float, typer.Option(help="How far along directions, in their scales.")] = 1.0,
    sites: Annotated[
        str | None, typer.Option(help="Targets: resid.post sites or patterns; default: six in the middle.")
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="Adapted blocks, e.g. 0-12; default: 0 to the last target.")
    ] = None,
    modules: Annotated[
        str | None, typer.Option(help="Adapted layers, e.g. q_proj,down_proj; default: queries and values.")
    ] = None,
    rank: Annotated[int, typer.Option(help="Rank of each change.")] = 8,
    lora_alpha: Annotated[int, typer.Option(help="LoRA's alpha.")] = 16,
    dropout: Annotated[float, typer.Option(help="LoRA's dropout.")] = 0.05,
    steps: Annotated[int, typer.Option(help="Steps of Adam.")] = 70,
    batch: Annotated[int, typer.Option(help="Texts of a pass.")] = 16,
    accumulate: Annotated[int, typer.Option(help="Passes of a step.")] = 1,
    rate: Annotated[float, typer.Option(help="Learning rate.")] = 3e-4,
    max_tokens: Annotated[int, typer.Option(help="Of each response the first N tokens count.")] = 64,
    seed: Annotated[int, seed_of("the start, the order and the dropout")] = 0,
    checkpoint: Annotated[int, typer.Option(help="Write the state every N steps.")] = 10,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted training.")] = False,
    dtype: Dtype = None,
    device: Device = None,
    revision: Revision = None,
    allow_mismatch: Mismatch = False,
    as_json: AsJson = False,
) -> None:
    """Train an adapter that moves representations towards one prompt's and away from another's (LoRRA).

    Prints the loss before the first and the last step. `reprobe edit apply` merges the adapter into a model.
    """
    from reprobe.methods import lorra as method
    from reprobe.methods.repe import Streams
    from reprobe.probing import Direction
    from reprobe.progress import terminal

    method.require_peft()
    if (positive is None) != (negative is None) or (positive is None and not direction):
        raise UsageError("give --positive and --negative, or --direction, or all")
    chosen = parse_layers(layers)
    settings = method.Settings(
        alpha=alpha,
        beta=beta,
        sites=sites,
        blocks=None if chosen is None else tuple(chosen),
        modules=None if modules is None else tuple(name.strip() for name in modules.split(",")),
        rank=rank,
        lora_alpha=lora_alpha,
        dropout=dropout,
        steps=steps,
        batch=batch,
        accumulate=accumulate,
        rate=rate,
        max_tokens=max_tokens,
        seed=seed,
    )
    if not resume:
        method.require_new(to)
        new_folder(to)
    own, answers = _columns(data, prompts, responses, limit)
    templates = (base,) if positive is None or negative is None else (base, positive, negative)
    plain, *contrast = (method.templated(own, template, chat=chat) for template in templates)
    along = [Direction.load(path) for path in direction or ()]
    lm = load_model(model, dtype=dtype, device=device, revision=revision)
    with terminal() as progress:
        found = method.train(
            lm,
            Streams(plain, *contrast) if contrast else plain,
            answers,
            to=to,
            directions=along or None,
            settings=settings,
            resume=resume,
            checkpoint=checkpoint,
            allow_mismatch=allow_mismatch,
            progress=progress,
        )
    used = found.provenance["plan"]["settings"]
    show(
        {
            "loss before": found.losses[0],
            "loss before the last step": found.losses[-1],
            "steps": len(found.losses),
            "texts": len(answers),
            "targets": ", ".join(used["sites"]),
            "adapted": f"{', '.join(used['modules'])} of blocks {', '.join(map(str, used['blocks']))}",
            "saved": str(to),
        },
        as_json,
    )


def _columns(data: str, prompts: str | None, responses: str, limit: int | None) -> tuple[list[str], list[str]]:
    """The rows' own prompts and their responses, each behind a blank where its prompt may end without."""
    from reprobe.prompts import PromptSet

    rows = PromptSet.load(data)
    rows = rows if limit is None else rows.head(limit)
    out = []
    for option, name in (("--prompts", prompts), ("--responses", responses)):
        if name is None:
            out.append([""] * len(rows))
            continue
        if name not in rows.frame.columns:
            raise UnknownData(f"{option} {name}: {rows.name} has the columns {', '.join(rows.frame.columns)}")
        values = rows.texts if name == "text" else rows.frame[name].to_list()
        if bad := [i for i, value in enumerate(values) if not isinstance(value, str) or not value.strip()]:
            raise UsageError(f"{option} {name}: row {bad[0]} of {rows.name} has no text there")
        out.append(values)
    own, answers = out
    return own, [answer if answer[0].isspace() else f" {answer}" for answer in answers]
