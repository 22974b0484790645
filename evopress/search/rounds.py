"""The guided search: what each unit holds of the fitness, an integer program on it, a trust region, and evolution from there.

At the current genome g, unit u holds a_u/2 of the KL divergence: a_u is its attribution, the derivative in the scale of the unit's
own error. Its sensitivity, α_u = a_u / (2 e_u(g_u)), is that per unit of the relative error e_u(l), which the level database knows
for every level l. Genomes that minimise Σ α_u e_u(l_u) within the budget, all units free or few of them changed, are then measured
beside g on fresh tokens, and the best is the next g. One attribution costs three times its tokens, whatever the number of units.

Then there may be rounds of second order: an expansion at g says what moving each unit alone to each of its levels changes.

A module that can be dropped has the error 1 where it is dropped: all that it adds is gone. Its attribution says what dropping adds
to the fitness from where g is. Beside weights, that is counted from the dense ones: dropping also takes away what they hold.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from evopress.errors import EvoPressError
from evopress.search.approach import Approach
from evopress.search.deltas import Deltas
from evopress.search.evolution import Evolution
from evopress.search.initial import random_mixes, uniform_genome
from evopress.search.level_values import LevelValues
from evopress.search.mutation import LevelSwitch, Mutation
from evopress.search.neighbour import genomes_from_neighbour
from evopress.search.predicted import EitherMutation, PredictedSwitch
from evopress.search.program import best_in
from evopress.search.racing import Race
from evopress.search.record import GenerationRecord, StageRecord
from evopress.search.selection import not_finite, select_fittest
from evopress.search.sensitivity import Expected
from evopress.search.state import check_counts, check_same_search
from evopress.search.strategy import Attribution, Expansion, Problem, Question, backward_tokens
from evopress.units import Genome, is_module

if TYPE_CHECKING:
    from evopress.search.guided_settings import GuidedSettings

logger = logging.getLogger(__name__)
_UNITS = 210
"""Units of the model that `changes` was measured on."""


class Guided:
    """The state of a guided search, between `ask` and `tell`; one round is one generation.

    Raises: EvoPressError if the budget cannot be met, or a unit has no error at one of its levels.
    """

    def __init__(self, problem: Problem, settings: GuidedSettings) -> None:
        problem.budget.check(problem.space)
        self._problem, self._settings, self._numbers = problem, settings, settings.numbers
        self._values = LevelValues(problem.space, problem.errors, averaged=self._numbers.averaged)
        self._all_modules = all(is_module(unit) for unit in problem.space.units)
        self._backward = backward_tokens(any(self._values.droppable))
        self._generation = 0  # the one that is asked about next, as long as there is no evolution
        self._parent: Genome | None = None
        self._schedule = self._numbers.schedule()
        if any(self._values.droppable):
            self._schedule.expansions.most = 0
        self._tokens = self._evaluations = self._non_finite = 0
        self._question: Question | Attribution | None = None
        self._details: dict[str, Any] = {}  # of the round so far
        self._evolution: Evolution | None = None
        self._race: Race | None = None
        self._deltas: Deltas | None = None
        self._approach: Approach | None = None  # the way to the first genome
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
        if len(self._candidates) == 1 and self._approach is None:
            self.initial_record = self._finish(self._candidates[0])

    @property
    def finished(self) -> bool:
        """Tell whether the rounds are over, and the evolution after them."""
        if self._evolution is not None:
            return self._evolution.finished
        return self._rounds_over

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
            self._question = self._next()
        return self._question

    def _next(self) -> Question | Attribution:
        numbers = self._numbers
        if self._race is not None:
            return self._race.ask()
        if self._approach is not None and self._measures_the_way:
            return self._deltas_at(self._approach.genome, numbers.approach_tokens).ask()
        if self._approach is not None:
            return Attribution(self._approach.genome, numbers.attribution_tokens, numbers.attribution_sequences)
        if self._parent is None:
            return Question(self._candidates, numbers.screen_tokens, stage=-1)
        if self._schedule.next is self._schedule.expansions:
            return Expansion(self._parent, numbers.expansion_tokens, 2 * numbers.attribution_sequences)
        if self._schedule.next is self._schedule.neighbours:
            return self._deltas_at(self._parent, numbers.delta_tokens).ask()
        return Attribution(self._parent, numbers.attribution_tokens, numbers.attribution_sequences)

    def tell(self, answer: Any) -> GenerationRecord | None:
        """Take the answer; return the record when it finishes a round or a generation.

        Raises: EvoPressError if the answer has not the numbers that were asked for, or none of them is finite.
        """
        if self._evolution is not None:
            record = self._evolution.tell(answer)
            return None if record is None else self._renumbered(record)
        assert self._question is not None, "tell answers ask"
        if self._race is not None:
            return self._tell_race(self._race, answer)
        if self._deltas is not None and not self._deltas.finished:
            return self._tell_deltas(self._deltas, answer)
        if isinstance(self._question, Question):
            return self._choose(self._question, answer)
        self._evaluations += 1
        if isinstance(self._question, Expansion):
            self._tokens += backward_tokens(True) * self._question.tokens
            self._details = {"second_order": True}
            return self._propose(self._values.expanded(self._question, answer), self._numbers.second_order_changes)
        self._tokens += self._backward * self._question.tokens
        self._details = self._values.learn(self._question, answer)
        return self._go_on(self._values.all())

    def state(self) -> dict[str, Any]:
        """Return, between generations, all that `restore` needs to go on, as JSON-able values."""
        assert self._question is None, "the state is taken between generations"
        return {
            "schema": 1,
            "settings": self._identity(),
            "generation": self.generation,
            "parent": None if self._parent is None else list(self.parent),
            "found": None if self._parent is None else list(self._parent),
            **self._schedule.state(),
            "tokens": self._tokens,
            "evaluations": self._evaluations,
            "non_finite": self._non_finite,
            "sensitivities": self._values.sensitivities,
            "evolution": None if self._evolution is None else self._evolution.state(),
            "rng_initial": self._problem.rng_initial.bit_generator.state,
            "rng_mutation": self._problem.rng_mutation.bit_generator.state,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state of the same search; the numbers of rounds and of generations alone may differ.

        Raises: EvoPressError if the state is of another search; ValueError or another error of Python's if it is damaged.
        """
        check_same_search(state["settings"], self._identity())
        check_counts(state, ("rounds", "tokens", "evaluations", "non_finite"))
        problem = self._problem
        self._parent = problem.space.check(state["found"])
        if not problem.budget.met_by(problem.space, self._parent):
            raise ValueError("its genome is not within the budget")
        self._values.restore(state["sensitivities"])
        self._schedule.restore(state)
        self._generation = state["rounds"] + 1
        self._race = self._deltas = self._approach = None  # generation 0 is over
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
        """Return the uniform genome where the target is a level, else the one with the least sum of errors that has all modules.

        Where modules must be dropped there is none: attributions at the model that has them all, weights at their last levels,
        or measured neighbours, say which. Without a round to ask for them, random mixes are chosen from as evolution does.
        """
        space, budget = self._problem.space, self._problem.budget
        if (uniform := uniform_genome(space, budget)) is not None:
            return [uniform]
        whole = [
            [math.inf if error and len(of_unit) > 1 and self._values.droppable[i] else error for error in of_unit]
            for i, of_unit in enumerate(self._values.plain())
        ]
        if (genome := best_in(space, budget, whole)) is not None:
            return [genome]
        if self._numbers.rounds or self._measures_the_way:
            self._approach = Approach(space, budget, self._values.droppable, steps=self._numbers.approach)
            return []
        count = self._settings.evolution.initial_candidates
        return random_mixes(space, budget, num_candidates=count, rng=self._problem.rng_initial)

    def _from_neighbour(self) -> list[Genome]:
        """Return genomes made of what was found at another budget, and take over the mean of the sensitivities found there.

        They are the neighbour's, moved to this budget, and the best by those sensitivities; without any, the errors stand for them,
        which tell nothing of modules.
        """
        space, budget, neighbour = self._problem.space, self._problem.budget, self._problem.neighbour
        if neighbour is None:
            return []
        values = self._values.take_over(neighbour.state.get("sensitivities", ()))
        genomes = list(genomes_from_neighbour(self._problem, values))
        if values is None and not any(self._values.droppable):
            values = self._values.plain()
        free = None if values is None else best_in(space, budget, values, near=space.check(neighbour.genome))
        genomes += [] if free is None or not budget.met_by(space, free) else [free]
        if genomes:
            self._approach = None  # no need of a way down
        return genomes

    def _go_on(self, values: Sequence[Sequence[float]]) -> GenerationRecord | None:
        """Make proposals by values[unit][level]; before there is a genome within the budget, take a step of the way to one."""
        if self._approach is None:
            return self._propose(values, (None, *self._changes))
        self._question = self._deltas = None
        if self._approach.step(values):
            return None
        space, budget, above = self._problem.space, self._problem.budget, self._approach.genome
        self._approach = None
        first = best_in(space, budget, values, near=above)
        mixes = [first] if first is not None else random_mixes(space, budget, num_candidates=1, rng=self._problem.rng_initial)
        self._candidates = tuple(dict.fromkeys((*mixes, *self._candidates)))
        return self._finish(self._candidates[0]) if len(self._candidates) == 1 else None

    def _propose(self, values: Sequence[Sequence[float]], changes: Sequence[int | None]) -> GenerationRecord | None:
        """Make proposals by values[unit][level], and ask for their fitness; where there are none, the round is over.

        Args: changes: the most units that each changes; None: any.
        """
        parent = self.parent
        proposals = self._proposals(parent, values, changes)
        expected = Expected(self._problem.space, values).of
        self._details["proposals"] = [
            {
                "most_changes": most,
                "changes": sum(a != b for a, b in zip(genome, parent, strict=True)),
                "expected": round(expected(genome) - expected(parent), 9),
            }
            for genome, most in proposals.items()
        ]
        if not proposals:
            return self._finish(parent)
        genomes, tokens, rules = (parent, *proposals), self._numbers.screen_tokens, self._numbers.race
        if rules is None:
            self._question = Question(genomes, tokens)
        else:
            self._question, self._race = None, Race(genomes, tokens=tokens * len(genomes), rules=rules)
        return None

    def _tell_deltas(self, deltas: Deltas, answer: Sequence[float]) -> GenerationRecord | None:
        """Take what neighbours measured; when all are, make proposals by it."""
        deltas.tell(answer)
        self._question = None
        if not deltas.finished:
            return None
        self._tokens += deltas.tokens
        self._evaluations += deltas.evaluations
        expected = self._values.expected()
        self._details = {"deltas": deltas.report(expected)}
        return self._go_on(deltas.values(expected))

    def _deltas_at(self, genome: Genome, tokens: int) -> Deltas:
        """Return what measures the neighbours of a genome, the one that has begun where there is one."""
        if self._deltas is None:
            self._deltas = Deltas(self._problem.space, genome, tokens=tokens, parts=self._numbers.delta_parts)
        return self._deltas

    def _tell_race(self, race: Race, answer: Sequence[float]) -> GenerationRecord | None:
        """Take the fitnesses of a race's minibatch; when it is over, finish the round."""
        race.tell(answer)
        self._question = None
        if not race.finished:
            return None
        self._tokens += race.tokens
        self._evaluations += race.evaluations
        self._non_finite += race.lost
        self._details["race"] = race.report()
        winner = race.winner
        return self._finish(
            race.genomes[winner],
            fitness=race.means[winner],
            accepted=winner != 0,
            parent_fitness=race.means[0],
            stages=(race.record(),),
            non_finite=race.lost,
        )

    def _proposals(
        self, parent: Genome, values: Sequence[Sequence[float]], changes: Sequence[int | None]
    ) -> dict[Genome, int | None]:
        """Return the genomes that are best by the sensitivities, each with the number of changes that was allowed; None: any."""
        space, budget = self._problem.space, self._problem.budget
        found: dict[Genome, int | None] = {}
        for most in changes:
            genome = best_in(space, budget, values, near=parent, most_changes=most)
            if genome is not None and genome != parent and budget.met_by(space, genome):
                found.setdefault(genome, most)
        return found

    @property
    def _changes(self) -> list[int]:
        """The most changes of each proposal; where all units are modules, which are few, in proportion to their number."""
        space, changes = self._problem.space, self._numbers.changes
        if not self._all_modules:
            return changes
        return [max(round(most * len(space) / _UNITS), 2) for most in changes]

    def _choose(self, question: Question, answer: Sequence[float]) -> GenerationRecord:
        """Take the fitnesses of the genomes that were asked for, the current one's first, and finish the round."""
        genomes, tokens = question.genomes, question.tokens
        values = question.numbers(answer)
        best = select_fittest(genomes, values, 1)[0]
        if not math.isfinite(values[best]):
            raise not_finite(values[best], len(genomes), f"in generation {self._generation} on {tokens} tokens")
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
        if self._generation and (rounds := self._schedule.next) is not None:
            rounds.end(better=finished.accepted)
        self._parent, self._question, self._details = winner, None, {}
        self._race = self._deltas = None
        self._generation += 1
        self._evolve_if_over()
        return finished

    @property
    def _rounds_over(self) -> bool:
        """Tell whether there is a genome, and no round is left."""
        return self._parent is not None and self._schedule.next is None

    @property
    def _measures_the_way(self) -> bool:
        return self._numbers.approach_tokens > 0 and self._all_modules

    def _evolve_if_over(self) -> None:
        """Begin the evolution once the rounds are over, where one was asked for and it can move; else the search ends here."""
        if self._parent is None or not self._rounds_over or not self._numbers.generations_after:
            return
        evolution = self._evolution_from(self._parent)
        if (reason := evolution.stuck()) is None:
            self._evolution = evolution
        else:
            logger.warning("search: it ends after its rounds, since no evolution goes on from what they found: %s", reason)

    def _evolution_from(self, genome: Genome) -> Evolution:
        problem = self._problem
        return Evolution(
            problem.space,
            problem.budget,
            self._settings.evolution,
            rng_initial=problem.rng_initial,
            rng_mutation=problem.rng_mutation,
            mutation=self._mutation(),
            parent=genome,
            race=self._numbers.race,
        )

    def _mutation(self) -> Mutation | None:
        """Return what draws a share of the offspring by what is expected of them; None: nothing does."""
        problem, evolution, share = self._problem, self._settings.evolution, self._numbers.predicted_offspring
        if not share or not self._values.sensitivities:
            return None
        numbers: dict[str, Any] = {"max_switches": evolution.max_switches, "distribution": evolution.distribution}
        plain = LevelSwitch(problem.space, problem.budget, exchange=evolution.exchange, **numbers)
        return EitherMutation(PredictedSwitch(problem.space, problem.budget, self._values.all(), **numbers), plain, share)

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
