"""A replay passes on what a model gives, and on nothing else, and says what the rest is."""

import copy
import itertools
import json

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from planting import TEXTS, plant, planted, prompts, site, values_of
from tiny import tiny_model, tiny_tokenizer

import reprobe as rp
from reprobe.errors import IdentityMismatch, IncompleteStore, UnknownSite, UsageError
from reprobe.extraction.difference import component_differences, row_differences, tolerance_of
from reprobe.model.language_model import LanguageModel
from reprobe.store import StoreWriter

POSITIONS = ("last", "all", "mean", "index:1", "span:who:last", "span:who:all")
CASES = [(family, at) for family in ("llama", "gemma3_text", "bert", "gpt2") for at in POSITIONS]
CASES += [(family, "all") for family in ("granite", "falcon.alibi", "cohere", "roberta")]


def only(result):
    """The one site that failed."""
    (failed,) = result.failed
    return failed


# -- what is true passes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "at"), CASES)
def test_a_store_passes_on_the_model_that_it_is_of(tiny_lm, tmp_path, family, at):
    lm = tiny_lm(family)
    sites = "embed,resid.pre@*,attn.heads@*,attn.out@*,mlp.neurons@*,mlp.out@*,resid.post@*,final"
    store = rp.extract(lm, prompts(), sites=sites, at=at, to=tmp_path / "s")
    result = rp.replay(store, lm)
    assert result.ok
    assert result.prompts == result.of_prompts == len(TEXTS)
    assert [s.site for s in result.sites] == list(store.sites)
    assert all(s.rows == store.rows for s in result.sites)
    assert result.worst.worst < 0.3 * result.tolerance


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "bert"])
def test_a_store_in_half_precision_passes_on_the_model_in_half_precision(tmp_path, family, dtype):
    lm = tiny_model(family, dtype=dtype)
    result = rp.replay(rp.extract(lm, prompts(), at="all", to=tmp_path / "s"), lm)
    assert result.ok
    assert result.tolerance == tolerance_of(str(dtype)[6:], stored=str(dtype)[6:])


def test_a_half_store_of_a_float32_model_passes_with_what_storing_rounds_away(tiny_lm, tmp_path):
    lm = tiny_lm("llama")
    result = rp.replay(rp.extract(lm, prompts(), dtype="bfloat16", to=tmp_path / "s"), lm)
    assert result.ok
    assert tolerance_of("float32", stored="float32") < result.worst.worst < result.tolerance < 3e-3


def test_the_sample_is_drawn_by_its_seed_and_all_of_its_rows_are_compared(tiny_lm, tmp_path):
    lm = tiny_lm("llama")
    store = rp.extract(lm, prompts(), sites="resid.post@1", at="all", to=tmp_path / "s")
    results = [rp.replay(store, lm, sample=3, seed=seed) for seed in (0, 0, 1, 2, 3)]
    assert results[0] == results[1]
    assert all(r.prompts == 3 and r.of_prompts == len(TEXTS) for r in results)
    assert len({r.sites[0].rows for r in results}) > 1
    assert rp.replay(store, lm, sample=None).sites[0].rows == store.rows


def test_an_unfinished_store_is_replayed_where_it_is_written(tiny_lm, tmp_path):
    lm = tiny_lm("llama")
    true = rp.extract(lm, prompts(), at="all", sites="resid.post@1", to=tmp_path / "true")
    values = values_of(true)
    with StoreWriter.create(
        tmp_path / "part", identity=lm.identity, prompts="d", plan=true.manifest.plan, sites=true.manifest.sites,
        dtype="float32", index=true.index, tokens=true.tokens, shard_rows=4,
    ) as writer:  # fmt: skip
        with pytest.raises(IncompleteStore):
            rp.replay(rp.ActivationStore.open(tmp_path / "part"), lm)
        for shard in writer.missing()[:-1]:
            writer.write_shard(shard.number, {s: v[shard.start : shard.stop] for s, v in values.items()})
    result = rp.replay(rp.ActivationStore.open(tmp_path / "part"), lm, sample=None)
    assert result.ok
    assert 0 < result.prompts < len(TEXTS)


