"""The settings of the guided search; what it does is in `rounds.py`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from evopress.errors import EvoPressError
from evopress.progress import counted
from evopress.search.evolution import SearchSettings
from evopress.search.racing import RaceRules
from evopress.search.rounds import Guided
from evopress.search.schedule import Schedule
from evopress.search.strategy import Asks, Problem

SELECTIONS = ("mean", "racing")
"""How proposals, and the offspring of the evolution after them, are chosen among."""


@dataclass
class GuidedStrategy(RaceRules):
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
    approach: int = 2
    """Steps on the way from the model with all its modules to the budget, where that asks for modules to be dropped."""
    approach_tokens: int = 0
    """Search tokens on which every module that is left is dropped alone at each step, where there is nothing but modules; 0: an
    attribution says what dropping them would add."""
    selection: str = "mean"
    """mean: all proposals are measured on `screen_tokens`, the best mean is next; racing: see `racing.py`, in at most as many."""
    second_order_rounds: int = 0
    """Rounds, after the others, by what every unit's levels change to second order; one that finds nothing is the last. There are
    none where modules can be dropped."""
    second_order_tokens: int | None = None
    """Search tokens that go forward, and backward twice, in such a round; null: twice `attribution_tokens`. They are divided into
    twice `attribution_sequences`, at least."""
    second_order_changes: list[int] = field(default_factory=lambda: [80, 40, 20, 10])
    """Its proposals: with at most so many units changed."""
    delta_rounds: int = 0
    """Rounds, after the others, in which both neighbours of every unit are measured instead; one that finds nothing is the last."""
    delta_tokens: int = 256
    """Search tokens of each neighbour."""
    delta_parts: int = 2
    """Minibatches that these are divided into: what a neighbour changes varies over them."""
    generations_after: int = 0
    """Generations of evolution from the genome that the rounds found, by the other numbers of `search`."""
    predicted_offspring: float = 0.0
    """Share of its offspring that are drawn by what is expected of them."""

    def searching(self, evolution: SearchSettings) -> GuidedSettings:
        """See `StrategySettings`."""
        for name, least in (
            ("rounds", 0),
            ("attribution_tokens", 4),
            ("attribution_sequences", 2),
            ("screen_tokens", 2),
            ("averaged", 1),
            ("approach", 1),
            ("approach_tokens", 2 * self.delta_parts if self.approach_tokens else 0),
            ("second_order_rounds", 0),
            ("delta_rounds", 0),
            ("delta_parts", 2),
            ("delta_tokens", 2 * self.delta_parts),
            ("generations_after", 0),
        ):
            value = getattr(self, name)
            if value < least:
                raise EvoPressError(f"search.strategy.{name}={value} is out of range: expected at least {least}")
        if self.second_order_tokens is not None and self.second_order_tokens < 4:
            raise EvoPressError(
                f"search.strategy.second_order_tokens={self.second_order_tokens} is out of range: expected at least 4, or null"
            )
        if self.second_order_rounds and not self.rounds:
            raise EvoPressError(
                f"search.strategy.second_order_rounds={self.second_order_rounds} needs at least one attribution round before: set "
                "search.strategy.rounds=1 or more"
            )
        if self.selection not in SELECTIONS:
            raise EvoPressError(f"search.strategy.selection={self.selection} is unknown: choose one of {', '.join(SELECTIONS)}")
        if not 0 <= self.predicted_offspring <= 1:
            raise EvoPressError(
                f"search.strategy.predicted_offspring={self.predicted_offspring:g} is out of range: expected a share, 0 to 1"
            )
        for name in ("changes", "second_order_changes"):
            if any(most < 1 for most in getattr(self, name)):
                raise EvoPressError(
                    f"search.strategy.{name}={getattr(self, name)} is out of range: expected numbers of units, at least 1 each"
                )
        if evolution.max_level is not None or evolution.max_total_deviation is not None:
            raise EvoPressError(
                f"search.max_level={evolution.max_level} and search.max_total_deviation={evolution.max_total_deviation} bound the "
                "mutations of evolution, and the integer program of search/strategy=guided knows no such bounds: leave them null"
            )
        return GuidedSettings(self, replace(evolution, generations=self.generations_after))

    @property
    def expansion_tokens(self) -> int:
        """Tokens of an expansion."""
        return 2 * self.attribution_tokens if self.second_order_tokens is None else self.second_order_tokens

    def schedule(self) -> Schedule:
        """Return the rounds, before the first one."""
        return Schedule(attributions=self.rounds, expansions=self.second_order_rounds, neighbours=self.delta_rounds)

    @property
    def race(self) -> RaceRules | None:
        """How candidates race; None: they do not."""
        return self if self.selection == "racing" else None


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
    def num_generations(self) -> int:
        """See `Searching`."""
        numbers = self.numbers
        return numbers.rounds + numbers.second_order_rounds + numbers.delta_rounds + numbers.generations_after

    @property
    def summary(self) -> str:
        """See `Searching`."""
        expanded = f", {self.numbers.second_order_rounds} of second order" if self.numbers.second_order_rounds else ""
        measured = f" and {self.numbers.delta_rounds} of measured neighbours" if self.numbers.delta_rounds else ""
        after = f", then {self.evolution.summary}" if self.numbers.generations_after else ""
        return f"at most {counted(self.numbers.rounds, 'guided round')}{expanded}{measured}{after}"

    def identity(self) -> dict[str, Any]:
        """See `Searching`: numbers of rounds and generations may differ, since a search can be gone on with."""
        longer = ("name", "rounds", "second_order_rounds", "delta_rounds", "generations_after")
        numbers = {key: value for key, value in asdict(self.numbers).items() if key not in longer}
        return numbers | ({"evolution": self.evolution.identity()} if self.numbers.generations_after else {})

    def asks(self, state: Mapping[str, Any] | None = None) -> list[Asks]:
        """See `Searching`."""
        numbers, later, schedule = self.numbers, None, self.numbers.schedule()
        if state is not None:
            later = state["evolution"]
            schedule.restore(state)
        kinds = (schedule.attributions, schedule.expansions, schedule.neighbours)
        times, expansions, deltas = (0 if later else rounds.left for rounds in kinds)
        key = "search.strategy.attribution_tokens"
        proposals = max(2 + len(numbers.changes), 1 + len(numbers.second_order_changes) if expansions else 0)
        way = numbers.approach if state is None and (numbers.rounds or numbers.approach_tokens) else 0
        approach: dict[str, Any] = {"times": way, "initial": True, "of_modules": True}
        asks = [
            Asks("search.strategy.approach_tokens", numbers.approach_tokens, 0, neighbours=True, **approach)
            if numbers.approach_tokens
            else Asks(key, numbers.attribution_tokens, attribution=True, **approach),
            Asks("search.strategy.screen_tokens", numbers.screen_tokens, 0, times=int(state is None), initial=True),
            Asks(key, numbers.attribution_tokens, times=times, attribution=True, milestone=True),
            Asks(
                "search.strategy.screen_tokens", numbers.screen_tokens, proposals, times=times + expansions + deltas, milestone=True
            ),
            Asks("search.strategy.delta_tokens", numbers.delta_tokens, 0, times=deltas, milestone=True, neighbours=True),
        ]
        if expansions:
            key, about = "search.strategy.second_order_tokens", {"attribution": True, "expansion": True, "milestone": True}
            asks.append(Asks(key, numbers.expansion_tokens, times=expansions, **about))
        if numbers.generations_after:
            asks += self.evolution.asks(later or {"generation": 1})
        return asks

    def make(self, problem: Problem) -> Guided:
        """See `Searching`."""
        return Guided(problem, self)
