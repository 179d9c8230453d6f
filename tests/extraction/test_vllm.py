"""What vLLM's hidden-states connector wrote becomes the store that extraction would have written.

The files are made here as the connector makes them (safetensors, `hidden_states` (tokens, layers, d_model) and
`token_ids` (tokens,) of int64, one per request, a lock beside each), with a tiny model in the place of vLLM.
"""

import fcntl

import pytest
import torch
from planting import TEXTS, prompts, site
from safetensors.torch import save_file
from tiny import LAYERS, VOCAB, tiny_model

import reprobe as rp
from reprobe.errors import (
    ArtifactExists,
    ArtifactMissing,
    CorruptArtifact,
    DataError,
    IdentityMismatch,
    UnsupportedOperation,
    UsageError,
)
from reprobe.extraction import VllmFiles
from reprobe.store import StoreWriter

IDS = (0, 2, 1, 3)  # vLLM keeps the order that it was configured with


def layer(lm, text_or_ids, i):
    """Layer i as vLLM numbers them: what enters block i, and of the last block what leaves it, before the norm."""
    ids = text_or_ids if isinstance(text_or_ids, list) else lm.tokenizer(text_or_ids)["input_ids"]
    blocks = lm.architecture.blocks(lm.net)
    seen = []
    if i < lm.n_layers:
        handle = blocks[i].register_forward_pre_hook(
            lambda m, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
    else:
        handle = blocks[-1].register_forward_hook(lambda m, args, out: seen.append(out))
    with torch.no_grad():
        lm.net(input_ids=torch.tensor([ids]))
    handle.remove()
    return seen[0][0]


def request(path, lm, text, layers=IDS, **changes):
    ids = lm.tokenizer(text)["input_ids"]
    states = torch.stack([layer(lm, ids, i) for i in layers], 1).contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"hidden_states": states, "token_ids": torch.tensor(ids)} | changes, path)
    path.with_name(path.name + ".lock").touch()


@pytest.fixture
def folder(tiny_lm, tmp_path):
    """One file per text of `TEXTS`: p0 … p6."""
    for i, text in enumerate(TEXTS):
        request(tmp_path / "hs" / f"p{i}.safetensors", tiny_lm("llama"), text)
    return tmp_path / "hs"


@pytest.mark.parametrize("at", ["last", "all", "mean", "index:1", "index:-2"])
def test_the_rows_are_those_that_extraction_reads_and_a_replay_passes(tiny_lm, folder, tmp_path, at):
    lm = tiny_lm("llama")
    store = rp.import_vllm(folder, lm, layers=IDS, at=at, data=prompts(), to=tmp_path / "s", shard_rows=4)
    want = rp.extract(lm, prompts(), sites="embed,resid.post@1,resid.post@0,resid.post@2", at=at, to=tmp_path / "w")
    assert store.sites == want.sites
    columns = ["prompt", "position", "token", "label", "group", "pair", "n_tokens"]
    a, b = (s.index.sort("prompt", "position") for s in (store, want))
    assert a.select(columns).equals(b.select(columns))
    for where in store.sites:
        assert torch.allclose(store.read(where, a["row"]), want.read(where, b["row"]), rtol=1e-4, atol=1e-5)
    result = rp.replay(store, lm)
    assert result.ok
    assert result.prompts == len(TEXTS)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_the_last_layer_is_the_last_blocks_output_before_the_final_norm(tiny_lm, tmp_path, family):
    lm = tiny_lm(family)
    request(tmp_path / "hs" / "a.safetensors", lm, TEXTS[0], layers=(LAYERS,))
    store = rp.import_vllm(tmp_path / "hs", lm, layers=[LAYERS], to=tmp_path / "s")
    assert store.sites == (site(f"resid.post@{LAYERS - 1}"),)
    assert rp.replay(store, lm).ok
    with torch.no_grad():
        ids = torch.tensor([lm.tokenizer(TEXTS[0])["input_ids"]])
        normed = lm.net(input_ids=ids, output_hidden_states=True).hidden_states[-1][0, -1]
    assert not torch.allclose(store.read(store.sites[0])[0], normed, rtol=0.1)


def test_layers_named_one_off_are_found_by_the_replay(tiny_lm, folder, tmp_path):
    lm = tiny_lm("llama")
    store = rp.import_vllm(folder, lm, layers=[1, 3, 2, 0], to=tmp_path / "s")
    told = {str(s.site): s.diagnosis for s in rp.replay(store, lm).failed}
    assert "'resid.post@1'" in told["resid.post@2"]


