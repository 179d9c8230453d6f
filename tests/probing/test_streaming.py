import numpy as np
import polars as pl
import pytest
import torch
from probing.memory import IDENTITY

from reprobe.errors import UsageError
from reprobe.model.sites import Site
from reprobe.probing import streaming
from reprobe.probing.grid import probe
from reprobe.probing.readers import CCSReader, LDAReader, LogisticReader, MeanDifference
from reprobe.store import ActivationStore, StoredSite, StoreWriter

ROWS, WIDTH = 600, 24
SITES = (StoredSite(Site("resid.post", 0), WIDTH), StoredSite(Site("attn.heads", 1), 2 * WIDTH, WIDTH))
#: Too little for the labelled rows of these sites, enough for sums and factors.
LITTLE = 3 * 8 * 540 * WIDTH - 1


def written(path, change=None):
    """Rows in unequal units around a far mean, labels that depend on them; one in ten without a label."""
    rng = np.random.default_rng(3)
    values = {s.site: rng.standard_normal((ROWS, s.width)) @ rng.standard_normal((s.width, s.width)) for s in SITES}
    label = rng.random(ROWS) < 1 / (1 + np.exp(-values[SITES[0].site][:, :3].sum(axis=1) / 2))
    values = {s: (v * np.geomspace(0.1, 10, v.shape[1]) + 5).astype(np.float32) for s, v in values.items()}
    for v in values.values():
        v[:, 4] = 0.7  # constant
    if change is not None:
        change(values)
    index = pl.DataFrame(
        {
            "row": pl.Series(range(ROWS), dtype=pl.UInt64),
            "prompt": [f"p{i:03}" for i in rng.permutation(ROWS)],
            "position": pl.Series([0] * ROWS, dtype=pl.Int32),
            "token": pl.Series([5] * ROWS, dtype=pl.Int32),
            "label": [None if i % 10 == 9 else bool(label[i]) for i in range(ROWS)],
            "group": [f"g{i // 3}" for i in range(ROWS)],
            "pair": pl.Series([None] * ROWS, dtype=pl.String),
            "n_tokens": pl.Series([1] * ROWS, dtype=pl.Int32),
        }
    )
    tokens = pl.DataFrame({"prompt": index["prompt"], "tokens": pl.Series([[5]] * ROWS, dtype=pl.List(pl.Int32))})
    with StoreWriter.create(
        path, identity=IDENTITY, prompts="p" * 64, plan={"at": "last"}, sites=SITES, dtype="float32", index=index,
        tokens=tokens, shard_rows=200, chunk_rows=50,
    ) as writer:  # fmt: skip
        for shard in writer.missing():
            writer.write_shard(
                shard.number, {s: torch.from_numpy(v[shard.start : shard.stop]) for s, v in values.items()}
            )
    return ActivationStore.open(path)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return written(tmp_path_factory.mktemp("streaming") / "s.reprobe")


READERS = [
    pytest.param(MeanDifference(), 1e-9, id="mean difference"),
    pytest.param(MeanDifference(whiten=True), 1e-7, id="whitened"),
    pytest.param(LDAReader(), 1e-8, id="lda"),
    pytest.param(LogisticReader(C=0.1), 4e-6, id="logistic"),
    pytest.param(LogisticReader(C=1e-3), 4e-6, id="logistic, strong penalty"),
    pytest.param(LogisticReader(C=100), 4e-6, id="logistic, weak penalty"),
]


@pytest.mark.parametrize(("reader", "apart"), READERS)
@pytest.mark.parametrize("folds", [2, 4])
def test_what_is_fitted_in_batches_is_what_is_fitted_in_memory(reader, apart, folds, store):
    whole = probe(store, reader, folds=folds)
    streamed = probe(store, reader, folds=folds, memory=LITTLE)
    for site, direction in whole.directions.items():
        found = streamed.directions[site]
        assert np.linalg.norm(found.vector - direction.vector) <= apart
        assert found.offset == pytest.approx(direction.offset, rel=1e-4, abs=1e-4)
        assert found.scale == pytest.approx(direction.scale, rel=1e-4)
        assert (found.site, found.reader, found.params) == (site, direction.reader, direction.params)
    np.testing.assert_allclose(streamed.oof, whole.oof, atol=1e-3)
    np.testing.assert_allclose(streamed.inner, whole.inner, atol=2 / ROWS)
    assert streamed.table.columns == whole.table.columns


def test_few_passes_are_needed_where_a_part_of_the_rows_is_held(store, monkeypatch):
    reads = []
    batches = streaming.finite_batches

    def counted(*args):
        reads.append(args[1])
        return batches(*args)

    monkeypatch.setattr(streaming, "finite_batches", counted)
    probe(store, LogisticReader(), sites="resid.post@0", memory=LITTLE)
    assert 2 <= len(reads) <= 15
    reads.clear()
    probe(store, LDAReader(), memory=LITTLE)
    assert len(reads) == 1


def test_a_feature_that_does_not_vary_weighs_nothing(store):
    grid = probe(store, LogisticReader(), sites="resid.post@0", memory=LITTLE)
    assert grid.directions[SITES[0].site].vector[4] == 0


def test_of_several_penalties_one_is_chosen_for_each_fit(store):
    path = [1e-3, 0.1, 10]
    grid = probe(store, LogisticReader(C=path), sites="resid.post@0", memory=LITTLE)
    chosen = [probe(store, LogisticReader(C=C), sites="resid.post@0") for C in path]
    vectors = [one.directions[SITES[0].site].vector for one in chosen]
    assert min(np.linalg.norm(grid.directions[SITES[0].site].vector - v) for v in vectors) < 1e-5


@pytest.mark.parametrize("reader", [CCSReader()], ids=["ccs"])
def test_a_reader_that_needs_all_rows_says_so_where_they_do_not_fit(reader, store):
    with pytest.raises(UsageError, match=r"CCSReader needs them all at once: allow more memory"):
        probe(store, reader, memory=LITTLE)


def test_rows_that_are_not_finite_are_refused_by_site_and_number(tmp_path):
    def change(values):
        values[SITES[0].site][17] = np.nan

    store = written(tmp_path / "s.reprobe", change)
    for reader in (LDAReader(), LogisticReader()):
        with pytest.raises(UsageError, match=r"resid\.post@0: NaN or infinity in 1 of rows .*: 17"):
            probe(store, reader, memory=LITTLE)


def test_a_site_without_a_difference_is_named(tmp_path):
    def change(values):
        values[SITES[0].site][:] = 3.0

    store = written(tmp_path / "s.reprobe", change)
    for reader in (MeanDifference(), LogisticReader()):
        with pytest.raises(UsageError, match=r"at resid\.post@0: .*leave the site out with sites="):
            probe(store, reader, memory=LITTLE)


def test_memory_for_not_even_one_site_is_refused(store):
    with pytest.raises(UsageError, match="allow more"):
        probe(store, LogisticReader(), memory=1000)
