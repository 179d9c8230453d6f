"""`reprobe doctor`: is this installation, this machine and this model fit for work?

Enters: the name of a model, or none. Leaves: versions, devices, threads, folders with their sizes and free room,
optional extras, whether the model's sites are where they say, and what is wrong. Fetches nothing that was not named.
"""

import os
import platform
import re
import shutil
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

from reprobe.cli.inputs import load_model
from reprobe.cli.options import MODEL_HELP, AsJson, Device, Dtype, Revision, model_names
from reprobe.cli.show import bytes_text, say, show_json, show_table
from reprobe.cli.verb import verb
from reprobe.errors import ReprobeError, UnsupportedModel, UsageError

DISTRIBUTION = "reprobe-lm"
#: Below this much free room a cache cannot take in the largest bundled model.
ROOM = 2_000_000_000


@verb("reprobe doctor smollm2-135m")
def doctor(
    model: Annotated[
        str | None,
        typer.Argument(
            help=f"{MODEL_HELP} Default: a bundled one that is in the cache.",
            autocompletion=model_names,
            metavar="MODEL",
        ),
    ] = None,
    dtype: Dtype = None,
    device: Device = None,
    revision: Revision = None,
    as_json: AsJson = False,
) -> None:
    """Look whether everything is in order: versions, devices, folders, and that a model's sites are where they say.

    Exit 1 if something is wrong. Without MODEL nothing is fetched.
    """
    problems: list[str] = []
    told: dict[str, Any] = {
        "versions": _versions(problems),
        "devices": _devices(problems),
        "threads": _threads(),
        "folders": _folders(problems),
        "extras": _extras(),
        "sites": _sites(model or _cached(), problems, dtype=dtype, device=device, revision=revision),
    }
    told |= {"problems": problems, "ok": not problems}
    if as_json:
        show_json(told)
    else:
        _show(told)
    if problems:
        raise typer.Exit(1)


def _versions(problems: list[str]) -> dict[str, str | None]:
    """Of everything that is required; what is absent or too old is a problem."""
    from packaging.requirements import Requirement

    found: dict[str, str | None] = {DISTRIBUTION: metadata.version(DISTRIBUTION), "python": platform.python_version()}
    for requirement in map(Requirement, metadata.requires(DISTRIBUTION) or ()):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = found[requirement.name] = _version(requirement.name)
        if version is None:
            problems.append(f"{requirement.name} is not installed: pip install '{requirement}'")
        elif not requirement.specifier.contains(version, prereleases=True):
            problems.append(f"{requirement.name} {version} is installed: pip install '{requirement}'")
    return found


def _extras() -> list[dict[str, Any]]:
    """What further features need, and how to get it."""
    from packaging.requirements import Requirement

    requirements = [Requirement(text) for text in metadata.requires(DISTRIBUTION) or ()]
    return [
        {
            "extra": extra,
            "version": _version(requirement.name),
            "install": f"pip install '{DISTRIBUTION}[{extra}]'",
        }
        for extra in metadata.metadata(DISTRIBUTION).get_all("Provides-Extra") or ()
        for requirement in requirements
        if requirement.marker is not None
        and requirement.marker.evaluate({"extra": extra})
        and not requirement.marker.evaluate({"extra": ""})
    ]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _devices(problems: list[str]) -> list[dict[str, Any]]:
    """The processor and each GPU, which must multiply as the processor does."""
    import torch

    found: list[dict[str, Any]] = [{"device": "cpu", "name": _processor(), "memory": _memory()}]
    one = torch.linspace(-1, 1, 64 * 64).reshape(64, 64)
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        about = torch.cuda.get_device_properties(i)
        found.append({"device": f"cuda:{i}", "name": about.name, "memory": about.total_memory})
        try:
            same = torch.allclose((one.to(f"cuda:{i}") @ one.to(f"cuda:{i}")).cpu(), one @ one, rtol=1e-2, atol=1e-2)
        except RuntimeError as e:
            problems.append(f"cuda:{i} ({about.name}) cannot be used: {str(e).splitlines()[0]}")
        else:
            if not same:
                problems.append(f"cuda:{i} ({about.name}) multiplies two matrices to another result than the processor")
    return found


def _processor() -> str:
    try:
        named = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:  # no Linux
        named = None
    return named[1].strip() if named else platform.processor() or platform.machine()


