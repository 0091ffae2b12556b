"""What a report is made of, apart from how it is shown: sections of text, tables, pictures and files.

Built once by the modules of tables and pictures; shown by `lp_plugin.bench.experiment.markdown`,
`lp_plugin.bench.experiment.html` and, its tables, on the console.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

__all__ = ["Block", "Figures", "Files", "Picture", "Section", "figures_table", "tables_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """A table as text."""

    title: str
    """Above it."""
    headings: tuple[str, ...]
    """One per column."""
    rows: tuple[tuple[str, ...], ...]
    """A cell per column."""
    texts: frozenset[int] = frozenset({0})
    """Columns that hold words; the others hold numbers and are set flush right."""
    notes: tuple[str, ...] = ()
    """Below it."""

    def without_empty(self) -> Figures:
        """Columns in which no row has anything left out."""
        kept = [column for column in range(len(self.headings)) if any(row[column] for row in self.rows)]
        return Figures(
            title=self.title,
            headings=tuple(self.headings[column] for column in kept),
            rows=tuple(tuple(row[column] for column in kept) for row in self.rows),
            texts=frozenset(place for place, column in enumerate(kept) if column in self.texts),
            notes=self.notes,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """A picture beside the report."""

    file: str
    """Its name, in the report's folder."""
    caption: str
    """What it shows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Files:
    """Other files beside the report."""

    text: str
    """What they are."""
    names: tuple[str, ...]
    """In the report's folder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A heading and what stands under it."""

    title: str
    """Heading."""
    blocks: tuple[Block, ...]
    """In order; sections inside have smaller headings."""


Block: TypeAlias = str | Figures | Picture | Files | Section
"""A string is a paragraph of plain text."""


def tables_of(blocks: Sequence[Block], heading: str = "") -> Iterator[tuple[str, Figures]]:
    """Every table with the headings above it, in order."""
    for block in blocks:
        if isinstance(block, Figures):
            yield heading, block
        elif isinstance(block, Section):
            yield from tables_of(block.blocks, f"{heading}: {block.title}" if heading else block.title)


def figures_table(figures: Figures, heading: str = "") -> Group:
    """A table for the terminal, its title above and its notes below."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for column, name in enumerate(figures.headings):
        table.add_column(Text(name), justify="left" if column in figures.texts else "right")
    for row in figures.rows:
        table.add_row(*(Text(cell) for cell in row))
    title = (
        heading if heading.startswith(figures.title) else f"{heading}: {figures.title}" if heading else figures.title
    )
    return Group(Text(title, style="bold"), table, *(Text(note, style="dim") for note in figures.notes), Text())
