"""The Markdown of tables and pages as HTML, for a sweep's page."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from html import escape

from evopress.reporting.page import table


def markdown(text: str) -> str:
    """Return as HTML what our tables are written in: paragraphs, headings, lists, tables, bold, code, links; the rest is text."""
    parts: list[str] = []
    for chunk in re.split(r"\n\s*\n", text.strip()):
        lines = chunk.splitlines()
        while lines:
            kind = _kind(lines[0])
            same = [lines.pop(0)]
            while kind != "heading" and lines and _kind(lines[0]) == kind:
                same.append(lines.pop(0))
            parts.append(_MARKDOWN[kind](same))
    return "\n".join(parts)


def _kind(line: str) -> str:
    starts = {"|": "table", "- ": "list", "#": "heading"}
    return next((kind for start, kind in starts.items() if line.startswith(start)), "text")


def _inline(text: str) -> str:
    """Return text with its bold, code, links to files beside the page and to the web, and nothing else."""
    text = re.sub(r"\[([^\]]+)\]\((https?://[^\s)]+|[\w./-]+)\)", r'<a href="\2">\1</a>', escape(text))
    text = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", text)
    return re.sub(r"`(.+?)`", r"<code>\1</code>", text)


def _markdown_table(lines: Sequence[str]) -> str:
    rows = [[_inline(cell.strip().replace("\\|", "|")) for cell in re.split(r"(?<!\\)\|", line.strip())[1:-1]] for line in lines]
    body = rows[2:] if len(rows) > 1 and all(set(cell) <= set(":- ") for cell in rows[1]) else rows[1:]
    return table(rows[0], [(row, "") for row in body])


_MARKDOWN: dict[str, Callable[[Sequence[str]], str]] = {
    "heading": lambda lines: f"<h3>{_inline(lines[0].lstrip('# '))}</h3>",
    "list": lambda lines: f"<ul>{''.join(f'<li>{_inline(line[2:])}</li>' for line in lines)}</ul>",
    "table": _markdown_table,
    "text": lambda lines: f"<p>{_inline(' '.join(lines))}</p>",
}
