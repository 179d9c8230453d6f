"""`reprobe run` as a user meets it: recipes on a small model in a folder, wrong ones first."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
from cli.calling import called
from tiny import save_tiny

import reprobe as rp
from reprobe.cli import recipe as recipes
from reprobe.cli.recipe_steps import STEPS
from reprobe.report import read_steering

STUDY = """
title = "Study"
[model]
name = "model"
[extract.words]
data = "prompts.jsonl"
sites = "resid.post@*"
[probe.the]
store = "words"
reader = "mean-difference"
folds = 4
[compare.readers]
store = "words"
readers = ["mean-difference", "lda"]
folds = 4
[scan.short]
probe = "the"
text = "the end"
[steer.more]
probe = "the"
part = "resid.post"
strengths = [-1, 1]
prompts = ["the end"]
positive = ["the"]
negative = ["and"]
neutral = ["of the end"]
max_new_tokens = 2
[side-effects.more]
probe = "the"
strength = 2
unrelated = "none"
max_new_tokens = 0
[multiple-choice.more]
data = "questions.jsonl"
probe = "the"
strength = 2
[trace.known]
data = "known.json"
unknown = "keep"
samples = 2
window = 3
kinds = ["mlp.out"]
[edit.cat]
subject = "cat"
prompt = "the {} is on the"
target = "mat"
layer = 1
text = "text.txt"
[dissect.neurons]
data = "text.txt"
concepts = "months, pronouns"
drop_absent = true
quantile = 0.02
permutations = 2
window = 32
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REPROBE_CACHE", str(path / "cache"))
        save_tiny(path / "model", max_position_embeddings=2048)
        rows = [
            {
                "id": f"p{i}",
                "text": f"{'the' if i % 2 else 'and'} thing {i // 2}",
                "label": i % 2,
                "group": f"g{i // 2}",
            }
            for i in range(24)
        ]
        (path / "prompts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        fact = {"known_id": 1, "subject": "a cat", "attribute": "mat", "template": "{} is on the",
                "prompt": "a cat is on the", "prediction": " mat", "relation_id": "P1"}  # fmt: skip
        (path / "known.json").write_text(json.dumps([fact]))
        answers = [
            {"id": f"q{i}-{a}", "text": f"Q: is it {i}? A: {a}", "question": f"is it {i}?", "answer": str(a),
             "label": int(i == a), "group": f"q{i}", "best": i == a}
            for i in range(2) for a in range(2)
        ]  # fmt: skip
        (path / "questions.jsonl").write_text("".join(json.dumps(a) + "\n" for a in answers))
        (path / "text.txt").write_text("In May I saw her; she gave me a cat in March and it is on the mat. " * 20)
        (path / "study.toml").write_text(STUDY)
        yield path


