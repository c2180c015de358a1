"""Figures as tables with their notes: on a terminal, and as Markdown."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

Row = Sequence[str]


@dataclass(frozen=True, slots=True)
class Block:
    """One table with the notes that a reader needs beside it; the first `names` columns are text."""

    title: str
    head: Row
    rows: Sequence[Row]
    names: int = 1
    notes: Sequence[str] = ()


def show(blocks: Sequence[Block], lines: Iterable[str], console: Console) -> None:
    """Every table with its notes, then the lines. Of several columns of text the first is written where it changes."""
    for block in blocks:
        table = Table(title=block.title)
        for number, title in enumerate(block.head):
            table.add_column(title, justify="left" if number < block.names else "right")
        previous = ""
        for first, *cells in block.rows:
            table.add_row("" if block.names > 1 and first == previous else first, *cells)
            previous = first
        console.print(table)
        for note in block.notes:
            console.print(f"- {note}", highlight=False, soft_wrap=True)
    for line in lines:
        console.print(f"- {line}", highlight=False, soft_wrap=True)


def markdown(blocks: Sequence[Block], lines: Iterable[str], heading: str = "") -> str:
    """The same for a document; `heading` stands above the lines."""
    text: list[str] = []
    for block in blocks:
        marks = ["---"] * block.names + ["---:"] * (len(block.head) - block.names)
        text += [f"### {block.title}", "", *map(_line, (block.head, marks, *block.rows)), ""]
        text += [*(f"- {note}" for note in block.notes), *([""] if block.notes else [])]
    text += [f"### {heading}", ""] if heading else []
    return "\n".join([*text, *(f"- {line}" for line in lines), ""])


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
