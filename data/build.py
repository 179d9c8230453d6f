"""Regenerates cities, negations, translations and comparisons (`data/*.jsonl`) from `data/tables/*.tsv`.

What enters: hand-made tables of facts and of phrasings. What leaves: one JSON object a line, the same bytes
on every run and every machine. It knows nothing of models, tokens or of the rest of the library.

    python data/build.py

Labels must not follow from surface features, and that is decided here:

* Both statements of a contrast (`pair`) are worded alike and differ in the named object (cities, negations,
  translations) or in the order of the two things (comparisons).
* False objects are drawn from an urn that holds the true ones, and each drawn object is put back with one
  more of its kind (Pólya's urn). True and false objects then have the same distribution, and the false
  ones scatter around it as an independent sample would. Dealing each object out exactly as often falsely as
  truly looks tidier, but then one side of a split betrays the other: where the training rows hold an object
  more often as false, the held-out rows must hold it more often as true.
"""

from __future__ import annotations

import csv
import json
import random
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from itertools import cycle
from pathlib import Path
from typing import Any, TypeVar

HERE = Path(__file__).resolve().parent
SEED = 0
LANGUAGES = ("Spanish", "French", "German", "Italian", "Portuguese")

Item = TypeVar("Item")
Row = dict[str, Any]
Spans = dict[str, list[int]]


# --- tables, names and sentences -------------------------------------------------------------------------


def table(name: str) -> list[dict[str, str]]:
    """The rows of `tables/<name>.tsv`, each a mapping from column to text."""
    with (HERE / "tables" / f"{name}.tsv").open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE, strict=True))


def slug(name: str) -> str:
    """`name` in lower-case ASCII with hyphens: "São Paulo" → "sao-paulo", "weiß" → "weiss"."""
    plain = name.casefold().replace("ø", "o").replace("œ", "oe").replace("'", "")
    plain = unicodedata.normalize("NFKD", plain).encode("ascii", "ignore").decode()
    return plain.replace(" ", "-")


def sentence(template: str, **slots: str) -> tuple[str, Spans]:
    """The filled template with a capital first, and the [start, end) characters of subject and object."""
    text, spans = "", {}
    for literal, slot, _, _ in string.Formatter().parse(template):
        text += literal
        if slot is not None:
            start, text = len(text), text + slots[slot]
            if slot in ("subject", "object"):
                spans[slot] = [start, len(text)]
    return text[0].upper() + text[1:], {"subject": spans["subject"], "object": spans["object"]}


# fmt: off
UNITS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)
TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
# fmt: on


