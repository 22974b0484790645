"""The evolutionary search: genomes, a budget, a random generator and a callable fitness, no tensors."""

from evopress.search.constraint import EXCHANGES, Exchange, make_exchange
from evopress.search.evolution import Evolution, Fitness, Question, SearchSettings, run_search
from evopress.search.initial import initial_candidates, one_level, random_mix, random_mixes, uniform_genome
from evopress.search.mutation import DISTRIBUTIONS, LevelSwitch, Mutation, offspring
from evopress.search.record import GenerationRecord, StageRecord
from evopress.search.selection import Stage, check_stages, select_fittest

__all__ = [
    "DISTRIBUTIONS",
    "EXCHANGES",
    "Evolution",
    "Exchange",
    "Fitness",
    "GenerationRecord",
    "LevelSwitch",
    "Mutation",
    "Question",
    "SearchSettings",
    "Stage",
    "StageRecord",
    "check_stages",
    "initial_candidates",
    "make_exchange",
    "offspring",
    "one_level",
    "random_mix",
    "random_mixes",
    "run_search",
    "select_fittest",
    "uniform_genome",
]
