"""The printer of tables: lines in columns, in a narrow terminal too."""

import pytest

from pera_lightning.training.tables import format_table

ROWS = [["attn[q,v], rank=8", "1,024.5"], ["", "-"]]


def test_text_stands_left_and_numbers_right():
    lines = format_table(["setting", "GiB"], ROWS).splitlines()
    assert lines == ["setting                GiB", "attn[q,v], rank=8  1,024.5", "                         -"]


@pytest.mark.parametrize("columns", ["19", "5"])
def test_a_narrow_terminal_wraps_text_and_no_number(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    lines = format_table(["setting", "GiB"], ROWS).splitlines()
    assert lines == ["setting         GiB", "attn[q,v],  1,024.5", "rank=8", "                  -"]
