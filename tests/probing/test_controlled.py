import numpy as np
import polars as pl
import pytest

from reprobe.errors import UnknownData, UsageError
from reprobe.model.sites import Site
from reprobe.probing import ProbeGrid, probe, with_controls
from reprobe.probing.controls import online_code, reader_probabilities
from reprobe.probing.permutation import MeanDifferenceRefit, permutation_test
from reprobe.probing.probe_grid import COLUMNS, OPTIONAL
from reprobe.probing.readers import LDAReader, LogisticReader, MeanDifference, PCAReader
from reprobe.probing.refit import refit_of

N = 120


@pytest.fixture(scope="module")
def store(store_of):
    """Groups of four rows, two of each class: a site that knows the class, and one that knows only the group."""
    rng = np.random.default_rng(1)
    labels, groups = np.arange(N) % 2, np.arange(N) // 4
    concept = rng.standard_normal((N, 5)) + 2.5 * np.outer(labels - 0.5, np.eye(5)[0])
    by_heart = np.eye(30)[groups] + 0.02 * rng.standard_normal((N, 30))
    store = store_of({"resid.post@0": by_heart, "resid.post@1": concept}, labels, group=groups)
    store.index = store.index.with_columns(word=pl.Series([f"w{i % 7}" for i in range(N)]))
    return store


@pytest.fixture(scope="module")
def grid(store):
    return probe(store, MeanDifference(), folds=4, seed=2)


@pytest.fixture(scope="module")
def full(grid, store):
    return with_controls(grid, store, MeanDifference(), permutations=99, selectivity=True, mdl=True)


def rows_of(store, grid, layer):
    return store.read(Site("resid.post", layer), grid.rows).double().numpy()


def test_p_is_that_of_a_search_over_all_sites_at_once(full, grid, store):
    together = permutation_test(
        MeanDifferenceRefit([rows_of(store, grid, layer) for layer in (0, 1)], grid.fold),
        grid.positive,
        grid.groups,
        folds=grid.fold,
        permutations=99,
        seed=grid.seed,
    )
    np.testing.assert_array_equal(full.table["p"], together.adjusted)
    assert full.table["p"][1] == 0.01 < full.table["p"][0]
    assert full.provenance["controls"]["exchange"] == together.rule


def test_selectivity_tells_a_concept_from_what_can_be_learnt_by_heart(full):
    by_heart, concept = full.table.to_dicts()
    assert by_heart["control"] > 0.9
    assert concept["control"] < 0.75
    assert concept["selectivity"] > 0.15 > by_heart["selectivity"]


def test_bits_are_those_of_the_online_code(full, grid, store):
    for layer in (0, 1):
        X = rows_of(store, grid, layer)
        probabilities = reader_probabilities(MeanDifference(), X, grid.positive, grid.groups, seed=grid.seed)
        code = online_code(probabilities, grid.positive, grid.groups, seed=grid.seed)
        assert full.table["bits"][layer] == code.bits
        assert full.table["compression"][layer] == code.compression
    assert full.table["bits"][1] < N < full.table["bits"][0] * 1.2


def test_the_columns_follow_the_others_and_are_in_metrics_and_file(full, grid, store, tmp_path):
    assert full.table.columns == [*COLUMNS, *OPTIONAL]
    assert full.table.select(list(COLUMNS)).equals(grid.table)
    again = ProbeGrid.load(full.save(tmp_path / "g.safetensors"))
    assert again.table.equals(full.table)
    assert again.best().metrics["p"] == full.table["p"][1]
    assert again.directions == full.directions
    stepwise = with_controls(grid, store, MeanDifference(), mdl=True)
    assert stepwise.table.columns == [*COLUMNS, "bits", "compression"]
    stepwise = with_controls(stepwise, store, MeanDifference(), permutations=99)
    assert stepwise.table.columns == [*COLUMNS, "p", "bits", "compression"]
    assert stepwise.table["p"].equals(full.table["p"])
    assert set(stepwise.provenance["controls"]) == {"code_ends", "exchange", "permutations", "seed"}


def test_types_of_a_column_keep_the_folds_of_the_grid(grid, store):
    found = with_controls(grid, store, MeanDifference(), selectivity=True, types="word")
    lines = found.table
    np.testing.assert_allclose(lines["control"] + lines["selectivity"], lines["accuracy"])
    with pytest.raises(UnknownData, match="no column 'lemma'"):
        with_controls(grid, store, MeanDifference(), selectivity=True, types="lemma")
    with pytest.raises(UsageError, match=r"at resid\.post@\d: all rows are of one type"):
        with_controls(grid, store, MeanDifference(), selectivity=True, types="token")


@pytest.mark.parametrize("reader", [MeanDifference(), LDAReader(), PCAReader()], ids=str)
def test_a_refit_gives_the_scores_of_the_grid(reader, store_of, planted):
    data = planted(n=80, width=7)
    made = store_of({"resid.post@0": data.X}, data.y, group=data.pairs // 2, pair=[f"c{p}" for p in data.pairs])
    grid = probe(made, reader, folds=4)
    refit = refit_of(reader, rows_of(made, grid, 0), data.pairs, grid.fold)
    np.testing.assert_allclose(refit(grid.positive)[:, 0], grid.oof[:, 0], rtol=1e-5, atol=1e-5)


def test_pairs_are_swapped_for_readers_that_use_them(store_of, planted):
    data = planted(n=60, width=5, strength=4.0)
    made = store_of({"resid.post@0": data.X}, data.y, pair=[f"c{p}" for p in data.pairs])
    found = with_controls(probe(made, PCAReader(), folds=3), made, PCAReader(), permutations=19, n_jobs=1)
    assert found.table["p"][0] == 0.05
    assert found.provenance["controls"]["exchange"].startswith("the sides of all pairs")


def test_controls_are_of_the_grids_own_store_rows_and_reader(grid, store, store_of):
    with pytest.raises(UsageError, match="no control was asked for"):
        with_controls(grid, store, MeanDifference())
    with pytest.raises(UsageError, match="made by MeanDifference"):
        with_controls(grid, store, LogisticReader(), mdl=True)
    with pytest.raises(UsageError, match="made by MeanDifference"):
        with_controls(grid, store, MeanDifference(whiten=True), mdl=True)
    turned = store_of({str(s): a for s, a in store.arrays.items()}, 1 - np.arange(N) % 2, group=np.arange(N) // 4)
    with pytest.raises(UsageError, match="rows, labels or groups"):
        with_controls(grid, turned, MeanDifference(), mdl=True)
