"""token_importance on every backend against its definition, and the memory it takes."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
from calls import queries_and_keys
from cases import (
    FLOATS,
    array,
    assert_close,
    assert_same_bits,
    peak_memory,
)
from contract import OperatorContract
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vmtc_kernels import token_importance, use_backend


class TestContract(OperatorContract):
    op = "token_importance"


def expected(
    q: Tensor, k: Tensor, cls_index: int | None = 0, scale: float | None = None
) -> np.ndarray:
    images = zip(array(q), array(k), strict=True)
    return np.stack([oracle.token_importance(*image, cls_index, scale) for image in images])


SIZES = [
    (1, 1, 1, 1),
    (2, 1, 2, 3),
    (5, 2, 7, 17),
    (1, 16, 33, 64),
    (2, 3, 97, 80),
    (1, 2, 577, 64),
]


@pytest.mark.parametrize(("B", "H", "N", "d"), SIZES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_agrees_with_the_definition(
    backend: str, dtype: torch.dtype, B: int, H: int, N: int, d: int
) -> None:
    inputs = queries_and_keys(B, H, N, d, dtype=dtype)
    for cls_index in {0, N // 2, N - 1, None}:
        for scale in (None, 0.25, 0.0, -0.125):
            got = token_importance(**inputs, cls_index=cls_index, scale=scale)
            assert (got.dtype, got.shape) == (torch.float32, (B, N))
            assert_close(got, expected(**inputs, cls_index=cls_index, scale=scale))
            assert (got >= 0).all() and (got.double().sum(-1) - 1).abs().max() < 1e-5


@pytest.mark.parametrize("cls_index", [0, 5, None])
def test_float64_agrees_with_the_definition(cls_index: int | None) -> None:
    inputs = queries_and_keys(2, 3, 33, 16, dtype=torch.float64)
    with use_backend("reference"):
        got = token_importance(**inputs, cls_index=cls_index)
    assert got.dtype == torch.float64
    assert_close(got, expected(**inputs, cls_index=cls_index))


@given(st.data())
def test_any_shape(backend: str, data: st.DataObject) -> None:
    B, H, N, d = (data.draw(st.integers(low, 20)) for low in (0, 1, 1, 1))
    inputs = queries_and_keys(B, H, N, d, dtype=data.draw(st.sampled_from(FLOATS)), seed=N)
    cls_index = data.draw(st.one_of(st.none(), st.integers(0, N - 1)))
    got = token_importance(**inputs, cls_index=cls_index)
    assert got.shape == (B, N)
    if B:
        assert_close(got, expected(**inputs, cls_index=cls_index))


@pytest.mark.parametrize("cls_index", [3, None])
def test_heads_as_an_encoder_lays_them_out(backend: str, cls_index: int | None) -> None:
    """Queries and keys are usually views of [B, N, H, d], or of one product [B, N, 3, H, d]."""
    plain = queries_and_keys(2, 3, 33, 16)
    want = token_importance(**plain, cls_index=cls_index)
    seen = {
        name: value.transpose(1, 2).contiguous().transpose(1, 2) for name, value in plain.items()
    }
    assert_close(token_importance(**seen, cls_index=cls_index), want)
    joint = torch.stack([plain["q"], plain["k"], plain["q"] * torch.nan]).permute(1, 3, 0, 2, 4)
    q, k, _ = joint.contiguous().permute(2, 0, 3, 1, 4)
    assert not q.is_contiguous() and torch.equal(k, plain["k"])
    assert_close(token_importance(q, k, cls_index=cls_index), want)


@pytest.mark.parametrize("cls_index", [1, None])
@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float16, 64), (torch.bfloat16, 2.0**30)], ids=str
)
def test_large_logits_do_not_overflow(
    backend: str, dtype: torch.dtype, size: float, cls_index: int | None
) -> None:
    # small integers times a power of two: all logits are exact, up to 4e4 and 1e19
    integers = {name: (2 * value).round() for name, value in queries_and_keys(2, 2, 33, 8).items()}
    inputs = {name: (value * size).to(dtype) for name, value in integers.items()}
    got = token_importance(**inputs, cls_index=cls_index, scale=0.5)
    assert_close(got, expected(**inputs, cls_index=cls_index, scale=0.5))


def test_tied_logits_share_alike(backend: str) -> None:
    q, k = torch.ones(1, 2, 8, 4), torch.ones(1, 2, 8, 4)
    for cls_index in (0, None):
        assert_close(token_importance(q, k, cls_index=cls_index), np.full((1, 8), 0.125))


def test_cls_attention_is_of_that_row_alone(backend: str) -> None:
    inputs = queries_and_keys(2, 3, 33, 16)
    want = token_importance(**inputs, cls_index=7)
    inputs["q"][:, :, :7] = torch.nan
    inputs["q"][:, :, 8:] = torch.nan
    assert_same_bits(token_importance(**inputs, cls_index=7), want)


def test_received_attention_is_the_mean_of_all_rows(backend: str) -> None:
    inputs = queries_and_keys(2, 3, 33, 16)
    rows = torch.stack([token_importance(**inputs, cls_index=c) for c in range(33)])
    assert_close(token_importance(**inputs, cls_index=None), rows.mean(0))


def test_no_tokens(backend: str) -> None:
    assert token_importance(**queries_and_keys(2, 3, 0, 4), cls_index=None).shape == (2, 0)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_no_matrix_of_all_pairs_is_stored(kernel: str, dtype: torch.dtype) -> None:
    N = 2048
    inputs = queries_and_keys(1, 4, N, 32, dtype=dtype)
    assert peak_memory(lambda: token_importance(**inputs, cls_index=None)) < N * N * 4
    assert peak_memory(lambda: token_importance(**inputs)) < N * N * 4 / 8


def test_the_gradient_stores_no_matrix_of_all_pairs(backend: str) -> None:
    N = 2048
    q, k = (value.requires_grad_() for value in queries_and_keys(1, 2, N, 16).values())
    for cls_index in (0, None):
        loss = token_importance(q, k, cls_index=cls_index).square().sum()
        call = lambda loss=loss: torch.autograd.grad(loss, (q, k), retain_graph=True)  # noqa: E731
        assert peak_memory(call) < N * N * 4
