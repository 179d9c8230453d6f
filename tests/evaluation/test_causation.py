"""What a detector causes, on a neuron that was planted to detect one word and to write it."""

import numpy as np
import pytest
import torch
from tiny import tiny_net, tiny_tokenizer

import reprobe as rp
from reprobe.errors import IdentityMismatch, UsageError
from reprobe.evaluation.causation import _others, causes, vocabulary
from reprobe.methods.concepts import Concept
from reprobe.methods.dissection import dissect

NEURON = 7
WORDS = ("cat", "of", "red", "and", "seven", "is", "on", "blue", "an")
THE = Concept.regex("the, inside", r"(?<=[^ ]) the(?!\w)")
COLOURS = Concept.words("colours", ["red", "blue"])


def planted_lm(writes=4.0):
    """No block adds anything but one neuron, which fires on " the" and writes its logit."""
    net, tokenizer = tiny_net("llama"), tiny_tokenizer()
    (the,) = tokenizer(" the", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        for block in net.model.layers:
            for module in (block.self_attn.o_proj, block.mlp.down_proj):
                module.weight.zero_()
                module.bias.zero_()
        weight = net.get_input_embeddings().weight
        weight[:, 0] = 0.0
        weight[the] = 0.0
        weight[the, 0] = 5.0
        mlp = net.model.layers[1].mlp
        for module in (mlp.gate_proj, mlp.up_proj):
            module.weight[:, 0] = 0.0  # the others do not see the word
            module.weight[NEURON, 0] = 4.0
            module.bias.zero_()
        # Elsewhere it is small and positive, and a little different for every word.
        mlp.gate_proj.weight[NEURON, 1:] = 0.0
        mlp.gate_proj.bias[NEURON] = 2.0
        mlp.up_proj.weight[NEURON, 1:] *= 0.5
        mlp.up_proj.bias[NEURON] = 1.0
        head = net.lm_head.weight[the]
        mlp.down_proj.weight[:, NEURON] = writes * head / head.norm()
    return rp.LanguageModel(net, tokenizer, name="planted")


def texts():
    rng = np.random.default_rng(0)
    return [" ".join([*rng.choice(WORDS, 14), "the", "the"]) for _ in range(60)]


def dissected(lm):
    return dissect(lm, texts(), [THE, COLOURS], "mlp.neurons@1", quantile=0.2, permutations=5)


@pytest.fixture(scope="module")
def lm():
    return planted_lm()


@pytest.fixture(scope="module")
def found(lm):
    return dissected(lm)


def test_the_planted_neuron_is_found_and_causes_what_it_detects(lm, found):
    assert found.of_concept("the, inside")["unit"][0] == f"mlp.neurons@1.{NEURON}"
    caused = causes(lm, found, ["the, inside"], most=1, controls=6)
    stimulate, ablate = caused.table.rows(named=True)
    assert (stimulate["act"], ablate["act"]) == ("stimulate", "ablate")
    assert stimulate["units"] == f"mlp.neurons@1.{NEURON}"
    # All other neurons write nothing.
    assert stimulate["control"] == pytest.approx(0, abs=1e-6)
    assert ablate["control"] == pytest.approx(0, abs=1e-6)
    assert stimulate["difference_low"] > 0
    assert ablate["difference_high"] < 0
    assert stimulate["rank"] == ablate["rank"] == pytest.approx(1 / 7)
    summary = caused.summary
    assert summary["above 0"].to_list() == [1, 0]
    assert summary["below 0"].to_list() == [0, 1]


def test_the_effects_are_those_of_the_network_changed_by_hand(lm, found):
    """Stimulation against a plain hook on the neuron, and the log-probability against log-softmax in float64."""
    (the,) = lm.tokenizer(" the", add_special_tokens=False)["input_ids"]
    assert vocabulary(found, "the, inside").tolist() == [the]
    line = causes(lm, found, ["the, inside"], most=1, controls=2, acts=["stimulate"]).table.row(0, named=True)
    threshold = float(found.threshold[found.number(f"mlp.neurons@1.{NEURON}")])
    changes = []
    for passage in rp.evaluation.NEUTRAL:
        ids = torch.tensor([lm.tokenizer(passage.prompt + passage.continuation, truncation=True)["input_ids"]])
        runs = []
        for clamped in (False, True):

            def clamp(module, args, clamped=clamped):
                h = args[0].clone()
                h[..., NEURON] = threshold
                return (h,) if clamped else None

            handle = lm.net.model.layers[1].mlp.down_proj.register_forward_pre_hook(clamp)
            with torch.no_grad():
                runs.append(lm.net(input_ids=ids).logits[0].double().log_softmax(-1)[2::3, the])
            handle.remove()
        changes.append((runs[1] - runs[0]).numpy())
    assert line["positions"] == sum(map(len, changes))
    assert line["texts"] == len(changes)
    assert line["effect"] == pytest.approx(np.concatenate(changes).mean(), abs=1e-5)


def test_a_detector_that_writes_nothing_causes_nothing():
    silent = planted_lm(writes=0.0)
    caused = causes(silent, dissected(silent), ["the, inside"], most=1, controls=4)
    assert np.allclose(caused.table["effect"], 0, atol=1e-6)
    assert (caused.table["rank"] == 1.0).all()


def test_controls_are_other_units_that_do_not_detect_the_concept_and_the_draw_is_seeded(lm, found):
    concept, detectors = found.concept("the, inside"), np.array([found.number(f"mlp.neurons@1.{NEURON}")])
    one, two, other = (_others(found, concept, detectors, 3, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert np.array_equal(one, two)
    assert not np.array_equal(one, other)
    assert detectors[0] not in one
    assert (found.iou[one[0], concept] <= found.settings.detector).all()
    first, second = (causes(lm, found, ["the, inside"], controls=3, seed=1).table for _ in range(2))
    assert first.equals(second)


def test_what_cannot_be_measured_is_refused(lm, found, tiny_lm):
    with pytest.raises(IdentityMismatch):
        causes(tiny_lm("llama"), found)
    with pytest.raises(UsageError, match="could be controls"):
        causes(lm, found, ["the, inside"], controls=400)
    with pytest.raises(UsageError, match="1 or more"):
        causes(lm, found, controls=0)
    with pytest.raises(UsageError, match="no concept 'dogs'"):
        causes(lm, found, ["dogs"])
    with pytest.raises(UsageError, match="no place to stimulate at"):
        causes(lm, found, neutral=[rp.Passage("the", "")])
