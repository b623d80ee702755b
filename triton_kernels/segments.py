"""Means over the members of clusters: centroids, and merged tokens beside copied ones."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import narrow
from .launch import device_guard, row_unit
from .lloyd import Grouping
from .primary import Selection

_SIZES = (
    "N",
    "C",
    "P",
    "K",
    "slices",
    "stride_xb",
    "stride_xn",
    "stride_sb",
    "stride_sn",
)


@triton.jit(do_not_specialize=_SIZES)
def mean_kernel(
    x_ptr,  # [B, N, D], unit stride in D
    scores_ptr,  # [B, N]: weights; None is uniform
    primary_ptr,  # i32 [B, P]
    primary_sizes_ptr,  # i32 [B, P + K]
    rows_ptr,  # i32 [B, N]
    norms_ptr,  # f32 [B, C]
    lengths_ptr,  # f32 [B, C]
    members_ptr,  # i32 [B, C]
    offsets_ptr,  # i32 [B, K + 1]
    moving_ptr,  # i32 [B]: 0 where there is nothing to do; None is everywhere something
    owner_ptr,  # i32 [B, N]: gets the slot of each member; None is not wanted
    out_ptr,  # [B, P + K, D]
    N,
    D,
    C,
    P,
    K,
    slices,
    stride_xb,
    stride_xn,
    stride_sb,
    stride_sn,
    CENTROIDS: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One slice of one slot a program. Slots below P are copies, the others means over members.

    CENTROIDS: of the features of the finite members, summed in float64; else of the tokens by
    weight.
    """
    pid = tl.program_id(0).to(tl.int64)
    piece = (pid % slices).to(tl.int32)
    slot = (pid // slices % (P + K)).to(tl.int32)
    b = pid // slices // (P + K)
    if moving_ptr is not None:
        if tl.load(moving_ptr + b) == 0:
            return
    d = piece * BLOCK_D + tl.arange(0, BLOCK_D)
    x_ptr += b * stride_xb * UNIT
    out_ptr += (b * (P + K) + slot) * D
    if not CENTROIDS:
        if slot < P:
            # bit for bit: no arithmetic
            filled = tl.load(primary_sizes_ptr + b * (P + K) + slot) > 0
            position = tl.load(primary_ptr + b * P + slot, mask=filled, other=0).to(tl.int64)
            value = tl.load(x_ptr + position * stride_xn * UNIT + d, mask=d < D, other=0.0)
            tl.store(out_ptr + d, tl.where(filled, value, 0.0), mask=d < D)
            return

    k = slot - P
    begin = tl.load(offsets_ptr + b * (K + 1) + k)
    end = tl.load(offsets_ptr + b * (K + 1) + k + 1)
    members_ptr += b * C
    rows_ptr += b * N
    m = tl.arange(0, BLOCK_M)

    # what the members' weights sum to
    total = tl.zeros((BLOCK_M,), tl.float64)
    for first in range(begin, end, BLOCK_M):
        inside = first + m < end
        rank = tl.load(members_ptr + first + m, mask=inside, other=0)
        if CENTROIDS:
            norm = tl.load(norms_ptr + b * C + rank, mask=inside, other=float("inf"))
            total += (norm < float("inf")).to(tl.float64)
        elif scores_ptr is not None:
            position = tl.load(rows_ptr + rank, mask=inside, other=0).to(tl.int64)
            score = tl.load(
                scores_ptr + b * stride_sb + position * stride_sn, mask=inside, other=0.0
            ).to(tl.float32)
            total += tl.where(score > 0, score, 0.0).to(tl.float64)
    weight_sum = tl.sum(total, 0)
    uniform = weight_sum <= 0
    if CENTROIDS:
        weight_sum = tl.where(uniform, 1.0, weight_sum)
    else:
        weight_sum = tl.where(uniform, (end - begin).to(tl.float64), weight_sum)

    if CENTROIDS:
        mean = tl.zeros((BLOCK_D,), tl.float64)
    else:
        mean = tl.zeros((BLOCK_D,), tl.float32)
    for first in range(begin, end, BLOCK_M):
        inside = first + m < end
        rank = tl.load(members_ptr + first + m, mask=inside, other=0)
        position = tl.load(rows_ptr + rank, mask=inside, other=0).to(tl.int64)
        value = tl.load(
            x_ptr + position[:, None] * stride_xn * UNIT + d[None, :],
            mask=inside[:, None] & (d < D)[None, :],
            other=0.0,
        ).to(tl.float32)
        if CENTROIDS:
            norm = tl.load(norms_ptr + b * C + rank, mask=inside, other=float("inf"))
            length = tl.load(lengths_ptr + b * C + rank, mask=inside, other=1.0)
            finite = (norm < float("inf"))[:, None]
            feature = tl.where(finite, tl.div_rn(value, length[:, None] + 0 * value), 0.0)
            mean += tl.sum(feature.to(tl.float64), 0)
        else:
            weight = tl.full((BLOCK_M,), 1.0, tl.float32)
            if scores_ptr is not None:
                score = tl.load(
                    scores_ptr + b * stride_sb + position * stride_sn, mask=inside, other=0.0
                ).to(tl.float32)
                positive = tl.where(score > 0, score, 0.0)
                weight = tl.where(uniform, weight, positive)
            share = (weight.to(tl.float64) / weight_sum).to(tl.float32)
            mean += tl.sum(tl.where(inside[:, None], value * share[:, None], 0.0), 0)
        if owner_ptr is not None:
            if piece == 0:
                tl.store(owner_ptr + b * N + position, tl.full((BLOCK_M,), slot, tl.int32), inside)
    if CENTROIDS:
        mean = mean / weight_sum
    tl.store(out_ptr + d, narrow(mean, out_ptr.dtype.element_ty), mask=d < D)


def means(
    x: Tensor,
    selection: Selection,
    grouping: Grouping,
    out: Tensor,
    *,
    norms: Tensor | None = None,
    scores: Tensor | None = None,
    sizes: Tensor | None = None,
    moving: Tensor | None = None,
    owner: Tensor | None = None,
) -> None:
    """Fill out [B, P + K, D] from x [B, N, D], unit stride in D.

    With norms f32 [B, C] out is the centroids (P = 0); else slots below P are the primary tokens
    and the others weighted means, ``sizes`` i32 [B, P + K] telling which primary slots are filled.
    owner i32 [B, N] gets the slot of every member; images whose ``moving`` i32 [B] is 0 are left.
    """
    B, N, D = x.shape
    P = out.shape[1] - (grouping.offsets.shape[1] - 1)
    widest = 128 if x.dtype == torch.float32 else 256
    block = min(widest, max(16, triton.next_power_of_2(D)))
    slices = triton.cdiv(D, block)
    unit = row_unit(x)
    score_strides = (0, 0) if scores is None else scores.stride()
    with device_guard(x):
        mean_kernel[(B * out.shape[1] * slices,)](
            x_ptr=x,
            scores_ptr=scores,
            primary_ptr=selection.primary,
            primary_sizes_ptr=sizes,
            rows_ptr=selection.rows,
            norms_ptr=norms,
            lengths_ptr=grouping.lengths,
            members_ptr=grouping.members,
            offsets_ptr=grouping.offsets,
            moving_ptr=moving,
            owner_ptr=owner,
            out_ptr=out,
            N=N,
            D=D,
            C=selection.capacity,
            P=P,
            K=out.shape[1] - P,
            slices=slices,
            stride_xb=x.stride(0) // unit,
            stride_xn=x.stride(1) // unit,
            stride_sb=score_strides[0],
            stride_sn=score_strides[1],
            CENTROIDS=norms is not None,
            UNIT=unit,
            BLOCK_M=16,
            BLOCK_D=block,
            num_warps=4,
        )
