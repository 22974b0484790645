"""The guided search: what each unit holds of the fitness, an integer program on it, a trust region, and evolution from there.

At the current genome g, unit u holds a_u/2 of the KL divergence: a_u is its attribution, the derivative in the scale of the unit's
own error. Its sensitivity, α_u = a_u / (2 e_u(g_u)), is that per unit of the relative error e_u(l), which the level database knows
for every level l. Genomes that minimise Σ α_u e_u(l_u) within the budget, all units free or few of them changed, are then measured
beside g on fresh tokens, and the best is the next g. One attribution costs three times its tokens, whatever the number of units.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from evopress.errors import EvoPressError
from evopress.search.evolution import Evolution, SearchSettings
from evopress.search.initial import random_mixes, uniform_genome
from evopress.search.neighbour import genomes_from_neighbour
from evopress.search.program import best_genome, limits_around
from evopress.search.record import GenerationRecord, StageRecord
from evopress.search.selection import select_fittest
from evopress.search.strategy import BACKWARD_TOKENS, Asks, Attribution, Problem, Question
from evopress.units import Genome, Space

_LEAST = 0.1
"""Least sensitivity of a unit, as a share of its kind's."""
_LEAST_KIND = 1e-3
"""Least sensitivity of a kind whose attributions do not add up to anything, as a share of the model's."""
_LEAST_SPREAD = 0.05
"""Least variance between units of a kind, as a share of what their attributions vary by over sequences."""


@dataclass
class GuidedStrategy:
    """The settings, `search.strategy` in the config."""

    name: str = "guided"
    rounds: int = 5
    """Rounds of attribution, integer program and screen, at most; a round that finds nothing better is the last."""
    attribution_tokens: int = 4096
    """Search tokens that go forward and backward in a round."""
    attribution_sequences: int = 16
    """Sequences that these are divided into, at least: what a unit holds varies over them."""
    screen_tokens: int = 2048
    """Search tokens that a round's proposals and the current genome are measured on."""
    changes: list[int] = field(default_factory=lambda: [80, 40, 20, 10])
    """Beside the free solution, one proposal for each: with at most so many units changed."""
    averaged: int = 3
    """Rounds whose sensitivities are averaged, the latest."""
    generations_after: int = 0
    """Generations of evolution from the genome that the rounds found, by the other numbers of `search`."""

    def searching(self, evolution: SearchSettings) -> GuidedSettings:
        """See `StrategySettings`."""
        for name, least in (
            ("rounds", 0),
            ("attribution_tokens", 4),
            ("attribution_sequences", 2),
            ("screen_tokens", 2),
            ("averaged", 1),
            ("generations_after", 0),
        ):
            value = getattr(self, name)
            if value < least:
                raise EvoPressError(f"search.strategy.{name}={value} is out of range: expected at least {least}")
        if any(most < 1 for most in self.changes):
            raise EvoPressError(
                f"search.strategy.changes={self.changes} is out of range: expected numbers of units, at least 1 each"
            )
        if evolution.max_level is not None or evolution.max_total_deviation is not None:
            raise EvoPressError(
                f"search.max_level={evolution.max_level} and search.max_total_deviation={evolution.max_total_deviation} bound the "
                "mutations of evolution, and the integer program of search/strategy=guided knows no such bounds: leave them null"
            )
        return GuidedSettings(self, replace(evolution, generations=self.generations_after))


@dataclass(frozen=True)
class GuidedSettings:
    """The checked numbers of a guided search, with those of the evolution after it."""

    numbers: GuidedStrategy
    evolution: SearchSettings

    @property
    def strategy(self) -> str:
        """See `Searching`."""
        return self.numbers.name

    @property
    def generations(self) -> int:
        """See `Searching`."""
        return self.numbers.rounds + self.numbers.generations_after

    @property
    def summary(self) -> str:
        """See `Searching`."""
        after = f", then {self.evolution.summary}" if self.numbers.generations_after else ""
        return f"at most {self.numbers.rounds} guided rounds{after}"

    def identity(self) -> dict[str, Any]:
        """See `Searching`: numbers of rounds and generations may differ, since a search can be gone on with."""
        numbers = {key: value for key, value in asdict(self.numbers).items() if key not in ("name", "rounds", "generations_after")}
        return numbers | ({"evolution": self.evolution.identity()} if self.numbers.generations_after else {})

    def asks(self, state: Mapping[str, Any] | None = None) -> list[Asks]:
        """See `Searching`."""
        numbers, times, later = self.numbers, self.numbers.rounds, None
        if state is not None:
            later = state["evolution"]
            times = 0 if state["settled"] or later else max(numbers.rounds - int(state["generation"]) + 1, 0)
        asks = [
            Asks("search.strategy.attribution_tokens", numbers.attribution_tokens, times=times, attribution=True, milestone=True),
            Asks("search.strategy.screen_tokens", numbers.screen_tokens, 2 + len(numbers.changes), times=times, milestone=True),
        ]
        if numbers.generations_after:
            asks += self.evolution.asks(later or {"generation": 1})
        return asks

    def make(self, problem: Problem) -> Guided:
        """See `Searching`."""
        return Guided(problem, self)


