import dataclasses

import numpy as np
import polars as pl
import pytest
import torch
from probing.memory import on_disk
from sklearn.model_selection import KFold, cross_val_score

from reprobe.errors import ArtifactExists, CorruptArtifact, UnknownData, UnknownSite, UsageError
from reprobe.model.sites import Site
from reprobe.probing import grid as grid_module
from reprobe.probing.direction import Direction
from reprobe.probing.grid import probe
from reprobe.probing.metrics import fold_auroc
from reprobe.probing.probe_grid import ProbeGrid
from reprobe.probing.reader import Reader
from reprobe.probing.readers import LogisticReader, MeanDifference, PCAReader


@pytest.fixture
def three_layers(store_of, planted):
    """Block 1 and head 3 of block 0 hold the concept, blocks 0 and 2 and the other heads do not."""
    data, noise = planted(n=120, width=21), np.random.default_rng(9)
    heads = noise.standard_normal((120, 35))
    heads[:, 21:28] += 4 * np.outer(data.y, np.ones(7))
    arrays = {
        "resid.post@0": noise.standard_normal((120, 21)),
        "resid.post@1": data.X,
        "resid.post@2": noise.standard_normal((120, 21)),
        "attn.heads@0": heads,
    }
    return store_of(arrays, data.y, group=data.pairs, pair=[f"c{p}" for p in data.pairs])


def test_the_site_that_holds_the_concept_is_found(three_layers):
    grid = probe(three_layers, MeanDifference(), sites="resid.post@*")
    assert grid.table["site"].to_list() == ["resid.post@0", "resid.post@1", "resid.post@2"]
    assert grid.best().site == Site("resid.post", 1)
    line = grid.table.row(1, named=True)
    assert (line["n"], line["n_groups"], line["chance"], line["layer"], line["head"]) == (
        120,
        60,
        0.5,
        1,
        None,
    )
    assert line["accuracy_low"] < line["accuracy"] < line["accuracy_high"]
    assert line["auroc_low"] < line["auroc"] <= line["auroc_high"] <= 1
    assert line["accuracy"] > 0.85 > 0.62 > grid.table["accuracy"][0]
    assert grid.selected.sites == (Site("resid.post", 1),) * 5
    assert grid.selected.accuracy == line["accuracy"]


def test_by_default_heads_are_probed_one_by_one_and_read_once_per_block(three_layers):
    grid = probe(three_layers, MeanDifference())
    assert [str(s) for s in grid.sites][3:] == [f"attn.heads@0.{h}" for h in range(5)]
    assert three_layers.reads.count(Site("attn.heads", 0)) == 1
    heads = grid.table.filter(pl.col("part") == "attn.heads")
    assert heads["head"].to_list() == [0, 1, 2, 3, 4]
    assert heads.sort("accuracy")["head"][-1] == 3
    assert set(heads["width"]) == {7}
    whole = probe(three_layers, MeanDifference(), sites="attn.heads@0")
    assert whole.table["width"].to_list() == [35]
    assert whole.table["head"].to_list() == [None]


@pytest.mark.parametrize("reader", [MeanDifference(), PCAReader(), LogisticReader(C=0.1)], ids=str)
def test_every_held_out_score_comes_from_a_reader_that_never_saw_its_group(reader, three_layers):
    grid = probe(three_layers, reader, sites=["resid.post@1", "attn.heads@0.3"])
    groups = three_layers.index["group"].to_numpy()
    X = three_layers.arrays[Site("resid.post", 1)].double().numpy()[grid.rows]
    y, names = grid.positive, groups[grid.rows]
    for k in range(5):
        held_out = grid.fold == k
        assert not set(names[held_out]) & set(names[~held_out])
        again = type(reader)(**reader.get_params()).fit(X[~held_out], y[~held_out], pairs=grid.groups[~held_out])
        np.testing.assert_allclose(grid.oof[held_out, 0], again.decision_function(X[held_out]), rtol=1e-4, atol=1e-5)
    final = type(reader)(**reader.get_params()).fit(X, y, pairs=grid.groups).direction_
    np.testing.assert_allclose(grid.directions[Site("resid.post", 1)].vector, final.vector, atol=1e-9)
    assert grid.table["auroc"][0] == fold_auroc(grid.oof[:, 0], y, grid.fold)
    assert grid.table["accuracy"][0] == ((grid.oof[:, 0] > 0) == y).mean()


