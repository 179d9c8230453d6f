"""The canonical columns of a prompt set, and the check that a table has them.

Enters: a polars frame from any source. Leaves: a frame with exactly the canonical columns first, in this
order and of these types, or a `DataError` that names the offending ids:

- `id` String: unique, not empty. Without one, the row number.
- `text` String, `messages` List(Struct{role, content}): exactly one of the two is not null in every row.
- `label` Int64, Float64 or String (booleans become 0 and 1): null where there is none.
- `group` String: what must never cross a train/test split. Without one, the pair is the group; without
  either, every prompt is its own, and its group is its id.
- `pair` String: names the sides of a contrast, which always lie in one group; null where there is none.
- `spans` List(Struct{name, start, end}): characters [start, end) of `text`, or of the last message's content.
  In a file, spans are an object, name → [start, end). A list of structs survives parquet and rows with
  different names; an object would become a struct with every name of the set in every row. No order is meant.

Further columns follow as they are. Does not know files, public formats or tokenizers.
"""

import difflib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import polars as pl

from reprobe.errors import DataError, UnknownData

MESSAGES = pl.List(pl.Struct({"role": pl.String, "content": pl.String}))
SPANS = pl.List(pl.Struct({"name": pl.String, "start": pl.Int64, "end": pl.Int64}))
#: The canonical columns, in order.
CANONICAL = ("id", "text", "messages", "label", "group", "pair", "spans")
#: The span every prompt has without naming it: its whole text.
WHOLE = "text"


def canonical(frame: pl.DataFrame, name: str) -> pl.DataFrame:
    """`frame` in canonical form; `name` is the set's, for messages. Raises `DataError` or `UnknownData`."""
    if not frame.height:
        raise DataError(f"{name} has no prompts")
    if not {"text", "messages"} & set(frame.columns):
        raise UnknownData(
            f"{name} has neither a column 'text' nor 'messages'; columns: {', '.join(frame.columns)}. "
            "Say which one holds the prompt, e.g. text='statement'"
        )
    absent = [c for c in CANONICAL if c not in frame.columns]
    frame = frame.with_columns(pl.lit(None).alias(c) for c in absent)
    ids = _ids(frame["id"], name)
    text = _string(frame["text"], ids, name)
    messages = _messages(frame["messages"], ids, name)
    pair = _string(frame["pair"], ids, name)
    out = pl.DataFrame(
        [
            ids,
            text,
            messages,
            _label(frame["label"], ids, name),
            _group(frame["group"], pair, ids, name),
            pair,
        ]
    ).with_columns(_spans(frame["spans"], ids, name))
    _check_prompts(out, name)
    _check_spans(out, name)
    crossing = (
        out.group_by("pair")
        .agg(pl.col("group").n_unique())
        .filter(pl.col("pair").is_not_null() & (pl.col("group") > 1))
    )
    if crossing.height:
        raise DataError(f"{name}: the sides of a pair are in different groups: {some(crossing['pair'])}")
    return out.with_columns(frame.select(pl.exclude(CANONICAL)).get_columns())


def from_records(records: Iterable[Mapping[str, Any]], name: str) -> pl.DataFrame:
    """Rows as mappings → a frame; columns are the union of all keys, absent values null.

    Raises `DataError` for a column whose values are of different kinds, which would otherwise all become
    text.
    """
    rows = list(records)
    keys = dict.fromkeys(k for row in rows for k in row)
    spans = (
        [pl.Series("spans", [_span_list(r.get("spans"), r.get("id")) for r in rows], SPANS)] if "spans" in keys else []
    )
    others = (_series(key, [row.get(key) for row in rows], name) for key in keys if key != "spans")
    return pl.DataFrame([*others, *spans])


def rename(frame: pl.DataFrame, mapping: Mapping[str, str | None], name: str) -> pl.DataFrame:
    """Columns under their canonical names: `mapping` is canonical name → column of `frame` (None: as it is).

    A column that held a canonical name and is displaced by another is kept as `NAME_given`.
    """
    wanted = {new: old for new, old in mapping.items() if old is not None}
    for old in wanted.values():
        if old not in frame.columns:
            raise unknown("column", old, frame.columns, name)
    out = [frame[old].alias(new) for new, old in wanted.items()]
    for column in frame.get_columns():
        if column.name not in wanted.values():
            out.append(column.alias(f"{column.name}_given") if column.name in wanted else column)
    return pl.DataFrame(out)


