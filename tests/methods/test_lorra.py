"""LoRRA: the loss by hand, what stock peft makes of the result, resuming, and what cannot be trained."""

import dataclasses
import json
import os
import signal
import sys

import numpy as np
import pytest
import torch
from tiny import DECODERS, LAYERS, tiny_model, tiny_net

import reprobe as rp
from reprobe import Adapter
from reprobe.control import edits_in
from reprobe.errors import (
    ArtifactExists,
    ArtifactMissing,
    CorruptArtifact,
    IdentityMismatch,
    ModelLoadFailed,
    TrainingFailed,
    UnknownSite,
    UnsupportedOperation,
    UsageError,
)
from reprobe.methods import lorra, repe
from reprobe.methods.lorra import Settings, templated, train
from reprobe.methods.repe import Streams

PROMPTS = ("the cat", "a dog and an owl", "one")
RESPONSES = (" is on the mat", " is", " and then the end of it")
STREAMS = Streams(
    templated(PROMPTS), templated(PROMPTS, "be glad. {} here"), templated(PROMPTS, "be very sad: {} here")
)
QUICK = Settings(steps=6, batch=2, rank=3, lora_alpha=5, rate=1e-2)


def stock(name, folder, dtype=torch.float32):
    """The tiny network with the adapter as peft loads it."""
    from peft import PeftModel

    return PeftModel.from_pretrained(tiny_net(name).to(dtype), str(folder)).eval()


def same(a: Adapter, b: Adapter) -> bool:
    return a.losses == b.losses and all(
        np.array_equal(getattr(a.factors[path], side), getattr(b.factors[path], side))
        for path in a.factors
        for side in ("down", "up")
    )


def response_states(net, tokenizer, prompt, response, layers):
    """transformers' hidden states of the response tokens, one text, no padding: entry l+1 is the output of block l."""
    start = len(tokenizer(prompt)["input_ids"])
    with torch.no_grad():
        out = net(**tokenizer(prompt + response, return_tensors="pt"), output_hidden_states=True)
    return torch.stack([out.hidden_states[layer + 1][0, start:] for layer in layers])


def loss_by_hand(adapted, lm, alpha, layers):
    distances = []
    for base, positive, negative, response in zip(*STREAMS.rows, RESPONSES, strict=True):
        h, up, down = (response_states(lm.net, lm.tokenizer, p, response, layers) for p in (base, positive, negative))
        moved = response_states(adapted, lm.tokenizer, base, response, layers)
        distances.append(((moved - (h + alpha * (up - down))) ** 2).sum(-1).sqrt().flatten())
    return float(torch.cat(distances).mean())


def test_the_loss_is_the_mean_distance_of_response_tokens_from_their_targets(tmp_path):
    lm = tiny_model("llama", dtype=torch.float64)
    # The last block's output is left out: transformers shows it only after the final norm.
    how = Settings(steps=2, batch=3, alpha=0.7, sites="resid.post@0:2", dropout=0.0, rank=3, rate=1e-2)
    losses = train(lm, STREAMS, RESPONSES, to=tmp_path / "two", settings=how).losses
    assert losses[0] == pytest.approx(loss_by_hand(lm.net, lm, 0.7, [0, 1]), rel=1e-12)

    train(lm, STREAMS, RESPONSES, to=tmp_path / "one", settings=Settings(**vars(how) | {"steps": 1}))
    adapted = stock("llama", tmp_path / "one", torch.float64)
    assert losses[1] == pytest.approx(loss_by_hand(adapted, lm, 0.7, [0, 1]), rel=1e-6)
    assert losses[1] < losses[0]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text", "falcon.new", "bloom"])
def test_stock_peft_loads_the_adapter_and_the_merged_weights_agree(tmp_path, name):
    lm, ids = tiny_model(name), torch.tensor([[5, 9, 33, 77, 100]])
    found = train(lm, STREAMS, RESPONSES, to=tmp_path / "a", settings=QUICK)
    assert found.losses[-1] < found.losses[0]
    with torch.no_grad():
        plain, wanted = lm.net(ids).logits, stock(name, tmp_path / "a")(ids).logits
        assert (wanted - plain).abs().max() > 0.1
        with rp.edited(lm, Adapter.load(tmp_path / "a").edits()):
            assert (lm.net(ids).logits - wanted).abs().max() < 1e-5
            rp.export_edited(lm, tmp_path / "merged")
        assert torch.equal(lm.net(ids).logits, plain)
        merged = rp.LanguageModel.load(tmp_path / "merged")
        assert (merged.net(ids).logits - wanted).abs().max() < 1e-5


