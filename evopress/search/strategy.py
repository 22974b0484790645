"""What a search strategy is: it asks about genomes and is told, by whoever runs it, until it has found one.

There are three kinds of question. A `Question` asks for the fitness of genomes on so many tokens; an `Attribution` asks how much of
one genome's fitness each unit holds; an `Expansion` what each unit's other levels would change of it. A strategy knows neither
model nor text; `fitness/` answers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from evopress.errors import EvoPressError
from evopress.search.record import GenerationRecord
from evopress.units import Budget, Genome, Space

if TYPE_CHECKING:
    from evopress.search.evolution import SearchSettings

logger = logging.getLogger(__name__)

BACKWARD_TOKENS = 3
"""What a token that goes forward and backward through the model counts as, in tokens that go forward."""


def backward_tokens(twice: bool) -> int:
    """Return what a token of an attribution or expansion counts as; it goes back a second time where labels are drawn.

    That is in every expansion, and in attributions where modules can be dropped.
    """
    return BACKWARD_TOKENS + (2 if twice else 0)


NEIGHBOURS_TOGETHER = 64
"""Neighbours of a genome that are measured at a time, with the genome beside them."""


def most_genomes(units: int) -> int:
    """Return how many genomes measuring both neighbours of every unit takes, at most."""
    return 2 * units + -(-2 * units // NEIGHBOURS_TOGETHER)


@dataclass(frozen=True)
class Question:
    """Genomes whose fitness is asked for, all on the same minibatch."""

    genomes: tuple[Genome, ...]
    tokens: int
    stage: int = 0
    """Index of the stage of selection; -1 is the choice of the initial genome."""

    def numbers(self, answer: Sequence[float]) -> tuple[float, ...]:
        """Return an answer, one number for each genome.

        Raises: EvoPressError if there are more or fewer.
        """
        if len(answer) != len(self.genomes):
            raise EvoPressError(f"the fitness returned {len(answer)} numbers for {len(self.genomes)} genomes: one for each")
        return tuple(float(value) for value in answer)


@dataclass(frozen=True)
class Attribution:
    """A genome of which is asked what each unit holds of its fitness.

    Unit u's weights are W + s (Q - W) with s = 1, Q its level's and W the dense model's. The answer has the derivative of the
    fitness with respect to each unit's s, per predicted token: floats [sequences][units]. A unit at a level without error has 0.
    The fitness being close to quadratic in s, the unit holds half of it. Of a module that can be dropped the answer has twice what
    dropping it adds to the fitness, to second order: where it is kept, what it would add.
    """

    genome: Genome
    tokens: int
    """Of all sequences together, at most."""
    sequences: int = 16
    """Into which the tokens are divided, at least; longer ones of the text are cut."""


@dataclass(frozen=True)
class Expansion(Attribution):
    """A genome of which is asked what moving each unit alone to each of its levels adds to its fitness, to second order.

    From the unit's weights Q to Q' that is the derivative of the fitness along Q' - Q and half its curvature there, the
    Gauss-Newton matrix's, per predicted token: floats [sequences][units][levels], 0 at the genome's own level. Levels of which it
    is not known, and those that a unit has not, have NaN. There are no modules to be dropped.
    """


class Fitness(Protocol):
    """Score genomes; lower is better."""

    def __call__(self, genomes: Sequence[Genome], *, tokens: int) -> list[float]:
        """Score all genomes on one fresh minibatch of `tokens` tokens, the same for all; drawing it is done here."""
        ...


Attribute = Callable[[Attribution], Sequence[Sequence[Any]]]
"""Answers an `Attribution` or an `Expansion` on fresh text; drawing it is done there."""


class Strategy(Protocol):
    """The state of a search, between `ask` and `tell`. What it counts as a generation is its own affair."""

    @property
    def initial_record(self) -> GenerationRecord | None:
        """The record of generation 0 where that asks nothing, as long as no other generation has been finished."""

    @property
    def finished(self) -> bool:
        """Tell whether there is nothing more to ask."""

    @property
    def generation(self) -> int:
        """Number of the generation that is asked about next; 0 is the choice of the initial genome."""

    @property
    def parent(self) -> Genome:
        """The best genome so far, within the budget; there is one once generation 0 is finished."""

    @property
    def non_finite(self) -> int:
        """Candidates so far that lost because their fitness was not a finite number."""

    def ask(self) -> Question | Attribution:
        """Return what to find out next; the same until it is answered by `tell`."""

    def tell(self, answer: Any) -> GenerationRecord | None:
        """Take the answer: fitnesses in the order of the genomes, or an attribution's floats.

        Returns: the record, when the answer finishes a generation.
        """

    def state(self) -> dict[str, Any]:
        """Return, between generations, all that `restore` needs to go on, as JSON-able values.

        It has the `generation` that is next, the `parent`, and the `settings` that `Searching.identity` returns.
        """

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state of the same search.

        Raises: EvoPressError if it is of another search; ValueError or another error of Python's if it is damaged.
        """


