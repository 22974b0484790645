"""Write one self-contained HTML page about a run, for somebody who was not there. Standard library only."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from evopress.reporting.figures import averages, measure, measure_name
from evopress.reporting.records import plain, write_bytes
from evopress.reporting.tables import display_name, number, results_columns, significant
from evopress.units import Genome, Space

_MOST_ROWS = 200
_MOST_FIGURE_BYTES = 400_000
"""An SVG above this size is embedded as PNG, if there is one."""
_SLACK = 1.002
"""Genomes that spend this much more than another still count as of the same budget."""


def write_report(
    path: str | Path,
    *,
    title: str,
    config: Mapping[str, Any],
    result: Mapping[str, Any],
    records: Sequence[Mapping[str, Any]],
    space: Space | None,
    genome: Genome | None,
    figures: Sequence[Path],
    command: str,
    environment: Mapping[str, Any],
) -> None:
    """Write the report of a run; whatever part is missing is left out.

    Args:
        config: the composed config.
        result: what `result.json` holds; `checkpoint`, the folder of the exported model, may be added.
        records: the records of `metrics.jsonl`.
        genome: what the search found, a genome of the space.
        figures: PNG and SVG files of `figures.py`; of two with one name the lighter fit is embedded.
        command: the shell command that runs it again.
        environment: versions, machine, git revision: names and values.

    Raises: EvoPressError if the file cannot be written.
    """
    rows = [row for row in result.get("rows") or [] if isinstance(row, Mapping)]
    pictures = _pictures(figures)
    budget = [pictures.pop(name, "") for name in ("level_heatmap", "level_profile")]
    found = space is not None and genome is not None
    parts = [
        _section("What was asked", _asked(config)),
        _section("What was found", f'<p class="lead">{escape(headline(rows))}</p>' + _results(rows)),
        _section("Convergence", pictures.pop("convergence", "") + _progress(records)),
        _section("Where the budget went", "".join(budget) + (_kinds(space, genome) if found else "")),  # type: ignore[arg-type]
        _section("Accepted switches", _switches(records, space)),
        _section("More figures", "".join(pictures.values())),
        _section("What it cost", _costs(result, records)),
        _section("Load the checkpoint", _loading(result)),
        _section("Run it again", f"<pre>{escape(command)}</pre>" if command else ""),
        _section("Environment", _pairs(environment)),
        _section("Configuration", _details("the whole composed config", _json(config)) if config else ""),
    ]
    page = _PAGE.substitute(title=escape(title), style=_STYLE, body="\n".join(part for part in parts if part))
    write_bytes(path, page.encode(errors="replace"))


def headline(rows: Sequence[Mapping[str, Any]]) -> str:
    """Say in words what the rows of `result.json` show: who has the lowest held-out KL within EvoPress's budget."""
    measured = {
        str(row.get("name")): row for row in rows if number(row.get("kl")) is not None and row.get("name") not in (None, "dense")
    }
    if not measured:
        return "Nothing has been measured on held-out text yet."
    if "evopress" not in measured:
        best = min(measured, key=lambda name: measured[name]["kl"])
        return (
            f"No search has been measured; of {_list(measured)}, {display_name(best)} has the lowest held-out KL: "
            f"{significant(measured[best]['kl'])} nats per token{_at(measured[best])}."
        )
    ours = measured.pop("evopress")
    kl = ours["kl"]
    sentence = f"EvoPress's held-out KL is {significant(kl)} nats per token{_at(ours)}"
    equal = {name: row["kl"] for name, row in measured.items() if not _spends_more(row, ours)}
    larger = {name: row["kl"] for name, row in measured.items() if name not in equal}
    if equal:
        best = min(equal, key=lambda name: equal[name])
        sentence += f"; the best baseline within this budget, {display_name(best)}, has {significant(equal[best])}: "
        change = (kl / equal[best] - 1) * 100 if equal[best] else 0.0
        if significant(kl) == significant(equal[best]):
            sentence += "a draw"
        elif kl < equal[best]:
            sentence += f"EvoPress wins, {abs(change):.1f}% lower"
        else:
            sentence += f"{display_name(best)} wins, EvoPress is {abs(change):.1f}% higher"
        others = [f"{display_name(name)} at {significant(value)}" for name, value in equal.items() if name != best]
        sentence += f" (others: {', '.join(others)})" if others else ""
    else:
        sentence += "; no baseline within this budget was measured"
    if larger:
        sentence += ". With a larger budget: " + ", ".join(
            f"{display_name(name)} has {significant(value)}{_at(measured[name])}" for name, value in larger.items()
        )
    return sentence + ". One run, one seed: small differences may be chance."