@pytest.fixture
def run(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    return partial(called, "run")


def only(*kinds: str) -> str:
    """The study, with these kinds of steps."""
    head, *sections = STUDY.split("\n[")
    return "\n[".join([head, *(s for s in sections if s.split(".")[0].rstrip("]").split("]")[0] in ("model", *kinds))])


@pytest.mark.filterwarnings("ignore:.*have no effect")
def test_every_kind_of_step_runs_and_a_second_run_has_the_same_results(run, folder):
    assert set(STEPS) == set(recipes.KINDS)
    first = run(folder / "study.toml", "--out", "one", "--json")
    assert "not in the report" not in first.stderr
    told = json.loads(first.stdout)
    one, two = Path("one"), Path("two")
    assert (one / "recipe.toml").read_text() == STUDY
    record = json.loads((one / "recipe.json").read_text())
    kinds = {name.split(".")[0] for name in record["finished"]}
    assert kinds == set(recipes.KINDS)
    assert record["digest"] == told["digest"]
    assert record["model"] == rp.LanguageModel.load(folder / "model").identity.to_json()
    assert record["data"]["prompts.jsonl"] == rp.PromptSet.load(folder / "prompts.jsonl").digest
    direction = rp.Direction.load(one / "directions" / "the.safetensors")
    assert direction == rp.ProbeGrid.load(one / "probes" / "the.safetensors").best()
    page = (one / "report.html").read_text()
    assert "Study" in page
    assert told["digest"][:12] in page
    again = json.loads(run(folder / "study.toml", "--out", "two", "--json").stdout)
    assert (again["digest"], again["results"]) == (told["digest"], told["results"])
    for name in record["finished"]["steer.more"]["files"]:
        assert (one / name).read_bytes() == (two / name).read_bytes()


def test_a_grid_of_two_folds_has_its_sentence_too(run, folder):
    (folder / "two.toml").write_text(only("extract", "probe").replace("folds = 4", "folds = 2"))
    (line,) = json.loads(run(folder / "two.toml", "--json").stdout)["summary"]
    assert line.startswith("the: best site resid.post@")
    assert "24 rows, 12 groups" in line


def test_steering_of_generated_tokens_has_a_price_on_neutral_text(run, folder):
    study = only("extract", "probe", "steer").replace('part = "resid.post"', 'tokens = "generated"')
    (folder / "generated.toml").write_text(study)
    run(folder / "generated.toml")
    kept = read_steering(Path("generated") / "steering" / "more.json")
    assert kept.neutral == ("of the end",)
    assert kept.table["kl"].min() > 0


def test_finished_steps_are_verified_and_the_others_done_on_resume(run, folder, tmp_path):
    (tmp_path / "r.toml").write_text(only("extract", "probe", "scan"))
    for name in ("model", "prompts.jsonl"):
        (tmp_path / name).symlink_to(folder / name)
    whole = json.loads(run("r.toml", "--json").stdout)
    assert "--resume" in run("r.toml", code=2).stderr
    record = json.loads((tmp_path / "r" / "recipe.json").read_text())
    del record["finished"]["scan.short"]  # as a run that was interrupted there leaves it
    (tmp_path / "r" / "recipe.json").write_text(json.dumps(record))
    went_on = run("r.toml", "--resume", "--json")
    assert "probe.the: finished before" in went_on.stderr
    assert "scan.short …" in went_on.stderr
    assert json.loads(went_on.stdout)["results"] == whole["results"]
    grid = tmp_path / "r" / "probes" / "the.safetensors"
    grid.write_bytes(grid.read_bytes()[:-1])
    assert "the.safetensors, of the finished step probe.the" in run("r.toml", "--resume", code=1).stderr


def test_what_another_recipe_or_other_data_made_is_not_gone_on_with(run, folder, tmp_path):
    shutil.copytree(folder / "model", tmp_path / "model")
    shutil.copy(folder / "prompts.jsonl", tmp_path / "prompts.jsonl")
    (tmp_path / "r.toml").write_text(only("extract"))
    run("r.toml")
    (tmp_path / "r.toml").write_text(only("extract") + "\n# a comment changes nothing\n")
    run("r.toml", "--resume")
    text = (tmp_path / "prompts.jsonl").read_text()
    (tmp_path / "prompts.jsonl").write_text(text.replace("thing 3", "thing 333"))
    assert "data prompts.jsonl" in run("r.toml", "--resume", code=2).stderr
    (tmp_path / "r.toml").write_text(only("extract", "probe"))
    assert "another recipe" in run("r.toml", "--resume", code=2).stderr
    (tmp_path / "r" / "recipe.json").write_text('{"recipe": 3}')
    assert "recipe.json is damaged" in run("r.toml", "--resume", code=1).stderr
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("")
    assert "holds no run" in run("r.toml", "--out", "full", "--resume", code=2).stderr


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[model", "is no TOML"),
        ("", "has no [model]"),
        ('model = "smollm2-135m"', "where [model] with keys is wanted"),
        ("[model]", "[model] lacks 'name': text"),
        ('[model]\nname = "m"', "has no steps"),
        (
            '[model]\nname = "m"\ndtyp = "float32"',
            "no key 'dtyp' (did you mean 'dtype'?); there are dtype, name, revision",
        ),
        ('[model]\nname = "m"\ndtype = "int8"', "[model] dtype = 'int8', where one of float32, float16, bfloat16 is"),
        ('[model]\nname = "m"\n[extrac.a]\ndata = "x"', "no steps 'extrac' (did you mean 'extract'?)"),
        ('[model]\nname = "m"\n[extract]\ndata = "x"', "[extract.NAME]"),
        ('[model]\nname = "m"\n[extract.a]\n', "[extract.a] lacks 'data'"),
        ('[model]\nname = "m"\n[extract.a]\ndata = "x"\nlimit = 0', "limit = 0, where a whole number, 1 or more"),
        ('[model]\nname = "m"\n[extract.a]\ndata = "x"\nlimit = true', "limit = True, where a whole number"),
        ('[model]\nname = "m"\n[extract.a]\ndata = 2026-01-01', "is no value for any key"),
        (
            '[model]\nname = "m"\n[extract.a]\ndata = "x"\n[probe.b]\nstore = "aa"',
            "no [extract.aa] (did you mean 'a'?)",
        ),
        ('[model]\nname = "m"\n[probe.b]\nstore = "a"', "no [extract.a] and no extract at all"),
        ('[model]\nname = "m"\n[extract.a]\ndata = "x"\n[probe.b]\nstore = "a"\nreader = "ldaa"', "reader = 'ldaa'"),
        (STUDY.replace("[-1, 1]", "[-1, nan]"), "nan is no value"),
        (STUDY.replace("[-1, 1]", '[-1, "1"]'), "strengths = [-1, '1'], where a list, each of it a finite number"),
        (STUDY.replace("[probe.the]", '[probe."../the"]').replace('"the"\n', '"../the"\n'), "cannot name a result"),
        (STUDY.replace('sites = "resid.post@*"', 'sites = "resid.post@9"'), "[extract.words]: 'resid.post@9'"),
        (STUDY.replace('part = "resid.post"', 'part = "resid"'), "[steer.more]: unknown part 'resid'"),
        (STUDY.replace('part = "resid.post"', 'tokens = "some"'), "[steer.more]: unknown scope 'some'"),
        (STUDY.replace('["of the end"]', '["end"]'), "[steer.more]: 'end' has one word only"),
        (STUDY.replace("known.json", "unknown.json"), "there is no data set"),
    ],
)
def test_a_wrong_recipe_is_refused_before_anything_runs(run, folder, text, says):
    recipe = folder / "wrong.toml"
    recipe.write_text(text)
    assert says in run(recipe, "--out", "out", code=2).stderr
    assert not (folder / "out").exists()