class Guided:
    """The state of a guided search, between `ask` and `tell`; one round is one generation.

    Raises: EvoPressError if the budget cannot be met, or a unit has no error at one of its levels.
    """

    def __init__(self, problem: Problem, settings: GuidedSettings) -> None:
        problem.budget.check(problem.space)
        _check_errors(problem.space, problem.errors)
        self._problem, self._settings, self._numbers = problem, settings, settings.numbers
        self._errors = [np.asarray(errors, dtype=np.float64) for errors in problem.errors]
        self._generation = 0  # the one that is asked about next, as long as there is no evolution
        self._parent: Genome | None = None
        self._settled = False  # the last round found nothing better
        self._tokens = self._evaluations = self._non_finite = 0
        self._sensitivities: list[list[float]] = []  # of the last rounds, the latest last
        self._question: Question | Attribution | None = None
        self._details: dict[str, Any] = {}  # of the round so far
        self._limits: dict[Genome, Any] = {}  # around the last genome
        self._evolution: Evolution | None = None
        self.initial_record: GenerationRecord | None = None
        """The record of generation 0, where nothing was given to choose from."""
        own = (*self._own_starts(), *self._from_neighbour())
        self._candidates = tuple(dict.fromkeys((*own, *(problem.space.check(genome) for genome in problem.starts))))
        for genome in self._candidates:
            if not problem.budget.met_by(problem.space, genome):
                raise EvoPressError(
                    f"a genome to start from costs {problem.space.cost(genome)} and does not keep the budget of "
                    f"{problem.budget.total}: leave it out"
                )
        if len(self._candidates) == 1:
            self.initial_record = self._finish(self._candidates[0])

    @property
    def finished(self) -> bool:
        """Tell whether the rounds are over, and the evolution after them."""
        return (
            self._evolution.finished if self._evolution is not None else self._rounds_over and not self._numbers.generations_after
        )

    @property
    def generation(self) -> int:
        """Number of the generation that is asked about next: a round, or one of evolution; 0 chooses the initial genome."""
        return self._generation if self._evolution is None else self._generation + self._evolution.generation - 1

    @property
    def parent(self) -> Genome:
        """The best genome so far."""
        assert self._parent is not None, "generation 0 is not finished"
        return self._parent if self._evolution is None else self._evolution.parent

    @property
    def non_finite(self) -> int:
        """Candidates so far that lost because their fitness was not a finite number."""
        return self._non_finite + (0 if self._evolution is None else self._evolution.non_finite)

    def ask(self) -> Question | Attribution:
        """Return what to find out next: what the genome's units hold, the fitness of proposals, or what evolution asks."""
        assert not self.finished, "the search is finished"
        if self._evolution is not None:
            return self._evolution.ask()
        if self._question is None:
            numbers = self._numbers
            if self._parent is None:
                self._question = Question(self._candidates, numbers.screen_tokens, stage=-1)
            else:
                self._question = Attribution(self._parent, numbers.attribution_tokens, numbers.attribution_sequences)
        return self._question

    def tell(self, answer: Any) -> GenerationRecord | None:
        """Take the answer; return the record when it finishes a round or a generation.

        Raises: EvoPressError if the answer has not the numbers that were asked for, or none of them is finite.
        """
        if self._evolution is not None:
            record = self._evolution.tell(answer)
            return None if record is None else self._renumbered(record)
        assert self._question is not None, "tell answers ask"
        if isinstance(self._question, Attribution):
            return self._propose(answer)
        return self._choose(self._question, answer)

    def state(self) -> dict[str, Any]:
        """Return, between generations, all that `restore` needs to go on, as JSON-able values."""
        assert self._question is None, "the state is taken between generations"
        return {
            "schema": 1,
            "settings": self._identity(),
            "generation": self.generation,
            "parent": None if self._parent is None else list(self.parent),
            "rounds": self._generation - 1,
            "found": None if self._parent is None else list(self._parent),
            "settled": self._settled,
            "tokens": self._tokens,
            "evaluations": self._evaluations,
            "non_finite": self._non_finite,
            "sensitivities": self._sensitivities,
            "evolution": None if self._evolution is None else self._evolution.state(),
            "rng_initial": self._problem.rng_initial.bit_generator.state,
            "rng_mutation": self._problem.rng_mutation.bit_generator.state,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state of the same search; the numbers of rounds and of generations alone may differ.

        Raises: EvoPressError if the state is of another search; ValueError or another error of Python's if it is damaged.
        """
        saved, here = state["settings"], self._identity()
        changed = [
            f"{key} {saved[key]!r:.100} there, {here[key]!r} here" for key in here if key in saved and saved[key] != here[key]
        ]
        if changed:
            raise EvoPressError(
                f"the saved search had other settings ({'; '.join(changed)}): resume it with its own, or start a new run"
            )
        for key in ("rounds", "tokens", "evaluations", "non_finite"):
            if type(state[key]) is not int or state[key] < 0:
                raise ValueError(f"its {key} is {state[key]!r:.100}, expected a whole number")
        problem = self._problem
        self._parent = problem.space.check(state["found"])
        if not problem.budget.met_by(problem.space, self._parent):
            raise ValueError("its genome is not within the budget")
        sensitivities = np.asarray(state["sensitivities"], dtype=np.float64).reshape(-1, len(problem.space))
        if not bool(np.isfinite(sensitivities).all()) or not bool((sensitivities > 0).all()):
            raise ValueError("its sensitivities are not all positive numbers")
        self._sensitivities = sensitivities.tolist()
        self._generation, self._settled = state["rounds"] + 1, bool(state["settled"])
        self._tokens, self._evaluations, self._non_finite = state["tokens"], state["evaluations"], state["non_finite"]
        self._question, self._details, self.initial_record, self._evolution = None, {}, None, None
        problem.rng_initial.bit_generator.state = state["rng_initial"]
        problem.rng_mutation.bit_generator.state = state["rng_mutation"]
        if state["evolution"] is not None:
            self._evolution = self._evolution_from(self._parent)
            self._evolution.restore(state["evolution"])
        else:
            self._evolve_if_over()
        if self.generation != state["generation"]:
            raise ValueError(f"its generation is {state['generation']!r:.100}, by its rounds it is {self.generation}")

    def _own_starts(self) -> list[Genome]:
        """Return the uniform genome where the target is a level, else the one with the least sum of errors.

        Where that would have to drop modules, of which no error tells, random mixes are chosen from as evolution does.
        """
        space, budget = self._problem.space, self._problem.budget
        if (uniform := uniform_genome(space, budget)) is not None:
            return [uniform]
        whole = tuple(0 if _drops(space, unit) else len(of_unit.levels) - 1 for unit, of_unit in enumerate(space.units))
        genome = self._best(whole, self._errors)
        if genome is not None and budget.met_by(space, genome):
            return [genome]
        count = self._settings.evolution.initial_candidates
        return random_mixes(space, budget, num_candidates=count, rng=self._problem.rng_initial)

    def _from_neighbour(self) -> list[Genome]:
        """Return genomes made of what was found at another budget, and take over the mean of the sensitivities found there.

        They are the neighbour's, moved to this budget, and the best by those sensitivities; without any, the errors stand for them.
        """
        neighbour = self._problem.neighbour
        if neighbour is None:
            return []
        found = np.asarray(neighbour.state.get("sensitivities", ()), dtype=np.float64).reshape(-1, len(self._problem.space))
        values = self._errors
        if len(found):
            learnt = np.exp(np.log(found).mean(axis=0))
            self._sensitivities = [learnt.tolist()]
            values = [weight * of_unit for weight, of_unit in zip(learnt, self._errors, strict=True)]
        genomes = list(genomes_from_neighbour(self._problem, [of_unit.tolist() for of_unit in values]))
        free = self._best(self._problem.space.check(neighbour.genome), values)
        return [*genomes, *([] if free is None or not self._problem.budget.met_by(self._problem.space, free) else [free])]

    def _best(self, around: Genome, values: Sequence[np.ndarray], most_changes: int | None = None) -> Genome | None:
        """Return the genome with the least sum of values that a genome can become by changes of weights; modules stay."""
        space, budget = self._problem.space, self._problem.budget
        free = _free(space, around)
        if around not in self._limits:
            self._limits = {around: limits_around(space, budget, around, free)}
        found = best_genome(
            self._limits[around],
            [values[unit].tolist() for unit in free],
            near=tuple(around[unit] for unit in free),
            most_changes=most_changes,
        )
        if found is None:
            return None
        levels = dict(zip(free, found, strict=True))
        return tuple(levels.get(unit, level) for unit, level in enumerate(around))

    def _propose(self, answer: Any) -> GenerationRecord | None:
        """Turn attributions into proposals, and ask for their fitness; where there are none, the round is over."""
        problem, parent, question = self._problem, self.parent, self._question
        assert isinstance(question, Attribution)
        held = np.asarray(answer, dtype=np.float64)
        if held.ndim != 2 or held.shape[1] != len(problem.space) or len(held) < 2 or not bool(np.isfinite(held).all()):
            raise EvoPressError(
                f"the attribution returned {'x'.join(map(str, held.shape))} numbers for at least 2 sequences of "
                f"{len(problem.space)} units, or some that are not finite: look at the model's outputs at these levels, or use "
                "search/strategy=evolution"
            )
        self._tokens += BACKWARD_TOKENS * question.tokens
        self._evaluations += 1
        errors = np.array([of_unit[level] for of_unit, level in zip(self._errors, parent, strict=True)])
        errors[[unit for unit in range(len(problem.space)) if unit not in _free(problem.space, parent)]] = 0.0  # hold nothing
        latest = sensitivities(held, errors, [unit.kind for unit in problem.space.units])
        self._sensitivities = [*self._sensitivities, latest.tolist()][-self._numbers.averaged :]
        averaged = np.exp(np.log(self._sensitivities).mean(axis=0))
        values = [weight * of_unit for weight, of_unit in zip(averaged, self._errors, strict=True)]
        proposals = self._proposals(parent, values)

        def expected(genome: Genome) -> float:
            return float(sum(of_unit[level] for of_unit, level in zip(values, genome, strict=True)))

        self._details = {
            "held": [round(float(value) / 2, 9) for value in held.mean(axis=0)],
            "proposals": [
                {
                    "most_changes": most,
                    "changes": sum(a != b for a, b in zip(genome, parent, strict=True)),
                    "expected": round(expected(genome) - expected(parent), 9),
                }
                for genome, most in proposals.items()
            ],
        }
        if not proposals:
            return self._finish(parent)
        self._question = Question((parent, *proposals), self._numbers.screen_tokens)
        return None

    def _proposals(self, parent: Genome, values: Sequence[np.ndarray]) -> dict[Genome, int | None]:
        """Return the genomes that are best by the sensitivities, each with the number of changes that was allowed; None: any."""
        space, budget = self._problem.space, self._problem.budget
        found: dict[Genome, int | None] = {}
        for most in (None, *self._numbers.changes):
            genome = self._best(parent, values, most)
            if genome is not None and genome != parent and budget.met_by(space, genome):
                found.setdefault(genome, most)
        return found

    def _choose(self, question: Question, answer: Sequence[float]) -> GenerationRecord:
        """Take the fitnesses of the genomes that were asked for, the current one's first, and finish the round."""
        genomes, tokens = question.genomes, question.tokens
        if len(answer) != len(genomes):
            raise EvoPressError(f"the fitness returned {len(answer)} numbers for {len(genomes)} genomes: one for each")
        values = tuple(float(value) for value in answer)
        best = select_fittest(genomes, values, 1)[0]
        if not math.isfinite(values[best]):
            raise EvoPressError(
                f"the best fitness of the {len(genomes)} candidates in generation {self._generation} on {tokens} tokens is "
                f"{values[best]}, not a finite number: look at the model's outputs at these levels (overflow in half precision, a "
                "damaged level) or raise the target"
            )
        lost = sum(not math.isfinite(value) for value in values)
        self._tokens += tokens * len(genomes)
        self._evaluations += len(genomes)
        self._non_finite += lost
        first = self._parent is None
        return self._finish(
            genomes[best],
            fitness=values[best],
            accepted=not first and best != 0,
            parent_fitness=None if first else values[0],
            stages=(StageRecord(tokens, len(genomes), values, (best,)),),
            non_finite=lost,
        )

    def _finish(self, winner: Genome, **record: Any) -> GenerationRecord:
        """Make the winner the parent, close the round and return its record."""
        before = winner if self._parent is None else self._parent
        finished = GenerationRecord(
            **{"fitness": None, "accepted": False, "parent_fitness": None, **record},
            generation=self._generation,
            genome=winner,
            switches=tuple((i, a, b) for i, (a, b) in enumerate(zip(before, winner, strict=True)) if a != b),
            tokens=self._tokens,
            evaluations=self._evaluations,
            cost=self._problem.space.cost(winner),
            details=self._details,
            milestone=True,
        )
        self._settled = self._generation > 0 and not finished.accepted
        self._parent, self._question, self._details = winner, None, {}
        self._generation += 1
        self._evolve_if_over()
        return finished

    @property
    def _rounds_over(self) -> bool:
        return self._settled or self._generation > self._numbers.rounds

    def _evolve_if_over(self) -> None:
        """Begin the evolution once the rounds are over, where one was asked for."""
        if self._rounds_over and self._numbers.generations_after and self._parent is not None:
            self._evolution = self._evolution_from(self._parent)

    def _evolution_from(self, genome: Genome) -> Evolution:
        problem = self._problem
        return Evolution(
            problem.space,
            problem.budget,
            self._settings.evolution,
            rng_initial=problem.rng_initial,
            rng_mutation=problem.rng_mutation,
            parent=genome,
        )

    def _renumbered(self, record: GenerationRecord) -> GenerationRecord:
        """Return a record of the evolution as one of the whole search."""
        return replace(
            record,
            generation=self._generation - 1 + record.generation,
            tokens=self._tokens + record.tokens,
            evaluations=self._evaluations + record.evaluations,
        )

    def _identity(self) -> dict[str, Any]:
        return self._settings.identity() | {"budget": self._problem.budget.total, "units": len(self._problem.space)}


def sensitivities(held: np.ndarray, errors: np.ndarray, kinds: Sequence[str]) -> np.ndarray:
    """Return α_u, the fitness per unit of relative error: each unit's own drawn towards its kind's, positive.

    The ratio r_u of a unit's sensitivity to its kind's has a standard error over sequences; it is shrunk to 1 by empirical Bayes,
    the variance of r between units of the kind being what they differ by beyond those errors.

    Args:
        held: attributions [sequences, units], at least 2 sequences.
        errors: e_u at the genome that they are of, [units], not negative; a unit without error says nothing and gets its kind's.
        kinds: of every unit.
    """
    means, variances = held.mean(axis=0), held.var(axis=0, ddof=1) / len(held)
    known = errors > 0
    overall = means[known].sum() / errors[known].sum() if known.any() else 0.0
    overall = overall if overall > 0 else 1.0
    found = np.full(len(kinds), overall)
    for kind in dict.fromkeys(kinds):
        of_kind = np.array([each == kind for each in kinds])
        used = of_kind & known
        if not used.any():
            continue
        of_all = max(means[used].sum() / errors[used].sum(), _LEAST_KIND * overall)
        scale = of_all * errors[used]
        ratios, noise = means[used] / scale, variances[used] / scale**2
        between = max(float(np.mean((ratios - 1) ** 2 - noise)), _LEAST_SPREAD * float(np.mean(noise)))
        weight = np.divide(between, between + noise, out=np.ones_like(noise), where=between + noise > 0)
        found[of_kind] = of_all
        found[used] = of_all * np.maximum(1 + weight * (ratios - 1), _LEAST)
    return found / 2


def _drops(space: Space, unit: int) -> bool:
    return any(level.drops for level in space.units[unit].levels)


def _free(space: Space, genome: Genome) -> list[int]:
    """Return the units that errors tell about: weights that are there; a module stays, and what lies in a dropped one."""
    return [unit for unit in range(len(space)) if not _drops(space, unit) and not space.is_gone(genome, unit)]


def _check_errors(space: Space, errors: Sequence[Sequence[float]]) -> None:
    """Raise EvoPressError unless every level has an error."""
    if len(errors) != len(space):
        raise EvoPressError(
            f"there are errors of {len(errors)} units but {len(space)} units, and search/strategy=guided needs them all: use "
            "search/strategy=evolution, or build the level database again"
        )
    for unit, values in zip(space.units, errors, strict=True):
        if len(values) != len(unit.levels) or not all(math.isfinite(value) and value >= 0 for value in values):
            raise EvoPressError(
                f"the errors of {unit.name} are {list(values)}, and search/strategy=guided needs {len(unit.levels)} finite ones: "
                "use search/strategy=evolution, or build the level database again"
            )
