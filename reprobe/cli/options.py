"""The options that the verbs of several files share: one name, one meaning and one help text for each.

What only the verbs of one file share opens that file.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

#: What a shell completes. The lists' own modules load libraries that a key press should not wait for, so the names are
#: repeated here; a test holds them equal.
MODELS = ("smollm2-135m", "gemma3-270m")
DATA_SETS = (
    "cities", "comparisons", "emotions", "facts", "honesty", "misconceptions", "negations", "translations",
)  # fmt: skip


def model_names(incomplete: str) -> list[str]:
    """Bundled models and folders that begin like this."""
    return _begin(MODELS, incomplete)


def data_names(incomplete: str) -> list[str]:
    """Bundled data sets and files that begin like this."""
    return _begin(DATA_SETS, incomplete)


def _begin(names: tuple[str, ...], incomplete: str) -> list[str]:
    typed = Path(incomplete)
    folder = typed if incomplete.endswith("/") else typed.parent
    near = sorted(folder.iterdir()) if folder.is_dir() else []
    paths = (f"{path}/" if path.is_dir() else str(path) for path in near if not path.name.startswith("."))
    return [name for name in (*names, *paths) if name.startswith(incomplete)]


MODEL_HELP = "Bundled name, hub id, local folder, or .gguf file."
Model = Annotated[str, typer.Argument(help=MODEL_HELP, autocompletion=model_names)]
Data = Annotated[
    str,
    typer.Argument(help="Bundled name, .jsonl/.json/.csv/.parquet file, or hf:NAME.", autocompletion=data_names),
]
Store = Annotated[str, typer.Argument(help="A store made by `reprobe extract`: a folder, or s3://BUCKET/PREFIX.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 …; default: CUDA where there is one.")]
Dtype = Annotated[str | None, typer.Option(help="Compute in float32, bfloat16 or float16; default: as stored.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what stands there.")]
Act = Annotated[Path, typer.Option(help="A direction or a steering (.safetensors).")]
Strength = Annotated[
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

ReaderName = Literal[
    "mean-difference", "whitened", "cluster-mean", "pca", "logistic", "lda", "ccs", "k-sparse", "random"
]


def seed_of(of: str) -> Any:
    """The option of a seed: numpy and scikit-learn take no others."""
    return typer.Option(help=f"Seed of {of}.", min=0, max=2**32 - 1)


def first_of(of: str) -> Any:
    """The option that takes the first of many."""
    return typer.Option(help=f"Only the first N {of}.", min=1, metavar="N")


SampleSeed = Annotated[int, seed_of("the sample")]
MaxNewTokens = Annotated[int, typer.Option(help="Tokens to generate.", min=1)]
