"""ITI: the recipe of the paper, written out once more in NumPy, and put into the model by plain hooks."""

from functools import cache

import numpy as np
import polars as pl
import pytest
import torch
from control.reference import Sequence, logits
from methods.plain import ids_of, near, same_run, steered
from probing.memory import make_store

import reprobe as rp
from reprobe.errors import IdentityMismatch, UnknownSite, UsageError
from reprobe.methods import iti
from reprobe.model.sites import Site
from reprobe.probing.readers import LogisticReader, MeanDifference, PCAReader, RandomReader

HEADS, WIDTH = 5, 7


def answers(seed=0, questions=60):
    """A store of two blocks of heads: two to five answers to each question; two heads hold truth, one of them well."""
    rng = np.random.default_rng(seed)
    group = np.repeat(np.arange(questions), rng.integers(2, 6, questions))
    y = rng.integers(0, 2, len(group))
    arrays = {f"attn.heads@{layer}": rng.standard_normal((len(y), HEADS * WIDTH)) * 3 + 1 for layer in (0, 2)}
    truth = np.outer(y - 0.5, rng.standard_normal(WIDTH))
    arrays["attn.heads@2"][:, 3 * WIDTH : 4 * WIDTH] += 6 * truth
    arrays["attn.heads@0"][:, : 1 * WIDTH] += 2 * truth
    arrays["attn.heads@0"][:, 4 * WIDTH :] = arrays["attn.heads@0"][:, 1 * WIDTH : 2 * WIDTH]  # equal heads: a tie
    return make_store(arrays, y, group=group)


class NeedsGroups(MeanDifference):
    """Refuses rows that do not say their questions: whatever it splits further would part them."""

    def _fit_plane(self, rows):
        if rows.groups is None or len(rows.groups) != len(rows.X):
            raise UsageError("rows without groups")
        return super()._fit_plane(rows)


def test_probes_that_split_their_rows_further_are_told_the_questions():
    store = answers()
    told = iti.head_ranking(store, probe=NeedsGroups(), direction=NeedsGroups())
    for one, other in zip(told, iti.head_ranking(store, probe=MeanDifference()), strict=True):
        np.testing.assert_array_equal(one.accuracy, other.accuracy)


def newton(Z, y, C):
    """Penalised logistic regression to the last digits, intercept free: Newton's method as in any textbook."""
    A = np.append(Z, np.ones((len(Z), 1)), axis=1)
    penalty = np.append(np.full(Z.shape[1], 1 / C), 0.0)
    theta = np.zeros(A.shape[1])
    for _ in range(50):
        p = 1 / (1 + np.exp(-A @ theta))
        gradient = A.T @ (p - y) + penalty * theta
        theta = theta - np.linalg.solve((A.T * (p * (1 - p))) @ A + np.diag(penalty), gradient)
    return theta[:-1], theta[-1]


def recipe(store, ranking, C=0.1, sigma_over_all=False):
    """(accuracy, direction, σ) of each head, from the rows that the ranking says it has used."""
    y = (store.index["label"].to_numpy() == store.index["label"].max()).astype(float)
    train, validation, test = ranking.train, ranking.validation, ranking.test
    found = {}
    for site in ranking.sites:
        whole = np.asarray(store.read(site.whole), dtype=np.float64)
        width = store.width(site)
        X = whole[:, site.unit * width : (site.unit + 1) * width]
        mean, std = X[train].mean(axis=0), X[train].std(axis=0)
        w, b = newton((X[train] - mean) / std, y[train], C)
        accuracy = np.mean(((X[validation] - mean) / std @ w + b > 0) == (y[validation] == 1))
        development = np.concatenate([train, validation])
        theta = X[development][y[development] == 1].mean(axis=0) - X[development][y[development] == 0].mean(axis=0)
        theta /= np.linalg.norm(theta)
        over = np.concatenate([development, test]) if sigma_over_all else development
        found[site] = accuracy, theta, np.std(X[over] @ theta)
    return found


