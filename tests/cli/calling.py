"""The command line called as a user calls it, in this process."""

from typing import Any

from typer.testing import CliRunner

from reprobe.cli.app import app


def called(*arguments: Any, code: int | None = 0, **options: Any) -> Any:
    """What `reprobe` with these arguments gives; it must end with the exit code `code` (None: any but 0)."""
    result = CliRunner().invoke(app, [str(a) for a in arguments], **options)
    assert result.exit_code != 0 if code is None else result.exit_code == code, result.output
    return result
