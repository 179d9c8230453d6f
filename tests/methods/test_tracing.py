"""Causal tracing is the naive loop of whole forward passes, on every decoder family, and says what it refuses."""

import dataclasses

import numpy as np
import polars as pl
import pytest
import tiny
import torch
from methods.tracing_naive import naive, noise_of, rows_of
from tiny import tiny_net, tiny_tokenizer

import reprobe as rp
from reprobe.errors import ArtifactExists, CorruptArtifact, DataError, UnknownSite, UnsupportedOperation, UsageError
from reprobe.methods import tracing
from reprobe.methods.tracing import KINDS, ROLES, Settings, Trace, TraceGrid
from reprobe.prompts import facts_of

FACT = rp.Fact.of(subject="the cat", prompt="it is {} on the", true="mat")
#: Two draws, and a window that is cut off at both ends of three blocks.
QUICK = Settings(samples=2, window=3)


KNOWN = rp.Fact.of(subject="the cat", prompt="it is {} on", true="the the")


@pytest.fixture(scope="module")
def knowing():
    """A tiny model that knows one fact, with a probability near 1: all its logits are 0 but that of " the", which is
    10 where a token of the object is asked for."""
    net = tiny_net("llama")
    lm = rp.LanguageModel(net, tiny_tokenizer(), name="tiny-knowing")
    ids, n, _ = rows_of(lm, KNOWN)
    assert len(ids) - n == 2
    with torch.no_grad():
        end = net.model(input_ids=torch.from_numpy(ids[:-1])[None]).last_hidden_state[0, n - 1 :]
        net.lm_head.weight.zero_()
        net.lm_head.weight[ids[n]] = torch.linalg.lstsq(end, torch.full((2, 1), 10.0), driver="gelsd").solution[:, 0]
    return lm


def close(found, want):
    """Probabilities of a random network's odd answers are tiny: they are compared to their own size."""
    np.testing.assert_allclose(found, want, rtol=2e-4, atol=0)


@pytest.mark.parametrize("family", tiny.DECODERS)
def test_a_trace_is_that_of_a_whole_forward_pass_per_kind_token_and_block(tiny_lm, family):
    lm = tiny_lm(family)
    grid = tracing.trace(lm, FACT, settings=QUICK, unknown="keep")
    (found,) = grid.traces
    clean, corrupted, restored = naive(lm, FACT, QUICK, grid.std)
    close(found.clean, clean)
    close(found.corrupted, corrupted)
    close(found.restored, restored)
    first = found.subject[0]
    assert (found.effects[:, :, :first] == 0).all(), "nothing before the subject was corrupted"
    assert (np.abs(found.effects[:, :, first:]).max((1, 2)) > 1e-3 * found.corrupted).all(), "restoring does something"


@pytest.mark.parametrize("window", [1, 2, 4, 9])
@pytest.mark.parametrize(
    "fact",
    [
        rp.Fact.of(subject="the cat", prompt="{} is", true="an other theory"),  # begins the text, one token after it
        rp.Fact.of(subject="Rome", prompt="and on the end of {}", true="is"),  # ends the prompt
        rp.Fact.of(subject="a", prompt="it is {} and the rest of the", true="q"),
    ],
    ids=["first", "last", "short"],
)
def test_windows_subjects_and_objects_of_any_length_are_those_of_the_naive_loop(tiny_lm, fact, window):
    lm = tiny_lm("gemma3_text", bos=False)
    settings = Settings(samples=2, window=window, seed=4)
    grid = tracing.trace(lm, fact, settings=settings, unknown="keep")
    clean, corrupted, restored = naive(lm, fact, settings, grid.std)
    close(grid.traces[0].restored, restored)
    close([grid.traces[0].clean, grid.traces[0].corrupted], [clean, corrupted])


def test_how_runs_are_grouped_changes_nothing(tiny_lm, monkeypatch):
    lm = tiny_lm("llama")
    whole = tracing.trace(lm, FACT, settings=QUICK, unknown="keep").traces[0].restored
    for budget in (1, 40):
        monkeypatch.setitem(tracing.BUDGET, "cpu", budget)
        close(tracing.trace(lm, FACT, settings=QUICK, unknown="keep").traces[0].restored, whole)


def test_some_layers_and_kinds_are_the_same_numbers(tiny_lm):
    lm = tiny_lm("gpt2")
    whole = tracing.trace(lm, FACT, settings=QUICK, unknown="keep").traces[0].restored
    some = dataclasses.replace(QUICK, kinds=("mlp.out", "resid.post"), layers=(2, 0))
    found = tracing.trace(lm, FACT, settings=some, unknown="keep").traces[0].restored
    close(found, whole[[2, 0]][:, [2, 0]])