def agree(store, ranking, **options):
    wanted = recipe(store, ranking, **options)
    order = sorted(wanted, key=lambda site: (-wanted[site][0], site.layer, site.unit))
    assert list(ranking.sites) == order
    np.testing.assert_allclose(ranking.accuracy, [wanted[site][0] for site in order])
    for site, d in ranking.directions.items():
        assert d.vector @ wanted[site][1] >= 0.99999
        assert d.scale == pytest.approx(wanted[site][2], rel=1e-9)
        assert d.site == site


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("compat", [None, "honest_llama"])
def test_ranking_and_directions_are_those_of_the_recipe(seed, compat):
    store = answers(seed)
    for ranking in iti.head_ranking(store, seed=seed, compat=compat):
        agree(store, ranking, sigma_over_all=compat == "honest_llama")
        assert ranking.sites[0] == Site("attn.heads", 2, 3)
        assert len(ranking.sites) == 10
        a, b = (ranking.sites.index(Site("attn.heads", 0, unit)) for unit in (1, 4))
        assert ranking.accuracy[a] == ranking.accuracy[b]
        assert a < b, "of equal heads the first comes first"


@pytest.mark.parametrize("family", ["gemma3_text", "gpt2", "qwen3"])
def test_the_recipe_holds_for_the_heads_of_a_model(family, tiny_lm, tmp_path):
    lm = tiny_lm(family)
    store = rp.extract(lm, questions(), to=tmp_path / "s", sites="attn.heads@*", at="last")
    for ranking in iti.head_ranking(store, probe=LogisticReader(C=1.0)):
        agree(store, ranking, C=1.0)
        assert ranking.top(1)[0].identity == lm.identity
        assert ranking.top(1)[0].width == store.width(ranking.top(1)[0].site)


def test_questions_are_dealt_to_two_folds_and_each_development_fold_80_to_20():
    store = answers()
    group, rows = store.index["group"].to_numpy(), np.arange(len(store.index))
    rankings = iti.head_ranking(store)
    np.testing.assert_array_equal(np.sort(np.concatenate([r.test for r in rankings])), rows)
    for r in rankings:
        sets = [set(group[part]) for part in (r.train, r.validation, r.test)]
        assert not (sets[0] & sets[1]) | (sets[1] & sets[2]) | (sets[0] & sets[2])
        assert len(sets[0]) == int(0.8 * len(sets[0] | sets[1]))
        np.testing.assert_array_equal(np.sort(np.concatenate([r.train, r.validation, r.test])), rows)
    again, other = iti.head_ranking(store), iti.head_ranking(store, seed=1)
    assert dict(again[0].directions) == dict(rankings[0].directions)
    assert set(other[0].train) != set(rankings[0].train)


def test_test_rows_change_nothing_unless_asked_for():
    store = answers()
    before = {compat: iti.head_ranking(store, compat=compat)[0] for compat in (None, "honest_llama")}
    for site in store.sites:
        store.arrays[site][before[None].test] *= 10
    for compat, old in before.items():
        new = iti.head_ranking(store, compat=compat)[0]
        assert new.sites == old.sites
        for a, b in zip(new.directions.values(), old.directions.values(), strict=True):
            np.testing.assert_array_equal(a.vector, b.vector)
            assert (a.scale == b.scale) == (compat is None)


def test_other_directions_are_had_by_their_reader_and_shuffled_labels_rank_no_head_high():
    store = answers()
    best = {
        str(reader): iti.head_ranking(store, direction=reader)[0].top(1)[0]
        for reader in (LogisticReader(), RandomReader(4))
    }
    assert [d.reader for d in best.values()] == ["LogisticReader", "RandomReader"]
    index, means = store.index, []
    for seed in range(10):
        store.index = index.with_columns(label=pl.col("label").shuffle(seed=seed))
        means += [ranking.accuracy.mean() for ranking in iti.head_ranking(store)]
    assert np.mean(means) == pytest.approx(0.5, abs=3 * np.std(means, ddof=1) / np.sqrt(len(means)))
    assert np.std(means, ddof=1) / np.sqrt(len(means)) < 0.02


