"""A file for another program does there what the steering does here, as far as that program is installed."""

import base64
import json

import gguf
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file
from tiny import tiny_model, tiny_net
from transformers import AutoModelForCausalLM

import reprobe as rp
from reprobe.control.export import block_vectors
from reprobe.errors import ArtifactExists, ArtifactMissing, CorruptArtifact, UsageError

PROMPTS = ["the cat", "a dog is on the mat and"]


def direction(lm, site, seed=0, **known):
    v = np.random.default_rng(seed).normal(size=lm.width(rp.Site.parse(site)))
    return rp.Direction.from_vector(site, v, scale=1.5, **known)


def made(lm):
    """Adds at the outputs of blocks 1 and 2, one of them given as what enters block 2."""
    d, e, f = (direction(lm, site, i) for i, site in enumerate(("resid.post@1", "resid.pre@2", "resid.post@2")))
    return rp.Steering(rp.Add(f, -0.4), rp.Add(d, 2.0), rp.Add(e, 0.5, unit="raw"), identity=lm.identity)


def wanted(lm):
    """The vectors of `made`, by hand."""
    d, e, f = (direction(lm, site, i) for i, site in enumerate(("resid.post@1", "resid.pre@2", "resid.post@2")))
    return {1: 2.0 * 1.5 * d.vector + 0.5 * e.vector, 2: -0.4 * 1.5 * f.vector}


def logits(lm, *items):
    with rp.steer(lm, *items):
        return lm.logits(PROMPTS, at="all")


def require_same(a, b):
    for x, y in zip(a, b, strict=True):
        assert (x - y).abs().max() < 1e-4


def through(lm, net):
    """The logits of a network that another program steers, unpadded."""
    out = []
    with torch.no_grad():
        for prompt in PROMPTS:
            out.append(net(input_ids=lm.encode(prompt).input_ids, use_cache=False).logits[0])
    return out


def test_a_gguf_control_vector_is_as_llama_cpp_writes_and_reads_it(tiny_lm, tmp_path):
    lm = tiny_lm("llama")
    path = rp.export(made(lm), tmp_path / "v.gguf")
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert fields == {
        "general.architecture": "controlvector",
        "controlvector.model_hint": "llama",
        "controlvector.layer_count": 2,
    }
    assert reader.fields["controlvector.layer_count"].types == [gguf.GGUFValueType.INT32]
    assert [t.name for t in reader.tensors] == ["direction.1", "direction.2"]
    for tensor, (_, vector) in zip(reader.tensors, sorted(wanted(lm).items()), strict=True):
        assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
        assert tensor.data.shape == (lm.d_model,)
        assert np.array_equal(tensor.data, vector.astype(np.float32))


def test_the_hint_is_llama_cpps_name_of_the_architecture(tiny_lm, tmp_path):
    lm = tiny_lm("gemma3_text")
    item = rp.Add(direction(lm, "resid.post@1", identity=lm.identity))
    hints = {}
    for format in ("gguf", "repeng"):  # noqa: A001
        reader = gguf.GGUFReader(rp.export(item, tmp_path / format, format=format))
        hints[format] = reader.get_field("controlvector.model_hint").contents()
    assert hints == {"gguf": "gemma3", "repeng": "gemma3_text"}


def test_what_is_read_back_steers_as_what_was_written(tiny_lm, tmp_path):
    lm = tiny_lm("llama")
    path = rp.export(made(lm), tmp_path / "v.gguf")
    back = rp.read_control_vector(path, identity=lm.identity)
    assert [str(item.site) for item in back.interventions] == ["resid.post@1", "resid.post@2"]
    assert (back.name, back.identity) == ("v", lm.identity)
    require_same(logits(lm, back), logits(lm, made(lm)))
    saved = rp.Steering.load(back.save(tmp_path / "v.safetensors"))
    require_same(logits(lm, saved), logits(lm, made(lm)))
    assert rp.export(back, tmp_path / "again.gguf").read_bytes() == path.read_bytes()


def test_block_0_is_refused_where_llama_cpp_refuses_it(tiny_lm, tmp_path):
    lm = tiny_lm("llama")
    item = rp.Add(direction(lm, "resid.post@0"), 2.0)
    with pytest.raises(UsageError, match="begin at block 1"):
        rp.export(item, tmp_path / "v.gguf")
    assert not list(tmp_path.iterdir())
    path = rp.export(item, tmp_path / "v.gguf", format="repeng")
    with pytest.raises(UsageError, match="names block 0"):
        rp.read_control_vector(path)
    require_same(logits(lm, rp.read_control_vector(path, format="repeng")), logits(lm, item))