def test_the_model_is_as_it_was_after_a_replay(tiny_lm, tmp_path):
    lm = tiny_lm("llama")
    store = planted(tmp_path, lm, lambda v: {s: x.roll(1, 0) for s, x in v.items()}, sites="resid.post@*")

    def state():
        return lm.identity, [(list(m._forward_hooks), list(m._forward_pre_hooks)) for m in lm.net.modules()]

    before = state()
    assert not rp.replay(store, lm).ok
    assert state() == before


# -- another model ---------------------------------------------------------------------------------------------


def test_another_revision_is_another_identity_and_with_a_mismatch_allowed_the_numbers_tell(tiny_lm, tmp_path):
    lm = tiny_lm("llama")
    store = rp.extract(lm, prompts(), sites="resid.post@*", at="all", to=tmp_path / "s")
    net = copy.deepcopy(lm.net)
    with torch.no_grad():
        net.model.layers[1].mlp.down_proj.weight[3] *= 1.01
    other = LanguageModel(net, lm.tokenizer, name="revised")
    refused = rp.replay(store, other)
    assert not refused.ok
    assert refused.sites == ()
    assert [p.split(" is ")[0] for p in refused.problems] == ["identity: weights"]
    told = rp.replay(store, other, allow_mismatch=True)
    assert set(told.identity) == {"weights"}
    assert [s.site for s in told.failed] == [site("resid.post@1"), site("resid.post@2")]
    assert "other weights" in told.failed[1].diagnosis


def test_another_chat_template_is_another_identity_though_its_numbers_are_the_same(tiny_lm, tmp_path):
    lm = tiny_lm("llama")
    store = rp.extract(lm, prompts(), sites="resid.post@1", to=tmp_path / "s")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template += "{# revised #}"
    other = LanguageModel(lm.net, tokenizer, name="templated")
    assert "template" in rp.replay(store, other).problems[0]
    assert rp.replay(store, other, allow_mismatch=True).ok


def test_another_precision_is_another_identity_and_its_distance_is_told(tiny_lm, tmp_path):
    lm = tiny_lm("llama")
    store = rp.extract(lm, prompts(), sites="resid.post@*", to=tmp_path / "s")
    half = LanguageModel(copy.deepcopy(lm.net).bfloat16(), lm.tokenizer, name="half")
    assert any("dtype is float32 in the store, bfloat16 here" in p for p in rp.replay(store, half).problems)
    told = rp.replay(store, half, allow_mismatch=True)
    assert told.ok
    assert told.worst.worst > 1e-3
    assert not rp.replay(store, half, allow_mismatch=True, tolerance=1e-4).ok


def test_a_model_of_another_shape_has_nothing_to_compare(tiny_lm, tmp_path):
    store = rp.extract(tiny_lm("llama"), prompts(), sites="resid.post@1", to=tmp_path / "s")
    with pytest.raises(IdentityMismatch, match="27 wide"):
        rp.replay(store, tiny_lm("gpt2"), allow_mismatch=True)


# -- another place ---------------------------------------------------------------------------------------------


def shifted(values):
    return {site("resid.post@0"): values[site("resid.post@1")], site("resid.post@1"): values[site("resid.post@2")]}


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "bert", "gpt2"])
@pytest.mark.parametrize("at", ["last", "all", "mean"])
def test_a_layer_off_by_one_is_found_and_named(tiny_lm, tmp_path, family, at):
    lm = tiny_lm(family)
    result = rp.replay(planted(tmp_path, lm, shifted, at=at, sites="resid.post@*"), lm)
    assert [(str(s.site), s.diagnosis) for s in result.failed] == [
        ("resid.post@0", "its rows are what this model has at 'resid.post@1'"),
        ("resid.post@1", "its rows are what this model has at 'resid.post@2'"),
    ]
    assert all(s.beyond == s.rows for s in result.failed)