def test_the_best_k_are_asked_for_and_what_cannot_be_ranked_is_refused():
    store = answers()
    ranking = iti.head_ranking(store)[0]
    assert [d.site for d in ranking.top(3)] == list(ranking.sites[:3])
    assert [d.metrics["rank"] for d in ranking.top(3)] == [0, 1, 2]
    for k in (0, 11):
        with pytest.raises(UsageError, match="from 1 to 10"):
            ranking.top(k)
    with pytest.raises(UsageError, match="'honest_llama'"):
        iti.head_ranking(store, compat="iti")
    with pytest.raises(UnknownSite, match=r"holds resid.post@1: extract with sites='attn.heads@\*'"):
        iti.head_ranking(make_store({"resid.post@1": np.zeros((4, 3))}, [0, 1, 0, 1]))
    with pytest.raises(UsageError, match="cannot make 2 folds"):
        iti.head_ranking(store, where=pl.col("group") == "g0")
    flat = answers()
    flat.arrays[Site("attn.heads", 2)][:, :WIDTH] = 1.0
    with pytest.raises(UsageError, match=r"attn.heads@2.0: .*do not differ"):
        iti.head_ranking(flat)
    with pytest.raises(UsageError, match="to fit on have answers of one class only"):
        iti.head_ranking(
            make_store({"attn.heads@0": np.random.default_rng(0).standard_normal((4, 7))}, [0, 1, 0, 1], group=range(4))
        )


def test_readers_of_pairs_get_the_pairs_of_the_development_fold():
    rng = np.random.default_rng(0)
    question, y = np.repeat(np.arange(30), 2), np.tile([1, 0], 30)
    X = np.repeat(rng.standard_normal((30, WIDTH)), 2, axis=0) * 3 + rng.standard_normal((60, WIDTH))
    X[:, 0] += 2 * y
    names = [f"c{q:02}" for q in question]
    for ranking in iti.head_ranking(make_store({"attn.heads@0": X}, y, pair=names), direction=PCAReader()):
        kept = np.sort(np.concatenate([ranking.train, ranking.validation]))
        assert len(set(question[kept])) * 2 == len(kept), "no pair is parted"
        wanted = PCAReader().fit(X[kept].astype(np.float32), y[kept], pairs=question[kept]).direction_
        np.testing.assert_allclose(ranking.top(1)[0].vector, wanted.vector, atol=1e-6)
    names[1] = None
    with pytest.raises(UsageError, match="1 rows have no pair"):
        iti.head_ranking(make_store({"attn.heads@0": X}, y, pair=names), direction=PCAReader())


def questions(copies=3):
    subjects, truth = ("a cat", "the sea", "an owl", "iron", "the moon", "a fox"), ("alive", "an animal", "cold", "old")
    records = [
        {"id": f"{i}-{j}", "text": f"Q: what is {s}? A: {t}", "label": (i + j) % 2, "group": f"{s} {i}"}
        for i, s in enumerate(subjects * copies)
        for j, t in enumerate(truth)
    ]
    return rp.PromptSet.from_records(records)


@pytest.fixture(scope="module")
def heads(tiny_lm, tmp_path_factory):
    """`heads(family)`: a tiny model with a store of its heads."""

    @cache
    def make(family):
        lm = tiny_lm(family)
        path = tmp_path_factory.mktemp("heads") / "s"
        return lm, rp.extract(lm, questions(), to=path, sites="attn.heads@*", at="last")

    return make


ASKED = ["Q: what is a dog? A:", "Q: what is the old man on the mat? A:"]


def pushes(store, ranking, K, alpha, scope):
    """The intervention as the paper writes it, head by head."""
    wanted = recipe(store, ranking, C=1.0)
    edits = []
    for site in sorted(wanted, key=lambda site: (-wanted[site][0], site.layer, site.unit))[:K]:
        _, theta, sigma = wanted[site]
        step = torch.tensor(alpha * sigma * theta)
        edits.append((site, scope, None, lambda h, s, step=step: h + step))
    return edits