def _at(row: Mapping[str, Any]) -> str:
    """Say what a row spends: " at 2.499 bits per weight"."""
    for key, words in (("bits_per_weight", "bits per weight"), ("sparsity", "sparsity")):
        value = number(row.get(key))
        if value is not None:
            return f" at {value:.3f} {words}"
    value = number(row.get("modules_dropped"))
    return "" if value is None else f" with {value:.0f} modules dropped"


def _spends_more(row: Mapping[str, Any], ours: Mapping[str, Any]) -> bool:
    """Tell if a row is of a larger budget than ours: more bits, less sparsity, or fewer modules dropped."""
    for key, sign in (("bits_per_weight", 1), ("sparsity", -1), ("modules_dropped", -1)):
        theirs, limit = number(row.get(key)), number(ours.get(key))
        if theirs is not None and limit is not None:
            return theirs > limit * _SLACK if sign > 0 else theirs * _SLACK < limit
    return False


def _asked(config: Mapping[str, Any]) -> str:
    """Show the few settings that say what a run is; others are in the whole config."""
    sought = {
        "model": ("model.name", "model.path", "model.id", "model"),
        "method": ("method.name", "method"),
        "target": ("bits", "sparsity"),
        "scale": ("scale.name", "scale"),
        "data": ("data.name", "data.source", "data"),
        "fitness": ("fitness.name", "fitness"),
        "generations": ("search.generations",),
        "offspring": ("search.num_offspring",),
        "survivors": ("search.survivors",),
        "tokens per stage": ("search.tokens", "search.tokens_per_selection"),
        "seed": ("seed",),
    }
    asked: dict[str, Any] = {}
    for name, keys in sought.items():
        for key in keys:
            value: Any = config
            for part in key.split("."):
                value = value.get(part) if isinstance(value, Mapping) else None
            if value is None or isinstance(value, Mapping):
                continue
            asked[name] = f"{_cell(value)} {'bits per weight' if key == 'bits' else key}" if name == "target" else value
            break
    return _pairs(asked)


def _results(rows: Sequence[Mapping[str, Any]]) -> str:
    """Lay out the results; bold is the best of each quality among the rows that spend no more than EvoPress."""
    if not rows:
        return ""
    columns = results_columns(rows)
    ours = next((row for row in rows if row.get("name") == "evopress"), None)
    fair = [index for index, row in enumerate(rows) if row.get("name") != "dense" and (ours is None or not _spends_more(row, ours))]
    bold: set[tuple[int, int]] = set()
    for place, column in enumerate(columns):
        shown = {index: value for index in fair if (value := column.values[index]) is not None}
        if column.best is not None and shown:
            best = column.best(shown.values())
            bold |= {(index, place) for index, value in shown.items() if value == best}
    body = []
    for index, row in enumerate(rows):
        cells = [escape(display_name(str(row.get("name", ""))))]
        for place, column in enumerate(columns):
            cell = escape(column.cell(index))
            cells.append(f"<b>{cell}</b>" if (index, place) in bold else cell)
        body.append((cells, "" if index in fair else ' class="aside"'))
    note = (
        "Bold: best among the compressed rows"
        + (" that spend no more than EvoPress; the others are grey. " if ours is not None else ". ")
        + "KL: nats per token against the dense model on held-out text, lower is better; ppl: perplexity, lower is "
        "better; MB: 10<sup>6</sup> bytes."
    )
    return _table(["", *(escape(column.header) for column in columns)], body) + f'<p class="note">{note}</p>'


