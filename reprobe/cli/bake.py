"""`reprobe bake`: a steering that becomes part of a model's weights, saved as an ordinary model."""

from pathlib import Path
from typing import Annotated

import typer

from reprobe.cli.inputs import load_model
from reprobe.cli.options import Act, ActAt, AsJson, Device, Dtype, Mismatch, Model, Remove, Revision, Strength
from reprobe.cli.outputs import new_folder
from reprobe.cli.show import show
from reprobe.cli.verb import verb
from reprobe.errors import UsageError


@verb("reprobe bake smollm2-135m --direction happiness.safetensors --strength 4 --to happy-model")
def bake(
    model: Model,
    direction: Act,
    to: Annotated[Path, typer.Option(help="A new folder: a model that transformers opens as it is.")],
    strength: Strength = None,
    ablate: Remove = False,
    everywhere: Annotated[
        bool, typer.Option("--everywhere", help="With --ablate: from all that is written to the stream.")
    ] = False,
    site: ActAt = None,
    untie: Annotated[
        bool, typer.Option("--untie", help="Let embedding and unembedding become two matrices where they are one.")
    ] = False,
    dtype: Dtype = None,
    device: Device = None,
    revision: Revision = None,
    allow_mismatch: Mismatch = False,
    as_json: AsJson = False,
) -> None:
    """Write a model that computes without hooks what it would compute when steered.

    Exit 2, with the reason, where no weights do the same: for a gate, a scope other than all tokens, a norm between a
    projection and the stream (Gemma 2 and 3), embeddings that are tied.
    """
    import reprobe as rp
    from reprobe.cli import steering as run
    from reprobe.control import export_baked
    from reprobe.methods import refusal

    if everywhere and (not ablate or site is not None or strength is not None):
        raise UsageError("--everywhere goes with --ablate: all of the direction is taken out, at every site")
    new_folder(to)
    vector = rp.Direction.load(direction) if everywhere else None
    steerer = run.load(direction, ablate=ablate, site=site, tokens=None)
    lm = load_model(model, dtype=dtype, device=device, revision=revision)
    item = steerer(strength) if vector is None else refusal.ablation(lm, vector)
    changed = export_baked(lm, to, item, untie=untie, allow_mismatch=allow_mismatch)
    show({"saved": str(to), "baked": item.name, "parameters changed": len(changed)}, as_json)
