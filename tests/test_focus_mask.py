"""focus_mask on every backend against its definition: exactly, as it compares and counts."""

from __future__ import annotations

from typing import Any

import focus_oracle as oracle
import numpy as np
import pytest
import torch
from cases import FLOATS, array, assert_same_bits, normal, some, uniform
from contract import ConstantContract
from hypothesis import given
from hypothesis import strategies as st
from sequences import positions_of, sequences, unpacked
from torch import Tensor

from vmtc_kernels import focus_mask, use_backend


class TestContract(ConstantContract):
    op = "focus_mask"


def expected(
    scores: Tensor, modality: Tensor, query_positions: Tensor | None = None, **options: Any
) -> np.ndarray:
    """bool [B, M, Lq, I]."""
    places = positions_of(
        {"modality": modality, "query_positions": query_positions}, scores.shape[2]
    )
    rows = zip(array(scores), array(modality), places, strict=True)
    return np.stack([oracle.inhibited(*row, **options) for row in rows])


RULES: list[dict[str, Any]] = [
    {"keep_ratio": 0.25},
    {"keep_ratio": 0.07},
    {"keep_ratio": 1.0},
    {"keep_ratio": 1e-6, "min_keep": 5},
    {"keep_ratio": 0.5, "min_keep": 1000},
    {"threshold": 0.5},
    {"threshold": 0.0},
    {"threshold": 0.99, "min_keep": 4},
]


@pytest.mark.parametrize("options", RULES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_agrees_with_the_definition(
    backend: str, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    # of half types many scores are equal
    for M, L, num_image in ((1, 30, 15), (2, 41, 70), (1, 130, 100)):
        batch = some(backend, 8)
        scores, modality = (
            uniform(batch, M, L, num_image, dtype=dtype),
            sequences(batch, L, first=M),
        )
        got = focus_mask(scores, modality, **options)
        assert (got.dtype, got.shape) == (torch.int32, (batch, M, L, -(-num_image // 32)))
        want = expected(scores, modality, **options)
        assert np.array_equal(unpacked(got, 32 * got.shape[-1])[..., :num_image], want)
        assert not unpacked(got, 32 * got.shape[-1])[..., num_image:].any()


def test_the_share_is_a_product_in_float64(backend: str) -> None:
    """0.07 * 100 is a little more than 7, and 0.29 * 100 a little less than 29."""
    modality = torch.tensor([[2] * 100 + [1]], dtype=torch.uint8)
    for ratio, kept in ((0.07, 8), (0.29, 29), (0.5, 50), (0.1, 10)):
        got = focus_mask(uniform(1, 1, 1, 100), modality, keep_ratio=ratio)
        assert (~unpacked(got, 100)).sum() == kept


@given(st.data())
def test_any_shape(backend: str, data: st.DataObject) -> None:
    B, M, L = (data.draw(st.integers(low, 9)) for low in (0, 1, 1))
    num_image, queries = data.draw(st.integers(0, 40)), data.draw(st.integers(1, L))
    dtype = data.draw(st.sampled_from(FLOATS))
    scores = normal(B, M, queries, num_image, dtype=dtype, seed=L)
    options = data.draw(st.sampled_from(RULES))
    got = focus_mask(scores, sequences(B, L, first=queries), **options)
    assert got.shape == (B, M, queries, -(-num_image // 32))
    if B:
        want = expected(scores, sequences(B, L, first=queries), **options)
        assert np.array_equal(unpacked(got, num_image), want)


@pytest.mark.parametrize("options", RULES, ids=str)
def test_ties_nan_and_signs(backend: str, options: dict[str, Any]) -> None:
    L = 60
    modality = torch.ones(6, L, dtype=torch.uint8)
    modality[:, :40] = 2
    scores = normal(6, 1, L, 40).round()
    scores[0] = 1.0
    scores[1, :, :, ::3] = torch.nan
    scores[2, :, :, ::2], scores[2, :, :, 1::2] = -0.0, 0.0
    scores[3] = torch.nan
    scores[4, :, :, 5:9], scores[4, :, :, 30] = -torch.inf, torch.inf
    scores[5] = -scores[5].abs() - 1
    got = focus_mask(scores, modality, **options)
    assert np.array_equal(unpacked(got, 40), expected(scores, modality, **options))


def test_many_image_tokens(backend: str) -> None:
    L = 5000
    modality = torch.full((1, L), 2, dtype=torch.uint8)
    modality[0, [0, 2000, -1]] = 1
    # many ties, and the three queries see 0, 1999 and all tokens
    scores = (uniform(1, 1, 3, L) * 64).round() / 64
    places = torch.tensor([[0, 2000, L - 1]], dtype=torch.int32)
    for options in ({"keep_ratio": 0.3}, {"threshold": 0.5}):
        got = focus_mask(scores, modality, query_positions=places, **options)
        want = expected(scores, modality, query_positions=places, **options)
        assert np.array_equal(unpacked(got, L), want)


def test_what_is_kept_does_not_depend_on_scale_or_order(backend: str) -> None:
    modality = sequences(3, 40)
    scores = uniform(3, 1, 40, 20)
    got = focus_mask(scores, modality, keep_ratio=0.4)
    assert_same_bits(focus_mask(scores * 4, modality, keep_ratio=0.4), got)
    assert_same_bits(
        focus_mask(scores, modality, threshold=0.5), focus_mask(scores / 8, modality, threshold=0.5)
    )


def test_float64_is_compared_as_such() -> None:
    scores = torch.tensor([[[[1.0, 1.0 + 1e-12, 1.0 - 1e-12]]]], dtype=torch.float64)
    modality = torch.tensor([[2, 2, 2, 1]], dtype=torch.uint8)
    with use_backend("reference"):
        got = focus_mask(scores, modality, keep_ratio=0.1)
    assert got.item() == 0b101
