"""Decoded levels that are kept while genomes are switched, and which of them are given up where there is no room for all."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from torch import Tensor

Key = tuple[int, int]
"""Unit and level."""


class DecodedLevels:
    """Decoded levels up to so many bytes.

    A model is walked through part by part, again and again, mostly at the same levels. What was asked for the longest time ago is
    then what comes next; if it were given up first, and the room were for all parts but one, every walk would decode all of them.
    So the parts that came first stay, and the part that was left last makes room for the next. What a whole walk has not asked for
    goes before that, such as a level of a candidate that was not taken; of the part that is asked for now, what is left goes last.
    """

    def __init__(self, most_bytes: int, num_parts: int) -> None:
        """Begin with none.

        Args:
            most_bytes: of those that are kept.
            num_parts: that a walk goes through, at most.
        """
        self.most_bytes, self.num_parts = most_bytes, num_parts
        self.num_bytes = 0
        """Of those that are kept now."""
        self._part: int | None = None
        self._num_left = 0  # parts that were left so far, each as often as it was
        self._here: OrderedDict[Key, Tensor] = OrderedDict()
        self._left: OrderedDict[Key, tuple[Tensor, int]] = OrderedDict()  # in the order in which parts were left

    def __iter__(self) -> Iterator[Tensor]:
        """Go through all that are kept."""
        yield from self._here.values()
        yield from (weight for weight, _ in self._left.values())

    def find(self, part: int, key: Key) -> Tensor | None:
        """Return a decoded level of a unit in a part, if it is kept."""
        if part != self._part:
            self._leave(part)
        if key in self._left:
            self._here[key], _ = self._left.pop(key)
        if key in self._here:
            self._here.move_to_end(key)
        return self._here.get(key)

    def keep(self, key: Key, weight: Tensor) -> None:
        """Keep what was not found when it was asked for last, and give up others that there is no room for."""
        if weight.nbytes > self.most_bytes:
            return
        self._here[key] = weight
        self.num_bytes += weight.nbytes
        while self.num_bytes > self.most_bytes:
            self.num_bytes -= self._given_up().nbytes

    def _leave(self, part: int) -> None:
        self._num_left += 1
        self._left.update((key, (weight, self._num_left)) for key, weight in self._here.items())
        self._here.clear()
        self._part = part

    def _given_up(self) -> Tensor:
        if not self._left:
            return self._here.popitem(last=False)[1]
        _, left = next(iter(self._left.values()))
        not_asked_for = self._num_left - left >= self.num_parts
        return self._left.popitem(last=not not_asked_for)[1][0]
