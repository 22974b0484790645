"""What a tracker is told of a run: every metric's name, and how its value comes from the records. Standard library only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from evopress.reporting.curve import HeldOutCurve, held_out_curve
from evopress.reporting.figures import averages, measure, measure_name, measured_size, shown_level
from evopress.reporting.tables import MEANS, number
from evopress.units import Genome, Space

AXES = ("generation", "tokens", "seconds")
"""What the metrics are drawn against."""

Record = Mapping[str, Any]


class SearchMetrics:
    """Turn the records of a search into numbers, generation by generation.

    `fitness`, `parent_fitness` and `gain` (the difference of the two) are on the generation's own minibatch, `held_out/*` on
    held-out text, `stage/1/best` is the best of the first stage; `num_switches` counts the units that changed, `distance` those
    that differ from the initial genome; `budget/q_proj` is the kind's average bits or sparsity; `acceptance_rate` is over all
    generations so far.

    Args:
        space: units and levels; None leaves out what needs them.
        earlier: records that a resumed run has already; what their own numbers were is not reckoned again.
    """

    def __init__(self, space: Space | None = None, earlier: Iterable[Record] = ()) -> None:
        self._space = space
        self._initial: Sequence[int] | None = None
        self._before: Record | None = None
        self.num_records = self._tried = self._accepted = 0
        for record in earlier:
            self._count(record)

    def add(self, record: Record, *, timed: bool = True) -> dict[str, float]:
        """Return the numbers of the next record; what was not measured is left out.

        Args: timed: all its evaluations were measured; what is taken from the archive takes no time.
        """
        speed = self._speed(record, timed=timed)
        initial, genome = self._count(record), record.get("genome") or ()
        recorded = ("fitness", "parent_fitness", *AXES[1:], "evaluations", "cost", "non_finite")
        numbers: dict[str, Any] = {key: record.get(key) for key in recorded}
        numbers |= {
            "accepted": float(bool(record.get("accepted"))),
            "acceptance_rate": self._accepted / self._tried if self._tried else None,
            "gain": gain(record),
            "num_switches": len(record.get("switches") or ()),
            "distance": sum(a != b for a, b in zip(initial, genome, strict=False)),
            **speed,
        }
        for index, stage in enumerate(record.get("stages") or (), start=1):
            numbers[f"stage/{index}/best"] = best_fitness(stage)
        held_out = record.get("held_out") or {}
        numbers |= {f"held_out/{key}": held_out.get(key) for key in MEANS}
        numbers |= {f"held_out/ppl_{name}": value for name, value in (held_out.get("perplexity") or {}).items()}
        if self._space is not None and len(genome) == len(self._space):
            numbers |= {f"budget/{kind}": value for kind, value in averages(self._space, tuple(genome), by="kind").items()}
        return {key: shown for key, value in numbers.items() if (shown := number(value)) is not None}

    def _count(self, record: Record) -> Sequence[int]:
        """Take in what later records' numbers rest on; return the initial genome."""
        if self._initial is None:
            self._initial = record.get("genome") or ()
        self.num_records += 1
        if record.get("generation"):
            self._tried += 1
            self._accepted += bool(record.get("accepted"))
        self._before = record
        return self._initial

    def _speed(self, record: Record, *, timed: bool) -> dict[str, float]:
        """Return the time since the record before, and the tokens evaluated per second in it, if all of them were, and any."""
        before: Record = self._before or {}
        tokens, seconds = ((number(record.get(key)) or 0) - (number(before.get(key)) or 0) for key in AXES[1:])
        if seconds <= 0:
            return {}
        return {"generation_seconds": seconds, **({"tokens_per_second": tokens / seconds} if timed and tokens else {})}


def search_history(records: Iterable[Record], space: Space | None = None) -> list[dict[str, float]]:
    """Return the numbers of all records of a search, their generation among them."""
    metrics = SearchMetrics(space)
    return [{**metrics.add(record), AXES[0]: record[AXES[0]]} for record in records]


def best_metrics(records: Iterable[Record]) -> dict[str, float]:
    """Return what was best on held-out text: `best/kl`, its perplexities and its `best/generation`; of one text, the last."""
    measured = [
        (kl, record)
        for record in held_out_curve([record for record in records if record.get("held_out")], []).records
        if (kl := number((record.get("held_out") or {}).get("kl"))) is not None
    ]
    if not measured:
        return {}
    kl, record = min(measured, key=lambda pair: pair[0])
    numbers = {"kl": kl, **{f"ppl_{name}": value for name, value in (record["held_out"].get("perplexity") or {}).items()}}
    return {f"best/{key}": shown for key, value in numbers.items() if (shown := number(value)) is not None} | {
        f"best/{AXES[0]}": record[AXES[0]]
    }