def test_requests_come_in_natural_order_and_without_data_each_is_its_own_group(tiny_lm, tmp_path):
    lm = tiny_lm("llama")
    for name in ("req-10", "req-9", "req-1"):
        request(tmp_path / "hs" / f"{name}.safetensors", lm, f"the {name}")
    store = rp.import_vllm(tmp_path / "hs", lm, layers=IDS, to=tmp_path / "s")
    assert store.tokens["prompt"].to_list() == ["req-1", "req-9", "req-10"]
    assert store.index["group"].to_list() == store.index["prompt"].to_list()
    assert store.index["label"].null_count() == 3
    assert store.tokens["tokens"].to_list() == [
        lm.tokenizer(f"the {name}")["input_ids"] for name in store.tokens["prompt"]
    ]
    plan = store.manifest.plan
    assert (plan["source"], plan["order"], plan["layers"]) == ("vllm", "files", list(IDS))


def test_bfloat16_is_kept_bit_for_bit_or_widened(tmp_path):
    lm = tiny_model("llama", dtype=torch.bfloat16)
    for i, text in enumerate(TEXTS):
        request(tmp_path / "hs" / f"p{i}.safetensors", lm, text)
    half = rp.import_vllm(tmp_path / "hs", lm, layers=IDS, to=tmp_path / "half")
    full = rp.import_vllm(tmp_path / "hs", lm, layers=IDS, dtype="float32", to=tmp_path / "full")
    want = torch.stack([layer(lm, t, 3)[-1] for t in TEXTS])
    assert half.manifest.dtype == "bfloat16"
    assert torch.equal(half.read("resid.post@2"), want)
    assert torch.equal(full.read("resid.post@2"), want.float())
    assert rp.replay(half, lm).ok


def test_an_interrupted_import_goes_on_and_another_is_not_resumed(tiny_lm, folder, tmp_path, monkeypatch):
    lm = tiny_lm("llama")
    whole = rp.import_vllm(folder, lm, layers=IDS, at="all", to=tmp_path / "whole", shard_rows=8)
    write = StoreWriter.write_shard

    def dies(self, number, values):
        if number == 3:
            raise KeyboardInterrupt
        write(self, number, values)

    monkeypatch.setattr(StoreWriter, "write_shard", dies)
    with pytest.raises(KeyboardInterrupt):
        rp.import_vllm(folder, lm, layers=IDS, at="all", to=tmp_path / "s", shard_rows=8)
    monkeypatch.undo()
    assert not rp.ActivationStore.open(tmp_path / "s").complete
    with pytest.raises(ArtifactExists, match="--resume"):
        rp.import_vllm(folder, lm, layers=IDS, at="all", to=tmp_path / "s", shard_rows=8)
    with pytest.raises(IdentityMismatch, match="layers"):
        rp.import_vllm(folder, lm, layers=[0, 1, 2, 3], at="all", to=tmp_path / "s", shard_rows=8, resume=True)
    done = rp.import_vllm(folder, lm, layers=IDS, at="all", to=tmp_path / "s", shard_rows=8, resume=True)
    assert done.manifest == whole.manifest
    for where in done.sites:
        assert torch.equal(done.read(where), whole.read(where))


@pytest.mark.parametrize(
    ("layers", "says"),
    [
        ([0, 1, 2], "names 3 layers, but the files"),
        ([0, 1, 2, 4], r"0 \(embed\) to 3"),
        ([0, 1, 2, -1], r"0 \(embed\) to 3"),
        ([0, 1, 1, 2], "each layer once"),
    ],
)
def test_layers_that_cannot_be_are_refused(tiny_lm, folder, tmp_path, layers, says):
    with pytest.raises(UsageError, match=says):
        rp.import_vllm(folder, tiny_lm("llama"), layers=layers, to=tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_files_of_another_model_or_precision_are_refused(tiny_lm, folder, tmp_path):
    with pytest.raises(UsageError, match="27 components, tiny-gpt2 has d_model 35"):
        rp.import_vllm(folder, tiny_lm("gpt2"), layers=IDS, to=tmp_path / "s")
    half = tiny_model("llama", dtype=torch.bfloat16)
    with pytest.raises(UsageError, match="load it with dtype='float32'"):
        rp.import_vllm(folder, half, layers=IDS, to=tmp_path / "s")
    with pytest.raises(UnsupportedOperation, match="encoder"):
        rp.import_vllm(folder, tiny_lm("bert"), layers=IDS, to=tmp_path / "s")
    with pytest.raises(UsageError, match="only tokens"):
        rp.import_vllm(folder, tiny_lm("llama"), layers=IDS, at="span:who:last", to=tmp_path / "s")
    with pytest.raises(DataError, match=r"index:9.*p1"):
        rp.import_vllm(folder, tiny_lm("llama"), layers=IDS, at="index:9", to=tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_tokens_outside_the_vocabulary_are_refused(tiny_lm, folder, tmp_path):
    lm = tiny_lm("llama")
    n = len(lm.tokenizer(TEXTS[3])["input_ids"])
    request(folder / "p3.safetensors", lm, TEXTS[3], token_ids=torch.full((n,), VOCAB))
    with pytest.raises(DataError, match=f"token {VOCAB} of p3"):
        rp.import_vllm(folder, lm, layers=IDS, to=tmp_path / "s")


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"hidden_states": torch.zeros(3, 4, 27)}, "no token_ids"),
        ({"weight": torch.zeros(3)}, "holds weight, but no hidden_states and no token_ids"),
        ({"hidden_states": torch.zeros(3, 27), "token_ids": torch.arange(3)}, r"shape \(3, 27\)"),
        ({"hidden_states": torch.zeros(4, 4, 27), "token_ids": torch.arange(3)}, r"\(4, 4, 27\) and token_ids \(3,\)"),
        ({"hidden_states": torch.zeros(3, 4, 27).double(), "token_ids": torch.arange(3)}, "F64"),
        ({"hidden_states": torch.zeros(3, 4, 27), "token_ids": torch.zeros(3)}, "token_ids F32"),
        ({"hidden_states": torch.zeros(0, 4, 27), "token_ids": torch.arange(0)}, "embeddings"),
        ({"hidden_states": torch.zeros(3, 4, 27), "token_ids": torch.arange(3) - 1}, "no token ids"),
        ({"hidden_states": torch.zeros(3, 5, 27), "token_ids": torch.arange(3)}, "layers 4, but odd.safetensors has 5"),
        ({"hidden_states": torch.zeros(3, 4, 26), "token_ids": torch.arange(3)}, "components 27, but odd.safetensors"),
        ({"hidden_states": torch.zeros(3, 4, 27).half(), "token_ids": torch.arange(3)}, "dtype float32, but odd"),
    ],
)
def test_a_file_that_does_not_fit_the_others_is_named(folder, tensors, says):
    save_file(tensors, folder / "odd.safetensors")
    with pytest.raises(DataError, match=says) as raised:
        VllmFiles.scan(folder)
    assert "odd.safetensors" in str(raised.value)