@pytest.mark.parametrize("name", DECODERS)
def test_every_family_has_layers_for_queries_and_values(tiny_lm, name):
    lm = tiny_lm(name)
    for block in lm.architecture.blocks(lm.net):
        for path in lm.architecture.queries_values(lm.net):
            assert block.get_submodule(path).weight.ndim == 2


def test_training_leaves_the_model_and_the_random_state_as_they_were(tmp_path):
    lm = tiny_model("llama")
    names, weights = [n for n, _ in lm.net.named_modules()], {k: v.clone() for k, v in lm.net.state_dict().items()}
    torch.manual_seed(5)
    before = torch.get_rng_state()
    train(lm, STREAMS, RESPONSES, to=tmp_path / "a", settings=QUICK)
    assert torch.equal(torch.get_rng_state(), before)
    assert [n for n, _ in lm.net.named_modules()] == names
    assert all(torch.equal(v, weights[k]) for k, v in lm.net.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in lm.net.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks or m.training for m in lm.net.modules())


def test_what_is_trained_depends_on_the_seed_alone(tmp_path):
    lm = tiny_model("llama")
    made = []
    for i, seed in enumerate((3, 3, 4)):
        torch.manual_seed(i)
        how = Settings(**vars(QUICK) | {"seed": seed})
        made.append(train(lm, STREAMS, RESPONSES, to=tmp_path / f"{i}", settings=how))
    assert same(made[0], made[1])
    assert not same(made[0], made[2])