def _progress(records: Sequence[Mapping[str, Any]]) -> str:
    """Say how often a generation improved on its parent, and how the held-out KL moved."""
    tried = [record for record in records if record.get("generation")]
    sentences = []
    if tried:
        accepted = sum(bool(record.get("accepted")) for record in tried)
        sentences.append(
            f"{accepted} of {len(tried)} generations replaced their parent: an acceptance rate of {accepted / len(tried):.0%}"
        )
        if len(tried) >= 8:
            last = tried[-(len(tried) // 4) :]
            sentences[0] += f" ({sum(bool(record.get('accepted')) for record in last) / len(last):.0%} in the last quarter)"
    held_out = [
        (record["generation"], kl) for record in records if (kl := number((record.get("held_out") or {}).get("kl"))) is not None
    ]
    if len(held_out) > 1:
        (first, before), (last_generation, after) = held_out[0], held_out[-1]
        sentences.append(
            f"held-out KL went from {significant(before)} at generation {first} to {significant(after)} "
            f"at generation {last_generation}"
        )
    return f"<p>{escape('; '.join(sentences))}.</p>" if sentences else ""


def _kinds(space: Space, genome: Genome) -> str:
    """Lay out, per kind of unit, how many units have each level and their average measure."""
    genome = space.check(genome)
    counts: dict[str, dict[str, int]] = {}
    weights: dict[str, int] = {}
    labels: dict[str, None] = {}
    for unit, level in zip(space.units, genome, strict=True):
        label = unit.levels[level].label
        counts.setdefault(unit.kind, {})[label] = counts.setdefault(unit.kind, {}).get(label, 0) + 1
        weights[unit.kind] = weights.get(unit.kind, 0) + unit.size
    for unit in space.units:
        labels.update(dict.fromkeys(level.label for level in unit.levels))
    used = [label for label in labels if any(label in count for count in counts.values())]
    if len(used) > 12:  # too many for a column each
        used = []
    average = averages(space, genome, by="kind")
    body = [
        (
            [
                escape(kind),
                str(sum(count.values())),
                f"{weights[kind]:,}",
                *(str(count.get(label, "")) for label in used),
                f"{average[kind]:.3f}",
            ],
            "",
        )
        for kind, count in counts.items()
    ]
    total = [f"{sum(level == label for level in _labels(space, genome))}" for label in used]
    body.append(
        (
            ["all", str(len(space)), f"{space.size:,}", *total, f"{measure(space, space.cost(genome), space.size):.3f}"],
            ' class="total"',
        )
    )
    return _table(["kind", "units", "weights", *map(escape, used), escape(measure_name(space))], body)


def _labels(space: Space, genome: Genome) -> list[str]:
    return [unit.levels[level].label for unit, level in zip(space.units, genome, strict=True)]


def _switches(records: Sequence[Mapping[str, Any]], space: Space | None) -> str:
    """List the level switches of each accepted generation."""
    accepted = [record for record in records if record.get("accepted") and record.get("switches")]
    if not accepted:
        return ""
    body = []
    for record in accepted[:_MOST_ROWS]:
        switches = "<br>".join(escape(_switch(switch, space)) for switch in record["switches"])
        fitness = number(record.get("fitness"))
        cells = [str(record.get("generation")), "" if fitness is None else significant(fitness), switches]
        body.append(([escape(cells[0]), cells[1], cells[2]], ""))
    shown = f"the first {_MOST_ROWS} of {len(accepted)}" if len(accepted) > _MOST_ROWS else f"all {len(accepted)}"
    table = _table(["generation", "winner's fitness", "switches"], body, text_last=True)
    return (
        "<p>A generation whose winner is one of its offspring changes a few units; the fitness is on that generation's "
        f"own minibatch.</p><details><summary>{shown} accepted generations</summary>{table}</details>"
    )


def _switch(switch: Sequence[int], space: Space | None) -> str:
    unit, before, after = switch
    if space is None or not 0 <= unit < len(space):
        return f"unit {unit}: level {before} → {after}"
    levels = space.units[unit].levels
    names = [levels[level].label if 0 <= level < len(levels) else f"level {level}" for level in (before, after)]
    return f"{space.units[unit].name}: {names[0]} → {names[1]}"


def _costs(result: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> str:
    last = records[-1] if records else {}
    search = {key: last.get(key) for key in ("tokens", "evaluations", "seconds")} | dict(result.get("search") or {})
    if "generations" not in search and "generation" in last:
        search["generations"] = last["generation"]
    database, memory = result.get("database") or {}, result.get("memory") or {}
    reused = " (reused from an earlier run)" if database.get("reused") else ""
    shown: dict[str, str | None] = {
        "search: generations": _show(search.get("generations"), "{:,.0f}".format),
        "search: genomes evaluated": _show(search.get("evaluations"), "{:,.0f}".format),
        "search: tokens evaluated": _show(search.get("tokens"), "{:,.0f}".format),
        "search: time": _show(search.get("seconds"), _duration),
        "level database: time": _show(database.get("seconds"), lambda value: _duration(value) + reused),
        "level database: size": _show(database.get("bytes"), _bytes),
        "level database: folder": database.get("path"),
        "peak memory": _show(memory.get("peak_rss_bytes"), _bytes),
        "peak memory of the device": _show(memory.get("peak_device_bytes") or None, _bytes),
    }
    return _pairs(shown)


def _loading(result: Mapping[str, Any]) -> str:
    if not any(row.get("name") == "evopress" for row in result.get("rows") or [] if isinstance(row, Mapping)):
        return ""
    exported = result.get("checkpoint")
    folder = exported if isinstance(exported, str) else "checkpoint"
    code = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"folder = {folder!r}\n"
        "model = AutoModelForCausalLM.from_pretrained(folder)\n"
        "tokenizer = AutoTokenizer.from_pretrained(folder)\n"
        'inputs = tokenizer("The paper says", return_tensors="pt")\n'
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))"
    )
    where = "" if isinstance(exported, str) else " It is in <code>checkpoint</code> in the run folder once it is exported."
    return (
        "<p>The checkpoint holds ordinary weights, rounded to their levels: any tool that reads such folders will do."
        f"{where}</p><pre>{escape(code)}</pre>"
    )


