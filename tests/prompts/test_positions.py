import pytest
from hypothesis import given
from hypothesis import strategies as st

from reprobe.errors import UsageError
from reprobe.prompts import Position

picks = st.sampled_from(["last", "first", "mean", "all"])
texts = st.one_of(
    st.sampled_from(["last", "all", "mean"]),
    st.integers(-99, 99).map("index:{}".format),
    st.builds("span:{}:{}".format, st.text("abcdefgh_", min_size=1), picks),
)


@given(texts)
def test_a_position_is_written_as_it_is_read(text: str) -> None:
    assert str(Position.parse(text)) == text


def test_the_parts_of_a_position() -> None:
    assert Position.parse(" index:-2 ") == Position(index=-2)
    assert Position.parse("span:subject:last") == Position(pick="last", span="subject")
    assert Position.parse("mean").pooled
    assert Position.parse("span:subject:mean").pooled
    assert not Position.parse("all").pooled


@pytest.mark.parametrize(
    "text", ["", "lst", "first", "index", "index:", "index:x", "index:1.5", "span", "last,all", "span::last"]
)
def test_anything_else_is_refused_and_told_the_forms(text: str) -> None:
    with pytest.raises(UsageError, match=r"last\|first\|mean\|all"):
        Position.parse(text)


@pytest.mark.parametrize("text", ["span:subject", "span:subject:", "span:subject:middle", "span:subject:last:1"])
def test_a_span_must_say_which_of_its_tokens(text: str) -> None:
    with pytest.raises(UsageError, match=r"span:subject:last\|first\|mean\|all"):
        Position.parse(text)


@pytest.mark.parametrize(
    "fields", [{}, {"pick": "last", "index": 0}, {"index": 0, "span": "subject"}, {"pick": "first"}, {"pick": "lst"}]
)
def test_a_position_is_one_thing(fields: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        Position(**fields)  # type: ignore[arg-type]
