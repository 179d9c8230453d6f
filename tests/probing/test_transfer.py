import dataclasses
import json

import numpy as np
import polars as pl
import pytest

from reprobe.errors import ArtifactExists, IdentityMismatch, UnknownData, UnknownSite, UsageError
from reprobe.probing.grid import probe
from reprobe.probing.readers import LogisticReader, MeanDifference, PCAReader
from reprobe.probing.rows import common_groups, select_rows
from reprobe.probing.transfer import transfer


@pytest.fixture
def three_sets(store_of, planted):
    """Two data sets on one axis, the second far from the first; a third on another axis. `cities` and `negated`
    share every group, `elsewhere` none."""
    data, axis2 = planted(n=120, width=21), planted(n=120, width=21, seed=8)
    noise = np.random.default_rng(3).standard_normal((120, 21))
    again = planted(n=120, width=21, seed=4)
    moved = again.X + 3.0 * np.outer(again.y - 0.5, data.axis - again.axis) + 40 * data.axis

    def store(X, name, groups, y):
        made = store_of(
            {"resid.post@0": noise, "resid.post@1": X}, y, group=groups, pair=[f"{name}{g}" for g in groups]
        )
        made.index = made.index.with_columns(prompt=pl.lit(name) + pl.col("prompt"))
        return made

    pairs = [f"x{p}" for p in data.pairs]
    return {
        "cities": store(data.X, "c", pairs, data.y),
        "negated": store(moved, "n", pairs, again.y),
        "elsewhere": store(axis2.X, "e", [f"y{p}" for p in data.pairs], axis2.y),
    }


def line(grid, train, test, site="resid.post@1", centring="training"):
    return grid.table.row(
        by_predicate=(pl.col("train") == train)
        & (pl.col("test") == test)
        & (pl.col("site") == site)
        & (pl.col("centring") == centring),
        named=True,
    )


def test_a_direction_that_two_data_sets_share_transfers_and_its_threshold_need_not(three_sets):
    grid = transfer(three_sets, MeanDifference(), transductive=True)
    assert len(grid.table) == 3 * 3 * 2 * 2
    honest = line(grid, "cities", "negated")
    assert honest["auroc"] > 0.9
    assert honest["accuracy"] == 0.5 == honest["chance"], "all of the second set lies beyond the first one's threshold"
    centred = line(grid, "cities", "negated", centring="own mean")
    assert centred["accuracy"] > 0.85
    assert centred["auroc"] == pytest.approx(honest["auroc"], abs=1e-6)
    assert line(grid, "cities", "elsewhere")["auroc"] < 0.75
    assert line(grid, "elsewhere", "elsewhere")["accuracy"] > 0.85
    for row in grid.table.iter_rows(named=True):
        assert row["accuracy_low"] <= row["accuracy"] <= row["accuracy_high"]
        assert row["auroc_low"] <= row["auroc"] <= row["auroc_high"]


def test_by_default_nothing_is_centred_by_the_test_set_and_rows_can_be_left_out(three_sets):
    grid = transfer(three_sets, MeanDifference(), sites="resid.post@1")
    assert set(grid.table["centring"]) == {"training"}
    few = {n: s for n, s in three_sets.items() if n != "negated"}
    fewer = transfer(few, MeanDifference(), sites="resid.post@1", where=pl.col("row") < 60)
    some = transfer(few, MeanDifference(), sites="resid.post@1")
    assert fewer.table["n"].to_list() == [60] * 4
    assert some.table["n"].to_list() == [120] * 4


@pytest.mark.parametrize("reader", [MeanDifference(), PCAReader(), LogisticReader()], ids=str)
def test_rows_whose_group_is_tested_are_left_out_of_the_fit_and_the_table_says_so(reader, three_sets):
    grid = transfer(three_sets, reader, sites="resid.post@1", folds=4)
    own, shared, free = (line(grid, "cities", t) for t in ("cities", "negated", "elsewhere"))
    assert (own["left_out"], own["fits"]) == (120, 4)
    assert (shared["left_out"], shared["fits"]) == (120, 4)
    assert (free["left_out"], free["fits"], free["n_train"]) == (0, 1, 120)
    assert own["n_train"] == shared["n_train"] == 90
    # and by hand, for the data set that shares nothing
    a, b = three_sets["cities"], three_sets["elsewhere"]
    X, Z = (np.asarray(s.arrays[list(s.arrays)[1]], dtype=float) for s in (a, b))
    fitted = type(reader)(**reader.get_params()).fit(X, a.index["label"].to_numpy(), pairs=a.index["pair"].to_list())
    assert free["accuracy"] == pytest.approx(fitted.score(Z, b.index["label"].to_numpy()))


def test_the_diagonal_is_held_out_as_by_probe_and_a_copy_gives_away_nothing(three_sets, store_of, planted):
    data = planted(n=120, width=21)
    groups = [f"x{p}" for p in data.pairs]
    store = store_of({"resid.post@0": data.X}, data.y, group=groups)
    twin = dataclasses.replace(store)
    grid = transfer({"a": store, "b": twin}, MeanDifference(), folds=5, seed=3)
    probed = probe(store, MeanDifference(), folds=5, seed=3)
    own = line(grid, "a", "a", "resid.post@0")
    assert own["accuracy"] == pytest.approx(probed.table["accuracy"][0], abs=0.03)  # in other folds
    across = line(grid, "a", "b", "resid.post@0")
    assert across["accuracy"] == own["accuracy"]


