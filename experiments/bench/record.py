"""What a run of a benchmark leaves behind: JSON, and Markdown made from it.

Enters: claims, timings and facts of the works. Leaves: files with them and the machine that they were measured on. No
host names and no paths. Does not know how anything was measured.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from race import Timing

from reprobe.provenance import write_durably

LIBRARIES = ("torch", "transformers", "numpy", "transformer-lens", "nnsight", "repeng", "steering-vectors")
#: Instructions that decide how fast a matrix product is.
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")

#: How most benchmarks time.
ROUNDS = "Sides run in turn in one process, {} rounds, the fastest of each counts"


@dataclass(frozen=True)
class Claim:
    """`measured` is a ratio or share that should be `relation` the target."""

    what: str
    measured: float
    relation: Literal["≥", "≤"]
    target: float

    @property
    def met(self) -> bool:
        return self.measured >= self.target if self.relation == "≥" else self.measured <= self.target


@dataclass
class Work:
    """Results of one work on one model. `notes` are sentences for the reader; `facts` go to the JSON only."""

    name: str
    model: str
    about: str
    claims: list[Claim] = field(default_factory=list)
    timings: list[Timing] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


def machine(device: torch.device = torch.device("cpu")) -> dict[str, Any]:  # noqa: B008 (a constant)
    """What the numbers depend on besides the code; `device` is where the model ran."""
    try:
        told = Path("/proc/cpuinfo").read_text()
    except OSError:
        told = ""
    model = re.search(r"model name\s*: (.*)", told)
    flags = set(told.partition("flags")[2].partition("\n")[0].split())
    return {
        "cpu": model[1].strip() if model else platform.processor() or platform.machine(),
        "instructions": [flag for flag in FLAGS if flag in flags],
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory GiB": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "torch threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in LIBRARIES},
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def add_outputs(parser: argparse.ArgumentParser) -> None:
    """The options that say where a `Recorder` writes."""
    parser.add_argument("--json", type=Path, metavar="OUT")
    parser.add_argument("--markdown", type=Path, metavar="OUT")


class Recorder:
    """What was measured so far, written anew after every work: those before it are not lost with one.

    Made before the first work, whose load it notes; `chosen` has the options of `add_outputs`, and `repeats` where no
    `method` says how else was timed.
    """

    def __init__(
        self,
        title: str,
        command: str,
        chosen: argparse.Namespace,
        device: torch.device = torch.device("cpu"),  # noqa: B008 (a constant)
        method: str | None = None,
    ) -> None:
        self._title, self._chosen, self._works = title, chosen, list[Work]()
        self._about: dict[str, Any] = {
            "command": command,
            "machine": machine(device),
            **({"repeats": chosen.repeats} if method is None else {"method": method}),
            "load": [os.getloadavg()[0]] * 2,
            "left out": [],
        }

    def add(self, *works: Work) -> None:
        self._works += works
        self._write()

    def leave_out(self, why: str) -> None:
        self._about["left out"].append(why)
        self._write()

    def __str__(self) -> str:
        return as_markdown(as_json(self._works, self._about), self._title)

    def _write(self) -> None:
        self._about["load"][1] = os.getloadavg()[0]
        if self._chosen.json is not None:
            text = json.dumps(as_json(self._works, self._about), indent=2, ensure_ascii=False) + "\n"
            write_durably(self._chosen.json, text.encode())
        if self._chosen.markdown is not None:
            write_durably(self._chosen.markdown, str(self).encode())


def as_json(works: Iterable[Work], about: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **about,
        "works": [
            {
                "work": work.name,
                "model": work.model,
                "about": work.about,
                "claims": [
                    {
                        "what": claim.what,
                        "measured": round(claim.measured, 4),
                        "target": f"{claim.relation} {claim.target:g}",
                        "met": claim.met,
                    }
                    for claim in work.claims
                ],
                "sides": [
                    {
                        "side": timing.name,
                        "tokens per second": round(timing.tokens_per_second, 1),
                        "seconds": [round(s, 3) for s in timing.seconds],
                        "tokens": timing.of_tokens,
                        "tokens timed": timing.tokens,
                    }
                    for timing in work.timings
                ],
                "notes": work.notes,
                **work.facts,
            }
            for work in works
        ],
    }


def as_markdown(record: Mapping[str, Any], about: str) -> str:
    """The record for people: what was claimed, then the sides of each work."""
    at = record["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in at["versions"].items() if version)
    out = [
        f"# {about}: results",
        "",
        f"`{record['command']}`, {at['date']}, commit {at['commit']}.",
        "",
        f"{at['cores']} cores ({at['cpu']}; {', '.join(at['instructions']) or 'no vector instructions known'}), "
        f"{at['memory GiB']} GiB, {at.get('gpu') or 'no GPU used'}, {at['torch threads']} torch threads; "
        f"Python {at['python']}, {versions}.",
        "",
        f"{record.get('method') or ROUNDS.format(record['repeats'])}; the machine's load "
        f"was {record['load'][0]:.1f} before and {record['load'][1]:.1f} after. Absolute numbers vary with the "
        f"machine{'' if record.get('method') else '; the ratios are what is claimed'}.",
        "",
        "| work | model | claim | target | measured | |",
        "|---|---|---|---|---|---|",
    ]
    for work in record["works"]:
        for claim in work["claims"]:
            cells = (work["work"], work["model"], claim["what"], claim["target"], f"{claim['measured']:.3g}")
            out.append(f"| {' | '.join(cells)} | {'met' if claim['met'] else '**missed**'} |")
    for why in record["left out"]:
        out += ["", f"Left out: {why}."]
    for work in record["works"]:
        out += ["", "## " + ", ".join(filter(None, (work["work"], work["model"]))), "", work["about"], ""]
        if work["sides"]:
            out += ["| side | tokens/s | s | slowest round |", "|---|---|---|---|"]
            for side in sorted(work["sides"], key=lambda side: min(side["seconds"])):
                best, worst = min(side["seconds"]), max(side["seconds"])
                sample = (
                    "" if side["tokens"] == side["tokens timed"] else f" (scaled from {side['tokens timed']:,} tokens)"
                )
                out.append(
                    f"| {side['side']}{sample} | {side['tokens per second']:,.0f} | {best:.2f} | "
                    f"+{100 * (worst / best - 1):.0f} % |"
                )
        out += [line for note in work["notes"] for line in ("", note)]
    return "\n".join(out) + "\n"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    """The checkout's commit, and whether tracked files differ from it."""

    def git(*arguments: str) -> str:
        run = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
        return run.stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + (" with changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