def test_a_layer_off_by_one_is_named_in_half_precision_too(tmp_path):
    lm = tiny_model("llama", dtype=torch.bfloat16)
    result = rp.replay(planted(tmp_path, lm, shifted, sites="resid.post@*"), lm)
    assert [s.diagnosis for s in result.failed] == [
        "its rows are what this model has at 'resid.post@1'",
        "its rows are what this model has at 'resid.post@2'",
    ]


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_a_last_layer_after_the_final_norm_is_found_and_named(tiny_lm, tmp_path, family):
    lm = tiny_lm(family)
    store = planted(tmp_path, lm, lambda v: {site("resid.post@2"): v[site("final")]}, sites="resid.post@2,final")
    assert only(rp.replay(store, lm)).diagnosis == ("its rows are what this model has at 'final', after the final norm")


def test_another_part_of_the_same_width_is_found_and_named(tiny_lm, tmp_path):
    lm = tiny_lm("llama")
    store = planted(tmp_path, lm, lambda v: {site("attn.out@1"): v[site("mlp.out@1")]}, sites="attn.out@1,mlp.out@1")
    assert only(rp.replay(store, lm)).diagnosis == "its rows are what this model has at 'mlp.out@1'"


# -- another token ---------------------------------------------------------------------------------------------


def position_before(store_path, lm, at):
    """A store at `at` whose rows were read one position too early."""
    true = rp.extract(lm, prompts(), sites="resid.post@1", at="all", to=store_path / "all")
    claimed = rp.extract(lm, prompts(), sites="resid.post@1", at=at, to=store_path / "claimed")
    every = {(r["prompt"], r["position"]): r["row"] for r in true.index.iter_rows(named=True)}
    rows = [every[(r["prompt"], r["position"] - 1)] for r in claimed.index.iter_rows(named=True)]
    return plant(store_path / "planted", claimed, {s: true.read(s, rows) for s in true.sites})


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "bert"])
def test_the_token_before_is_found_and_named(tiny_lm, tmp_path, family):
    lm = tiny_lm(family)
    found = only(rp.replay(position_before(tmp_path, lm, "last"), lm))
    assert found.diagnosis == "its rows are those of the token before (position − 1)"


@pytest.mark.parametrize("mask", [False, True])
def test_a_pad_on_the_right_is_found_and_named(tiny_lm, tmp_path, mask):
    lm = tiny_lm("llama")

    def last_columns(values):
        """Index −1 of a batch that is padded on the right: a pad, but for the longest prompt."""
        coded = lm.tokenizer([TEXTS[int(p[1:])] for p in ids], return_tensors="pt", padding=True, padding_side="right")
        given = {"attention_mask": coded["attention_mask"]} if mask else {}
        with rp.observe(lm, "resid.post@1") as seen, torch.no_grad():
            lm.net(input_ids=coded["input_ids"], **given)
        return {s: seen[s][:, -1] for s in values}

    ids = rp.extract(lm, prompts(), sites="resid.post@1", to=tmp_path / "order").index["prompt"].to_list()
    found = only(rp.replay(planted(tmp_path, lm, last_columns, at="last", sites="resid.post@1"), lm))
    assert found.diagnosis.startswith("its rows are those of a padding token after the prompt")
    assert found.beyond == len(TEXTS) - 1


def test_a_pad_on_the_left_is_found_and_named(tiny_lm, tmp_path):
    lm = tiny_lm("llama")

    def first_columns(values):
        with rp.observe(lm, "resid.post@1") as seen, torch.no_grad():
            lm.net(input_ids=torch.full((1, 4), lm.pad_id))
        return {s: seen[s][:, 1].expand(len(v), -1) for s, v in values.items()}

    found = only(rp.replay(planted(tmp_path, lm, first_columns, at="index:1", sites="resid.post@1"), lm))
    assert found.diagnosis == "its rows are those of padding before the prompt"


def test_a_mean_without_the_first_token_is_found_and_named(tiny_lm, tmp_path):
    lm = tiny_lm("llama")
    every = rp.extract(lm, prompts(), sites="resid.post@1", at="all", to=tmp_path / "all")
    mean = rp.extract(lm, prompts(), sites="resid.post@1", at="mean", to=tmp_path / "mean")
    (where,) = every.sites
    rows = [every.index.filter((pl.col("prompt") == p) & (pl.col("position") > 0))["row"] for p in mean.index["prompt"]]
    values = torch.stack([every.read(where, r).mean(0) for r in rows])
    found = only(rp.replay(plant(tmp_path / "planted", mean, {where: values}), lm))
    assert found.diagnosis == "its rows are those of the mean without the first token"