def unknown(kind: str, value: str, known: Iterable[str], where: str) -> UnknownData:
    """The error for a name that does not exist: what was asked for, the nearest one, and what there is."""
    names = list(known)
    near = difflib.get_close_matches(value, names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return UnknownData(f"{where} has no {kind} {value!r}.{hint} There is: {', '.join(names) or 'none'}")


def some(values: Iterable[Any]) -> str:
    """The first five of `values`, and how many more there are."""
    listed = [str(v) for v in values]
    more = f" and {len(listed) - 5} more" if len(listed) > 5 else ""
    return ", ".join(listed[:5]) + more


def _series(key: str, values: list[Any], name: str) -> pl.Series:
    try:
        return pl.Series(key, values, strict=True)
    except (TypeError, OverflowError, UnicodeError, pl.exceptions.PolarsError) as error:
        present = [v for v in values if v is not None]
        if all(isinstance(v, float) or (isinstance(v, int) and abs(v) < 2**63) for v in present):
            return pl.Series(key, values, strict=False)  # integers and floats in one column are floats
        kinds = sorted({type(v).__name__ for v in present})
        if len(kinds) > 1:
            raise DataError(f"{name}: column {key!r} mixes kinds of values ({', '.join(kinds)})") from error
        raise DataError(f"{name}: column {key!r} holds what no table can: {error}") from error


def _ids(column: pl.Series, name: str) -> pl.Series:
    if column.dtype == pl.Null:
        return pl.int_range(column.len(), eager=True).cast(pl.String).alias("id")
    ids = _as_string(column, name)
    empty = (ids.is_null() | (ids == "")).fill_null(True)
    if empty.any():
        raise DataError(f"{name}: empty id in rows {some(empty.arg_true())} (counted from 0)")
    if ids.n_unique() < ids.len():
        raise DataError(f"{name}: duplicate ids: {some(ids.filter(ids.is_duplicated()).unique(maintain_order=True))}")
    return ids


def _as_string(column: pl.Series, name: str) -> pl.Series:
    if column.dtype in (pl.String, pl.Null, pl.Categorical, pl.Enum) or column.dtype.is_integer():
        return column.cast(pl.String)
    raise DataError(f"{name}: column {column.name!r} must hold text, and holds {column.dtype}")


def _string(column: pl.Series, ids: pl.Series, name: str) -> pl.Series:
    out = _as_string(column, name)
    empty = (out == "").fill_null(False)
    if empty.any():
        raise DataError(f"{name}: empty {column.name} in {some(ids.filter(empty))}")
    return out


def _label(column: pl.Series, ids: pl.Series, name: str) -> pl.Series:
    kind = column.dtype
    if kind in (pl.Null, pl.Boolean) or kind.is_integer():
        whole = column.cast(pl.Int64, strict=False)
        if whole.null_count() > column.null_count():
            raise DataError(f"{name}: label is beyond 64 bits in {some(ids.filter(whole.is_null()))}")
        return whole
    if kind in (pl.String, pl.Categorical, pl.Enum):
        return _string(column, ids, name)
    if not kind.is_float():
        raise DataError(f"{name}: a label is a number, a string or null; column {column.name!r} holds {kind}")
    out = column.cast(pl.Float64)
    bad = (~out.is_finite()).fill_null(False)
    if bad.any():
        raise DataError(f"{name}: label is not a finite number in {some(ids.filter(bad))}")
    return out


def _group(column: pl.Series, pair: pl.Series, ids: pl.Series, name: str) -> pl.Series:
    if column.null_count() == column.len():
        return pl.select(pl.coalesce(pair, ids).alias("group")).to_series()
    group = _string(column, ids, name)
    if group.null_count():
        raise DataError(f"{name}: no group in {some(ids.filter(group.is_null()))}; give every prompt a group, or none")
    return group


def _messages(column: pl.Series, ids: pl.Series, name: str) -> pl.Series:
    if column.dtype == pl.String:  # CSV has no lists: JSON in a cell
        column = pl.Series("messages", [_json(v, i, name) for v, i in zip(column, ids, strict=True)])
    if column.dtype in (pl.Null, pl.List(pl.Null)):
        column = column.cast(MESSAGES)
    inner = column.dtype.inner if isinstance(column.dtype, pl.List) else None
    fields = [f.name for f in inner.fields] if isinstance(inner, pl.Struct) else []
    if not {"role", "content"} <= set(fields):
        raise DataError(f"{name}: messages must be a list of {{role, content}}, and are {column.dtype}")
    each = pl.DataFrame({"id": ids, "m": column}).explode("m").drop_nulls("m").unnest("m")
    for extra in set(fields) - {"role", "content"}:
        used = each.filter(pl.col(extra).is_not_null())
        if used.height:
            raise DataError(
                f"{name}: messages have a field {extra!r} that is not supported: {some(used['id'].unique())}"
            )
    lacking = each.filter(pl.col("role").is_null() | pl.col("content").is_null())
    if lacking.height:
        raise DataError(f"{name}: a message without role or content in {some(lacking['id'].unique())}")
    if (column.list.len() == 0).any():
        raise DataError(f"{name}: messages is an empty list in {some(ids.filter(column.list.len() == 0))}")
    return (
        column.to_frame()
        .select(
            pl.col("messages").list.eval(
                pl.when(pl.element().is_not_null()).then(
                    pl.struct(pl.element().struct.field("role"), pl.element().struct.field("content"))
                )
            )
        )["messages"]
        .cast(MESSAGES)
    )


def _spans(column: pl.Series, ids: pl.Series, name: str) -> pl.Series:
    if column.dtype == SPANS:
        return pl.select(column.fill_null([]).list.drop_nulls().alias("spans")).to_series()
    if column.dtype == pl.String:
        return pl.Series("spans", [_span_list(_json(v, i, name), i) for v, i in zip(column, ids, strict=True)], SPANS)
    return pl.Series("spans", [_span_list(v, i) for v, i in zip(column, ids, strict=True)], SPANS)


def _json(value: str | None, prompt: str, name: str) -> Any:
    try:
        return None if value is None else json.loads(value)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name}: prompt {prompt!r} has a cell that is not JSON: {error}") from error


