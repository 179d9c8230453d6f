import numpy as np
import pytest
from probing.memory import make_index, on_disk

from reprobe.errors import UsageError
from reprobe.model.sites import Site
from reprobe.probing import streaming
from reprobe.probing.grid import probe
from reprobe.probing.readers import CCSReader, LDAReader, LogisticReader, MeanDifference

ROWS, WIDTH = 600, 24
RESID, HEADS = Site("resid.post", 0), Site("attn.heads", 1)
#: Too little for the labelled rows of these sites, enough for sums and factors.
LITTLE = 3 * 8 * 540 * WIDTH - 1


def written(path, change=None):
    """Rows in unequal units around a far mean, labels that depend on them; one in ten without a label."""
    rng = np.random.default_rng(3)
    widths = {RESID: WIDTH, HEADS: 2 * WIDTH}
    values = {s: rng.standard_normal((ROWS, w)) @ rng.standard_normal((w, w)) for s, w in widths.items()}
    label = rng.random(ROWS) < 1 / (1 + np.exp(-values[RESID][:, :3].sum(axis=1) / 2))
    values = {s: (v * np.geomspace(0.1, 10, v.shape[1]) + 5).astype(np.float32) for s, v in values.items()}
    for v in values.values():
        v[:, 4] = 0.7  # constant
    if change is not None:
        change(values)
    labels = [None if i % 10 == 9 else bool(label[i]) for i in range(ROWS)]
    index = make_index(labels, group=np.arange(ROWS) // 3, prompt=[f"p{i:03}" for i in rng.permutation(ROWS)])
    return on_disk(path, values, index, head_dim=WIDTH, shard_rows=200, chunk_rows=50)


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
    assert grid.directions[RESID].vector[4] == 0


def test_of_several_penalties_one_is_chosen_for_each_fit(store):
    path = [1e-3, 0.1, 10]
    grid = probe(store, LogisticReader(C=path), sites="resid.post@0", memory=LITTLE)
    chosen = [probe(store, LogisticReader(C=C), sites="resid.post@0") for C in path]
    vectors = [one.directions[RESID].vector for one in chosen]
    assert min(np.linalg.norm(grid.directions[RESID].vector - v) for v in vectors) < 1e-5


@pytest.mark.parametrize("reader", [CCSReader()], ids=["ccs"])
def test_a_reader_that_needs_all_rows_says_so_where_they_do_not_fit(reader, store):
    with pytest.raises(UsageError, match=r"CCSReader needs them all at once: allow more memory"):
        probe(store, reader, memory=LITTLE)


def test_rows_that_are_not_finite_are_refused_by_site_and_number(tmp_path):
    def change(values):
        values[RESID][17] = np.nan

    store = written(tmp_path / "s.reprobe", change)
    for reader in (LDAReader(), LogisticReader()):
        with pytest.raises(UsageError, match=r"resid\.post@0: NaN or infinity in 1 of rows .*: 17"):
            probe(store, reader, memory=LITTLE)


def test_a_site_without_a_difference_is_named(tmp_path):
    def change(values):
        values[RESID][:] = 3.0

    store = written(tmp_path / "s.reprobe", change)
    for reader in (MeanDifference(), LogisticReader()):
        with pytest.raises(UsageError, match=r"at resid\.post@0: .*leave the site out with sites="):
            probe(store, reader, memory=LITTLE)


def test_memory_for_not_even_one_site_is_refused(store):
    with pytest.raises(UsageError, match="allow more"):
        probe(store, LogisticReader(), memory=1000)