def test_rows_in_another_order_than_the_index_are_found_and_named(tiny_lm, tmp_path):
    lm = tiny_lm("llama")
    store = planted(tmp_path, lm, lambda v: {s: x.roll(1, 0) for s, x in v.items()}, at="last", sites="resid.post@1")
    assert "the row before (row − 1)" in only(rp.replay(store, lm)).diagnosis


# -- other values ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_values_that_went_through_half_precision_are_found_and_named(tiny_lm, tmp_path, dtype):
    lm = tiny_lm("llama")
    half = getattr(torch, dtype)
    store = planted(tmp_path, lm, lambda v: {s: x.to(half).float() for s, x in v.items()}, sites="resid.post@1")
    found = only(rp.replay(store, lm))
    assert f"exact {dtype} numbers" in found.diagnosis
    assert found.beyond == found.rows


def test_one_changed_value_is_found_though_every_checksum_is_right(tiny_lm, tmp_path):
    lm = tiny_lm("llama")

    def damage(values):
        new = {s: x.clone() for s, x in values.items()}
        new[site("resid.post@1")][17, 5] += 0.01
        return new

    store = planted(tmp_path, lm, damage, sites="resid.post@*")
    found = only(rp.replay(store, lm))
    assert (found.site, found.beyond, found.at.row) == (site("resid.post@1"), 1, 17)
    assert "only 1 of 27 components differ in row 17: component 5" in found.diagnosis
    assert found.at.prompt == store.index["prompt"][17]
    assert found.at.position == store.index["position"][17]


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda x: 0.37 * x, "0.37 times"),
        (lambda x: x - x.mean(1, keepdim=True), "less their mean"),
        (torch.zeros_like, "all zeros"),
        (lambda x: torch.full_like(x, torch.nan), "no site of this model"),
        (lambda x: x * (1 + 0.01 * torch.linspace(-1, 1, x.shape[1])), "near to what this model has"),
    ],
)
def test_a_multiple_a_centred_row_and_an_unfilled_one_are_told_apart(tiny_lm, tmp_path, edit, says):
    lm = tiny_lm("llama")
    store = planted(tmp_path, lm, lambda v: {s: edit(x) for s, x in v.items()}, sites="resid.post@1")
    assert says in only(rp.replay(store, lm)).diagnosis


def test_one_row_of_nan_at_the_stores_edge_is_no_other_row(tiny_lm, tmp_path):
    lm = tiny_lm("llama")

    def first_row(values):
        new = {s: x.clone() for s, x in values.items()}
        new[site("resid.post@1")][0] = torch.nan
        return new

    for at in ("all", "mean"):
        found = only(rp.replay(planted(tmp_path / at, lm, first_row, at=at, sites="resid.post@1"), lm))
        assert (found.at.row, found.not_finite, found.worst) == (0, 1, np.inf)
        assert "no site of this model" in found.diagnosis


def test_not_a_number_counts_as_the_same_only_where_the_model_gives_it_too(tiny_lm, tmp_path):
    lm = tiny_lm("llama")
    net = copy.deepcopy(lm.net)
    with torch.no_grad():
        net.model.layers[1].mlp.down_proj.bias[3] = torch.nan
    broken = LanguageModel(net, lm.tokenizer, name="broken")
    store = rp.extract(broken, prompts(), sites="resid.post@*", to=tmp_path / "s")
    result = rp.replay(store, broken)
    assert result.ok
    assert [s.not_finite for s in result.sites] == [0, store.rows, store.rows]
    told = rp.replay(store, lm, allow_mismatch=True)
    assert [s.beyond for s in told.sites] == [0, store.rows, store.rows]
    json.loads(json.dumps(told.to_json(), allow_nan=False))


