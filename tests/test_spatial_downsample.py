"""spatial_downsample on every backend against its definition."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
from cases import FLOATS, array, assert_close, assert_same_bits, normal
from contract import OperatorContract
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vmtc_kernels import spatial_downsample, use_backend


class TestContract(OperatorContract):
    op = "spatial_downsample"
    # the schema has a fixed grid: another one is another graph
    dynamic_sizes = ((7, 36), (2, 36), (3, 36))


def expected(x: Tensor, grid: tuple[int, int], factor: int) -> np.ndarray:
    return np.stack([oracle.spatial_downsample(image, grid, factor) for image in array(x)])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("D", [1, 17, 257])
@pytest.mark.parametrize(
    ("grid", "factor"),
    [((1, 1), 1), ((4, 6), 2), ((5, 7), 2), ((7, 5), 3), ((1, 9), 4), ((3, 4), 9), ((24, 24), 5)],
)
def test_agrees_with_the_definition(
    backend: str, grid: tuple[int, int], factor: int, D: int, dtype: torch.dtype
) -> None:
    x = normal(3, grid[0] * grid[1], D, dtype=dtype)
    got = spatial_downsample(x, grid, factor)
    assert (got.shape[1], got.dtype) == (-(-grid[0] // factor) * -(-grid[1] // factor), dtype)
    assert_close(got, expected(x, grid, factor))


@given(st.data())
def test_any_grid(backend: str, data: st.DataObject) -> None:
    B, *grid, D, factor = (data.draw(st.integers(low, 12)) for low in (0, 1, 1, 1, 1))
    dtype = data.draw(st.sampled_from(FLOATS))
    x = normal(B, grid[0] * grid[1], D, dtype=dtype, seed=D)
    got = spatial_downsample(x, grid, factor)
    assert got.dtype == dtype
    if B:
        assert_close(got, expected(x, tuple(grid), factor))
    else:
        assert got.shape == (0, -(-grid[0] // factor) * -(-grid[1] // factor), D)


def test_float64_agrees_with_the_definition() -> None:
    x = normal(2, 35, 4, dtype=torch.float64)
    with use_backend("reference"):
        assert_close(spatial_downsample(x, (5, 7), 3), expected(x, (5, 7), 3))


def test_cells_are_row_major_and_the_last_ones_smaller(backend: str) -> None:
    x = torch.arange(1.0, 7.0).view(1, 6, 1)
    assert spatial_downsample(x, (2, 3), 2).flatten().tolist() == [3.0, 4.5]
    assert spatial_downsample(x, (3, 2), 2).flatten().tolist() == [2.5, 5.5]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_factor_one_keeps_every_finite_token(backend: str, dtype: torch.dtype) -> None:
    x = normal(2, 12, 5, dtype=dtype)
    assert_same_bits(spatial_downsample(x, (3, 4), 1), x)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_factor_beyond_both_sides_is_the_mean(backend: str, dtype: torch.dtype) -> None:
    x = normal(2, 12, 5, dtype=dtype)
    for factor in (4, 5, 1000):
        assert_close(spatial_downsample(x, (3, 4), factor), array(x).mean(1, keepdims=True))


def test_a_factor_beyond_32_bits(backend: str) -> None:
    x = normal(1, 12, 5)
    for factor in (2**31, 2**40, 2**62):
        assert_close(spatial_downsample(x, (3, 4), factor), array(x).mean(1, keepdims=True))


def test_large_values_do_not_overflow_in_half_precision(backend: str) -> None:
    x = torch.full((1, 576, 3), 6e4, dtype=torch.float16)
    assert_same_bits(spatial_downsample(x, (24, 24), 24), x[:, :1])


def test_a_token_that_is_not_finite_spoils_only_its_cell(backend: str) -> None:
    x = normal(1, 36, 4)
    want = spatial_downsample(x, (6, 6), 2)
    x[0, 14, 1] = torch.nan
    got = spatial_downsample(x, (6, 6), 2)
    assert got[0, 4, 1].isnan() and got.isnan().sum() == 1
    assert_same_bits(got[~got.isnan()], want[~got.isnan()])


def test_scaling_and_permuting_features(backend: str) -> None:
    x = normal(2, 35, 8)
    want = spatial_downsample(x, (5, 7), 2)
    assert_same_bits(spatial_downsample(x * 16, (5, 7), 2), want * 16)
    assert_same_bits(spatial_downsample(x.flip(2), (5, 7), 2), want.flip(2))
