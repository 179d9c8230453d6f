"""What holds for every verb: help with an example, JSON, one vocabulary, exit codes, outputs looked at before work."""

import errno
import importlib.metadata
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import typer
from cli.calling import called
from test_public import HEAVY
from typer.testing import CliRunner

from reprobe.cli import options, outputs
from reprobe.cli.app import app
from reprobe.cli.show import show_json
from reprobe.cli.verb import verb
from reprobe.errors import ArtifactExists, UsageError
from reprobe.model import bundled as models
from reprobe.prompts import bundled as data_sets


def leaves(command, path=()):
    """Every verb with its words."""
    if hasattr(command, "commands"):
        for name, inner in command.commands.items():
            yield from leaves(inner, (*path, name))
    else:
        yield path, command


VERBS = dict(leaves(typer.main.get_command(app)))


def options_of(command) -> dict[str, str]:
    """Long option → its help."""
    return {name: p.help for p in command.params for name in p.opts if name.startswith("--")}


@pytest.mark.parametrize("words", VERBS, ids=" ".join)
def test_every_verb_has_an_example_in_its_help_and_speaks_json(words):
    help_text = called(*words, "--help", env={"COLUMNS": "200", "TERM": "dumb"}).output
    shown = [word for word in words if word != "prompt"]  # `reprobe steer MODEL PROMPT` goes without its own name
    assert f"reprobe {' '.join(shown)}" in help_text.split("Example")[1]
    assert "--json" in options_of(VERBS[words])


def test_an_option_of_one_name_is_said_in_one_way_where_it_means_one_thing():
    """These mean the same wherever they are; what differs in meaning differs in help, and is listed here by hand."""
    same = (
        "--json",
        "--overwrite",
        "--device",
        "--revision",
        "--max-new-tokens",
        "--ablate",
        "--to-table",
        "--strength",
    )
    exceptions = {
        "--max-new-tokens": {("evaluate", "side-effects")},  # 0 is none there
        "--to-table": {("transfer",)},  # whose .json says more
        "--strength": {("export",)},  # a factor that the file is written with
    }
    for option in same:
        said = {
            options_of(command)[option]
            for words, command in VERBS.items()
            if option in options_of(command) and words not in exceptions.get(option, ())
        }
        assert len(said) == 1, (option, said)
    every = {option for command in VERBS.values() for option in options_of(command)}
    assert not every & {"--output", "--out-dir", "--force", "--questions", "--n", "--num-samples", "--model-name"}


@pytest.mark.parametrize("words", [w for w, c in VERBS.items() if "--seed" in options_of(c)], ids=" ".join)
def test_a_negative_seed_is_refused(words):
    assert "--seed" in called(*words, "--seed", -1, code=2).output


def test_the_help_of_no_verb_loads_a_heavy_library():
    script = (
        "import sys\nfrom typer.testing import CliRunner\nfrom reprobe.cli.app import app\n"
        f"for words in {[list(w) for w in VERBS]!r}:\n"
        "    assert CliRunner().invoke(app, [*words, '--help']).exit_code == 0\n"
        f"print('LOADED', [m for m in {HEAVY!r} if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert "LOADED []" in out


def test_a_shell_completes_the_bundled_names_and_paths(tmp_path, monkeypatch):
    assert set(options.MODELS) == set(models.NAMES)
    assert sorted(options.DATA_SETS) == data_sets()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smol").mkdir()
    (tmp_path / "smol" / "x.gguf").write_text("")
    assert options.model_names("smo") == ["smollm2-135m", "smol/"]
    assert options.model_names("smol/") == ["smol/x.gguf"]
    assert options.data_names("c") == ["cities", "comparisons"]
    environment = os.environ | {
        "_REPROBE_COMPLETE": "complete_bash",
        "COMP_WORDS": "reprobe extract gem",
        "COMP_CWORD": "2",
    }
    code = "import sys; sys.argv = ['reprobe']; from reprobe.cli import main; main()"
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert asked.stdout.split() == ["gemma3-270m"]


def failing(error):
    """A command line of one verb that raises this."""
    one = typer.Typer()

    @one.command()
    @verb("reprobe one", resumable=True)
    def run() -> None:
        raise error

    return CliRunner().invoke(one, [])


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (UsageError("called wrongly"), 2, "UsageError: called wrongly"),
        (OSError(errno.EACCES, os.strerror(errno.EACCES), "/there"), 1, "Permission denied: /there"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), 1, "No space left on device"),
        (KeyboardInterrupt(), 130, "go on with --resume"),
    ],
)
def test_what_ends_a_verb_becomes_a_message_and_an_exit_code(error, code, says):
    result = failing(error)
    assert result.exit_code == code
    assert says in result.stderr
    assert "Traceback" not in result.output


def test_a_bug_is_not_hidden():
    assert isinstance(failing(ZeroDivisionError()).exception, ZeroDivisionError)


