"""The kinds of rounds that a guided search has, one after the other, and what is left of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass
class Rounds:
    """Rounds of one kind, which are over when one of them has found nothing better."""

    most: int
    done: int = 0
    settled: bool = False
    """The last one found nothing."""

    @property
    def left(self) -> int:
        """How many there may be yet."""
        return 0 if self.settled else max(self.most - self.done, 0)

    def end(self, *, better: bool) -> None:
        """Count a round."""
        self.done, self.settled = self.done + 1, not better


class Schedule:
    """Rounds of attributions, then of second order, then of measured neighbours."""

    def __init__(self, *, attributions: int, expansions: int, neighbours: int) -> None:
        """Take how many rounds of each kind there are at most."""
        self.attributions, self.expansions, self.neighbours = Rounds(attributions), Rounds(expansions), Rounds(neighbours)
        self._later = {"expansions": self.expansions, "deltas": self.neighbours}

    @property
    def next(self) -> Rounds | None:
        """What the next round is one of; None: all are over."""
        return next((rounds for rounds in (self.attributions, *self._later.values()) if rounds.left), None)

    def state(self) -> dict[str, Any]:
        """Return what a search's state has of it, as JSON-able values."""
        done = {key: [rounds.done, rounds.settled] for key, rounds in self._later.items() if rounds.done}
        return {
            "rounds": self.attributions.done + sum(count for count, _ in done.values()),
            "settled": self.attributions.settled,
            **done,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` returned; a search may have been given more rounds since.

        Raises: ValueError if the kinds have more rounds than there were.
        """
        for key, rounds in self._later.items():
            rounds.done, rounds.settled = state.get(key, (0, False))
        self.attributions.done = state["rounds"] - sum(rounds.done for rounds in self._later.values())
        self.attributions.settled = bool(state["settled"])
        if self.attributions.done < 0:
            raise ValueError(f"it has {state['rounds']} rounds, and of its kinds more")
