import numpy as np
import pytest
import torch
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from reprobe.errors import UsageError
from reprobe.probing import lbfgs, logistic
from reprobe.probing.crossval import group_folds
from reprobe.probing.logistic import solve_many
from reprobe.probing.readers import LogisticReader


def problem(seed, width=None):
    """Rows of a random size, correlated, in unequal units away from 0, one feature constant; labels that depend on
    them to a random degree, of random balance; a random penalty."""
    rng = np.random.default_rng(seed)
    width = int(rng.integers(1, 60)) if width is None else width
    n = int(rng.integers(20, 200) + width * rng.choice([0.3, 2]))
    X = rng.standard_normal((n, width)) @ (np.eye(width) + rng.standard_normal((width, width)) / np.sqrt(width))
    X = X * np.geomspace(1e-3, 1e3, width) + rng.standard_normal(width) * 10
    if width > 3:
        X[:, 2] = 0.7
    odds = rng.choice([0.3, 3, 30]) * StandardScaler().fit_transform(X) @ rng.standard_normal(width) / np.sqrt(width)
    y = rng.random(n) < expit(odds + rng.choice([-1.5, 0, 1.5]))
    y[:4] = [True, False, True, False]
    return X, y, float(rng.choice([1e-3, 1e-2, 0.1, 1, 10]))


def reference(X, y, C, sample_weight=None):
    """Weights and intercept in raw units, by scikit-learn."""
    model = LogisticRegression(C=C, solver="newton-cholesky", tol=1e-10, max_iter=2000)
    pipeline = make_pipeline(StandardScaler(), model)
    if sample_weight is not None:
        pipeline.fit(X, y, standardscaler__sample_weight=sample_weight, logisticregression__sample_weight=sample_weight)
    else:
        pipeline.fit(X, y)
    w = model.coef_[0] / pipeline[0].scale_
    return w, float(model.intercept_[0] - w @ pipeline[0].mean_)


def many(X, y, C, weights=None):
    """`solve_many` at one site, from arrays."""
    C = torch.as_tensor(C, dtype=torch.float64)
    kept = None if weights is None else torch.as_tensor(np.asarray(weights, dtype=float))
    return solve_many(torch.as_tensor(X)[None], torch.as_tensor(y), C, kept)


def assert_is(found, p, expected, X, site=0):
    """Equal to 1e-5 of its length, in units in which every feature varies alike, and certified."""
    w, b = expected
    unit = X.std(axis=0)
    mine = found.weights[site, p].numpy()
    assert np.linalg.norm((mine - w) * unit) <= 1e-5 * np.linalg.norm(w * unit)
    shift = X.mean(axis=0)
    assert found.intercept[site, p] + mine @ shift == pytest.approx(b + w @ shift, rel=1e-5, abs=1e-6)
    assert found.error[site, p] <= 1e-6 or found.gradient[site, p] <= 1e-10


@pytest.mark.parametrize("seed", range(40))
def test_the_optimum_is_scikit_learns(seed):
    X, y, C = problem(seed)
    assert_is(many(X, y, C), 0, reference(X, y, C), X)


@pytest.mark.parametrize("seed", range(6))
def test_the_optimum_is_scikit_learns_at_wide_sites(seed):
    X, y, C = problem(seed, width=257 + 10 * seed)
    assert_is(many(X, y, C), 0, reference(X, y, C), X)


@pytest.mark.slow
def test_the_optimum_is_scikit_learns_on_a_thousand_problems():
    for seed in range(1000, 2000):
        X, y, C = problem(seed, width=257 + seed % 100 if seed % 10 == 0 else None)
        assert_is(many(X, y, C), 0, reference(X, y, C), X)


@pytest.fixture(params=[30, 300], ids=["narrow", "wide"])
def folded(request, planted):
    """Rows with unequal units and a class imbalance, and five folds."""
    data = planted(n=240, width=request.param, strength=1.0)
    keep = (data.y == 1) | (np.arange(240) % 4 > 0)
    X = (data.X * np.geomspace(0.01, 100, request.param))[keep]
    y, groups = data.y[keep] == 1, data.pairs[keep]
    return X, y, group_folds(groups, y, 5, seed=0)


