"""Stores of all tokens: a score per prompt, and no group on two sides of a split."""

import dataclasses

import numpy as np
import polars as pl
import pytest
from probing.test_attention import texts

import reprobe as rp
from reprobe.errors import UnknownSite, UsageError
from reprobe.model.sites import Site
from reprobe.probing.probe_grid import ProbeGrid
from reprobe.probing.readers import AttentionReader, LogisticReader, MeanDifference
from reprobe.probing.sequences import probe_sequences


def store_with(store_of, data, **more):
    """Block 1 holds the texts, block 0 noise; two prompts are a group. Positions go beyond what `prompt` sorts."""
    noise = np.random.default_rng(5).standard_normal(data.X.shape)
    store = store_of(
        {"resid.post@0": noise, "resid.post@1": data.X},
        data.y,
        prompt=[f"p{s:03}" for s in data.sequence],
        group=data.sequence // 2,
        **more,
    )
    place = np.arange(len(data.y)) - np.searchsorted(data.sequence, data.sequence)
    store.index = store.index.with_columns(position=pl.Series(place, dtype=pl.Int32))
    return store


FAST = AttentionReader(restarts=1)


def test_attention_reads_prompts_that_the_last_token_does_not_tell_apart(store_of):
    data = texts()
    store = store_with(store_of, data)
    attention = probe_sequences(store, FAST)
    last = probe_sequences(store, AttentionReader(pooling="last"))
    line = attention.table.row(1, named=True)
    assert (line["site"], line["n"], line["n_groups"], line["chance"]) == ("resid.post@1", 120, 60, 0.5)
    assert line["accuracy_low"] > 0.85 > 0.7 > last.table["accuracy"][1]
    assert attention.table["accuracy_low"][0] < 0.5 < attention.table["accuracy_high"][0]
    assert attention.selected.sites == (Site("resid.post", 1),) * 5
    assert attention.best().reader == "AttentionReader"
    assert attention.best().params["pooling"] == "attention"
    assert "120 prompts of 3 to 12 rows" in attention.note


def test_held_out_scores_are_those_of_readers_fitted_on_other_groups(store_of):
    data = texts(n=60)
    grid = probe_sequences(store_with(store_of, data), FAST, sites="resid.post@1", folds=3)
    ends = np.searchsorted(data.sequence, np.arange(60), side="right") - 1
    np.testing.assert_array_equal(grid.rows, ends)
    np.testing.assert_array_equal(grid.positive, data.label == 1)
    group = np.arange(60) // 2
    for k in range(3):
        kept, held_out = (np.isin(data.sequence, np.flatnonzero(grid.fold == k)) == side for side in (False, True))
        assert not set(group[grid.fold == k]) & set(group[grid.fold != k])
        reader = AttentionReader(restarts=1).fit(data.X[kept], data.y[kept], sequence=data.sequence[kept])
        scores = reader.decision_function(data.X[held_out], data.sequence[held_out])
        np.testing.assert_allclose(grid.oof[grid.fold == k, 0], scores, rtol=1e-3, atol=1e-4)


def test_rows_of_a_held_out_group_do_not_touch_its_readers(store_of):
    data = texts(n=40)
    before = probe_sequences(store_with(store_of, data), FAST, sites="resid.post@1", folds=4)
    k = 2
    inside = np.isin(data.sequence, np.flatnonzero(before.fold == k)[1:])
    moved = dataclasses.replace(store_with(store_of, data))
    moved.arrays[Site("resid.post", 1)][inside] += 100.0
    after = probe_sequences(moved, FAST, sites="resid.post@1", folds=4)
    first = np.flatnonzero(before.fold == k)[0]
    assert after.oof[first, 0] == before.oof[first, 0]
    assert after.inner[k, 0] == before.inner[k, 0]
    assert (after.oof[before.fold != k] != before.oof[before.fold != k]).any()


def test_mean_pooling_is_the_probe_of_a_store_of_means(store_of):
    data = texts(n=60)
    means = np.stack([data.X[data.sequence == i].mean(axis=0) for i in range(60)])
    pooled = probe_sequences(store_with(store_of, data), AttentionReader(pooling="mean"), sites="resid.post@1")
    plain = rp.probe(store_of({"resid.post@1": means}, data.label, group=np.arange(60) // 2), LogisticReader())
    np.testing.assert_array_equal(pooled.fold, plain.fold)
    np.testing.assert_allclose(pooled.oof, plain.oof, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(pooled.inner, plain.inner)
    for column in ("accuracy", "accuracy_low", "accuracy_high", "auroc", "auroc_low", "auroc_high"):
        np.testing.assert_allclose(pooled.table[column], plain.table[column], atol=1e-6)


def test_a_grid_of_sequences_is_a_grid(store_of, tmp_path):
    grid = probe_sequences(store_with(store_of, texts(n=40)), FAST, folds=3, n_jobs=2)
    back = ProbeGrid.load(grid.save(tmp_path / "grid.safetensors"))
    assert back.table.equals(grid.table)
    assert dict(back.directions) == dict(grid.directions)
    assert back.selected == grid.selected
    assert len(grid.plot().axes) == 1


def test_every_token_of_a_model_is_read(tiny_lm, tmp_path):
    words, lm = ("the cat", "a dog", "an owl", "iron and so on"), tiny_lm("llama")
    records = [
        {
            "id": f"{i}",
            "text": f"{words[i % 4]} is number {i}{' on' * (i % 3)}{' and of the' * (i % 2)}",
            "label": i % 2,
        }
        for i in range(40)
    ]
    store = rp.extract(lm, rp.PromptSet.from_records(records), to=tmp_path / "s", sites="resid.post@*", at="all")
    grid = probe_sequences(store, AttentionReader(restarts=1), sites="resid.post@1:3", folds=3)
    assert grid.table["n"].to_list() == [40, 40]
    assert grid.best().identity == lm.identity
    assert grid.best().metrics["accuracy"] > 0.9
    some = probe_sequences(store, AttentionReader(pooling="mean"), where=pl.col("position") > 0, folds=3)
    assert "Left out of" in some.note


def test_what_is_no_store_of_sequences_is_refused(store_of):
    data = texts(n=40)
    store = store_with(store_of, data)
    mixed = store_with(store_of, data)
    mixed.index = mixed.index.with_columns(
        label=pl.when(pl.col("row") == 1).then(1 - pl.col("label")).otherwise("label")
    )
    broken = store_with(store_of, data)
    broken.arrays[Site("resid.post", 1)][7, 0] = np.nan
    cases = [
        (UsageError, "prompt 'p000' has rows of both labels", mixed, FAST, {}),
        (UsageError, "not MeanDifference", store, MeanDifference(), {}),
        (UsageError, "NaN or infinity in 1 of", broken, FAST, {}),
        (UsageError, "20 groups cannot make 30 folds", store, FAST, {"folds": 30}),
        (UsageError, "AttentionReader at resid.post@0: C=0", store, AttentionReader(C=0), {}),
        (UnknownSite, "mlp.out", store, FAST, {"sites": "mlp.out@1"}),
    ]
    for kind, says, source, reader, options in cases:
        with pytest.raises(kind, match=says):
            probe_sequences(source, reader, n_jobs=1, **options)
