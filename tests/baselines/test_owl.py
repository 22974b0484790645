import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from evopress.baselines.block_sparsity import block_sparsities, kept_in_blocks
from evopress.baselines.owl import GRID, outlier_ratios
from evopress.compress.sparse import kept_at
from evopress.errors import EvoPressError


def test_ratio_counts_scores_above_multiples_of_the_mean_of_the_whole_block():
    # Scores: nine of 1 and one of 2 · √100 = 20 here, two of 3 there; their mean is (9 + 20 + 6) / 12 = 2.92.
    first = torch.ones(2, 5)
    first[0, 1] = 2.0
    H = torch.diag(torch.tensor([1.0, 100.0, 1.0, 1.0, 1.0]))
    first[1, 1] = 0.1
    second = torch.full((1, 2), -3.0)
    ratios = outlier_ratios([first, second], [H, torch.eye(2)], [0.5, 1.0, 5.0, 7.0])
    assert ratios == [3 / 12, 3 / 12, 1 / 12, 0.0]


def test_sparsities_are_the_papers_formula():
    ratios = [0.04, 0.01, 0.02]
    got = block_sparsities(ratios, [[60, 40]] * 3, sparsity=0.7, lambda_=0.08)
    r = 2 * 0.08 * (np.array(ratios) - 0.01) / 0.03
    np.testing.assert_allclose(got, 0.7 - r + r.mean())
    assert got[0] < got[2] < got[1]
    assert max(got) - min(got) == pytest.approx(0.16)


def test_equal_ratios_or_no_lambda_are_uniform():
    assert block_sparsities([0.1, 0.1], [[7], [9]], sparsity=0.6, lambda_=0.2) == pytest.approx([0.6, 0.6])
    assert block_sparsities([0.1, 0.3], [[7], [9]], sparsity=0.6, lambda_=0.0) == pytest.approx([0.6, 0.6])


def test_clipped_sparsities_still_average_the_target():
    sizes = [[100, 100]] * 4
    low = block_sparsities([1.0, 0.0, 0.0, 0.0], sizes, sparsity=0.05, lambda_=0.2)
    assert low == pytest.approx([0.0, 0.2 / 3, 0.2 / 3, 0.2 / 3])
    high = block_sparsities([0.0, 1.0, 1.0, 1.0], sizes, sparsity=0.95, lambda_=0.2)
    assert high == pytest.approx([0.99, *[(3.8 - 0.99) / 3] * 3])


@settings(max_examples=80, deadline=None)
@example(blocks=[(0.0, [20]), (0.5, [20, 20, 20, 20])], sparsity=0.125, lambda_=0.5)
@given(
    blocks=st.lists(st.tuples(st.floats(0, 0.5), st.lists(st.integers(20, 3000), min_size=1, max_size=4)), min_size=1, max_size=10),
    sparsity=st.floats(0.02, 0.94),
    lambda_=st.floats(0, 0.5),
)
def test_the_model_keeps_exactly_what_uniform_sparsity_keeps(blocks, sparsity, lambda_):
    ratios, sizes = [ratio for ratio, _ in blocks], [block for _, block in blocks]
    sparsities = block_sparsities(ratios, sizes, sparsity=sparsity, lambda_=lambda_)
    weights = [sum(block) for block in sizes]
    assert all(0.0 <= s < 1.0 for s in sparsities)
    assert np.average(sparsities, weights=weights) == pytest.approx(sparsity, abs=1e-9)
    kept = kept_in_blocks(ratios, sizes, sparsity=sparsity, lambda_=lambda_)
    assert sum(map(sum, kept)) == sum(kept_at(size, sparsity) for block in sizes for size in block)
    full = sum(count == size for block, counts in zip(sizes, kept, strict=True) for size, count in zip(block, counts, strict=True))
    for s, block, counts in zip(sparsities, sizes, kept, strict=True):
        for size, count in zip(block, counts, strict=True):
            assert 0 <= count <= size
            assert abs(count - (1 - s) * size) <= 2 + full / 2, "others keep what rounding would give to units that are full"


def test_the_papers_grid():
    assert len(GRID) == 20
    assert GRID[0] == (0.02, 3.0) and GRID[1] == (0.02, 5.0) and GRID[-1] == (0.2, 10.0)


@pytest.mark.parametrize(
    ("ratios", "sparsity", "lambda_", "message"),
    [
        ([0.1, 0.2], 0.5, -0.1, "lambda"),
        ([0.1], 0.5, 0.1, "2 blocks"),
        ([0.1, float("nan")], 0.5, 0.1, "finite"),
        ([0.1, 0.2], 0.999, 0.1, "at most"),
    ],
)
def test_bad_input_is_refused(ratios, sparsity, lambda_, message):
    with pytest.raises(EvoPressError, match=message):
        block_sparsities(ratios, [[10], [10]], sparsity=sparsity, lambda_=lambda_)


@pytest.mark.parametrize("target", [0.3, 0.5, 0.71])
def test_units_that_are_tied_keep_the_same(target):
    """Experts of a block: what is missing goes to all of them, to others, or stays missing."""
    sizes = [[100, 101, 333, 333, 333], [100, 101, 333, 333, 333]]
    tied = [(2, 3, 4), (7, 8, 9)]
    whole = sum(kept_at(size, target) for block in sizes for size in block)
    kept = kept_in_blocks([0.2, 0.5], sizes, sparsity=target, lambda_=0.1, tied=tied)
    assert all(len(set(block[2:])) == 1 for block in kept)
    assert whole - 2 <= sum(map(sum, kept)) <= whole
    alone = kept_in_blocks([0.2, 0.5], sizes, sparsity=target, lambda_=0.1)
    assert all(abs(a - b) <= 2 for one, other in zip(kept, alone, strict=True) for a, b in zip(one, other, strict=True))
    experts_alone = kept_in_blocks([0.2], [[333] * 3], sparsity=target, lambda_=0.1, tied=[(0, 1, 2)])
    assert 3 * kept_at(333, target) - 2 <= sum(experts_alone[0]) <= 3 * kept_at(333, target)
