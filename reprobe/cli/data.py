"""`reprobe data`: the project's own data sets, and files in public formats."""

from typing import Annotated

import typer

from reprobe.cli.options import AsJson, Data, first_of
from reprobe.cli.show import counts_text, say, show, show_json, show_table
from reprobe.cli.verb import verb

data_app = typer.Typer(
    name="data", help="The project's own data sets, and files in public formats.", no_args_is_help=True
)


@data_app.command("list")
@verb("reprobe data list")
def data_list(as_json: AsJson = False) -> None:
    """List the project's own data sets."""
    from reprobe.prompts import PromptSet, bundled

    sets = [PromptSet.load(name).describe() for name in bundled()]
    rows = [
        {
            "name": s.name,
            "prompts": s.prompts,
            "groups": s.groups,
            "pairs": s.pairs,
            "labels": counts_text(s.labels),
            "spans": counts_text(s.spans),
        }
        for s in sets
    ]
    show_table(rows, as_json)


@data_app.command("show")
@verb("reprobe data show cities --limit 5")
def data_show(data: Data, limit: Annotated[int, first_of("rows")] = 10, as_json: AsJson = False) -> None:
    """Show the first rows of a data set."""
    from reprobe.prompts import PromptSet

    prompts = PromptSet.load(data)
    if not as_json:
        about = prompts.describe()
        show(
            {
                "name": about.name,
                "prompts": about.prompts,
                "groups": about.groups if about.has_groups else "none: each prompt counts as its own",
                "pairs": about.pairs,
                "labels": counts_text(about.labels),
                "spans": counts_text(about.spans),
                "digest": about.digest,
            }
        )
    rows = prompts.head(limit).frame.to_dicts()
    for row in rows:
        row["spans"] = {s["name"]: [s["start"], s["end"]] for s in row["spans"]}
    empty = {key for key in rows[0] if all(row[key] in (None, {}) for row in rows)}
    show_table([{k: v for k, v in row.items() if k not in empty} for row in rows], as_json)


@data_app.command("validate")
@verb("reprobe data validate my-prompts.jsonl")
def data_validate(data: Data, as_json: AsJson = False) -> None:
    """Check a data set: ids, texts, labels, groups, spans; exit 2 with the faulty rows if it is malformed."""
    from reprobe.prompts import PromptSet

    prompts = PromptSet.load(data)
    note = "" if prompts.has_groups else "; it has no groups, so each prompt counts as its own"
    say(f"{data}: {len(prompts)} prompts, sound{note}")
    if as_json:
        show_json({"data": data, "prompts": len(prompts), "digest": prompts.digest, "ok": True})
