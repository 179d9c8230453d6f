"""The command line called as a user calls it, in this process."""

import shlex
from typing import Any

from typer.testing import CliRunner

from reprobe.cli.app import app


def called(*arguments: Any, code: int | None = 0, **options: Any) -> Any:
    """What `reprobe` with these arguments gives; it must end with the exit code `code` (None: any but 0)."""
    line = [str(a) for a in arguments]
    result = CliRunner().invoke(app, line, **options)
    ended = result.exit_code != 0 if code is None else result.exit_code == code
    assert ended, f"reprobe {shlex.join(line)}\n{result.output}"
    return result
