"""`Fact`: one subject, what is asked about it, and its true and its new object.

Enters: strings, or a prompt set in the columns of the bundled `facts` (those of every format in facts.py). Leaves:
frozen facts, checked. Does not know tokenizers, models or edits.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from reprobe.errors import CorruptArtifact, DataError
from reprobe.prompts.facts import fill
from reprobe.prompts.prompt_set import PromptSet
from reprobe.provenance import rebuilding, text, texts


@dataclass(frozen=True)
class Neighbour:
    """A prompt about another subject, and its own true object."""

    prompt: str
    true: str


@dataclass(frozen=True)
class Fact:
    """`prompt` stops where the object begins; `span` is where `subject` stands in it, in characters.

    `new` is an object to be written, `true` the one that it replaces; both without a leading blank, None if there is
    none. `paraphrases` are other prompts for the fact, `neighbours` prompts that an edit must not touch,
    `generation_prompts` beginnings of texts about the subject. `group` names facts that are not independent.
    """

    prompt: str
    subject: str
    span: tuple[int, int]
    new: str | None = None
    true: str | None = None
    paraphrases: tuple[str, ...] = ()
    neighbours: tuple[Neighbour, ...] = ()
    generation_prompts: tuple[str, ...] = ()
    id: str = ""
    group: str = ""

    def __post_init__(self) -> None:
        start, end = self.span
        if not self.subject.strip() or self.prompt[start:end] != self.subject:
            raise DataError(f"{self._named}: characters {start}–{end} of the prompt are not the subject")
        for what, given in (("new", self.new), ("true", self.true)):
            if given is not None and not given.strip():
                raise DataError(f"{self._named}: its {what} object is empty; give at least one word")

    @classmethod
    def of(cls, *, subject: str, prompt: str, new: str | None = None, true: str | None = None) -> "Fact":
        """A fact from its strings; `prompt` holds the subject, or {} in its place.

        Raises `DataError` if the subject does not stand in the prompt, or something is empty.
        """
        if not subject.strip():
            raise DataError(f"the subject is empty; the prompt is {prompt!r}")
        text, span = fill(prompt, subject)
        if span is None:
            raise DataError(f"the subject {subject!r} does not stand in its prompt {prompt!r}; write it there, or {{}}")
        return cls(text, subject, (span[0], span[1]), _bare(new), _bare(true), group=subject)

    @property
    def wanted(self) -> str:
        """The new object; `DataError` if there is none."""
        if self.new is None:
            raise DataError(f"{self._named} has no new object to be written")
        return self.new

    @property
    def _named(self) -> str:
        return f"the fact {self.id or self.prompt!r} about {self.subject!r}"

    def to_json(self) -> dict[str, Any]:
        """What an edit keeps of a fact: all that has a value."""
        return {name: value for name, value in asdict(self).items() if value not in (None, (), "")}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Fact":
        """What `to_json` made. Raises `CorruptArtifact` for anything else."""
        known = {f.name for f in fields(cls)}
        if not isinstance(value, Mapping) or not set(value) <= known or not {"prompt", "subject", "span"} <= set(value):
            raise CorruptArtifact(f"a fact has the fields {', '.join(sorted(known))}")
        with rebuilding("not a fact"):
            first, end = value["span"]
            lists = {k: texts(value.get(k, ())) for k in ("paraphrases", "generation_prompts")}
            others: dict[str, Any] = {k: text(v) for k, v in value.items() if k not in (*lists, "span", "neighbours")}
            return cls(
                **others | lists,
                span=(int(first), int(end)),
                neighbours=tuple(Neighbour(text(n["prompt"]), text(n["true"])) for n in value.get("neighbours", ())),
            )


def facts_of(prompts: PromptSet | str | Path, *, limit: int | None = None) -> list[Fact]:
    """The facts of a prompt set, or of what `PromptSet.load` takes, in order.

    Raises `DataError`, naming the prompts, if there is no span `subject`.
    """
    data = prompts if isinstance(prompts, PromptSet) else PromptSet.load(prompts)
    facts = []
    for row in (data if limit is None else data.head(limit)).frame.iter_rows(named=True):
        spans = {s["name"]: (s["start"], s["end"]) for s in row["spans"]}
        if row["text"] is None or "subject" not in spans:
            raise DataError(f"{data.name}: {row['id']} is no text with a span 'subject', so it is not a fact")
        start, end = spans["subject"]
        neighbours = [n for n in row.get("neighbours") or () if n["target"] is not None]
        facts.append(
            Fact(
                row["text"],
                row["text"][start:end],
                (start, end),
                new=_bare(row.get("target_new")),
                true=_bare(row.get("target")),
                paraphrases=tuple(row.get("paraphrases") or ()),
                neighbours=tuple(Neighbour(n["prompt"], n["target"].strip()) for n in neighbours),
                generation_prompts=tuple(row.get("generation_prompts") or ()),
                id=row["id"],
                group=row["group"],
            )
        )
    return facts


def continuation(prompt: str, object_: str) -> str:
    """An object as it continues a prompt: after a blank, unless the prompt ends with white space."""
    return object_ if prompt[-1:].isspace() else " " + object_


def _bare(text: str | None) -> str | None:
    return None if text is None else text.strip()
