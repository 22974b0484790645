"""The pieces of an HTML page that holds all it shows and runs nothing, and the look of our pages. Standard library only."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from evopress.files import write_bytes
from evopress.reporting.records import plain
from evopress.reporting.tables import number

_MOST_FIGURE_BYTES = 400_000
"""An SVG above this size is embedded as PNG, if there is one."""
CAPTIONS = {
    "convergence": "Lower is better. The winner's fitness is measured on a few search tokens, other ones in every generation, "
    "so it jumps; the held-out measures are always on the same text, which no search has seen.",
    "held": "Dark is much. The scale is logarithmic, and the same in both maps; what is negative, or below a thousandth of the "
    "most, is palest. Weights hold what their levels' errors add. A dropped module (×) holds what it lacks; the colour of one that "
    "is kept is what dropping it would add, which is not in the sum.",
    "level_heatmap": "Each cell is a unit: a row per kind, a column per transformer block. The bar says which colour keeps more.",
    "experts": "All weights of an expert together. A block without experts has no column.",
    "dropped_modules": "What each way of choosing drops: left half of a cell attention, right half MLP.",
    "level_profile": "Average per kind of unit and per transformer block, for every way of dividing the budget that was compared.",
    "switches": "Every mark is a unit that an accepted generation changed. What goes up somewhere goes down elsewhere: the "
    "budget is kept.",
    "selection": "Every stage of every generation has tokens of its own, so the lines jump; only the last stage's winner and "
    "parent are measured on the same tokens.",
    "front": "Each point is a whole compressed model, what the search found at one budget; the thin lines are what it is compared "
    "with, at the same budgets. All are measured on the same held-out text.",
    "lineage": "The parent of each generation against the initial genome, block by block: blue has gained, red has given. Below, "
    "the number of units in which it differs from the first and from the last genome.",
}
"""How to read the figures, by their names."""


def write_page(path: str | Path, *, title: str, parts: Sequence[str]) -> None:
    """Write a page out of its parts, in the one look of all pages; empty parts are left out.

    Raises: EvoPressError if the file cannot be written.
    """
    text = _PAGE.substitute(title=escape(title), style=_STYLE, body="\n".join(part for part in parts if part))
    write_bytes(path, text.encode(errors="replace"))


def section(heading: str, body: str) -> str:
    """Put HTML under a heading; without any there is no heading."""
    return f"<section><h2>{escape(heading)}</h2>\n{body}</section>" if body else ""


def paragraph(text: str, *, kind: str = "") -> str:
    """Return plain text as a paragraph of a kind: "lead", "note" or ordinary."""
    return f"<p{f' class={kind}' if kind else ''}>{escape(text)}</p>" if text else ""


def table(headers: Sequence[str], body: Sequence[tuple[Sequence[str], str]], *, text_last: bool = False) -> str:
    """Lay out cells that are HTML already; each row comes with the attributes of its tag."""
    head = "".join(f"<th>{header}</th>" for header in headers)
    rows = "".join(f"<tr{attributes}>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>" for cells, attributes in body)
    return (
        f'<div class="scroll"><table{" class=text-last" if text_last else ""}><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def pairs(values: Mapping[str, Any]) -> str:
    """List names and values; empty ones are left out."""
    shown = [(key, value) for key, value in values.items() if value is not None and value != ""]
    items = "".join(f"<dt>{escape(str(key))}</dt><dd>{escape(cell_text(value))}</dd>" for key, value in shown)
    return f"<dl>{items}</dl>" if shown else ""


def cell_text(value: Any) -> str:
    """Show any value as text."""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(cell_text, value))
    return json_text(value) if isinstance(value, Mapping) else str(value)


def details(summary: str, body: str) -> str:
    """Fold HTML away under a line that opens it."""
    return f"<details><summary>{escape(summary)}</summary>{body}</details>" if body else ""


def code(text: str) -> str:
    """Return text as it is typed."""
    return f"<pre>{escape(text)}</pre>" if text else ""


def json_text(value: Any) -> str:
    """Show a value as JSON."""
    try:
        return json.dumps(plain(value), indent=2, ensure_ascii=False)
    except TypeError:
        return json.dumps(value, indent=2, ensure_ascii=False, default=str)


def show(value: Any, how: Callable[[float], str]) -> str | None:
    """Show a number; None where there is none."""
    count = number(value)
    return None if count is None else how(count)


def pictures(figures: Sequence[Path]) -> dict[str, str]:
    """Embed each figure once, by its name: the SVG unless it is heavy and there is a PNG."""
    files: dict[str, dict[str, Path]] = {}
    for figure in map(Path, figures):
        if figure.suffix in (".png", ".svg") and figure.is_file():
            files.setdefault(figure.stem, {})[figure.suffix] = figure
    embedded = {}
    for name, of in files.items():
        svg, png = of.get(".svg"), of.get(".png")
        chosen = svg if svg and (not png or svg.stat().st_size <= _MOST_FIGURE_BYTES) else png
        assert chosen is not None
        kind = "svg+xml" if chosen is svg else "png"
        data = base64.b64encode(chosen.read_bytes()).decode()
        text, caption = escape(name.replace("_", " ")), paragraph(CAPTIONS.get(name, ""), kind="note")
        # As an image, not inline: scripts in it do not run, and names inside two figures cannot clash.
        embedded[name] = f'<figure><img alt="{text}" src="data:image/{kind};base64,{data}"></figure>{caption}'
    return embedded


_STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --soft: #5c6570; --paper: #fbfbfa; --card: #fff; --line: #dfe2e6;
  --link: #0b5cad; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8ea; --soft: #9aa4af; --paper: #15181b; --card: #1d2125; --line: #343a41;
    --link: #79b8ff; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: .5rem 0 1rem; overflow-wrap: anywhere; }
a { color: var(--link); }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .7rem; padding-bottom: .3rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.6rem 0 .4rem; }
.lead { font-size: 1.1rem; }
.note, .aside td { color: var(--soft); }
.note { font-size: .87rem; }
.scroll { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .75rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 600; vertical-align: bottom; white-space: normal; }
th:first-child, td:first-child, .text-last th:last-child, .text-last td:last-child { text-align: left; }
.text-last td:last-child { white-space: normal; min-width: 9rem; }
td { vertical-align: top; }
th:first-child, td:first-child { position: sticky; left: 0; background: var(--paper); }
.total td { font-weight: 600; }
dl { display: grid; grid-template-columns: fit-content(42%) 1fr; gap: .25rem 1.5rem; margin: .8rem 0; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
figure { margin: 1rem 0; padding: .6rem; background: #fff; border: 1px solid var(--line); border-radius: 8px;
  overflow-x: auto; }
figure img { display: block; width: 100%; min-width: 640px; height: auto; }
@media (prefers-color-scheme: dark) and (not print) {
  figure { background: #1f1f1f; }
  figure img { filter: invert(.88) hue-rotate(180deg); }
}
figure + .note { margin: -.4rem 0 1.4rem; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .8rem; overflow-x: auto;
  font: .86rem/1.5 ui-monospace, monospace; }
summary { cursor: pointer; color: var(--soft); }
@media (max-width: 640px) {
  main { padding: 1rem .75rem 3rem; }
  h1 { font-size: 1.3rem; }
  th, td { padding: .3rem .5rem; }
  th:first-child, td:first-child { max-width: 8.5rem; white-space: normal; overflow-wrap: anywhere; }
  dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: .5rem; }
  figure img { min-width: 960px; }
}
@media print { figure, tr { break-inside: avoid; } }
"""

_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>$title</title>
<style>$style</style>
</head>
<body><main>
<h1>$title</h1>
$body
</main></body>
</html>
""")
