"""Checks on data/emotions.jsonl and data/honesty.jsonl, read as plain JSON.

Enters: the two files. Leaves: nothing. It does not know whether a scenario moves a reader or a statement is
true; those were judged by hand. It holds what a later edit could break: counts, balance, pairing, spans, the
absence of emotion words.
"""

import itertools
import re
from collections import Counter, defaultdict
from functools import cache

import pytest
from data.rows import Row, by, load

# The first group are stems and match any ending ("smil" finds smiled, smiling); the second are whole words,
# let through before a hyphen (great-aunt).
EMOTION = re.compile(
    r"""\b(?:
      (?:
        afraid | amaz | anger | angri | angry | anxi | asham | awful | beautif | belov | bitter | blessed |
        bliss | celebrat | cheer | chuckl | congratulat | contented | contentment | cruel | dear | delight |
        depress | despair | disappoint | dread | ecsta | elat | embarrass | emotion | enjoy | excit |
        fantastic | favorit | favourit | fear | feel | fortunate | frown | funn | furious | giggl | glad |
        gloom | gorgeous | grie | grin | happi | happy | hate | hating | hatred | heart | hope | hoping |
        horribl | hurt | jealous | joy | laugh | lonel | love | loving | luck | marvel | melanchol | miser |
        mourn | nostalg | painful | perfect | pleasant | pleased | pleasing | pleasur | pride | proud |
        regret | relie | sadde | sadly | sadness | sigh | smil | sob | sorrow | sorry | suffer | tearful |
        terribl | thrill | trag | unfortunate | unhapp | unluck | upset | weep | wept | wonderful | worri |
        worry
      )\w*
      |
      (?:
        ache | ached | aches | aching | best | cried | cries | cry | crying | felt | fun | great | hug |
        hugged | hugs | kiss | kissed | kisses | mad | miss | missed | misses | missing | mood | moods |
        pain | pains | sad | scared | scary | shame | tear | tears | worst
      )(?!-)
    )\b""",
    re.IGNORECASE | re.VERBOSE,
)
FIRST = re.compile(r"\b(I|me|my|mine|myself|we|us|our|ours|ourselves)\b", re.IGNORECASE)
SECOND = re.compile(r"\b(you|your|yours|yourself|yourselves)\b", re.IGNORECASE)
DECEIT = re.compile(r"\b(dis|in|un)?(honest|truth|true|false|sincer|trustw|reliab|lie|lies|lying|mislead)", re.I)


@cache
def words(text: str) -> set[str]:
    return set(re.findall(r"[\w'-]+", text.lower()))


def overlap(a: str, b: str) -> float:
    shared = len(words(a) & words(b))
    return shared / (len(words(a)) + len(words(b)) - shared)


@pytest.fixture(scope="module")
def emotions() -> list[Row]:
    return load("emotions")


@pytest.fixture(scope="module")
def honesty() -> list[Row]:
    return load("honesty")


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("emotions", ["id", "text", "label", "group", "pair", "person"]),
        ("honesty", ["id", "text", "label", "group", "pair", "spans", "statement", "persona_id"]),
    ],
)
def test_every_row_has_the_same_keys_a_unique_id_and_a_clean_unique_text(name: str, keys: list[str]) -> None:
    rows = load(name)
    assert all(list(row) == keys for row in rows)
    assert [row["id"] for row in rows] == [f"{name}-{i:04d}" for i in range(1, len(rows) + 1)]
    assert len({row["text"].casefold() for row in rows}) == len(rows)
    for row in rows:
        assert row["text"] == " ".join(row["text"].split()), row["id"]
        assert re.fullmatch(r"[A-Z].*[.?!]'?", row["text"]), row["id"]


def test_emotions_are_balanced_over_label_and_person(emotions: list[Row]) -> None:
    cells = Counter((row["label"], row["person"]) for row in emotions)
    expected = set(itertools.product(("happiness", "sadness"), ("first", "second")))
    assert set(cells) == expected
    assert len(set(cells.values())) == 1
    assert len(emotions) >= 240


def test_each_emotion_pair_has_one_row_of_each_label_in_one_group_and_person(emotions: list[Row]) -> None:
    pairs = by(emotions, "pair")
    assert len(pairs) >= 100
    assert len({row["group"] for row in emotions}) >= 50
    for pair, sides in pairs.items():
        assert sorted(row["label"] for row in sides) == ["happiness", "sadness"], pair
        assert len({(row["group"], row["person"]) for row in sides}) == 1, pair
        assert pair.startswith(sides[0]["group"] + "-"), pair


def test_the_two_sides_of_an_emotion_pair_share_their_topic_words(emotions: list[Row]) -> None:
    shared = [overlap(a["text"], b["text"]) for a, b in by(emotions, "pair").values()]
    assert min(shared) > 0.1
    assert sum(shared) / len(shared) > 0.4


