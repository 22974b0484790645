"""What the paper says of the profiles that its search finds, and what found genomes say of it.

Source: paper, sections 4.2 and 4.3, appendices E.2 and F.3, Figures 8, 9, 11 and 12. It gives one profile of each method and no
numbers but one; a statement is therefore a sign: some part of the model is less, or more, compressed than another.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from evopress.currencies import QUANT, SPARSITY, own_currency
from evopress.reporting.differences import Difference

_SAID = {"better": "holds", "worse": "does not hold", "tie": "a tie"}
_EIGHTH = 8
"""The paper's models have 32 blocks; where it says no number, its first blocks are an eighth of them here."""


@dataclass(frozen=True)
class Profile:
    """Averages of what a genome spends, in the words of its method: bits per weight, or sparsity from 0 to 1."""

    average: float
    """Of the whole genome."""
    kinds: Mapping[str, float]
    """By kind of unit: "v_proj"."""
    blocks: Sequence[float]
    """By block, in order; at least two."""

    def part(self, first: float, last: float) -> float:
        """Return the mean of the blocks from one share of the depth to another, at least of one block; blocks are of one size."""
        count = len(self.blocks)
        start = min(int(first * count), count - 1)
        return statistics.fmean(self.blocks[start : max(int(last * count), start + 1)])


Number = Callable[[Profile], float]


def average(profile: Profile) -> float:
    """Return what everything is compared with that has nothing else to be compared with."""
    return profile.average


@dataclass(frozen=True)
class Statement:
    """A sentence of the paper: `one` is less compressed than `other`, or more."""

    method: str
    where: str
    says: str
    one: Number
    other: Number = average
    less: bool = True
    needs: str | None = None
    """A kind of unit without which nothing is said."""

    def difference(self, profiles: Mapping[str, Profile]) -> Difference:
        """Compare seed by seed.

        Args: profiles: by seed.
        """
        one, other = ({seed: of(profile) for seed, profile in profiles.items()} for of in (self.one, self.other))
        return Difference.of(one, other)

    @property
    def _sign(self) -> int:
        """Of a difference that bears it out."""
        return 1 if self.less != own_currency(self.method).taken_away else -1

    def num_holding(self, profiles: Mapping[str, Profile]) -> int:
        """Return on how many seeds it holds; where both are equal it does not."""
        return sum(self._sign * (self.one(profile) - self.other(profile)) > 0 for profile in profiles.values())

    def verdict(self, profiles: Mapping[str, Profile]) -> str:
        """Say "holds", "does not hold" or "a tie"; of one seed, or of equal ones, which of both, and that it is so."""
        difference = self.difference(profiles)
        found = difference.verdict(max if self._sign > 0 else min)
        if found in _SAID:
            return _SAID[found]
        return f"{_SAID['better' if self._sign * difference.mean > 0 else 'worse']}, {found}"

    def fits(self, profile: Profile) -> bool:
        """Tell whether the model has what is spoken of."""
        return self.needs is None or self.needs in profile.kinds


def _kind(name: str) -> Number:
    return lambda profile: profile.kinds[name]


def _block(index: int) -> Number:
    return lambda profile: profile.blocks[index]


def _first_eighth(profile: Profile) -> float:
    return profile.part(0, 1 / _EIGHTH)


def _after_it(profile: Profile) -> float:
    return profile.part(1 / _EIGHTH, 1)


def _behind_the_middle(profile: Profile) -> float:
    return profile.part(1 / 2, 1 / 2 + 1 / _EIGHTH)


def _last_quarter(profile: Profile) -> float:
    return profile.part(3 / 4, 1)


STATEMENTS = (
    Statement(
        QUANT,
        "4.3, F.3",
        "the first block is compressed most of all: below the least of the others",
        _block(0),
        lambda profile: min(profile.blocks[1:]),
        less=False,
    ),
    Statement(QUANT, "F.3", "the first block is compressed more than the average", _block(0), less=False),
    Statement(QUANT, "4.3, F.3", "the second block is compressed less than the average", _block(1)),
    Statement(QUANT, "4.3, F.3", "the last block is compressed less than the average", _block(-1)),
    Statement(QUANT, "F.3", "the last block but one is compressed less than the average", _block(-2)),
    Statement(QUANT, "F.3", "v_proj gets more bits than the average", _kind("v_proj"), needs="v_proj"),
    Statement(SPARSITY, "4.3", "the first block is pruned less than the average", _block(0)),
    Statement(SPARSITY, "4.2, E.2", "the first eighth of the blocks is pruned less than the rest", _first_eighth, _after_it),
    Statement(SPARSITY, "4.2", "the eighth behind the middle is pruned more than the average", _behind_the_middle, less=False),
    Statement(
        SPARSITY, "4.2", "the last quarter is pruned less than the eighth behind the middle", _last_quarter, _behind_the_middle
    ),
    Statement(SPARSITY, "4.2, E.2", "v_proj is pruned less than the average", _kind("v_proj"), needs="v_proj"),
    Statement(SPARSITY, "E.2", "q_proj is pruned more than the average", _kind("q_proj"), less=False, needs="q_proj"),
)
