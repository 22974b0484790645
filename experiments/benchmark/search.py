"""Part d: one generation of each row of Table 8, the population together against one candidate at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
from torch import Tensor

from evopress.data.minibatch import draw
from evopress.errors import EvoPressError
from evopress.fitness.measures import KLDivergence
from evopress.fitness.minibatch import MinibatchFitness, base_states
from evopress.fitness.plain import PlainEvaluator
from evopress.fitness.population import Evaluator, PopulationEvaluator
from evopress.search.evolution import Evolution, SearchSettings
from evopress.search.record import GenerationRecord
from evopress.search.strategy import Fitness
from experiments.benchmark.levels import Searched, searched
from experiments.benchmark.plain import StoredLogits
from experiments.benchmark.rows import Bench, Row, compared
from experiments.benchmark.sizes import ROWS, Size, table8
from experiments.benchmark.subject import Subject
from experiments.benchmark.work import Question, search_work

EVALUATORS: dict[str, Callable[..., Evaluator]] = {"population": PopulationEvaluator, "plain": PlainEvaluator}


@dataclass(frozen=True)
class Outcome:
    """What some generations did."""

    records: tuple[GenerationRecord, ...]
    questions: tuple[Question, ...]

    @property
    def tokens(self) -> int:
        """Candidate tokens that were evaluated."""
        return sum(stage.tokens * stage.num_candidates for record in self.records for stage in record.stages)

    def same_winners(self, other: Outcome) -> bool:
        """Tell whether the same candidates went on at every stage."""
        return all(
            mine.genome == its.genome and [s.survivors for s in mine.stages] == [s.survivors for s in its.stages]
            for mine, its in zip(self.records, other.records, strict=True)
        )

    def fitness_difference(self, other: Outcome) -> float:
        """Return the largest relative difference of a candidate's fitness, up to where the winners part."""
        worst = 0.0
        for mine, its in zip(self.records, other.records, strict=True):
            for one, two in zip(mine.stages, its.stages, strict=True):
                worst = max([worst, *(abs(a - b) / abs(b) for a, b in zip(one.fitnesses, two.fitnesses, strict=True))])
                if one.survivors != two.survivors:
                    return worst
        return worst


class Searcher:
    """Runs generations of one row of Table 8 from the same start, as often as asked."""

    def __init__(
        self, found: Searched, subject: Subject, size: Size, settings: SearchSettings, *, sequences: Tensor, base: Tensor, seed: int
    ) -> None:
        """Args:
        sequences: search text, int64 [N, L].
        base: the dense model's last hidden states on it, [N, L, d].
        """
        self.found, self.subject, self.size, self.settings = found, subject, size, settings
        self.sequences, self.base, self._seed = sequences, base, seed

    def run(self, evaluator: Evaluator | StoredLogits) -> Outcome:
        """Run the generations; ways that measure the same find equal winners."""
        rng = [np.random.default_rng((self._seed, stream)) for stream in range(3)]
        evolution = Evolution(self.found.live.space, self.found.budget, self.settings, rng_initial=rng[0], rng_mutation=rng[1])
        if evolution.generation == 0:  # a random mix, taken as it comes
            evolution.tell([0.0] * len(evolution.ask().genomes))
        fitness = self._fitness(evaluator, rng[2])
        records: list[GenerationRecord] = []
        questions: list[Question] = []
        while not evolution.finished:
            asked = evolution.ask()
            questions.append(Question(asked.genomes, asked.tokens))
            record = evolution.tell(fitness(asked.genomes, tokens=asked.tokens))
            if record is not None:
                records.append(record)
        return Outcome(tuple(records), tuple(questions))

    def _fitness(self, evaluator: Evaluator | StoredLogits, rng: np.random.Generator) -> Fitness:
        if isinstance(evaluator, StoredLogits):
            return evaluator.fitness(self.sequences, rng)
        return MinibatchFitness(
            evaluator, self.sequences, rng=rng, base=self.base, measure=KLDivergence(), chunk_tokens=self.size.chunk_tokens
        )

    def drawn(self) -> set[int]:
        """Return the rows of the text that the generations draw, whatever wins."""
        rng = np.random.default_rng((self._seed, 2))
        count, length = self.sequences.shape
        asked = self.settings.tokens * self.settings.num_generations
        return {row for tokens in asked for row in draw(count, length, tokens=tokens, rng=rng).indices}