def test_a_recipe_that_is_not_there_is_told_with_those_that_are(run):
    assert "did you mean 'mood'?" in run("moood", code=2).stderr
    assert "mood" in run("nothing.toml", code=2).stderr


def test_the_bundled_recipe_runs_on_any_model(run, folder):
    checked = json.loads(run("mood", "--dry-run", "--json").stdout)
    assert checked["steps"] == ["extract.scenes", "probe.happiness", "scan.two-scenes", "steer.happier"]
    text = recipes.find("mood").read_text()
    for there, here in (
        ('"smollm2-135m"', '"model"'),
        ("resid.post@8:20", "resid.post@1:3"),
        ("limit = 160", "limit = 40"),
        ("max_new_tokens = 20", "max_new_tokens = 2"),
    ):
        assert text.count(there) == 1
        text = text.replace(there, here)
    (folder / "mood.toml").write_text(text)
    told = json.loads(run(folder / "mood.toml", "--json").stdout)
    assert told["folder"] == "mood"
    assert any("happier: from strength -4 to +4" in line for line in told["summary"])


def test_the_recipe_of_the_readme_is_one(run, tmp_path):
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    (tmp_path / "shown.toml").write_text(readme.split("```toml\n")[1].split("```")[0])
    assert "extract.scenes, probe.happiness" in run("shown.toml", "--dry-run").stdout
