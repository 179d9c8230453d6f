"""Prompts become token rows.

Enters: a `PromptSet`, a tokenizer, a `Position`. Leaves: a `TokenTable`, all tokens and the wanted ones as
flat arrays, and the index that a store keeps of them. Characters become tokens through the tokenizer's offsets, as in
`model.text`, which does the same for a few prompts at a time. Does not know models, packs or padding.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from reprobe.errors import DataError, PromptTooLong, UnsupportedOperation, UsageError
from reprobe.model.chat import last_content_start, render
from reprobe.model.text import Truncate, check_truncate, kept_tokens, special_ids
from reprobe.prompts.columns import WHOLE, some
from reprobe.prompts.positions import Position
from reprobe.prompts.prompt_set import PromptSet

#: Prompts encoded at a time: enough for the tokenizer's threads, few enough that offsets need no memory.
CHUNK = 4096

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class PromptTokens:
    """One prompt of a `TokenTable`: its token ids, and which of them (counted from 0) are wanted."""

    id: str
    tokens: NDArray[np.int32]
    rows: NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class TokenTable:
    """Token ids of n prompts and the tokens wanted of each, as flat arrays without a Python object per token.

    Prompt i has the tokens `tokens[starts[i]:starts[i+1]]`; wanted of them are
    `rows[row_starts[i]:row_starts[i+1]]`, positions inside the prompt, ascending, at least one. `pooled`:
    each prompt's wanted tokens are averaged into one row.
    """

    ids: list[str]
    tokens: NDArray[np.int32]
    starts: Ints
    rows: NDArray[np.int32]
    row_starts: Ints
    pooled: bool

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def n_tokens(self) -> Ints:
        """Tokens of each prompt, (n,)."""
        return np.diff(self.starts)

    @property
    def n_rows(self) -> Ints:
        """Rows that each prompt gives, (n,): its wanted tokens, or one if they are pooled."""
        return np.ones(len(self), np.int64) if self.pooled else np.diff(self.row_starts)

    def prompt(self, i: int) -> PromptTokens:
        """Prompt i, as views."""
        return PromptTokens(
            self.ids[i],
            self.tokens[self.starts[i] : self.starts[i + 1]],
            self.rows[self.row_starts[i] : self.row_starts[i + 1]],
        )


def tokenize(
    prompts: PromptSet,
    tokenizer: Any,
    *,
    at: Position,
    context: int | None,
    truncate: Truncate | None = None,
) -> TokenTable:
    """All prompts as tokens, with those at `at` marked.

    Texts get the special tokens the tokenizer adds; messages are rendered by its chat template
    (`chat.render`), which brings its own. No prompt may have more than `context` tokens (None: no limit):
    `PromptTooLong`, unless `truncate` says which side is cut. Special tokens at that side's end stay ("left" keeps BOS,
    "right" keeps SEP).

    Raises `DataError`, naming the prompts, if one has no token, has no token at `at`, lacks the span, or lost
    the wanted tokens of a named span to truncation (of the span `text` those that are left count). Raises
    `UnsupportedOperation` if spans are wanted of a tokenizer without offsets.
    """
    if at.span is not None and not getattr(tokenizer, "is_fast", False):
        raise UnsupportedOperation(
            f"position '{at}' needs a fast tokenizer: a {type(tokenizer).__name__} does not say which "
            "characters its tokens come from. Load the fast one, or read at last, all, mean or index:N"
        )
    check_truncate(truncate)
    special = special_ids(tokenizer)
    parts: list[_Part] = []
    too_long: list[tuple[int, str]] = []
    for encoded in _ahead(lambda frame: _encode(frame, tokenizer, at), prompts.frame.iter_slices(CHUNK)):
        lengths = np.diff(encoded.starts)
        if truncate is None and context is not None:
            over = np.flatnonzero(lengths > context)
            too_long += [(int(lengths[i]), encoded.ids[i]) for i in over]
        if not too_long:  # otherwise only lengths still matter, for the message
            parts.append(_wanted(encoded, at, special, context, truncate))
    if too_long:
        longest = [f"{id_} ({count} tokens)" for count, id_ in sorted(too_long, reverse=True)]
        raise PromptTooLong(
            f"{len(too_long)} of {len(prompts)} prompts of {prompts.name} are longer than the model's "
            f"context of {context} tokens: {some(longest)}. Shorten or cut them: --truncate left|right"
        )
    return TokenTable(
        prompts.ids,
        np.concatenate([p.tokens for p in parts]),
        _starts(np.concatenate([p.n_tokens for p in parts])),
        np.concatenate([p.rows for p in parts]),
        _starts(np.concatenate([p.n_rows for p in parts])),
        at.pooled,
    )


def token_table(ids: Sequence[str], tokens: Sequence[NDArray[np.int32]], *, at: Position) -> TokenTable:
    """Tokens that were made elsewhere, those of prompt `ids[i]` in `tokens[i]`, with those at `at` marked.

    Raises `UsageError` for a span, since only the text says which tokens it has, and `DataError`, naming the
    prompts, if one has no token at all or none at `at`.
    """
    if at.span is not None:
        raise UsageError(
            f"position '{at}' needs the prompts' texts, and here are only tokens: use last, all, mean or index:N"
        )
    lengths = np.fromiter(map(len, tokens), np.int64, len(tokens))
    if not lengths.all():
        raise DataError(f"there are no tokens of {some(i for i, n in zip(ids, lengths, strict=True) if not n)}")
    nothing = np.zeros(0, np.int64)
    chunk = _Encoded(list(ids), np.concatenate(tokens), _starts(lengths), nothing, nothing, nothing, nothing)
    part = _wanted(chunk, at, nothing, None, None)
    return TokenTable(chunk.ids, part.tokens, chunk.starts, part.rows, _starts(part.n_rows), at.pooled)


def token_frame(table: TokenTable, order: NDArray[np.integer[Any]]) -> pl.DataFrame:
    """All tokens of the prompts in `order`: one line per prompt, with `prompt` (its id) and `tokens` (Int32 lists)."""
    lengths = table.n_tokens[order]
    flat = table.tokens[_ranges(table.starts[order], lengths)]
    tokens = pa.LargeListArray.from_arrays(_starts(lengths), flat)
    return pl.DataFrame({"prompt": [table.ids[i] for i in order], "tokens": pl.from_arrow(tokens)})


def index_frame(
    prompts: PromptSet | None, table: TokenTable, order: NDArray[np.integer[Any]] | None = None
) -> pl.DataFrame:
    """What each row of a store is: one line per row, prompts in `order` (their numbers; as given if None).

    Columns: row (Int64, from 0), prompt (its id), position and token (Int32; null where a row is pooled),
    label, group, pair, n_tokens (Int32, of the prompt). Where nothing but tokens is known (`prompts` is None),
    labels and pairs are null and each prompt is its own group.
    """
    if prompts is not None and prompts.ids != table.ids:
        raise DataError(f"the token table is not of {prompts.name}: the prompt ids differ")
    chosen = np.arange(len(table)) if order is None else np.asarray(order, np.int64)
    if len(np.unique(chosen)) != len(chosen) or (len(chosen) and not 0 <= chosen.min() <= chosen.max() < len(table)):
        raise UsageError(f"order must hold numbers of prompts, 0–{len(table) - 1}, each once")
    counts = table.n_rows[chosen]
    prompt = np.repeat(chosen, counts)
    columns = (_unlabelled(table.ids) if prompts is None else prompts.frame).select(
        pl.col("id").alias("prompt"), "label", "group", "pair"
    )[prompt]
    if table.pooled:
        position = token = pl.lit(None, pl.Int32)
    else:
        at = table.rows[_ranges(table.row_starts[chosen], counts)]
        position, token = pl.lit(pl.Series(at)), pl.lit(pl.Series(table.tokens[table.starts[prompt] + at]))
    return columns.select(
        pl.int_range(pl.len(), dtype=pl.Int64).alias("row"),
        "prompt",
        position.alias("position"),
        token.alias("token"),
        "label",
        "group",
        "pair",
        pl.lit(pl.Series(table.n_tokens[prompt].astype(np.int32))).alias("n_tokens"),
    )


def _unlabelled(ids: list[str]) -> pl.DataFrame:
    unknown = {"label": pl.lit(None, pl.Int64), "pair": pl.lit(None, pl.String)}
    return pl.DataFrame({"id": ids, "group": ids}).with_columns(**unknown)


@dataclass(frozen=True, eq=False)
class _Encoded:
    """A chunk of prompts before truncation. `begin` and `end`: characters of each token, (total,); of the
    wanted span of each prompt, `span_begin` and `span_end`, (n,). All four are empty if no span is wanted."""

    ids: list[str]
    tokens: NDArray[np.int32]
    starts: Ints
    begin: Ints
    end: Ints
    span_begin: Ints
    span_end: Ints


@dataclass(frozen=True, eq=False)
class _Part:
    """A chunk's share of a `TokenTable`."""

    tokens: NDArray[np.int32]
    n_tokens: Ints
    rows: NDArray[np.int32]
    n_rows: Ints


