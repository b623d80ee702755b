"""Lloyd's algorithm on the tokens themselves, for images of many tokens: four launches a round.

Nothing is asked of the host: every round is launched, and an image whose labels have come to rest
is skipped by a flag on the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import dot
from .launch import device_guard, row_unit
from .lloyd import Grouping
from .members import members_kernel, repair_kernel
from .primary import Selection
from .segments import means

_SIZES = ("N", "C", "K", "blocks", "stride_xb", "stride_xn")
_NEVER = tl.constexpr(0x7FFFFFFF)


@triton.jit(do_not_specialize=_SIZES)
def norms_kernel(
    x_ptr,
    rows_ptr,
    counts_ptr,
    norms_ptr,  # f32 [B, C]: squared norms
    lengths_ptr,  # f32 [B, C]: what a row is divided by to give its feature
    N,
    D,
    C,
    blocks,
    stride_xb,
    stride_xn,
    UNIT: tl.constexpr,
    EUCLIDEAN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pid = tl.program_id(0)
    b = (pid // blocks).to(tl.int64)
    r = pid % blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = r < tl.load(counts_ptr + b)
    position = tl.load(rows_ptr + b * N + r, mask=inside, other=0).to(tl.int64)
    row_ptr = x_ptr + b * stride_xb * UNIT + position * stride_xn * UNIT
    norm = tl.zeros((BLOCK_R,), tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        mask = inside[:, None] & (d < D)[None, :]
        x = tl.load(row_ptr[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
        norm += tl.sum(x * x, 1)
    length = tl.full((BLOCK_R,), 1.0, tl.float32)
    if not EUCLIDEAN:
        usable = norm > D * 1.1754943508222875e-38
        length = tl.where(usable, tl.sqrt_rn(norm), float("inf"))
    tl.store(norms_ptr + b * C + r, norm, mask=inside)
    tl.store(lengths_ptr + b * C + r, length, mask=inside)


@triton.jit(do_not_specialize=_SIZES)
def assign_kernel(
    x_ptr,  # [B, N, D], unit stride in D
    centroids_ptr,  # f32 [B, K, D]; not read in the first round
    rows_ptr,
    counts_ptr,
    norms_ptr,
    lengths_ptr,
    labels_ptr,  # i32 [B, C]: read, but in the first round, and written
    own_ptr,  # f32 [B, C]: distance to the own centroid
    sizes_ptr,  # i32 [B, K]: counted up from 0
    moving_ptr,  # i32 [B]: whether the former round changed a label
    moved_ptr,  # i32 [B]: set where this one does
    N,
    D,
    C,
    K,
    blocks,
    stride_xb,
    stride_xn,
    SEEDS: tl.constexpr,
    EUCLIDEAN: tl.constexpr,
    PRECISION: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Nearest centroid of a block of tokens. SEEDS: the centroids are tokens."""
    pid = tl.program_id(0)
    b = (pid // blocks).to(tl.int64)
    if not SEEDS:
        if tl.load(moving_ptr + b) == 0:
            return
    R = tl.load(counts_ptr + b)
    first_r = pid % blocks * BLOCK_R
    if first_r >= R:
        return
    r = first_r + tl.arange(0, BLOCK_R)
    inside = r < R
    norms_ptr += b * C
    rows_ptr += b * N
    x_ptr += b * stride_xb * UNIT
    norm = tl.load(norms_ptr + r, mask=inside, other=float("inf"))
    finite = inside & (norm < float("inf"))
    length = tl.load(lengths_ptr + b * C + r, mask=inside, other=1.0)
    position = tl.load(rows_ptr + r, mask=inside, other=0).to(tl.int64)
    a_ptr = x_ptr + position * stride_xn * UNIT
    zero = D * 1.1754943508222875e-38

    labels = tl.zeros((BLOCK_R,), tl.int32)
    own = tl.full((BLOCK_R,), float("inf"), tl.float32)
    for first in range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        there = k < K
        seed = tl.full((BLOCK_K,), -1, tl.int32)
        if SEEDS:
            seed = ((2 * k + 1).to(tl.int64) * R // (2 * K)).to(tl.int32)
            seed_norm = tl.load(norms_ptr + seed, mask=there, other=0.0)
            there = there & (seed_norm < float("inf"))
            from_row = tl.load(rows_ptr + seed, mask=there, other=0).to(tl.int64)
            c_ptr = x_ptr + from_row * stride_xn * UNIT
        else:
            c_ptr = centroids_ptr + (b * K + k) * D
        products = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
        square = tl.zeros((BLOCK_K,), tl.float32)
        for start in range(0, D, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            within = (d < D)[None, :]
            a = tl.load(a_ptr[:, None] + d[None, :], mask=within & finite[:, None], other=0.0)
            c = tl.load(c_ptr[:, None] + d[None, :], mask=within & there[:, None], other=0.0)
            wide = c.to(tl.float32)
            square += tl.sum(wide * wide, 1)
            products = dot(a.to(tl.float32), tl.trans(wide), products, PRECISION)
        if EUCLIDEAN:
            both = norm[:, None] + square[None, :]
            distance = both - 2 * products
            same = r[:, None] == seed[None, :]
            distance = tl.where(same, 0.0, distance)
            # what is small beside the norms has lost its digits
            lost = (k < K)[None, :] & finite[:, None] & ~same & (distance < 0.03125 * both)
            if tl.max(tl.max(lost.to(tl.int32), 1), 0) > 0:
                near = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
                for f in range(0, D):
                    apart = (
                        tl.load(a_ptr + f, mask=finite, other=0.0).to(tl.float32)[:, None]
                        - tl.load(c_ptr + f, mask=there, other=0.0).to(tl.float32)[None, :]
                    )
                    near += apart * apart
                distance = tl.where(lost, near, distance)
        else:
            nonzero = square > zero
            size = tl.sqrt_rn(tl.where(nonzero, square, 1.0))
            cosine = tl.div_rn(products, length[:, None] * size[None, :])
            distance = tl.where(nonzero[None, :], 1 - cosine, 1.0)
        usable = (k < K)[None, :] & finite[:, None] & (distance == distance)
        distance = tl.where(usable, distance, float("inf"))
        nearest = tl.min(distance, 1)
        tie = tl.where(usable & (distance == nearest[:, None]), k[None, :], _NEVER)
        closer = nearest < own
        labels = tl.where(closer, tl.min(tie, 1), labels)
        own = tl.where(closer, nearest, own)

    labels_ptr += b * C
    if SEEDS:
        tl.store(moved_ptr + b, 1)
    else:
        former = tl.load(labels_ptr + r, mask=inside, other=0)
        changed = tl.max((inside & (labels != former)).to(tl.int32), 0) > 0
        tl.store(moved_ptr + b, 1, mask=changed)
    tl.store(labels_ptr + r, labels, mask=inside)
    tl.store(own_ptr + b * C + r, own, mask=inside)
    tl.atomic_add(sizes_ptr + b * K + labels, 1, mask=inside)


class Tile(NamedTuple):
    BLOCK_R: int
    BLOCK_K: int
    BLOCK_D: int
    num_warps: int
    num_stages: int


def tile(num_clusters: int, dtype: torch.dtype, metric: str) -> Tile:
    """Rows by centroids by features of one step; a round that few centroids share is narrow."""
    # the direct sums of euclidean would spill a larger one
    widest = 32 if metric == "euclidean" else 64
    columns = min(widest, max(16, triton.next_power_of_2(num_clusters)))
    exact = dtype == torch.float32
    many = exact or columns == 64 or (metric == "euclidean" and columns > 16)
    return Tile(64, columns, 32, 8 if many else 4, 2 if exact else 3)


def cluster(
    x: Tensor,
    selection: Selection,
    num_clusters: int,
    iterations: int,
    metric: str,
    sizes: Tensor,
    centroids: Tensor | None,
) -> Grouping:
    """See `kmeans.cluster`; with centroids the owner of the selection gets the labels."""
    B, N, D = x.shape
    C, K = selection.capacity, num_clusters
    grouping = Grouping.empty(B, C, K, x.device)
    floats = {"dtype": torch.float32, "device": x.device}
    norms, own = torch.empty(B, C, **floats), torch.empty(B, C, **floats)
    # rows of 16 bytes, or how they are aligned would depend on the batch
    counted = torch.zeros(2, -(-B * K // 4) * 4, dtype=torch.int32, device=x.device)
    moving = torch.zeros(iterations + 1, -(-B // 4) * 4, dtype=torch.int32, device=x.device)
    current = centroids if centroids is not None else torch.empty(B, K, D, **floats)
    unit = row_unit(x)
    strides = {"stride_xb": x.stride(0) // unit, "stride_xn": x.stride(1) // unit, "UNIT": unit}
    shared = {"N": N, "D": D, "C": C, **strides}
    choice = tile(K, x.dtype, metric)
    blocks = triton.cdiv(C, choice.BLOCK_R)

    def assign(t: int) -> None:
        half = x.dtype != torch.float32
        assign_kernel[(B * blocks,)](
            x_ptr=x,
            centroids_ptr=current,
            rows_ptr=selection.rows,
            counts_ptr=selection.counts,
            norms_ptr=norms,
            lengths_ptr=grouping.lengths,
            labels_ptr=grouping.labels,
            own_ptr=own,
            sizes_ptr=counted[t % 2],
            moving_ptr=moving[max(t - 1, 0)],
            moved_ptr=moving[t],
            K=K,
            blocks=blocks,
            **shared,
            SEEDS=t == 0,
            EUCLIDEAN=metric == "euclidean",
            # half types are exact in tf32, the centroid in two parts nearly is; and each step is
            # added in float32, where tensor cores that go on by themselves truncate
            PRECISION="tf32x3" if half else "ieee",
            BLOCK_R=choice.BLOCK_R,
            BLOCK_K=choice.BLOCK_K,
            BLOCK_D=choice.BLOCK_D,
            num_warps=choice.num_warps,
            num_stages=choice.num_stages,
        )
        repair_kernel[(B,)](
            counts_ptr=selection.counts,
            labels_ptr=grouping.labels,
            own_ptr=own,
            counted_ptr=counted[t % 2],
            next_ptr=counted[(t + 1) % 2],
            sizes_ptr=sizes,
            moving_ptr=moving[t - 1] if t > 0 else None,
            C=C,
            K=K,
            stride_sb=sizes.stride(0),
            BLOCK=1024,
            num_warps=8,
        )

    def gather(flags: Tensor | None) -> None:
        members_kernel[(B * K,)](
            counts_ptr=selection.counts,
            labels_ptr=grouping.labels,
            sizes_ptr=sizes,
            members_ptr=grouping.members,
            offsets_ptr=grouping.offsets,
            moving_ptr=flags,
            C=C,
            K=K,
            stride_sb=sizes.stride(0),
            BLOCK=1024,
            num_warps=4,
        )

    with device_guard(x):
        rows = 16
        norms_kernel[(B * triton.cdiv(C, rows),)](
            x_ptr=x,
            rows_ptr=selection.rows,
            counts_ptr=selection.counts,
            norms_ptr=norms,
            lengths_ptr=grouping.lengths,
            blocks=triton.cdiv(C, rows),
            **shared,
            EUCLIDEAN=metric == "euclidean",
            BLOCK_R=rows,
            BLOCK_D=128,
            num_warps=4,
        )
        assign(0)
        for t in range(1, iterations + 1):
            gather(moving[t - 1])
            means(x, selection, grouping, current, norms=norms, moving=moving[t - 1])
            assign(t)
        gather(None)
        if centroids is not None:
            owner = selection.owner
            means(x, selection, grouping, centroids, norms=norms, owner=owner)
    return grouping
