"""What a baseline is: what it says before a run begins, what it may look at, and what it gives back."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from evopress.compress.compressor import Compressor
from evopress.data.minibatch import Minibatch
from evopress.errors import EvoPressError
from evopress.fitness.gradients import Score
from evopress.levels.hessians import HessianStore
from evopress.levels.union import LevelSource
from evopress.models.blocks import BlockModel
from evopress.search.strategy import Fitness
from evopress.settings import RunSettings
from evopress.units import Budget, Genome, Level, Space

WEIGHTS, MODULES, EXPERTS = "weights", "modules", "experts"
"""What levels may be of: compressed weights, or modules, or experts, that are kept or dropped."""


@dataclass(frozen=True)
class Pass:
    """Genomes that a baseline measures on text, for the plan of a run."""

    genomes: int
    tokens: int
    """Of each genome."""
    on_search_text: bool = False
    """By the run's fitness, for which the dense model's states there are needed."""
    together: int | None = None
    """Genomes that are measured at a time; None: all."""
    backward: bool = False
    """Forward and backward: so many times the tokens, of one genome each time."""
    errors: int = 1
    """Of each weight, that are multiplied with what enters it on the way back."""
    alone: bool = False
    """By the first of a run's processes, without the others."""
    shared: str | None = None
    """Of passes with this name, only the one with the most genomes is made, whatever the budgets: its numbers are kept."""


@dataclass(frozen=True)
class Planned:
    """What is known of a problem before anything is built."""

    space: Space
    budget: Budget
    search_tokens: int
    """Tokens of the search text."""


class Measured(Protocol):
    """A genome's numbers on given text."""

    @property
    def kl(self) -> float:
        """Nats per token, KL(dense ‖ compressed)."""

    @property
    def perplexity(self) -> float:
        """Of the compressed model."""


class Levels(Protocol):
    """The run's levels, followed by further ones."""

    def genome_of_last(self, genome: Genome) -> Genome:
        """Turn a genome of the last database into one of all."""


class Problem(Protocol):
    """What a baseline may look at; each part is made when it is first asked for."""

    @property
    def space(self) -> Space:
        """Units and the run's levels."""

    @property
    def budget(self) -> Budget:
        """What a genome may cost."""

    @property
    def errors(self) -> Sequence[Sequence[float]]:
        """errors[i][l] is the error of unit i at level l, where levels are compressed weights."""

    @property
    def levels(self) -> LevelSource:
        """The run's levels, whose space is `space`."""

    @property
    def rng(self) -> np.random.Generator:
        """The baseline's own generator, for candidates."""

    @property
    def calibration_tokens(self) -> Tensor:
        """Token ids int64 [N, L]."""

    @property
    def search_tokens(self) -> Tensor:
        """Token ids int64 [N, L]."""

    @property
    def blocks(self) -> BlockModel:
        """The dense model; to be left as it is."""

    @property
    def batch_tokens(self) -> int:
        """Tokens per pass over the blocks."""

    @property
    def what_fitness_is(self) -> list[Any]:
        """What decides the fitness beside text and target, as values JSON can hold."""

    def fitness(self, rng: np.random.Generator | None = None, *, num_sequences: int | None = None) -> Fitness:
        """Return the run's fitness on the search text, or its first sequences.

        Args: rng: draws the minibatches; None: a generator of the baseline's own.
        """

    def measure(
        self, genomes: Sequence[Genome], tokens: Tensor, *, what: str, levels: LevelSource | None = None
    ) -> Sequence[Measured]:
        """Measure genomes on sequences int64 [N, L], all on the same tokens; `what` names the progress bar.

        A weight at level -1 is the dense one.

        Args: levels: that the genomes count, in the place of the run's own.
        """

    def gradient_scores(self, genome: Genome | None, errors_of: Sequence[Genome], minibatch: Minibatch, score: Score) -> Tensor:
        """Score the levels of some genomes by gradients at another, None being the dense model, on search text cut to one length.

        Returns: float64 [genomes, units]; see `fitness.gradients`.
        """

    @property
    def tokens(self) -> int:
        """Candidate tokens that the baseline has asked for so far; one that goes forward and backward counts three times."""

    def spend(self, *, tokens: int, seconds: float = 0.0) -> None:
        """Count what was not asked for here: seconds, where numbers are taken over that were measured before."""

    def uniform_name(self, level: Level) -> str:
        """Name the row of the genome with this level everywhere."""

    def compressor(self) -> Compressor:
        """Return what makes the run's levels, whatever the units' sizes."""

    def hessians(self) -> HessianStore:
        """Return the Hessians of dense activations, computed first where they are missing."""

    def add_levels(self, name: str, compressor: Compressor) -> Levels:
        """Build further levels, or reuse them, and put them after the run's own; genomes may count them from then on.

        Args: name: begins the name of their database's folder.
        """

    def note_order(self, name: str, order: Sequence[int]) -> None:
        """Keep the order in which a row's baseline would remove blocks, for the results."""

    def kept(self, name: str, about: Mapping[str, Any]) -> MutableMapping[str, Any]:
        """Return numbers that runs of the same model and text share, in a file that each item is written to when it is set.

        Args: about: what decides the numbers, beside the level database.
        """

    def records(self, name: str, about: Mapping[str, Any]) -> Records:
        """Return what `kept` does where numbers come one after the other: an interrupted run goes on with them."""


