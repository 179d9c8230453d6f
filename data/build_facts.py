"""Build facts.jsonl: subject-relation-object facts with paraphrases, neighbours and a counterfactual object.

Enters: the tables ``tables/facts_<relation>.tsv`` (one subject a row) and the templates below.
Leaves: ``facts.jsonl`` beside this file, the same bytes on every run and every Python version.
It does not know any language model: whether a model knows a fact is measured elsewhere.

Run: ``python data/build_facts.py``
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SEED = 20
NEIGHBOURS = 4
EMPTY = "-"  # an empty cell: a trailing tab would be invisible
TABLES = Path(__file__).parent / "tables"
OUTPUT = Path(__file__).parent / "facts.jsonl"

# slug -> (prompt, first paraphrase, second paraphrase). Each ends where the object begins. {the} and {The}
# are the subject's own article with its space, or nothing; {kind} is a further column of the table.
TEMPLATES: dict[str, tuple[str, str, str]] = {
    "landmark_city": (
        "{The}{subject} is located in the city of",
        "Tourists who want to see {the}{subject} travel to the city of",
        "The city that is home to {the}{subject} is",
    ),
    "country_capital": (
        "The capital of {the}{subject} is",
        "The national government of {the}{subject} sits in the city of",
        "The city that serves as the capital of {the}{subject} is",
    ),
    "city_country": (
        "The city of {subject} is in the country of",
        "{subject} is a major city in",
        "Anyone who lives in {subject} lives in the country of",
    ),
    "country_currency": (
        "The currency of {the}{subject} is the",
        "Shoppers in {the}{subject} pay with a currency called the",
        "The money that people use in {the}{subject} is the",
    ),
    "country_language": (
        "The main language spoken in {the}{subject} is",
        "In daily life, people in {the}{subject} mostly speak",
        "The newspapers in {the}{subject} are mostly written in",
    ),
    "country_continent": (
        "{The}{subject} is a country on the continent of",
        "On a map of the world, {the}{subject} is found on the continent of",
        "{The}{subject} is one of many countries in",
    ),
    "company_country": (
        "{subject} is a company based in the country of",
        "The headquarters of {subject} are in",
        "The company {subject} was founded in the country of",
    ),
    "product_company": (
        "{The}{subject} is a product of the company",
        "The company behind {the}{subject} is",
        "{The}{subject} was brought to the market by",
    ),
    "person_field": (
        "{subject} is best known for work in the field of",
        "The work of {subject} belongs to the field of",
        "{subject} became famous for contributions to",
    ),
    "book_author": (
        "The {kind} {subject} was written by",
        "The author of the {kind} {subject} is",
        "{subject} is a {kind} by",
    ),
    "painting_painter": (
        "{The}{subject} was painted by",
        "The artist who painted {the}{subject} is",
        "{The}{subject} is a famous painting by",
    ),
    "film_director": (
        "The movie {subject} was directed by",
        "The director of the movie {subject} is",
        "{subject} is a movie by the director",
    ),
    "element_symbol": (
        "The chemical symbol for {subject} is",
        "In the periodic table, {subject} is written as",
        "Chemists write {subject} with the symbol",
    ),
    "animal_group": (
        "The {subject} belongs to the group of animals called",
        "In biology, the {subject} is counted among the",
        "Zoologists place the {subject} among the",
    ),
    "animal_young": (
        "A young {subject} is called a",
        "The word for a baby {subject} is",
        "The young of the {subject} is known as a",
    ),
    "musician_instrument": (
        "{subject} is famous for playing the",
        "Fans know {subject} best for playing the",
        "Audiences came to hear {subject} play the",
    ),
    "athlete_sport": (
        "{subject} is famous for playing the sport of",
        "The sport that made {subject} famous is",
        "{subject} spent a long career playing",
    ),
    "dish_country": (
        "The dish called {subject} comes from the country of",
        "The country that is best known for {subject} is",
        "Travelers who want to taste real {subject} should go to",
    ),
    "river_continent": (
        "The {subject} River is on the continent of",
        "The waters of the {subject} River flow across",
        "On a map of the world, the {subject} River is found in",
    ),
    "thing_color": (
        "The usual color of {the}{subject} is",
        "Anyone who looks at {the}{subject} can see that its color is",
        "When people picture {the}{subject}, the color they see is",
    ),
}


class TableError(ValueError):
    """A table or template would give a wrong or unnatural prompt."""


@dataclass(frozen=True)
class Fact:
    """One row of one table: a subject, its object, and the other objects that would also be right."""

    relation: str
    subject: str
    target: str
    also_true: frozenset[str]
    words: Mapping[str, str]  # what the templates may name: The, the, kind

    @property
    def key(self) -> str:
        """The name that seeds every choice about this fact, so that a new row changes no other fact."""
        return f"{self.relation}/{self.subject}"

    def prompt(self, template: str) -> tuple[str, int]:
        """Return the filled template and the character offset of the subject in it."""
        before, after = template.split("{subject}")
        start = before.format(**self.words)
        return start + self.subject + after.format(**self.words), len(start)

    def accepts(self, target: str) -> bool:
        """Whether ``target`` is a right object for this subject."""
        return target == self.target or target in self.also_true


def read_table(relation: str, path: Path) -> list[Fact]:
    """Read one table. Columns: subject, object, also_true (``;`` between), and optionally article, kind."""
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t", strict=True)
        if wrong := {"subject", "object", "also_true"} ^ set(reader.fieldnames or ()) - {"article", "kind"}:
            raise TableError(f"{path.name}: columns missing or unknown: {sorted(wrong)}")
        rows = list(reader)
    facts = []
    for number, row in enumerate(rows, start=2):
        if None in row or not all(row.values()):
            raise TableError(f"{path.name}:{number}: wrong number of cells; write {EMPTY!r} for an empty one")
        cells = {name: "" if cell == EMPTY else cell for name, cell in row.items()}
        article = cells.get("article", "")
        words = {
            "the": f"{article} " if article else "",
            "The": f"{article.capitalize()} " if article else "",
            "kind": cells.get("kind", ""),
        }
        also_true = frozenset(cells["also_true"].split(";")) - {""}
        facts.append(Fact(relation, cells["subject"], cells["object"], also_true, words))
    subjects = [fact.subject for fact in facts]
    if twice := {subject for subject in subjects if subjects.count(subject) > 1}:
        raise TableError(f"{path.name}: the same subject twice: {sorted(twice)}")
    return facts


def check_prompt(prompt: str, target: str) -> None:
    """Refuse a prompt that gives its object away, breaks spacing, or has the wrong indefinite article."""
    sentence = f"{prompt} {target}"
    problems = []
    if re.search(rf"\b{re.escape(target)}\b", prompt, re.IGNORECASE):
        problems.append("names its own object")
    if sentence != " ".join(sentence.split()):
        problems.append("has stray spaces")
    if not prompt[0].isupper():
        problems.append("does not begin with a capital letter")
    if re.search(r"\ba [aeiou]|\ban [^aeiou]", sentence, re.IGNORECASE):
        problems.append("has 'a' where 'an' is right, or the reverse")
    if problems:
        raise TableError(f"{sentence!r} {' and '.join(problems)}")


def rank(*parts: str) -> int:
    """A seeded number for a choice. A hash, because the random module's sequences may change."""
    return int.from_bytes(hashlib.sha256("/".join((str(SEED), *parts)).encode()).digest()[:8], "big")


