"""The project's own data sets: where they are.

Enters: nothing. Leaves: names and paths. Does not read the files.
"""

from pathlib import Path

from reprobe.errors import UnknownData

_HERE = Path(__file__).resolve()


def folder() -> Path:
    """The folder of the bundled data: `reprobe/data` where installed from a wheel, `data` in a checkout."""
    package, checkout = _HERE.parents[1], _HERE.parents[2]
    if (package / "data").is_dir():
        return package / "data"
    if (checkout / "data").is_dir() and (checkout / "pyproject.toml").is_file():
        return checkout / "data"
    raise UnknownData(f"the bundled data sets are in neither {package / 'data'} nor {checkout / 'data'}")


def bundled() -> list[str]:
    """Names of the bundled data sets, sorted."""
    return sorted(path.stem for path in folder().glob("*.jsonl"))