@dataclass(frozen=True)
class Asks:
    """Something that a search asks, so many times."""

    key: str
    """The setting that gives the tokens: "search.tokens"."""
    tokens: int
    candidates: int = 1
    times: int = 1
    attribution: bool = False
    """Whether tokens go forward and backward."""
    expansion: bool = False
    """An attribution that is an `Expansion`."""
    initial: bool = False
    """In generation 0, where the uniform genome does not keep the budget."""
    milestone: bool = False
    """See `GenerationRecord.milestone`."""
    of_modules: bool = False
    """Only where modules can be dropped."""
    neighbours: bool = False
    """Of both neighbours of every unit, as far as units are known."""

    @property
    def cost(self) -> int:
        """Tokens in all, in tokens that go forward, where no modules can be dropped."""
        return self.cost_where(modules=False)

    def candidates_of(self, units: int) -> int:
        """Return how many candidates there are in a space of so many units."""
        return self.candidates + (most_genomes(units) if self.neighbours else 0)

    def cost_where(self, *, modules: bool, units: int = 0) -> int:
        """Return the tokens in all, in tokens that go forward, by whether modules can be dropped and how many units there are."""
        if self.of_modules and not modules:
            return 0
        counted = backward_tokens(modules or self.expansion) if self.attribution else 1
        return self.tokens * self.candidates_of(units) * self.times * counted


@dataclass(frozen=True)
class Neighbour:
    """What a search by the same strategy has found in the same space at another budget."""

    genome: Genome
    state: Mapping[str, Any] = field(default_factory=dict)
    """As `Strategy.state` returned it at the end."""


@dataclass(frozen=True)
class Problem:
    """What there is to search, and what a strategy may use."""

    space: Space
    budget: Budget
    errors: Sequence[Sequence[float]]
    """errors[i][l] is the error of unit i at level l, as the level database has it; empty where it has none."""
    rng_initial: np.random.Generator
    """Draws what generation 0 chooses among, and nothing else."""
    rng_mutation: np.random.Generator
    """Draws everything after it."""
    starts: tuple[Genome, ...] = ()
    """Genomes within the budget that join the choice of the initial one."""
    neighbour: Neighbour | None = None
    """What was found at another budget, to begin from; a strategy uses of it what it can."""


class Searching(Protocol):
    """The checked numbers of a search by one strategy."""

    @property
    def strategy(self) -> str:
        """The strategy's name."""

    @property
    def num_generations(self) -> int:
        """Generations after generation 0, at most."""

    @property
    def summary(self) -> str:
        """Say what it will do: "150 generations, λ = 128"."""

    def identity(self) -> dict[str, Any]:
        """Return what makes two searches the same one, as it reads back from JSON."""

    def asks(self, state: Mapping[str, Any] | None = None) -> list[Asks]:
        """Return what is asked at most, from the beginning or from a state that `Strategy.state` returned."""

    def make(self, problem: Problem) -> Strategy:
        """Begin the search.

        Raises: EvoPressError if the budget cannot be met, or the problem lacks what the strategy needs.
        """


class StrategySettings(Protocol):
    """What the registry of strategies holds: a dataclass without arguments that must be given, `search.strategy` in the config."""

    name: str

    def searching(self, evolution: SearchSettings) -> Searching:
        """Return the numbers of a search.

        Args: evolution: those of the evolutionary one, the rest of `search`, for a strategy that has it inside; without generations
            where nobody gives any.

        Raises: EvoPressError if a number is out of range, or one that it needs is missing.
        """


def run_search(
    strategy: Strategy,
    fitness: Fitness,
    *,
    attribute: Attribute | None = None,
    on_generation: Callable[[GenerationRecord], None] = lambda record: None,
) -> Genome:
    """Run a search to its end and return the best genome.

    Args:
        fitness: answers a `Question`.
        attribute: answers an `Attribution` and an `Expansion`; None: nobody does.
        on_generation: called with every record.

    Raises: EvoPressError if an attribution is asked for and nobody answers, or from the strategy.
    """
    if strategy.initial_record is not None and strategy.generation == 1:
        on_generation(strategy.initial_record)
    while not strategy.finished:
        question = strategy.ask()
        if isinstance(question, Question):
            record = strategy.tell(fitness(question.genomes, tokens=question.tokens))
        elif attribute is None:
            raise EvoPressError("the search needs attributions, which this fitness does not provide: use another search/strategy")
        else:
            record = strategy.tell(attribute(question))
        if record is not None:
            on_generation(record)
    if strategy.non_finite:
        logger.warning(
            "%d candidates of this search lost because their fitness was not a finite number; `non_finite` in the records says in "
            "which generations",
            strategy.non_finite,
        )
    return strategy.parent