def counterfactual(fact: Fact, relation: Sequence[Fact]) -> str:
    """Choose another object of the relation that is false for this subject, each object equally likely."""
    wrong = sorted({other.target for other in relation if not fact.accepts(other.target)})
    if not wrong:
        raise TableError(f"{fact.key}: no other object in the relation is false for it")
    return min(wrong, key=lambda target: rank("target_new", fact.key, target))


def neighbours(fact: Fact, target_new: str, relation: Sequence[Fact]) -> list[dict[str, str]]:
    """Choose other subjects, those with the same object first; none for which ``target_new`` is right."""
    others = [other for other in relation if other.subject != fact.subject and not other.accepts(target_new)]
    others.sort(key=lambda other: (other.target != fact.target, rank("neighbour", fact.key, other.subject)))
    if len(others) < NEIGHBOURS:
        raise TableError(f"{fact.key}: {len(others)} neighbours exist and {NEIGHBOURS} are needed")
    template = TEMPLATES[fact.relation][0]
    return [{"prompt": other.prompt(template)[0], "target": other.target} for other in others[:NEIGHBOURS]]


def slug(text: str) -> str:
    """Lower-case words joined by hyphens."""
    return "-".join(re.findall(r"[a-z0-9]+", text.lower().replace("'", "").replace(".", "")))


def build(tables: Path = TABLES) -> list[dict[str, Any]]:
    """Return the rows of facts.jsonl, in the order of ``TEMPLATES`` and of each table."""
    rows: list[dict[str, Any]] = []
    for relation, templates in TEMPLATES.items():
        facts = read_table(relation, tables / f"facts_{relation}.tsv")
        for fact in facts:
            filled = [fact.prompt(template) for template in templates]
            for prompt, _ in filled:
                check_prompt(prompt, fact.target)
            text, start = filled[0]
            target_new = counterfactual(fact, facts)
            rows.append(
                {
                    "id": f"facts-{len(rows) + 1:04d}",
                    "text": text,
                    "label": None,
                    "group": slug(fact.subject),
                    "spans": {"subject": [start, start + len(fact.subject)]},
                    "subject": fact.subject,
                    "relation": relation,
                    "target": fact.target,
                    "target_new": target_new,
                    "paraphrases": [prompt for prompt, _ in filled[1:]],
                    "neighbours": neighbours(fact, target_new, facts),
                }
            )
    return rows


def serialise(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """One JSON object a line, UTF-8, with a trailing newline."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


if __name__ == "__main__":
    OUTPUT.write_bytes(serialise(build()))