def test_a_step_in_several_passes_is_the_step_in_one(tmp_path):
    lm = tiny_model("llama", dtype=torch.float64)
    made = [
        train(
            lm,
            STREAMS,
            RESPONSES,
            to=tmp_path / f"{batch}",
            settings=Settings(steps=4, batch=batch, accumulate=4 // batch, dropout=0.0, rank=2),
        )
        for batch in (4, 2, 1)
    ]
    for other in made[1:]:
        assert np.allclose(made[0].losses, other.losses, rtol=1e-12)
        for path, own in made[0].factors.items():
            assert np.allclose(own.up, other.factors[path].up, rtol=1e-6, atol=1e-12)


def test_targets_that_are_not_kept_are_computed_again_to_the_same(tmp_path, monkeypatch):
    kept = train(tiny_model("llama"), STREAMS, RESPONSES, to=tmp_path / "kept", settings=QUICK)
    monkeypatch.setattr(lorra, "_KEEP", 0)
    assert same(kept, train(tiny_model("llama"), STREAMS, RESPONSES, to=tmp_path / "again", settings=QUICK))


# -- interruptions --------------------------------------------------------------------------------------------------


class Interrupted(Exception):
    pass


def break_at(step):
    def progress(description, done, total):
        assert description.startswith("train: loss ")
        if done == step:
            raise Interrupted

    return progress


@pytest.mark.parametrize("step", [1, 4, 5])
def test_an_interrupted_training_goes_on_to_the_same_adapter_bit_for_bit(tmp_path, step):
    whole = train(tiny_model("llama"), STREAMS, RESPONSES, to=tmp_path / "whole", settings=QUICK)
    to, left = tmp_path / "a", tmp_path / "a.checkpoint.safetensors"
    with pytest.raises(Interrupted):
        train(tiny_model("llama"), STREAMS, RESPONSES, to=to, settings=QUICK, checkpoint=2, progress=break_at(step))
    assert not to.exists()
    assert left.exists() == (step > 1)
    if step > 1:
        with pytest.raises(ArtifactExists, match="go on with resume=True"):
            train(tiny_model("llama"), STREAMS, RESPONSES, to=to, settings=QUICK)
    steps = []
    made = train(
        tiny_model("llama"), STREAMS, RESPONSES, to=to, settings=QUICK, resume=True,
        progress=lambda _, done, total: steps.append(done),
    )  # fmt: skip
    assert steps[0] == step // 2 * 2 + 1
    assert same(made, whole)
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (to / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    assert not left.exists()
    assert same(train(tiny_model("llama"), STREAMS, RESPONSES, to=to, settings=QUICK, resume=True), whole)


def die_training(to):
    def kill(description, done, total):
        if done == 5:
            os.kill(os.getpid(), signal.SIGKILL)

    lm = tiny_model()
    train(lm, STREAMS, RESPONSES, to=to, settings=QUICK, checkpoint=2, progress=kill)


def test_a_killed_training_leaves_a_checkpoint_to_go_on_with(server, tmp_path):
    child = server.Process(target=die_training, args=(tmp_path / "a",))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert [p.name for p in tmp_path.iterdir()] == ["a.checkpoint.safetensors"]
    made = train(tiny_model("llama"), STREAMS, RESPONSES, to=tmp_path / "a", settings=QUICK, resume=True)
    assert same(made, train(tiny_model("llama"), STREAMS, RESPONSES, to=tmp_path / "whole", settings=QUICK))


def test_only_the_same_training_goes_on(tmp_path):
    to = tmp_path / "a"
    with pytest.raises(Interrupted):
        train(tiny_model("llama"), STREAMS, RESPONSES, to=to, settings=QUICK, checkpoint=2, progress=break_at(3))
    other = Settings(**vars(QUICK) | {"alpha": 2.0})
    with pytest.raises(IdentityMismatch, match=r"settings, alpha: 5\.0 there, 2\.0 here"):
        train(tiny_model("llama"), STREAMS, RESPONSES, to=to, settings=other, resume=True)
    with pytest.raises(IdentityMismatch, match="texts, sha256"):
        train(tiny_model("llama"), STREAMS, (*RESPONSES[:2], " or"), to=to, settings=QUICK, resume=True)
    another = tiny_model("llama", seed=1)
    with pytest.raises(IdentityMismatch, match="model, weights"):
        train(another, STREAMS, RESPONSES, to=to, settings=QUICK, resume=True)
    train(tiny_model("llama"), STREAMS, RESPONSES, to=to, settings=QUICK, resume=True)
    with pytest.raises(IdentityMismatch, match="alpha"):
        train(tiny_model("llama"), STREAMS, RESPONSES, to=to, settings=other, resume=True)
    with pytest.raises(ArtifactExists, match="name a folder that does not"):
        train(tiny_model("llama"), STREAMS, RESPONSES, to=to, settings=QUICK)
    given = dataclasses.replace(rp.Adapter.load(to), provenance={}).save(tmp_path / "given")
    with pytest.raises(IdentityMismatch, match="settings, alpha: None there"):
        train(tiny_model("llama"), STREAMS, RESPONSES, to=given, settings=QUICK, resume=True)


# -- targets and adapted layers -------------------------------------------------------------------------------------


def test_default_targets_are_the_published_outputs_of_blocks():
    assert [s.layer for s in lorra.default_targets(32)] == [9, 11, 13, 15, 17, 19]  # hidden_states 10, 12, … 20
    assert [s.layer for s in lorra.default_targets(30)] == [8, 10, 12, 14, 16, 18]
    assert all(0 <= s.layer < n for n in range(1, 130) for s in lorra.default_targets(n))
    assert {s.part for s in lorra.default_targets(7)} == {"resid.post"}


def test_every_adapted_block_learns_the_last_one_too(tmp_path):
    how = Settings(**vars(QUICK) | {"sites": "resid.post@0,resid.post@1"})
    found = train(tiny_model("llama"), STREAMS, RESPONSES, to=tmp_path / "a", settings=how)
    assert sorted(found.factors) == [f"model.layers.{b}.self_attn.{m}_proj" for b in (0, 1) for m in ("q", "v")]
    assert all(np.abs(own.up).max() > 0 for own in found.factors.values())
    assert {edit.provenance["layer"] for edit in found.edits()} == {0, 1}


def test_other_layers_and_blocks_can_be_adapted(tmp_path):
    how = Settings(**vars(QUICK) | {"sites": "resid.post@2", "blocks": (1,), "modules": ("o_proj", "mlp.down_proj")})
    found = train(tiny_model("llama"), STREAMS, RESPONSES, to=tmp_path / "a", settings=how)
    assert sorted(found.factors) == ["model.layers.1.mlp.down_proj", "model.layers.1.self_attn.o_proj"]
    with torch.no_grad():
        ids, lm = torch.tensor([[5, 9, 33]]), tiny_model("llama")
        with rp.edited(lm, found.edits()):
            assert (lm.net(ids).logits - stock("llama", tmp_path / "a")(ids).logits).abs().max() < 1e-5


def test_along_directions_the_first_loss_is_their_length(tmp_path):
    lm, rng = tiny_model("llama", dtype=torch.float64), np.random.default_rng(0)
    ds = [rp.Direction.from_vector(f"resid.post@{i}", rng.normal(size=lm.d_model), scale=i + 1.0) for i in (0, 2)]
    how = Settings(**vars(QUICK) | {"beta": 3.0})
    found = train(lm, PROMPTS, RESPONSES, to=tmp_path / "a", directions=ds, settings=how)
    assert found.provenance["plan"]["settings"]["sites"] == ["resid.post@0", "resid.post@2"]
    assert found.losses[0] == pytest.approx(3 * (1.0 + 3.0) / 2, rel=1e-12)
    # With a contrast, both: the loss of one where the other stands still.
    both = Settings(**vars(how) | {"alpha": 0.0, "sites": "resid.post@0,resid.post@2"})
    assert train(lm, STREAMS, RESPONSES, to=tmp_path / "b", directions=ds, settings=both).losses[0] == pytest.approx(
        found.losses[0], rel=1e-12
    )


def test_responses_count_up_to_their_limit(tmp_path):
    short = Settings(**vars(QUICK) | {"max_tokens": 2, "batch": 3, "steps": 1, "dropout": 0.0})
    lm = tiny_model("llama", dtype=torch.float64)
    found = train(lm, STREAMS, RESPONSES, to=tmp_path / "a", settings=short)
    cut = [lm.tokenizer.decode(lm.tokenizer(r, add_special_tokens=False)["input_ids"][:2]) for r in RESPONSES]
    again = train(lm, STREAMS, cut, to=tmp_path / "b", settings=Settings(**vars(short) | {"max_tokens": 64}))
    assert found.losses[0] == pytest.approx(again.losses[0], rel=1e-12)


def test_chat_prompts_are_rendered_with_the_template(tmp_path):
    lm = tiny_model("llama")
    chat = Streams(*(templated(PROMPTS, t, chat=True) for t in ("{}", "glad {}", "sad {}")))
    found = train(lm, chat, RESPONSES, to=tmp_path / "a", settings=QUICK)
    written = Streams(*([lm.tokenizer.apply_chat_template(p, tokenize=False, add_generation_prompt=True)
                         for p in rows] for rows in chat.rows))  # fmt: skip
    lm.tokenizer.add_bos_token = False
    plain = tiny_model("llama", bos=False)
    assert train(plain, written, RESPONSES, to=tmp_path / "b", settings=QUICK).losses == found.losses


def test_half_precision_networks_get_adapters_in_float32(tmp_path):
    found = train(tiny_model("llama", dtype=torch.bfloat16), STREAMS, RESPONSES, to=tmp_path / "a", settings=QUICK)
    assert {own.up.dtype for own in found.factors.values()} == {np.dtype(np.float32)}
    assert found.losses[-1] < found.losses[0]


# -- what can be done with an adapter -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "a"
    lm = tiny_model()
    return train(lm, STREAMS, RESPONSES, to=folder, settings=QUICK), folder


def test_an_adapter_is_another_identity_while_it_is_on(trained):
    lm, (adapter, _) = tiny_model("llama"), trained
    direction = rp.Direction.from_vector("resid.post@1", np.ones(lm.d_model), identity=lm.identity)
    plain = lm.identity
    with rp.edited(lm, adapter.edits()):
        assert set(plain.differences(lm.identity)) == {"weights"}
        with pytest.raises(IdentityMismatch, match="weights"):
            repe.scan(lm, "the cat", {direction.site: direction})
        lm.check()
        with rp.steer(lm, rp.Add(direction, 2.0), allow_mismatch=True):
            lm.generate("the cat", max_new_tokens=2)
    assert lm.identity == plain
    repe.scan(lm, "the cat", {direction.site: direction})


def test_half_of_it_is_half_of_the_change(trained):
    lm, (adapter, _) = tiny_model("llama"), trained
    name = next(iter(adapter.factors)) + ".weight"
    weight = dict(lm.net.named_parameters())[name]
    plain = weight.detach().clone()
    changes = []
    for strength in (1.0, 0.5, 0.0):
        with rp.edited(lm, adapter.edits(strength)):
            changes.append(weight.detach() - plain)
    assert torch.allclose(changes[0], 2 * changes[1], atol=1e-6)
    assert changes[0].abs().max() > 1e-3
    assert not changes[2].any()


def test_an_adapter_of_another_model_is_refused(trained):
    other = tiny_model("llama", seed=1)
    with pytest.raises(IdentityMismatch, match="weights"):
        rp.apply_edits(other, trained[0].edits())


def test_an_adapter_trained_on_an_edited_model_is_for_the_edited_model(trained, tmp_path):
    lm = tiny_model("llama")
    rp.apply_edits(lm, trained[0].edits())
    second = train(lm, STREAMS, RESPONSES, to=tmp_path / "second", settings=QUICK)
    with rp.edited(lm, second.edits()):
        lm.logits("the cat")
    with pytest.raises(IdentityMismatch, match="made after"):
        rp.apply_edits(tiny_model("llama"), second.edits())


def test_a_folder_is_loaded_as_it_was_saved_without_peft(trained, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)  # importing it fails
    adapter, folder = trained
    found = Adapter.load(folder)
    assert same(found, adapter)
    assert (found.base, found.scale, dict(found.provenance)) == (adapter.base, 5 / 3, dict(adapter.provenance))
    assert [e.digest for e in edits_in(folder)] == [e.digest for e in adapter.edits()]
    with rp.edited(tiny_model("llama"), edits_in(folder)) as ledger:
        assert len(ledger.applied) == len(adapter.factors)


def test_folders_that_are_no_whole_adapter_are_refused(trained, tmp_path):
    with pytest.raises(ArtifactMissing, match="holds no adapter"):
        Adapter.load(tmp_path)
    for name in ("adapter_config.json", "adapter_model.safetensors", "reprobe.json"):
        (tmp_path / name).write_bytes((trained[1] / name).read_bytes())
    record = json.loads((tmp_path / "reprobe.json").read_text())
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CorruptArtifact, match=r"adapter_config\.json was changed"):
        Adapter.load(tmp_path)
    (tmp_path / "reprobe.json").write_text("{")
    with pytest.raises(CorruptArtifact, match="malformed"):
        Adapter.load(tmp_path)
    (tmp_path / "reprobe.json").write_text(json.dumps(record | {"schema": 99}))
    with pytest.raises(UsageError, match="newer reprobe"):
        Adapter.load(tmp_path)
    (tmp_path / "reprobe.json").unlink()
    with pytest.raises(ArtifactMissing, match="its base is not known"):
        Adapter.load(tmp_path)


def test_an_adapter_is_no_model_to_load(trained):
    with pytest.raises(ModelLoadFailed, match="holds an adapter, not a model"):
        rp.LanguageModel.load(trained[1])


# -- bad input ------------------------------------------------------------------------------------------------------


def test_without_peft_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"reprobe-lm\[train\]"):
        train(tiny_model("llama"), STREAMS, RESPONSES, to=tmp_path / "a")


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"steps": 0}, "steps=0"),
        ({"rank": 0}, "rank=0"),
        ({"rate": 0.0}, r"rate=0\.0"),
        ({"dropout": 1.0}, r"dropout=1\.0"),
        ({"alpha": float("nan")}, "alpha=nan"),
        ({"alpha": 0.0, "beta": 0.0}, "ask for no change"),
        ({"seed": -1}, "seed=-1"),
        ({"sites": "resid.pre@2"}, r"resid\.pre@2 is resid\.post@1"),
        ({"sites": "mlp.out@1"}, "its targets are resid.post sites"),
        ({"blocks": (2,), "sites": "resid.post@1"}, "highest target is resid.post@1, made by blocks 0–1"),
        ({"blocks": ()}, "blocks none cannot be adapted"),
        ({"modules": ("queries",)}, "no linear layer of block 0 is called 'queries'; they are: self_attn.q_proj"),
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path, values, says):
    with pytest.raises(UsageError, match=says):
        train(tiny_model("llama"), STREAMS, RESPONSES, to=tmp_path / "a", settings=Settings(**values))


