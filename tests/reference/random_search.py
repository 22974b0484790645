"""A search strategy from outside the package: the best of some random mixes each generation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from evopress.search.initial import random_mix
from evopress.search.record import GenerationRecord
from evopress.search.strategy import Asks, Problem, Question


@dataclass
class RandomSearch:
    """Its settings, `search/strategy=random` on the command line."""

    name: str = "random"
    generations: int = 3
    candidates: int = 4
    tokens: int = 128

    strategy = "random"

    @property
    def num_generations(self) -> int:
        return self.generations

    @property
    def summary(self) -> str:
        return f"{self.generations} times {self.candidates} random mixes"

    def searching(self, evolution: Any) -> RandomSearch:
        return self

    def identity(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if key != "generations"}

    def asks(self, state: Mapping[str, Any] | None = None) -> list[Asks]:
        left = self.generations - (state["generation"] - 1 if state else -1)
        return [Asks("search.strategy.tokens", self.tokens, self.candidates + 1, times=left)]

    def make(self, problem: Problem) -> Drawing:
        return Drawing(self, problem)


class Drawing:
    """The search itself."""

    initial_record = None
    non_finite = 0

    def __init__(self, settings: RandomSearch, problem: Problem) -> None:
        self.settings, self.problem = settings, problem
        self.generation = self.tokens = 0
        self.best: tuple[int, ...] | None = None
        self.question: Question | None = None

    @property
    def finished(self) -> bool:
        return self.generation > self.settings.generations

    @property
    def parent(self) -> tuple[int, ...]:
        assert self.best is not None
        return self.best

    def ask(self) -> Question:
        if self.question is None:
            problem = self.problem
            drawn = tuple(random_mix(problem.space, problem.budget, problem.rng_mutation) for _ in range(self.settings.candidates))
            self.question = Question(drawn if self.best is None else (self.best, *drawn), self.settings.tokens)
        return self.question

    def tell(self, answer: list[float]) -> GenerationRecord:
        assert self.question is not None
        genomes, values = self.question.genomes, list(answer)
        self.tokens += self.settings.tokens * len(genomes)
        before, self.best = self.best, genomes[min(range(len(values)), key=values.__getitem__)]
        self.question, self.generation = None, self.generation + 1
        return GenerationRecord(
            generation=self.generation - 1,
            genome=self.best,
            fitness=min(values),
            accepted=before is not None and self.best != before,
            parent_fitness=None if before is None else values[0],
            tokens=self.tokens,
            evaluations=self.tokens // self.settings.tokens,
            cost=self.problem.space.cost(self.best),
            details={"drawn": len(genomes)},
        )

    def state(self) -> dict[str, Any]:
        return {
            "settings": self.settings.identity(),
            "generation": self.generation,
            "parent": list(self.parent),
            "tokens": self.tokens,
            "rng": self.problem.rng_mutation.bit_generator.state,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.generation, self.tokens = state["generation"], state["tokens"]
        self.best = self.problem.space.check(state["parent"])
        self.problem.rng_mutation.bit_generator.state = state["rng"]
