from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
import torch

from evopress.levels.decoded import DecodedLevels

BLOCKS, UNITS, LEVELS = 32, 7, 6
WEIGHT = torch.empty(1, dtype=torch.uint8)
Asked = Iterator[tuple[int, tuple[int, int]]]
"""Part, and unit with level."""


def loads(asked: Asked, room: int) -> int:
    kept, count = DecodedLevels(room, BLOCKS), 0
    for part, key in asked:
        if kept.find(part, key) is None:
            kept.keep(key, WEIGHT)
            count += 1
    assert kept.num_bytes == sum(1 for _ in kept) <= room
    return count


def loads_without_the_least_recent(asked: Asked, room: int) -> int:
    kept: OrderedDict[tuple[int, int], None] = OrderedDict()
    count = 0
    for _, key in asked:
        count += key not in kept
        kept[key] = None
        kept.move_to_end(key)
        if len(kept) > room:
            kept.popitem(last=False)
    return count


def walk(genomes: Sequence[np.ndarray], parts: Sequence[int] = range(BLOCKS)) -> Asked:
    """Ask for some genomes' levels, part by part."""
    for part in parts:
        for genome in genomes:
            yield from ((part, (unit, int(genome[unit]))) for unit in range(part * UNITS, (part + 1) * UNITS))


def search(*, switches: int, offspring: int, taken: float, parts: Callable[[int], Sequence[int]], walks: int = 24) -> Asked:
    """Ask for a parent's levels and for those of its offspring, one of which is the next parent at times."""
    random = np.random.default_rng(0)
    parent = random.integers(LEVELS, size=BLOCKS * UNITS)
    for number in range(walks):
        genomes = [parent]
        for _ in range(offspring):
            genomes.append(parent.copy())
            genomes[-1][random.integers(len(parent), size=switches)] = random.integers(LEVELS, size=switches)
        yield from walk(genomes if offspring > 1 else genomes[-1:], parts(number))
        if random.random() < taken:
            parent = genomes[-1]


def forward(number: int) -> range:
    return range(BLOCKS)


def test_walks_with_room_for_half_load_the_other_half() -> None:
    genome = np.zeros(BLOCKS * UNITS, dtype=int)
    three = [loads((each for _ in range(number) for each in walk([genome])), 17 * UNITS) for number in (1, 2, 3)]
    assert three[0] == BLOCKS * UNITS
    assert np.diff(three).max() <= 16 * UNITS


@pytest.mark.parametrize("share", [0.25, 0.5, 0.9, 1.1])
@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        ({"switches": 1, "offspring": 1, "taken": 0.0}, forward),
        ({"switches": 1, "offspring": 1, "taken": 1.0}, forward),
        ({"switches": 30, "offspring": 1, "taken": 0.5}, forward),
        ({"switches": 4, "offspring": 16, "taken": 0.5}, forward),
        ({"switches": 1, "offspring": 1, "taken": 0.5}, lambda number: range(number, BLOCKS)),
        ({"switches": 1, "offspring": 1, "taken": 0.5}, lambda number: range(0 if number < 2 else 22, BLOCKS)),
    ],
    ids=["one switch, not kept", "one switch, kept", "many switches", "16 offspring", "ever fewer blocks", "the last ten blocks"],
)
def test_no_more_is_loaded_than_where_the_least_recent_goes_first(kind: dict, parts: Callable, share: float) -> None:
    room = int(share * BLOCKS * UNITS)
    found, before = (count(search(**kind, parts=parts), room) for count in (loads, loads_without_the_least_recent))
    assert found <= before
    if share == 0.9 and parts is forward:
        assert found < 0.6 * before


def test_what_a_whole_walk_has_not_asked_for_makes_room() -> None:
    old, new = np.zeros(BLOCKS * UNITS, dtype=int), np.ones(BLOCKS * UNITS, dtype=int)
    room = BLOCKS * UNITS
    walks = [old, old, new, new, new, new]
    counts = [loads((each for genome in walks[:number] for each in walk([genome])), room) for number in range(1, 7)]
    assert counts[-1] == counts[-2], "all of the new genome's are there, although the old one's had taken all room"
    assert counts[-1] <= 3 * BLOCKS * UNITS


def test_of_one_part_what_was_asked_for_last_stays() -> None:
    kept = DecodedLevels(2, 1)
    found = []
    for level in (0, 1, 0, 2, 0, 1):
        found.append(kept.find(0, (0, level)) is not None)
        if not found[-1]:
            kept.keep((0, level), WEIGHT)
    assert found == [False, False, True, False, True, False]


def test_what_is_larger_than_all_room_is_not_kept() -> None:
    kept = DecodedLevels(3, 1)
    kept.keep((0, 0), torch.empty(4, dtype=torch.uint8))
    assert kept.find(0, (0, 0)) is None and kept.num_bytes == 0
