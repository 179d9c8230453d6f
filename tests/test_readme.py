"""The README's tour does what it says: its Python blocks and shell lines run as they stand."""

import re
import shlex
from pathlib import Path

import pytest
from cli.calling import called

from reprobe.model.language_model import LanguageModel

README = (Path(__file__).parent.parent / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture
def tour(real_lm, tmp_path, monkeypatch):
    """An empty folder to be in. The tour's model, which nearly every line of it loads, is loaded once."""
    load = LanguageModel.load

    def loaded(model, *, dtype=None, device=None, revision=None, progress=None):
        if (model, dtype, device, revision) == ("smollm2-135m", None, None, None):
            return real_lm(model)
        return load(model, dtype=dtype, device=device, revision=revision, progress=progress)

    monkeypatch.setattr(LanguageModel, "load", loaded)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.models
def test_the_python_of_the_tour_runs(tour, capsys):
    namespace: dict[str, object] = {}
    found = blocks("python")
    assert len(found) >= 5
    for block in found:
        exec(compile(block, "README.md", "exec"), namespace)
    assert (tour / "truth.safetensors").is_file()
    assert "nats per token" in capsys.readouterr().out


@pytest.mark.models
def test_the_shell_lines_of_the_tour_run(tour):
    lines = [line for block in blocks("sh") for line in block.splitlines() if line]
    assert len(lines) >= 5
    for line in lines:
        name, *arguments = shlex.split(line)
        assert name == "reprobe"
        called(*arguments)


def test_the_setup_commands_are_the_two_promised_and_ci_runs_the_second():
    commands = blocks("")[0].splitlines()
    assert commands == ["pip install uv && uv run reprobe demo", "pip install uv && uv run pytest"]
    ci = (Path(__file__).parent.parent / ".ci" / "run").read_text().splitlines()
    assert commands[1] in ci