def test_files_that_were_cut_off_are_named_together(folder):
    for name, keep in (("p2", 0), ("p4", 50), ("p5", -8)):
        path = folder / f"{name}.safetensors"
        path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CorruptArtifact, match=r"p2.safetensors, p4.safetensors, p5.safetensors"):
        VllmFiles.scan(folder)


def test_a_folder_that_is_being_written_is_left_alone(folder):
    with (folder / "p7.safetensors.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UsageError, match=r"still writing p7.safetensors.lock"):
            VllmFiles.scan(folder)
    assert len(VllmFiles.scan(folder).ids) == len(TEXTS)


def test_empty_folders_compressed_files_and_two_of_one_name_are_refused(folder, tmp_path):
    with pytest.raises(ArtifactMissing, match="is not a folder"):
        VllmFiles.scan(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtifactMissing, match=r"has no \.safetensors file"):
        VllmFiles.scan(tmp_path / "empty")
    (folder / "more").mkdir()
    (folder / "more" / "p1.safetensors").write_bytes((folder / "p1.safetensors").read_bytes())
    with pytest.raises(DataError, match="the name p1"):
        VllmFiles.scan(folder)
    (folder / "x.safetensors.zst").touch()
    with pytest.raises(DataError, match="decompress"):
        VllmFiles.scan(folder)


def test_prompts_and_files_that_do_not_belong_together_are_named(tiny_lm, folder, tmp_path):
    lm = tiny_lm("llama")
    with pytest.raises(DataError, match="no prompt with the id p5, p6"):
        rp.import_vllm(folder, lm, layers=IDS, data=prompts().head(5), to=tmp_path / "s")
    (folder / "p2.safetensors").unlink()
    with pytest.raises(DataError, match="no file for the prompts p2"):
        rp.import_vllm(folder, lm, layers=IDS, data=prompts(), to=tmp_path / "s")


def test_no_more_of_a_file_is_read_than_the_rows_need(tiny_lm, folder, tmp_path, monkeypatch):
    """Of a store of last tokens, one token per file: counted where the slices are taken."""
    from reprobe.extraction import vllm

    asked = []

    class Counting:
        def __init__(self, f):
            self._f = f

        def __enter__(self):
            self._inner = self._f.__enter__()
            return self

        def __exit__(self, *error):
            return self._f.__exit__(*error)

        def get_slice(self, name):
            inner = self._inner.get_slice(name)

            class Slice:
                def __getitem__(self, wanted):
                    asked.append(wanted.stop - wanted.start)
                    return inner[wanted]

            return Slice()

    scanned = VllmFiles.scan(folder)
    original = vllm.safe_open
    monkeypatch.setattr(vllm, "safe_open", lambda *args, **kwargs: Counting(original(*args, **kwargs)))
    rp.import_vllm(scanned, tiny_lm("llama"), layers=IDS, to=tmp_path / "s")
    assert asked == [1] * len(TEXTS)
