"""Read which modules a file drops in the format of the authors' code: one word per block. Standard library only."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from evopress.currencies import num_modules
from evopress.errors import EvoPressError
from evopress.json_files import shown
from evopress.units import Space, Unit

WORDS = {
    "none": frozenset(),
    "attn": frozenset({"attention"}),
    "mlp": frozenset({"mlp"}),
    "attn+mlp": frozenset({"attention", "mlp"}),
}
"""What a word drops, by the kinds of the modules."""
_BOTH = WORDS["attn+mlp"]


def is_words(text: str) -> bool:
    """Tell whether a text is one word per block, and not `name: level` lines."""
    return bool(text.split()) and text.split()[0] in WORDS


def levels_of_words(path: Path, text: str, space: Space) -> Iterator[tuple[str, int]]:
    """Yield name and level of every unit.

    Raises: EvoPressError if a word is unknown, their number is not that of the blocks, or the method's units cannot be dropped so.
    """
    if not all(num_modules(unit) for unit in space.units):
        raise EvoPressError(f"{path} names dropped modules but this run's method is {space.method}: use it with +method=drop")
    words = text.split()
    blocks = max(unit.block + _width(unit) for unit in space.units)
    for number, word in enumerate(words, start=1):
        if word not in WORDS:
            raise EvoPressError(f"word {number} of {path} is {shown(word)}: expected one of {', '.join(WORDS)} for each block")
    if len(words) != blocks:
        raise EvoPressError(f"{path} has {len(words)} words, one per block, but the model has {blocks}: use a file of this model")
    for unit in space.units:
        dropped = [WORDS[word] for word in words[unit.block : unit.block + _width(unit)]]
        if unit.kind in _BOTH:
            drop = unit.kind in dropped[0]
        elif set(dropped) <= {_BOTH, WORDS["none"]} and len(set(dropped)) == 1:
            drop = dropped[0] == _BOTH
        else:
            said = " ".join(words[unit.block : unit.block + _width(unit)])
            raise EvoPressError(
                f"{path} says {said!r} of {unit.name}, which can only be dropped whole here: use method.granularity=module"
            )
        if drop and len(unit.levels) == 1:
            raise EvoPressError(f"{path} drops {unit.name}, which method.exclude keeps: exclude less, or use another file")
        yield unit.name, int(drop)


def _width(unit: Unit) -> int:
    """Return how many blocks a unit spans."""
    return 2 if unit.kind == "pair" else 1
