"""The tabular data sets: the committed files are what `data/build.py` makes, and labels do not leak."""

import importlib.util
import re
import unicodedata
from collections import Counter, defaultdict
from types import ModuleType

import numpy as np
import pytest
from data.rows import DATA, Row, by, load
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, cross_val_predict

NAMES = ("cities", "negations", "translations", "comparisons")
SHARED_KEYS = ["id", "text", "label", "group", "pair", "spans"]


@pytest.fixture(scope="module")
def builder() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reprobe_data_build", DATA / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def balanced(rows: list[Row]) -> bool:
    return Counter(row["label"] for row in rows) == {0: len(rows) / 2, 1: len(rows) / 2}


def test_the_committed_files_are_byte_for_byte_what_the_script_builds(builder: ModuleType) -> None:
    built = builder.build()
    assert set(built) == {f"{name}.jsonl" for name in NAMES}
    for file, text in built.items():
        assert (DATA / file).read_bytes() == text.encode(), f"{file} is stale: run `python data/build.py`"


def test_another_seed_draws_other_false_statements(builder: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    before = builder.build()
    monkeypatch.setattr(builder, "SEED", builder.SEED + 1)
    assert all(before[file] != text for file, text in builder.build().items())


@pytest.mark.parametrize("name", NAMES)
def test_every_row_has_the_same_keys_and_an_id_and_a_sentence_of_its_own(name: str) -> None:
    rows = load(name)
    assert [row["id"] for row in rows] == [f"{name}-{i:04d}" for i in range(1, len(rows) + 1)]
    assert len({row["text"] for row in rows}) == len(rows)
    for row in rows:
        assert list(row) == list(rows[0])
        assert list(row)[: len(SHARED_KEYS)] == SHARED_KEYS
        assert row["label"] in (0, 1)


@pytest.mark.parametrize("name", NAMES)
def test_the_readme_states_the_rows_and_groups_that_a_file_has(name: str) -> None:
    rows = load(name)
    stated = f"| [`{name}`](#{name}) | {len(rows)} | {len({row['group'] for row in rows})} |"
    assert stated in (DATA / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", NAMES)
def test_sentences_are_clean_and_end_properly(name: str) -> None:
    for row in load(name):
        text = row["text"]
        assert " ".join(text.split()) == text
        assert re.fullmatch(r"[A-Z][^.{}]*\.", text), text
        assert unicodedata.is_normalized("NFC", text), text


@pytest.mark.parametrize(
    ("name", "subject", "object_"),
    [
        ("cities", "city", "country"),
        ("negations", "city", "country"),
        ("translations", "word", "meaning"),
        ("comparisons", "subject", "object"),
    ],
)
def test_spans_cut_the_subject_and_then_the_object_out_of_the_sentence(name: str, subject: str, object_: str) -> None:
    for row in load(name):
        assert list(row["spans"]) == ["subject", "object"]
        cut = {span: row["text"][start:end] for span, (start, end) in row["spans"].items()}
        at_start = row["spans"]["subject"][0] == 0
        named = row[subject][0].upper() + row[subject][1:] if at_start else row[subject]
        assert cut == {"subject": named, "object": row[object_]}
        assert row["spans"]["subject"][1] < row["spans"]["object"][0]
        assert set(row["text"][row["spans"]["object"][1] :]) <= {".", "'"}, "the object ends the sentence"


@pytest.mark.parametrize("name", NAMES)
def test_every_pair_is_one_true_and_one_false_statement_of_one_group(name: str) -> None:
    for pair in by(load(name), "pair").values():
        assert sorted(row["label"] for row in pair) == [0, 1]
        assert len({row["group"] for row in pair}) == 1
        assert len({row["phrasing"] for row in pair}) == 1


@pytest.mark.parametrize(
    ("name", "columns"),
    [
        ("cities", ["phrasing", "correct_country"]),
        ("negations", ["phrasing", "correct_country"]),
        ("translations", ["phrasing", "language", "word_class"]),
        ("comparisons", ["kind", "dimension", "direction", "subject", "object"]),
    ],
)
def test_labels_are_balanced_overall_and_within_each_column(name: str, columns: list[str]) -> None:
    rows = load(name)
    assert balanced(rows)
    for column in columns:
        assert all(balanced(part) for part in by(rows, column).values())


@pytest.mark.parametrize(("name", "phrasings"), [("cities", 6), ("negations", 6), ("translations", 5)])
def test_phrasings_are_used_equally_often(name: str, phrasings: int) -> None:
    uses = Counter(row["phrasing"] for row in load(name))
    assert set(uses) == set(range(phrasings))
    assert max(uses.values()) - min(uses.values()) <= 2  # two statements a pair


@pytest.mark.parametrize("name", ["cities", "negations", "translations"])
def test_no_sentence_opens_with_its_subject(name: str) -> None:
    assert all(row["spans"]["subject"][0] > 0 for row in load(name))


# --- cities and negations ----------------------------------------------------------------------------------


def test_cities_are_many_and_from_every_continent(builder: ModuleType) -> None:
    rows = load("cities")
    continent = {row["country"]: row["continent"] for row in builder.table("countries")}
    of_city = {row["city"]: continent[row["correct_country"]] for row in rows}
    assert len(of_city) >= 350
    assert len(rows) == 2 * len(of_city) == 2 * len({row["group"] for row in rows})
    counts = Counter(of_city.values())
    assert set(counts) == {"Africa", "Asia", "Europe", "North America", "Oceania", "South America"}
    assert min(counts.values()) >= 20
    assert max(counts.values()) <= len(of_city) / 3


def test_a_false_country_is_never_one_with_a_city_of_that_name(builder: ModuleType) -> None:
    countries = {row["country"] for row in builder.table("countries")}
    also_in = {row["city"]: set(filter(None, row["also_in"].split("; "))) for row in builder.table("cities")}
    assert set.union(*also_in.values()) <= countries
    for row in load("cities"):
        assert row["country"] in countries
        assert row["label"] == (row["country"] == row["correct_country"])
        assert row["label"] or row["country"] not in also_in[row["city"]]


def test_no_city_name_contains_its_country(builder: ModuleType) -> None:
    for row in builder.table("cities"):
        assert builder.slug(row["country"]) not in builder.slug(row["city"])


def test_countries_take_the_article_that_english_gives_them() -> None:
    articles = {(row["country"], row["text"].endswith(f" the {row['country']}.")) for row in load("cities")}
    assert {country for country, has_article in articles if has_article} == {
        *("Bahamas", "Central African Republic", "Czech Republic", "Democratic Republic of the Congo"),
        *("Dominican Republic", "Gambia", "Netherlands", "Philippines", "Solomon Islands"),
        *("United Arab Emirates", "United Kingdom", "United States"),
    }
    assert len(articles) == len({country for country, _ in articles}), "a country is named in both ways"


def test_each_negation_denies_the_statement_of_the_same_row_of_cities() -> None:
    cities, negations = load("cities"), load("negations")
    for claim, denial in zip(cities, negations, strict=True):
        assert {claim["label"], denial["label"]} == {0, 1}
        assert (claim["polarity"], denial["polarity"]) == (1, -1)
        for column in ("group", "city", "country", "correct_country", "phrasing"):
            assert claim[column] == denial[column]
        assert denial["text"] != claim["text"]
        assert denial["text"].replace(" do not ", " ").replace(" not ", " ") == claim["text"]
    assert not {row["pair"] for row in cities} & {row["pair"] for row in negations}


# --- translations ------------------------------------------------------------------------------------------


def test_every_language_has_at_least_sixty_words_with_one_true_and_one_false_meaning() -> None:
    rows = load("translations")
    assert len({row["language"] for row in rows}) >= 4
    for language in by(rows, "language").values():
        words = {row["word"] for row in language}
        assert len(words) >= 60
        assert len(language) == 2 * len(words)


def test_a_false_meaning_belongs_to_another_word_of_that_language_and_class() -> None:
    rows = load("translations")
    true = {(row["language"], row["word_class"], row["meaning"]) for row in rows if row["label"]}
    for row in rows:
        assert row["label"] == (row["meaning"] == row["correct_meaning"])
        assert (row["language"], row["word_class"], row["meaning"]) in true


def test_no_word_is_spelt_the_same_in_two_languages_or_as_its_meaning() -> None:
    languages = defaultdict(set)
    for row in load("translations"):
        languages[row["word"].casefold()].add(row["language"])
        assert row["word"].casefold() != row["correct_meaning"].casefold()
    assert all(len(spoken) == 1 for spoken in languages.values())


# --- comparisons -------------------------------------------------------------------------------------------


def test_comparisons_hold_four_statements_for_each_of_many_pairs() -> None:
    rows = load("comparisons")
    groups = list(by(rows, "group").values())
    assert len(rows) >= 400
    assert all(len(group) == 4 for group in groups)
    assert sum(group[0]["kind"] == "things" for group in groups) >= 60
    assert len({group[0]["dimension"] for group in groups}) >= 10
    for group in groups:
        assert {(row["direction"], row["label"]) for row in group} == {
            *(("more", 1), ("more", 0), ("less", 1), ("less", 0)),
        }


# fmt: off
WORTH = {
    "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9,
    "ten": 10, "eleven": 11, "twelve": 12, "thirteen": 13, "fourteen": 14, "fifteen": 15, "sixteen": 16,
    "seventeen": 17, "eighteen": 18, "nineteen": 19, "twenty": 20, "thirty": 30, "forty": 40, "fifty": 50,
    "sixty": 60, "seventy": 70, "eighty": 80, "ninety": 90,
}
# fmt: on


def value(number: str) -> int:
    """A number below 1000 in words, or any number in digits, read without the help of the builder."""
    if number.isdigit():
        return int(number)
    total = 0
    for word in number.replace("-", " ").split():
        if word == "hundred":
            total *= 100
        elif word != "and":
            total += WORTH[word]
    return total


def test_a_number_statement_is_true_exactly_when_arithmetic_says_so() -> None:
    groups: defaultdict[frozenset[int], set[str]] = defaultdict(set)
    for row in load("comparisons"):
        if row["kind"] != "things":
            subject, object_ = value(row["subject"]), value(row["object"])
            assert row["label"] == ((subject > object_) == (row["direction"] == "more")), row["text"]
            groups[frozenset((subject, object_))].add(row["group"])
    assert all(len(names) == 1 for names in groups.values()), "the same two numbers are in two groups"


def test_the_things_of_a_pair_are_compared_in_one_group_only() -> None:
    groups = defaultdict(set)
    for row in load("comparisons"):
        if row["kind"] == "things":
            groups[row["dimension"], frozenset((row["subject"], row["object"]))].add(row["group"])
    assert all(len(names) == 1 for names in groups.values())


# --- leaks -------------------------------------------------------------------------------------------------


def held_out_accuracy(texts: list[str], rows: list[Row]) -> float:
    """Accuracy of a logistic regression on word counts, mean of three group-split five-fold runs."""
    labels = np.array([row["label"] for row in rows])
    groups = [row["group"] for row in rows]
    counts = CountVectorizer(token_pattern=r"[\w'-]+").fit_transform(texts)
    model = LogisticRegression(solver="liblinear")
    folds = [GroupKFold(5, shuffle=True, random_state=seed) for seed in range(3)]
    runs = [cross_val_predict(model, counts, labels, groups=groups, cv=fold) for fold in folds]
    return float(np.mean([run == labels for run in runs]))


@pytest.mark.parametrize("name", NAMES)
def test_a_bag_of_words_does_not_tell_the_label_of_held_out_groups(name: str) -> None:
    rows = load(name)
    assert held_out_accuracy([row["text"] for row in rows], rows) == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(
    ("name", "object_"), [("cities", "country"), ("negations", "country"), ("translations", "meaning")]
)
def test_the_named_object_alone_does_not_tell_the_label_of_held_out_groups(name: str, object_: str) -> None:
    rows = load(name)
    texts = [row[object_].replace(" ", "_") for row in rows]
    assert held_out_accuracy(texts, rows) == pytest.approx(0.5, abs=0.05)


def test_the_leak_check_sees_a_planted_leak() -> None:
    rows = load("cities")
    assert held_out_accuracy([row["text"] + " truly" * row["label"] for row in rows], rows) > 0.95
