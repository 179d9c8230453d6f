"""The options that the verbs of several files share: one name, one meaning and one help text for each.

What only the verbs of one file share opens that file.
"""

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(help="Bundled name, hub id, local folder, or .gguf file.")]
Data = Annotated[str, typer.Argument(help="Bundled name, .jsonl/.json/.csv/.parquet file, or hf:NAME.")]
Store = Annotated[str, typer.Argument(help="A store made by `reprobe extract`: a folder, or s3://BUCKET/PREFIX.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 …; default: CUDA where there is one.")]
Dtype = Annotated[str | None, typer.Option(help="Compute in float32, bfloat16 or float16; default: as stored.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what stands there.")]
Act = Annotated[Path, typer.Option(help="A direction or a steering (.safetensors).")]
Push = Annotated[
    float | None,
    typer.Option(
        help="In units of the direction's scale, by default 4; negative steers away. A steering's own strengths are "
        "multiplied by it, by default by 1."
    ),
]
Remove = Annotated[bool, typer.Option("--ablate", help="Remove the direction instead of adding it.")]
ActAt = Annotated[str | None, typer.Option(help="Act here instead of where the direction was read.")]
Scope = Annotated[str | None, typer.Option(help="all, prompt, generated or last; default: all.")]
Texts = Annotated[Path | None, typer.Option(help="Ordinary texts, one a line; default: sixteen of our own.")]
ToTable = Annotated[Path | None, typer.Option("--to-table", help="Save the table here (.csv, .parquet, .json).")]
Mismatch = Annotated[bool, typer.Option("--allow-mismatch", help="Use directions of another model, knowingly.")]
SampleSeed = Annotated[int, typer.Option(help="Seed of the sample.")]
