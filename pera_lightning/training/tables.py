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
    out = io.StringIO()
    console = Console(file=out, color_system=None, highlight=False, markup=False, emoji=False)
    columns = list(zip(header, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    # Titles and text may wrap at each word, numbers stay in one piece.
    least = []
    for k, (title, *cells) in enumerate(columns):
        pieces = [piece for cell in cells for piece in (cell.split(" ") if k < text_columns else [cell])]
        least.append(max(map(len, [*title.split(" "), *pieces])))
    # The widest columns give way; where nothing can, lines run over rather than lose digits.
    while sum(widths) + 2 * (len(widths) - 1) > console.width and widths != least:
        widest = max(range(len(widths)), key=lambda k: (widths[k] > least[k], widths[k]))
        widths[widest] -= 1
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="none")
    for k, (title, width) in enumerate(zip(header, widths, strict=True)):
        table.add_column(title, justify="left" if k < text_columns else "right", width=width)
    for row in rows:
        table.add_row(*row)
    console.width = sum(widths) + 2 * len(widths)
    console.print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())  # rich fills lines up
