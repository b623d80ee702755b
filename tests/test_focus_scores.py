"""focus_scores on every backend against its definition, and the state that it keeps."""

from __future__ import annotations

from typing import Any

import focus_oracle as oracle
import numpy as np
import pytest
import torch
from cases import (
    FLOATS,
    array,
    assert_close,
    assert_same_bits,
    is_simulated,
    normal,
    peak_memory,
    some,
)
from contract import ConstantContract, differentiable
from hypothesis import given
from hypothesis import strategies as st
from sequences import attention_inputs, positions_of, sequences
from torch import Tensor
from work import is_slow

from vmtc_kernels import focus_scores, use_backend


class TestContract(ConstantContract):
    op = "focus_scores"


def inputs(*args: Any, **kwargs: Any) -> dict[str, Tensor]:
    given = attention_inputs(*args, **kwargs)
    del given["v"]
    return given


def expected(
    q: Tensor,
    k: Tensor,
    modality: Tensor,
    num_image: int,
    text_image: Tensor | None = None,
    query_positions: Tensor | None = None,
    **options: Any,
) -> tuple[np.ndarray, np.ndarray]:
    """The scores, and the state after the call."""
    batch, heads, queries, _ = q.shape
    matrices = heads if options.get("head_mode") == "per_head" else 1
    state = np.zeros((batch, matrices, modality.shape[1], num_image))
    if text_image is not None:
        state = array(text_image).astype(np.float64)
    places = positions_of({"modality": modality, "query_positions": query_positions}, queries)
    each = [
        oracle.scores(*one, num_image, place, rows, **options)
        for *one, place, rows in zip(
            array(q), array(k), array(modality), places, state, strict=True
        )
    ]
    return np.stack(each), state


SIZES = [
    # B, H, G, L, d, I
    (1, 1, 1, 1, 1, 1),
    (8, 2, 1, 13, 3, 7),
    (8, 4, 2, 40, 16, 40),
    (2, 3, 3, 70, 72, 33),
    (1, 4, 1, 150, 80, 75),
]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"aggregate": "residual", "head_mode": "per_head"},
    {"renormalize": False, "scale": -0.3},
]