def _pictures(figures: Sequence[Path]) -> dict[str, str]:
    """Embed each figure once, by its name: the SVG unless it is heavy and there is a PNG."""
    files: dict[str, dict[str, Path]] = {}
    for figure in map(Path, figures):
        if figure.suffix in (".png", ".svg") and figure.is_file():
            files.setdefault(figure.stem, {})[figure.suffix] = figure
    pictures = {}
    for name, of in files.items():
        svg, png = of.get(".svg"), of.get(".png")
        chosen = svg if svg and (not png or svg.stat().st_size <= _MOST_FIGURE_BYTES) else png
        assert chosen is not None
        kind = "svg+xml" if chosen is svg else "png"
        data = base64.b64encode(chosen.read_bytes()).decode()
        text = escape(name.replace("_", " "))
        # As an image, not inline: scripts in it do not run, and names inside two figures cannot clash.
        pictures[name] = f'<figure><img alt="{text}" src="data:image/{kind};base64,{data}"></figure>'
    return pictures


def _section(heading: str, body: str) -> str:
    return f"<section><h2>{escape(heading)}</h2>\n{body}</section>" if body else ""


def _table(headers: Sequence[str], body: Sequence[tuple[Sequence[str], str]], *, text_last: bool = False) -> str:
    """Lay out cells that are HTML already; each row comes with the attributes of its tag."""
    head = "".join(f"<th>{header}</th>" for header in headers)
    rows = "".join(f"<tr{attributes}>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>" for cells, attributes in body)
    return (
        f'<div class="scroll"><table{" class=text-last" if text_last else ""}><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _pairs(values: Mapping[str, Any]) -> str:
    shown = [(key, value) for key, value in values.items() if value is not None and value != ""]
    items = "".join(f"<dt>{escape(str(key))}</dt><dd>{escape(_cell(value))}</dd>" for key, value in shown)
    return f"<dl>{items}</dl>" if shown else ""


def _cell(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_cell, value))
    return _json(value) if isinstance(value, Mapping) else str(value)


def _details(summary: str, text: str) -> str:
    return f"<details><summary>{escape(summary)}</summary><pre>{escape(text)}</pre></details>"


def _json(value: Any) -> str:
    try:
        return json.dumps(plain(value), indent=2, ensure_ascii=False)
    except TypeError:
        return json.dumps(value, indent=2, ensure_ascii=False, default=str)


def _show(value: Any, show: Callable[[float], str]) -> str | None:
    count = number(value)
    return None if count is None else show(count)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s"
    minutes, hours = seconds / 60, seconds / 3600
    return f"{minutes:.1f} min" if minutes < 90 else f"{hours:.1f} h"


def _bytes(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _list(names: Mapping[str, Any]) -> str:
    return ", ".join(map(display_name, names))


_STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --soft: #5c6570; --paper: #fbfbfa; --card: #fff; --line: #dfe2e6; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8ea; --soft: #9aa4af; --paper: #15181b; --card: #1d2125; --line: #343a41; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: .5rem 0 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .7rem; padding-bottom: .3rem; border-bottom: 1px solid var(--line); }
.lead { font-size: 1.1rem; }
.note, .aside td { color: var(--soft); }
.note { font-size: .87rem; }
.scroll { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .75rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 600; vertical-align: bottom; white-space: normal; }
th:first-child, td:first-child, .text-last th:last-child, .text-last td:last-child { text-align: left; }
td { vertical-align: top; }
th:first-child, td:first-child { position: sticky; left: 0; background: var(--paper); }
.total td { font-weight: 600; }
dl { display: grid; grid-template-columns: fit-content(42%) 1fr; gap: .25rem 1.5rem; margin: .8rem 0; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
figure { margin: 1rem 0; padding: .6rem; background: #fff; border: 1px solid var(--line); border-radius: 8px;
  overflow-x: auto; }
figure img { display: block; width: 100%; min-width: 640px; height: auto; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .8rem; overflow-x: auto;
  font: .86rem/1.5 ui-monospace, monospace; }
summary { cursor: pointer; color: var(--soft); }
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