class Records(Protocol):
    """Records in a file, each written when it is added."""

    def __iter__(self) -> Any:
        """Read what there is."""

    def add(self, record: Mapping[str, Any]) -> None:
        """Append one."""


class Baseline(ABC):
    """A way to choose levels that the search is compared with. Only `find` must be written."""

    serves: Collection[str] = (WEIGHTS, MODULES, EXPERTS)
    """What levels it can choose."""
    beside_budget: bool = False
    """Rows over the budget are meant, and no warning tells of them."""

    def check(self, run: RunSettings) -> None:  # noqa: B027
        """Raise EvoPressError if the settings do not allow it; before any model work."""

    def passes(self, plan: Planned) -> Iterable[Pass]:
        """Return what it measures, for the plan of the run."""
        return ()

    def further(self, plan: Planned, compressor: Compressor) -> Compressor | None:
        """Return what makes as many levels as `find` adds beside the run's, at most, for the plan of the run; None: it adds none.

        Args: compressor: what makes the run's levels, whatever the units' sizes.
        """
        return None

    def num_genomes(self, plan: Planned) -> int:
        """Return how many rows it gives."""
        return 1

    @abstractmethod
    def find(self, problem: Problem) -> dict[str, Genome]:
        """Return genomes by the names of their rows."""


def remembered(problem: Problem, kept: MutableMapping[str, Any], key: str, measure: Callable[[], Any]) -> Any:
    """Return a number or numbers that JSON can hold from what was kept, measured first where they are missing.

    What measuring them took is kept too, and counted again when they are taken over.
    """
    took = f"{key}: took"
    if key not in kept:
        tokens, started = problem.tokens, time.monotonic()
        found = measure()
        kept[took] = {"tokens": problem.tokens - tokens, "seconds": round(time.monotonic() - started, 3)}
        kept[key] = found
    elif took in kept:
        problem.spend(**kept[took])
    return kept[key]


def check_importance(run: RunSettings, tokens: int) -> None:
    """Raise EvoPressError unless the calibration text has so many tokens, whole sequences of them."""
    length, most = run.model.sequence_length, run.data.calibration_tokens
    if not length <= tokens <= most:
        raise EvoPressError(
            f"baselines.importance_tokens={tokens} is out of range: expected one sequence ({length}) to "
            f"data.calibration_tokens={most}; change one of them"
        )


def check_hessians(run: RunSettings, name: str, why: str = "") -> None:
    """Raise EvoPressError if Hessians are not kept, which a baseline needs; say why where that is not plain."""
    if not run.level_db.keep_hessians:
        raise EvoPressError(
            f"baseline {name} needs stored Hessians{why}: set level_db.keep_hessians=true, or leave it out of baselines.names"
        )


def check_minibatch(run: RunSettings, key: str, tokens: int) -> None:
    """Raise EvoPressError unless a minibatch of so many tokens can be drawn from the search text; `key` names the setting."""
    length = run.model.sequence_length
    available = run.data.search_tokens // length * length
    if not 2 <= tokens <= available:
        raise EvoPressError(
            f"{key} asks for a minibatch of {tokens} tokens: expected 2 to {available}, the search text (data.search_tokens) in "
            f"sequences of {length}; change one of them"
        )
