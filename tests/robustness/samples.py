"""One valid file of every kind that reprobe reads, and how each is read: the rows of the table in `test_readers`.

`write(folder)` makes the file, or the folder, in an empty folder and names the files in it that may be damaged.
`read(path)` reads all there is: what is only looked at later is looked at here.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from model import test_gguf
from report import synthetic as results
from robustness import mutations as m
from robustness.mutations import Mutation
from safetensors.torch import save_file
from store import synthetic
from tiny import tiny_model

import reprobe as rp
from reprobe.cli import recipe, recipe_steps
from reprobe.control import EditEffect, edits_in, export_edited, ledger_of, read_control_vector
from reprobe.control.adapters import Adapter, Factors
from reprobe.control.edited_model import read_record
from reprobe.control.edits import Matrix
from reprobe.extraction import VllmFiles
from reprobe.methods import moments
from reprobe.methods.concepts import Concept
from reprobe.methods.dissected import Dissection
from reprobe.methods.dissection import dissect
from reprobe.methods.tracing import Settings, Trace, TraceGrid
from reprobe.model import gguf
from reprobe.probing import Comparison, LDAReader, MeanDifference, ProbeGrid, compare, probe, write_table
from reprobe.probing.sharing import load
from reprobe.prompts import facts_of
from reprobe.provenance import digest, digest_file
from reprobe.report import read_run, read_scan, read_steering, write_run, write_scan, write_steering
from reprobe.report.measured import read_measured
from reprobe.store import ActivationStore, verify
from reprobe.store.sealed import seal

#: What is done to files of a format besides damage.
ARTIFACT = (*m.DAMAGE, m.odd_header, m.forged, m.misplaced)
JSON = (*m.DAMAGE, m.odd_json_file)
JSONL = (*m.DAMAGE, m.odd_json_line)


@dataclass(frozen=True)
class Sample:
    """A kind of file: how one is made, read, and mutated.

    `file` is the one of a folder that is mutated; `sign` then makes the folder's checksums fit again. `caches` where
    reading writes to the cache, and nowhere else; `costly` where it takes tens of milliseconds.
    """

    name: str
    write: Callable[[Path], Path]
    read: Callable[[Path], object]
    mutations: tuple[Mutation, ...]
    file: str | None = None
    sign: Callable[[Path], None] | None = None
    caches: bool = False
    costly: bool = False


@cache
def lm() -> rp.LanguageModel:
    return tiny_model()


def direction(seed: int = 0, site: str = "resid.post@1") -> rp.Direction:
    v = np.random.default_rng(seed).normal(size=lm().d_model)
    return rp.Direction.from_vector(site, v, scale=2.0, offset=0.1, identity=lm().identity)


FACT = rp.Fact.of(subject="the cat", prompt="it is {} on the", new="roof", true="mat")

# -- artifacts -----------------------------------------------------------------------------------------------------


def write_direction(folder: Path) -> Path:
    return direction().save(folder / "direction.safetensors")


def read_direction(path: Path) -> object:
    d = rp.Direction.load(path)
    return repr(d), d.score(np.zeros((2, d.width))), d.identity, d.to_json()


@cache
def _grid_parts() -> tuple[ProbeGrid, Comparison]:
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        store = results.make_store(Path(name) / "s.reprobe", rows=40, layers=2)
        grid = probe(store, MeanDifference(), folds=3)
        return grid, compare(store, {"a": MeanDifference(), "b": LDAReader()}, sites="resid.post@*", folds=3)


def write_grid(folder: Path) -> Path:
    return _grid_parts()[0].save(folder / "grid.safetensors")


def read_grid(path: Path) -> object:
    grid = ProbeGrid.load(path)
    return grid.best(), grid.selected, grid.sites, grid.best("auroc", part=grid.sites[0].part)


def write_comparison(folder: Path) -> Path:
    return _grid_parts()[1].save(folder / "comparison.safetensors")


def read_comparison(path: Path) -> object:
    found = Comparison.load(path)
    return found.choices, found.differences, found.readers


def write_steering_file(folder: Path) -> Path:
    d, width, rng = direction(), lm().d_model, np.random.default_rng(0)
    gate = rp.When(direction(1, "resid.post@0"), above=-3.0, below=9.0, at="prompt", over="positions:1:")
    made = rp.Steering(
        rp.Add(d, [0.5, -2.0], unit="norm", tokens="span:who", when=gate),
        rp.Clamp(d, low=-1.0, unit="raw", strength=0.5),
        rp.Scale("attn.heads@1.2", 0.0),
        rp.Replace(rng.normal(size=(2, 3, width)), site="mlp.out@0", align="end", identity=lm().identity),
        rp.Noise(0.2, site="embed", seed=(3, 4), unit="norm"),
        rp.Affine(0.9 * np.eye(width), rng.normal(size=width), site="resid.post@1", tokens="prompt"),
        rp.LowRank(rng.normal(size=(width, 2)), rng.normal(size=(width, 2)), [0.1, 0.2], site="resid.post@1"),
        name="some",
        provenance={"k": [1, 2]},
    )
    return made.save(folder / "steering.safetensors")


def read_steering_file(path: Path) -> object:
    found = rp.Steering.load(path)
    return str(found), [str(i) for i in found.interventions], 0.5 * found if len(found) else None


def _edit(layer: int = 1) -> rp.WeightEdit:
    matrix = Matrix.projection(lm(), layer)
    outputs, inputs = matrix.values.shape
    rng = np.random.default_rng(layer)
    return rp.WeightEdit(
        matrix.name,
        rng.normal(size=(outputs, 2)),
        rng.normal(size=(inputs, 2)),
        lm().identity,
        facts=(FACT,),
        effects=(EditEffect(0.1, 0.9),),
        provenance={"method": "by hand"},
    )


def write_edit(folder: Path) -> Path:
    _edit().save(folder / "edit.safetensors")
    return folder / "edit.safetensors"


def read_edit(path: Path) -> object:
    (edit,) = edits_in(path)
    return edit.digest, edit.norm, edit.rank, [e.found for e in edit.effects]


def write_trace(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    settings = Settings(samples=2, window=3)
    traces = tuple(
        Trace(FACT, ("it", " is", " the", " cat", " on", " the"), (2, 4), 0.9, 0.1, rng.random((3, 2, 6)))
        for _ in range(2)
    )
    return TraceGrid(traces, settings, (0, 1), 0.3, {"model": "tiny"}).save(folder / "trace.safetensors")


def read_trace(path: Path) -> object:
    grid = TraceGrid.load(path)
    return grid.table, grid.facts, grid.averages, grid.totals


def write_dissection_file(folder: Path) -> Path:
    texts = ["the cat is on the red mat and a dog", "a blue dog is the cat of seven", "red and blue and the red cat"]
    concepts = [Concept.words("colours", ["red", "blue"]), Concept.words("the", ["the"])]
    found = dissect(lm(), texts * 3, concepts, ["mlp.neurons@1", "resid.post@0"], quantile=0.1, permutations=2)
    return found.save(folder / "dissection.safetensors")


def read_dissection_file(path: Path) -> object:
    found = Dissection.load(path)
    return found.units, found.concepts, found.layers, found.chance, [found.snippets(u) for u in range(0, found.n, 7)]


def write_moment(folder: Path) -> Path:
    site = rp.Site.parse("mlp.neurons@1")
    moment = moments.SecondMoment(site, 7, np.eye(lm().width(site)), {"corpus": "x"}, "moment")
    moments._keep(folder / "moment.safetensors", moment)
    return folder / "moment.safetensors"


def read_moment(path: Path) -> object:
    found = moments._read(path)
    return found and (found.width, found.site, found.text)


def write_edited(folder: Path) -> Path:
    fresh = tiny_model()
    ledger_of(fresh).apply([_edit()])
    return export_edited(fresh, folder / "edited")


def write_adapter(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 16, "target_modules": ["q_proj"]}
    factors = {"model.layers.0.self_attn.q_proj": Factors(rng.normal(size=(2, 27)), rng.normal(size=(36, 2)))}
    return Adapter(config, factors, lm().identity, losses=(1.0, 0.5), provenance={"k": 1}).save(folder / "adapter")


def sign_adapter(path: Path) -> None:
    record = json.loads((path / "reprobe.json").read_bytes())
    record["sha256"] = {name: digest_file(path / name) for name in record["sha256"]}
    (path / "reprobe.json").write_text(json.dumps(record))


# -- other programs' files -----------------------------------------------------------------------------------------


def write_control_vector(folder: Path) -> Path:
    return rp.export(rp.Steering(rp.Add(direction())), folder / "vector.gguf")


def read_vector(path: Path) -> object:
    return [str(i) for i in read_control_vector(path).interventions]


def write_vllm(folder: Path) -> Path:
    place = folder / "vllm"
    place.mkdir()
    for i in range(2):
        tensors = {"hidden_states": torch.randn(4, 2, 27), "token_ids": torch.tensor([5, 6, 7, 8 + i])}
        save_file(tensors, place / f"r{i}.safetensors")
    return place


# -- stores --------------------------------------------------------------------------------------------------------


def write_store(format_: str, compression: str | None = None) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        synthetic.fill(synthetic.create(folder / "s.reprobe", format=format_, compression=compression))
        return folder / "s.reprobe"

    return write


def read_store(path: Path) -> object:
    verify(path)
    store = ActivationStore.open(path)
    told = store.info(), store.manifest.sites_text, store.index, store.tokens, store.parts
    rows = store.where(pl.col("label") == 1)
    for site in store.sites:
        store.read(site, rows)
    return told, list(store.iter(store.sites, batch_rows=5, shuffle=1))


def sign_store(path: Path) -> None:
    """The digests of files in the manifest, of files and manifest in the commit records, and of both in themselves."""
    manifest = {k: v for k, v in json.loads((path / "manifest.json").read_bytes()).items() if k != "digest"}
    manifest["files"] = {name: digest_file(path / name) for name in manifest["files"]}
    (path / "manifest.json").write_bytes(seal(manifest))
    for record in (path / "commits").iterdir():
        body = {k: v for k, v in json.loads(record.read_bytes()).items() if k != "digest"}
        files = {n: {"sha256": digest_file(path / n), "bytes": (path / n).stat().st_size} for n in body["files"]}
        record.write_bytes(seal(body | {"manifest": digest(manifest), "files": files}))


# -- models --------------------------------------------------------------------------------------------------------


def write_model(folder: Path) -> Path:
    lm().net.save_pretrained(folder / "model")
    lm().tokenizer.save_pretrained(folder / "model")
    return folder / "model"


def write_gguf(folder: Path) -> Path:
    model = test_gguf.tiny("llama")
    return test_gguf.write(folder / "tiny.gguf", model, test_gguf.randomised(model.config))


def read_model(path: Path) -> object:
    found = rp.LanguageModel.load(path)
    return found.identity, found.logits("the cat")


# -- results -------------------------------------------------------------------------------------------------------


def write_results_scan(folder: Path) -> Path:
    return write_scan(folder, "capitals", results.make_scan("Paris is the capital"))


def write_results_steering(folder: Path) -> Path:
    return write_steering(folder, "happiness", results.make_steering())


def write_measured(table: Callable[[], pl.DataFrame], name: str) -> Callable[[Path], Path]:
    about = {"model": results.IDENTITY.to_json(), "interventions": ["Add"]} if name.endswith("json") else None
    return lambda folder: write_table(table(), folder / name, about=about)


def write_results_run(folder: Path) -> Path:
    run = rp.report.Run("Truth", (rp.report.Step("load", 3.4),), results.IDENTITY, {"python": "3"}, ("ls",), ("x",))
    return write_run(folder, run)


# -- prompts -------------------------------------------------------------------------------------------------------

TABLE = [
    {"id": "a", "text": "The cat sat.", "label": 1, "group": "g", "pair": "p", "spans": {"who": [4, 7]}, "n": 1.5},
    {"id": "b", "text": "A cat sat on the mat.", "label": 0, "group": "g", "pair": "p", "spans": {"who": [2, 5]}},
]
CHATS = [{"id": "c", "messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi there"}]}]
KNOWN = [
    {
        "known_id": 7,
        "subject": "Ada Byron",
        "attribute": "London",
        "template": "{} was born in",
        "prediction": " London, in 1815",
        "prompt": "Ada Byron was born in the city of",
        "relation_id": "P19",
    }
]
COUNTERFACT = [
    {
        "case_id": 3,
        "requested_rewrite": {
            "prompt": "{} was born in",
            "relation_id": "P19",
            "target_new": {"str": "Oslo", "id": "Q1"},
            "target_true": {"str": "London", "id": "Q2"},
            "subject": "Ada Byron",
        },
        "paraphrase_prompts": ["It rained. Ada Byron is from"],
        "neighborhood_prompts": ["Mary Godwin was born in"],
        "generation_prompts": ["Ada Byron's friends"],
    }
]
FLAT = [
    {
        "case_id": 3,
        "prompt": "Ada Byron was born in",
        "target_new": "Oslo",
        "subject": "Ada Byron",
        "ground_truth": "London",
        "rephrase_prompt": "It rained. Ada Byron is from",
        "locality_prompt": "Mary Godwin was born in",
        "locality_ground_truth": "London",
    }
]
RELATION = {
    "name": "born in",
    "prompt_templates": ["{} was born in", "The birthplace of {} is"],
    "samples": [{"subject": "Ada Byron", "object": "London"}, {"subject": "Edvard Munch", "object": "Adalsbruk"}],
}
PERSONA = [
    {"question": "Do you agree?", "statement": "agree", "answer_matching_behavior": " Yes",
     "answer_not_matching_behavior": " No"}
]  # fmt: skip
CHOICES = [{"question": "Why?", "mc1_targets": {"So.": 1, "Not.": 0}, "mc2_targets": {"So.": 1, "Not.": 0}}]
EMOTIONS = ["The door opens.", "The sun is up."]
STATEMENTS = "statement,label,city\nParis is in France.,1,Paris\nParis is in Peru.,0,Paris\n"
TRUTHFULQA = (
    "Type,Question,Best Answer,Correct Answers,Incorrect Answers\nA,Why?,So,So; Because,Not; Never\n"
    'B,"Who, now?",Me,Me,You; They\n'
)
CSV = 'id,text,label,spans\n1,The cat,0,"{""who"": [4, 7]}"\n2,A dog,1,\n'


def write_json(value: Any, name: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = folder / name
        lines = "\n".join(map(json.dumps, value)) if name.endswith("l") else json.dumps(value)
        path.write_text(lines)
        return path

    return write


def write_recipe(folder: Path) -> Path:
    return Path(shutil.copy(recipe.find("mood"), folder / "recipe.toml"))


def write_record(folder: Path) -> Path:
    finished = {"extract.a": {"files": {"a.reprobe": "0" * 64}, "seconds": 1.5}}
    about = {"recipe": "0" * 64, "model": lm().identity.to_json(), "data": {"cities": "1" * 64}}
    record = about | {"versions": {"torch": "2"}, "finished": finished}
    (folder / "recipe.json").write_text(json.dumps(record))
    return folder / "recipe.json"


def write_text(text: str, name: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).write_text(text)
        return folder / name

    return write


def write_parquet(folder: Path) -> Path:
    rp.PromptSet.load(write_json(TABLE, "t.jsonl")(folder)).frame.write_parquet(folder / "prompts.parquet")
    return folder / "prompts.parquet"


def read_prompts(path: Path) -> object:
    data = rp.PromptSet.load(str(path))
    return data.frame.to_dicts(), data.digest, data.describe(), data.has_groups


def read_facts(path: Path) -> object:
    return read_prompts(path), facts_of(str(path))


def odd_frame(data: bytes, rng: Any) -> bytes:
    """A parquet file whose columns have other types, are lost, or hold nulls."""
    import io

    frame = pl.read_parquet(io.BytesIO(data))
    name = rng.choice(frame.columns)
    match rng.randrange(5):
        case 0:
            frame = frame.drop(name)
        case 1:
            frame = frame.with_columns(pl.lit(None).alias(name))
        case 2:
            kind = rng.choice(
                (pl.Binary, pl.Object, pl.List(pl.Int8), pl.Date, pl.Float64, pl.Decimal(10, 2), pl.Duration)
            )
            frame = frame.with_columns(pl.Series(name, [None] * frame.height, dtype=pl.Null).cast(kind, strict=False))
        case 3:
            odd = rng.choice(([b"\xff\xfe"], [float("nan")], [2**62], [[1]], [{"a": 1}], [""], [True]))
            frame = frame.with_columns(pl.Series(name, odd * frame.height))
        case _:
            frame = frame.head(0)
    out = io.BytesIO()
    try:
        frame.write_parquet(out)
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException):
        return data[:-1]
    return out.getvalue()


def corpus(path: Path) -> object:
    return moments.Corpus.load(path).texts


EVERY: tuple[Sample, ...] = (
    Sample("direction", write_direction, read_direction, ARTIFACT),
    Sample("direction or grid", write_grid, lambda p: repr(load(p)), ARTIFACT),
    Sample("grid", write_grid, read_grid, ARTIFACT),
    Sample("comparison", write_comparison, read_comparison, ARTIFACT),
    Sample("steering", write_steering_file, read_steering_file, ARTIFACT),
    Sample("edit", write_edit, read_edit, ARTIFACT),
    Sample("trace", write_trace, read_trace, ARTIFACT),
    Sample("dissection", write_dissection_file, read_dissection_file, ARTIFACT),
    Sample("moment", write_moment, read_moment, ARTIFACT),
    *(
        Sample(f"adapter's {file}", write_adapter, Adapter.load, mutations, file, sign)
        for file, mutations, sign in (
            ("reprobe.json", JSON, None),
            ("adapter_config.json", JSON, sign_adapter),
            ("adapter_model.safetensors", (*m.DAMAGE, m.odd_header), sign_adapter),
        )
    ),
    Sample("edited model", write_edited, read_record, JSON, "reprobe-edits/edits.json"),
    Sample(
        "edited model's originals",
        write_edited,
        read_record,
        (*m.DAMAGE, m.odd_header),
        "reprobe-edits/originals.safetensors",
    ),
    Sample("control vector", write_control_vector, read_vector, (*m.DAMAGE, m.in_head)),
    Sample("vllm", write_vllm, VllmFiles.scan, (*m.DAMAGE, m.odd_header), "r0.safetensors"),
    Sample("scan", write_results_scan, read_scan, JSON),
    Sample("dose-response", write_results_steering, read_steering, JSON),
    Sample("table.json", write_measured(results.choices, "t.json"), read_measured, JSON, costly=True),
    Sample("table.csv", write_measured(results.side_effects, "t.csv"), read_measured, m.DAMAGE),
    Sample("table.parquet", write_measured(results.doses, "t.parquet"), read_measured, (*m.DAMAGE, odd_frame)),
    Sample("run", write_results_run, lambda p: read_run(p.parent), JSON),
    Sample("transfer table", write_measured(results.transfers, "t.json"), read_measured, JSON),
    Sample("recipe", write_recipe, recipe.read, (*m.DAMAGE, m.odd_toml)),
    Sample("recipe's record", write_record, recipe_steps.read_record, JSON),
    Sample("prompts.jsonl", write_json(TABLE, "t.jsonl"), read_prompts, JSONL),
    Sample("prompts.json", write_json(TABLE, "t.json"), read_prompts, JSON),
    Sample("chats.jsonl", write_json(CHATS, "t.jsonl"), read_prompts, JSONL),
    Sample("prompts.csv", write_text(CSV, "t.csv"), read_prompts, m.DAMAGE),
    Sample("prompts.parquet", write_parquet, read_prompts, (*m.DAMAGE, odd_frame)),
    Sample("known facts", write_json(KNOWN, "t.json"), read_facts, JSON),
    Sample("counterfact", write_json(COUNTERFACT, "t.json"), read_facts, JSON),
    Sample("counterfact, flat", write_json(FLAT, "t.json"), read_facts, JSON),
    Sample("relations", write_json(RELATION, "t.json"), read_facts, JSON),
    Sample("persona", write_json(PERSONA, "t.jsonl"), read_prompts, JSONL),
    Sample("truthfulqa, choices", write_json(CHOICES, "t.json"), read_prompts, JSON),
    Sample("emotions", write_json(EMOTIONS, "t.json"), read_prompts, JSON),
    Sample("statements", write_text(STATEMENTS, "t.csv"), read_prompts, m.DAMAGE),
    Sample("truthfulqa", write_text(TRUTHFULQA, "t.csv"), read_prompts, m.DAMAGE),
    *(
        Sample(f"{form} store's {file}", write_store(form, compression), read_store, mutations, file, sign, costly=True)
        for form, compression, files in (
            ("zarr", None, ("activations.zarr/attn.heads-1/zarr.json", "activations.zarr/attn.heads-1/c.0.0")),
            ("hdf5", "zstd", ("activations-00001.h5",)),
        )
        for file, mutations, sign in (
            ("manifest.json", (*m.DAMAGE, m.odd_sealed), None),
            ("commits/00001.json", (*m.DAMAGE, m.odd_sealed), None),
            ("index.parquet", (*m.DAMAGE, odd_frame), sign_store),
            ("tokens.parquet", (m.flip, m.enlarge, odd_frame), sign_store),
            *((f, (*m.DAMAGE, m.odd_json_file) if f.endswith("json") else m.DAMAGE, sign_store) for f in files),
        )
    ),
    Sample("model's config", write_model, read_model, (m.flip, m.odd_json_file), "config.json", costly=True),
    Sample("model's tokenizer", write_model, read_model, (m.flip, m.odd_json_file), "tokenizer.json", costly=True),
    Sample("model's weights", write_model, read_model, (m.flip, m.odd_header), "model.safetensors", costly=True),
    Sample("gguf model", write_gguf, gguf.convert, (m.in_head, m.truncate, m.flip), caches=True, costly=True),
    Sample("text", write_text("Some text. é\nMore of it.\n", "t.txt"), corpus, m.DAMAGE),
)