def test_scenarios_of_different_pairs_are_different_scenarios(emotions: list[Row]) -> None:
    for a, b in itertools.combinations(emotions, 2):
        assert a["pair"] == b["pair"] or overlap(a["text"], b["text"]) < 0.45, (a["id"], b["id"])


def test_scenarios_have_eight_to_twenty_five_words(emotions: list[Row]) -> None:
    lengths = {row["id"]: len(row["text"].split()) for row in emotions}
    assert not {key: n for key, n in lengths.items() if not 8 <= n <= 25}


def test_length_does_not_give_the_emotion_away(emotions: list[Row]) -> None:
    mean = {
        label: sum(len(row["text"]) for row in emotions if row["label"] == label) / (len(emotions) / 2)
        for label in ("happiness", "sadness")
    }
    assert abs(mean["happiness"] - mean["sadness"]) < 3


def test_no_scenario_names_an_emotion(emotions: list[Row]) -> None:
    found = {row["id"]: match.group() for row in emotions if (match := EMOTION.search(row["text"]))}
    assert not found


@pytest.mark.parametrize("word", ["smiled", "Happy", "grief", "grieving", "missed", "loved", "tears", "sad", "glad"])
def test_the_emotion_word_check_finds_an_emotion_word(word: str) -> None:
    assert EMOTION.search(f"You wait on the platform, {word}, with a flask of tea.")


@pytest.mark.parametrize("word", ["saddle", "great-aunt", "emission", "glove", "shopping", "painting"])
def test_the_emotion_word_check_passes_words_that_only_look_alike(word: str) -> None:
    assert not EMOTION.search(f"You leave the {word} on the bench.")


def test_the_person_column_says_who_lives_the_scenario(emotions: list[Row]) -> None:
    for row in emotions:
        persons = (bool(FIRST.search(row["text"])), bool(SECOND.search(row["text"])))
        assert persons == ((True, False) if row["person"] == "first" else (False, True)), row["id"]


def test_honesty_has_a_complete_pair_for_every_statement(honesty: list[Row]) -> None:
    pairs = by(honesty, "pair")
    assert len(pairs) >= 200
    assert len(honesty) == 2 * len(pairs)
    assert len({row["statement"].casefold() for row in honesty}) == len(pairs)
    for pair, sides in pairs.items():
        assert sorted(row["label"] for row in sides) == [0, 1], pair
        assert len({(row["group"], row["statement"], row["persona_id"]) for row in sides}) == 1, pair
        assert all(row["group"] == row["pair"] for row in sides), pair


def test_the_sides_of_an_honesty_pair_differ_in_the_persona_alone(honesty: list[Row]) -> None:
    for pair, sides in by(honesty, "pair").items():
        outside, personas = set(), set()
        for row in sides:
            start, end = row["spans"]["persona"]
            outside.add(row["text"][:start] + "|" + row["text"][end:])
            personas.add(row["text"][start:end])
        assert len(outside) == 1, pair
        assert len(personas) == 2, pair


def test_honesty_spans_cut_out_the_persona_and_the_statement_without_its_full_stop(
    honesty: list[Row],
) -> None:
    for row in honesty:
        assert set(row["spans"]) == {"persona", "statement"}
        start, end = row["spans"]["statement"]
        assert row["text"][start:end] + "." == row["statement"], row["id"]
        assert end == len(row["text"]) - 1, row["id"]
        first, last = row["spans"]["persona"]
        assert re.match(r"(an?|someone) ", row["text"][first:last]), row["id"]
        assert last < start, row["id"]


def test_each_persona_phrasing_is_used_equally_often_and_has_one_honest_and_one_dishonest_wording(
    honesty: list[Row],
) -> None:
    uses = Counter(row["persona_id"] for row in honesty)
    assert set(uses) == set(range(len(uses)))
    assert len(uses) >= 5
    assert len(set(uses.values())) == 1
    wordings: dict[tuple[int, int], set[str]] = defaultdict(set)
    for row in honesty:
        wordings[row["persona_id"], row["label"]].add(row["text"][: row["spans"]["statement"][0]])
    assert len(wordings) == 2 * len(uses)
    assert all(len(seen) == 1 for seen in wordings.values())
    assert len(set().union(*wordings.values())) == len(wordings)


def test_statements_are_single_sentences_of_six_to_fourteen_words_that_do_not_speak_of_truth(
    honesty: list[Row],
) -> None:
    for statement in {row["statement"] for row in honesty}:
        assert 6 <= len(statement.split()) <= 14, statement
        assert re.fullmatch(r"[A-Z][^.?!]*\.", statement), statement
        assert not DECEIT.search(statement), statement


def test_no_two_statements_say_nearly_the_same(honesty: list[Row]) -> None:
    for a, b in itertools.combinations(sorted({row["statement"] for row in honesty}), 2):
        assert overlap(a, b) < 0.5, (a, b)
