import math

import pytest

from evopress.errors import EvoPressError
from evopress.search import Stage, check_stages, select_fittest

GENOMES = [(0,), (1,), (2,), (3,), (4,)]


def test_the_lowest_fitnesses_win_best_first():
    assert select_fittest(GENOMES, [5.0, 1.0, 4.0, 2.0, 3.0], 3) == [1, 3, 4]


def test_nan_and_infinity_come_last_in_order():
    assert select_fittest(GENOMES, [math.nan, math.inf, 2.0, math.nan, 1.0], 5) == [4, 2, 0, 1, 3]


def test_of_equals_the_first_wins():
    assert select_fittest(GENOMES, [2.0, 1.0, 1.0, 1.0, 2.0], 2) == [1, 2]


def test_fewer_candidates_than_survivors_all_go_on():
    assert select_fittest(GENOMES[:2], [2.0, 1.0], 4) == [1, 0]


def test_one_fitness_for_each_genome():
    with pytest.raises(ValueError, match="zip"):
        select_fittest(GENOMES, [1.0], 1)


@pytest.mark.parametrize(
    "stages",
    [
        (Stage(2048, 16), Stage(16384, 4), Stage(131072, 1)),
        (Stage(512, 1), Stage(8192, 1)),
        (Stage(1, 1),),
    ],
)
def test_the_papers_stages_are_accepted(stages):
    check_stages(stages, 16)


@pytest.mark.parametrize(
    ("stages", "sentence"),
    [
        ((), "no stage"),
        ((Stage(8, 2),), r"survivors are \[2\]"),
        ((Stage(8, 0), Stage(8, 1)), r"survivors are \[0, 1\]"),
        ((Stage(8, 2), Stage(8, 4), Stage(8, 1)), "descend to 1"),
        ((Stage(0, 1),), r"tokens are \[0\]"),
        ((Stage(8, 17), Stage(8, 1)), "17 survivors of 16 offspring"),
    ],
)
def test_stages_that_do_not_descend_to_one_are_refused(stages, sentence):
    with pytest.raises(EvoPressError, match=sentence):
        check_stages(stages, 16)
