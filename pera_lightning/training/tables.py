"""The one printer of tables: plain text that reads the same in a terminal, in a pipe and in a file."""

from __future__ import annotations

import io
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, text_columns: int = 1) -> str:
    """Lines up cells in columns, as wide as the terminal at most.

    Text is wrapped between words where the terminal is narrow, numbers never are.

    Args:
        header: titles of the columns.
        rows: cells of each row.
        text_columns: number of first columns that hold text; the others hold numbers, which stand on the right.

    Returns:
        Lines without a newline at the end.
    """
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="none")
    narrowest = []
    for k, (title, *cells) in enumerate(zip(header, *rows, strict=True)):
        text = k < text_columns
        narrowest.append(max(len(one) for cell in (title, *cells) for one in (cell.split(" ") if text else [cell])))
        table.add_column(title, justify="left" if text else "right", no_wrap=not text, min_width=narrowest[-1])
    for row in rows:
        table.add_row(*row)
    out = io.StringIO()
    console = Console(file=out, color_system=None, highlight=False, markup=False, emoji=False)
    # Where even wrapped text does not fit, lines run over rather than lose digits.
    console.width = max(console.width, sum(narrowest) + 2 * (len(narrowest) - 1))
    console.print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())
