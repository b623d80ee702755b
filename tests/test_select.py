"""select_random and select_strided on every backend against their definitions."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from cases import FLOATS, array, assert_same_bits, bits, normal, ragged, uniform
from contract import OperatorContract
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vmtc_kernels import SelectedTokens, select_random, select_strided

BOTH = pytest.mark.parametrize("select", [select_random, select_strided])


class TestSelectRandom(OperatorContract):
    op = "select_random"


class TestSelectStrided(OperatorContract):
    op = "select_strided"


def strided_positions(valid: np.ndarray, count: int) -> list[int]:
    position, R = np.flatnonzero(valid), int(valid.sum())
    kept = min(count, R)
    return [int(position[(2 * m + 1) * R // (2 * kept)]) for m in range(kept)]


def mix(h: int) -> int:
    h = (h ^ h >> 16) * 0x85EBCA6B % 2**32
    h = (h ^ h >> 13) * 0xC2B2AE35 % 2**32
    return h ^ h >> 16


def random_positions(valid: np.ndarray, count: int, seed: int = 0) -> list[int]:
    position = np.flatnonzero(valid).tolist()
    return sorted(sorted(position, key=lambda i: mix((i + mix(seed)) % 2**32))[:count])


def assert_selected(got: SelectedTokens, x: Tensor, positions: list[list[int]]) -> None:
    M = got.positions.shape[1]
    assert got.positions.dtype == torch.int32 and got.tokens.dtype == x.dtype
    assert got.tokens.shape == (len(x), M, x.shape[2])
    for b, kept in enumerate(positions):
        assert got.positions[b].tolist() == kept + [-1] * (M - len(kept))
        assert_same_bits(got.tokens[b, : len(kept)], x[b, kept])
        assert (bits(got.tokens[b, len(kept) :]) == 0).all()


@given(st.data())
def test_agrees_with_the_definition(backend: str, data: st.DataObject) -> None:
    B, N, D, M = (
        data.draw(st.integers(low, high)) for low, high in [(0, 4), (0, 99), (1, 20), (1, 50)]
    )
    x = normal(B, N, D, dtype=data.draw(st.sampled_from(FLOATS)), seed=N)
    valid = uniform(B, N, seed=N) < data.draw(st.floats(0, 1))
    seed = data.draw(st.integers(0, 2**32 - 1))
    mask = array(valid)
    assert_selected(
        select_strided(x, M, valid=valid), x, [strided_positions(row, M) for row in mask]
    )
    assert_selected(
        select_random(x, M, seed=seed, valid=valid),
        x,
        [random_positions(row, M, seed) for row in mask],
    )


@pytest.mark.parametrize("N", [1, 2, 7, 33, 97, 577])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_count(backend: str, dtype: torch.dtype, N: int) -> None:
    x, everyone = normal(2, N, 3, dtype=dtype), np.ones(N, bool)
    for M in {1, max(N // 3, 1), N}:
        assert_selected(select_strided(x, M), x, [strided_positions(everyone, M)] * 2)
        assert_selected(select_random(x, M), x, [random_positions(everyone, M)] * 2)


@BOTH
def test_unfilled_slots(backend: str, select: Callable[..., SelectedTokens]) -> None:
    x = normal(4, 9, 3)
    valid = torch.arange(9)[None] < torch.tensor([0, 1, 3, 9])[:, None]
    got = select(x, 20, valid=valid)
    assert_selected(got, x, [[], [0], [0, 1, 2], list(range(9))])
    assert_selected(select(x[:, :0], 2, valid=valid[:, :0]), x, [[], [], [], []])


@BOTH
def test_bits_are_kept(backend: str, select: Callable[..., SelectedTokens]) -> None:
    pattern = torch.randint(-(2**15), 2**15 - 1, (1, 64, 9), dtype=torch.int16)
    pattern[..., 0] = -1
    for dtype in (torch.float16, torch.bfloat16):
        x = pattern.view(dtype)
        got = select(x, 20)
        assert_same_bits(got.tokens[0], x[0, got.positions[0].long()])


@BOTH
def test_tokens_that_are_not_valid_do_not_matter(
    backend: str, select: Callable[..., SelectedTokens]
) -> None:
    x, valid = normal(3, 33, 4), ragged(3, 33)
    want = select(x, 12, valid=valid)
    assert_same_bits(select(torch.where(valid[..., None], x, torch.nan), 12, valid=valid), want)
    more = torch.cat([x, torch.full((3, 9, 4), torch.inf)], 1)
    mask = torch.cat([valid, torch.zeros(3, 9, dtype=torch.bool)], 1)
    assert_same_bits(select(more, 12, valid=mask), want)


@BOTH
def test_gradient_goes_to_the_selected_tokens(
    backend: str, select: Callable[..., SelectedTokens]
) -> None:
    x = normal(2, 33, 4).requires_grad_()
    valid = torch.arange(33)[None] < torch.tensor([33, 3])[:, None]
    got = select(x, 5, valid=valid)
    weight = 1 + uniform(2, 5, 4)
    (got.tokens * weight).sum().backward()
    wanted = torch.zeros(2, 33, 4)
    for b in range(2):
        for slot, position in enumerate(got.positions[b].tolist()):
            if position >= 0:
                wanted[b, position] = weight[b, slot]
    assert torch.equal(x.grad, wanted)


def test_a_seed_is_a_draw(backend: str) -> None:
    x = normal(2, 97, 3)
    draws = [select_random(x, 20, seed=seed).positions for seed in (0, 0, 1, 2**32 - 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2]) and not torch.equal(draws[0], draws[3])
    assert torch.equal(draws[0][0], draws[0][1])
    assert (draws[0].diff() > 0).all() and draws[0].min() >= 0 and draws[0].max() < 97


def test_a_larger_draw_holds_the_smaller_one(backend: str) -> None:
    x = normal(1, 97, 3)
    draws = [set(select_random(x, M, seed=5).positions[0].tolist()) for M in range(1, 98, 8)]
    assert all(small < large for small, large in pairwise(draws))


def test_every_position_is_drawn_alike(backend: str) -> None:
    x, valid = normal(1, 18, 1), torch.arange(18)[None] % 9 != 4
    seeds, N, M = 800, 16, 4
    drawn = [select_random(x, M, seed=seed, valid=valid).positions[0] for seed in range(seeds)]
    count = torch.bincount(torch.cat(drawn).cpu(), minlength=18)[valid[0].cpu()]
    share = M / N
    assert count.sum() == seeds * M
    # five standard deviations
    assert (count - seeds * share).abs().max() < 5 * (seeds * share * (1 - share)) ** 0.5


def test_float64_is_left_to_the_reference() -> None:
    x, everyone = normal(2, 33, 3, dtype=torch.float64), np.ones(33, bool)
    assert_selected(select_strided(x, 5), x, [strided_positions(everyone, 5)] * 2)
    assert_selected(select_random(x, 5), x, [random_positions(everyone, 5)] * 2)
