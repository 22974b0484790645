"""The report: what was found, honestly, on one page that holds everything and runs nothing."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from evopress.reporting import figures
from evopress.reporting.lineage import lineage_figures
from evopress.reporting.metrics import levels_table
from evopress.reporting.report import headline, write_report
from evopress.units import Level, Space, Unit

VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Collect a page's tags and text, and see that every tag is closed in its turn."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(self.source)
        self.close()
        assert self._open == []
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data + " "

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def write(path: Path, run: Any, **changes: Any) -> Page:
    values: dict[str, Any] = {
        "title": "EvoPress: smollm2_135m at 2.5 bits",
        "config": run.config,
        "result": run.result,
        "records": run.records,
        "space": run.space,
        "genome": run.genome,
        "figures": [],
        "command": "python -m evopress +method=quant bits=2.5",
        "environment": {"python": "3.11.9", "git revision": "0123abc"},
    }
    write_report(path, **(values | changes))
    return Page(path)


def test_a_whole_run(run: Any, tmp_path: Path) -> None:
    drawn = [
        *figures.convergence(run.records, tmp_path / "figures", run.baselines),
        *figures.level_heatmap(run.space, run.genome, tmp_path / "figures"),
        *figures.level_profile(run.space, run.genomes, tmp_path / "figures"),
        *lineage_figures(run.records, run.space, tmp_path / "figures"),
    ]
    page = write(tmp_path / "report.html", run, figures=drawn)
    headings = re.findall("<h2>(.*?)</h2>", page.source)
    assert headings == [
        "What was asked",
        "What was found",
        "Convergence",
        "Where the budget went",
        "Accepted switches",
        "Selection",
        "Lineage",
        "What it cost",
        "Load the checkpoint",
        "Run it again",
        "Environment",
        "Configuration",
    ]
    images = [attributes["src"] or "" for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 6
    assert all(source.startswith("data:image/svg+xml;base64,") for source in images)
    accepted = sum(record["accepted"] for record in run.records)
    assert f"{accepted} of 40 generations replaced their parent" in page.text
    assert "python -m evopress +method=quant bits=2.5" in page.text
    assert "AutoModelForCausalLM.from_pretrained(folder)" in page.text
    assert "2.9 GB" in page.text
    assert "271 MB" in page.text
    assert "git revision 0123abc" in page.text
    assert (
        "Choose a level for each of the 210 units in the 30 transformer blocks of smollm2_135m so that together they meet 2.5"
        in page.text
    )
    assert "EvoPress searched for 40 generations of 16 offspring." in page.text
    assert re.search(r"Most was kept in block \d+ \(\S+\), block", page.text)
    assert "Below, the number of units in which it differs" in page.text
    assert "model.layers." in page.text
    assert "3 bits → 2 bits" in page.text
    assert not {"link", "script", "iframe", "a"} & {tag for tag, _ in page.tags}  # nothing from outside


def test_bold_is_the_best_that_spends_no_more(run: Any, tmp_path: Path) -> None:
    page = write(tmp_path / "report.html", run)
    bold = {
        name: re.findall("<b>(.*?)</b>", row)
        for row in re.findall("<tr.*?</tr>", page.source)
        for name in re.findall("<td>([^<]*)</td>", row)[:1]
    }
    assert bold["DP"] == ["1.334", "0.4344", "72.95", "102.99"]
    assert bold["uniform 3"] == bold["dense"] == bold["EvoPress"] == []


def rows(**kl: float) -> list[dict[str, Any]]:
    bits = {"uniform_3": 3.0, "uniform_2": 2.0}
    return [{"name": name, "bits_per_weight": bits.get(name, 2.5), "kl": value} for name, value in kl.items()]


def test_the_headline_names_the_winner() -> None:
    wins = headline(rows(uniform_3=0.4, uniform_2=4.0, best_of_32=1.5, dp=1.25, evopress=1.0))
    assert wins == (
        "EvoPress's held-out KL is 1.000 nats per token at 2.500 bits per weight. The best baseline within this "
        "budget, DP, has 1.250: EvoPress is 20.0% lower; whether that is more than chance was not measured. "
        "Other baselines within it: uniform 2 4.000, best of 32 1.500. "
        "With a larger budget: uniform 3 0.4000 at 3.000 bits per weight. One run, one seed: another seed finds another genome."
    )
    assert "EvoPress is 25.0% higher; whether" in headline(rows(dp=0.8, evopress=1.0))
    assert "DP, has 1.000: a tie." in headline(rows(dp=1.00001, evopress=1.0))
    assert "No baseline within this budget" in headline(rows(uniform_3=0.4, evopress=1.0))
    assert "No search has been measured; of uniform 2, DP, DP has the lowest" in headline(rows(uniform_2=4.0, dp=1.0))
    assert headline([{"name": "dense", "kl": 0.0}, {"name": "evopress", "kl": None}]).startswith("Nothing has been")


def test_budgets_of_other_methods_are_compared_their_way() -> None:
    sparse = [{"name": "dp", "sparsity": 0.5, "kl": 0.1}, {"name": "evopress", "sparsity": 0.7, "kl": 1.0}]
    assert "No baseline within this budget" in headline(sparse)
    dropped = [{"name": "dp", "modules_dropped": 14, "kl": 2.0}, {"name": "evopress", "modules_dropped": 14, "kl": 1.0}]
    assert "with 14 modules dropped. The best baseline within this budget, DP, has 2.000: EvoPress is 50.0% lower" in headline(
        dropped
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"result": {}, "records": [], "space": None, "genome": None, "config": {}, "command": "", "environment": {}},
        {"records": []},
        {"space": None},
        {"genome": None},
        {"result": {"rows": None, "search": None, "database": None, "memory": None}},
        {"result": {"rows": [{"name": "dense"}, {"name": "dp", "kl": None}, {"kl": 1.0}]}},
        {"figures": [Path("missing.png"), Path("notes.txt")]},
    ],
)
def test_missing_parts_are_left_out(run: Any, tmp_path: Path, changes: dict[str, Any]) -> None:
    page = write(tmp_path / "report.html", run, **changes)
    assert page.count("h1") == 1
    assert page.count("img") == 0
    assert "None" not in page.text
    assert "nan" not in page.text


def test_what_kinds_gave_and_got(run: Any, tmp_path: Path) -> None:
    page = write(tmp_path / "report.html", run)
    rows = {cells[0]: cells for row in re.findall("<tr.*?</tr>", page.source) if (cells := re.findall("<td>([^<]*)</td>", row))}
    up = dict.fromkeys(("q_proj", "o_proj"), 0)
    for record in run.records:
        for index, before, after in record["switches"]:
            kind = run.space.units[index].kind
            if kind in up:
                up[kind] += max(before - after, 0)
    assert {kind: int(rows[kind][-2]) for kind in up} == up
    assert sum(up.values()) > 0
    assert int(rows["all"][-2]) == int(rows["all"][-1])  # the budget is kept


def test_only_equal_sizes_were_exchanged(run: Any, tmp_path: Path) -> None:
    sentence = "what each size has in all was settled by the initial genome"
    assert sentence not in write(tmp_path / "report.html", run).text
    config = {**run.config, "search": {"exchange": "size"}}
    assert sentence in write(tmp_path / "report.html", run, config=config).text
    guided = {**run.config, "search": {"exchange": "size", "strategy": {"name": "guided"}}}
    assert sentence not in write(tmp_path / "report.html", run, config=guided).text, "it has no switches"


def test_dropped_modules_are_named(tmp_path: Path, run: Any) -> None:
    levels = (Level("keep", 1, "keep", 80), Level("drop", 0, "drop", 0))
    units = tuple(Unit(f"layers.{block}.{kind}", block, kind, 5, levels) for block in range(6) for kind in ("attention", "mlp"))
    space = Space("drop", units)
    genome = tuple(int((unit.block in (2, 4) and unit.kind == "mlp") or unit.name == "layers.1.attention") for unit in units)
    records = [
        {"generation": 0, "genome": [0] * 12, "accepted": False, "switches": []},
        {"generation": 1, "genome": list(genome), "accepted": True, "switches": [[2, 0, 1], [5, 0, 1], [9, 0, 1]]},
    ]
    drawn = [*figures.level_heatmap(space, genome, tmp_path), *lineage_figures(records, space, tmp_path)]
    result = {"rows": [{"name": "evopress", "sparsity": 0.25, "modules_dropped": 3, "kl": 1.0}]}
    page = write(tmp_path / "report.html", run, space=space, genome=genome, records=records, result=result, figures=drawn)
    assert "Dropped, attention: 1. Dropped, mlp: 2, 4." in page.text
    assert "layers.2.mlp: keep → drop" in page.text
    assert "switched: kept again switched: dropped" in page.text


def test_one_record(run: Any, tmp_path: Path) -> None:
    first = {**run.records[0], "fitness": None, "held_out": None}
    page = write(tmp_path / "report.html", run, records=[first])
    assert "generations replaced" not in page.text


def test_everything_is_escaped(run: Any, tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>\"'& $title {{body}}"
    result = {**run.result, "rows": [{"name": evil, "kl": 1.0, "perplexity": {evil: 2.0}}], "database": {"path": evil}}
    config = {"model": {"name": evil}, evil: {evil: [evil]}}
    figure = tmp_path / f"{evil.replace('/', '')}.png"
    figure.write_bytes(b"not looked at")
    changes = {"title": evil, "command": evil, "environment": {evil: evil}, "figures": [figure]}
    page = write(tmp_path / "report.html", run, config=config, result=result, **changes)
    assert "<script" not in page.source
    assert page.count("script") == 0
    assert page.text.count("<script>alert(1)</script>\"'& $title {{body}}") >= 8
    assert page.count("img") == 1


def test_long_lists_of_switches_are_capped(run: Any, tmp_path: Path) -> None:
    many = [{"generation": g, "accepted": True, "fitness": 1.0, "switches": [[0, 3, 2]]} for g in range(1, 301)]
    page = write(tmp_path / "report.html", run, records=many)
    assert "the first 200 of 300 accepted generations" in page.text
    assert page.source.count("model.layers.0.self_attn.q_proj: 3 bits → 4 bits") == 200


def test_a_heavy_svg_is_embedded_as_png(run: Any, tmp_path: Path) -> None:
    svg, png = tmp_path / "big.svg", tmp_path / "big.png"
    svg.write_bytes(b" " * 400_001)
    png.write_bytes(b"png")
    page = write(tmp_path / "report.html", run, figures=[svg, png])
    assert 'src="data:image/png;base64,cG5n"' in page.source


def test_what_lies_in_a_dropped_module_has_no_level(run: Any, tmp_path: Path) -> None:
    module = Unit("m", 0, "mlp", 0, (Level("keep", 0, "keep", 0), Level("drop", 0, "drop", 0)))
    levels = tuple(Level(f"{bits} bits", 16 * bits, str(bits), 16 * bits) for bits in (6, 2))
    space = Space("joint", (module, *(Unit(f"{name}_proj", 0, name, 16, levels) for name in ("up", "down"))), None, (None, 0, None))
    _, rows = levels_table(space, (1, 0, 1))
    assert [row[3:] for row in rows] == [["drop", None], ["in a dropped module", 0.0], ["2 bits", 2.0]]
    page = write(tmp_path / "report.html", run, space=space, genome=(1, 0, 1), records=[], figures=[])
    table = [re.findall("<t[hd]>(.*?)</t[hd]>", row) for row in re.findall("<tr.*?</tr>", page.source)]
    by_name = {cells[0]: cells for cells in table if cells}
    place = by_name["kind"].index("in a dropped module")
    assert by_name["up"][place] == "1" and by_name["up"].count("1") == 2 and "6 bits" not in by_name["kind"]
    assert by_name["down"][place] == "" and by_name["all"][place] == "1"


def test_who_says_that_it_keeps_the_budget_is_believed() -> None:
    kept = {"name": "dp", "bits_per_weight": 2.9275, "kl": 0.4, "within_budget": True}
    ours = {"name": "evopress", "bits_per_weight": 2.9, "kl": 0.5, "within_budget": True}
    assert "The best baseline within this budget, DP, has 0.4000" in headline([kept, ours])
    broken = {**kept, "bits_per_weight": 2.5, "within_budget": False}
    assert "No baseline within this budget was measured" in headline([broken, ours])


def said_of_extremes(run: Any, tmp_path: Path, bits: str, *, accepted: bool = False) -> str:
    """Return what the page says of a model with a block for each digit, all its units of so many bits."""
    units = tuple(unit for unit in run.space.units if unit.block < len(bits))
    genome = tuple(6 - int(bits[unit.block]) for unit in units)
    records = [{"generation": 1, "accepted": accepted}]
    page = write(tmp_path / "report.html", run, space=Space("quant", units), genome=genome, records=records)
    return page.text.partition("Where the budget went")[2].partition("kind units")[0].strip()


@pytest.mark.parametrize(
    ("bits", "said"),
    [
        ("444444", ""),
        ("544444", "Most was kept in block 0 (5). In brackets: bits per weight."),
        ("555543", "Least was kept in block 4 (4), block 5 (3). In brackets: bits per weight."),
        ("543256", "Most was kept in block 5 (6), block 0 (5), block 4 (5); least in block 1 (4), block 2 (3), block 3 (2)."),
        ("554444", "Most was kept in block 0 (5), block 1 (5). In brackets: bits per weight."),
        ("555544", "Least was kept in block 4 (4), block 5 (4). In brackets: bits per weight."),
        ("543", ""),
    ],
)
def test_only_what_is_apart_is_named(run: Any, tmp_path: Path, bits: str, said: str) -> None:
    found = said_of_extremes(run, tmp_path, bits)
    assert found.startswith(said) if said else not found
    assert "hurt more" not in found


def test_a_search_that_accepted_nothing_kept_nothing_for_a_reason(run: Any, tmp_path: Path) -> None:
    assert "The search kept more where taking away hurt more" in said_of_extremes(run, tmp_path, "544444", accepted=True)
    one = write(tmp_path / "report.html", run, records=run.records[:2]).text
    assert "EvoPress searched for 1 generation of 16 offspring." in one and re.search("of 1 generation replaced its parent", one)