# -- index and tokens ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("column", "change", "says"),
    [
        ("token", lambda c: c + 1, "another token in the index"),
        ("position", lambda c: c + 60, "beyond their prompt"),
        ("n_tokens", lambda c: c + 1, "another n_tokens"),
    ],
)
def test_an_index_that_contradicts_the_tokens_is_a_problem(tiny_lm, tmp_path, column, change, says):
    lm = tiny_lm("llama")
    true = rp.extract(lm, prompts(), sites="resid.post@1", to=tmp_path / "s")
    index = true.index.with_columns(
        pl.when(pl.col("row") == 2).then(change(pl.col(column))).otherwise(pl.col(column)).alias(column)
    )
    result = rp.replay(plant(tmp_path / "planted", true, values_of(true), index=index), lm)
    assert not result.ok
    (problem,) = result.problems
    assert says in problem
    assert f"1 of {len(TEXTS)} rows" in problem
    assert "row 2" in problem


def test_a_token_outside_the_vocabulary_is_a_problem(tiny_lm, tmp_path):
    lm = tiny_lm("llama")
    true = rp.extract(lm, prompts(), sites="resid.post@1", at="index:0", to=tmp_path / "s")
    beyond = true.tokens.with_columns(
        pl.concat_list(pl.col("tokens").list.head(1), pl.lit(999, pl.Int32), pl.col("tokens").list.slice(2))
    )
    result = rp.replay(plant(tmp_path / "planted", true, values_of(true), tokens=beyond), lm)
    assert any("not in the vocabulary" in p and "999" in p for p in result.problems)


def test_means_over_spans_are_refused_since_their_tokens_are_not_recorded(tiny_lm, tmp_path):
    lm = tiny_lm("llama")
    store = rp.extract(lm, prompts(), sites="resid.post@1", at="span:who:mean", to=tmp_path / "s")
    with pytest.raises(UsageError, match="span:who:mean"):
        rp.replay(store, lm)


def test_a_steered_model_does_not_replay(tiny_lm, tmp_path):
    lm = tiny_lm("llama")
    store = rp.extract(lm, prompts(), sites="resid.post@1", to=tmp_path / "s")
    d = rp.Direction.from_vector("resid.post@1", np.ones(lm.d_model))
    with rp.steer(lm, rp.Add(d)), pytest.raises(UsageError, match="being steered"):
        rp.replay(store, lm)


@pytest.mark.parametrize("wrong", [{"sample": 0}, {"tolerance": 0.0}, {"tolerance": -1.0}, {"tolerance": float("nan")}])
def test_bad_arguments_are_refused(tiny_lm, tmp_path, wrong):
    lm = tiny_lm("llama")
    store = rp.extract(lm, prompts(), sites="resid.post@1", to=tmp_path / "s")
    with pytest.raises(UsageError):
        rp.replay(store, lm, **wrong)


# -- directions ------------------------------------------------------------------------------------------------


def test_directions_keep_their_scores_and_a_flipped_decision_fails(tiny_lm, tmp_path):
    lm = tiny_lm("llama")
    store = rp.extract(lm, prompts(), sites="resid.post@1,attn.heads@1", at="all", to=tmp_path / "s")
    rng = np.random.default_rng(0)
    heads = store.read("attn.heads@1.3").numpy()
    v = rng.normal(size=heads.shape[1])
    head = rp.Direction.from_vector(
        "attn.heads@1.3", v, offset=float(np.mean(heads @ v / np.linalg.norm(v))), scale=0.5, identity=lm.identity
    )
    stream = rp.Direction.from_vector("resid.post@1", rng.normal(size=lm.d_model), identity=lm.identity)
    same = rp.replay(store, lm, directions=[head, stream])
    assert same.ok
    assert [(d.site, d.flips) for d in same.directions] == [(head.site, 0), (stream.site, 0)]
    assert all(d.drift < 1e-4 for d in same.directions)

    def opposite(values):  # the head's rows mirrored in the boundary
        new = {s: x.clone() for s, x in values.items()}
        part = new[site("attn.heads@1")][:, 12:16]
        part -= torch.from_numpy(2 * head.score(part.numpy())[:, None] * head.vector).float()
        return new

    wrong = plant(tmp_path / "planted", store, opposite(values_of(store)))
    found = rp.replay(wrong, lm, directions=[head, stream])
    assert not found.ok
    assert [(d.ok, d.flips) for d in found.directions] == [(False, store.rows), (True, 0)]
    scores = head.score(heads)
    assert found.directions[0].drift == pytest.approx(2 * np.abs(scores).max() / head.scale, rel=1e-3)
    assert found.directions[0].margin == pytest.approx(np.abs(scores).max() / head.scale, rel=1e-3)


