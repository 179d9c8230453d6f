"""`reprobe doctor` as a user meets it: on a sound small model, and where something is wrong."""

import json
import os
from functools import partial
from importlib import metadata

import pytest
from cli.calling import called
from packaging.requirements import Requirement
from tiny import save_tiny

import reprobe as rp
from reprobe.cli import doctor


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("doctor") / "model")


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REPROBE_CACHE", str(tmp_path / "cache"))
    return partial(called, "doctor")


def test_all_is_well_on_a_sound_model(run, model):
    told = json.loads(run(model, "--json").stdout)
    lm = rp.LanguageModel.load(model)
    assert told["ok"] is True
    assert told["sites"]["identities"] == lm.check()
    assert told["sites"]["sites"] == 3 * 7 + 2
    required = {Requirement(text).name for text in metadata.requires("reprobe-lm") if "extra ==" not in text}
    assert required | {"reprobe-lm", "python"} == set(told["versions"])
    extras = {extra["extra"]: extra["install"] for extra in told["extras"]}
    assert extras["ray"] == "pip install 'reprobe-lm[ray]'"
    assert set(extras) == set(metadata.metadata("reprobe-lm").get_all("Provides-Extra"))
    assert {folder["set by"] for folder in told["folders"]} == {"REPROBE_CACHE", "HF_HUB_CACHE", "TMPDIR"}
    shown = run(model)
    assert "all 23 sites are where they say" in shown.stdout
    assert "everything is in order" in shown.stderr


def test_without_a_model_nothing_is_fetched(run, tmp_path):
    shown = run()
    assert "none is in the cache" in shown.stdout
    assert not (tmp_path / "cache").exists()


def test_sizes_of_caches_are_those_of_their_files(run, tmp_path):
    (tmp_path / "cache" / "weights").mkdir(parents=True)
    (tmp_path / "cache" / "weights" / "x").write_bytes(bytes(1234))
    folders = {f["set by"]: f for f in json.loads(run("--json").stdout)["folders"]}
    assert folders["REPROBE_CACHE"]["bytes"] == 1234
    assert folders["REPROBE_CACHE"]["writable"] is True


def test_a_model_whose_sites_are_elsewhere_is_a_problem(run, model, monkeypatch):
    def fails(lm):
        raise rp.errors.SelfCheckFailed("sites of model cannot be trusted")

    monkeypatch.setattr(rp.LanguageModel, "check", fails)
    result = run(model, code=1)
    assert "problem: SelfCheckFailed: sites of model cannot be trusted" in result.stderr
    assert "in order" not in result.output


def test_a_model_that_does_not_load_is_a_problem_and_a_wrong_option_a_wrong_call(run, model, tmp_path):
    (tmp_path / "empty").mkdir()
    told = json.loads(run("./empty", "--json", code=1).stdout)
    assert told["problems"] == [
        "ModelLoadFailed: ./empty is a folder without config.json: not a saved transformers model"
    ]
    assert "float32, bfloat16, float16" in run(model, "--dtype", "int8", code=2).stderr
    assert "this machine has cpu" in run(model, "--device", "gpu", code=2).stderr


def test_what_is_absent_or_too_old_is_told_with_the_way_to_get_it(run, monkeypatch):
    monkeypatch.setattr(metadata, "requires", lambda name: ["numpy>=999", "no-such-thing>=1", "ray>=2; extra == 'ray'"])
    problems = json.loads(run("--json", code=1).stdout)["problems"]
    assert f"numpy {metadata.version('numpy')} is installed: pip install 'numpy>=999'" in problems
    assert "no-such-thing is not installed: pip install 'no-such-thing>=1'" in problems
    assert len(problems) == 2


def test_a_cache_that_cannot_be_written_or_is_full_is_a_problem(run, tmp_path, monkeypatch):
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != str(tmp_path) and allowed(path, mode))
    problems = json.loads(run("--json", code=1).stdout)["problems"]
    assert problems == [f"{tmp_path / 'cache'} cannot be written: set REPROBE_CACHE to a folder that can"]
    monkeypatch.setattr(os, "access", allowed)
    monkeypatch.setattr(doctor, "ROOM", 10**18)
    (problem,) = json.loads(run("--json", code=1).stdout)["problems"]
    assert "set REPROBE_CACHE to a folder on a larger disk" in problem