def _ahead(function: Callable[[pl.DataFrame], _Encoded], chunks: Iterable[pl.DataFrame]) -> Iterator[_Encoded]:
    """`function` of each chunk in turn, the next one in a thread while the last is put to use."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="reprobe-tokenize") as pool:
        pending: Future[_Encoded] | None = None
        for chunk in chunks:
            following = pool.submit(function, chunk)
            if pending is not None:
                yield pending.result()
            pending = following
        if pending is not None:
            yield pending.result()


def _encode(frame: pl.DataFrame, tokenizer: Any, at: Position) -> _Encoded:
    ids = frame["id"].to_list()
    texts = frame["text"].to_list()
    chats = [i for i, text in enumerate(texts) if text is None]
    shift = np.zeros(len(ids), np.int64)  # where the text that spans are measured in begins
    if chats:
        conversations = frame["messages"].to_list()
        for i in chats:
            try:
                texts[i] = render(conversations[i], tokenizer)
                if at.span not in (None, WHOLE):
                    shift[i] = last_content_start(conversations[i], tokenizer, texts[i])
            except DataError as error:
                raise DataError(f"prompt {ids[i]!r}: {error}") from error
    tokens: list[list[int]] = [[]] * len(ids)
    offsets: list[list[tuple[int, int]]] = [[]] * len(ids)
    chat = set(chats)
    plain = [i for i in range(len(ids)) if i not in chat]
    for members, specials in ((plain, True), (chats, False)):
        if not members:
            continue
        # verbose=False: a prompt beyond the context is refused or cut by us, not warned about
        batch = tokenizer(
            [texts[i] for i in members],
            add_special_tokens=specials,
            padding=False,
            truncation=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
            **({"return_offsets_mapping": True} if at.span is not None else {}),
        )
        for j, i in enumerate(members):
            tokens[i] = batch["input_ids"][j]
            if at.span is not None:
                offsets[i] = batch["offset_mapping"][j]
    lengths = np.fromiter(map(len, tokens), np.int64, len(tokens))
    if not lengths.all():
        empty = [id_ for id_, length in zip(ids, lengths, strict=True) if not length]
        raise DataError(f"the tokenizer makes no token of the text of {some(empty)}")
    total = int(lengths.sum())
    characters = np.fromiter(chain.from_iterable(chain.from_iterable(offsets)), np.int64).reshape(-1, 2)
    span_begin, span_end = (
        (np.zeros(0, np.int64),) * 2 if at.span is None else _span_characters(frame, at.span, texts, shift)
    )
    return _Encoded(
        ids,
        np.fromiter(chain.from_iterable(tokens), np.int32, total),
        _starts(lengths),
        characters[:, 0],
        characters[:, 1],
        span_begin,
        span_end,
    )


def _span_characters(frame: pl.DataFrame, name: str, texts: list[str], shift: Ints) -> tuple[Ints, Ints]:
    """First and past-the-last character of the span in each prompt's text."""
    if name == WHOLE:
        return np.zeros(len(texts), np.int64), np.fromiter(map(len, texts), np.int64, len(texts))
    of = pl.col("spans").list.eval(pl.element().filter(pl.element().struct.field("name") == name)).list.first()
    found = frame.select(of.struct.field("start"), of.struct.field("end"))
    lacking = frame.filter(found["start"].is_null())
    if lacking.height:
        names = lacking["spans"].explode().drop_nulls().struct.field("name").unique().sort()
        there = ", ".join([WHOLE, *names.to_list()])
        raise DataError(f"no span {name!r} in {some(lacking['id'])}; spans there: {there}")
    return found["start"].to_numpy() + shift, found["end"].to_numpy() + shift


