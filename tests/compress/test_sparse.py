import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evopress.compress import sparse
from evopress.compress.magnitude import Magnitude
from evopress.compress.sparse import PruneTo, Sparse, SparsityLevels, check_step, derive_step, distribute, kept_at, lowest
from evopress.compress.sparsegpt import SparseGPT
from evopress.compress.wanda import Wanda
from evopress.errors import EvoPressError
from evopress.search.mutation import LevelSwitch
from evopress.units import Budget, Space, Unit


def space_of(levels: SparsityLevels, shapes) -> Space:
    return Space("sparsity", tuple(Unit(f"u{i}", 0, "w", r * c, levels.levels((r, c))) for i, (r, c) in enumerate(shapes)))


def test_levels_are_a_step_apart_around_the_target_least_compressed_first():
    levels = SparsityLevels(sparsity=0.7, step=100, num_levels=3, dtype_bits=16).levels((40, 50))
    assert [level.key for level in levels] == ["-3", "-2", "-1", "0", "1", "2", "3"]
    assert [level.cost for level in levels] == [900, 800, 700, 600, 500, 400, 300]
    assert [level.label for level in levels][2:5] == ["65.0%", "70.0%", "75.0%"]
    assert levels[3].stored_bits == 2000 + 600 * 16


def test_levels_end_where_a_unit_is_whole_or_empty():
    assert SparsityLevels(sparsity=0.5, step=50).kept(200) == (200, 150, 100, 50, 0)  # the authors' floats lose such ends
    assert SparsityLevels(sparsity=0.7, step=50).kept(200) == (160, 110, 60, 10)
    assert SparsityLevels(sparsity=0.7, step=1000).kept(200) == (60,)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 5000), min_size=1, max_size=12),
    sparsity=st.floats(0.01, 0.99),
    step=st.integers(1, 700),
    num_levels=st.integers(1, 9),
)
def test_every_unit_has_its_target_and_equal_steps_within_its_size(sizes, sparsity, step, num_levels):
    ladder = SparsityLevels(sparsity=sparsity, step=step, num_levels=num_levels)
    for size in sizes:
        kept = ladder.kept(size)
        assert kept[list(ladder.signed_levels(size)).index(0)] == size - round(sparsity * size)
        assert all(a - b == step for a, b in itertools.pairwise(kept))
        assert 0 <= kept[-1] <= kept[0] <= size
        # No level is left out that would fit.
        assert ladder.signed_levels(size)[0] == -num_levels or kept[0] + step > size
        assert ladder.signed_levels(size)[-1] == num_levels or kept[-1] - step < 0


@pytest.mark.parametrize("exchange", ["any", "size"])
def test_any_switch_keeps_the_sum_of_kept_weights(exchange):
    shapes = [(24, 24), (8, 24), (8, 24), (64, 24), (24, 64), (64, 24)]
    sizes = [r * c for r, c in shapes]
    step = derive_step(sizes, 0.6, 4)
    space = space_of(SparsityLevels(sparsity=0.6, step=step, num_levels=4), shapes)
    genome = tuple([level.key for level in unit.levels].index("0") for unit in space.units)
    total = sum(kept_at(size, 0.6) for size in sizes)
    assert space.cost(genome) == total
    mutation = LevelSwitch(space, Budget(total, 0.6, "sparsity"), exchange=exchange)
    rng = np.random.default_rng(0)
    seen = {genome}
    for _ in range(200):
        genome = mutation(genome, rng)
        assert space.cost(genome) == total
        seen.add(genome)
    assert len(seen) > 100


def test_the_middle_unit_has_all_levels_over_half_the_room():
    sizes = [110_592, 110_592, 331_776, 331_776, 884_736, 884_736, 884_736]
    step = derive_step(sizes, 0.5, 8)
    assert step == 10_368  # the authors' default for this model
    ladder = SparsityLevels(sparsity=0.5, step=step, num_levels=8)
    assert [len(ladder.kept(size)) for size in (110_592, 331_776, 884_736)] == [11, 17, 17]
    assert derive_step([3, 5], 0.5, 8) == 1


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sparsity": 0.0}, "sparsity=0 "),
        ({"sparsity": 1.0}, "between 0 and 1"),
        ({"step": 0}, "step=0"),
        ({"num_levels": 0}, "num_levels"),
    ],
)
def test_settings_out_of_range_are_refused(changed, message):
    with pytest.raises(EvoPressError, match=message):
        SparsityLevels(**({"sparsity": 0.5, "step": 10} | changed))


def test_a_step_that_no_unit_can_take_is_refused():
    check_step([100, 1000], sparsity=0.7, step=300)
    with pytest.raises(EvoPressError, match="at most 300"):
        check_step([100, 1000], sparsity=0.7, step=301)


@pytest.mark.parametrize("sparsity", [0.0001, 0.9999])
def test_a_sparsity_that_prunes_or_keeps_nothing_is_refused(sparsity):
    with pytest.raises(EvoPressError, match=r"largest unit \(1000 weights\) a weight to keep and one to prune"):
        check_step([100, 1000], sparsity=sparsity, step=1)


