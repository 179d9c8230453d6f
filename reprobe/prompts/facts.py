"""Facts: subject, relation, object. Known-facts, CounterFact in two layouts, and relations JSON.

Enters: their files as `Content`. Leaves: frames in the columns of the bundled `facts`: `subject`, `relation`,
`target` (the true object), `target_new` (a counterfactual one, null where the file has none), `paraphrases`
(a list of prompts), `neighbours` (a list of {prompt, target}), the subject as group, and the span `subject`.
Lists are empty and labels null where there are none. A prompt in which the subject does not stand verbatim
has no such span, so that reading at `span:subject` refuses it by name. Does not know models or edits.
"""

import re
from dataclasses import dataclass
from typing import Any

import polars as pl

from reprobe.errors import DataError
from reprobe.prompts.columns import from_records
from reprobe.prompts.content import Content, numbered

_PROMPTS = pl.List(pl.String)
_TYPES: dict[str, pl.DataType] = {
    "relation": pl.String(),
    "target": pl.String(),
    "target_new": pl.String(),
    "paraphrases": _PROMPTS,
    "neighbours": pl.List(pl.Struct({"prompt": pl.String, "target": pl.String})),
    "attribute_prompts": _PROMPTS,
    "generation_prompts": _PROMPTS,
}


@dataclass(frozen=True)
class KnownFacts:
    """The facts of causal tracing. Prompts are taken as they stand: many go on after their own template."""

    name = "known-facts"
    needs = ".json: a list of {known_id, subject, attribute, prompt, …}"

    def fits(self, content: Content) -> bool:
        return content.kind == "json" and {"known_id", "subject", "attribute", "prompt"} <= content.keys

    def frame(self, content: Content) -> pl.DataFrame:
        rows = []
        for i, source in enumerate(content.records):
            subject, prompt = content.text(source, "subject", i), content.text(source, "prompt", i)
            kept = {k: source.get(k) for k in ("template", "prediction") if k in content.keys}
            rows.append(
                _fact(
                    f"{content.stem}-{content.field(source, 'known_id', i)}",
                    prompt,
                    subject,
                    find(prompt, subject),
                    relation=content.text_or_none(source, "relation_id", i),
                    target=content.text(source, "attribute", i),
                    **kept,
                )
            )
        return _frame(rows, content)


@dataclass(frozen=True)
class CounterFact:
    """CounterFact as published: `requested_rewrite` with a template, and lists of prompts beside it.

    The neighbours' answer is the fact's true object: that is how they were chosen. `attribute_prompts` and
    `generation_prompts` are kept as columns.
    """

    name = "counterfact"
    needs = ".json: a list of {case_id, requested_rewrite: {prompt, subject, target_new, target_true, …}, …}"

    def fits(self, content: Content) -> bool:
        return content.kind == "json" and {"case_id", "requested_rewrite"} <= content.keys

    def frame(self, content: Content) -> pl.DataFrame:
        rows = []
        for i, source in enumerate(content.records):
            rewrite = content.field(source, "requested_rewrite", i)
            subject = content.text(rewrite, "subject", i)
            prompt, span = fill(content.text(rewrite, "prompt", i), subject)
            true, new = (content.text(content.field(rewrite, k, i), "str", i) for k in ("target_true", "target_new"))
            kept = ("attribute_prompts", "generation_prompts")
            rows.append(
                _fact(
                    f"{content.stem}-{content.field(source, 'case_id', i)}",
                    prompt,
                    subject,
                    span,
                    relation=content.text_or_none(rewrite, "relation_id", i),
                    target=true,
                    target_new=new,
                    paraphrases=_prompts(content, source.get("paraphrase_prompts"), i),
                    neighbours=_neighbours(_prompts(content, source.get("neighborhood_prompts"), i), true),
                    **{k: _prompts(content, source.get(k), i) for k in kept if k in content.keys},
                )
            )
        return _frame(rows, content)


@dataclass(frozen=True)
class CounterFactFlat:
    """CounterFact in EasyEdit's layout: filled prompts, one paraphrase and one neighbour, no relation."""

    name = "counterfact-flat"
    needs = ".json: a list of {prompt, subject, target_new, ground_truth, rephrase_prompt, …}"

    def fits(self, content: Content) -> bool:
        return content.kind == "json" and {"prompt", "subject", "target_new", "ground_truth"} <= content.keys

    def frame(self, content: Content) -> pl.DataFrame:
        rows = []
        for i, source in enumerate(content.records):
            subject = content.text(source, "subject", i)
            prompt, span = fill(content.text(source, "prompt", i), subject)
            rows.append(
                _fact(
                    f"{content.stem}-{source.get('case_id', i)}",
                    prompt,
                    subject,
                    span,
                    target=content.text(source, "ground_truth", i),
                    target_new=content.text(source, "target_new", i),
                    paraphrases=_prompts(content, source.get("rephrase_prompt"), i),
                    neighbours=_neighbours(
                        _prompts(content, source.get("locality_prompt"), i),
                        content.text_or_none(source, "locality_ground_truth", i),
                    ),
                )
            )
        return _frame(rows, content)


