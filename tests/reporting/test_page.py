"""Pieces of pages: text stays text, and Markdown tables become tables."""

from __future__ import annotations

import re
from pathlib import Path

from evopress.reporting.page import CAPTIONS, paragraph, pictures, section, write_page
from evopress.reporting.tables import write_tables
from experiments.markdown import markdown


def test_markdown_of_a_table() -> None:
    text = "Model x, `scale`.\n\n**bits=3**\n\n| method | KL |\n| --- | ---: |\n| a \\| b | **1.0** |\n\n- one < two\n- `three`\n"
    assert markdown(text) == (
        "<p>Model x, <code>scale</code>.</p>\n<p><b>bits=3</b></p>\n"
        '<div class="scroll"><table><thead><tr><th>method</th><th>KL</th></tr></thead>'
        "<tbody><tr><td>a | b</td><td><b>1.0</b></td></tr></tbody></table></div>\n"
        "<ul><li>one &lt; two</li><li><code>three</code></li></ul>"
    )


def test_what_follows_a_line_of_another_kind_is_kept() -> None:
    table = '<div class="scroll"><table><thead><tr><th>a</th></tr></thead><tbody><tr><td>b</td></tr></tbody></table></div>'
    assert markdown("# Title\ntext\n| a |\n| - |\n| b |\nmore\n\n## Last") == (
        f"<h3>Title</h3>\n<p>text</p>\n{table}\n<p>more</p>\n<h3>Last</h3>"
    )
    assert markdown("") == ""


def test_markdown_is_escaped_and_links_lead_to_files_or_the_web() -> None:
    evil = '<script>alert(1)</script> & "x" [a](javascript:alert(1)) [b](data:text/html,x)'
    shown = markdown(evil)
    assert "<script" not in shown
    assert "href" not in shown
    assert markdown("[t](table.md) [w](https://example.org/a?b=1)") == (
        '<p><a href="table.md">t</a> <a href="https://example.org/a?b=1">w</a></p>'
    )
    assert 'onx="' not in markdown('[t](table.md"onx="1)')


def test_our_own_tables_survive(tmp_path: Path) -> None:
    rows = [{"name": "dp|x", "kl": 1.25, "perplexity": {"docs": 3.0}}, {"name": "evopress", "kl": 1.0}]
    shown = markdown(write_tables(rows, tmp_path)[1].read_text())
    cells = [re.findall("<t[dh]>(.*?)</t[dh]>", row) for row in re.findall("<tr>(.*?)</tr>", shown)]
    assert cells == [["name", "held-out KL", "ppl docs"], ["dp|x", "1.250", "3.00"], ["EvoPress", "1.000", ""]]


def test_empty_parts_leave_nothing(tmp_path: Path) -> None:
    assert section("Heading", "") == paragraph("") == ""
    write_page(tmp_path / "page.html", title="a <b>", parts=["", section("One", paragraph("1 < 2", kind="note")), ""])
    page = (tmp_path / "page.html").read_text()
    assert "<title>a &lt;b&gt;</title>" in page
    assert re.findall("<section>.*?</section>", page, re.DOTALL) == ["<section><h2>One</h2>\n<p class=note>1 &lt; 2</p></section>"]


def rules(page: str, media: str) -> str:
    """Return what the page's style says under a media query that has these words."""
    found = re.findall(r"@media ([^{]*)\{((?:[^{}]*\{[^{}]*\})*)\s*\}", page)
    return "".join(body for query, body in found if media in query)


def test_pages_fit_a_phone_and_a_dark_room(tmp_path: Path) -> None:
    """At 400 px only tables, figures and code scroll sideways, and figures keep letters to read; in the dark they are dark."""
    write_page(tmp_path / "page.html", title="t", parts=[])
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert 'name="viewport" content="width=device-width' in page
    for wide in (r"\.scroll", "figure", "pre"):
        assert re.search(wide + r" \{[^}]*overflow-x: auto", page), wide
    phone, dark = rules(page, "max-width: 640px"), rules(page, "prefers-color-scheme: dark")
    assert "figure img { min-width: 960px; }" in phone and "grid-template-columns: 1fr" in phone and "white-space: normal" in phone
    assert (
        "--paper: #15181b" in dark
        and re.search(r"figure img \{ filter: invert", dark)
        and "figure { background: #1f1f1f; }" in dark
    )
    assert "arker" not in " ".join(CAPTIONS.values())  # what is darker is lighter there


def test_figures_say_how_to_read_them(tmp_path: Path) -> None:
    for name in ("lineage", "unheard_of"):
        (tmp_path / f"{name}.png").write_bytes(b"png")
    shown = pictures(sorted(tmp_path.iterdir()))
    assert "blue has gained" in CAPTIONS["lineage"] and "blue has gained" in shown["lineage"]
    assert shown["unheard_of"].endswith("</figure>")
