"""The table of a page, between two marks in it."""

from __future__ import annotations

from pathlib import Path

from opensora_dist.core.io import write_text

BEGIN, END = "<!-- the table below is written by the command above -->\n", "<!-- end of the table -->"


def write_table(page: Path, table: str) -> None:
    """Puts ``table`` in place of what is between the marks.

    Raises:
        ValueError: The page has not just one pair of marks.
    """
    text = page.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"--page {page}: a page needs one line {BEGIN.strip()!r} and, below, one {END!r}")
    before, rest = text.split(BEGIN)
    write_text(page, f"{before}{BEGIN}\n{table.strip()}\n\n{END}{rest.split(END)[1]}")
