"""What a verb needs before it works: the model, the files and the names that a user gave.

Does not know what a verb does with them. What cannot be had raises an error of `reprobe.errors`.
"""

from pathlib import Path
from typing import Any

from reprobe.errors import UsageError


def load_model(model: str, *, dtype: str | None, device: str | None, revision: str | None) -> Any:
    """A model as the library loads it, with a bar, and without the advice of the libraries below."""
    from reprobe.model.language_model import LanguageModel
    from reprobe.progress import terminal

    quiet_libraries()
    with terminal() as progress:
        return LanguageModel.load(model, dtype=dtype, device=device, revision=revision, progress=progress)


def quiet_libraries() -> None:
    """Keep the advice of the libraries below off a user's terminal. Only the command line does this."""
    import logging

    for name in ("transformers", "huggingface_hub", "datasets", "matplotlib"):
        logging.getLogger(name).setLevel(logging.ERROR)


def read_text(path: Path) -> str:
    """Raises `UsageError` if the file is not there or is no text."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise UsageError(f"{path} cannot be read as text: {e}") from e


def read_lines(path: Path) -> list[str]:
    """The lines of a file that are not empty. Raises `UsageError` if there is none."""
    lines = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    if not lines:
        raise UsageError(f"{path} holds no text")
    return lines


def passages(path: Path | None) -> Any:
    """The texts of a file, one a line; the library's own where there is no file."""
    from reprobe.evaluation import NEUTRAL, Passage

    if path is None:
        return NEUTRAL
    return [Passage.of(line) for line in read_lines(path)]


def named_store(text: str) -> tuple[str, str]:
    """NAME=PATH, or a path, whose last part without suffix is the name."""
    name, equals, path = text.partition("=")
    if equals and name and path and "/" not in name:
        return name, path
    return Path(text.rstrip("/")).stem, text


def directions_of(grid: Any, part: str, name: str) -> dict[Any, Any]:
    """The directions of a grid at the whole sites of a part. Raises `UsageError` with the parts it holds."""
    found = {site: d for site, d in grid.directions.items() if site.part == part and site.unit is None}
    if not found:
        parts = ", ".join(sorted({site.part for site in grid.directions}))
        raise UsageError(f"{name} has no directions of {part}; it holds {parts}")
    return found


def parse_layers(text: str | None) -> list[int] | None:
    """6,7,8 or 6-10, or both."""
    if text is None:
        return None
    out: list[int] = []
    for piece in text.split(","):
        first, dash, last = piece.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) < int(first)):
            raise UsageError(f"--layers {text}: write blocks as 6,7,8 or 6-10")
        out += range(int(first), int(last if dash else first) + 1)
    return out