def test_the_clean_state_of_the_last_token_at_the_last_block_is_the_whole_effect(tiny_lm):
    fact = rp.Fact.of(subject="the cat", prompt="it is {} on", true="the")  # one token: asked for at one place
    (found,) = tracing.trace(tiny_lm("llama"), fact, settings=QUICK, unknown="keep").traces
    assert found.effects[0, -1, -1] == pytest.approx(found.total_effect, rel=1e-4)


def test_the_noise_is_of_the_published_size_on_the_subject_alone_and_every_facts_own(tiny_lm):
    lm = tiny_lm("gemma")  # its embeddings are scaled
    ids, _, subject = rows_of(lm, FACT)
    table = lm.net.get_input_embeddings().weight[torch.from_numpy(ids[subject])] * lm.d_model**0.5
    sigma = float(table.detach().double().std(correction=0))
    assert tracing.subject_sigma(lm, [FACT]) == pytest.approx(sigma, rel=1e-5)
    settings = Settings(samples=200)
    assert tracing.trace(lm, FACT, settings=QUICK, unknown="keep").std == pytest.approx(3 * sigma, rel=1e-5)
    noise = noise_of(lm, ids, subject, FACT, settings, 3 * sigma)
    others = [t for t in range(noise.shape[1]) if t not in subject]
    assert (noise[:, others] == 0).all()
    assert float(noise[:, subject].std()) == pytest.approx(3 * sigma, rel=0.02)
    other = noise_of(lm, ids, subject, dataclasses.replace(FACT, prompt=FACT.prompt + " end"), settings, 3 * sigma)
    assert abs(np.corrcoef(noise[:, subject].flatten(), other[:, subject].flatten())[0, 1]) < 0.05


def test_bloom_has_its_sigma_after_the_norm_of_its_embeddings(tiny_lm):
    lm = tiny_lm("bloom")
    ids, _, subject = rows_of(lm, FACT)
    trunk = lm.net.base_model
    table = trunk.word_embeddings_layernorm(trunk.word_embeddings(torch.from_numpy(ids[subject]))).detach()
    assert tracing.subject_sigma(lm, [FACT]) == pytest.approx(float(table.double().std(correction=0)), rel=1e-5)


def test_a_trace_depends_on_its_fact_and_the_seed_alone(tiny_lm):
    lm = tiny_lm("llama")
    other = rp.Fact.of(subject="a dog", prompt="the end of {} is", true="in")
    both = tracing.trace(lm, [FACT, other], settings=QUICK, sigma=1.0, unknown="keep")
    alone = tracing.trace(lm, other, settings=QUICK, sigma=1.0, unknown="keep")
    np.testing.assert_array_equal(both.traces[1].restored, alone.traces[0].restored)
    reseeded = tracing.trace(lm, other, settings=dataclasses.replace(QUICK, seed=1), sigma=1.0, unknown="keep")
    assert not np.allclose(reseeded.traces[0].restored, alone.traces[0].restored, rtol=1e-2)


def test_tracing_leaves_no_hook_behind(tiny_lm):
    lm = tiny_lm("llama")

    def hooks() -> list[int]:  # transformers leaves some of its own
        return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in lm.net.modules()]

    before, registered = lm.logits("the cat"), hooks()
    tracing.trace(lm, FACT, settings=QUICK, unknown="keep")
    assert torch.equal(lm.logits("the cat"), before)
    assert hooks() == registered


# -- what is known -----------------------------------------------------------------------------------------------


def test_a_model_is_asked_greedily_for_the_whole_object(knowing):
    half = dataclasses.replace(KNOWN, true="the mat")
    right, wrong = tracing.ask(knowing, [KNOWN, half])
    assert right.known
    assert not wrong.known
    assert right.said == "the the" == knowing.generate(KNOWN.prompt, max_new_tokens=2)[0].strip()
    logp = knowing.logprobs(KNOWN.prompt, [" the the"])[0][0]
    assert right.probability == pytest.approx(float(np.exp(logp)), rel=1e-5)
    assert tracing.known(knowing, [half, KNOWN, half, KNOWN], limit=1) == [KNOWN]
    assert tracing.known(knowing, [half]) == []


