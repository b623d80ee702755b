"""token_importance: the logits of one query by splits, and their mean over the heads."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import device_guard, row_unit
from .received import received

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


def block(d: int, dtype: torch.dtype) -> tuple[int, int]:
    """Keys and features of a program: the same for every batch and number of tokens."""
    # 16 KB of keys: eight loads of 16 bytes under way for each thread
    features = min(256, triton.next_power_of_2(d))
    return min(256, max(16, 16384 // (dtype.itemsize * features))), features


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
    exponent = abs(scale) * math.log2(math.e)
    unit = min(row_unit(q), row_unit(k))
    given = {
        "q_ptr": q,
        "k_ptr": k,
        **{f"stride_q{axis}": q.stride(i) // unit for i, axis in enumerate("bhn")},
        **{f"stride_k{axis}": k.stride(i) // unit for i, axis in enumerate("bhn")},
        "exponent": exponent,
        "NEGATIVE": scale < 0,
        "D": d,
        "UNIT": unit,
    }
    with device_guard(q):
        if cls_index is None:
            received(out, q, given)
            return out
        keys, features = block(d, q.dtype)
        splits = triton.cdiv(N, keys)
        shared = {
            "logits_ptr": out.new_empty(B, H, N),
            # each by itself: whether a part of one tensor is aligned would depend on its size
            "largest_ptr": out.new_empty(B, H, splits),
            "sums_ptr": out.new_empty(B, H, splits),
            "H": H,
            "N": N,
            "splits": splits,
        }
        cls_logits_kernel[(B * H * splits,)](
            cls_index=cls_index,
            BLOCK_N=keys,
            BLOCK_D=features,
            num_warps=4,
            **shared,
            **given,
        )
        blocks = triton.cdiv(N, 64)
        cls_mean_kernel[(B * blocks,)](
            out_ptr=out,
            blocks=blocks,
            exponent=exponent,
            BLOCK_H=16,
            BLOCK_S=16,
            BLOCK_N=64,
            num_warps=4,
            **shared,
        )
    return out