def test_sites_are_those_that_all_stores_hold(three_sets, store_of, planted):
    data = planted(n=80, width=21)
    three_sets["small"] = store_of({"resid.post@1": data.X}, data.y, group=[f"z{p}" for p in data.pairs])
    assert transfer(three_sets, MeanDifference()).sites == ("resid.post@1",)
    with pytest.raises(UnknownSite, match=r"resid.post@0"):
        transfer(three_sets, MeanDifference(), sites="resid.post@0")


def test_a_table_is_saved_in_three_formats_and_nothing_is_overwritten(three_sets, tmp_path):
    grid = transfer(three_sets, MeanDifference(), sites="resid.post@1", transductive=True)
    parquet, csv, text = (grid.save(tmp_path / "deep" / f"t{s}") for s in (".parquet", ".csv", ".json"))
    assert pl.read_parquet(parquet).equals(grid.table)
    assert pl.read_csv(csv, schema=grid.table.schema).equals(grid.table)
    body = json.loads(text.read_text())
    assert pl.DataFrame(body["table"], schema=grid.table.schema).equals(grid.table)
    assert body["provenance"]["rows"]["cities"] == grid.table["train_rows"][0]
    assert body["names"] == ["cities", "negated", "elsewhere"]
    with pytest.raises(ArtifactExists):
        grid.save(csv)
    grid.save(csv, overwrite=True)
    with pytest.raises(UsageError, match=r"not .xlsx"):
        grid.save(tmp_path / "t.xlsx")


def test_the_matrix_is_ordered_by_name_as_given(three_sets):
    grid = transfer(three_sets, MeanDifference())
    accuracy = grid.matrix("resid.post@1")
    assert accuracy[1, 2] == line(grid, "negated", "elsewhere")["accuracy"]
    assert grid.matrix("resid.post@1", "auroc_low")[0, 1] == line(grid, "cities", "negated")["auroc_low"]
    with pytest.raises(UnknownSite, match=r"there are sites resid.post@0, resid.post@1; 'training'"):
        grid.matrix("resid.post@7")
    with pytest.raises(UnknownSite, match="own mean"):
        grid.matrix("resid.post@1", centring="own mean")
    with pytest.raises(UsageError, match="'n' is no metric"):
        grid.matrix("resid.post@1", "n")


def test_groups_are_the_same_if_named_alike_or_of_the_same_prompts(store_of):
    labels = np.arange(8) % 2

    def rows(**index):
        return select_rows(store_of({"resid.post@0": np.zeros((8, 2))}, labels, **index).index)

    named = rows(group=np.arange(8) // 2)
    other = rows(group=np.arange(8) // 2 + 2)
    a, b = common_groups([named, other], ["x", "y"])
    np.testing.assert_array_equal(a[4:], b[:4])
    assert not set(a[:4]) & set(b[4:])
    plain = rows()
    a, b = common_groups([plain, plain], ["x", "y"])
    assert not set(a) & set(b), "prompt ids of two data sets have nothing to do with one another"
    a, b = common_groups([plain, plain], ["x", "x"])
    np.testing.assert_array_equal(a, b)
    pair = rows(group=np.arange(8) // 2, pair=["p", "q", "p", "q", "r", "r", "s", "s"])
    (a,) = common_groups([pair], ["x"])
    assert len(set(a)) == 3


def test_what_cannot_be_transferred_is_refused(three_sets, store_of, planted):
    data = planted(n=40, width=21)

    def store(labels=data.y, **index):
        return store_of({"resid.post@1": data.X}, labels, group=[f"q{p}" for p in data.pairs], **index)

    class Other:
        def __init__(self, inner):
            self.inner = inner

        def __getattr__(self, name):
            return getattr(self.inner, name)

        @property
        def manifest(self):
            manifest = self.inner.manifest
            manifest.identity = dataclasses.replace(manifest.identity, weights="c" * 64)
            return manifest

    cities = three_sets["cities"]
    half = [f"c{i // 2}" if i < 38 else None for i in range(40)]
    few = store_of({"resid.post@1": data.X[:6]}, data.y[:6], group=[0, 0, 1, 1, 2, 2])
    cases = [
        (UsageError, "two stores or more, not 1", {"a": cities}, MeanDifference(), {}),
        (UsageError, r"such as MeanDifference\(\)", three_sets, MeanDifference, {}),
        (IdentityMismatch, "'b'", {"a": cities, "b": Other(store())}, MeanDifference(), {}),
        (UsageError, r"labels differ: 'a' has \(0, 1\), 'b' has \(1, 2\)", {"a": cities, "b": store(data.y + 1)},
         MeanDifference(), {}),
        (UnknownData, "'cities': no column 'truth'", three_sets, MeanDifference(), {"label": "truth"}),
        (UsageError, "'b': 2 rows have no pair", {"a": cities, "b": store(pair=half)}, PCAReader(), {}),
        (UsageError, r"only 3 groups hold label 2.* 2 is 'b' with label 0", {"a": cities, "b": few}, MeanDifference(),
         {}),
    ]  # fmt: skip
    for kind, says, stores, reader, arguments in cases:
        with pytest.raises(kind, match=says):
            transfer(stores, reader, **arguments)


def test_progress_counts_sites(three_sets):
    seen = []
    transfer(three_sets, MeanDifference(), progress=lambda *step: seen.append(step))
    assert seen == [("transfer", i, 2) for i in range(3)]
