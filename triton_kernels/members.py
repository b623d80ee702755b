"""After an assignment in the direct form: repair of empty clusters, then the members of each."""

from __future__ import annotations

import triton
import triton.language as tl

_SIZES = ("C", "K", "stride_sb")
_NEVER = tl.constexpr(0x7FFFFFFF)


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=("sizes_ptr",))
def repair_kernel(
    counts_ptr,
    labels_ptr,
    own_ptr,
    counted_ptr,  # i32 [B, K]: sizes as assign_kernel counted them
    next_ptr,  # i32 [B, K]: set to 0 for the next round
    sizes_ptr,  # i32, stride_sb apart: sizes after the repair
    moving_ptr,
    C,
    K,
    stride_sb,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    if moving_ptr is not None:
        if tl.load(moving_ptr + b) == 0:
            return
    R = tl.load(counts_ptr + b)
    lanes = tl.arange(0, BLOCK)
    sizes_ptr += b * stride_sb
    labels_ptr += b * C
    own_ptr += b * C
    smallest = tl.full((), 0x7FFFFFFF, tl.int32)
    for first in range(0, K, BLOCK):
        k = first + lanes
        size = tl.load(counted_ptr + b * K + k, mask=k < K, other=0x7FFFFFFF)
        tl.store(sizes_ptr + k, size, mask=k < K)
        tl.store(next_ptr + b * K + k, tl.zeros((BLOCK,), tl.int32), mask=k < K)
        smallest = tl.minimum(smallest, tl.min(size, 0))
    if (smallest == 0) & (R > 0):
        tl.debug_barrier()
        for k in range(0, K):
            if tl.load(sizes_ptr + k) == 0:
                farthest = tl.full((), float("-inf"), tl.float32)
                token = tl.full((), -1, tl.int32)
                for first in range(0, R, BLOCK):
                    r = first + lanes
                    inside = r < R
                    label = tl.load(labels_ptr + r, mask=inside, other=0)
                    movable = inside & (tl.load(sizes_ptr + label, mask=inside, other=0) >= 2)
                    own = tl.load(own_ptr + r, mask=movable, other=float("-inf"))
                    most = tl.max(own, 0)
                    here = tl.min(tl.where(movable & (own == most), r, _NEVER), 0)
                    better = (most > farthest) & (here != _NEVER)
                    token = tl.where(better, here, token)
                    farthest = tl.where(better, most, farthest)
                if token >= 0:
                    former = tl.load(labels_ptr + token)
                    size = tl.load(sizes_ptr + former)
                    tl.debug_barrier()
                    tl.store(sizes_ptr + former, size - 1)
                    tl.store(sizes_ptr + k, 1)
                    tl.store(labels_ptr + token, k)
                tl.debug_barrier()


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=("sizes_ptr",))
def members_kernel(
    counts_ptr,
    labels_ptr,
    sizes_ptr,
    members_ptr,  # i32 [B, C]
    offsets_ptr,  # i32 [B, K + 1]
    moving_ptr,
    C,
    K,
    stride_sb,
    BLOCK: tl.constexpr,
):
    """The ranks of the members of one cluster a program, ascending."""
    pid = tl.program_id(0).to(tl.int64)
    b = pid // K
    cluster = (pid % K).to(tl.int32)
    if moving_ptr is not None:
        if tl.load(moving_ptr + b) == 0:
            return
    R = tl.load(counts_ptr + b)
    lanes = tl.arange(0, BLOCK)
    begin = tl.full((), 0, tl.int32)
    for first in range(0, cluster, BLOCK):
        k = first + lanes
        begin += tl.sum(tl.load(sizes_ptr + b * stride_sb + k, mask=k < cluster, other=0), 0)
    tl.store(offsets_ptr + b * (K + 1) + cluster, begin)
    for first in range(0, R, BLOCK):
        r = first + lanes
        label = tl.load(labels_ptr + b * C + r, mask=r < R, other=-1)
        member = (label == cluster).to(tl.int32)
        place = begin + tl.cumsum(member, 0) - member
        tl.store(members_ptr + b * C + place, r, mask=member != 0)
        begin += tl.sum(member, 0)
    if cluster == K - 1:
        tl.store(offsets_ptr + b * (K + 1) + K, begin)