def test_a_known_fact_is_lost_by_corruption_and_found_again_by_restoring(knowing):
    (found,) = tracing.trace(knowing, KNOWN, settings=dataclasses.replace(QUICK, noise=30.0)).traces
    assert found.clean == pytest.approx((np.exp(10) / (np.exp(10) + tiny.VOCAB - 1)) ** 2, rel=1e-3)
    assert found.corrupted < 0.5
    assert found.effects.max() > 0.5 * found.total_effect


def test_unknown_facts_are_refused_by_name_unless_they_are_to_be_kept(knowing):
    with pytest.raises(
        UsageError, match=r"does not know 1 of 2 facts.*\n.*it is the cat on the'.*'mat' has prob.*says"
    ):
        tracing.trace(knowing, [KNOWN, FACT], settings=QUICK)
    with pytest.raises(UsageError, match="and 2 more"):
        tracing.trace(knowing, [FACT] * 7, settings=QUICK)
    assert len(tracing.trace(knowing, [KNOWN, FACT], settings=QUICK, unknown="keep").traces) == 2


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"window": 0}, UsageError, "window=0: 1 or more"),
        ({"samples": 0}, UsageError, "samples=0"),
        ({"noise": 0.0}, UsageError, "noise=0.0"),
        ({"kinds": ("attn.heads",)}, UsageError, "attn.heads.*resid.post, attn.out, mlp.out"),
        ({"kinds": ()}, UsageError, "kinds=.*one or more"),
        ({"layers": (1, 1)}, UsageError, "each once"),
        ({"layers": (3,)}, UnknownSite, "blocks 0–2"),
        ({"layers": (-1,)}, UsageError, "count from 0 to 2"),
    ],
)
def test_settings_that_cannot_be_are_refused(tiny_lm, settings, error, says):
    with pytest.raises(error, match=says):
        tracing.trace(tiny_lm("llama"), FACT, settings=Settings(**settings), unknown="keep")


def test_what_cannot_be_traced_is_refused(tiny_lm):
    lm = tiny_lm("llama")
    with pytest.raises(DataError, match="no true object"):
        tracing.trace(lm, rp.Fact.of(subject="cat", prompt="the {} is", new="mat"))
    with pytest.raises(UsageError, match="no facts were"):
        tracing.trace(lm, [])
    with pytest.raises(UsageError, match="'refuse'"):
        tracing.trace(lm, FACT, unknown="drop")
    with pytest.raises(UsageError, match="sigma is a number"):
        tracing.trace(lm, FACT, sigma=0.0, unknown="keep")
    with pytest.raises(UnsupportedOperation, match="encoder"):
        tracing.trace(tiny_lm("bert"), FACT)
    with rp.steer(lm, rp.Scale("resid.post@1", 0.5)), pytest.raises(UsageError, match="steered"):
        tracing.trace(lm, FACT, unknown="keep")


# -- results -----------------------------------------------------------------------------------------------------


def grid_of(lengths=((1, 1, 3), (2, 3, 2), (0, 2, 1), (1, 2, 0)), layers=(0, 2), kinds=KINDS, seed=0, group=str):
    """Traces with random numbers; `lengths` are tokens before the subject, of it, and after it."""
    rng = np.random.default_rng(seed)
    traces = []
    for i, (before, of, after) in enumerate(lengths):
        n = before + of + after
        fact = dataclasses.replace(FACT, id=f"f{i}", group=group(i))
        restored = rng.uniform(size=(len(kinds), len(layers), n))
        traces.append(Trace(fact, tuple("abcdefghij"[:n]), (before, before + of), 0.8, 0.1 + 0.1 * i, restored))
    return TraceGrid(tuple(traces), Settings(kinds=kinds, layers=layers), layers, 0.3, {"identity": {"name": "tiny"}})


def test_roles_are_told_by_the_subject():
    grid = grid_of()
    assert [t.roles for t in grid.traces] == [
        (None, "last subject", "first later", "middle later", "last later"),
        (None, None, "first subject", "middle subject", "last subject", "first later", "last later"),
        ("first subject", "last subject", "last later"),
        (None, "first subject", "last subject"),
    ]


