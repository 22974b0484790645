"""Search strategies: genomes, a budget, a random generator and whoever answers their questions, no tensors."""

from evopress.search.constraint import EXCHANGES, Exchange, make_exchange
from evopress.search.evolution import Evolution, EvolutionStrategy, SearchSettings
from evopress.search.initial import initial_candidates, one_level, random_mix, random_mixes, uniform_genome
from evopress.search.mutation import DISTRIBUTIONS, LevelSwitch, Mutation, offspring
from evopress.search.record import GenerationRecord, StageRecord
from evopress.search.selection import check_stages, select_fittest
from evopress.search.strategies import STRATEGIES, strategy_of
from evopress.search.strategy import (
    Asks,
    Attribution,
    Expansion,
    Fitness,
    Neighbour,
    Problem,
    Question,
    Searching,
    Strategy,
    run_search,
)

__all__ = [
    "DISTRIBUTIONS",
    "EXCHANGES",
    "STRATEGIES",
    "Asks",
    "Attribution",
    "Evolution",
    "EvolutionStrategy",
    "Exchange",
    "Expansion",
    "Fitness",
    "GenerationRecord",
    "LevelSwitch",
    "Mutation",
    "Neighbour",
    "Problem",
    "Question",
    "SearchSettings",
    "Searching",
    "StageRecord",
    "Strategy",
    "check_stages",
    "initial_candidates",
    "make_exchange",
    "offspring",
    "one_level",
    "random_mix",
    "random_mixes",
    "run_search",
    "select_fittest",
    "strategy_of",
    "uniform_genome",
]
