"""The (1 + lambda) evolutionary algorithm with level-switch mutation and multi-step selection, as ask and tell.

Source: paper, Algorithm 1. The search asks for fitnesses and is told them; who evaluates, and how, is not its business.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from evopress.errors import EvoPressError
from evopress.progress import counted
from evopress.search.constraint import EXCHANGES, Deviation
from evopress.search.initial import initial_candidates, uniform_genome
from evopress.search.mutation import DISTRIBUTIONS, LevelSwitch, Mutation, offspring
from evopress.search.neighbour import genomes_from_neighbour
from evopress.search.racing import Race, RaceRules
from evopress.search.record import GenerationRecord, StageRecord
from evopress.search.selection import check_stages, not_finite, select_fittest
from evopress.search.state import check_counts, check_same_search
from evopress.search.strategy import Asks, Problem, Question
from evopress.units import Budget, Genome, Space

_MAX_BOUNDED_ATTEMPTS = 20_000
"""Draws for one offspring where deviations are bounded: at a tight bound few of the switches are allowed."""
_LEAST = {"generations": 0, "num_offspring": 1, "initial_candidates": 1, "initial_tokens": 1, "max_switches": 1}
_MOST_OFFSPRING = 100_000
_MAX_FRUITLESS = 10
"""Generations in a row without one offspring of finite fitness, after which the search stops."""


@dataclass
class SearchSettings:
    """The numbers of a search (paper, Algorithm 1 and Table 8), `search` in the config."""

    generations: int | None = None
    """None: k(n - k) / 1.5, for depth pruning, put in its place once n is known."""
    num_offspring: int = 16
    """λ."""
    survivors: list[int] = field(default_factory=lambda: [1])
    """Per stage of selection; the last is 1."""
    tokens: list[int] = field(default_factory=lambda: [8192])
    """Per stage of selection."""
    initial_candidates: int = 32
    """Random mixes to start from where the target is between two levels."""
    initial_tokens: int = 2048
    """Tokens that choose among them."""
    max_switches: int = 3
    """Greatest number of level switches per offspring."""
    distribution: str = "min_uniform"
    """Of the number of switches: min_uniform or constant (paper B.1)."""
    exchange: str = "size"
    """Which units exchange levels: size, name, any, none or fit (`constraint.EXCHANGES`)."""
    max_level: int | None = None
    """Greatest deviation of a unit from the target's level, in levels; None: any."""
    max_total_deviation: int | None = None
    """Greatest sum of those deviations; None: any."""

    def __post_init__(self) -> None:
        for key, least in _LEAST.items():
            if (value := getattr(self, key)) is not None and value < least:
                raise EvoPressError(f"search.{key}={value} is out of range: expected at least {least}")
        if self.num_offspring > _MOST_OFFSPRING:
            raise EvoPressError(f"search.num_offspring={self.num_offspring} is out of range: expected at most {_MOST_OFFSPRING}")
        check_stages(self.tokens, self.survivors, self.num_offspring)
        for key, known in (("exchange", EXCHANGES), ("distribution", DISTRIBUTIONS)):
            if (value := getattr(self, key)) not in known:
                raise EvoPressError(f"search.{key}={value} is unknown: choose one of {', '.join(known)}")
        for key, least in (("max_level", 1), ("max_total_deviation", 2)):
            if (value := getattr(self, key)) is not None and value < least:
                raise EvoPressError(
                    f"search.{key}={value} allows no mutation, since a level switch moves two units: expected at least {least}, or "
                    "null for any"
                )

    def identity(self) -> dict[str, Any]:
        """Return what makes two searches the same one, as it reads back from JSON; the number of generations may differ."""
        numbers = {key: value for key, value in asdict(self).items() if key not in ("generations", "survivors", "tokens")}
        return numbers | {"stages": [list(stage) for stage in zip(self.tokens, self.survivors, strict=True)]}

    @property
    def num_generations(self) -> int:
        """See `Searching`."""
        assert self.generations is not None, "what None stands for is put in its place before the search begins"
        return self.generations

    @property
    def strategy(self) -> str:
        """See `Searching`."""
        return "evolution"

    @property
    def summary(self) -> str:
        """See `Searching`."""
        return f"{counted(self.num_generations, 'generation')}, λ = {self.num_offspring}"

    def asks(self, state: Mapping[str, Any] | None = None) -> list[Asks]:
        """See `Searching`."""
        done = 0 if state is None else int(state["generation"])
        left = max(self.num_generations - max(done, 1) + 1, 0)
        asks = [] if done else [Asks("search.initial_tokens", self.initial_tokens, self.initial_candidates, initial=True)]
        stages = zip(self.tokens, self.candidates(self.num_offspring), strict=True)
        return asks + [Asks("search.tokens", tokens, candidates, times=left) for tokens, candidates in stages]

    def candidates(self, num_offspring: int) -> list[int]:
        """Return how many candidates each stage has in a generation of so many offspring; the parent joins the last."""
        candidates = [num_offspring, *self.survivors[:-1]]
        candidates[-1] += 1
        return candidates

    def make(self, problem: Problem) -> Evolution:
        """See `Searching`."""
        return Evolution(
            problem.space,
            problem.budget,
            self,
            rng_initial=problem.rng_initial,
            rng_mutation=problem.rng_mutation,
            starts=(*problem.starts, *genomes_from_neighbour(problem)),
        )