def test_a_block_beyond_the_model_is_refused(tmp_path):
    with pytest.raises(UnknownSite, match=f"blocks 0–{LAYERS - 1}"):
        train(tiny_model("llama"), STREAMS, RESPONSES, to=tmp_path / "a", settings=Settings(sites="resid.post@7"))


@pytest.mark.parametrize(
    ("prompts", "responses", "says"),
    [
        (PROMPTS, RESPONSES, "nothing to move towards"),
        (STREAMS, RESPONSES[:2], "3 and 2"),
        (STREAMS, " is", "as many responses as prompts"),
        (STREAMS, (" is", "", " a"), "response 1 is empty"),
        (Streams(PROMPTS, PROMPTS, PROMPTS), RESPONSES, "there is no contrast"),
        (Streams(["ab"], ["ab "], ["ab"]), ["the"], "other tokens"),
        (Streams(["a " * 70], ["b"], ["c"]), [" is"], "no token of its own"),
    ],
)
def test_texts_that_cannot_be_trained_on_are_refused(tmp_path, prompts, responses, says):
    with pytest.raises(UsageError, match=says):
        train(tiny_model("llama"), prompts, responses, to=tmp_path / "a", settings=QUICK)
    assert not list(tmp_path.iterdir())


def test_a_response_with_nothing_before_it_is_refused(tmp_path):
    lm = tiny_model("gpt2", bos=False)
    with pytest.raises(UsageError, match="has nothing before it"):
        train(lm, Streams([""], ["a"], ["b"]), [" is"], to=tmp_path / "a")


