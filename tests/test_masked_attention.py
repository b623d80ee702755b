"""masked_attention on every backend against its definition, SDPA and FlexAttention."""

from __future__ import annotations

import math
from typing import Any

import focus_oracle as oracle
import numpy as np
import pytest
import torch
from cases import FLOATS, array, assert_close, normal, peak_memory, place, some
from contract import OperatorContract
from hypothesis import given
from hypothesis import strategies as st
from sequences import attention_inputs, positions_of, random_bits, sequences, unpacked
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention
from work import is_slow

from vmtc_kernels import BackendError, masked_attention, use_backend


class TestContract(OperatorContract):
    op = "masked_attention"


def expected(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    modality: Tensor,
    mask: Tensor,
    query_positions: Tensor | None = None,
    **options: Any,
) -> tuple[np.ndarray, np.ndarray]:
    places = positions_of({"modality": modality, "query_positions": query_positions}, q.shape[2])
    bits = unpacked(mask, modality.shape[1])
    rows = zip(array(q), array(k), array(v), array(modality), bits, places, strict=True)
    out, lse = zip(*(oracle.attention(*row, **options) for row in rows), strict=True)
    return np.stack(out), np.stack(lse)


SIZES = [
    # B, H, G, L, d, dv
    (1, 1, 1, 1, 1, 1),
    (8, 2, 1, 13, 3, 5),
    (8, 4, 2, 40, 16, 16),
    (2, 3, 3, 70, 72, 80),
    (1, 4, 1, 150, 96, 96),
    (1, 2, 2, 37, 256, 256),
]


