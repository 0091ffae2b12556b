"""A report as Markdown, its pictures linked."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from urllib.parse import quote

from lp_plugin.bench.experiment.document import Block, Figures, Files, Picture

__all__ = ["as_markdown"]

_SPECIAL = re.compile(r"([\\`*_\[\]<>|])")


def as_markdown(title: str, blocks: Sequence[Block]) -> str:
    """The whole page, headings of sections from the second level on."""
    return "\n".join([f"# {_plain(title)}", "", *_lines(blocks, 2)]).rstrip() + "\n"


def _lines(blocks: Sequence[Block], level: int) -> Iterator[str]:
    for block in blocks:
        if isinstance(block, str):
            yield from (_plain(block), "")
        elif isinstance(block, Figures):
            yield from _table(block)
        elif isinstance(block, Picture):
            yield from (f"![{_plain(block.caption)}]({quote(block.file)})", "")
        elif isinstance(block, Files):
            yield from (
                f"{_plain(block.text)}: {', '.join(f'[{_plain(name)}]({quote(name)})' for name in block.names)}",
                "",
            )
        else:
            yield from ("#" * level + f" {_plain(block.title)}", "", *_lines(block.blocks, level + 1))


def _table(figures: Figures) -> Iterator[str]:
    yield from (f"**{_plain(figures.title)}**", "")
    yield _row(figures.headings)
    yield "|" + "|".join("---" if column in figures.texts else "---:" for column in range(len(figures.headings))) + "|"
    yield from map(_row, figures.rows)
    yield ""
    for note in figures.notes:
        yield from (_plain(note), "")


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(map(_plain, cells)) + " |"


def _plain(text: str) -> str:
    """In one line, nothing in it taken for markup."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))
