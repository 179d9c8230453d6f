"""Tables as Markdown. Enters: a polars frame. Leaves: its lines. Does not know what it is of."""

import polars as pl


def markdown(table: pl.DataFrame, form: str = ".3f") -> list[str]:
    """The head and the rows of a table; numbers that are no counts in this format."""

    def cell(value: object) -> str:
        if isinstance(value, float):
            return format(value, form)
        return "" if value is None else str(value).replace("|", "\\|")

    head = [f"| {' | '.join(table.columns)} |", "|" + "---|" * table.width]
    return [*head, *(f"| {' | '.join(map(cell, row))} |" for row in table.iter_rows())]