def test_directions_must_fit(tmp_path):
    lm = tiny_model("llama")
    d = rp.Direction.from_vector("resid.post@2", np.ones(lm.d_model), identity=tiny_model("gpt2").identity)
    with pytest.raises(IdentityMismatch):
        train(lm, PROMPTS, RESPONSES, to=tmp_path / "a", directions=d, settings=QUICK)
    how = Settings(**vars(QUICK) | {"sites": "resid.post@1"})
    with pytest.raises(UsageError, match="not among the targets"):
        train(lm, PROMPTS, RESPONSES, to=tmp_path / "a", directions=d, settings=how, allow_mismatch=True)
    train(lm, PROMPTS, RESPONSES, to=tmp_path / "a", directions=d, settings=QUICK, allow_mismatch=True)


def test_steered_monitored_and_encoding_models_are_refused(tmp_path):
    lm = tiny_model("llama")
    d = rp.Direction.from_vector("resid.post@1", np.ones(lm.d_model))
    for context in (rp.steer(lm, rp.Add(d, 1.0)), lm.monitor(d)):
        with context, pytest.raises(UnsupportedOperation, match="leave that context"):
            train(lm, STREAMS, RESPONSES, to=tmp_path / "a", settings=QUICK)
    with pytest.raises(UnsupportedOperation, match="is an encoder"):
        train(tiny_model("bert"), STREAMS, RESPONSES, to=tmp_path / "a", settings=QUICK)


def test_a_loss_that_is_no_number_ends_the_training(tmp_path):
    lm = tiny_model("llama")
    with torch.no_grad():
        lm.net.model.layers[0].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(TrainingFailed, match="the loss of step 0 is nan"):
        train(lm, STREAMS, RESPONSES, to=tmp_path / "a", settings=QUICK)
    assert not list(tmp_path.iterdir())
