"""The README's tour does what it says: its Python blocks and shell lines run as they stand."""

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from reprobe.cli.app import app

README = (Path(__file__).parent.parent / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.models
def test_the_python_of_the_tour_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    found = blocks("python")
    assert len(found) >= 5
    for block in found:
        exec(compile(block, "README.md", "exec"), namespace)
    assert (tmp_path / "truth.safetensors").is_file()
    assert "nats per token" in capsys.readouterr().out


@pytest.mark.models
def test_the_shell_lines_of_the_tour_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = [line for block in blocks("sh") for line in block.splitlines() if line]
    assert len(lines) >= 5
    for line in lines:
        name, *arguments = shlex.split(line)
        assert name == "reprobe"
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, f"{line}\n{result.output}"


def test_the_setup_commands_are_the_two_promised_and_ci_runs_the_second():
    commands = blocks("")[0].splitlines()
    assert commands == ["pip install uv && uv run reprobe demo", "pip install uv && uv run pytest"]
    ci = (Path(__file__).parent.parent / ".ci" / "run").read_text().splitlines()
    assert commands[1] in ci