class Singly(Reader):
    """The logistic reader, fitted one site and one fold at a time."""

    def __init__(self, C=0.1):
        self.C = C

    def _fit_plane(self, rows):
        return LogisticReader(C=self.C)._fit_plane(rows)


@pytest.mark.parametrize("C", [0.1, [0.001, 0.1, 1.0]], ids=str)
@pytest.mark.parametrize("folds", [2, 4])
def test_sites_solved_together_give_the_table_of_sites_solved_apart(C, folds, three_layers, monkeypatch):
    apart = probe(three_layers, Singly(C), folds=folds)
    for numbers in (1 << 24, 2 * 120 * 7):
        monkeypatch.setattr(grid_module, "_BATCH", numbers)
        together = probe(three_layers, LogisticReader(C=C), folds=folds)
        assert together.table.select("site", "accuracy").equals(apart.table.select("site", "accuracy"))
        np.testing.assert_allclose(together.table["auroc"], apart.table["auroc"], atol=1e-3)
        np.testing.assert_allclose(together.oof, apart.oof, atol=1e-5)
        np.testing.assert_array_equal(together.inner, apart.inner)
        for site, direction in apart.directions.items():
            np.testing.assert_allclose(together.directions[site].vector, direction.vector, atol=1e-6)
            assert together.directions[site].offset == pytest.approx(direction.offset, abs=1e-6)
            assert together.directions[site].scale == pytest.approx(direction.scale, rel=1e-6)
            assert together.directions[site].params["C"] == C


def test_a_site_without_a_direction_is_named_in_a_batch_of_others(store_of, planted):
    data = planted(n=60, width=9)
    store = store_of({"resid.post@0": data.X, "resid.post@1": np.ones((60, 9)), "resid.post@2": data.X}, data.y)
    with pytest.raises(UsageError, match=r"LogisticReader at resid.post@1: the two classes do not differ"):
        probe(store, LogisticReader())


def test_group_identity_alone_reads_at_chance(store_of):
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(60), 5)
    y = rng.integers(0, 2, 60)[group]  # one random label per group
    X = rng.standard_normal((60, 500))[group] + 0.01 * rng.standard_normal((300, 500))
    ungrouped = cross_val_score(MeanDifference(), X, y, cv=KFold(5, shuffle=True, random_state=0))
    assert ungrouped.mean() > 0.9, "the leak is there for those who split rows"
    line = probe(store_of({"resid.post@0": X}, y, group=group), MeanDifference()).table.row(0, named=True)
    assert line["accuracy_low"] < 0.5 < line["accuracy_high"]
    assert line["auroc_low"] < 0.5 < line["auroc_high"]


