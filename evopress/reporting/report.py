"""Write one self-contained HTML page about a run, for somebody who was not there. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from evopress.currencies import num_modules
from evopress.progress import counted
from evopress.reporting import account
from evopress.reporting.curve import held_out_curve
from evopress.reporting.figures import averages, measure, measure_name, measured_size, shown_level
from evopress.reporting.findings import headline, results_table
from evopress.reporting.held import held_words
from evopress.reporting.page import cell_text, code, details, json_text, pairs, paragraph, pictures, section, table, write_page
from evopress.units import Genome, Space

__all__ = ["headline", "write_report"]

_WORDS = {
    "unit": "what gets a level of its own: a linear weight; or an attention module, an MLP or a block where these are dropped",
    "level": "one of a unit's versions, from the least compressed to the most",
    "genome": "one level for each unit: a whole compressed model",
    "budget": "what all levels may cost together; every genome of the search keeps it",
    "level switch": "the mutation: some units go one level up, others down, and the budget is kept",
    "generation": "one turn of the search: offspring of the parent are made by level switches, and selected in stages",
    "stage": "the candidates are measured on some tokens and the best go on; later stages have fewer candidates and more tokens",
    "parent": "the best genome so far; it competes in the last stage, and stays if no offspring beats it there",
    "KL divergence": "how far the compressed model's predictions are from the dense model's, in nats per token; 0 is equal",
    "held-out": "measured on text that neither calibration nor search has seen",
}


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
        figures: PNG and SVG files of `figures.py` and `lineage.py`; of two with one name the lighter fit is embedded.
        command: the shell command that runs it again.
        environment: versions, machine, git revision: names and values.

    Raises: EvoPressError if the file cannot be written.
    """
    rows = [row for row in result.get("rows") or [] if isinstance(row, Mapping)]
    shown, curve = pictures(figures), held_out_curve(records, rows)

    def take(*names: str) -> str:
        return "".join(shown.pop(name, "") for name in names)

    where = take("level_heatmap", "experts", "dropped_modules", "level_profile")
    if space is not None and genome is not None:
        where = _extremes(space, genome, config, records) + where + _kinds(space, genome, records)
    parts = [
        section("What was asked", _asked(config, records, space)),
        section("What was found", paragraph(headline(rows), kind="lead") + results_table(rows)),
        section("Convergence", take("convergence") + account.progress(curve.records, curve.text)),
        section("Where the budget went", where),
        section("What each unit holds", take("held") + _held(records, space)),
        section("Accepted switches", take("switches") + account.accepted_switches(records, space)),
        section("Selection", take("selection") + account.stages(records)),
        section("Lineage", take("lineage") + account.ancestry(records)),
        section("More figures", "".join(shown.values())),
        section("What it cost", account.costs(result, records)),
        section("Load the checkpoint", _loading(result)),
        section("Run it again", _again(command, config, environment)),
        section("Environment", pairs({key: value for key, value in environment.items() if key != "schema"})),
        section("Configuration", details("the whole composed config", code(json_text(config))) if config else ""),
    ]
    write_page(path, title=title, parts=parts)


_OF_EVOLUTION = ("generations", "offspring", "survivors", "tokens per stage")


