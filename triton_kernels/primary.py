"""Which tokens are primary: the P highest scores by a search for the threshold, then compaction."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import device_guard

_SIZES = ("N", "P", "slots", "stride_sb", "stride_sn", "stride_vb", "stride_vn")


@triton.jit
def _keys(scores_ptr, i, inside, stride_sn):
    """Scores as unsigned integers of the same order; NaN as -inf, -0 as 0."""
    score = tl.load(scores_ptr + i * stride_sn, mask=inside, other=0.0).to(tl.float32)
    score = tl.where(score == score, score, float("-inf"))
    score = tl.where(score == 0, 0.0, score)
    bits = score.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return ordered.to(tl.uint32, bitcast=True) ^ 0x80000000


@triton.jit(do_not_specialize=_SIZES)
def primary_kernel(
    scores_ptr,  # [B, N]
    valid_ptr,  # bool [B, N]
    owner_ptr,  # i32 [B, N]: the slot of a primary token, else -1
    sizes_ptr,  # i32 [B, slots]: 1 for each slot below P that is filled
    primary_ptr,  # i32 [B, P]: positions, ascending
    rows_ptr,  # i32 [B, N]: positions of the other valid tokens, ascending
    counts_ptr,  # i32 [B]: how many those are
    N,
    P,
    slots,
    stride_sb,
    stride_sn,
    stride_vb,
    stride_vn,
    HAS_SCORES: tl.constexpr,
    HAS_VALID: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    if HAS_SCORES:
        scores_ptr += b * stride_sb
        primary_ptr += b * P
        sizes_ptr += b * slots
    if HAS_VALID:
        valid_ptr += b * stride_vb
    owner_ptr += b * N
    rows_ptr += b * N
    lanes = tl.arange(0, BLOCK_N)

    # the largest threshold that at least P keys reach; 0 where there are not so many
    threshold = tl.full((), 0, tl.uint32)
    beyond = tl.full((), 0, tl.int32)
    if HAS_SCORES:
        for step in range(32):
            candidate = threshold | (tl.full((), 1, tl.uint32) << tl.cast(31 - step, tl.uint32))
            reach = tl.full((), 0, tl.int32)
            for start in range(0, N, BLOCK_N):
                i = (start + lanes).to(tl.int64)
                inside = i < N
                if HAS_VALID:
                    inside = inside & tl.load(valid_ptr + i * stride_vn, mask=inside, other=0)
                key = _keys(scores_ptr, i, inside, stride_sn)
                reach += tl.sum((inside & (key >= candidate)).to(tl.int32))
            threshold = tl.where(reach >= P, candidate, threshold)
        for start in range(0, N, BLOCK_N):
            i = (start + lanes).to(tl.int64)
            inside = i < N
            if HAS_VALID:
                inside = inside & tl.load(valid_ptr + i * stride_vn, mask=inside, other=0)
            key = _keys(scores_ptr, i, inside, stride_sn)
            beyond += tl.sum((inside & (key > threshold)).to(tl.int32))

    # of the keys at the threshold the first so many are primary
    ties = P - beyond
    tied = tl.full((), 0, tl.int32)
    kept = tl.full((), 0, tl.int32)
    others = tl.full((), 0, tl.int32)
    for start in range(0, N, BLOCK_N):
        i = (start + lanes).to(tl.int64)
        inside = i < N
        if HAS_VALID:
            inside = inside & tl.load(valid_ptr + i * stride_vn, mask=inside, other=0)
        is_primary = i < 0
        if HAS_SCORES:
            key = _keys(scores_ptr, i, inside, stride_sn)
            tie = (inside & (key == threshold)).to(tl.int32)
            before = tied + tl.cumsum(tie, 0) - tie
            is_primary = inside & ((key > threshold) | ((tie != 0) & (before < ties)))
            tied += tl.sum(tie)
            chosen = is_primary.to(tl.int32)
            slot = kept + tl.cumsum(chosen, 0) - chosen
            tl.store(primary_ptr + slot, i.to(tl.int32), mask=is_primary)
            tl.store(owner_ptr + i, tl.where(is_primary, slot, -1), mask=i < N)
            kept += tl.sum(chosen)
        else:
            tl.store(owner_ptr + i, tl.full((BLOCK_N,), -1, tl.int32), mask=i < N)
        other = (inside & ~is_primary).to(tl.int32)
        rank = others + tl.cumsum(other, 0) - other
        tl.store(rows_ptr + rank, i.to(tl.int32), mask=other != 0)
        others += tl.sum(other)
    tl.store(counts_ptr + b, others)
    if HAS_SCORES:
        for start in range(0, P, BLOCK_N):
            slot = start + lanes
            tl.store(sizes_ptr + slot, (slot < kept).to(tl.int32), mask=slot < P)


class Selection(NamedTuple):
    """What the later kernels read: see `primary_kernel`."""

    owner: Tensor
    primary: Tensor
    rows: Tensor
    counts: Tensor
    # no image has more tokens in rows
    capacity: int


def select(
    x: Tensor, scores: Tensor | None, num_primary: int, valid: Tensor | None, sizes: Tensor
) -> Selection:
    """Split the valid tokens of x [B, N, D] into primary ones and others.

    sizes i32 [B, slots of at least num_primary] gets the sizes of the primary slots.
    """
    B, N, _ = x.shape
    ints = {"dtype": torch.int32, "device": x.device}
    capacity = N if valid is not None else max(N - num_primary, 0)
    selection = Selection(
        owner=torch.empty(B, N, **ints),
        primary=torch.empty(B, num_primary, **ints),
        rows=torch.empty(B, N, **ints),
        counts=torch.empty(B, **ints),
        capacity=capacity,
    )
    score_strides = (0, 0) if scores is None else scores.stride()
    valid_strides = (0, 0) if valid is None else valid.stride()
    with device_guard(x):
        primary_kernel[(B,)](
            scores_ptr=scores,
            valid_ptr=valid,
            owner_ptr=selection.owner,
            sizes_ptr=sizes,
            primary_ptr=selection.primary,
            rows_ptr=selection.rows,
            counts_ptr=selection.counts,
            N=N,
            P=num_primary,
            slots=sizes.shape[1],
            stride_sb=score_strides[0],
            stride_sn=score_strides[1],
            stride_vb=valid_strides[0],
            stride_vn=valid_strides[1],
            HAS_SCORES=scores is not None and num_primary > 0,
            HAS_VALID=valid is not None,
            BLOCK_N=1024,
            num_warps=4,
        )
    return selection