@dataclass
class EvolutionStrategy:
    """The paper's Algorithm 1; its numbers are those of `search` itself.

    Beyond the paper's text initial candidates, and offspring of a generation, differ from each other, and these from their parent.
    """

    name: str = "evolution"

    def searching(self, evolution: SearchSettings) -> SearchSettings:
        """See `StrategySettings`."""
        if evolution.generations is None:
            raise EvoPressError(
                "search.generations is null, which only depth pruning derives: give a number, such as search.generations=50"
            )
        return evolution


class Evolution:
    """The state of a search, between `ask` and `tell`.

    Args:
        space: units and levels.
        budget: the cost that no genome exceeds.
        settings: the numbers of the search.
        rng_initial: draws the initial candidates and nothing else.
        rng_mutation: draws the offspring and nothing else.
        mutation: makes an offspring; by default the `LevelSwitch` that the settings describe.
        starts: genomes within the budget that join the initial candidates, such as a baseline's (not in the paper).
        parent: a genome within the budget to go on from: generation 0 is left out (not in the paper).
        race: how candidates race for as many tokens as the stages take; None: they are selected in stages, as in the paper.

    Raises: EvoPressError if the budget cannot be met or a setting is out of range.
    """

    def __init__(
        self,
        space: Space,
        budget: Budget,
        settings: SearchSettings,
        *,
        rng_initial: np.random.Generator,
        rng_mutation: np.random.Generator,
        mutation: Mutation | None = None,
        starts: Sequence[Genome] = (),
        parent: Genome | None = None,
        race: RaceRules | None = None,
    ) -> None:
        budget.check(space)
        self._space, self._budget, self._settings = space, budget, settings
        self._rng_initial, self._rng_mutation = rng_initial, rng_mutation
        bounds = self._bounds()
        self._mutation = mutation or LevelSwitch(
            space,
            budget,
            exchange=settings.exchange,
            max_switches=settings.max_switches,
            distribution=settings.distribution,
            max_attempts=100 if bounds is None else _MAX_BOUNDED_ATTEMPTS,
            allowed=bounds,
        )
        self._generation = 0  # the one that is asked about next
        self._parent: Genome | None = None
        self._tokens = self._evaluations = 0
        self._non_finite = 0  # candidates so far
        self._lost = 0  # those of this generation
        self._fruitless = 0  # generations in a row that lost all their offspring
        self._question: Question | None = None
        self._stages: list[StageRecord] = []
        self._rules = race
        self._race: Race | None = None
        self.initial_record: GenerationRecord | None = None
        """The record of generation 0 where it needs no evaluation because the target is a level."""
        self._starts = tuple(space.check(genome) for genome in starts)
        for genome in self._starts:
            if space.cost(genome) > budget.total:
                raise EvoPressError(
                    f"a genome to start from costs {space.cost(genome)}, more than the budget {budget.total}: leave it out"
                )
            if not budget.met_by(space, genome):
                limits = ", ".join(map(str, budget.limits))
                raise EvoPressError(f"a genome to start from exceeds further limits of the budget ({limits}): leave it out")
        if parent is not None:
            self._finish(parent, fitness=None, accepted=False, parent_fitness=None)
        elif (uniform := uniform_genome(space, budget)) is not None and not self._starts:
            self.initial_record = self._finish(uniform, fitness=None, accepted=False, parent_fitness=None)

    @property
    def finished(self) -> bool:
        """Tell whether all generations are done."""
        return self._generation > self._settings.num_generations

    @property
    def generation(self) -> int:
        """Number of the generation that is asked about next; 0 is the choice of the initial genome."""
        return self._generation

    @property
    def parent(self) -> Genome:
        """The best genome so far; there is one once generation 0 is finished."""
        assert self._parent is not None, "generation 0 is not finished"
        return self._parent

    @property
    def non_finite(self) -> int:
        """Candidates so far that lost because their fitness was not a finite number."""
        return self._non_finite

    def stuck(self) -> EvoPressError | None:
        """Return why the parent has no offspring in the next generation; None: it has. What is drawn later stays as it is."""
        try:
            offspring(self._mutation, self.parent, self._settings.num_offspring, copy.deepcopy(self._rng_mutation))
        except EvoPressError as error:
            return error
        return None

    def ask(self) -> Question:
        """Return the genomes to evaluate next; the same question until it is answered by `tell`."""
        assert not self.finished, "the search is finished"
        if self._question is None:
            settings = self._settings
            if self._parent is None:
                mixes = initial_candidates(
                    self._space, self._budget, num_candidates=settings.initial_candidates, rng=self._rng_initial
                )
                self._question = Question((*mixes, *self._starts), settings.initial_tokens, stage=-1)
            else:
                children = offspring(self._mutation, self._parent, settings.num_offspring, self._rng_mutation)
                if self._rules is None:
                    self._question = self._stage_question(0, children)
                else:
                    tokens = int(np.dot(settings.tokens, settings.candidates(len(children))))
                    self._race = Race((self._parent, *children), tokens=tokens, rules=self._rules)
                    self._question = self._race.ask()
        return self._question

    def tell(self, fitnesses: Sequence[float]) -> GenerationRecord | None:
        """Take the fitnesses of the genomes asked for, in their order; return the record when they finish a generation.

        A candidate whose fitness is not finite loses: it does not go on, whatever the number of survivors. Where no offspring is
        left, the parent goes through the remaining stages alone and stays.

        Raises: EvoPressError if their number is wrong, no candidate's fitness is finite, the parent's included, or too many
            generations in a row have lost all their offspring.
        """
        assert self._question is not None, "tell answers ask"
        if self._race is not None:
            return self._tell_race(self._race, fitnesses)
        genomes, tokens, stage = self._question.genomes, self._question.tokens, self._question.stage
        values = self._question.numbers(fitnesses)
        survivors = select_fittest(genomes, values, 1 if stage < 0 else self._settings.survivors[stage])
        best = survivors[0]
        survivors = [index for index in survivors if math.isfinite(values[index])]
        with_parent = self._parent in genomes  # in the last stage, and where it is alone
        if not survivors and (with_parent or stage < 0):
            raise not_finite(values[best], len(genomes), f"in generation {self._generation} on {tokens} tokens")
        self._tokens += tokens * len(genomes)
        self._evaluations += len(genomes)
        self._stages.append(StageRecord(tokens, len(genomes), values, tuple(survivors)))
        lost = len(values) - sum(map(math.isfinite, values))
        self._lost, self._non_finite = self._lost + lost, self._non_finite + lost
        if 0 <= stage < len(self._settings.tokens) - 1:
            self._question = self._stage_question(stage + 1, [genomes[i] for i in survivors])
            return None
        first = stage < 0
        self._count_fruitless(any(g != self._parent and math.isfinite(v) for g, v in zip(genomes, values, strict=True)))
        return self._finish(
            genomes[best],
            fitness=values[best],
            accepted=not first and best != 0,
            parent_fitness=None if first else values[0],
        )

    def _tell_race(self, race: Race, fitnesses: Sequence[float]) -> GenerationRecord | None:
        """Take the fitnesses of a race's minibatch; return the record when it is over."""
        race.tell(fitnesses)
        if not race.finished:
            self._question = race.ask()
            return None
        self._tokens += race.tokens
        self._evaluations += race.evaluations
        self._lost, self._non_finite = self._lost + race.lost, self._non_finite + race.lost
        self._stages.append(race.record())
        self._count_fruitless(any(map(math.isfinite, race.means[1:])))
        winner, self._race = race.winner, None
        return self._finish(race.genomes[winner], fitness=race.means[winner], accepted=winner != 0, parent_fitness=race.means[0])

    def state(self) -> dict[str, Any]:
        """Return, between generations, all that `restore` needs to go on, as JSON-able values."""
        assert self._question is None, "the state is taken between generations"
        return {
            "schema": 1,
            "settings": self._identity(),
            "generation": self._generation,
            "parent": None if self._parent is None else list(self._parent),
            "tokens": self._tokens,
            "evaluations": self._evaluations,
            "non_finite": self._non_finite,
            "fruitless": self._fruitless,
            "rng_initial": self._rng_initial.bit_generator.state,
            "rng_mutation": self._rng_mutation.bit_generator.state,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state of the same search; the number of generations alone may differ.

        Both generators are set to where they were; a question that is open is dropped.
        Raises: EvoPressError if the state is of another search; ValueError or another error of Python's if it is damaged.
        """
        if state.get("schema") != 1:
            raise EvoPressError(
                f"the saved search has schema {state.get('schema')!r:.100}, this version reads schema 1: start a new run"
            )
        here = self._identity()
        check_same_search(dict.fromkeys(here) | state["settings"], here)
        check_counts(state, ("generation", "tokens", "evaluations", "non_finite", "fruitless"))
        self._parent = None if state["parent"] is None else self._space.check(state["parent"])
        if (self._parent is None) != (state["generation"] == 0):
            raise ValueError("it has a parent before generation 0, or none after it")
        if self._parent is not None and not self._budget.met_by(self._space, self._parent):
            raise ValueError("its parent is not within the budget")
        self._generation, self._tokens, self._evaluations = state["generation"], state["tokens"], state["evaluations"]
        self._non_finite, self._fruitless = state.get("non_finite", 0), state.get("fruitless", 0)  # older states have none
        self._rng_initial.bit_generator.state = state["rng_initial"]
        self._rng_mutation.bit_generator.state = state["rng_mutation"]
        self._question, self._stages, self._lost, self.initial_record, self._race = None, [], 0, None, None

    def _bounds(self) -> Deviation | None:
        """Return the bound on deviations from the uniform genome that the settings ask for."""
        max_level, max_total = self._settings.max_level, self._settings.max_total_deviation
        if max_level is None and max_total is None:
            return None
        centre = uniform_genome(self._space, self._budget)
        if centre is None:
            raise EvoPressError(
                f"search.max_level={max_level} and search.max_total_deviation={max_total} count levels from the target, but "
                f"target {self._budget.target:g} {self._budget.measure} is not a level that all units have: "
                "leave them null or choose such a target"
            )
        return Deviation(centre, max_level=max_level, max_total=max_total)

    def _stage_question(self, stage: int, candidates: Sequence[Genome]) -> Question:
        # The authors' code adds the parent by survivor count; Algorithm 1 adds it in the last stage. In front, it wins ties.
        last = stage == len(self._settings.tokens) - 1
        others = tuple(candidate for candidate in candidates if candidate != self.parent)
        genomes = (self.parent, *others) if last or not others else others
        return Question(genomes, self._settings.tokens[stage], stage)

    def _finish(self, winner: Genome, *, fitness: float | None, accepted: bool, parent_fitness: float | None) -> GenerationRecord:
        """Make the winner the parent, close the generation and return its record."""
        before = winner if self._parent is None else self._parent
        record = GenerationRecord(
            generation=self._generation,
            genome=winner,
            fitness=fitness,
            accepted=accepted,
            parent_fitness=parent_fitness,
            stages=tuple(self._stages),
            switches=tuple((i, a, b) for i, (a, b) in enumerate(zip(before, winner, strict=True)) if a != b),
            tokens=self._tokens,
            evaluations=self._evaluations,
            cost=self._space.cost(winner),
            non_finite=self._lost,
        )
        self._parent, self._question, self._stages, self._lost = winner, None, [], 0
        self._generation += 1
        return record

    def _count_fruitless(self, fruitful: bool) -> None:
        """Count the generations in a row that lost all their offspring; raise EvoPressError if they are too many."""
        self._fruitless = 0 if fruitful else self._fruitless + 1
        if self._fruitless >= _MAX_FRUITLESS:
            raise EvoPressError(
                f"no offspring kept a finite fitness to the last stage in {self._fruitless} generations (to {self._generation}, "
                f"{self._settings.num_offspring} offspring each): look at the model's outputs at these levels (overflow in half "
                "precision, a damaged level), use model.dtype=bfloat16, or raise the target"
            )

    def _identity(self) -> dict[str, Any]:
        """Return what makes two searches the same one, as it reads back from JSON."""
        return self._settings.identity() | {"budget": self._budget.total, "units": len(self._space)}