def _asked(config: Mapping[str, Any], records: Sequence[Mapping[str, Any]], space: Space | None) -> str:
    """Say what a run was asked for, and show the few settings that say it; others are in the whole config."""
    sought = {
        "model": ("model.name", "model.path", "model.id", "model"),
        "method": ("method.name", "method"),
        "target": ("size", "bits", "sparsity"),
        "scale": ("scale.name", "scale"),
        "data": ("data.name", "data.source", "data"),
        "fitness": ("fitness.name", "fitness"),
        "strategy": ("search.strategy.name",),
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
            asked[name] = f"{cell_text(value)} {'bits per weight' if key == 'bits' else key}" if name == "target" else value
            break
    if not asked:
        return ""
    if asked.get("strategy", "evolution") == "evolution":
        asked.pop("strategy", None)  # the numbers below are its own
    else:
        asked = {name: value for name, value in asked.items() if name not in _OF_EVOLUTION}
    words = details("words used on this page", pairs(_WORDS))
    return paragraph(_task(asked, records, space)) + pairs(asked) + words


def _task(asked: Mapping[str, Any], records: Sequence[Mapping[str, Any]], space: Space | None) -> str:
    """Say the task in words, as far as it is known."""
    if space is None or "target" not in asked:
        return ""
    blocks = len({unit.block for unit in space.units if not unit.is_outside})
    outside = "".join(f" and the {unit.kind}" for unit in space.units if unit.is_outside)
    sentence = (
        f"Choose a level for each of the {len(space)} units in the {blocks} transformer blocks{outside} of "
        f"{asked.get('model', 'a model')} so that together they meet {asked['target']} and the model stays as close as it can to "
        "the dense one."
    )
    generations = max((record.get("generation") or 0 for record in records), default=0)
    if generations:
        sentence += f" EvoPress searched for {counted(generations, 'generation')}"
        sentence += f" of {asked['offspring']} offspring." if "offspring" in asked else "."
    return sentence


def _extremes(space: Space, genome: Genome, config: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> str:
    """Name the blocks and kinds that kept more, and less, than all others, or what was dropped."""
    if all(num_modules(unit) for unit in space.units):
        dropped: dict[str, list[str]] = {}
        for unit, level in zip(space.units, space.check(genome), strict=True):
            if unit.levels[level].drops:
                dropped.setdefault(unit.kind, []).append(str(unit.block))
        return paragraph(" ".join(f"Dropped, {kind}: {', '.join(blocks)}." for kind, blocks in dropped.items()))
    said = []
    for by, name in (("block", "block"), ("kind", "")):
        inside = {getattr(unit, by) for unit in space.units if by == "kind" or not unit.is_outside}
        values = {key: value for key, value in averages(space, genome, by=by).items() if key in inside}
        most_first = sorted(values, key=lambda key: values[key], reverse=not space.words.taken_away)
        shown = [f"{values[key]:.3g}" for key in most_first]
        named = [f"{name} {key} ({value})".strip() for key, value in zip(most_first, shown, strict=True)]
        most, least = _num_apart(shown), _num_apart(shown[::-1])
        kept = [f"Most was kept in {', '.join(named[:most])}"] if most else []
        kept += [f"{'least' if most else 'Least was kept'} in {', '.join(named[-least:])}"] if least else []
        if kept:
            said.append(f"{'; '.join(kept)}.")
    if not said:
        return ""
    said.append(f"In brackets: {measure_name(space)}.")
    if any(record.get("accepted") for record in records):
        said.append("The search kept more where taking away hurt more, as far as it could tell.")
    search = config.get("search")
    search = search if isinstance(search, Mapping) else {}
    switched = (search.get("strategy") or {}).get("name", "evolution") == "evolution"
    if switched and search.get("exchange") == "size" and len({unit.size for unit in space.units}) > 1:
        said.append("Only units of equal size exchanged levels, so what each size has in all was settled by the initial genome.")
    return paragraph(" ".join(said))


def _num_apart(shown: Sequence[str]) -> int:
    """Return how many sorted values, at most three and half of them, can be named at the front: the next one is another value."""
    few = min(3, len(shown) // 2) if len(shown) >= 4 else 0
    return next((count for count in range(few, 0, -1) if shown[count - 1] != shown[count]), 0)


def _kinds(space: Space, genome: Genome, records: Sequence[Mapping[str, Any]]) -> str:
    """Lay out, per kind of unit, how many units have each level, their average measure, and how often switches moved them."""
    genome = space.check(genome)
    counts: dict[str, dict[str, int]] = {}
    weights: dict[str, int] = {}
    labels: dict[str, None] = {}
    chosen = [shown_level(space, genome, index) for index in range(len(space))]
    for unit, label in zip(space.units, chosen, strict=True):
        counts.setdefault(unit.kind, {})[label] = counts.setdefault(unit.kind, {}).get(label, 0) + 1
        weights[unit.kind] = weights.get(unit.kind, 0) + unit.size
    for unit in space.units:
        labels.update(dict.fromkeys(level.label for level in unit.levels))
    labels.update(dict.fromkeys(chosen))  # and what lies in a dropped module, at the end
    used = [label for label in labels if any(label in count for count in counts.values())]
    if len(used) > 8:  # too many for a column each
        used = []
    average, balance = averages(space, genome, by="kind"), account.switch_balance(records, space)
    switched = any(record.get("accepted") for record in records)
    body = []
    for kind, count in counts.items():
        cells = [escape(kind), str(sum(count.values())), f"{weights[kind]:,}", *(str(count.get(label, "")) for label in used)]
        shown = f"{average[kind]:.3f}" if kind in average else ""
        body.append(([*cells, shown, *(map(str, balance[kind]) if switched else ())], ""))
    total = [str(chosen.count(label)) for label in used]
    whole = measure(space, space.cost(genome), sum(measured_size(space, unit) for unit in space.units))
    sums = [str(sum(pair[side] for pair in balance.values())) for side in (0, 1)] if switched else []
    body.append((["all", str(len(space)), f"{space.size:,}", *total, f"{whole:.3f}", *sums], ' class="total"'))
    headers = ["kind", "units", "weights", *used, measure_name(space), *(account.balance_headers(space) if switched else ())]
    note = "Switched: levels that units of this kind went up, and down, in all accepted generations." if switched else ""
    return table(list(map(escape, headers)), body) + paragraph(note, kind="note")


def _held(records: Sequence[Mapping[str, Any]], space: Space | None) -> str:
    """Say which units held most of the fitness, where the search asked."""
    said = held_words(records, space) if space is not None else []
    return "".join(map(paragraph, said))


def _loading(result: Mapping[str, Any]) -> str:
    if not any(row.get("name") == "evopress" for row in result.get("rows") or [] if isinstance(row, Mapping)):
        return ""
    exported = result.get("checkpoint")
    folder = exported if isinstance(exported, str) else "checkpoint"
    python = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"folder = {folder!r}\n"
        "model = AutoModelForCausalLM.from_pretrained(folder)\n"
        "tokenizer = AutoTokenizer.from_pretrained(folder)\n"
        'inputs = tokenizer("The paper says", return_tensors="pt")\n'
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))"
    )
    where = "" if isinstance(exported, str) else " It is in <code>checkpoint</code> in the run folder once it is exported."
    return (
        "<p>The checkpoint holds ordinary weights, compressed to their levels: any tool that reads such folders will do."
        f"{where}</p>{code(python)}"
    )


def _again(command: str, config: Mapping[str, Any], environment: Mapping[str, Any]) -> str:
    """Show the command, and say what else makes it the same run."""
    if not command:
        return ""
    revision = environment.get("git_revision")
    known = isinstance(revision, str) and revision not in ("", "unknown")
    said = [
        f"It was run at revision {revision} of the code." if known else "",
        f"With seed {config['seed']}, the same versions and machine it finds the same genome." if "seed" in config else "",
        "A run that was cut off goes on with python -m evopress resume=RUN_FOLDER.",
    ]
    return code(command) + paragraph(" ".join(filter(None, said)))
