"""The script that runs the benchmarks again reads what they recorded, and sets what is measured now beside it."""

import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[1] / "experiments" / "bench"


def module(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"bench_{name}", BENCH / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@pytest.fixture(scope="module")
def run():
    return module("run")


@pytest.fixture
def record(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    yield module("record")
    sys.modules.pop("race", None)


def test_every_recorded_claim_is_read(run):
    for bench in run.BENCHES:
        if (known := BENCH / f"{bench}.md").is_file():
            text = known.read_text()
            date, figures = run.recorded(text)
            verdicts = re.findall(r"\| (met|\*\*missed\*\*) \|$", text, flags=re.MULTILINE)
            assert len(verdicts) == len(figures) > 0
            assert [figure.met for figure in figures] == [verdict == "met" for verdict in verdicts]
            assert len({figure.key for figure in figures}) == len(figures)
            assert date in text


def test_what_a_recorder_writes_as_markdown_is_read_like_its_json(run, record):
    works = [
        record.Work(
            "cities", "m", "…", [record.Claim("faster (peer)", 3.25, "≥", 1.6), record.Claim("share", 0.5, "≤", 0.4)]
        ),
        record.Work("heads", "", "…", [record.Claim("seconds", 2.0, "≤", 20)]),
    ]
    about = {"command": "x", "machine": record.machine(), "repeats": 1, "load": [0.0, 0.0], "left out": []}
    written = record.as_json(works, about)
    date, figures = run.recorded(record.as_markdown(written, "A bench"))
    assert date == about["machine"]["date"]
    assert figures == run.measured(json.loads(json.dumps(written)))
    assert [figure.met for figure in figures] == [True, False, True]


def test_figures_of_the_same_thing_stand_beside_each_other(run):
    before = [
        run.Figure("cities", "m", "as fast as the fastest (one)", "≥ 2", 4.0),
        run.Figure("gone", "m", "x", "≥ 1", 1.0),
    ]
    now = [
        run.Figure("cities", "m", "as fast as the fastest (other)", "≥ 2", 1.0),
        run.Figure("new", "m", "x", "≤ 1", 1.0),
    ]
    first, second = run.beside("extraction", now, before, "2026-01-02")
    assert (first["recorded"], first["on"], first["now"], first["of recorded"]) == (4.0, "2026-01-02", 1.0, 0.25)
    assert first["met"] == "yes → no"
    assert (second["recorded"], second["on"], second["met"]) == (None, None, "yes")
    table = run.as_markdown([first, second], ["A note."])
    assert (
        "| extraction | cities | as fast as the fastest (other) | ≥ 2 | 4 | 2026-01-02 | 1 | 0.25 | yes → no |" in table
    )
    assert table.endswith("A note.\n")


def test_what_a_stopped_or_failing_benchmark_measured_is_kept(run, tmp_path, monkeypatch):
    script = "import json, sys, time\njson.dump({'works': []}, open(sys.argv[-1], 'w'))\n"
    (tmp_path / "slow.py").write_text(f"{script}time.sleep(60)")
    (tmp_path / "fails.py").write_text(f"{script}sys.exit(3)")
    (tmp_path / "nothing.py").write_text("raise SystemExit(1)")
    monkeypatch.setattr(run, "HERE", tmp_path)
    assert run.run("slow", "", tmp_path, 1.0) == ({"works": []}, "stopped after 1 s")
    assert run.run("fails", "", tmp_path, 60) == ({"works": []}, "ended with 3")
    assert run.run("nothing", "", tmp_path, 60) == (None, "ended with 1")