def test_folds_penalties_and_labels_solved_together_are_those_solved_apart(folded):
    X, y, fold = folded
    path = np.array([1e-3, 0.1, 10])
    other = np.random.default_rng(0).permutation(y)
    labels = np.stack([lab for lab in (y, other) for _ in range(15)])
    kept = np.stack([fold != k for _ in range(2) for k in range(5) for _ in path])
    found = many(X, labels, np.tile(path, 10), kept)
    assert found.weights.shape == (1, 30, X.shape[1])
    for p in range(30):
        expected = reference(X[kept[p]], labels[p][kept[p]], path[p % 3])
        assert_is(found, p, expected, X[kept[p]])


def test_rows_held_out_by_weight_leave_no_trace(folded):
    X, y, fold = folded
    kept = (fold != 2)[None]
    changed = np.where(kept[0][:, None], X, 50 * X[::-1] + 7)
    a, b = many(X, y, 0.1, kept), many(changed, y ^ ~kept[0], 0.1, kept)
    assert_is(b, 0, (a.weights[0, 0].numpy(), float(a.intercept[0, 0])), X[kept[0]])


@pytest.mark.parametrize(("here", "elsewhere"), [(0.1, 0.0), (0.0, 1e4), (1e-9, 3.0)])
def test_a_feature_that_varies_in_held_out_rows_only_weighs_nothing(here, elsewhere, folded):
    X, y, fold = folded
    X = X.copy()
    X[:, 4] += elsewhere
    X[fold != 1, 4] = here
    found = many(X, y, 0.1, (fold != 1)[None])
    assert found.weights[0, 0, 4] == 0
    assert_is(found, 0, reference(X[fold != 1], y[fold != 1], 0.1), X[fold != 1])


def test_counts_of_a_bootstrap_are_rows_repeated(folded):
    X, y, _ = folded
    counts = np.random.default_rng(0).multinomial(len(y), np.full(len(y), 1 / len(y)), size=3)
    found = many(X, y, 0.1, counts)
    for p in range(3):
        assert_is(found, p, reference(X.repeat(counts[p], axis=0), y.repeat(counts[p]), 0.1), X.repeat(counts[p], 0))


def test_sites_solved_together_are_those_solved_apart_however_they_are_cut_up(folded, monkeypatch):
    X, y, fold = folded
    sites = np.stack([X, X[:, ::-1] ** 2, np.roll(X, 1, axis=0)])
    kept = torch.tensor(np.stack([fold != k for k in range(5)]))
    C = torch.tensor([[0.01], [0.1], [1.0]], dtype=torch.float64)
    together = solve_many(torch.tensor(sites), torch.tensor(y), C.expand(3, 5), kept)
    monkeypatch.setattr(logistic, "_CHUNK", {"cpu": 2 * X.size + 5})
    cut = solve_many(torch.tensor(sites), torch.tensor(y), C.expand(3, 5), kept)
    units = torch.tensor(sites.std(axis=1))[:, None]
    apart = ((cut.weights - together.weights) * units).norm(dim=-1)
    assert (apart <= 2e-6 * (together.weights * units).norm(dim=-1)).all()
    for s in range(3):
        for k in range(5):
            rows = fold != k
            assert_is(together, k, reference(sites[s][rows], y[rows], float(C[s])), sites[s][rows], site=s)


@pytest.mark.parametrize(("n", "width"), [(60, 3), (60, 40), (80, 300), (400, 300)])
@pytest.mark.parametrize("C", [1.0, 1e4])
def test_separable_classes_have_an_optimum_at_any_finite_penalty(n, width, C):
    X = np.random.default_rng(0).standard_normal((n, width))
    y = X[:, 0] > 0
    found = many(X, y, C)
    assert found.error[0, 0] <= 1e-6 or found.gradient[0, 0] <= 1e-10
    if C > 1:  # a penalty weak enough for the optimum to separate them
        assert (((X @ found.weights[0, 0].numpy() + float(found.intercept[0, 0])) > 0) == y).all()