def _memory() -> int | None:
    """Of the machine, in bytes."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _threads() -> dict[str, Any]:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"torch": torch.get_num_threads(), "cores": cores, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS")}


def _folders(problems: list[str]) -> list[dict[str, Any]]:
    """Where weights and temporary files go: what is there, and what still fits."""
    from huggingface_hub.constants import HF_HUB_CACHE

    from reprobe.model.cache import cache_folder

    places = (
        ("REPROBE_CACHE", cache_folder()),
        ("HF_HUB_CACHE", Path(HF_HUB_CACHE)),
        ("TMPDIR", Path(tempfile.gettempdir())),
    )
    rows = []
    for name, path in places:
        there = next(p for p in (path, *path.parents) if p.exists())
        free, writable = shutil.disk_usage(there).free, there.is_dir() and os.access(there, os.W_OK | os.X_OK)
        held = None if name == "TMPDIR" else _size(path)  # what others left there tells nothing
        rows.append({"set by": name, "folder": str(path), "bytes": held, "free": free, "writable": writable})
        if not writable:
            problems.append(f"{path} cannot be written: set {name} to a folder that can")
        elif name == "REPROBE_CACHE" and free < ROOM:
            problems.append(f"{bytes_text(free)} are free in {there}: set {name} to a folder on a larger disk")
    return rows


def _size(folder: Path) -> int:
    """Bytes of the files in a folder, links not followed; 0 where there is none."""
    total = 0
    for parent, _, files in os.walk(folder):
        for name in files:
            try:
                total += os.lstat(os.path.join(parent, name)).st_size
            except OSError:  # gone meanwhile
                continue
    return total


def _cached() -> str | None:
    """A bundled model that is there already."""
    from reprobe.model import bundled, gguf

    return next((name for name, m in bundled.NAMES.items() if gguf.is_whole(gguf.folder_of(m.sha256))), None)


def _sites(model: str | None, problems: list[str], **how: Any) -> dict[str, Any] | None:
    """The identities between a model's sites on random tokens, and by how much each is off."""
    if model is None:
        return None
    from reprobe.model.sites import MODEL_PARTS

    start = time.perf_counter()
    told: dict[str, Any] = {"model": model}
    try:
        lm = load_model(model, **how)
        told |= {
            "architecture": lm.architecture.family,
            "sites": len(MODEL_PARTS) + sum(len(parts) for parts in lm.parts.of_layer),
            "device": str(lm.device),
            "dtype": str(lm.dtype).removeprefix("torch."),
            "seconds to load": round(time.perf_counter() - start, 1),
        }
        told["identities"] = lm.check()
    except ReprobeError as e:
        if isinstance(e, UsageError) and not isinstance(e, UnsupportedModel):
            raise
        problems.append(f"{type(e).__name__}: {e}")
        return told
    told["seconds"] = round(time.perf_counter() - start, 1)
    return told


def _show(told: dict[str, Any]) -> None:
    sites, threads = told["sites"], told["threads"]
    typer.echo(", ".join(f"{name} {version or 'missing'}" for name, version in told["versions"].items()))
    typer.echo()
    show_table([row | {"memory": _size_text(row["memory"])} for row in told["devices"]])
    typer.echo(f"{threads['torch']} threads on {threads['cores']} cores")
    typer.echo()
    sizes = [{key: _size_text(row[key]) for key in ("bytes", "free")} for row in told["folders"]]
    show_table(
        [
            row | size | {"writable": "yes" if row["writable"] else "no"}
            for row, size in zip(told["folders"], sizes, strict=True)
        ]
    )
    typer.echo()
    show_table([{"extra": e["extra"], "version": e["version"] or f"not there: {e['install']}"} for e in told["extras"]])
    typer.echo()
    if sites is None:
        typer.echo("No model was tested: none is in the cache. `reprobe doctor smollm2-135m` fetches one and tests it.")
    elif "identities" in sites:
        show_table([{"identity": name, "off by": f"{value:.1e}"} for name, value in sites["identities"].items()])
        typer.echo(
            f"{sites['model']} ({sites['architecture']}, {sites['dtype']} on {sites['device']}): all {sites['sites']} "
            f"sites are where they say; {sites['seconds']} s"
        )
    for problem in told["problems"]:
        say(f"problem: {problem}")
    if told["ok"]:
        say("everything is in order")


def _size_text(n: int | None) -> str:
    return "" if n is None else bytes_text(n)
