"""token_importance: the logits of one query or, twice, of all; then a mean over the heads."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import dot
from .launch import capability, device_guard, row_unit

_SIZES = (
    "H",
    "N",
    "cls_index",
    "splits",
    "blocks",
    "stride_qb",
    "stride_qh",
    "stride_qn",
    "stride_kb",
    "stride_kh",
    "stride_kn",
)
# below every logit but -inf, so that no difference is inf - inf
_LOWEST = tl.constexpr(-3.4e38)


@triton.jit(do_not_specialize=_SIZES)
def cls_logits_kernel(
    q_ptr,  # [B, H, N, d], unit stride in d
    k_ptr,
    logits_ptr,  # f32 [B, H, N], not scaled
    largest_ptr,  # f32 [B, H, splits]: the largest logit of a split
    sums_ptr,  # f32 [B, H, splits]: of exp(scale * (logit - largest))
    H,
    N,
    cls_index,
    splits,
    stride_qb,  # strides in units of UNIT elements
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kn,
    exponent,
    NEGATIVE: tl.constexpr,
    D: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One query with one split of the keys of one head a program."""
    pid = tl.program_id(0)
    head = (pid // splits).to(tl.int64)
    split = pid % splits
    b, h = head // H, head % H
    q_ptr += (b * stride_qb + h * stride_qh + tl.cast(cls_index, tl.int64) * stride_qn) * UNIT
    k_ptr += (b * stride_kb + h * stride_kh) * UNIT
    n = split * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < N
    row_ptr = k_ptr + n.to(tl.int64) * stride_kn * UNIT
    logits = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        q = tl.load(q_ptr + d, mask=d < D, other=0.0).to(tl.float32)
        mask = inside[:, None]
        if D % BLOCK_D != 0:
            mask = mask & (d < D)[None, :]
        k = tl.load(row_ptr[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
        logits += tl.sum(q[None, :] * k, 1)
    if NEGATIVE:
        logits = -logits
    largest = tl.maximum(tl.max(tl.where(inside, logits, float("-inf")), 0), _LOWEST)
    weights = tl.where(inside, tl.exp2((logits - largest) * exponent), 0.0)
    tl.store(logits_ptr + head * N + n, logits, mask=inside)
    tl.store(largest_ptr + pid, largest)
    tl.store(sums_ptr + pid, tl.sum(weights, 0))


@triton.jit(do_not_specialize=_SIZES)
def cls_mean_kernel(
    logits_ptr,
    largest_ptr,
    sums_ptr,
    out_ptr,  # f32 [B, N]
    H,
    N,
    splits,
    blocks,
    exponent,
    BLOCK_H: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The softmax of each head over its splits, and the mean over the heads."""
    pid = tl.program_id(0)
    b = (pid // blocks).to(tl.int64)
    n = pid % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    mean = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(0, H, BLOCK_H):
        h = first + tl.arange(0, BLOCK_H)
        head = b * H + h
        largest = tl.full((BLOCK_H,), _LOWEST, tl.float32)
        total = tl.zeros((BLOCK_H,), tl.float32)
        for start in range(0, splits, BLOCK_S):
            s = start + tl.arange(0, BLOCK_S)
            mask = (h < H)[:, None] & (s < splits)[None, :]
            at = head[:, None] * splits + s[None, :]
            maxima = tl.load(largest_ptr + at, mask=mask, other=_LOWEST)
            sums = tl.load(sums_ptr + at, mask=mask, other=0.0)
            former = largest
            largest = tl.maximum(largest, tl.max(maxima, 1))
            total *= tl.exp2((former - largest) * exponent)
            total += tl.sum(sums * tl.exp2((maxima - largest[:, None]) * exponent), 1)
        mask = (h < H)[:, None] & (n < N)[None, :]
        logits = tl.load(logits_ptr + head[:, None] * N + n[None, :], mask=mask, other=0.0)
        weights = tl.exp2((logits - largest[:, None]) * exponent) / total[:, None]
        mean += tl.sum(tl.where(mask, weights, 0.0), 0)
    tl.store(out_ptr + b * N + n, mean / H, mask=n < N)


@triton.jit
def _rows(ptr, start, stride, N, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """BLOCK rows from ``start`` on, the first BLOCK_D elements of each; zeros beyond N and D."""
    n = tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_D)
    offsets = n.to(tl.int64)[:, None] * stride + d[None, :]
    mask = (start + n < N)[:, None]
    if D < BLOCK_D:
        mask = mask & (d < D)[None, :]
    return tl.load(ptr + tl.cast(start, tl.int64) * stride + offsets, mask=mask, other=0.0)


@triton.jit
def _products(
    rows,  # the rows of x from ``row`` on, where BLOCK_D holds all of D
    x_ptr,
    row,
    stride_x,
    y_ptr,
    column,
    stride_y,
    N,
    D: tl.constexpr,
    NEGATIVE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """x_i . y_j [BLOCK_M, BLOCK_N], of opposite sign if NEGATIVE."""
    products = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if D <= BLOCK_D:
        y = _rows(y_ptr, column, stride_y, N, D, BLOCK_N, BLOCK_D)
        products = dot(rows, tl.trans(y), products, "ieee")
    else:
        m, n, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
        x_ptr += (row + m).to(tl.int64)[:, None] * stride_x + d[None, :]
        y_ptr += (column + n).to(tl.int64)[:, None] * stride_y + d[None, :]
        for start in range(0, D, BLOCK_D):
            in_x, in_y = (row + m < N)[:, None], (column + n < N)[:, None]
            if D % BLOCK_D != 0:
                in_x = in_x & (start + d < D)[None, :]
                in_y = in_y & (start + d < D)[None, :]
            x = tl.load(x_ptr + start, mask=in_x, other=0.0)
            y = tl.load(y_ptr + start, mask=in_y, other=0.0)
            products = dot(x, tl.trans(y), products, "ieee")
    if NEGATIVE:
        products = -products
    return products


@triton.jit(do_not_specialize=_SIZES)
def query_softmax_kernel(
    q_ptr,  # [B, H, N, d], unit stride in d
    k_ptr,
    largest_ptr,  # f32 [B, H, N]: the largest logit of a query, not scaled
    inverses_ptr,  # f32 [B, H, N]: 1 / its sum of exp(scale * (logit - largest))
    H,
    N,
    blocks,
    stride_qb,  # strides in units of UNIT elements
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kn,
    exponent,
    NEGATIVE: tl.constexpr,
    D: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A block of queries a program, over all keys of its head."""
    pid = tl.program_id(0)
    head = (pid // blocks).to(tl.int64)
    first = pid % blocks * BLOCK_M
    b, h = head // H, head % H
    q_ptr += (b * stride_qb + h * stride_qh) * UNIT
    k_ptr += (b * stride_kb + h * stride_kh) * UNIT
    q_step, k_step = tl.cast(stride_qn, tl.int64) * UNIT, tl.cast(stride_kn, tl.int64) * UNIT
    q = _rows(q_ptr, first, q_step, N, D, BLOCK_M, BLOCK_D)
    largest = tl.full((BLOCK_M,), _LOWEST, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, N, BLOCK_N):
        logits = _products(
            q, q_ptr, first, q_step, k_ptr, start, k_step, N, D, NEGATIVE, BLOCK_M, BLOCK_N, BLOCK_D
        )
        inside = (start + tl.arange(0, BLOCK_N) < N)[None, :]
        former = largest
        most = tl.max(tl.where(inside, logits, float("-inf")), 1)
        largest = tl.maximum(largest, most)
        weights = tl.exp2((logits - largest[:, None]) * exponent)
        total *= tl.exp2((former - largest) * exponent)
        total += tl.sum(tl.where(inside, weights, 0.0), 1)
    i = first + tl.arange(0, BLOCK_M)
    tl.store(largest_ptr + head * N + i, largest, mask=i < N)
    tl.store(inverses_ptr + head * N + i, 1.0 / total, mask=i < N)


@triton.jit(do_not_specialize=_SIZES)
def received_kernel(
    q_ptr,
    k_ptr,
    largest_ptr,
    inverses_ptr,
    received_ptr,  # f32 [B, H, N]: what all queries together give to a key
    H,
    N,
    blocks,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kn,
    exponent,
    NEGATIVE: tl.constexpr,
    D: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A block of keys a program, over all queries of its head."""
    pid = tl.program_id(0)
    head = (pid // blocks).to(tl.int64)
    first = pid % blocks * BLOCK_M
    b, h = head // H, head % H
    q_ptr += (b * stride_qb + h * stride_qh) * UNIT
    k_ptr += (b * stride_kb + h * stride_kh) * UNIT
    q_step, k_step = tl.cast(stride_qn, tl.int64) * UNIT, tl.cast(stride_kn, tl.int64) * UNIT
    k = _rows(k_ptr, first, k_step, N, D, BLOCK_M, BLOCK_D)
    received = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, N, BLOCK_N):
        logits = _products(
            k, k_ptr, first, k_step, q_ptr, start, q_step, N, D, NEGATIVE, BLOCK_M, BLOCK_N, BLOCK_D
        )
        i = start + tl.arange(0, BLOCK_N)
        largest = tl.load(largest_ptr + head * N + i, mask=i < N, other=0.0)
        # 0 where there is no query
        inverse = tl.load(inverses_ptr + head * N + i, mask=i < N, other=0.0)
        weights = tl.exp2((logits - largest[None, :]) * exponent) * inverse[None, :]
        received += tl.sum(weights, 1)
    j = first + tl.arange(0, BLOCK_M)
    tl.store(received_ptr + head * N + j, received, mask=j < N)


@triton.jit(do_not_specialize=_SIZES)
def received_mean_kernel(
    received_ptr,
    out_ptr,  # f32 [B, N]
    H,
    N,
    blocks,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The mean over the heads and queries."""
    pid = tl.program_id(0)
    b = (pid // blocks).to(tl.int64)
    n = pid % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    mean = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(0, H, BLOCK_H):
        h = first + tl.arange(0, BLOCK_H)
        mask = (h < H)[:, None] & (n < N)[None, :]
        at = (b * H + h)[:, None] * N + n[None, :]
        mean += tl.sum(tl.load(received_ptr + at, mask=mask, other=0.0), 0)
    tl.store(out_ptr + b * N + n, mean / H / N, mask=n < N)


class Tile(NamedTuple):
    """BLOCK_M rows are held, BLOCK_N at a time come by; of one query only BLOCK_N is used."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_D: int
    num_warps: int
    num_stages: int


def tile(one_query: bool, d: int, dtype: torch.dtype, arch: tuple[int, int]) -> Tile:
    """The same for every batch and number of tokens, so that none of them compiles anew."""
    power = triton.next_power_of_2(d)
    if one_query:
        # 16 KB of keys a program: eight loads of 16 bytes under way for each thread
        features = min(power, 256)
        keys = 16384 // (dtype.itemsize * features)
        return Tile(1, min(256, max(16, keys)), features, 4, 1)
    if dtype == torch.float32:
        return Tile(64, 64, min(32, max(16, power)), 8, 2)
    if d <= 64:
        return Tile(128, 64, max(16, power), 4, 3)
    if d <= 128:
        return Tile(128, 64, power, 8, 3 if arch[0] in (9, 10) else 2)
    if d <= 256:
        return Tile(64, 64, power, 4, 2)
    return Tile(64, 64, 64, 4, 3)


def token_importance(
    q: Tensor, k: Tensor, cls_index: int | None = 0, scale: float | None = None
) -> Tensor:
    """See `vmtc_kernels.token_importance`. q, k: [B, H, N, d], float32, float16 or bfloat16."""
    B, H, N, d = q.shape
    out = torch.empty(B, N, dtype=torch.float32, device=q.device)
    if B == 0 or N == 0:
        return out
    q, k = (x if d == 1 or x.stride(3) == 1 else x.contiguous() for x in (q, k))
    scale = d**-0.5 if scale is None else scale
    choice = tile(cls_index is not None, d, q.dtype, capability(q))
    unit = min(row_unit(q), row_unit(k))
    given = {
        "q_ptr": q,
        "k_ptr": k,
        **{f"stride_q{axis}": q.stride(i) // unit for i, axis in enumerate("bhn")},
        **{f"stride_k{axis}": k.stride(i) // unit for i, axis in enumerate("bhn")},
        "exponent": abs(scale) * math.log2(math.e),
        "NEGATIVE": scale < 0,
        "D": d,
        "UNIT": unit,
        "BLOCK_N": choice.BLOCK_N,
        "BLOCK_D": choice.BLOCK_D,
        "num_warps": choice.num_warps,
        "num_stages": choice.num_stages,
    }
    with device_guard(q):
        if cls_index is not None:
            _of_one_query(out, cls_index, H, choice, given)
        else:
            _of_all_queries(out, H, choice, given)
    return out


def _of_one_query(out: Tensor, cls_index: int, H: int, choice: Tile, given: dict[str, Any]) -> None:
    B, N = out.shape
    splits = triton.cdiv(N, choice.BLOCK_N)
    logits = out.new_empty(B, H, N)
    largest, sums = out.new_empty(2, B, H, splits)
    shared = {
        "logits_ptr": logits,
        "largest_ptr": largest,
        "sums_ptr": sums,
        "H": H,
        "N": N,
        "splits": splits,
    }
    cls_logits_kernel[(B * H * splits,)](cls_index=cls_index, **shared, **given)
    blocks = triton.cdiv(N, 64)
    cls_mean_kernel[(B * blocks,)](
        out_ptr=out,
        blocks=blocks,
        exponent=given["exponent"],
        BLOCK_H=16,
        BLOCK_S=16,
        BLOCK_N=64,
        num_warps=4,
        **shared,
    )


def _of_all_queries(out: Tensor, H: int, choice: Tile, given: dict[str, Any]) -> None:
    B, N = out.shape
    largest, inverses, received = out.new_empty(3, B, H, N)
    blocks = triton.cdiv(N, choice.BLOCK_M)
    shared = {
        "largest_ptr": largest,
        "inverses_ptr": inverses,
        "H": H,
        "N": N,
        "blocks": blocks,
        "BLOCK_M": choice.BLOCK_M,
    }
    grid = (B * H * blocks,)
    query_softmax_kernel[grid](**shared, **given)
    received_kernel[grid](received_ptr=received, **shared, **given)
    blocks = triton.cdiv(N, 64)
    received_mean_kernel[(B * blocks,)](
        received_ptr=received,
        out_ptr=out,
        H=H,
        N=N,
        blocks=blocks,
        BLOCK_H=16,
        BLOCK_N=64,
        num_warps=4,
    )
