"""Dissection against sets and sorts written a second time, on tiny models; and what it refuses."""

import re

import numpy as np
import pytest
import torch
from tiny import tiny_net, tiny_tokenizer

import reprobe as rp
from reprobe.errors import ArtifactExists, CorruptArtifact, DataError, UnknownData, UnknownSite, UsageError
from reprobe.methods import overlap
from reprobe.methods.concepts import Concept, masks, ready
from reprobe.methods.concepts import _table as concepts_table
from reprobe.methods.dissected import Dissection
from reprobe.methods.dissection import dissect
from reprobe.methods.moments import Corpus
from reprobe.methods.stream import Document, token_stream
from reprobe.model.language_model import LanguageModel
from reprobe.model.text import special_ids

WORDS = ("the", "cat", "of", "red", "and", "seven", "Paris", "is", "on", "3", "(no)", "blue", "an", "is the", "e.g.")


def texts(n=60, seed=0):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, int(rng.integers(3, 30)))) for _ in range(n)]


CONCEPTS = (
    Concept.words("colours", ["red", "blue"]),
    Concept.words("the", ["the"]),
    Concept.regex("brackets", r"\([^)]*\)"),
    Concept.regex("inside", r"\((?P<it>[^)]*)\)"),
    Concept.words("phrase", ["is the", "cat of"]),
)


@pytest.fixture(scope="module")
def lm(tiny_lm):
    return tiny_lm("llama")


@pytest.fixture(scope="module")
def found(lm) -> Dissection:
    return dissect(lm, texts(), CONCEPTS, "mlp.neurons@*", quantile=0.02, permutations=7, window=16, snippets=4)


def naive(lm, found, site):
    """Values of every counted token at a site, (tokens, width), one row at a time, without hooks of ours."""
    stream, out = found.stream, []
    module = lm.net.model.layers[site.layer].mlp.down_proj
    for a, b in zip(stream.starts[:-1], stream.starts[1:], strict=True):
        kept = []
        handle = module.register_forward_pre_hook(lambda m, args, kept=kept: kept.append(args[0][0].detach()))
        with torch.no_grad():
            lm.net(input_ids=torch.from_numpy(stream.ids[None, a:b]), use_cache=False)
        handle.remove()
        out.append(kept[0].numpy()[stream.counted[a:b]])
    return np.concatenate(out)


def naive_tokens(stream, pattern, flags=0):
    """The counted tokens that share a character with a match, by Python's sets."""
    chosen = set()
    for i, t in enumerate(stream.places):
        characters = set(range(int(stream.begin[t]), int(stream.end[t])))
        text = stream.documents[int(stream.document[t])].text
        if any(characters & set(range(*m.span())) for m in re.finditer(pattern, text, flags)):
            chosen.add(i)
    return chosen


def test_thresholds_tops_and_ious_are_those_of_sorting_and_sets(lm, found):
    n = found.stream.n
    k = int(0.02 * n)
    sets = {
        "colours": naive_tokens(found.stream, r"\b(red|blue)\b"),
        "the": naive_tokens(found.stream, r"\bthe\b"),
        "brackets": naive_tokens(found.stream, r"\([^)]*\)"),
    }
    for reading in found.readings:
        values = naive(lm, found, reading.site)
        assert values.shape == (n, 23)
        for i in range(0, 23, 5):
            u = found.number(f"{reading.site}.{i}")
            ordered = np.sort(values[:, i])[::-1]
            assert found.threshold[u] == pytest.approx(ordered[k], rel=1e-4, abs=1e-5)
            top = set(np.flatnonzero(values[:, i] > ordered[k] + 1e-5).tolist())
            lines = {line["concept"]: line for line in found.of_unit(u).iter_rows(named=True)}
            for name, concept in sets.items():
                # Values of equal beginnings differ in their last bits between the two ways of running.
                assert abs(lines[name]["iou"] - len(top & concept) / len(top | concept)) < 2 / k
            assert found.mean[u] == pytest.approx(values[:, i].mean(), abs=1e-5)
            assert found.sd[u] == pytest.approx(values[:, i].std(), rel=1e-4)
            inside = np.isin(np.arange(n), list(sets["the"]))
            expected = (values[inside, i].mean() - values[~inside, i].mean()) / values[:, i].std()
            assert lines["the"]["selectivity"] == pytest.approx(expected, abs=1e-4)