def test_the_table_has_every_state_and_averages_are_means_over_facts_of_means_over_their_tokens():
    grid = grid_of()
    assert grid.table.height == sum(t.restored.size for t in grid.traces)
    line = grid.table.filter(fact=1, kind="mlp.out", layer=2, token=3).row(0, named=True)
    trace = grid.traces[1]
    assert (line["text"], line["role"]) == ("d", "middle subject")
    assert line["restored"] == trace.restored[2, 1, 3]
    assert line["effect"] == pytest.approx(trace.restored[2, 1, 3] - trace.corrupted)
    own = grid.table.drop_nulls("role").group_by("kind", "role", "layer", "fact").agg(pl.col("effect").mean())
    want = own.group_by("kind", "role", "layer").agg(n=pl.len(), effect=pl.col("effect").mean())
    both = grid.averages.join(want, on=["kind", "role", "layer"], suffix="_want")
    assert both.height == grid.averages.height == len(KINDS) * len(ROLES) * 2
    assert (both["n"] == both["n_want"]).all()
    np.testing.assert_allclose(both["effect"], both["effect_want"])
    several = grid.averages.filter(pl.col("n") > 1)
    assert (several["effect_low"] <= several["effect"]).all()
    assert (several["effect"] <= several["effect_high"]).all()
    assert grid.averages.filter(pl.col("n") == 1)["effect_low"].null_count() > 0
    np.testing.assert_allclose(grid.totals["mean"], [0.8, 0.25, 0.55])


def test_intervals_are_over_groups_and_cover():
    """Effects around 0.3 with a common part per group: the interval of 40 groups of five holds 0.3 nineteen times in
    twenty, and is wider than if all facts were independent."""
    held, wider = 0, 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        common = rng.normal(size=40).repeat(5)
        values = 0.3 + common + 0.1 * rng.normal(size=200)
        groups = [str(i) for i in np.arange(40).repeat(5)]
        _, low, high = tracing._Interval(groups).of(values)
        _, narrow_low, narrow_high = tracing._Interval([str(i) for i in range(200)]).of(values)
        held += low <= 0.3 <= high
        wider += high - low > narrow_high - narrow_low
    assert held >= 53
    assert wider == 60


def test_the_peak_is_the_greatest_line_of_a_role():
    grid = grid_of()
    lines = grid.averages.filter(kind="mlp.out", role="last subject")
    assert grid.peak("mlp.out", "last subject")["effect"] == lines["effect"].max()
    with pytest.raises(UsageError, match=r"no mlp\.out"):
        grid_of(kinds=("resid.post",)).peak("mlp.out", "last subject")


def test_a_saved_trace_is_the_same_again_and_what_is_damaged_is_refused(tmp_path):
    grid = grid_of()
    path = grid.save(tmp_path / "a.safetensors")
    again = TraceGrid.load(path)
    assert again.table.equals(grid.table)
    assert again.facts.equals(grid.facts)
    assert (again.settings, again.layers, again.std, again.provenance) == (
        grid.settings, grid.layers, grid.std, grid.provenance
    )  # fmt: skip
    assert [t.fact for t in again.traces] == [t.fact for t in grid.traces]
    with pytest.raises(ArtifactExists):
        grid.save(path)
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptArtifact):
        TraceGrid.load(path)


def test_the_plot_shows_every_kind():
    figure = grid_of().plot()
    assert [axes.get_title() for axes in figure.axes[:3]] == [f"{kind} restored" for kind in KINDS]


# -- real --------------------------------------------------------------------------------------------------------


@pytest.mark.models
def test_a_real_fact_is_known(real_lm):
    lm = real_lm("smollm2-135m")
    answers = tracing.ask(lm, facts_of("facts", limit=4))
    assert answers[0].known
    assert answers[0].said == "Paris"


@pytest.mark.models
def test_a_real_fact_is_traced_as_the_naive_loop_does(real_lm):
    """One block of each kind at every token, against whole forward passes; the slow test below has all blocks."""
    lm = real_lm("smollm2-135m")
    fact, settings = facts_of("facts", limit=1)[0], Settings(samples=2, layers=(12,))
    grid = tracing.trace(lm, fact, settings=settings)
    clean, corrupted, restored = naive(lm, fact, settings, grid.std, whole_logits=False)
    assert grid.traces[0].clean == pytest.approx(clean, abs=1e-5)
    assert grid.traces[0].corrupted == pytest.approx(corrupted, abs=1e-5)
    np.testing.assert_allclose(grid.traces[0].restored, restored, atol=1e-5)
    assert np.abs(grid.traces[0].effects).max() > 0.1


@pytest.mark.slow
@pytest.mark.models
def test_a_whole_real_trace_is_that_of_the_naive_loop(real_lm):
    lm = real_lm("smollm2-135m")
    fact = facts_of("facts", limit=1)[0]
    grid = tracing.trace(lm, fact)
    _, _, restored = naive(lm, fact, grid.settings, grid.std, whole_logits=False)
    np.testing.assert_allclose(grid.traces[0].restored, restored, atol=1e-5)