def _wanted(chunk: _Encoded, at: Position, special: Ints, context: int | None, truncate: Truncate | None) -> _Part:
    """The chunk cut to `context`, and the wanted tokens of what is left."""
    n = len(chunk.ids)
    keep, cut = _kept(chunk, special, context, truncate)
    lengths = np.diff(chunk.starts)
    owner = np.repeat(np.arange(n), lengths)
    kept = np.bincount(owner[keep], minlength=n)
    # a token's number among the kept ones of its prompt
    number = np.cumsum(keep) - 1 - np.repeat(_starts(kept)[:-1], lengths)
    if at.span is not None:
        hits = _pick(_in_span(chunk, at, owner, special, keep if at.span == WHOLE else None), at, owner)
        lost = hits[~keep[hits]]
        if len(lost):
            who = (chunk.ids[i] for i in np.unique(owner[lost]))
            raise DataError(f"'{at}' was cut away by truncation in {some(who)}; cut on the other side, or shorten them")
        rows, n_rows = number[hits], np.bincount(owner[hits], minlength=n)
    elif at.index is not None:
        index = at.index + kept if at.index < 0 else np.full(n, at.index)
        beyond = np.flatnonzero((index < 0) | (index >= kept))
        if len(beyond):
            who = (f"{chunk.ids[i]} ({kept[i]} tokens)" for i in beyond)
            raise DataError(f"'{at}' is beyond the prompt in {some(who)}")
        rows, n_rows = index, np.ones(n, np.int64)
    elif at.pick == "last":
        rows, n_rows = kept - 1, np.ones(n, np.int64)
    else:
        rows, n_rows = number[keep], kept
    tokens = chunk.tokens[keep] if cut else chunk.tokens
    return _Part(tokens, kept, rows.astype(np.int32), n_rows)


