"""The demo's claims, on the real model: truth is found, chance is chance, and mood is moved."""

import shlex
from itertools import pairwise

import numpy as np
import polars as pl
import pytest

import reprobe as rp
from reprobe.cli import app, demo

pytestmark = pytest.mark.models


@pytest.fixture(scope="module")
def truth(real_lm, tmp_path_factory):
    return rp.extract(
        real_lm("smollm2-135m"), "cities", sites="resid.post@10:16:2", to=tmp_path_factory.mktemp("demo") / "c.reprobe"
    )


class Shuffled:
    """A store whose labels are drawn anew, pair by pair, so that they tell nothing."""

    def __init__(self, store, seed):
        rng = np.random.default_rng(seed)
        pairs = store.index["pair"].unique(maintain_order=True)
        turned = dict(zip(pairs, rng.integers(0, 2, len(pairs)), strict=True))
        flip = store.index["pair"].replace_strict(turned)
        label = pl.Series("label", np.where(flip == 1, 1 - store.index["label"], store.index["label"]))
        self.index = store.index.with_columns(label)
        self.sites, self.parts, self.manifest = store.sites, store.parts, store.manifest
        self.width, self.read = store.width, store.read


def test_a_logistic_reader_tells_true_from_false_statements_it_has_not_seen(truth):
    grid = rp.probe(truth, rp.LogisticReader())
    assert grid.table["accuracy"].max() >= 0.85
    assert grid.selected.accuracy >= 0.85
    assert grid.selected.n_groups == 421


def test_on_shuffled_labels_the_interval_covers_one_half(truth):
    chosen = [rp.probe(Shuffled(truth, seed), rp.LogisticReader()).selected for seed in range(3)]
    assert sum(s.accuracy_low <= 0.5 <= s.accuracy_high for s in chosen) >= 2
    assert max(s.accuracy for s in chosen) < 0.6


def test_steering_along_happiness_moves_the_mood_at_every_strength(real_lm, tmp_path):
    lm = real_lm("smollm2-135m")
    data = rp.PromptSet.load("emotions").head(160)
    store = rp.extract(lm, data, sites="resid.post@18", to=tmp_path / "e.reprobe")
    mood = rp.probe(store, rp.MeanDifference(), positive="happiness").best()
    odds = []
    for strength in (-4, -2, 0, 2, 4):
        with rp.steer(lm, rp.Add(mood, strength)):
            odds.append(rp.log_odds(lm, demo.MOOD).mean())
    assert np.all(np.diff(odds) > 0.2)


def test_the_commands_that_the_page_shows_are_verbs_and_read_only_what_one_before_them_wrote():
    there = {"smollm2-135m", *demo.DATA_SETS}
    for line in demo._commands("smollm2-135m"):
        name, verb, first, *rest = shlex.split(line)
        given = dict(pairwise(rest))
        assert name == "reprobe"
        assert verb in {function.__name__ for function in app.VERBS} | {"steer"}
        reads = {first, *([rest[0]] if verb == "extract" else [])}
        assert reads | {given[option] for option in ("--grid", "--direction") if option in given} <= there
        there |= {given[option] for option in ("--to", "--to-direction") if option in given}


def test_a_folder_that_holds_anything_is_not_overwritten_by_the_demo(tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(rp.ReprobeError, match="--out"):
        demo.run_demo(tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "precious"
