"""Tables that verbs save are read back alike from every format, and a table that is not whole is refused."""

from pathlib import Path
from typing import Any

import polars as pl
import pytest
from polars.testing import assert_frame_equal
from report import synthetic

from reprobe.errors import CorruptArtifact, UsageError
from reprobe.evaluation import Choices, compare_choices
from reprobe.evaluation.editing import summarise
from reprobe.probing import write_table
from reprobe.report import write_report
from reprobe.report.measured import CHOICES, COMPARED, DOSES, EDITING, SIDE_EFFECTS, TRANSFER, TUNING, read_measured

TABLES: dict[str, Any] = {
    TRANSFER: synthetic.transfers,
    SIDE_EFFECTS: synthetic.side_effects,
    CHOICES: synthetic.choices,
    COMPARED: lambda: compare_choices(*(Choices(synthetic.choices(), pl.DataFrame(), "", "", "") for _ in range(2))),
    EDITING: synthetic.edit_scores,
    DOSES: synthetic.doses,
    TUNING: lambda: pl.DataFrame({"strength": [1.0, 2.0], "kl": [0.1, 0.3]}),
}


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".json"])
@pytest.mark.parametrize("kind", TABLES)
def test_a_table_is_of_its_kind_and_equal_in_every_format(tmp_path: Path, kind: str, suffix: str):
    table = TABLES[kind]()
    found = read_measured(write_table(table, tmp_path / f"x{suffix}", about={"note": 1} if suffix == ".json" else None))
    assert found.kind == kind
    assert_frame_equal(found.table.select(table.columns), table, check_dtypes=False)
    assert found.identity is None


def test_multiple_choice_is_compared_as_the_runs_themselves_are(tmp_path: Path):
    table = synthetic.choices()
    steered = table.with_columns(pl.col(f"{m}_steered").alias(m) for m in ("mc1", "mc2", "mc3"))
    runs = [Choices(t, pl.DataFrame(), "", "", "") for t in (table, steered)]
    found = read_measured(write_table(table, tmp_path / "x.parquet"))
    assert_frame_equal(found.choices, compare_choices(*runs))
    plain = table.select(pl.exclude("^.*_steered$"))
    assert_frame_equal(read_measured(write_table(plain, tmp_path / "y.csv")).choices, runs[0].summary())


def test_scores_of_edits_are_those_of_their_prompts(tmp_path: Path):
    table = synthetic.edit_scores()
    found = read_measured(write_table(table, tmp_path / "x.csv")).editing
    assert found.after.shares == summarise(table.filter(state="after")).shares
    assert found.before.score == summarise(table.filter(state="before")).score


def test_scores_of_one_subject_have_no_interval_and_say_so_by_saying_nothing(tmp_path: Path):
    write_table(synthetic.edit_scores(2), tmp_path / "x.json")
    page = write_report(tmp_path).read_text()
    assert "Scores: x" in page
    assert "nan" not in page[page.index('<section id="edits"') :].split("</section>")[0]


def test_what_a_json_file_says_besides_is_kept(tmp_path: Path):
    about = {"model": synthetic.IDENTITY.to_json(), "interventions": ["Add at resid.post@3 on all"], "data": "d4" * 32}
    found = read_measured(write_table(synthetic.side_effects(), tmp_path / "x.json", about=about))
    assert found.identity == synthetic.IDENTITY
    assert found.interventions == "Add at resid.post@3 on all"
    assert found.data == {"data": "d4" * 32}


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        (DOSES, lambda t: t.with_columns(strength=pl.lit("much"))),
        (DOSES, lambda t: t.drop("readout_sd")),
        (TUNING, lambda t: t.with_columns(kl=pl.lit(None, pl.Float64))),
        (CHOICES, lambda t: t.with_columns(mc2=pl.lit(None, pl.Float64))),
        (TRANSFER, lambda t: t.head(3)),
        (EDITING, lambda t: t.filter(state="before")),
        (SIDE_EFFECTS, lambda t: t.head(0)),
    ],
)
def test_a_table_that_is_not_whole_is_corrupt(tmp_path: Path, kind: str, change: Any):
    path = write_table(change(TABLES[kind]()), tmp_path / "x.parquet")
    with pytest.raises(CorruptArtifact, match=r"x\.parquet"):
        read_measured(path)


def test_a_table_of_anything_else_is_refused_with_its_columns(tmp_path: Path):
    with pytest.raises(UsageError, match="a table of a, b"):
        read_measured(write_table(pl.DataFrame({"a": [1], "b": [2]}), tmp_path / "x.csv"))


@pytest.mark.parametrize(
    ("kind", "about"),
    [
        (SIDE_EFFECTS, {"model": {"name": "x"}}),
        (SIDE_EFFECTS, {"interventions": 3}),
        (CHOICES, {"data": ["ab"]}),
        (TUNING, {"strength": "much"}),
        (TRANSFER, {"notes": {"cities": None}}),
    ],
)
def test_what_is_said_beside_a_table_must_be_what_it_should(tmp_path: Path, kind: str, about: Any):
    path = write_table(TABLES[kind](), tmp_path / "x.json", about=about)
    with pytest.raises(CorruptArtifact, match=r"x\.json is not as it was written"):
        read_measured(path)