def searcher(bench: Bench, row: str) -> Searcher:
    """Prepare a row of Table 8 at the bench's size."""
    found = searched(ROWS[row], bench.subject, bench.size, bench.scratch)
    return prepare(found, bench.subject, bench.size, table8(row, bench.size), seed=bench.seed, known=bench.text)


def prepare(
    found: Searched,
    subject: Subject,
    size: Size,
    settings: SearchSettings,
    *,
    seed: int,
    known: dict[int, tuple[Tensor, Tensor]] | None = None,
) -> Searcher:
    """Fetch the text and the dense model's hidden states on it.

    Args: known: number of tokens to those that were fetched before, of the same model; added to.
    """
    known = {} if known is None else known
    count = max(size.search_tokens, *settings.tokens)
    count = -(-count // subject.sequence_length) * subject.sequence_length
    if count not in known:
        sequences = subject.tokens("search", count)
        evaluator = PopulationEvaluator(found.live, max_tokens_in_flight=size.max_tokens_in_flight)
        known[count] = sequences, base_states(evaluator, sequences, batch_tokens=size.max_tokens_in_flight)
    sequences, base = known[count]
    return Searcher(found, subject, size, settings, sequences=sequences, base=base, seed=seed)


def generations(bench: Bench) -> Iterator[Row]:
    """Part d: against the plain way, and for some rows against the plain evaluator alone, with our KL and attention."""
    pairs = [(name, "") for name in bench.size.rows] + [(name, ", sharing alone") for name in bench.size.rows_shared]
    for name, only in pairs:
        run = searcher(bench, name)
        made = {
            kind: make(run.found.live, max_tokens_in_flight=bench.size.max_tokens_in_flight) for kind, make in EVALUATORS.items()
        }
        other: Evaluator | StoredLogits = made["plain"]
        if not only:
            other = StoredLogits(run.found.live)
            other.store(run.sequences, run.drawn())
        fast, slow = bench.meter.alternate(partial(run.run, made["population"]), partial(run.run, other))
        outcome = fast.result
        needed = search_work(run.found.live, outcome.questions, sequence_length=run.sequences.shape[1])
        yield compared(
            "d",
            f"{name}{only}",
            fast,
            slow,
            difference=outcome.fitness_difference(slow.result),
            difference_of="a candidate's fitness, relative",
            same="yes" if outcome.same_winners(slow.result) else "no",
            fast_tokens_per_second=outcome.tokens / fast.seconds,
            plain_tokens_per_second=slow.result.tokens / slow.seconds,
            note=describe(run.settings),
        ).needing(needed, bench.rates)


def describe(settings: SearchSettings) -> str:
    """Say what a generation evaluates."""
    tokens = ", ".join(f"{tokens:,}" for tokens in settings.tokens)
    return f"λ = {settings.num_offspring}, survivors {', '.join(map(str, settings.survivors))}, tokens {tokens}"


def memory(bench: Bench) -> Iterator[Row]:
    """Part memory: the peak of a process that does nothing but a search, loading of the model included, per evaluator."""
    name = "super_fast"
    folder = searched(ROWS[name], bench.subject, bench.size, bench.scratch).folder
    found = {kind: _alone(bench, name, kind, str(folder)) for kind in EVALUATORS}
    yield Row(
        part="memory",
        case=f"{name}, a process of its own",
        fast_seconds=found["population"]["seconds"],
        plain_seconds=found["plain"]["seconds"],
        passes=1,
        fast_peak_bytes=found["population"]["peak_rss_bytes"],
        plain_peak_bytes=found["plain"]["peak_rss_bytes"],
        note="one pass each",
    )


def _alone(bench: Bench, row: str, evaluator: str, database: str) -> dict[str, float]:
    """Run a generation in a process of its own and return what it took."""
    command = [sys.executable, "-m", "experiments.benchmark.alone", "--size", bench.size.name, "--row", row]
    command += ["--evaluator", evaluator, "--database", database]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600, check=False, env=os.environ)
    if done.returncode:
        reason = (done.stderr.strip() or "no message").splitlines()[-1]
        raise EvoPressError(f"{' '.join(command[1:])} ended with status {done.returncode}: {reason}")
    answer = json.loads(done.stdout.strip().splitlines()[-1])
    return {key: float(value) for key, value in answer.items()}