@dataclass(frozen=True)
class Relations:
    """One relation: templates and many (subject, object). `template` is the number of one, or a text with {}.

    The file's other templates, filled, are the paraphrases.
    """

    template: int | str = 0
    name = "relations"
    needs = ".json: {name, prompt_templates: ['… {} …'], samples: [{subject, object}]}"

    def fits(self, content: Content) -> bool:
        return isinstance(content.value, dict) and {"prompt_templates", "samples"} <= content.keys

    def frame(self, content: Content) -> pl.DataFrame:
        source = content.value
        if not isinstance(source["samples"], list):
            raise DataError(f"{content.path}: samples must be a list of {{subject, object}}")
        templates = _prompts(content, source["prompt_templates"], 0)
        if isinstance(self.template, int) and not 0 <= self.template < len(templates):
            listed = "; ".join(f"{n}: {t!r}" for n, t in enumerate(templates))
            raise DataError(f"{content.path} has no template {self.template}. There is: {listed or 'none'}")
        chosen = templates[self.template] if isinstance(self.template, int) else self.template
        if chosen.count("{}") != 1:
            raise DataError(f"{content.path}: a template needs one {{}} for the subject: {chosen!r}")
        zero_shot = _prompts(content, source.get("prompt_templates_zs"), 0)
        others = [t for t in dict.fromkeys([*templates, *zero_shot]) if t != chosen]
        rows = []
        for i, sample in enumerate(source["samples"]):
            subject = content.text(sample, "subject", i)
            prompt, span = fill(chosen, subject)
            rows.append(
                _fact(
                    None,
                    prompt,
                    subject,
                    span,
                    relation=content.text_or_none(source, "name", 0) or content.stem,
                    target=content.text(sample, "object", i),
                    paraphrases=[fill(t, subject)[0] for t in others],
                )
            )
        return _frame(rows, content)


def fill(template: str, subject: str) -> tuple[str, list[int] | None]:
    """The template with `subject` for its {}, and where the subject then stands.

    A text without {} is a prompt already: the subject is looked for in it. `DataError` for more than one {}.
    """
    if template.count("{}") > 1:
        raise DataError(f"a template needs one {{}} for the subject {subject!r}: {template!r}")
    start = template.find("{}")
    if start < 0:
        return template, find(template, subject)
    return template[:start] + subject + template[start + 2 :], [start, start + len(subject)]


def find(text: str, part: str) -> list[int] | None:
    """Where `part` first stands in `text` as a word of its own, or if it never does, at all; None if nowhere."""
    alone = re.search(rf"(?<!\w){re.escape(part)}(?!\w)", text)
    start = alone.start() if alone else text.find(part)
    return [start, start + len(part)] if part and start >= 0 else None


def _fact(
    id_: str | None,
    prompt: str,
    subject: str,
    span: list[int] | None,
    *,
    target: str,
    relation: str | None = None,
    target_new: str | None = None,
    paraphrases: list[str] | None = None,
    neighbours: list[dict[str, str | None]] | None = None,
    **kept: Any,
) -> dict[str, Any]:
    return {
        **({} if id_ is None else {"id": id_}),
        "text": prompt,
        "group": subject,
        "spans": {} if span is None else {"subject": span},
        "subject": subject,
        "relation": relation,
        "target": target.strip(),
        "target_new": None if target_new is None else target_new.strip(),
        "paraphrases": paraphrases or [],
        "neighbours": neighbours or [],
        **kept,
    }


def _frame(rows: list[dict[str, Any]], content: Content) -> pl.DataFrame:
    """Rows as a frame; columns that are null or empty in every row still have their type."""
    frame = from_records(rows, content.stem)
    if "id" not in frame.columns:
        frame = frame.with_columns(numbered(content, frame.height))
    return frame.cast({c: kind for c, kind in _TYPES.items() if c in frame.columns})


def _prompts(content: Content, value: Any, i: int) -> list[str]:
    """A prompt or a list of prompts, as a list."""
    listed = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(listed, list) or not all(isinstance(p, str) for p in listed):
        raise DataError(f"{content.path}: prompts of row {i + 1} must be a string or a list of strings, not {value!r}")
    return listed


def _neighbours(prompts: list[str], target: str | None) -> list[dict[str, str | None]]:
    return [{"prompt": prompt, "target": target} for prompt in prompts]
