"""A report as one HTML page that needs nothing beside it: styles inline, pictures inside."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from lp_plugin.bench.experiment.document import Block, Figures, Files, Picture, Section

__all__ = ["as_html"]

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 1180px; margin: 2em auto;
       padding: 0 1.2em; }
h1 { font-size: 1.7em; } h2 { font-size: 1.3em; margin-top: 2.2em; border-bottom: 1px solid #ddd; }
h3 { font-size: 1.1em; margin-top: 1.8em; } h4 { font-size: 1em; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.88em; margin: 0.4em 0; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: 0.3em 0; white-space: nowrap; }
th { text-align: right; font-weight: 600; vertical-align: bottom; border-bottom: 2px solid #888; }
td { text-align: right; vertical-align: top; border-bottom: 1px solid #e6e6e6; white-space: nowrap; }
th, td { padding: 0.25em 0.7em 0.25em 0; }
.text { text-align: left; }
td.text { white-space: normal; min-width: 7em; }
td.text:first-child { white-space: nowrap; }
tbody tr:hover { background: #f5f8fc; }
p.note { font-size: 0.85em; color: #555; margin: 0.2em 0; max-width: 75em; }
figure { margin: 1em 0; } img { max-width: 100%; height: auto; } figcaption { font-size: 0.85em; color: #555; }
nav a { margin-right: 1.2em; white-space: nowrap; }
"""


def as_html(title: str, blocks: Sequence[Block], folder: Path) -> str:
    """The whole page.

    Args:
        title: Heading.
        blocks: What it says.
        folder: Where the pictures lie.

    Raises:
        OSError: If a picture can't be read.
    """
    sections = [(f"part-{place}", block) for place, block in enumerate(blocks) if isinstance(block, Section)]
    links = "".join(f'<a href="#{anchor}">{escape(section.title)}</a>' for anchor, section in sections)
    anchors = {id(section): anchor for anchor, section in sections}
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title>\n<style>{_STYLE}</style></head><body>",
            f"<h1>{escape(title)}</h1>\n<nav>{links}</nav>",
            *_lines(blocks, 2, folder, anchors),
            "</body></html>\n",
        ]
    )


def _lines(blocks: Sequence[Block], level: int, folder: Path, anchors: dict[int, str]) -> Iterator[str]:
    for block in blocks:
        if isinstance(block, str):
            yield f"<p>{escape(block)}</p>"
        elif isinstance(block, Figures):
            yield from _table(block)
        elif isinstance(block, Picture):
            data = base64.b64encode((folder / block.file).read_bytes()).decode("ascii")
            caption = escape(block.caption)
            yield f'<figure><img alt="{caption}" src="data:image/png;base64,{data}">'
            yield f"<figcaption>{caption}</figcaption></figure>"
        elif isinstance(block, Files):
            names = ", ".join(f"<code>{escape(name)}</code>" for name in block.names)
            yield f'<p class="note">{escape(block.text)}: {names}</p>'
        else:
            anchor = anchors.get(id(block))
            place = f' id="{anchor}"' if anchor else ""
            yield f"<h{min(level, 6)}{place}>{escape(block.title)}</h{min(level, 6)}>"
            yield from _lines(block.blocks, level + 1, folder, anchors)


def _table(figures: Figures) -> Iterator[str]:
    def row(cells: Sequence[str], tag: str) -> str:
        return "".join(
            f'<{tag} class="text">{escape(cell)}</{tag}>'
            if column in figures.texts
            else f"<{tag}>{escape(cell)}</{tag}>"
            for column, cell in enumerate(cells)
        )

    yield f'<div class="wide"><table><caption>{escape(figures.title)}</caption>'
    yield f"<thead><tr>{row(figures.headings, 'th')}</tr></thead><tbody>"
    yield from (f"<tr>{row(cells, 'td')}</tr>" for cells in figures.rows)
    yield "</tbody></table></div>"
    yield from (f'<p class="note">{escape(note)}</p>' for note in figures.notes)