def number_words(n: int) -> str:
    """`n` (0–999) in words: 312 → "three hundred and twelve"."""
    if n < 20:
        return UNITS[n]
    if n < 100:
        return TENS[n // 10] + (f"-{UNITS[n % 10]}" if n % 10 else "")
    return f"{UNITS[n // 100]} hundred" + (f" and {number_words(n % 100)}" if n % 100 else "")


# --- chance ------------------------------------------------------------------------------------------------
# Only `Random.random` is promised to give the same numbers in every Python version; all draws go through it.


def generator(data_set: str) -> random.Random:
    """A generator of its own for each data set, so that a change in one leaves the others as they were."""
    return random.Random(f"{SEED} {data_set}")


def below(rng: random.Random, n: int) -> int:
    """An integer drawn evenly from 0 … n − 1."""
    return int(rng.random() * n)


def shuffled(rng: random.Random, items: Iterable[Item]) -> list[Item]:
    """The items in random order."""
    return [item for _, item in sorted(((rng.random(), item) for item in items), key=lambda drawn: drawn[0])]


def draw(rng: random.Random, urn: Counter[str], admitted: Set[str]) -> str:
    """One admitted object, in proportion to its count in `urn`, put back with one more of its kind."""
    ticket = rng.random() * sum(urn[name] for name in admitted)
    for name in sorted(admitted):
        ticket -= urn[name]
        if ticket < 0:
            urn[name] += 1
            return name
    raise ValueError(f"the urn holds none of {sorted(admitted)}")


# --- the data sets -----------------------------------------------------------------------------------------


def cities() -> Iterator[Row]:
    """Two statements a city, one with its country and one with a drawn country, in one phrasing."""
    return city_statements("affirmed")


def negations() -> Iterator[Row]:
    """Row for row, the statements of `cities` denied: the same cities, countries, phrasings and groups."""
    return city_statements("negated")


def city_statements(form: str) -> Iterator[Row]:
    articles = {row["country"]: row["article"] for row in table("countries")}
    phrasings = table("city_phrasings")
    places = table("cities")
    # The draws depend on the cities alone, never on `form`: a negation denies the very statement of `cities`.
    rng = generator("cities")
    urn = Counter(place["country"] for place in places)
    drawn = {}
    for place, phrasing in zip(shuffled(rng, places), cycle(range(len(phrasings))), strict=False):
        elsewhere = {place["country"], *filter(None, place["also_in"].split("; "))}
        drawn[place["city"]] = draw(rng, urn, urn.keys() - elsewhere), phrasing
    for place in places:
        city, correct = place["city"], place["country"]
        wrong, phrasing = drawn[city]
        for country in (correct, wrong):
            article = articles[country]
            text, spans = sentence(
                phrasings[phrasing][form], subject=city, article=article and f"{article} ", object=country
            )
            yield {
                "text": text,
                "label": int((country == correct) == (form == "affirmed")),
                "group": slug(city),
                "pair": f"{slug(city)}-{form}-{phrasing}",
                "spans": spans,
                "city": city,
                "country": country,
                "correct_country": correct,
                "phrasing": phrasing,
                "polarity": 1 if form == "affirmed" else -1,
            }


def translations() -> Iterator[Row]:
    """Two statements a word: one with its meaning, one with that of a word of the same language and class."""
    meanings = table("translations")
    phrasings = [row["phrasing"] for row in table("translation_phrasings")]
    rng = generator("translations")
    words = [(language, row) for language in LANGUAGES for row in meanings if row[language]]
    urn = Counter(row["meaning"] for _, row in words)
    drawn = {}
    for (language, row), phrasing in zip(shuffled(rng, words), cycle(range(len(phrasings))), strict=False):
        others = {
            other["meaning"]
            for other in meanings
            if other[language] and other["word_class"] == row["word_class"] and other is not row
        }
        drawn[language, row["meaning"]] = draw(rng, urn, others), phrasing
    for language, row in words:
        word, correct = row[language], row["meaning"]
        wrong, phrasing = drawn[language, correct]
        group = f"{language.lower()}-{slug(word)}"
        for meaning in (correct, wrong):
            text, spans = sentence(phrasings[phrasing], language=language, subject=word, object=meaning)
            yield {
                "text": text,
                "label": int(meaning == correct),
                "group": group,
                "pair": f"{group}-{phrasing}",
                "spans": spans,
                "language": language,
                "word": word,
                "meaning": meaning,
                "correct_meaning": correct,
                "word_class": row["word_class"],
                "phrasing": phrasing,
            }


def comparisons() -> Iterator[Row]:
    """Four statements for two things: each compared with the other, as having more and as having less."""
    forms: dict[str, list[dict[str, str]]] = {}
    for row in table("comparison_phrasings"):
        forms.setdefault(row["dimension"], []).append(row)
    turns = {dimension: cycle(range(len(rows))) for dimension, rows in forms.items()}
    for kind, dimension, greater, lesser in (*numbers(), *things()):
        phrasing = next(turns[dimension])
        group = f"{slug(dimension)}-{slug(greater)}-{slug(lesser)}"
        for direction, more in (("more", True), ("less", False)):
            for subject, object_ in ((greater, lesser), (lesser, greater)):
                text, spans = sentence(forms[dimension][phrasing][direction], subject=subject, object=object_)
                yield {
                    "text": text,
                    "label": int((subject == greater) == more),
                    "group": group,
                    "pair": f"{group}-{direction}",
                    "spans": spans,
                    "kind": kind,
                    "dimension": dimension,
                    "direction": direction,
                    "subject": subject,
                    "object": object_,
                    "phrasing": phrasing,
                }


def numbers() -> Iterator[tuple[str, str, str, str]]:
    """Kind, dimension, greater and lesser number; no two numbers meet twice, be it in words or in digits."""
    rng = generator("numbers")
    seen: set[tuple[int, int]] = set()
    for band in table("number_bands"):
        lowest, highest = int(band["lowest"]), int(band["highest"])
        spell = number_words if band["kind"] == "words" else str
        taken = 0
        while taken < int(band["pairs"]):
            # A third of the band at most lies between the two, so that a number's size alone says little.
            lesser = lowest + below(rng, highest - lowest)
            greater = lesser + 1 + below(rng, (highest - lowest) // 3)
            if greater <= highest and (greater, lesser) not in seen:
                seen.add((greater, lesser))
                taken += 1
                yield band["kind"], "number", spell(greater), spell(lesser)


def things() -> Iterator[tuple[str, str, str, str]]:
    """Kind, dimension, the thing that has more of it and the thing that has less."""
    for row in table("things"):
        yield "things", row["dimension"], row["greater"], row["lesser"]


# --- files -------------------------------------------------------------------------------------------------

DATA_SETS: Mapping[str, Callable[[], Iterator[Row]]] = {
    "cities": cities,
    "negations": negations,
    "translations": translations,
    "comparisons": comparisons,
}


def render(name: str, rows: Sequence[Row]) -> str:
    """The file's text: one object a line, numbered ids first."""
    lines = ({"id": f"{name}-{number:04d}", **row} for number, row in enumerate(rows, start=1))
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def build() -> dict[str, str]:
    """File name → file text, for the four data sets."""
    return {f"{name}.jsonl": render(name, list(rows())) for name, rows in DATA_SETS.items()}


def main() -> None:
    for file, text in build().items():
        (HERE / file).write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
