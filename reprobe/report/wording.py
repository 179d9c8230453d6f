"""Numbers and lists as the page writes them. Enters: values. Leaves: text. Does not know what they are of."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

#: A hyphen at which no line ends.
HYPHEN = "\u2011"
#: What neither XML nor HTML can hold: control characters, halves of characters (file names have them), no characters.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")


def printable(text: str) -> str:
    """`text` with a replacement character for each that no page and no figure can hold."""
    return _UNPRINTABLE.sub("\ufffd", text)


def signed(value: float, form: str) -> str:
    """With a true minus sign, and 0 without any."""
    return f"{value:{form}}".replace("-", "−") if value else "0"


def bounded(value: float, low: float | None, high: float | None, form: str = ".3f") -> str:
    """A number with its interval, if it has one."""
    written = [f"{v:{form}}".replace("-", "−") for v in (value, low, high) if v is not None]
    return written[0] if len(written) < 3 else f"{written[0]} [{written[1]}, {written[2]}]"


def change(line: Mapping[str, Any], name: str) -> str:
    """A difference of a table's line with its interval, signs always shown."""
    value, low, high = (signed(line[f"{name}{bound}"], "+.3f") for bound in ("", "_low", "_high"))
    return f"{value} [{low}, {high}]"


def capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]


def words(texts: Iterable[str]) -> str:
    return " / ".join(f"“{t.strip()}”" for t in texts)


def many(texts: Sequence[str], what: str) -> str:
    return f"{len(texts)} {what}{'' if len(texts) == 1 else 's'}"