def _span_list(value: Any, prompt: Any = None) -> list[dict[str, Any]]:
    """Spans of one prompt from any of their forms: an object, or a list of {name, start, end}."""
    whose = "" if prompt is None else f" of prompt {prompt!r}"
    if value is None:
        return []
    if not isinstance(value, Mapping | list | tuple | pl.Series):
        raise DataError(f"spans{whose} must be an object, name → [start, end), not {value!r}")
    pairs = value.items() if isinstance(value, Mapping) else [(s, s) for s in value]
    out = []
    for name, ends in pairs:
        if isinstance(ends, Mapping) and set(ends) == {"name", "start", "end"}:
            out.append(dict(ends))
        elif ends is not None and not isinstance(value, Mapping):
            raise DataError(f"spans{whose} must be an object, name → [start, end)")
        elif ends is not None:  # null: a struct with the names of other rows
            ours = isinstance(ends, list | tuple | pl.Series) and len(ends) == 2 and all(type(e) is int for e in ends)
            if not ours:
                raise DataError(f"span {name!r}{whose} must be [start, end), two integers; it is {ends!r}")
            out.append({"name": name, "start": ends[0], "end": ends[1]})
    return out


def _check_prompts(frame: pl.DataFrame, name: str) -> None:
    text, messages = pl.col("text").is_null(), pl.col("messages").is_null()
    neither, both = frame.filter(text & messages)["id"], frame.filter(~text & ~messages)["id"]
    if neither.len():
        raise DataError(f"{name}: no text (null) in {some(neither)}")
    if both.len():
        raise DataError(f"{name}: both text and messages in {some(both)}; a prompt has one of them")


def _check_spans(frame: pl.DataFrame, name: str) -> None:
    content = pl.col("messages").list.last().struct.field("content")
    each = (
        frame.select("id", pl.coalesce("text", content).str.len_chars().cast(pl.Int64).alias("length"), "spans")
        .explode("spans")
        .drop_nulls("spans")
        .rename({"spans": "span"})
        .unnest("span")
    )
    wrong = (
        (pl.col("name").fill_null("") == "", "a span without a name"),
        (pl.col("name") == WHOLE, f"a span named {WHOLE!r}, which is every prompt's whole text"),
        (pl.col("name").str.contains(":"), "a span with ':' in its name"),
        (pl.struct("id", "name").is_duplicated(), "two spans of one name"),
        (pl.col("start").is_null() | pl.col("end").is_null(), "a span without start or end"),
        (pl.col("start") >= pl.col("end"), "an empty or inverted span"),
        ((pl.col("start") < 0) | (pl.col("end") > pl.col("length")), "a span outside its text"),
    )
    for condition, what in wrong:
        bad = each.filter(condition)
        if bad.height:
            told = (
                f"{r['id']} ({r['name']} [{r['start']}, {r['end']}) of {r['length']} characters)"
                for r in bad.iter_rows(named=True)
            )
            raise DataError(f"{name}: {what} in {some(told)}")
