"""EvoPress as a library: a loaded model and text go in, a genome, numbers and a checkpoint come out.

    model = evopress.load_model("/models/mine")
    levels = evopress.build_levels(model, calibration, bits=2.5)
    found = evopress.search(levels, text, generations=50)
    print(evopress.evaluate(levels, held_out, found))
    evopress.export(levels, found, "checkpoint")

The parts are those of a run (`python -m evopress`), and equal settings and text give the same genome.
"""

from evopress.library.levels import Levels, build_levels
from evopress.library.models import Model, load_model
from evopress.library.results import Refined, evaluate, export, refine
from evopress.library.searches import Found, find_baselines, find_smallest, search, search_budgets

__all__ = [
    "Found",
    "Levels",
    "Model",
    "Refined",
    "build_levels",
    "evaluate",
    "export",
    "find_baselines",
    "find_smallest",
    "load_model",
    "refine",
    "search",
    "search_budgets",
]