def test_tokens_that_are_shown_are_of_the_top_and_among_its_hits(lm):
    stream = token_stream(lm, texts(100), window=16)
    found = dissect(lm, stream, CONCEPTS, "resid.post@1", quantile=0.005, permutations=3, snippets=64)
    of = masks(stream, CONCEPTS).of
    for u in range(found.n):
        shown = found.top[u][found.top[u] >= 0]
        assert (np.diff(found.top_values[u][: len(shown)]) <= 0).all()
        assert (found.top_values[u][: len(shown)] > found.threshold[u]).all()
        assert found.hits[u].max() <= found.active[u] <= int(0.005 * stream.n)
        hidden = found.hits[u] - of[shown].sum(0)  # what is of a row, or follows words, of which one is shown
        assert (hidden >= 0).all()
        assert (hidden <= found.active[u] - len(shown)).all()


def test_the_packing_and_the_padding_change_nothing(lm):
    stream = token_stream(lm, texts() + texts()[:20], window=16)
    one = dissect(lm, stream, CONCEPTS, "mlp.neurons@0", quantile=0.02, permutations=0)
    plan = lm.plan

    def alone(tokens, starts, **options):
        return plan(tokens, starts, packing="single")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm, "plan", alone)
        two = dissect(lm, stream, CONCEPTS, "mlp.neurons@0", quantile=0.02, permutations=0)
    assert np.allclose(one.threshold, two.threshold, atol=1e-5)
    assert np.allclose(one.inside, two.inside, atol=1e-5)
    assert np.allclose(one.sd, two.sd, atol=1e-5)


def test_special_tokens_and_the_first_of_a_row_do_not_count(lm):
    stream = token_stream(lm, texts(), window=16, skip=2)
    within = np.arange(len(stream.ids)) - stream.starts[stream.row]
    assert not stream.counted[within < 2].any()
    assert not np.isin(stream.ids[stream.counted], special_ids(lm.tokenizer)).any()
    assert stream.counted.sum() == stream.n == len(stream.places)
    assert np.diff(stream.starts).max() == 16


def test_a_stream_is_cut_to_the_tokens_asked_for_and_its_pieces_are_the_text(lm):
    stream = token_stream(lm, texts(), tokens=100, window=16)
    assert len(stream.ids) == 100
    whole = token_stream(lm, texts(), window=16)
    assert np.array_equal(stream.ids, whole.ids[:100])
    document = np.flatnonzero(whole.document == 3)
    assert "".join(whole.pieces(int(document[0]), int(document[-1]) + 1)) == whole.documents[3].text


