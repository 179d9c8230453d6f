"""The search for a strength: on curves whose answer is known, and on a model."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import reprobe as rp
from reprobe.errors import TargetUnreachable, UsageError
from reprobe.evaluation.strength import MAX_EVALUATIONS, search

#: Shapes of a KL that rises with u from 0: u to a power, and three that level off at 1, as KLs do.
SHAPES = {
    "power": lambda u, p: u**p,
    "rational": lambda u, p: u * u / (1 + u * u),
    "tanh": lambda u, p: math.tanh(u) ** 2,
    "exponential": lambda u, p: -math.expm1(-u * u),
    "logarithm": lambda u, p: math.log1p(u * u),
}


class Curve:
    """A price that counts how often it is asked."""

    def __init__(self, function):
        self.function, self.asked = function, []

    def __call__(self, strength):
        self.asked.append(strength)
        return self.function(strength)


@settings(max_examples=400, deadline=None)
@given(
    shape=st.sampled_from(sorted(SHAPES)),
    power=st.floats(1.0, 4.0),
    height=st.floats(0.3, 15.0),
    unit=st.floats(-1.3, 3.0),
    share=st.floats(0.002, 0.8),
    negative=st.booleans(),
)
def test_curves_that_rise_are_met_within_tolerance_in_at_most_eight_evaluations(
    shape, power, height, unit, share, negative
):
    """The unit of strength lies anywhere from 20 times below the start to 1000 times above it."""
    curve = Curve(lambda s: height * SHAPES[shape](abs(s) / 10**unit, power))
    found = search(curve, share * height, start=-1.0 if negative else 1.0)
    assert abs(curve(found) - share * height) <= 0.05 * share * height
    assert len(curve.asked) - 1 <= MAX_EVALUATIONS
    assert all((s < 0) == negative for s in curve.asked)


def test_a_square_law_is_met_at_the_second_or_third_evaluation_however_far_the_start():
    for unit in (1e-3, 0.1, 1.0, 30.0, 500.0):
        curve = Curve(lambda s, unit=unit: (s / unit) ** 2)
        search(curve, 0.1)
        assert len(curve.asked) <= 4


def test_a_tighter_tolerance_is_kept():
    found = search(lambda s: 5 * math.tanh(s) ** 2, 1.0, tolerance=1e-3)
    assert found == pytest.approx(math.atanh(math.sqrt(0.2)), rel=1e-3)


@pytest.mark.parametrize(
    ("price", "said"),
    [
        (lambda s: 0.0, "change nothing"),
        (lambda s: 0.01 * math.tanh(s), "highest was 0.01"),
        (lambda s: 0.7, r"lowest was 0\.7; .* not depend on the strength"),
        (lambda s: 0.0 if s < 1.5 else 9.0, "may not rise"),
    ],
)
def test_a_target_out_of_reach_is_an_error_that_says_what_was_tried(price, said):
    curve = Curve(price)
    with pytest.raises(TargetUnreachable, match=f"(?s){said}.*Tried"):
        search(curve, 0.1)
    assert len(curve.asked) == MAX_EVALUATIONS


def test_activations_that_overflow_count_as_too_strong():
    curve = Curve(lambda s: 0.01 * s * s if s < 50 else math.nan)
    assert 0.01 * search(curve, 1.0, start=200.0) ** 2 == pytest.approx(1.0, rel=0.05)


@pytest.mark.parametrize(("target", "start"), [(0.0, 1.0), (-1.0, 1.0), (math.nan, 1.0), (0.1, 0.0), (0.1, math.inf)])
def test_targets_and_starts_that_cannot_be_are_refused(target, start):
    with pytest.raises(UsageError):
        search(lambda s: s * s, target, start=start)


@pytest.mark.parametrize("how", [{"tolerance": 0.0}, {"tolerance": math.nan}, {"max_evaluations": 0}])
def test_a_search_that_cannot_end_or_begin_is_refused(how):
    with pytest.raises(UsageError, match="a share above 0, and 1 or more"):
        search(lambda s: s * s, 0.1, **how)


TEXTS = ("the cat is on the mat", rp.Passage("an inn", " on the other end of the land"))


@pytest.mark.parametrize("tokens", ["all", "generated"])
def test_the_strength_found_costs_what_it_says(tiny_lm, tokens):
    lm = tiny_lm("llama")
    d = rp.Direction.from_vector("resid.post@1", np.random.default_rng(0).normal(size=lm.d_model), scale=0.01)
    found = rp.tune(lm, lambda s: rp.Add(d, s, tokens=tokens), 0.02, texts=TEXTS)
    assert found.kl == pytest.approx(0.02, rel=0.05)
    assert rp.divergence(lm, TEXTS, rp.Add(d, found.strength, tokens=tokens)) == pytest.approx(found.kl, rel=1e-6)
    assert found.tried["strength"][-1] == found.strength
    assert found.tried.height <= MAX_EVALUATIONS
    assert found.kl_low <= found.kl <= found.kl_high
    away = rp.tune(lm, lambda s: [rp.Add(d, s, tokens=tokens)], 0.02, texts=TEXTS, start=-1.0)
    assert away.strength < 0
    assert away.kl == pytest.approx(0.02, rel=0.05)


def test_an_intervention_without_a_strength_of_its_own_is_no_endless_search(tiny_lm):
    lm = tiny_lm("llama")
    d = rp.Direction.from_vector("resid.post@1", np.random.default_rng(0).normal(size=lm.d_model))
    with pytest.raises(TargetUnreachable, match="may not depend on the strength"):
        rp.tune(lm, lambda s: rp.Ablate(d), 1e-7, texts=TEXTS)
    with pytest.raises(TargetUnreachable, match="change nothing"):
        rp.tune(lm, lambda s: rp.Add(d, s, tokens="generated"), 0.1, texts=["the cat is on the mat"])


@pytest.mark.models
def test_a_direction_of_smollm_is_tuned_on_neutral_text(real_lm):
    lm = real_lm("smollm2-135m")
    v = lm.logits("The sun came out. She was very happy", at="last")[0]
    v = lm.net.get_input_embeddings().weight[int(v.argmax())].detach().numpy()
    d = rp.Direction.from_vector("resid.post@12", v)
    found = rp.tune(lm, lambda s: rp.Add(d, s), 0.1, texts=rp.evaluation.NEUTRAL[:4])
    assert found.kl == pytest.approx(0.1, rel=0.05)
    assert found.tried.height <= MAX_EVALUATIONS
