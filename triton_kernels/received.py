"""Attention that each key receives from all queries: the logits twice, no N x N matrix stored."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import dot
from .launch import capability

_SIZES = (
    "H",
    "N",
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
    largest_ptr,  # f32 [B, H, blocks * BLOCK_M]: the largest logit of a query, not scaled
    inverses_ptr,  # f32, the same: 1 / its sum of exp(scale * (logit - largest))
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
    at = head * blocks * BLOCK_M + first + tl.arange(0, BLOCK_M)
    tl.store(largest_ptr + at, largest)
    tl.store(inverses_ptr + at, 1.0 / total)


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
        # in whole blocks, which are aligned whatever N is; before the products, so that they are
        # under way meanwhile, where registers are left for them
        i = start + tl.arange(0, BLOCK_N)
        at = head * blocks * BLOCK_M + i
        largest = tl.load(largest_ptr + at)
        logits = _products(
            k, k_ptr, first, k_step, q_ptr, start, q_step, N, D, NEGATIVE, BLOCK_M, BLOCK_N, BLOCK_D
        )
        inverse = tl.load(inverses_ptr + at)
        weights = tl.exp2((logits - largest[None, :]) * exponent) * inverse[None, :]
        received += tl.sum(tl.where((i < N)[None, :], weights, 0.0), 1)
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
    """BLOCK_M rows are held, BLOCK_N of the other side, a divisor, come by at a time."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_D: int
    num_warps: int
    num_stages: int


def tile(d: int, dtype: torch.dtype, arch: tuple[int, int]) -> Tile:
    """The same for every batch and number of tokens, so that none of them compiles anew."""
    if dtype == torch.float32:
        return Tile(64, 64, 16, 4, 2)
    features = max(16, triton.next_power_of_2(d))
    if d <= 128:
        if arch[0] == 10:
            # there a thread has whole rows of the logits: more columns spill
            return Tile(128, 32, features, 8, 3)
        return Tile(128, 64, features, 4 if d <= 64 else 8, 3 if d <= 64 or arch[0] == 9 else 2)
    if d <= 256:
        return Tile(64, 64, features, 4, 2)
    return Tile(64, 64, 64, 4, 3)


def received(out: Tensor, q: Tensor, given: dict[str, Any]) -> None:
    """Fill out f32 [B, N] with the mean over heads and queries. given: what both passes take."""
    B, H, N, d = q.shape
    choice = tile(d, q.dtype, capability(q))
    blocks = triton.cdiv(N, choice.BLOCK_M)
    largest, inverses = (out.new_empty(B, H, blocks * choice.BLOCK_M) for _ in range(2))
    by_head = out.new_empty(B, H, N)
    shared = {
        **given,
        "largest_ptr": largest,
        "inverses_ptr": inverses,
        "H": H,
        "N": N,
        "blocks": blocks,
        "BLOCK_M": choice.BLOCK_M,
        "BLOCK_N": choice.BLOCK_N,
        "BLOCK_D": choice.BLOCK_D,
        "num_warps": choice.num_warps,
        "num_stages": choice.num_stages,
    }
    grid = (B * H * blocks,)
    query_softmax_kernel[grid](**shared)
    received_kernel[grid](received_ptr=by_head, **shared)
    blocks = triton.cdiv(N, 64)
    received_mean_kernel[(B * blocks,)](
        received_ptr=by_head,
        out_ptr=out,
        H=H,
        N=N,
        blocks=blocks,
        BLOCK_H=16,
        BLOCK_N=64,
        num_warps=4,
    )