def test_on_shuffled_labels_the_best_site_looks_good_and_the_selected_one_does_not(store_of):
    rng = np.random.default_rng(1)
    arrays = {f"resid.post@{i}": rng.standard_normal((120, 10)) for i in range(15)}
    best, selected, covered = [], [], 0
    for seed in range(16):
        y = np.random.default_rng(100 + seed).permutation(np.arange(120) % 2)
        grid = probe(store_of(arrays, y, group=np.arange(120) // 2), MeanDifference(), seed=seed)
        best.append(grid.best().metrics["accuracy"])
        selected.append(grid.selected.accuracy)
        covered += grid.selected.accuracy_low <= 0.5 <= grid.selected.accuracy_high
    assert covered >= 13
    assert np.mean(best) > 0.56
    assert abs(np.mean(selected) - 0.5) < 0.025


def test_a_site_is_chosen_for_a_fold_by_readers_that_never_saw_it(three_layers):
    grid = probe(three_layers, MeanDifference(), sites="resid.post@*")
    for j, site in enumerate(grid.sites):
        X = three_layers.arrays[site].double().numpy()[grid.rows]
        for k in range(5):
            right = 0
            for tested in set(range(5)) - {k}:
                train, test = (grid.fold != k) & (grid.fold != tested), grid.fold == tested
                right += (
                    MeanDifference().fit(X[train], grid.positive[train]).predict(X[test]) == grid.positive[test]
                ).sum()
            assert grid.inner[k, j] == pytest.approx(right / (grid.fold != k).sum())


def test_two_folds_give_results_but_no_choice_of_site(three_layers, tmp_path):
    grid = probe(three_layers, MeanDifference(), sites="resid.post@*", folds=2)
    assert grid.best().site == Site("resid.post", 1)
    back = ProbeGrid.load(grid.save(tmp_path / "two"))
    with pytest.raises(UsageError, match="folds=3"):
        _ = back.selected


def test_of_equally_good_sites_the_first_by_layer_and_head_is_best(store_of, planted):
    data = planted(n=40, width=21)
    store = store_of(
        {"resid.post@2": data.X, "attn.heads@1": np.tile(data.X[:, :7], 3), "resid.post@1": data.X}, data.y
    )
    grid = probe(store, MeanDifference(), sites="resid.post@2, resid.post@1")
    assert grid.best().site == Site("resid.post", 1)
    heads = probe(store, MeanDifference(), sites=[f"attn.heads@1.{h}" for h in (2, 1, 0)])
    assert heads.table["accuracy"].n_unique() == 1
    assert heads.best("auroc").site == Site("attn.heads", 1, 0)
    with pytest.raises(UsageError, match="ranked by accuracy, accuracy_low"):
        grid.best("site")


def test_the_best_site_of_one_part_is_asked_for_by_part(three_layers):
    grid = probe(three_layers, MeanDifference())
    assert grid.best(part="attn.heads").site == Site("attn.heads", 0, 3)
    assert grid.best(part="resid.post").site == Site("resid.post", 1)
    with pytest.raises(UsageError, match=r"'mlp.out' was probed; parts here: attn.heads, resid.post"):
        grid.best(part="mlp.out")


def test_directions_carry_their_results_and_where_they_are_from(three_layers, identity):
    grid = probe(three_layers, PCAReader(), sites="resid.post@1", positive=0)
    d = grid.best()
    assert d.site == Site("resid.post", 1)
    assert d.identity == identity
    assert d.classes == (1, 0)
    assert d.metrics["accuracy"] == grid.table["accuracy"][0]
    assert {"prompts", "plan", "store", "rows", "folds", "seed", "versions"} <= set(d.provenance)
    assert d.provenance["plan"] == {"at": "last"}
    assert "pairs given" in d.sign
    other = probe(three_layers, PCAReader(), sites="resid.post@1").best()
    np.testing.assert_array_equal(other.vector, -d.vector)
    assert other.classes == (0, 1)


def test_results_do_not_depend_on_the_order_of_rows_or_on_threads(three_layers):
    order = np.random.default_rng(0).permutation(120)
    turned = dataclasses.replace(
        three_layers,
        arrays={s: t[torch.as_tensor(order)] for s, t in three_layers.arrays.items()},
        index=three_layers.index[order].with_columns(row=pl.Series(np.arange(120))),
    )
    a, b = probe(three_layers, PCAReader(), n_jobs=1), probe(turned, PCAReader(), n_jobs=3)
    assert a.table.equals(b.table)
    assert all(np.array_equal(a.directions[s].vector, b.directions[s].vector) for s in a.sites)
    c = probe(three_layers, PCAReader(), seed=1)
    assert not a.table.equals(c.table)


def test_rows_that_are_left_out_and_missing_groups_are_said(store_of, planted):
    data = planted(n=60, width=9)
    labels = ["yes" if y else "no" for y in data.y]
    labels[7] = labels[8] = None
    store = store_of({"resid.post@0": data.X}, labels)
    grid = probe(store, MeanDifference(), where=pl.col("row") != 3)
    assert "1 by the filter, 2 without a label" in grid.note
    assert "each prompt is its own group" in grid.note
    assert set(range(60)) - set(grid.rows.tolist()) == {3, 7, 8}
    assert grid.table.row(0, named=True)["n_groups"] == 57
    assert grid.best().provenance["note"] == grid.note
    assert grid.classes == ("no", "yes")


def test_tokens_of_a_prompt_and_sides_of_a_pair_stay_together(store_of, planted):
    data = planted(n=120, width=9)
    tokens = store_of({"resid.post@0": data.X}, data.y, prompt=[f"p{i // 6}" for i in range(120)])
    grid = probe(tokens, MeanDifference())
    assert grid.table["n_groups"][0] == 20
    names = np.array(tokens.index["prompt"])[grid.rows]
    assert all(len(set(grid.fold[names == p])) == 1 for p in set(names))
    pairs = store_of(
        {"resid.post@0": data.X}, data.y, group=np.arange(120) % 40, pair=[f"c{i // 2}" for i in range(120)]
    )
    joined = probe(pairs, PCAReader())
    assert "Pairs join 40 groups into 20" in joined.note
    assert joined.table["n_groups"][0] == 20


def test_a_grid_survives_a_file(three_layers, tmp_path):
    grid = probe(three_layers, LogisticReader(C=0.1))
    path = grid.save(tmp_path / "grid.safetensors")
    back = ProbeGrid.load(path)
    assert back.table.equals(grid.table)
    assert dict(back.directions) == dict(grid.directions)
    assert back.selected == grid.selected
    assert back.best() == grid.best()
    for name in ("oof", "inner", "positive", "groups", "fold", "rows"):
        np.testing.assert_array_equal(getattr(back, name), getattr(grid, name))
        assert getattr(back, name).dtype == getattr(grid, name).dtype
    assert (back.note, back.seed, back.classes, back.provenance) == (
        grid.note, grid.seed, grid.classes, grid.provenance,
    )  # fmt: skip
    with pytest.raises(ArtifactExists):
        grid.save(path)
    with pytest.raises(UsageError, match="holds a probe grid"):
        Direction.load(path)
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(CorruptArtifact, match="checksum"):
        ProbeGrid.load(path)


def test_the_figure_shows_curves_with_chance_and_heads(three_layers):
    figure = probe(three_layers, MeanDifference()).plot()
    curves, heads = figure.axes[:2]
    assert curves.get_xlabel() == "block"
    assert "resid.post" in curves.get_legend_handles_labels()[1]
    assert "majority class" in curves.get_legend_handles_labels()[1]
    assert heads.get_images()[0].get_array().shape == (1, 5)
    figure.canvas.draw()


def test_progress_counts_sites(three_layers):
    seen = []
    probe(three_layers, MeanDifference(), progress=lambda *step: seen.append(step))
    assert seen == [("probe", i, 8) for i in range(9)]


def test_what_cannot_be_probed_is_refused(three_layers, store_of, planted):
    data = planted(n=40, width=9)

    def store(y=data.y, X=data.X, **index):
        return store_of({"resid.post@0": X}, y, **index)

    nan = data.X.copy()
    nan[5] = np.nan
    flat = np.ones((40, 9))
    half = [f"c{i // 2}" if i < 38 else None for i in range(40)]
    cases = [
        (UnknownSite, "block", three_layers, MeanDifference(), {"sites": "resid.post@7"}),
        (UnknownSite, "mlp.out", three_layers, MeanDifference(), {"sites": "mlp.out@1"}),
        (UnknownData, "no column 'truth' .* it has row", store(), MeanDifference(), {"label": "truth"}),
        (UsageError, "has 3 labels", store(np.arange(40) % 3), MeanDifference(), {}),
        (UsageError, r"has 1 labels .* \(1\)", store(np.ones(40, dtype=int)), MeanDifference(), {}),
        (UsageError, "has 0 labels", store(), MeanDifference(), {"where": pl.col("row") < 0}),
        (UsageError, "'joy' is not a label", store(), MeanDifference(), {"positive": "joy"}),
        (UsageError, "4 groups cannot make 5 folds", store(group=np.arange(40) // 10), MeanDifference(), {}),
        (UsageError, r"@0: NaN .* 1 of 40 rows: 5 \(prompt 'p0005'\)", store(X=nan), MeanDifference(), {}),
        (UsageError, "2 rows have no pair, e.g. prompt 'p0038'", store(pair=half), PCAReader(), {}),
        (UsageError, "MeanDifference at resid.post@0: .*leave the site", store(X=flat), MeanDifference(), {}),
        (UsageError, r"such as MeanDifference\(\)", store(), MeanDifference, {}),
    ]  # fmt: skip
    for kind, says, source, reader, arguments in cases:
        with pytest.raises(kind, match=says):
            probe(source, reader, **arguments)
    probe(store(pair=half), MeanDifference())  # reads no pairs


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_store_on_disk_is_probed_like_one_in_memory(dtype, three_layers, identity, tmp_path):
    arrays = {s: t.to(getattr(torch, dtype)) for s, t in three_layers.arrays.items()}
    found = probe(on_disk(tmp_path / "x.reprobe", arrays, three_layers.index, dtype=dtype), LogisticReader(C=0.1))
    in_memory = probe(dataclasses.replace(three_layers, arrays=arrays), LogisticReader(C=0.1))
    assert found.table.equals(in_memory.table)
    assert found.best().identity == identity
    assert found.best().provenance["dtype"] == dtype