def test_a_unit_made_to_fire_on_a_word_detects_it_and_nothing_else():
    net, tokenizer = tiny_net("llama"), tiny_tokenizer()
    (the,) = tokenizer(" the", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        weight = net.get_input_embeddings().weight
        weight[:, 0] = 0.0
        weight[the, 0] = 5.0
    lm = LanguageModel(net, tokenizer, name="planted")
    words = (Concept.regex("the, inside", r"(?<=[^ ]) the(?!\w)"), Concept.words("colours", ["red", "blue"]))
    found = dissect(lm, texts(), words, "embed", quantile=0.1, permutations=30)
    line = found.units.row(0, named=True)
    assert (line["unit"], line["concept"], line["detector"]) == ("embed[0]", "the, inside", True)
    assert (line["iou"], line["precision"], line["recall"], line["threshold"]) == (1.0, 1.0, 1.0, 0.0)
    assert line["selectivity"] > 3
    assert line["p"] == 1 / (1 + found.null.size)
    assert found.units["iou"][1:].max() < 0.5
    for snippet in found.snippets("embed[0]"):
        assert all(marked == (piece == " the") for piece, marked in zip(snippet.pieces, snippet.marked, strict=True))
        assert snippet.pieces[snippet.peak] == " the"
        assert "⟦ the⟧" in snippet.text
    # With more tokens at one value than the quantile allows, none of them is above it.
    assert dissect(lm, texts(), words, "embed", quantile=0.03, permutations=0).active[0] == 0


def test_snippets_mark_the_tokens_above_the_threshold(lm, found):
    values = naive(lm, found, found.readings[1].site)
    for i in (0, 11):
        u = found.number(f"mlp.neurons@1.{i}")
        rows = set()
        for snippet, token in zip(found.snippets(u), found.top[u], strict=False):
            at = int(found.stream.places[token])
            rows.add(int(found.stream.row[at]))
            for j, marked in enumerate(snippet.marked):
                number = found.stream.numbers[at - snippet.peak + j]
                value = values[number, i] if number >= 0 else -np.inf
                if abs(value - found.threshold[u]) > 1e-4:
                    assert marked == (value > found.threshold[u])
        assert len(rows) == len(found.snippets(u))


def test_the_null_is_the_largest_iou_of_rotated_masks(found):
    n, k = found.stream.n, found.hits.shape
    assert found.null.shape == (7, k[0])
    shifts = overlap.shifts(n, 7, 0)
    assert len(set(shifts.tolist())) == 7
    assert shifts.min() >= 0.02 * n - 1
    assert shifts.max() <= 0.98 * n + 1
    lines = found.chance
    assert lines["detectors"].to_list() == (found.null > 0.04).sum(1).tolist()
    assert found.layers["expected"].sum() == pytest.approx(lines["detectors"].mean())
    p = found.p(np.array([0.0, 2.0]))
    assert p[0] == 1.0
    assert p[1] == pytest.approx(1 / (1 + found.null.size))


def test_rotating_gives_what_rotated_sets_give(lm):
    stream = token_stream(lm, texts(30), window=16)
    of = masks(stream, CONCEPTS).of
    counts = [_Fake(np.array([[3, 7, 11, -1], [0, 1, stream.n - 1, 20]], np.int32))]
    null = overlap.chance(counts, of, 4, seed=5)
    for p, shift in enumerate(overlap.shifts(stream.n, 4, 5)):
        for u, tokens in enumerate(counts[0].tokens):
            top = set(tokens[tokens >= 0].tolist())
            best = 0.0
            for c in range(of.shape[1]):
                rotated = {int(t + shift) % stream.n for t in np.flatnonzero(of[:, c])}
                best = max(best, len(top & rotated) / len(top | rotated))
            assert null[p, u] == pytest.approx(best, rel=1e-6)


class _Fake:
    def __init__(self, tokens):
        self.tokens = tokens


def test_a_dissection_on_other_units_reads_those(lm):
    heads = dissect(lm, texts(), CONCEPTS, "attn.heads@1.2, resid.post@0", quantile=0.02, permutations=0)
    assert heads.unit_names[0] == "attn.heads@1.2[0]"
    assert heads.n == 4 + 27
    assert heads.units["p"].is_nan().all()
    one = dissect(lm, texts(), CONCEPTS, "mlp.neurons@2.5", quantile=0.02, permutations=0)
    assert one.unit_names == ["mlp.neurons@2.5"]
    directions = dissect(
        lm, texts(), CONCEPTS, rp.Direction.from_vector("resid.post@0", np.eye(27)[3]), quantile=0.02, permutations=0
    )
    assert np.allclose(directions.threshold[0], heads.threshold[4 + 3], atol=1e-5)
    assert np.allclose(heads.readings[1].direction(3).vector, np.eye(27)[3])


def test_encoders_are_dissected_as_well(tiny_lm):
    found = dissect(tiny_lm("bert"), texts(), CONCEPTS, "mlp.neurons@*", quantile=0.02, permutations=2)
    assert found.layers["units"].to_list() == [23, 23, 23]


def test_a_saved_dissection_comes_back_whole(found, tmp_path):
    path = found.save(tmp_path / "d.safetensors")
    again = Dissection.load(path)
    assert again.units.equals(found.units)
    assert again.concepts.equals(found.concepts)
    assert again.layers.equals(found.layers)
    assert [s.text for s in again.snippets(5)] == [s.text for s in found.snippets(5)]
    assert again.stream.digest == found.stream.digest
    assert again.settings == found.settings
    with pytest.raises(ArtifactExists):
        found.save(path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptArtifact):
        Dissection.load(path)


def test_directions_come_back_from_a_file(lm, tmp_path):
    direction = rp.Direction.from_vector("resid.post@0", np.arange(1.0, 28.0))
    found = dissect(lm, texts(), CONCEPTS, {"rising": direction}, quantile=0.02, permutations=0)
    again = Dissection.load(found.save(tmp_path / "d.safetensors"))
    assert again.unit_names == ["rising"]
    assert np.allclose(again.readings[0].direction(0).vector, direction.vector)


# -- concepts --------------------------------------------------------------------------------------------------------


def test_spans_labels_and_given_spans_are_concepts(lm):
    rows = [{"text": f"the cat of number {i} is red", "label": i % 2, "spans": {"subject": [4, 7]}} for i in range(30)]
    prompts = rp.PromptSet.from_records(rows)
    stream = token_stream(lm, prompts)
    given = [[(0, 3)] if i == 4 else [] for i in range(30)]
    found = masks(stream, [Concept.span("subject"), Concept.label("odd", 1), Concept.given("once", given)])
    subject, odd, once = found.of.T
    assert subject.sum() == len(naive_tokens(stream, "cat"))
    assert np.array_equal(odd, stream.document[stream.places] % 2 == 1)
    assert set(stream.document[stream.places[once]]) == {4}
    with pytest.raises(UsageError, match="spans for 3 documents"):
        masks(stream, [Concept.given("short", given[:3])])
    with pytest.raises(DataError, match="characters 5–999"):
        masks(stream, [Concept.given("beyond", [[(5, 999)]] * 30)])


def test_spans_of_chats_are_found_in_the_rendered_text(lm):
    rows = [
        {"messages": [{"role": "user", "content": "the red cat"}], "spans": {"colour": [4, 7]}, "label": i}
        for i in range(3)
    ]
    stream = token_stream(lm, rp.PromptSet.from_records(rows))
    of = masks(stream, [Concept.span("colour")]).of[:, 0]
    assert "".join(stream.pieces(*_range(stream, of))).strip() == "red"
    assert stream.ids[0] != lm.tokenizer.bos_token_id  # the template brings its own special tokens


def _range(stream, of):
    first = stream.places[np.flatnonzero(of)]
    one = first[stream.document[first] == 1]
    return int(one[0]), int(one[-1]) + 1


def test_a_tagger_of_the_users_makes_a_concept_of_each_tag(lm):
    calls = []

    def tagger(text):
        calls.append(text)
        for m in re.finditer(r"\S+", text):
            yield m.start(), m.end(), "SHORT" if len(m[0]) < 4 else "LONG"

    stream = token_stream(lm, texts(5))
    found = masks(stream, Concept.tags(tagger, ["SHORT", "LONG"]))
    assert not found.of.all(1).any()
    assert found.of.any(0).all()
    assert len(calls) == 5


def test_words_are_whole_and_their_case_is_kept_if_asked(lm):
    stream = token_stream(lm, ["May we see the maypole in may?", "don't do it, don’t"] * 3)

    def tokens(concept):
        of = masks(stream, [concept]).of[:, 0]
        at = stream.places[of & (stream.document[stream.places] < 2)]
        return "".join(stream.pieces(int(t), int(t) + 1)[0] for t in at)

    assert tokens(Concept.words("may", ["May"])).replace(" ", "") == "Maymay"
    assert tokens(Concept.words("may", ["may"], case=True)).strip() == "may"
    assert "don't" in tokens(Concept.words("not", ["don't"]))


#: For each ready pattern a text, and what it finds there.
PATTERNS = {
    "years": ("10.1987, 21000, in 1987, they", ["1987"]),
    "dates": ("on 3 March or May 4th or 2024-03-01", ["3 March", "May 4th", "2024-03-01"]),
    "digits": ("1,024 of 3.", ["1,024", "3"]),
    "ordinals": ("the Third and 21st, a second", ["Third", "21st"]),
    "units": ("5km of kilometres and 3 GB, a cm", ["km", "kilometres", " GB"]),
    "currencies": ("$5 or ten euros", ["$", "euros"]),
    "first-person": ("I told us, in it", ["I", "us"]),
    "titles": ("Dr. Who met a king and King Lear", ["Dr.", "King"]),
    "negation": ("Never can't it", ["Never", "n't"]),
    "past-tense": ("she walked to bed", ["walked"]),
    "ing-forms": ("a king is walking", ["walking"]),
    "adverbs": ("fly quickly", ["quickly"]),
    "full-stop": ("It is 3.5. Yes.", [".", "."]),
    "comma": ("a, b", [","]),
    "question-mark": ("what??", ["??"]),
    "exclamation-mark": ("go!", ["!"]),
    "colon": ("so: a; b", [":", ";"]),
    "hyphen": ("well-known - and --", ["-", " - ", "--"]),
    "quotation": ('a "b c" d', ['"b c"']),
    "quotation-marks": ("a “b”", ["“", "”"]),
    "brackets": ("a (b) [c]", ["(b)", "[c]"]),
    "apostrophe-s": ("it’s Tom's", ["’s", "'s"]),
    "line-breaks": ("a\n\nb", ["\n\n"]),
    "capitalised": ("Now in Rome we", ["Rome"]),
    "sentence-start": ("So. Then we", ["Then"]),
    "upper-case": ("the NASA A", ["NASA"]),
    "lists": ("1. a\n- b", ["1.", "-"]),
    "headings": ("# One\ntwo **three**", ["# One", "**three**"]),
    "code": ("use `x = 1`\nimport os", ["`x = 1`", "import os"]),
    "identifiers": ("a my_name of getName and run()", ["my_name", "getName", "run()"]),
    "operators": ("x == 1 -> y", ["==", "->"]),
    "web": ("at www.example.org or a@b.com", ["www.example.org", "a@b.com"]),
    "abbreviations": ("e.g. the U.S. etc. so", ["e.g.", "U.S.", "etc."]),
    "long-words": ("international law", ["international"]),
}


def found_by(concept, text):
    return [text[a:b] for a, b in sorted(concept.find(Document(text)))]


def test_there_are_ready_concepts_each_with_what_it_is():
    concepts = ready()
    assert len(concepts) >= 40
    assert all(c.about and c.kind for c in concepts)
    assert ready("months, kind:time")[0].name == "months"
    assert {c.kind for c in ready("kind:time")} == {"time"}
    with pytest.raises(UnknownData, match="kind:time"):
        ready("moths")


@pytest.mark.parametrize("concept", ready(), ids=lambda c: c.name)
def test_a_ready_concept_finds_what_it_should_and_nothing_else(concept):
    row = concepts_table()[concept.name]
    if "regex" in row:
        text, expected = PATTERNS[concept.name]
        assert found_by(concept, text) == expected
    else:
        for word in filter(None, (w.strip() for w in row["words"].replace("\n", " ").split(","))):
            assert word in found_by(concept, f"qq {word} qq"), word
            assert not found_by(concept, f"qq{word}qq")
    assert not found_by(concept, "qq zz")


def test_words_come_from_tables_and_with_their_plurals():
    table = {c.name: c for c in ready()}
    assert found_by(table["countries"], "to New Zealand by new zealand") == ["New Zealand"]
    assert found_by(table["spanish"], "el perro come") == ["el", "perro"]
    assert found_by(table["animals"], "puppies, foxes, two dogs") == ["puppies", "foxes", "dogs"]


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"concepts": [Concept.words("unicorns", ["unicorn"])]}, UsageError, "never occur: unicorns"),
        ({"concepts": [Concept.regex("all", r"[\s\S]+")]}, UsageError, "are everywhere: all"),
        ({"concepts": []}, UsageError, "no concept"),
        ({"concepts": [CONCEPTS[0], CONCEPTS[0]]}, UsageError, "several concepts are called colours"),
        ({"quantile": 0.0005}, UsageError, "at least"),
        ({"quantile": 1.5}, UsageError, "quantile=1.5"),
        ({"sites": "mlp.neurons@9"}, UnknownSite, "blocks 0–2"),
        ({"sites": "mlp.nurons@1"}, UnknownSite, "did you mean"),
        ({"stream": []}, UsageError, "no text"),
        ({"memory": 100}, UsageError, "GB"),
        ({"permutations": 10**6}, UsageError, "rotations"),
        ({"window": 0}, UsageError, "window=0"),
        ({"sites": ["resid.post@0", rp.Direction.from_vector("resid.post@0", np.ones(27))]}, UsageError, "not both"),
        ({"sites": rp.Direction.from_vector("resid.post@0", np.ones(5))}, UsageError, "5 wide"),
    ],
)
def test_what_cannot_be_is_refused_with_the_way_out(lm, change, error, says):
    wanted = {"stream": texts(), "concepts": CONCEPTS, "sites": "mlp.neurons@0", "quantile": 0.02} | change
    stream, concepts, sites = (wanted.pop(name) for name in ("stream", "concepts", "sites"))
    with pytest.raises(error, match=re.escape(says)):
        dissect(lm, stream, concepts, sites, **wanted)


def test_concepts_that_are_not_there_are_left_out_if_asked_and_named(lm):
    gone = Concept.words("unicorns", ["unicorn"])
    found = dissect(lm, texts(), [*CONCEPTS, gone], "mlp.neurons@0", quantile=0.02, permutations=0, absent="drop")
    assert found.dropped == ("unicorns",)
    with pytest.raises(UsageError, match="left out"):
        found.of_concept("unicorns")
    with pytest.raises(UsageError, match="no unit"):
        found.of_unit("mlp.neurons@7.1")


def test_a_corpus_or_a_file_is_a_stream(lm, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(" ".join(texts()))
    one, two = token_stream(lm, file), token_stream(lm, Corpus.load(file))
    assert one.digest == two.digest
    assert np.diff(one.starts).max() == 64  # the model's context