@pytest.mark.parametrize("width", [12, 300])
def test_the_certificate_is_the_gradient_of_the_mean_loss(width, monkeypatch):
    X, y, _ = problem(3, width=width)
    monkeypatch.setattr(logistic, "_MAX_STEPS", 3)
    monkeypatch.setattr(logistic, "_MAX_ROUNDS", 1)
    monkeypatch.setattr(lbfgs, "_MAX_STEPS", 3)
    found = many(X, y, 1.0)
    scaler = StandardScaler().fit(X)
    w = found.weights[0, 0].numpy() * scaler.scale_
    b = float(found.intercept[0, 0]) + found.weights[0, 0].numpy() @ scaler.mean_
    Z = scaler.transform(X)
    residual = expit(Z @ w + b) - y
    gradient = np.append(Z.T @ residual + w, residual.sum()) / len(y)
    assert np.abs(gradient).max() > 1e-6, "stopped too late to tell"
    assert found.gradient[0, 0] == pytest.approx(np.abs(gradient).max(), rel=1e-6)
    assert found.largest[0, 0] == pytest.approx(np.abs(w).max())
    best, _ = reference(X, y, 1.0)
    away = np.linalg.norm(w - best * scaler.scale_) / np.linalg.norm(w)
    assert 1e-5 < away <= found.error[0, 0]


def test_of_several_penalties_the_one_with_the_lowest_held_out_loss_is_taken(planted):
    data = planted(n=160, width=40, strength=1.0)
    path = [10.0, 0.001, 0.1, 0.01]
    reader = LogisticReader(C=path, inner_folds=4, seed=3).fit(data.X, data.y, groups=data.pairs)
    fold = group_folds(data.pairs, data.y, 4, seed=3)
    losses = []
    for C in path:
        loss = 0.0
        for k in range(4):
            w, b = reference(data.X[fold != k], data.y[fold != k], C)
            margin = (data.X[fold == k] @ w + b) * (2 * data.y[fold == k] - 1)
            loss += np.logaddexp(0, -margin).sum()
        losses.append(loss)
    assert path[int(np.argmin(losses))] == reader.C_
    single = LogisticReader(C=reader.C_).fit(data.X, data.y)
    np.testing.assert_allclose(reader.direction_.vector, single.direction_.vector, atol=1e-8)
    assert reader.gradient_ < 1e-7


def test_the_penalty_is_not_chosen_by_recognising_groups():
    """Many rows of each group, labels by group at random: within groups weak penalties look good, across them none
    does."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(60), 6)
    y = rng.permutation(np.arange(60) % 2)[groups]
    X = rng.standard_normal((60, 40))[groups] + 0.1 * rng.standard_normal((360, 40))
    path = [1e-5, 1e-3, 0.1, 10.0]
    assert LogisticReader(C=path).fit(X, y).C_ == 10.0
    assert LogisticReader(C=path).fit(X, y, groups=groups).C_ <= 1e-3


@pytest.mark.parametrize("C", [[], [0.1, -1.0], [0.1, np.inf], np.nan])
def test_impossible_penalties_are_refused(C, planted):
    data = planted(n=40)
    with pytest.raises(UsageError, match="positive number"):
        LogisticReader(C=C).fit(data.X, data.y)


@pytest.mark.models
def test_the_optimum_is_scikit_learns_on_heads_of_a_model(real_lm, tmp_path):
    import reprobe as rp

    store = rp.extract(
        real_lm("smollm2-135m"), rp.PromptSet.load("cities").head(240), sites="attn.heads@12", at="last",
        to=tmp_path / "s.reprobe",
    )  # fmt: skip
    X = store.read("attn.heads@12").double().numpy()
    y = store.index["label"].to_numpy() == 1
    heads = X.reshape(len(X), -1, 64).transpose(1, 0, 2)
    found = solve_many(torch.tensor(heads), torch.tensor(y), 0.1)
    for h, rows in enumerate(heads):
        assert_is(found, 0, reference(rows, y, 0.1), rows, site=h)
    whole = many(X, y, 0.1)
    assert_is(whole, 0, reference(X, y, 0.1), X)