@pytest.mark.parametrize("family", ["gemma3_text", "gpt2", "qwen3"])
def test_the_k_best_heads_are_pushed_by_alpha_sigma_theta_at_the_last_position_of_every_pass(family, heads):
    lm, store = heads(family)
    for ranking in iti.head_ranking(store, probe=LogisticReader(C=1.0)):
        steering = ranking.steering(K=7, alpha=6.0)
        layers = [item.site.layer for item in steering.interventions]
        assert layers == sorted(set(layers)), "one hook per block"
        assert len(layers) == len({site.layer for site in ranking.sites[:7]})
        edits = pushes(store, ranking, 7, 6.0, "last")
        same_run(lm, steered(lm, steering, ASKED, 4), ASKED, lambda i, edits=edits: edits, 4)
        assert not near(steered(lm, steering, ASKED, 1)[0][1], steered(lm, rp.Steering(), ASKED, 1)[0][1], 1e-2)


def test_in_multiple_choice_it_acts_from_the_first_token_of_the_answer_on(heads):
    lm, store = heads("qwen3")
    ranking = iti.head_ranking(store, probe=LogisticReader(C=1.0))[0]
    answers = [" a dog is an animal", " cold"]
    with rp.steer(lm, ranking.steering(K=5, alpha=9.0, tokens="generated")):
        found = lm.logprobs(ASKED, [answers] * 2)
    edits = pushes(store, ranking, 5, 9.0, "generated")
    for i, asked in enumerate(ASKED):
        for j, answer in enumerate(answers):
            n, ids = len(ids_of(lm, asked)), ids_of(lm, asked + answer)
            logp = logits(lm, Sequence(0, ids, n, {}), *edits).double().log_softmax(-1)
            assert found[i][j] == pytest.approx(sum(float(logp[t - 1, ids[t]]) for t in range(n, len(ids))), abs=1e-3)


def test_fit_takes_all_questions_and_what_it_makes_saves_composes_and_knows_its_model(heads, tiny_lm, tmp_path):
    lm, store = heads("gemma3_text")
    made = iti.fit(store, K=6, alpha=4.0, probe=LogisticReader(C=1.0))
    (ranking,) = iti.head_ranking(store, probe=LogisticReader(C=1.0), folds=1)
    assert not len(ranking.test)
    assert len(ranking.train) + len(ranking.validation) == len(store.index)
    same_run(lm, steered(lm, made, ASKED, 3), ASKED, lambda i: pushes(store, ranking, 6, 4.0, "last"), 3)
    back = rp.Steering.load(made.save(tmp_path / "iti.safetensors"))
    assert (back.identity, back.provenance["method"], len(back.provenance["heads"])) == (lm.identity, "iti", 6)
    for other in (back, 0.5 * back + 0.5 * back):
        assert torch.allclose(steered(lm, other, ASKED, 3)[1][1], steered(lm, made, ASKED, 3)[1][1], atol=1e-4)
    with pytest.raises(IdentityMismatch), rp.steer(tiny_lm("gpt2"), made):
        pass


def test_the_leak_of_the_published_code_changes_the_length_of_the_pushes_alone():
    store = answers()
    for site in store.sites:
        store.arrays[site][iti.head_ranking(store)[0].test] *= 3
    sound, leaky = (iti.head_ranking(store, compat=c)[0].steering(K=4, alpha=2.0) for c in (None, "honest_llama"))
    assert [i.site for i in sound.interventions] == [i.site for i in leaky.interventions]
    for a, b in zip(sound.interventions, leaky.interventions, strict=True):
        assert np.linalg.norm(b.step) > 1.5 * np.linalg.norm(a.step)


def test_k_and_alpha_must_be_numbers_that_there_are():
    for bad, why in (({"K": 0, "alpha": 1.0}, "from 1 to 10"), ({"K": 2, "alpha": np.nan}, "no number")):
        with pytest.raises(UsageError, match=why):
            iti.fit(answers(), **bad)
