"""A budget at which a search could not go on is refused before the first search, and before what comes before that."""

from __future__ import annotations

import numpy as np

from evopress.errors import EvoPressError
from evopress.reporting.records import read_json
from evopress.search.constraint import make_exchange
from evopress.search.evolution import Evolution, SearchSettings
from evopress.search.strategy import Asks, Searching
from evopress.units import Budget, Space
from evopress.workspace import Workspace

_MOST_TRIES = 32


def check_asks(workspace: Workspace, searching: Searching, space: Space, budget: Budget) -> list[Asks] | None:
    """Return what a run's search has yet to ask, from where it begins or goes on; None: there is no search.

    Args: space: of the run's levels, as planned or as built.

    Raises: EvoPressError if its evolution has no other genome to draw at the budget.
    """
    asks = None if "search" not in workspace.settings.stages else _asks(workspace, searching)
    if asks and searching.num_generations and isinstance(searching, SearchSettings):
        check_switches(space, budget, searching)
    evolution = getattr(searching, "evolution", None)  # after the rounds of a guided search
    if asks and evolution is not None and evolution.generations:
        make_exchange(evolution.exchange, space, budget)
    return asks


def check_switches(space: Space, budget: Budget, searching: SearchSettings) -> None:
    """Raise EvoPressError if no genome that the search may start from has a legal switch."""
    for index in range(_MOST_TRIES):
        evolution = Evolution(space, budget, searching, rng_initial=np.random.default_rng(0), rng_mutation=np.random.default_rng(0))
        tries = 1
        if evolution.initial_record is None:
            tries = len(evolution.ask().genomes)
            evolution.tell([float(i != index) for i in range(tries)])
        try:
            evolution.ask()
            return
        except EvoPressError:
            if index + 1 >= min(tries, _MOST_TRIES):
                raise


def _asks(workspace: Workspace, searching: Searching) -> list[Asks]:
    """Return what the search asks from where it begins or goes on."""
    path = workspace.run_dir / "state.json"
    try:
        asks = searching.asks(read_json(path)["evolution"] if path.exists() else None)
    except (EvoPressError, KeyError, TypeError, ValueError):
        asks = searching.asks()  # the search says what is wrong with it
    return [ask for ask in asks if ask.times and (not ask.of_modules or workspace.method.modules is not None)]