@pytest.mark.parametrize("pruner", [SparseGPT, Wanda, Magnitude])
def test_chosen_counts_are_pruned_as_the_ladder_would(pruner):
    """A level at a count of one's own is the ladder's level of that count, whatever the ladder's target."""
    generator = torch.Generator().manual_seed(0)
    weights = {"a": torch.randn(8, 24, generator=generator), "b": torch.randn(5, 24, generator=generator)}
    X = torch.randn(200, 24, generator=generator) @ torch.randn(24, 24, generator=generator)
    H = X.T @ X / 100
    ladder = pruner(sparsity=0.5, step=16, num_levels=2, dtype_bits=32)
    kept = {"a": [112, 96, 80], "b": [60, 44]}
    chosen = PruneTo(pruner=pruner(sparsity=0.9, step=3, dtype_bits=32), kept=kept)
    other = PruneTo(pruner=ladder, kept=kept)
    assert chosen.settings() == other.settings() != ladder.settings()
    assert not {"sparsity", "step", "num_levels"} & set(chosen.settings())
    assert chosen.settings()["compressor"] == pruner.__name__.lower()
    assert [(level.cost, level.key) for level in chosen.levels((5, 24), unit="b")] == [(60, "60"), (44, "44")]
    assert chosen.levels((8, 24), unit="a")[0].stored_bits == 192 + 112 * 32
    results, expected = chosen.compress(weights, H), ladder.compress(weights, H)
    for name, size in (("a", 192), ("b", 120)):
        by_count = dict(zip(ladder.kept(size), expected[name], strict=True))
        for count, result in zip(kept[name], results[name], strict=True):
            assert torch.equal(result.payload.mask, by_count[count].payload.mask)
            torch.testing.assert_close(result.payload.values, by_count[count].payload.values, rtol=1e-5, atol=1e-6)


@given(st.integers(0, 10_000), st.lists(st.integers(1, 500), min_size=1, max_size=30))
def test_shares_add_up_and_stay_within_their_parts(total, sizes):
    total = min(total, sum(sizes))
    shares = distribute(total, sizes)
    assert sum(shares) == total
    for share, size in zip(shares, sizes, strict=True):
        assert 0 <= share <= size
        assert abs(share - total * size / sum(sizes)) < 1


@settings(deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.data())
def test_lowest_marks_exactly_as_many_earlier_ones_first(values, data):
    count = data.draw(st.integers(0, len(values)))
    marked = lowest(torch.tensor(values, dtype=torch.float32), count)
    expected = sorted(range(len(values)), key=lambda i: (values[i], i))[:count]
    assert marked.nonzero().squeeze(1).tolist() == sorted(expected)


@pytest.mark.parametrize("run", [1, 7, 12, 2**22])  # less than a row, a row, a row and some of the next, all of them
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_are_kept_and_put_back_as_indexing_by_the_mask_does(run, share, dtype, monkeypatch):
    monkeypatch.setattr(sparse, "_RUN", run)
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(7, 5, generator=generator).T  # as sweeps leave it: not contiguous
    mask = torch.rand(5, 7, generator=generator) < share
    payload = Sparse.of(W, mask, dtype)
    assert torch.equal(payload.values, W[mask].to(dtype))
    assert torch.equal(payload.decode(), torch.zeros(5, 7, dtype=dtype).masked_scatter(mask, payload.values))


@pytest.mark.parametrize("run", [1, 7, 12, 2**22])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_s_way_to_keep_values_and_put_them_back_is_as_the_mask_does(run, share, dtype, monkeypatch):
    monkeypatch.setattr(sparse, "_RUN", run)
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(7, 5, generator=generator).T
    mask = torch.rand(5, 7, generator=generator) < share
    values = sparse._gathered(W, mask, dtype)
    assert torch.equal(values, W[mask].to(dtype))
    zeros = torch.zeros(5, 7, dtype=dtype)
    assert torch.equal(sparse._scattered(zeros.clone(), mask, values), zeros.masked_scatter(mask, values))


@settings(deadline=None)
@given(st.lists(st.floats(0, 3.0000000054977558e38, width=32), min_size=1, max_size=60), st.data())
def test_a_score_that_so_many_are_no_higher_than_is_found_by_its_bits(values, data):
    count = data.draw(st.integers(1, len(values)))
    found = sparse._bisected(torch.tensor(values), count)
    assert found.dtype == torch.float32 and float(found) == sorted(values)[count - 1]


def test_it_is_found_in_one_array_of_many_ties_and_of_none():
    generator = torch.Generator().manual_seed(0)
    for scores in (torch.rand(20_000, generator=generator), torch.randint(4, (20_000,), generator=generator).float()):
        for count in (1, 2, 9_999, 19_999, 20_000):
            assert float(sparse._bisected(scores, count)) == float(scores.sort().values[count - 1])


def test_a_kept_zero_stays_kept():
    payload = Sparse.of(torch.tensor([[0.0, 1.0], [2.0, -0.0]]), torch.tensor([[True, False], [True, True]]), torch.float32)
    assert payload.values.numel() == 3
    assert torch.signbit(payload.decode()).tolist() == [[False, False], [False, True]]