def test_a_direction_is_exported_at_strength_1(tiny_lm, tmp_path):
    d = direction(tiny_lm("llama"), "resid.post@1")
    (vector,) = block_vectors(d).values()
    assert np.allclose(vector, d.step, atol=0)


REFUSED = {
    "one vector to every token": lambda d, g: rp.Ablate(d),
    "without a condition": lambda d, g: rp.Add(d, when=rp.When(g, above=0.0)),
    "the same for all prompts": lambda d, g: rp.Add(d, [1.0, 2.0]),
    "every token": lambda d, g: rp.Add(d, tokens="generated"),
    "on all' cannot be exported": lambda d, g: rp.Add(d, unit="norm"),
    "outputs of blocks only": lambda d, g: rp.Add(d, site="attn.out@1"),
    "at embed": lambda d, g: rp.Add(d, site="embed"),
    "resid.pre@0": lambda d, g: rp.Add(d, site="resid.pre@0"),
    "adds nothing": lambda d, g: rp.Steering(),
    "not a str": lambda d, g: "v",
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_other_programs_cannot_do_is_refused(tiny_lm, tmp_path, reason):
    lm = tiny_lm("llama")
    item = REFUSED[reason](direction(lm, "resid.post@1"), direction(lm, "resid.post@0", 1))
    for format in ("gguf", "repeng", "steering-vectors", "vllm-lens"):  # noqa: A001
        with pytest.raises(UsageError, match=reason):
            rp.export(item, tmp_path / "v", format=format)
    assert not list(tmp_path.iterdir())


def test_an_unknown_format_and_an_existing_file_are_refused(tiny_lm, tmp_path):
    item = made(tiny_lm("llama"))
    with pytest.raises(UsageError, match="steering-vectors, vllm-lens, tensors"):
        rp.export(item, tmp_path / "v", format="pickle")
    path = rp.export(item, tmp_path / "v")
    with pytest.raises(ArtifactExists):
        rp.export(item, path)
    with pytest.raises(ArtifactExists):
        rp.export(item, tmp_path, overwrite=True)
    rp.export(item, path, overwrite=True, format="vllm-lens")


def test_files_that_are_no_control_vectors_are_refused(tiny_lm, tmp_path):
    lm = tiny_lm("llama")
    path = rp.export(made(lm), tmp_path / "v.gguf")
    with pytest.raises(ArtifactMissing):
        rp.read_control_vector(tmp_path / "none.gguf")
    (tmp_path / "cut.gguf").write_bytes(path.read_bytes()[:150])
    with pytest.raises(CorruptArtifact):
        rp.read_control_vector(tmp_path / "cut.gguf")
    (tmp_path / "other.gguf").write_bytes(b"not a gguf file at all, but some text of forty bytes")
    with pytest.raises(CorruptArtifact):
        rp.read_control_vector(tmp_path / "other.gguf")

    def written(architecture, tensors):
        writer = gguf.GGUFWriter(tmp_path / "w.gguf", architecture)
        for name, values in tensors.items():
            writer.add_tensor(name, values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return tmp_path / "w.gguf"

    row = np.ones(6, np.float32)
    for architecture, tensors, reason in (
        ("llama", {"direction.1": row}, "of the architecture 'llama'"),
        ("controlvector", {"direction.1": row.astype(np.float16)}, "F16"),
        ("controlvector", {"direction.1": np.ones((2, 3), np.float32)}, "2 dimensions"),
        ("controlvector", {"direction.one": row}, "direction.one"),
        ("controlvector", {"direction.1": row, "direction.2": row[:5]}, "one width"),
        ("controlvector", {"direction.1": 0 * row}, "add anything"),
    ):
        with pytest.raises(UsageError, match=reason):
            rp.read_control_vector(written(architecture, tensors))


def test_plain_tensors_have_any_site_and_say_what_they_are(tiny_lm, tmp_path):
    lm = tiny_lm("llama")
    head = rp.Add(direction(lm, "attn.heads@1.2"), 3.0)
    path = rp.export(made(lm).then(head), tmp_path / "v.safetensors", format="tensors")
    found = load_file(path)
    assert set(found) == {"resid.post@1", "resid.pre@2", "resid.post@2", "attn.heads@1.2"}
    adds = [rp.Add(rp.Direction.from_vector(site, vector)) for site, vector in found.items()]
    require_same(logits(lm, *adds), logits(lm, made(lm), head))
    with safe_open(path, "numpy") as f:
        about = json.loads(f.metadata()["reprobe"])
    assert about["identity"] == lm.identity.to_json()
    assert "counted from 0" in about["sites"]


def test_the_layout_of_steering_vectors_is_a_tensor_per_block(tiny_lm, tmp_path):
    lm = tiny_lm("llama")
    path = rp.export(made(lm), tmp_path / "v.safetensors", format="steering-vectors")
    found = load_file(path)
    assert {int(block) for block in found} == {1, 2}
    for block, vector in wanted(lm).items():
        assert np.array_equal(found[str(block)], vector.astype(np.float32))
    with safe_open(path, "numpy") as f:
        assert f.metadata() == {"layer_type": "decoder_block"}


def test_the_layout_of_vllm_lens_is_its_json(tiny_lm, tmp_path):
    lm = tiny_lm("llama")
    value = json.loads(rp.export(made(lm), tmp_path / "v.json", format="vllm-lens").read_text())
    rows = value["activations"]
    found = np.frombuffer(base64.b64decode(rows["data"]), rows["dtype"]).reshape(rows["shape"])
    assert value["layer_indices"] == [1, 2]
    assert (value["scale"], value["norm_match"]) == (1.0, False)
    assert np.array_equal(found, np.stack([v for _, v in sorted(wanted(lm).items())]).astype(np.float32))


# -- the programs themselves ---------------------------------------------------------------------------------------


def installed(name, how="uv run --group bench pytest has it"):
    return pytest.importorskip(name, reason=f"{name} is not installed ({how})")


def test_repeng_reads_the_file_and_steers_the_same(tiny_lm, tmp_path, monkeypatch):
    monkeypatch.setattr(np, "float_", np.float64, raising=False)  # repeng 0.4 uses this name of NumPy 1
    repeng = installed("repeng")
    lm = tiny_lm("llama")
    item = made(lm) + rp.Add(direction(lm, "resid.post@0", 8), 0.7)
    vector = repeng.ControlVector.import_gguf(rp.export(item, tmp_path / "v.gguf", format="repeng"))
    assert vector.model_type == "llama"
    assert vector == repeng.ControlVector.import_gguf(rp.export(item, tmp_path / "w.gguf", format="repeng"))
    steered = repeng.ControlModel(tiny_net("llama"), [0, 1, 2])
    steered.set_control(vector, 0.5)
    require_same(through(lm, steered), logits(lm, 0.5 * item))
    steered.set_control(repeng.ControlVector("llama", block_vectors(item)), -1.0)
    require_same(through(lm, steered), logits(lm, -1.0 * item))
    # And what repeng writes, we read.
    vector.export_gguf(tmp_path / "theirs.gguf")
    require_same(logits(lm, rp.read_control_vector(tmp_path / "theirs.gguf", format="repeng")), logits(lm, item))


def test_steering_vectors_reads_the_file_and_steers_the_same(tiny_lm, tmp_path):
    library = installed("steering_vectors")
    lm = tiny_lm("llama")
    path = rp.export(made(lm), tmp_path / "v.safetensors", format="steering-vectors")
    with safe_open(path, "pt") as f:
        layers = {int(name): f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 (a handle, not a dict)
        vector = library.SteeringVector(layers, layer_type=f.metadata()["layer_type"])
    net = tiny_net("llama")
    with vector.apply(net, multiplier=0.5):
        require_same(through(lm, net), logits(lm, 0.5 * made(lm)))


def test_vllm_lens_reads_the_file(tiny_lm, tmp_path):
    library = installed("vllm_lens", "pip install --no-deps vllm-lens is enough")
    lm = tiny_lm("llama")
    text = rp.export(made(lm), tmp_path / "v.json", format="vllm-lens").read_text()
    vector = library.SteeringVector.model_validate_json(text)
    assert vector.layer_indices == [1, 2]
    want = torch.from_numpy(np.stack([v for _, v in sorted(wanted(lm).items())])).float()
    assert torch.equal(vector.activations, want)


def test_the_files_do_what_they_say_on_a_plain_network(tmp_path):
    """Without any of these programs: the vector of block N added to the output of transformers' N-th layer."""
    lm = tiny_model("gpt2")
    lm.net.save_pretrained(tmp_path / "model")
    net = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    found = load_file(rp.export(made(lm), tmp_path / "v.safetensors", format="steering-vectors"))
    for block, vector in found.items():
        net.transformer.h[int(block)].register_forward_hook(lambda module, args, out, v=vector: out + torch.tensor(v))
    require_same(through(lm, net), logits(lm, made(lm)))