def baseline_lines(curve: HeldOutCurve) -> tuple[dict[str, float], list[dict[str, float]]]:
    """Return the lines of the baselines, `baseline/dp/kl` and `baseline/dp/ppl_docs`, and where on the axes they begin and end."""
    numbers: dict[str, Any] = {}
    for name, measures in curve.lines.items():
        numbers[f"baseline/{name}/kl"] = measures.get("kl")
        numbers |= {f"baseline/{name}/ppl_{text}": value for text, value in (measures.get("perplexity") or {}).items()}
    ends = [curve.records[0], curve.records[-1]] if len(curve.records) > 1 else curve.records
    axes = [{axis: value for axis in AXES if (value := number(record.get(axis))) is not None} for record in ends]
    return {key: shown for key, value in numbers.items() if (shown := number(value)) is not None}, axes


def gain(record: Record) -> float | None:
    """Return by how much a generation's winner beats its parent on the same minibatch; 0 where the parent won."""
    fitness, parent = number(record.get("fitness")), number(record.get("parent_fitness"))
    return None if fitness is None or parent is None else parent - fitness


def best_fitness(stage: Mapping[str, Any]) -> float | None:
    """Return the best fitness of one stage of a record."""
    values = [value for each in stage.get("fitnesses") or () if (value := number(each)) is not None]
    return min(values, default=None)


def final_metrics(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the numbers of `result.json`: `final/evopress/kl` (the mean), `final/dp/kl_wikitext2`, `final/dp/ppl_wikitext2`.

    `final/<row>/perplexity` is on the first data set, the run's own.
    """
    numbers: dict[str, Any] = {}
    for row in rows:
        name = f"final/{row.get('name')}"
        numbers |= {f"{name}/{key}": value for key, value in row.items()}
        perplexity = row.get("perplexity")
        if isinstance(perplexity, Mapping) and perplexity:
            numbers[f"{name}/perplexity"] = next(iter(perplexity.values()))
            numbers |= {f"{name}/ppl_{data_set}": value for data_set, value in perplexity.items()}
        for key in MEANS:
            values = row.get(f"{key}_by_data_set")
            numbers |= {f"{name}/{key}_{data_set}": value for data_set, value in (values or {}).items()}
        zero_shot = row.get("zero_shot")
        if isinstance(zero_shot, Mapping):
            numbers |= {f"{name}/zero_shot_{task}": value for task, value in zero_shot.items()}
    return {key: shown for key, value in numbers.items() if (shown := number(value)) is not None}


def phases(records: Sequence[Record]) -> list[tuple[str, list[Record]]]:
    """Part what was tried: generations of evolution, whose stages are named "stage", and rounds of guided search, named "round"."""
    tried = [record for record in records if record.get("generation") and record.get("stages")]
    parts = [("round", [record for record in tried if record.get("details")])]
    parts.append(("stage", [record for record in tried if not record.get("details")]))
    return [(name, those) for name, those in parts if those]


def levels_table(space: Space, genome: Genome) -> tuple[list[str], list[list[Any]]]:
    """Return the columns and rows of the table `levels`: one row per unit."""
    rows = []
    for index, (unit, level) in enumerate(zip(space.units, space.check(genome), strict=True)):
        size, cost = measured_size(space, unit), 0 if space.is_gone(genome, index) else space.prices[index][level]
        value = measure(space, cost, size) if size else None
        rows.append([unit.name, unit.block, unit.kind, shown_level(space, genome, index), value])
    return ["unit", "block", "kind", "level", measure_name(space)], rows


def switches_table(records: Iterable[Record], space: Space) -> tuple[list[str], list[list[Any]]]:
    """Return the columns and rows of the table `accepted_switches`: one row per unit of each accepted generation."""
    rows = []
    for record in records:
        if not record.get("accepted"):
            continue
        for index, before, after in record.get("switches") or ():
            unit = space.units[index]
            labels = unit.levels[before].label, unit.levels[after].label
            rows.append([record["generation"], unit.name, unit.block, unit.kind, *labels, gain(record)])
    return ["generation", "unit", "block", "kind", "from", "to", "gain of the generation"], rows