@pytest.mark.parametrize(("B", "H", "G", "L", "d", "dv"), SIZES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_agrees_with_the_definition(
    backend: str, dtype: torch.dtype, B: int, H: int, G: int, L: int, d: int, dv: int
) -> None:
    B = some(backend, B)
    given = attention_inputs(B, H, G, L, d, dv=dv, dtype=dtype, first=L + d)
    for heads, words, options in (
        (1, -(-L // 32), {}),
        (H, 1, {"suppression": 0.125, "scale": -0.2}),
        (1, 0, {}),
        (1, 1, {"suppression": 1.0}),
    ):
        mask = random_bits(B, heads, L, words)
        got = masked_attention(**given, mask=mask, **options)
        out, lse = expected(**given, mask=mask, **options)
        assert (got.out.dtype, got.lse.dtype) == (dtype, torch.float32)
        assert_close(got.out, out)
        assert_close(got.lse, lse)


def test_float64_agrees_with_the_definition() -> None:
    given = attention_inputs(8, 4, 2, 30, 8, dtype=torch.float64)
    mask = random_bits(8, 1, 30, 1)
    with use_backend("reference"):
        got = masked_attention(**given, mask=mask)
    for value, want in zip(got, expected(**given, mask=mask), strict=True):
        assert value.dtype == torch.float64
        assert_close(value, want)


@given(st.data())
def test_any_shape(backend: str, data: st.DataObject) -> None:
    B, G, share, d, dv, words = (
        data.draw(st.integers(low, high))
        for low, high in ((0, 3), (1, 3), (1, 3), (1, 20), (1, 20), (0, 2))
    )
    L = data.draw(st.integers(1, 24))
    queries = data.draw(st.integers(1, L))
    dtype = data.draw(st.sampled_from(FLOATS))
    given = attention_inputs(B, G * share, G, L, d, dv=dv, queries=queries, dtype=dtype, first=L)
    mask = random_bits(B, data.draw(st.sampled_from((1, G * share))), queries, words, seed=L)
    places = torch.stack(
        [torch.randperm(L, device="cpu")[:queries].sort().values for _ in range(B)]
        or [torch.zeros(queries)]
    )[:B]
    options: dict[str, Any] = {"suppression": data.draw(st.sampled_from((0.0, 0.5)))}
    if data.draw(st.booleans()):
        options["query_positions"] = place(places.int())
    got = masked_attention(**given, mask=mask, **options)
    assert got.out.shape == (B, G * share, queries, dv)
    if B:
        for value, want in zip(got, expected(**given, mask=mask, **options), strict=True):
            assert_close(value, want)


@pytest.mark.parametrize("queries", [1, 3, 33])
def test_the_last_queries_of_longer_sequences(backend: str, queries: int) -> None:
    L = 70 if is_slow(backend) else 700
    for H, G in ((4, 4), (8, 2)):
        batch = some(backend, 8)
        given = attention_inputs(batch, H, G, L, 16, queries=queries, first=H)
        mask = random_bits(batch, 1, queries, -(-L // 64))
        for value, want in zip(
            masked_attention(**given, mask=mask), expected(**given, mask=mask), strict=True
        ):
            assert_close(value, want)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_without_inhibition_it_is_causal_attention(backend: str, dtype: torch.dtype) -> None:
    given = attention_inputs(1, 4, 2, 70, 16, dtype=dtype)
    q, k, v = (given[name].double() for name in "qkv")
    want = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    for mask, suppression in ((random_bits(1, 1, 70, 2), 1.0), (random_bits(1, 4, 70, 0), 0.0)):
        got = masked_attention(**given, mask=mask, suppression=suppression)
        assert_close(got.out, want)


def test_agrees_with_flex_attention(backend: str) -> None:
    given = attention_inputs(4, 4, 2, 40, 16)
    mask = random_bits(4, 4, 40, 1)
    bits = unpacked(mask, 40)
    modality = array(given["modality"])
    allowed = np.zeros((4, 4, 40, 40), bool)
    for b in range(4):
        factor = oracle.factors(bits[b], modality[b], 4, 0.0)
        for i in range(40):
            seen = oracle.visible(modality[b], i)
            allowed[b, :, i, seen] = factor[:, i, seen].T > 0
    table = torch.from_numpy(allowed)
    block_mask = create_block_mask(lambda b, h, i, j: table[b, h, i, j], 4, 4, 40, 40, device="cpu")
    q, k, v = (given[name].cpu() for name in "qkv")
    want = flex_attention(q, k, v, block_mask=block_mask, enable_gqa=True)
    got = masked_attention(**given, mask=mask).out
    assert_close(got[place(table.any(-1))], want[table.any(-1)])


def test_rows_that_see_nothing_are_zero(backend: str) -> None:
    modality = torch.tensor([[0, 0, 2, 2, 1, 0], [0] * 6], dtype=torch.uint8)
    q, k, v = (normal(2, 2, 6, 8, seed=i) for i in range(3))
    # all bits set: image queries that see only images have nothing left
    got = masked_attention(q, k, v, modality, torch.full((2, 1, 6, 1), -1, dtype=torch.int32))
    empty = torch.tensor([[True, True, True, True, False, True], [True] * 6])
    for b in range(2):
        assert (got.out[b][:, empty[b]] == 0).all()
        assert (got.lse[b][:, empty[b]] == -torch.inf).all()
    assert_close(got.out[0, :, 4], v[0, :, 4])


def test_a_weight_too_small_for_float32_is_still_a_weight(backend: str) -> None:
    """Where every pair is inhibited alike, nothing is."""
    given = attention_inputs(1, 2, 1, 9, 8)
    given["modality"] = torch.full((1, 9), 2, dtype=torch.uint8)
    want = masked_attention(**given, mask=torch.zeros(1, 1, 9, 1, dtype=torch.int32))
    got = masked_attention(
        **given, mask=torch.full((1, 1, 9, 1), -1, dtype=torch.int32), suppression=1e-50
    )
    # float32 logits far from 0 are coarser
    torch.testing.assert_close(got.out, want.out, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.lse, want.lse - 50 * math.log(10), rtol=1e-6, atol=1e-4)


def test_what_nobody_sees_may_hold_anything(backend: str) -> None:
    given = attention_inputs(4, 4, 2, 40, 16)
    modality = given["modality"].clone()
    modality[:, 20:25], modality[:, 34:] = 0, 0
    given["modality"] = modality
    mask = random_bits(4, 1, 40, 1)
    want = masked_attention(**given, mask=mask)
    unseen = (modality == 0) | (modality > 2)
    for name in "kv":
        given[name] = given[name].masked_fill(unseen[:, None, :, None], torch.nan)
    for value, same in zip(masked_attention(**given, mask=mask), want, strict=True):
        assert_close(value, same)


def test_values_behind_the_last_query_are_not_read(backend: str) -> None:
    given = attention_inputs(1, 2, 2, 40, 16, queries=5)
    places = torch.arange(10, 15, dtype=torch.int32)[None]
    mask = random_bits(1, 1, 5, 1)
    want = masked_attention(**given, mask=mask, query_positions=places)
    for name in "kv":
        given[name] = given[name].clone()
        given[name][:, :, 15:] = torch.nan
    got = masked_attention(**given, mask=mask, query_positions=places)
    for value, same in zip(got, want, strict=True):
        assert_close(value, same)


def test_large_logits_do_not_overflow(backend: str) -> None:
    given = attention_inputs(4, 2, 1, 24, 8)
    given["q"], given["k"] = (2 * given["q"]).round() * 64, (2 * given["k"]).round() * 64
    for suppression in (0.0, 1e-30, 1e-300):
        options = {"mask": random_bits(4, 1, 24, 1), "scale": 0.5, "suppression": suppression}
        got = masked_attention(**given, **options)
        for value, want in zip(got, expected(**given, **options), strict=True):
            assert_close(value, want)


def test_heads_too_wide_for_a_gpu_are_refused_by_its_kernels(backend: str) -> None:
    given = attention_inputs(1, 2, 1, 9, 300, dv=8)
    given["mask"] = random_bits(1, 1, 9, 1)
    if backend in ("triton", "cuda"):
        with pytest.raises(BackendError, match="heads of up to 256 features, got 300"):
            masked_attention(**given)
    else:
        for value, want in zip(masked_attention(**given), expected(**given), strict=True):
            assert_close(value, want)


def test_no_matrix_of_all_pairs_is_stored(kernel: str) -> None:
    L = 256 if is_slow(kernel) else 2048
    given = attention_inputs(1, 2, 1, L, 16)
    given["modality"] = sequences(1, L)
    mask = random_bits(1, 1, L, L // 32)
    assert peak_memory(lambda: masked_attention(**given, mask=mask)) < 2 * L * L * 4


@pytest.mark.parametrize("suppression", [0.0, 0.5])
def test_blocks_of_keys_that_are_nearly_all_inhibited(backend: str, suppression: float) -> None:
    """Whole blocks may be passed over, but none in which one query keeps one key."""
    L = 200 if is_slow(backend) else 1300
    given = attention_inputs(1, 2, 1, L, 8, queries=9)
    given["modality"] = torch.full((1, L), 2, dtype=torch.uint8)
    given["modality"][:, -9:] = 1
    mask = torch.full((1, 1, 9, -(-L // 32)), -1, dtype=torch.int32)
    # of more than 500 image tokens a single query keeps a single one
    for word in range(1, mask.shape[3], 17):
        mask[0, 0, word % 9, word] = ~(1 << word % 31)
    options = {"mask": mask, "suppression": suppression}
    for value, want in zip(
        masked_attention(**given, **options), expected(**given, **options), strict=True
    ):
        assert_close(value, want)
