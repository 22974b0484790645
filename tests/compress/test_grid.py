import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from evopress.compress.grid import ZERO_LIMIT, fit_grid, from_codes, round_in_place, to_codes


def round_trip(w: Tensor, bits: int, dtype: torch.dtype = torch.float16) -> Tensor:
    """Fit a grid to the rows of w [R, g] and round them to it."""
    maxq = torch.full((len(w),), 2.0**bits - 1)
    grid = fit_grid(w.amin(1), w.amax(1), maxq, scale_dtype=dtype)
    return torch.stack([from_codes(to_codes(column, grid, maxq), grid) for column in w.T], dim=1)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_error_is_at_most_half_a_step_inside_the_range_and_a_step_at_its_ends(bits, dtype):
    w = torch.randn(64, 16, generator=torch.Generator().manual_seed(bits))
    step = (w.amax(1) - w.amin(1)) / (2**bits - 1)
    error = (round_trip(w, bits, dtype) - w).abs()
    assert (error <= step[:, None] * 1.01).all()  # the zero is rounded, which shifts the grid by up to half a step
    inside = (w > (w.amin(1) + step)[:, None]) & (w < (w.amax(1) - step)[:, None])
    assert (error <= step[:, None] * 0.51)[inside].all()


@pytest.mark.parametrize("value", [0.0, 1.0, -1.0, 0.125, -3.5, 1000.0])
@pytest.mark.parametrize("bits", [1, 2, 8])
def test_a_group_of_equal_values_is_kept(value, bits):
    w = torch.full((3, 8), value)
    assert torch.equal(round_trip(w, bits), w)


def test_equal_values_that_float16_does_not_have_are_kept_to_its_precision():
    w = torch.full((1, 8), 0.1)
    assert torch.equal(round_trip(w, 2), w.half().float())
    assert torch.equal(round_trip(w, 2, torch.float32), w)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("offset", [1.0, -1.0, 100.0, -100.0])
@pytest.mark.parametrize("width", [1e-1, 1e-3, 1e-6])
def test_far_off_narrow_ranges_stay_close(bits, offset, width):
    w = offset + torch.linspace(0, width, 16).reshape(1, -1)
    maxq = torch.tensor([2.0**bits - 1])
    grid = fit_grid(w.amin(1), w.amax(1), maxq)
    assert grid.zero.abs().max() <= ZERO_LIMIT
    # Either the grid resolves the range, or the range was widened to contain 0 and a value is off by half of the wide step.
    wide = (abs(offset) + width) / float(maxq)
    narrow = width / float(maxq)
    error = float((round_trip(w, bits) - w).abs().max())
    assert error <= max(narrow, wide if abs(offset) > narrow * ZERO_LIMIT / 2 else narrow) * 1.01 + abs(offset) * 1e-6


def test_scales_below_the_normal_numbers_of_float16_still_span_the_group():
    w = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)) * 2e-4  # 6 bits: a step of 2e-5
    error = (round_trip(w, 6) - w).abs().amax()
    step = float((w.amax(1) - w.amin(1)).max()) / 63
    assert error <= 1.1 * step


def test_scales_never_reach_zero_or_infinity():
    low = torch.tensor([0.0, -1e-30, -6e4, 5e5])
    high = torch.tensor([1e-30, 1e-30, 6e4, 1e6])
    grid = fit_grid(low, high, torch.full((4,), 1.0))
    assert torch.isfinite(grid.scale).all() and (grid.scale > 0).all()
    assert torch.equal(grid.scale, grid.scale.half().float())
    assert (grid.zero.abs() <= ZERO_LIMIT).all()


@given(
    values=st.lists(st.floats(-1e4, 1e4, width=32), min_size=2, max_size=12),
    bits=st.integers(1, 8),
    dtype=st.sampled_from([torch.float16, torch.float32]),
)
@settings(max_examples=150, deadline=None)
def test_any_group_has_storable_scales_codes_in_range_and_an_exact_zero_where_it_contains_zero(values, bits, dtype):
    w = torch.tensor([[*values, 0.0]])
    maxq = torch.tensor([2.0**bits - 1])
    grid = fit_grid(w.amin(1), w.amax(1), maxq, scale_dtype=dtype)
    assert torch.equal(grid.scale, grid.scale.to(dtype).float())
    assert torch.equal(grid.zero, grid.zero.to(torch.int16).float())
    codes = torch.stack([to_codes(column, grid, maxq) for column in w.T])
    assert (codes >= 0).all() and (codes <= maxq).all() and torch.equal(codes, codes.round())
    assert float(round_trip(w, bits, dtype)[0, -1]) == 0.0


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rounding_in_place_is_rounding(bits):
    W = torch.randn(6, 500, generator=torch.Generator().manual_seed(bits))
    maxq = torch.full((500,), 2.0**bits - 1)
    grid = fit_grid(W[:4].amin(0), W[:4].amax(0), maxq)  # the last two rows may lie outside
    for w in W:
        before, steps, error = w.clone(), torch.empty(500), torch.empty(500)
        round_in_place(w, grid.scale, -grid.zero, maxq - grid.zero, steps=steps, error=error)
        assert torch.equal(w, before)
        assert torch.equal(steps + grid.zero, to_codes(w, grid, maxq))
        torch.testing.assert_close(error, w - from_codes(to_codes(w, grid, maxq), grid), rtol=0, atol=2e-7 * float(W.abs().max()))
