import json
import os

import polars as pl
import pytest

from reprobe.errors import ArtifactExists, UsageError
from reprobe.probing.tables import require_new_table, write_table

FRAME = pl.DataFrame(
    {"site": ["resid.post@0", 'a "quoted", name'], "layer": [0, None], "p": [0.25, float("nan")], "odd": ["1,5", "β"]}
)


def test_every_format_gives_the_table_back(tmp_path):
    csv = pl.read_csv(write_table(FRAME, tmp_path / "deep" / "t.csv"))
    assert csv.equals(FRAME, null_equal=True)
    assert pl.read_parquet(write_table(FRAME, tmp_path / "t.parquet")).equals(FRAME)
    rows = json.loads(write_table(FRAME, tmp_path / "t.json").read_text())
    assert rows[0] == {"site": "resid.post@0", "layer": 0, "p": 0.25, "odd": "1,5"}
    assert rows[1]["layer"] is None
    assert rows[1]["p"] is None, "JSON has no NaN"
    endless = write_table(FRAME.with_columns(p=pl.lit(float("inf")), q=pl.lit(0.5)), tmp_path / "v.json")
    assert [(row["p"], row["q"]) for row in json.loads(endless.read_text())] == [(None, 0.5)] * 2, "nor infinity"
    about = json.loads(write_table(FRAME, tmp_path / "u.json", about={"names": ["a"]}).read_text())
    assert about == {"names": ["a"], "table": rows}


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".json"])
def test_nothing_is_replaced_unless_asked_nor_left_half_written(tmp_path, suffix, monkeypatch):
    path = tmp_path / f"t{suffix}"
    write_table(FRAME, path)
    before = path.read_bytes()
    with pytest.raises(ArtifactExists, match="overwrite"):
        write_table(FRAME.head(1), path)
    assert path.read_bytes() == before
    with monkeypatch.context() as broken:
        broken.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("no room")))
        with pytest.raises(OSError, match="no room"):
            write_table(FRAME.head(1), path, overwrite=True)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]
    write_table(FRAME.head(1), path, overwrite=True)
    assert path.read_bytes() != before


def test_what_a_file_cannot_be_is_told_before_the_work(tmp_path):
    with pytest.raises(UsageError, match=r"\.csv, \.parquet or \.json, not \.xlsx"):
        require_new_table(tmp_path / "t.xlsx", overwrite=False)
    with pytest.raises(UsageError, match="not without suffix"):
        write_table(FRAME, tmp_path / "t")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(ArtifactExists):
        require_new_table(tmp_path / "folder.csv", overwrite=True)
    with pytest.raises(UsageError, match="cannot hold the columns both"):
        write_table(FRAME.with_columns(both=pl.concat_list("layer", "layer")), tmp_path / "t.csv")
