"""`reprobe export`, `push` and `pull`: directions, steerings and grids as files for others."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from reprobe.cli.options import ActAt, AsJson, Overwrite, Revision
from reprobe.cli.outputs import new_file, results_folder
from reprobe.cli.show import show_saved
from reprobe.cli.verb import verb


@verb("reprobe export happiness.safetensors --format gguf --strength 4 --to happiness.gguf")
def export(
    file: Annotated[Path, typer.Argument(help="A direction or a steering (.safetensors).")],
    to: Annotated[Path, typer.Option(help="The file to write.")],
    format: Annotated[  # noqa: A002
        Literal["gguf", "repeng", "steering-vectors", "vllm-lens", "tensors"], typer.Option(help="Who reads it.")
    ] = "gguf",
    strength: Annotated[
        float, typer.Option(help="In units of a direction's scale; times a steering's own strengths.")
    ] = 1.0,
    site: ActAt = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Write what a direction or a steering adds, as a file that another program reads.

    gguf: a control vector of llama.cpp; repeng: the same for repeng; steering-vectors and tensors: safetensors;
    vllm-lens: JSON. A file multiplied by 1 there is the strength given here.
    """
    import reprobe as rp
    from reprobe.cli.steering import load

    new_file(to, overwrite)
    item = load(file, ablate=False, site=site, tokens=None)(strength)
    show_saved(rp.export(item, to, format=format, overwrite=overwrite), as_json)


@verb("reprobe push truth.safetensors hf:OWNER/truth --private")
def push(
    file: Annotated[Path, typer.Argument(help="A direction or a grid (.safetensors).")],
    target: Annotated[str, typer.Argument(help="A folder, or hf:OWNER/NAME on the Hugging Face hub.")],
    private: Annotated[bool, typer.Option("--private", help="If the repository is made, for its owner only.")] = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Share a direction or a grid: its file and a model card, in a folder or on the hub."""
    from reprobe.probing import load
    from reprobe.probing import push as run_push

    if not target.startswith("hf:"):
        results_folder(Path(target))
    show_saved(run_push(load(file), target, overwrite=overwrite, private=private), as_json)


@verb("reprobe pull hf:OWNER/truth --to truth.safetensors")
def pull(
    source: Annotated[str, typer.Argument(help="A folder that `reprobe push` wrote, or hf:OWNER/NAME.")],
    to: Annotated[Path, typer.Option(help="The file to write (.safetensors).")],
    revision: Revision = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Fetch a direction or a grid that was pushed, and check that it is as it was written."""
    from reprobe.probing import pull as run_pull

    new_file(to, overwrite)
    show_saved(run_pull(source, revision=revision).save(to, overwrite=overwrite), as_json)