def _kept(
    chunk: _Encoded, special: Ints, context: int | None, truncate: Truncate | None
) -> tuple[NDArray[np.bool_], bool]:
    """Which tokens are left after truncation, (total,), and whether any was cut."""
    keep = np.ones(len(chunk.tokens), np.bool_)
    over = np.zeros(0, np.int64) if context is None else np.flatnonzero(np.diff(chunk.starts) > context)
    for i in over:
        start, end = chunk.starts[i], chunk.starts[i + 1]
        stays = kept_tokens(chunk.tokens[start:end], special, context, truncate, f"prompt {chunk.ids[i]!r}")
        keep[start:end] = False
        keep[start + stays] = True
    return keep, bool(len(over))


def _in_span(
    chunk: _Encoded, at: Position, owner: Ints, special: Ints, keep: NDArray[np.bool_] | None
) -> NDArray[np.bool_]:
    """Which tokens share a character with their prompt's span, (total,).

    Tokens that begin with the blank before a word, and the several tokens of one character, all carry the
    characters they are of, so overlap is the whole rule. Added special tokens have no characters, those in
    the text are excluded.
    """
    inside = (chunk.begin < chunk.span_end[owner]) & (chunk.end > chunk.span_begin[owner])
    inside &= (chunk.end > chunk.begin) & ~np.isin(chunk.tokens, special)
    if keep is not None:
        inside &= keep
    empty = np.flatnonzero(np.bincount(owner[inside], minlength=len(chunk.ids)) == 0)
    if len(empty):
        who = some(chunk.ids[i] for i in empty)
        raise DataError(f"span {at.span!r} covers no token in {who} (only blanks or special tokens stand there)")
    return inside


def _pick(inside: NDArray[np.bool_], at: Position, owner: Ints) -> Ints:
    """Of each prompt's tokens in the span, those to read, as indices into all tokens."""
    hits = np.flatnonzero(inside)
    if at.pick in ("all", "mean"):
        return hits
    ends = np.flatnonzero(np.diff(owner[hits], append=-1) != 0)  # the last hit of each prompt
    return hits[ends] if at.pick == "last" else hits[np.concatenate([[0], ends[:-1] + 1])]


def _starts(lengths: Ints) -> Ints:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


def _ranges(starts: Ints, counts: Ints) -> Ints:
    """starts[0], …, starts[0]+counts[0]−1, starts[1], …: the indices of consecutive ranges."""
    return np.repeat(starts - _starts(counts)[:-1], counts) + np.arange(int(counts.sum()))
