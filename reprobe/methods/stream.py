"""A stream of text as tokens, each with the characters it is of: what units are dissected on.

Enters: a `PromptSet`, texts, a file, or text sampled from the model; a language model's tokenizer. Leaves: a
`TokenStream`, flat arrays over all tokens in rows of bounded length, and the documents they came from. No padding is in
it. Does not know activations or concepts.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from reprobe.errors import UnsupportedOperation, UsageError
from reprobe.methods.moments import Corpus, Sample
from reprobe.model.chat import last_content_start, render
from reprobe.model.language_model import LanguageModel
from reprobe.model.text import Span, special_ids
from reprobe.progress import Progress, silent
from reprobe.prompts import PromptSet
from reprobe.provenance import digest, digest_chunks

#: What a stream is made from: prompts, texts, a .txt file or anything that `PromptSet.load` takes, sampled text.
Source = PromptSet | Corpus | Sample | str | Path | Sequence[str]
#: Tokens of a row unless the caller says otherwise: attention over so many costs little beside the rest of a block.
WINDOW = 128
#: Documents tokenised at a time.
_CHUNK = 4096


@dataclass(frozen=True)
class Document:
    """A text of a stream, the `number`-th; of a prompt also its named spans (characters of `text`) and its columns.

    `rendered` texts are chats, whose template brought its own special tokens."""

    text: str
    number: int = 0
    rendered: bool = False
    spans: Mapping[str, Span] = field(default_factory=dict)
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class TokenStream:
    """Tokens in rows: row r holds the tokens `starts[r]` … `starts[r + 1] − 1` of the flat arrays.

    Token t has the id `ids[t]` and is of the characters `begin[t]` … `end[t] − 1` of document `document[t]`. `counted`
    marks those that count: all but special tokens, which stand for no text, and the first of each row, which have
    nothing before them (attention falls back on them, and what they carry is that and not their word). The counted
    tokens are numbered from 0 in their order; `places` says where they are.
    """

    name: str
    ids: Int[np.ndarray, " tokens"]
    starts: Int[np.ndarray, " rows+1"]
    begin: Int[np.ndarray, " tokens"]
    end: Int[np.ndarray, " tokens"]
    document: Int[np.ndarray, " tokens"]
    counted: Bool[np.ndarray, " tokens"]
    documents: tuple[Document, ...]
    about: Mapping[str, Any]

    @property
    def n(self) -> int:
        """How many tokens count."""
        return len(self.places)

    @cached_property
    def places(self) -> Int[np.ndarray, " counted"]:
        return np.flatnonzero(self.counted)

    @cached_property
    def numbers(self) -> Int[np.ndarray, " tokens"]:
        """The number of each token among those that count, −1 for the others."""
        return np.where(self.counted, np.cumsum(self.counted) - 1, -1)

    @cached_property
    def row(self) -> Int[np.ndarray, " tokens"]:
        """The row of each token."""
        return np.repeat(np.arange(len(self.starts) - 1), np.diff(self.starts))

    @cached_property
    def digest(self) -> str:
        """sha256 over the tokens, their rows and which of them count."""
        arrays = (self.ids.astype(np.int64), self.starts.astype(np.int64), self.counted)
        return digest(["token stream", digest_chunks(a.tobytes() for a in arrays)])

    def pieces(self, first: int, last: int) -> list[str]:
        """The text of the tokens first … last − 1 of one document, token by token, with nothing between them lost."""
        text, at = self.documents[int(self.document[first])].text, int(self.begin[first])
        cuts = [at]
        for t in range(first + 1, last):
            at = max(at, int(self.begin[t]))
            cuts.append(at)
        cuts.append(max(at, int(self.end[last - 1])))
        return [text[a:b] for a, b in pairwise(cuts)]


def token_stream(
    lm: LanguageModel,
    source: Source,
    *,
    tokens: int | None = None,
    window: int = WINDOW,
    skip: int = 1,
    progress: Progress = silent,
) -> TokenStream:
    """The tokens of `source`, in rows of at most `window` tokens (and the model's context), a row never of two texts.

    Of all, the first `tokens` (None: all; of a `Corpus` or `Sample`, what that says). `skip` tokens at the beginning of
    each row do not count. Chat messages are rendered with the tokenizer's template. Raises `UsageError` if there is no
    text, `UnsupportedOperation` for a tokenizer that does not say which characters its tokens come from.
    """
    tokenizer = lm.tokenizer
    if window < 1 or skip < 0 or (tokens is not None and tokens < 1):
        raise UsageError(f"window={window}, skip={skip}, tokens={tokens}: 1 or more, 0 or more, 1 or more")
    if not getattr(tokenizer, "is_fast", False):
        raise UnsupportedOperation(
            f"a {type(tokenizer).__name__} does not say which characters its tokens come from, so concepts have no "
            "tokens; load the fast tokenizer"
        )
    name, about, found, limit = _documents(lm, source, tokens, progress)
    kept = [d for d in found if d.text.strip()]
    documents = tuple(replace(d, number=i) for i, d in enumerate(kept))
    if not documents:
        raise UsageError(f"{name}: there is no text to dissect on")
    limit = tokens if limit is None else limit
    width = min(window, lm.context or window)
    special = special_ids(tokenizer)
    ids: list[np.ndarray] = []
    offsets: list[np.ndarray] = []
    of: list[int] = []
    lengths: list[int] = []
    total = 0
    for i, (row, characters) in enumerate(_encoded(tokenizer, documents)):
        for start in range(0, len(row), width):
            end = min(start + width, len(row), *([] if limit is None else [start + limit - total]))
            if end <= start:
                break
            ids.append(row[start:end])
            offsets.append(characters[start:end])
            of.append(i)
            lengths.append(end - start)
            total += end - start
        if total == limit:
            break
    starts = np.concatenate([[0], np.cumsum(lengths)])
    flat = np.concatenate(ids)
    within = np.arange(len(flat)) - np.repeat(starts[:-1], lengths)
    counted = ~np.isin(flat, special) & (within >= skip)
    begin, end_ = np.concatenate(offsets).T
    document = np.repeat(of, lengths)
    about = {**about, "window": width, "skip": skip, "documents": int(document[-1]) + 1}
    return TokenStream(name, flat, starts, begin, end_, document, counted, documents[: int(document[-1]) + 1], about)


def _documents(
    lm: LanguageModel, source: Source, tokens: int | None, progress: Progress
) -> tuple[str, dict[str, Any], list[Document], int | None]:
    """Name, what to record, the texts, and the number of tokens if the source itself says one."""
    if isinstance(source, str | Path) and Path(source).suffix != ".txt":
        source = PromptSet.load(source)
    if isinstance(source, PromptSet):
        return source.name, {"data": source.name, "digest": source.digest}, list(_prompts(source, lm.tokenizer)), None
    if isinstance(source, Sample):
        wanted = source.tokens if tokens is None else tokens
        source = replace(source, tokens=wanted)
        texts = source.texts(lm, progress)
        return f"sampled from {lm.name}", source.to_json(), [Document(text) for text in texts], wanted
    corpus = source if isinstance(source, Corpus) else Corpus.load(source)
    return corpus.name, {"corpus": corpus.name}, [Document(text) for text in corpus.texts], tokens or corpus.tokens


def _prompts(prompts: PromptSet, tokenizer: Any) -> Iterator[Document]:
    for row in prompts.frame.iter_rows(named=True):
        text, messages, spans = (row.pop(name) for name in ("text", "messages", "spans"))
        chat, shift = text is None, 0
        if chat:
            text = render(messages, tokenizer)
            shift = last_content_start(messages, tokenizer, text) if spans else 0
        named = {s["name"]: (s["start"] + shift, s["end"] + shift) for s in spans}
        yield Document(text, rendered=chat, spans=named, columns=row)


def _encoded(
    tokenizer: Any, documents: Sequence[Document]
) -> Iterator[tuple[Int[np.ndarray, " tokens"], Int[np.ndarray, "tokens 2"]]]:
    """Token ids and characters of each text."""
    for first in range(0, len(documents), _CHUNK):
        part = documents[first : first + _CHUNK]
        found: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        for rendered in {d.rendered for d in part}:
            members = [i for i, d in enumerate(part) if d.rendered is rendered]
            coded = tokenizer(
                [part[i].text for i in members],
                add_special_tokens=not rendered,
                return_offsets_mapping=True,
                return_attention_mask=False,
                verbose=False,
            )
            for i, ids, offsets in zip(members, coded["input_ids"], coded["offset_mapping"], strict=True):
                flat = np.fromiter(chain.from_iterable(offsets), np.int64, 2 * len(ids))
                found[i] = np.asarray(ids, np.int64), flat.reshape(-1, 2)
        yield from (found[i] for i in range(len(part)))