def test_a_warning_is_a_note_without_its_line_of_code():
    one = typer.Typer()

    @one.command()
    @verb("reprobe one")
    def run() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("the edit has no effect", UserWarning, stacklevel=1)

    result = CliRunner().invoke(one, [])
    assert result.stderr == "note: the edit has no effect\n"


def test_what_json_cannot_hold_is_null(capsys):
    show_json({"a": float("nan"), "b": [1.5, float("inf")], "c": {"d": -float("inf")}})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [1.5, None], "c": {"d": None}}


@pytest.mark.parametrize(
    ("colour", "shown"), [({"NO_COLOR": "1"}, False), ({"FORCE_COLOR": "1"}, True)], ids=["without", "with"]
)
def test_no_color_means_no_colour(colour, shown):
    code = "import sys; sys.argv = ['reprobe', 'frobnicate']; from reprobe.cli import main; main()"
    environment = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR")} | colour
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2
    assert ("\x1b[31m" in done.stderr) == shown


def test_the_version_is_told_and_bars_of_other_libraries_are_off_where_nobody_looks():
    code = (
        "import os, sys; sys.argv = ['reprobe', '--version']; from reprobe.cli import main\n"
        "try: main()\nfinally: print(os.environ['HF_HUB_DISABLE_PROGRESS_BARS'])"
    )
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_DISABLE_PROGRESS_BARS"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.split() == [importlib.metadata.version("reprobe-lm"), "1"]
    shown = called("--help", env={"COLUMNS": "200"}).output
    assert "Extract hidden states once" in shown
    assert "doctor" in shown


class TestOutputs:
    """What stands in the way is named before any work."""

    @pytest.fixture
    def folder(self, tmp_path):
        (tmp_path / "file").write_text("mine")
        (tmp_path / "folder").mkdir()
        return tmp_path

    @pytest.mark.parametrize(
        ("check", "path", "says"),
        [
            (lambda p: outputs.new_file(p, False), "file", "pass --overwrite"),
            (lambda p: outputs.new_file(p, True), "folder", "is a folder; name a file"),
            (lambda p: outputs.new_file(p, False), "file/below", "is a file, not a folder"),
            (lambda p: outputs.new_file(p, False), "file/far/below", "is a file, not a folder"),
            (lambda p: outputs.new_folder(p), "folder", "choose another name"),
            (lambda p: outputs.new_folder(p, False), "folder", "--overwrite"),
            (lambda p: outputs.new_folder(p, True), "file", "name a folder"),
            (lambda p: outputs.results_folder(p), "file", "name a folder"),
            (lambda p: outputs.results_folder(p), "file/below", "is a file, not a folder"),
            (lambda p: outputs.new_table(p, False), "table.xlsx", ".csv, .parquet or .json"),
            (lambda p: outputs.new_table(p, False), "file/t.csv", "is a file, not a folder"),
            (lambda p: outputs.new_figure(p, False), "figure.gif", ".svg, .png or .pdf"),
            (lambda p: outputs.new_report(p), "file", "is not a report"),
            (lambda p: outputs.new_report(p), "folder", "is a folder"),
            (lambda p: outputs.new_store(p, resume=False, overwrite=False), "file", "not a reprobe store"),
            (lambda p: outputs.new_store(p, resume=True, overwrite=True), "new", "exclude each other"),
        ],
    )
    def test_it_is_refused(self, folder, check, path, says):
        with pytest.raises(UsageError, match=says):
            check(folder / path)
        assert (folder / "file").read_text() == "mine"

    def test_what_is_free_is_let_through_and_nothing_is_made(self, folder):
        before = sorted(folder.rglob("*"))
        for path in ("new", "far/away/new"):
            outputs.new_file(folder / path, False)
            outputs.new_folder(folder / path)
            outputs.results_folder(folder / path)
            outputs.new_report(folder / path)
            outputs.new_table(folder / f"{path}.csv", False)
            outputs.new_figure(folder / f"{path}.svg", False)
            outputs.new_store(folder / path, resume=False, overwrite=False)
        outputs.results_folder(folder / "folder")
        outputs.new_folder(folder / "folder", True)
        outputs.new_file(folder / "file", True)
        assert sorted(folder.rglob("*")) == before

    def test_a_report_replaces_a_report(self, folder):
        (folder / "old.html").write_text('<!doctype html><meta name="generator" content="reprobe">')
        outputs.new_report(folder / "old.html")

    def test_a_folder_that_may_not_be_written_is_named(self, folder, monkeypatch):
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != folder / "folder")  # root may do anything
        with pytest.raises(UsageError, match=r"you may not write in .*folder"):
            outputs.new_file(folder / "folder" / "deep" / "x", False)
        with pytest.raises(ArtifactExists):
            outputs.new_file(folder / "file", False)