def test_directions_of_other_sites_and_models_are_refused(tiny_lm, tmp_path):
    lm = tiny_lm("llama")
    store = rp.extract(lm, prompts(), sites="resid.post@1", to=tmp_path / "s")
    with pytest.raises(UnknownSite, match=r"resid\.post@2"):
        rp.replay(store, lm, directions=[rp.Direction.from_vector("resid.post@2", np.ones(27))])
    foreign = rp.Direction.from_vector("resid.post@1", np.ones(27), identity=tiny_lm("gemma").identity)
    with pytest.raises(IdentityMismatch):
        rp.replay(store, lm, directions=[foreign])
    assert rp.replay(store, lm, directions=[foreign], allow_mismatch=True).directions[0].flips == 0


# -- the measure -----------------------------------------------------------------------------------------------


@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.floats(-3, 3))
def test_a_difference_does_not_depend_on_the_unit(seed, width, power):
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(3, width, generator=generator), torch.randn(3, width, generator=generator)
    scaled = row_differences(10**power * a, 10**power * b)
    assert torch.allclose(scaled, row_differences(a, b), rtol=1e-4, atol=1e-6)
    assert row_differences(b, b).eq(0).all()


def test_massive_components_neither_hide_a_difference_nor_raise_an_alarm():
    b = torch.linspace(-1, 1, 200).repeat(2, 1)
    b[:, 7] = 1e4
    a = b.clone()
    a[0, 3] += 0.1  # beside the massive component
    a[1, 7] *= 1 + 1e-6  # its own rounding
    found = component_differences(a, b)
    assert found[0, 3] > 0.09
    assert found[1].max() < 2e-6


def test_a_row_of_few_neurons_is_measured_by_those_that_fire():
    b = torch.zeros(1, 500)
    b[0, :3] = torch.tensor([1.0, -2.0, 0.5])
    a = b.clone()
    a[0, 9] += 1e-6  # behind a ReLU, about zero
    assert 0 < row_differences(a, b) < 1e-5


def test_rows_of_nothing_but_zeros_equal_only_themselves():
    zeros = torch.zeros(1, 5)
    assert row_differences(zeros, zeros) == 0
    assert row_differences(torch.ones(1, 5), zeros).isinf().all()
    assert row_differences(torch.zeros(1, 5), torch.ones(1, 5)) == 1


def test_no_tolerance_is_invented_for_a_dtype_that_was_not_measured():
    assert tolerance_of("float32", stored="float32") < tolerance_of("float32", "bfloat16", stored="float32")
    with pytest.raises(UsageError, match="--tolerance"):
        tolerance_of("float8_e4m3fn", stored="float32")


# -- a real model ----------------------------------------------------------------------------------------------


@pytest.mark.models
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_truth_direction_of_a_real_model_keeps_every_decision(real_lm, tmp_path, dtype):
    lm = real_lm("smollm2-135m", dtype)
    store = rp.extract(
        lm, rp.PromptSet.load("cities").head(40), sites="resid.post@10:15,attn.heads@12", to=tmp_path / "s"
    )
    grid = rp.probe(store, rp.MeanDifference(), folds=4)
    result = rp.replay(store, lm, sample=None, directions=[grid.best(), *list(grid.directions.values())[:3]])
    assert result.ok
    assert [d.flips for d in result.directions] == [0] * 4
    values = values_of(store)
    off = {a: values[b] for a, b in itertools.pairwise(s for s in store.sites if s.part == "resid.post")}
    found = rp.replay(plant(tmp_path / "planted", store, off), lm)
    assert len(found.failed) == len(off) == 4
    assert found.failed[0].diagnosis == "its rows are what this model has at 'resid.post@11'"
