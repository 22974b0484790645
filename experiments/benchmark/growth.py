"""Part growth: time and memory against the size of everything, one axis at a time, on small random models."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from evopress.compress.gptq import GPTQ
from evopress.fitness.measures import KLDivergence
from evopress.fitness.minibatch import base_states
from evopress.fitness.population import PopulationEvaluator, measure_sums
from evopress.levels.build import ensure_database
from evopress.levels.plan import BuildSettings
from evopress.search.initial import random_mix
from evopress.search.mutation import LevelSwitch, offspring
from experiments.benchmark.levels import BITS, searched
from experiments.benchmark.measure import Timing
from experiments.benchmark.rows import Bench, Row
from experiments.benchmark.sizes import Shape, Size
from experiments.benchmark.subject import Subject, make_blocks

PROMISED: Mapping[tuple[str, str], Mapping[str, float]] = {
    ("search", "seconds"): {"blocks": 1, "width": 2, "offspring": 1, "tokens": 1, "vocabulary": 1},
    ("search", "bytes"): {"blocks": 0, "width": 2, "offspring": 1, "tokens": 1, "vocabulary": 1},
    ("database", "seconds"): {"blocks": 1, "width": 3, "tokens": 1},
    ("database", "bytes"): {"blocks": 0, "width": 2, "tokens": 1},
}
"""What DESIGN sections 3 and 4 promise: (work, measure) to the greatest exponent by axis. Weights grow with the square of the
width, sweeps with its cube; one block at a time is in memory, levels at hand aside."""
TOLERANCE = 0.2
"""Above a promised exponent; noise of small sizes."""
_EVEN = 1.25
"""Growth by less than this factor is noise: its exponent is not held against a promise."""
_HEAD_DIM = 32


@dataclass(frozen=True)
class Point:
    """One setting of all axes."""

    blocks: int
    width: int
    offspring: int
    tokens: int
    vocabulary: int

    def size(self, size: Size, *, sequence_length: int) -> Size:
        """Return the benchmark's size with this model and text."""
        heads = max(self.width // _HEAD_DIM, 1)
        shape = Shape(self.width, 2 * self.width, self.blocks, heads, max(heads // 2, 1), self.vocabulary, self.width // heads)
        return replace(
            size,
            model="synthetic",
            shape=shape,
            whole_levels=False,
            group_size=min(size.group_size, self.width),
            sequence_length=sequence_length,
            search_tokens=self.tokens,
        )


def growth(bench: Bench) -> Iterator[Row]:
    """Part growth: a stage of the search and a database, along every axis of the size."""
    axes = bench.size.growth or {}
    base = Point(**{axis: values[0] for axis, values in axes.items()})
    length = min(bench.size.sequence_length, base.tokens // 2)  # of all points: attention grows with it
    fitted: dict[tuple[str, str], list[str]] = {}
    known: dict[Point, dict[str, Timing[Any]]] = {}  # the point where all axes meet is measured once
    for axis, values in axes.items():
        found: dict[str, list[tuple[int, Timing[Any]]]] = {}
        for value in values:
            point = replace(base, **{axis: value})
            if point not in known:
                known[point] = measured(bench, point, axis, sequence_length=length)
            for work, timing in known[point].items():
                if axis in PROMISED[work, "seconds"]:
                    found.setdefault(work, []).append((value, timing))
        for work, points in found.items():
            exponents = record(bench, work, axis, points)
            fitted.setdefault((work, axis), []).extend(exponents)
    for (work, axis), notes in fitted.items():
        last = [row for row in bench.growth if row["work"] == work and row["axis"] == axis][-1]
        yield Row(
            part="growth",
            case=f"{work}, {axis} {axes[axis][0]:,} to {axes[axis][-1]:,}",
            fast_seconds=last["seconds"],
            passes=bench.meter.repeats,
            fast_working_bytes=last["bytes"],
            note="; ".join(notes),
        )


def measured(bench: Bench, point: Point, axis: str, *, sequence_length: int) -> dict[str, Timing[Any]]:
    """Measure a stage of the search, and a database where the axis matters to it."""
    size = point.size(bench.size, sequence_length=sequence_length)
    assert size.shape is not None
    blocks = make_blocks(size.shape, dtype=size.dtype, device=bench.meter.device, seed=bench.seed)
    subject = Subject(blocks, sequence_length=size.sequence_length, seed=bench.seed)
    folder = bench.fresh_folder("growth")
    found = searched("quant", subject, size, folder, cache_bytes=0)
    space = found.live.space
    rng = np.random.default_rng(bench.seed)
    parent = random_mix(space, found.budget, rng)
    genomes = offspring(LevelSwitch(space, found.budget), parent, point.offspring, rng)
    ids = subject.tokens("search", point.tokens)
    evaluator = PopulationEvaluator(found.live, max_tokens_in_flight=size.max_tokens_in_flight)
    base = base_states(evaluator, ids, batch_tokens=size.max_tokens_in_flight)
    timings: dict[str, Timing[Any]] = {
        "search": bench.meter.alone(
            lambda: measure_sums(evaluator, genomes, ids, base, KLDivergence(), chunk_tokens=size.chunk_tokens)
        )
    }
    if axis in PROMISED["database", "seconds"]:
        compressor = GPTQ(bits=BITS, group_size=size.group_size)

        def build() -> None:
            settings = BuildSettings(
                root=bench.fresh_folder("growth-database"), method="quant", model_name="growth", recipe={}, propagate="4"
            )
            ensure_database(settings, blocks, ids, compressor)
            shutil.rmtree(settings.root)

        timings["database"] = bench.meter.alone(build)
    shutil.rmtree(folder, ignore_errors=True)
    return timings


def record(bench: Bench, work: str, axis: str, points: Sequence[tuple[int, Timing[Any]]]) -> list[str]:
    """Write an axis' points down, fit their exponents and say how these compare with what is promised.

    One exponent is of all points, one of the last two: at small sizes, costs that do not grow at all weigh most.
    """
    cuda = bench.meter.device.type == "cuda"
    numbers = {
        "seconds": [timing.seconds for _, timing in points],
        "bytes": [float(timing.device_bytes if cuda else timing.working_bytes) for _, timing in points],
    }
    values = [value for value, _ in points]
    fits = {measure: exponent(values, of) for measure, of in numbers.items()}
    ends = {measure: exponent(values[-2:], of[-2:]) for measure, of in numbers.items()}
    for i, (value, _) in enumerate(points):
        row: dict[str, Any] = {"work": work, "axis": axis, "value": value}
        row |= {measure: of[i] for measure, of in numbers.items()}
        row |= {f"{measure}_exponent": fits[measure] for measure in numbers}
        row |= {f"{measure}_at_the_end": ends[measure] for measure in numbers}
        row |= {f"{measure}_promised": PROMISED[work, measure][axis] for measure in numbers}
        bench.growth.append(row)
    said = []
    for measure, fit in fits.items():
        promised = PROMISED[work, measure][axis]
        worse = any(
            max(of) >= _EVEN * min(of) and grown > promised + TOLERANCE
            for grown, of in ((fit, numbers[measure]), (ends[measure], numbers[measure][-2:]))
        )
        verdict = ", WORSE THAN PROMISED" if worse else ""
        said.append(f"{measure} grow with exponent {fit:.2f}, {ends[measure]:.2f} at the end (promised {promised:g}{verdict})")
    return said


def exponent(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Fit y = a x^e and return e; NaN unless all are positive."""
    if len(xs) < 2 or min(ys) <= 0:
        return math.nan
    return float(np.polyfit(np.log(xs), np.log(ys), 1)[0])
