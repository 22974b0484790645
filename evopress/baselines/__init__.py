"""Ways to choose levels that the search is compared with; each returns a genome of the same space."""

from evopress.baselines.best_of_random import best_of_random
from evopress.baselines.dynamic_programming import dynamic_programming
from evopress.baselines.uniform import uniform_genomes

__all__ = ["best_of_random", "dynamic_programming", "uniform_genomes"]
