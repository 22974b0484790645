import math

import pytest

from evopress.errors import EvoPressError
from evopress.search.selection import check_stages, select_fittest

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
    ("tokens", "survivors"),
    [
        ([2048, 16384, 131072], [16, 4, 1]),
        ([512, 8192], [1, 1]),
        ([1], [1]),
    ],
)
def test_the_papers_stages_are_accepted(tokens, survivors):
    check_stages(tokens, survivors, 16)


@pytest.mark.parametrize(
    ("tokens", "survivors", "sentence"),
    [
        ([], [], "no stage"),
        ([8], [2, 1], "differ in length"),
        ([8], [2], r"survivors are \[2\]"),
        ([8, 8], [0, 1], r"survivors are \[0, 1\]"),
        ([8, 8, 8], [2, 4, 1], "descend to 1"),
        ([0], [1], r"tokens are \[0\]"),
        ([8, 8], [17, 1], "17 survivors of 16 offspring"),
    ],
)
def test_stages_that_do_not_descend_to_one_are_refused(tokens, survivors, sentence):
    with pytest.raises(EvoPressError, match=sentence):
        check_stages(tokens, survivors, 16)
