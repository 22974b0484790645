"""Account for a search: how often and by what it improved, what its stages cost and were good for. Standard library only."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from evopress.progress import counted, duration, in_bytes
from evopress.reporting.lineage import words
from evopress.reporting.metrics import gain, phases
from evopress.reporting.page import details, pairs, paragraph, show, table
from evopress.reporting.tables import number, significant
from evopress.units import Space

Record = Mapping[str, Any]

_MOST_ROWS = 200
_MOST_STEPS = 5


def progress(records: Sequence[Record], text: str = "") -> str:
    """Say how often a generation improved on its parent, and how the held-out KL moved.

    Args: text: which one that was measured on.
    """
    tried = [record for record in records if record.get("generation")]
    sentences = []
    if tried:
        accepted = sum(bool(record.get("accepted")) for record in tried)
        whose = "its" if len(tried) == 1 else "their"
        sentences.append(f"{accepted} of {counted(len(tried), 'generation')} replaced {whose} parent: {accepted / len(tried):.0%}")
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
            f"at generation {last_generation}{f', on {text}' if text else ''}"
        )
    return paragraph(f"{'; '.join(sentences)}.") if sentences else ""


def accepted_switches(records: Sequence[Record], space: Space | None) -> str:
    """List what helped most, and the level switches of each accepted generation."""
    accepted = [record for record in records if record.get("accepted") and record.get("switches")]
    if not accepted:
        return ""
    steps = sorted((record for record in accepted if (gain(record) or 0) > 0), key=lambda record: -(gain(record) or 0))
    parts = [
        paragraph(
            "A generation whose winner is one of its offspring changes a few units. The gain is the parent's fitness less the "
            "winner's, both on that generation's own minibatch: gains of different generations were measured on different tokens."
        )
    ]
    if len(steps) > _MOST_STEPS:
        parts += ["<h3>What helped most</h3>", _steps(steps[:_MOST_STEPS], space)]
    which = f"the first {_MOST_ROWS} of" if len(accepted) > _MOST_ROWS else "all"
    parts.append(details(f"{which} {counted(len(accepted), 'accepted generation')}", _steps(accepted[:_MOST_ROWS], space)))
    return "".join(parts)


def switch_balance(records: Sequence[Record], space: Space) -> dict[str, tuple[int, int]]:
    """Return how many levels each kind of unit went up, and down, in all accepted generations."""
    balance = {unit.kind: (0, 0) for unit in space.units}
    for record in records:
        for index, before, after in record.get("switches") or ():
            if record.get("accepted") and 0 <= index < len(space):
                up, down = balance[space.units[index].kind]
                balance[space.units[index].kind] = (up + max(before - after, 0), down + max(after - before, 0))
    return balance


def ancestry(records: Sequence[Record]) -> str:
    """Say how far the search went from its initial genome, and what it took back on the way."""
    genomes = [record["genome"] for record in records if record.get("genome")]
    moved = {index for record in records if record.get("accepted") for index, _, _ in record.get("switches") or ()}
    if len(genomes) < 2 or not moved:
        return ""
    differ = {index for index, (a, b) in enumerate(zip(genomes[0], genomes[-1], strict=False)) if a != b}
    accepted = [record["generation"] for record in records if record.get("accepted")]
    sentence = (
        f"The last genome differs from the initial one in {len(differ)} of {len(genomes[-1])} units. {len(moved)} units were "
        f"changed on the way, {len(moved - differ)} of them back to the level that they began with. It became the parent in "
        f"generation {accepted[-1]}"
    )
    longest = max((b - a for a, b in itertools.pairwise(accepted)), default=0)
    sentence += f"; the longest that a parent lasted before was {longest} generations." if longest > 1 else "."
    return paragraph(sentence)


def winner_ranks(stages: Sequence[Mapping[str, Any]]) -> list[int] | None:
    """Return the ranks, 1 the best, that an accepted winner had in the stages before the last; None if the record does not say.

    In the last stage candidate 0 is the parent and the others come, as in every later stage, in the order in which they survived.
    """
    survivors = [stage.get("survivors") or () for stage in stages]
    if not survivors or not survivors[-1]:
        return None
    ranks, place = [], survivors[-1][0] - 1
    for earlier in reversed(survivors[:-1]):
        if not 0 <= place < len(earlier):
            return None
        ranks.append(place + 1)
        place = earlier[place]
    return ranks[::-1]


def stages(records: Sequence[Record]) -> str:
    """Lay out what each stage of selection, and the rounds of a guided search, cost, and where the later winners stood in it."""
    body: list[tuple[list[str], int, str]] = []
    rounds = [
        (record, before) for before, record in itertools.pairwise(records) if record.get("generation") and record.get("details")
    ]
    for name, tried in phases(records):
        count = max(len(record["stages"]) for record in tried)
        accepted = [list(record["stages"]) for record in tried if record.get("accepted")]
        ranks = [found for each in accepted if len(each) == count and (found := winner_ranks(each))]
        for index in range(count):
            those = [record["stages"][index] for record in tried if len(record["stages"]) > index]
            total = sum(stage.get("spent") or stage["tokens"] * stage["num_candidates"] for stage in those)
            cells = [f"stage {index + 1}"]
            if name == "round" and index == 0:  # what they asked beside it is in the records' tokens alone
                cells = [f"rounds ({len(rounds)})"]
                total = sum(
                    int((number(record.get("tokens")) or 0) - (number(before.get("tokens")) or 0)) for record, before in rounds
                )
            cells += [f"{those[-1][key]:,}" for key in ("tokens", "num_candidates")] + [str(len(those[-1].get("survivors") or ()))]
            rank = f"{statistics.median(found[index] for found in ranks):g}" if index < count - 1 and ranks else ""
            body.append((cells, total, rank))
    if not body:
        return ""
    spent = sum(total for _, total, _ in body) or 1
    rows = [([*cells, f"{total:,}", f"{total / spent:.0%}", rank], "") for cells, total, rank in body]
    headers = ["", "tokens", "candidates", "survivors", "tokens in all", "share", "median rank of accepted winners"]
    note = "Tokens: of one candidate, in the last of them."
    if any(name == "round" for name, _ in phases(records)):
        note += " Those of rounds in all have the passes forward and backward in them, which count as three tokens or five."
    if any(rank for *_, rank in body):
        note += " The lower the accepted winners ranked in an early stage, the less its few tokens could tell candidates apart."
    return table(headers, rows) + paragraph(note, kind="note")


def costs(result: Mapping[str, Any], records: Sequence[Record]) -> str:
    """List what the search and its level database cost."""
    last = records[-1] if records else {}
    search = {key: last.get(key) for key in ("tokens", "evaluations", "seconds")} | dict(result.get("search") or {})
    if "generations" not in search and "generation" in last:
        search["generations"] = last["generation"]
    tokens, seconds = number(search.get("tokens")), number(search.get("seconds"))
    database, memory = result.get("database") or {}, result.get("memory") or {}
    reused = " (reused from an earlier run)" if database.get("reused") else ""
    shown: dict[str, str | None] = {
        "search: generations": show(search.get("generations"), "{:,.0f}".format),
        "search: genomes evaluated": show(search.get("evaluations"), "{:,.0f}".format),
        "search: tokens evaluated": show(tokens, "{:,.0f}".format),
        "search: time": show(seconds, duration),
        "search: tokens per second": show(tokens / seconds if tokens and seconds else None, "{:,.0f}".format),
        "level database: time": show(database.get("seconds"), lambda value: duration(value) + reused),
        "level database: size": show(database.get("bytes"), in_bytes),
        "level database: folder": database.get("path"),
        "peak memory": show(memory.get("peak_rss_bytes"), in_bytes),
        "peak memory of the device": show(memory.get("peak_device_bytes") or None, in_bytes),
    }
    return pairs(shown)


def _steps(records: Sequence[Record], space: Space | None) -> str:
    body = []
    for record in records:
        fitness, better = number(record.get("fitness")), gain(record)
        parent = number(record.get("parent_fitness"))
        relative = f" ({better / parent:.1%})" if better is not None and parent else ""
        cells = [
            escape(str(record.get("generation"))),
            "" if fitness is None else significant(fitness),
            "" if better is None else significant(better, 3) + relative,
            "<br>".join(escape(_switch(switch, space)) for switch in record["switches"]),
        ]
        body.append((cells, ""))
    return table(["generation", "winner's fitness", "gain", "switches"], body, text_last=True)


def _switch(switch: Sequence[int], space: Space | None) -> str:
    unit, before, after = switch
    if space is None or not 0 <= unit < len(space):
        return f"unit {unit}: level {before} → {after}"
    levels = space.units[unit].levels
    names = [levels[level].label if 0 <= level < len(levels) else f"level {level}" for level in (before, after)]
    return f"{space.units[unit].name}: {names[0]} → {names[1]}"


def balance_headers(space: Space) -> list[str]:
    """Return the headers of `switch_balance`'s two columns."""
    up, down = words(space)
    return [f"switched: {up}", f"switched: {down}"]
