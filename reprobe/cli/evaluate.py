"""`reprobe evaluate`: what steering does to a model, and what else it does."""

import dataclasses
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from reprobe.cli.inputs import load_model, passages, read_text
from reprobe.cli.options import (
    Act,
    ActAt,
    AsJson,
    Device,
    Dtype,
    Mismatch,
    Model,
    Overwrite,
    Remove,
    Revision,
    Scope,
    Strength,
    Texts,
    ToTable,
    first_of,
    seed_of,
)
from reprobe.cli.outputs import new_table
from reprobe.cli.show import show_table
from reprobe.cli.verb import verb
from reprobe.errors import UsageError

evaluate_app = typer.Typer(
    name="evaluate", help="What steering does to a model, and what else it does.", no_args_is_help=True
)

Seed = Annotated[int, seed_of("the bootstrap")]


@evaluate_app.command("truthfulqa")
@verb("reprobe evaluate truthfulqa smollm2-135m --data misconceptions --direction truth.safetensors --strength 4")
def evaluate_truthfulqa(
    model: Model,
    data: Annotated[
        str | None,
        typer.Option(help="misconceptions (ours), or TruthfulQA's file; default: that in the folder REPROBE_DATA."),
    ] = None,
    direction: Annotated[
        Path | None, typer.Option(help="Steer with this direction or steering (.safetensors), and compare.")
    ] = None,
    strength: Strength = None,
    ablate: Remove = False,
    site: ActAt = None,
    tokens: Annotated[str | None, typer.Option(help="all, prompt, generated or last; default: generated.")] = None,
    primer: Annotated[
        Path | None, typer.Option(help="Text before each question, e.g. the benchmark's; default: six of our own.")
    ] = None,
    limit: Annotated[int | None, first_of("questions")] = None,
    dola: Annotated[
        str | None, typer.Option(help="Score by DoLa, and compare: high, low, or layers such as 15 or 15,17,19.")
    ] = None,
    seed: Seed = 0,
    to_table: ToTable = None,
    dtype: Dtype = None,
    device: Device = None,
    revision: Revision = None,
    allow_mismatch: Mismatch = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Multiple choice, MC1, MC2 and MC3, with intervals over questions.

    With --direction, --dola or both, the plain model is compared with the one so steered or scored.

    --to-table saves a line per question.
    """
    import reprobe as rp
    from reprobe.cli.steering import done_by, load, per_question
    from reprobe.evaluation import PRIMER, compare_choices, first_questions
    from reprobe.methods.dola import DoLa
    from reprobe.probing import write_table
    from reprobe.progress import terminal

    new_table(to_table, overwrite)
    before = PRIMER if primer is None else read_text(primer)
    prompts = rp.PromptSet.load(data or _truthfulqa())
    if limit is not None:
        prompts = first_questions(prompts, limit)
    if direction is None and (ablate or (strength, site, tokens) != (None, None, None)):
        raise UsageError("--strength, --ablate, --site and --tokens say how to steer: give a --direction")
    items = []
    if direction is not None:
        items.append(load(direction, ablate=ablate, site=site, tokens=tokens, otherwise="generated")(strength))
    decoding = None if dola is None else DoLa(_dola_layers(dola))
    lm = load_model(model, dtype=dtype, device=device, revision=revision)
    if decoding is not None:
        decoding.candidates(lm)  # raises before anything is scored
    with terminal() as progress:
        plain = rp.multiple_choice(lm, prompts, primer=before, progress=progress)
        result, table = plain.summary(seed=seed), plain.table
        if items or decoding:
            with rp.steer(lm, *items, allow_mismatch=allow_mismatch):
                steered = rp.multiple_choice(lm, prompts, primer=before, decoding=decoding, progress=progress)
            result = compare_choices(plain, steered, seed=seed)
            table = per_question(plain, steered)
    if to_table is not None:
        about = {"model": lm.identity.to_json(), "data": prompts.digest, "primer": before, "metrics": result.to_dicts()}
        if items:
            about["interventions"] = done_by(*items)
        if decoding is not None:
            about["dola"] = dataclasses.asdict(decoding)
        write_table(table, to_table, overwrite=overwrite, about=about)
    show_table(result.to_dicts(), as_json)


@evaluate_app.command("side-effects")
@verb("reprobe evaluate side-effects smollm2-135m --direction happiness.safetensors --strength 4")
def evaluate_side_effects(
    model: Model,
    direction: Act,
    strength: Strength = None,
    ablate: Remove = False,
    site: ActAt = None,
    tokens: Scope = None,
    texts: Texts = None,
    data: Annotated[
        str | None, typer.Option(help="Unrelated knowledge: facts, misconceptions, a file like them, or none.")
    ] = "facts",
    max_new_tokens: Annotated[
        int, typer.Option(help="Tokens to generate after each text's prompt; 0: none.", min=0)
    ] = 40,
    seed: Seed = 0,
    to_table: ToTable = None,
    dtype: Dtype = None,
    device: Device = None,
    revision: Revision = None,
    allow_mismatch: Mismatch = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """What steering costs: ordinary text, variety of what is written, unrelated knowledge, with intervals."""
    import reprobe as rp
    from reprobe.cli.steering import done_by, load
    from reprobe.probing import write_table
    from reprobe.progress import terminal

    new_table(to_table, overwrite)
    item = load(direction, ablate=ablate, site=site, tokens=tokens)(strength)
    unrelated = None if data == "none" else data
    given = passages(texts)
    lm = load_model(model, dtype=dtype, device=device, revision=revision)
    with terminal() as progress:
        found = rp.side_effects(
            lm,
            item,
            texts=given,
            unrelated=unrelated,
            max_new_tokens=max_new_tokens,
            allow_mismatch=allow_mismatch,
            seed=seed,
            progress=progress,
        )
    if to_table is not None:
        about = {
            "model": lm.identity.to_json(),
            "interventions": done_by(item),
            "generations": found.generations.to_dicts(),
        }
        write_table(found.table, to_table, overwrite=overwrite, about=about)
    show_table(found.table.to_dicts(), as_json)


def _dola_layers(text: str) -> Any:
    """Layers of --dola: a bucket's name, which the method checks, or whole numbers."""
    numbers = text.split(",")
    return [int(n) for n in numbers] if all(n.strip().isdecimal() for n in numbers) else text


def _truthfulqa() -> str:
    """TruthfulQA's multiple-choice file in the folder that REPROBE_DATA names."""
    folder = os.environ.get("REPROBE_DATA")
    path = Path(folder or ".") / "truthfulqa" / "mc_task.json"
    if folder is None or not path.is_file():
        why = "REPROBE_DATA is not set" if folder is None else f"there is no {path}"
        raise UsageError(
            f"TruthfulQA does not come with reprobe, and {why}: name its mc_task.json or TruthfulQA.csv with --data, "
            "or take our own questions with --data misconceptions"
        )
    return str(path)