@pytest.mark.parametrize(("B", "H", "G", "L", "d", "num_image"), SIZES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_agrees_with_the_definition(
    backend: str, dtype: torch.dtype, B: int, H: int, G: int, L: int, d: int, num_image: int
) -> None:
    given = inputs(some(backend, B), H, G, L, d, dtype=dtype, first=L + d)
    for options in OPTIONS:
        got = focus_scores(**given, num_image=num_image, **options)
        want, _ = expected(**given, num_image=num_image, **options)
        assert (got.dtype, got.shape) == (torch.float32, want.shape)
        assert_close(got, want)
        text = given["modality"] == 1
        assert (got[~text[:, None].expand(got.shape[:3])] == 0).all()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_float64_agrees_with_the_definition(options: dict[str, Any]) -> None:
    given = inputs(8, 4, 2, 30, 8, dtype=torch.float64)
    with use_backend("reference"):
        got = focus_scores(**given, num_image=13, **options)
    assert got.dtype == torch.float64
    assert_close(got, expected(**given, num_image=13, **options)[0])


@given(st.data())
def test_any_shape(backend: str, data: st.DataObject) -> None:
    B, G, share, L = (
        data.draw(st.integers(low, high)) for low, high in ((0, 3), (1, 3), (1, 3), (1, 24))
    )
    d, num_image = data.draw(st.integers(1, 20)), data.draw(st.integers(0, 30))
    queries = data.draw(st.integers(1, L))
    dtype = data.draw(st.sampled_from(FLOATS))
    given = inputs(B, G * share, G, L, d, queries=queries, dtype=dtype, first=L)
    options = data.draw(st.sampled_from(OPTIONS))
    matrices = G * share if options.get("head_mode") == "per_head" else 1
    state = normal(B, matrices, L + 2, num_image, seed=5).abs()
    before = state.clone()
    got = focus_scores(**given, num_image=num_image, text_image=state, **options)
    assert got.shape == (B, matrices, queries, num_image)
    if B:
        want, after = expected(**given, num_image=num_image, text_image=before, **options)
        assert_close(got, want)
        assert_close(state, after)


def test_a_row_of_the_product_is_a_mean_of_attention(backend: str) -> None:
    """Renormalised, F is a mean of rows A_tv, each of which sums to at most 1."""
    given = inputs(some(backend, 8), 4, 2, 40, 8)
    got = focus_scores(**given, num_image=40)
    assert (got >= 0).all() and (got.sum(-1) <= 1 + 1e-5).all()


@pytest.mark.parametrize("head_mode", ["mean", "per_head"])
@pytest.mark.parametrize("parts", [[40], [17, 23], [1, 5, 30, 4], [1] * 40], ids=len)
def test_chunks_equal_one_call(backend: str, parts: list[int], head_mode: str) -> None:
    if is_simulated(backend) and len(parts) > 10:
        parts = [32, *[1] * 8]
    batch = some(backend, 8)
    given, options = inputs(batch, 2, 1, 40, 8), {"num_image": 20, "head_mode": head_mode}
    matrices = 1 if head_mode == "mean" else 2
    whole_state, state = (torch.full((batch, matrices, 40, 20), torch.nan) for _ in range(2))
    whole = focus_scores(**given, text_image=whole_state, **options)
    assert_close(focus_scores(**given, **options), whole)
    begin = 0
    for part in parts:
        end = begin + part
        got = focus_scores(
            given["q"][:, :, begin:end],
            given["k"][:, :, :end],
            given["modality"][:, :end],
            text_image=state,
            **options,
        )
        assert_close(got, whole[:, :, begin:end])
        begin = end
    text = (given["modality"] == 1)[:, None, :, None].expand_as(state)
    assert_close(state[text], whole_state[text])
    assert state[~text].isnan().all(), "rows that are no text were written"


def test_placed_queries_ignore_what_lies_behind(backend: str) -> None:
    """A static cache: keys beyond the current length are padding and hold anything."""
    given = inputs(4, 4, 2, 40, 8)
    whole = focus_scores(**given, num_image=20)
    k, modality = given["k"].clone(), given["modality"].clone()
    k[:, :, 30:], modality[:, 30:] = torch.nan, 0
    state = torch.full((4, 1, 40, 20), torch.nan)
    for begin, end in ((0, 12), (12, 30)):
        places = torch.arange(begin, end, dtype=torch.int32).expand(4, -1)
        got = focus_scores(
            given["q"][:, :, begin:end], k, modality, 20, text_image=state, query_positions=places
        )
        assert_close(got, whole[:, :, begin:end])


def test_queries_outside_of_the_sequence_are_padding(backend: str) -> None:
    given = inputs(1, 2, 1, 12, 8)
    places = torch.arange(12, dtype=torch.int32)[None].clone()
    places[0, 0], places[0, -1] = -5, 2**31 - 1
    state = torch.zeros(1, 1, 12, 6)
    got = focus_scores(**given, num_image=6, text_image=state, query_positions=places)
    assert (got[:, :, [0, -1]] == 0).all() and (state[:, :, [0, -1]] == 0).all()
    assert (got[:, :, 1] == 0).all() or (got != 0).any()


def test_permuting_heads_permutes_the_scores(backend: str) -> None:
    given = inputs(4, 4, 4, 30, 8)
    order = torch.tensor([2, 0, 3, 1])
    got = focus_scores(**given, num_image=15, head_mode="per_head")
    given["q"], given["k"] = given["q"][:, order], given["k"][:, order]
    assert_same_bits(focus_scores(**given, num_image=15, head_mode="per_head"), got[:, order])


def test_scores_are_constants(backend: str) -> None:
    given = differentiable(inputs(2, 2, 1, 12, 8))
    assert not focus_scores(**given, num_image=6).requires_grad


def test_opcheck_with_a_state(backend: str) -> None:
    given = inputs(2, 2, 1, 12, 8, queries=5)
    state = torch.rand(2, 1, 14, 6)
    torch.library.opcheck(
        torch.ops.vmtc.focus_scores.default, (), {**given, "num_image": 6, "text_image": state}
    )


def test_a_state_with_strides(backend: str) -> None:
    given = inputs(4, 2, 1, 12, 8, queries=5)
    plain = torch.rand(4, 1, 14, 6)
    seen = plain.transpose(2, 3).contiguous().transpose(2, 3)
    got = focus_scores(**given, num_image=6, text_image=seen)
    assert_close(got, focus_scores(**given, num_image=6, text_image=plain))
    assert_close(seen, plain)


def test_large_logits_do_not_overflow(backend: str) -> None:
    given = inputs(4, 2, 1, 24, 8)
    given["q"], given["k"] = (2 * given["q"]).round() * 64, (2 * given["k"]).round() * 64
    assert_close(
        focus_scores(**given, num_image=12, scale=0.5),
        expected(**given, num_image=12, scale=0.5)[0],
    )


def test_no_matrix_of_all_pairs_is_stored(kernel: str) -> None:
    L, H = (256, 2) if is_slow(kernel) else (2048, 4)
    given = inputs(1, H, 1, L, 16)
    given["modality"] = sequences(1, L)
    peak = peak_memory(lambda: focus_scores(**given, num_image=16))
    assert peak < H * L * L * 4
