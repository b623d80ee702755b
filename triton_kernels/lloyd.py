"""All rounds of Lloyd's algorithm from the pairs of an image, one program an image.

With M the pairs and S[k, i] the sum of M[j, i] over the members j of cluster k, every distance is
known without the features: cosine 1 - r_i S[k, i] / sqrt(T_k) with T_k the sum of r_i S[k, i] over
the members (S of M[j, i] r_j, r = 1 / |x|), euclidean S[k, i] / n - T_k / 2n^2. S is float64 and
follows the tokens that change cluster, so it does not depend on the way there.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import INTERPRETED, inverse, inverse_root
from .launch import device_guard
from .pairs import Pairs
from .primary import Selection

LARGEST_CAPACITY = 1024
# a cluster, a rank and one bit share 31 bits
MOST_CLUSTERS = 2**20 - 1

_SIZES = ("D", "C", "K", "iterations", "ld", "stride_sb")
_NEVER = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _cluster_sizes(labels, sizes_ptr, K, BLOCK_K: tl.constexpr):
    """Write the number of members of each cluster; return the smallest."""
    smallest = tl.full((), 0x7FFFFFFF, tl.int32)
    for first in range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        size = tl.sum((labels[None, :] == k[:, None]).to(tl.int32), 1)
        tl.store(sizes_ptr + k, size, mask=k < K)
        smallest = tl.minimum(smallest, tl.min(tl.where(k < K, size, 0x7FFFFFFF), 0))
    return smallest


@triton.jit
def _repair(labels, own, r, inside, sizes_ptr, K, BLOCK_K: tl.constexpr):
    """Each empty cluster takes the token farthest from its own centroid among those of two."""
    if _cluster_sizes(labels, sizes_ptr, K, BLOCK_K) == 0:
        tl.debug_barrier()
        # of the cluster of each token
        companions = tl.load(sizes_ptr + labels, mask=inside, other=0)
        for k in range(0, K):
            if tl.load(sizes_ptr + k) == 0:
                movable = inside & (companions >= 2)
                if tl.max(movable.to(tl.int32), 0) > 0:
                    farthest = tl.max(tl.where(movable, own, float("-inf")), 0)
                    token = tl.min(tl.where(movable & (own == farthest), r, _NEVER), 0)
                    moved = r == token
                    former = tl.sum(tl.where(moved, labels, 0), 0)
                    companions -= (labels == former).to(tl.int32)
                    companions = tl.where(moved, 1, companions)
                    labels = tl.where(moved, k, labels)
        tl.debug_barrier()
    return labels


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=("sizes_ptr",))
def lloyd_kernel(
    pairs_ptr,  # f32 [B, C, ld]
    norms_ptr,  # f32 [B, C]
    counts_ptr,  # i32 [B]
    sums_ptr,  # f64 [B, K, ld]: S
    events_ptr,  # i32 [B, 2 BLOCK_R]
    labels_ptr,  # i32 [B, C], by rank
    members_ptr,  # i32 [B, C]: ranks, cluster after cluster
    offsets_ptr,  # i32 [B, K + 1]: where each cluster begins in members
    sizes_ptr,  # i32, stride_sb apart from image to image
    lengths_ptr,  # f32 [B, C]: what a row is divided by to give its feature
    D,
    C,
    K,
    iterations,
    ld,  # in units of 4
    stride_sb,
    EUCLIDEAN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    ld = tl.cast(ld, tl.int64) * 4
    pairs_ptr += b * C * ld
    norms_ptr += b * C
    sums_ptr += b * K * ld
    events_ptr += b * 2 * BLOCK_R
    members_ptr += b * C
    offsets_ptr += b * (K + 1)
    sizes_ptr += b * stride_sb
    R = tl.load(counts_ptr + b)
    r = tl.arange(0, BLOCK_R)
    inside = r < R
    # rows are read in groups of four columns, 16 bytes
    near_r = r // 4 < (R + 3) // 4
    norm = tl.load(norms_ptr + r, mask=inside, other=0.0)
    finite = inside & (norm < float("inf"))
    zero = D * 1.1754943508222875e-38
    length = tl.full((BLOCK_R,), 1.0, tl.float32)
    if not EUCLIDEAN:
        usable = finite & (norm > zero)
        scale = tl.where(usable, inverse_root(tl.where(usable, norm, 1.0).to(tl.float64)), 0.0)
        length = tl.where(usable, tl.sqrt_rn(norm), float("inf"))
    tl.store(lengths_ptr + b * C + r, length, mask=inside)
    # a token that is not finite has a zero feature
    norm = tl.where(finite, norm, 0.0)

    # the first centroids are features
    labels = tl.where(inside, 0, -1)
    own = tl.full((BLOCK_R,), float("inf"), tl.float32)
    for seeded in range(0, K):
        seed = (tl.cast(2 * seeded + 1, tl.int64) * R // (2 * K)).to(tl.int32)
        to_seed = tl.load(pairs_ptr + seed * ld + r, mask=near_r, other=0.0)
        seed_norm = tl.load(norms_ptr + seed, mask=seed < R, other=0.0)
        seed_finite = seed_norm < float("inf")
        if EUCLIDEAN:
            distance = tl.where(seed_finite, to_seed, norm)
        else:
            nonzero = seed_finite & (seed_norm > zero)
            seed_scale = inverse_root(tl.where(nonzero, seed_norm, 1.0).to(tl.float64))
            cosine = tl.where(nonzero, to_seed * scale * seed_scale, 0.0)
            distance = 1 - cosine.to(tl.float32)
        closer = finite & (distance < own)
        own = tl.where(closer, distance, own)
        labels = tl.where(closer, seeded, labels)
    labels = _repair(labels, own, r, inside, sizes_ptr, K, BLOCK_K)

    for cleared in range(0, K):
        tl.store(sums_ptr + cleared * ld + r, tl.zeros((BLOCK_R,), tl.float64), mask=near_r)
    former = tl.full((BLOCK_R,), -1, tl.int32)
    round = 0
    moving = R > 0
    while (round < iterations) & moving:
        # tokens that joined and left, in the order of their clusters
        moved = finite & (labels != former)
        joined = tl.where(moved, (labels << 11) | (r << 1), _NEVER)
        left = tl.where(moved & (former >= 0), (former << 11) | (r << 1) | 1, _NEVER)
        events = tl.sort(tl.reshape(tl.join(joined, left), (2 * BLOCK_R,)))
        total = tl.sum((events != _NEVER).to(tl.int32), 0)
        tl.debug_barrier()
        tl.store(events_ptr + tl.arange(0, 2 * BLOCK_R), events)
        tl.debug_barrier()
        done = 0
        while done < total:
            e = done + tl.arange(0, BLOCK_E)
            event = tl.load(events_ptr + e, mask=e < total, other=_NEVER)
            place = tl.load(events_ptr + done) >> 11
            here = (event >> 11) == place
            token = (event >> 1) & 1023
            sign = tl.where((event & 1) == 0, 1.0, -1.0).to(tl.float64)
            if not EUCLIDEAN:
                token_norm = tl.load(norms_ptr + token, mask=here, other=1.0)
                nonzero_token = token_norm > zero
                safe_norm = tl.where(nonzero_token, token_norm, 1.0)
                token_scale = inverse_root(safe_norm.to(tl.float64))
                sign = tl.where(nonzero_token, sign * token_scale, 0.0)
            row = tl.load(
                pairs_ptr + token[:, None] * ld + r[None, :],
                mask=here[:, None] & near_r[None, :],
                other=0.0,
            )
            change = tl.sum(row * tl.where(here, sign, 0.0)[:, None], 0)
            sum_ptr = sums_ptr + place * ld + r
            tl.store(sum_ptr, tl.load(sum_ptr, mask=near_r, other=0.0) + change, mask=near_r)
            # the next step may add to the same sums, on other threads
            tl.debug_barrier()
            done += tl.sum(here.to(tl.int32), 0)
        tl.debug_barrier()

        former = labels
        labels = tl.where(inside, 0, -1)
        own = tl.full((BLOCK_R,), float("inf"), tl.float32)
        for first in range(0, K, BLOCK_K):
            k = first + tl.arange(0, BLOCK_K)
            member = (former[None, :] == k[:, None]) & finite[None, :]
            n = tl.sum(member.to(tl.int32), 1).to(tl.float64)[:, None]
            sums = tl.load(
                sums_ptr + k[:, None] * ld + r[None, :],
                mask=(k < K)[:, None] & near_r[None, :],
                other=0.0,
            )
            if not EUCLIDEAN:
                # r_i S[k, i]
                sums = sums * scale[None, :]
            total_k = tl.sum(tl.where(member, sums, 0.0), 1)[:, None]
            if EUCLIDEAN:
                share = inverse(tl.where(n > 0, n, 1.0))
                distance = sums * share - 0.5 * total_k * share * share
                # the zero vector stands for a cluster without a finite member
                square = tl.load(norms_ptr + r, mask=finite, other=0.0)
                distance = tl.where(n > 0, distance, square[None, :])
            else:
                # a centroid shorter than 2^-25, the rounding of its members, is zero
                nonzero = (n > 0) & (total_k > n * n * 8.881784197001252e-16)
                share = inverse_root(tl.where(nonzero, total_k, 1.0))
                # rounded before it is taken from 1: beyond that, equal directions would not tie
                distance = 1 - tl.where(nonzero, sums * share, 0.0).to(tl.float32)
            near = distance.to(tl.float32)
            candidate = (k < K)[:, None] & finite[None, :] & (near == near)
            near = tl.where(candidate, near, float("inf"))
            nearest = tl.min(near, 0)
            tie = tl.where(candidate & (near == nearest[None, :]), k[:, None], _NEVER)
            closer = nearest < own
            labels = tl.where(closer, tl.min(tie, 0), labels)
            own = tl.where(closer, nearest, own)
        labels = _repair(labels, own, r, inside, sizes_ptr, K, BLOCK_K)
        moving = tl.max((labels != former).to(tl.int32), 0) > 0
        round += 1

    tl.store(labels_ptr + b * C + r, labels, mask=inside)
    order = tl.sort(tl.where(inside, (labels << 10) | r, _NEVER))
    tl.store(members_ptr + r, order & 1023, mask=inside)
    begin = 0
    for first in range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        size = tl.sum((labels[None, :] == k[:, None]).to(tl.int32), 1)
        tl.store(sizes_ptr + k, size, mask=k < K)
        tl.store(offsets_ptr + k, begin + tl.cumsum(size, 0) - size, mask=k < K)
        begin += tl.sum(size, 0)
    tl.store(offsets_ptr + K, begin)


class Grouping(NamedTuple):
    """The clusters of each image over the ranks of its selected tokens.

    labels, members: i32 [B, C]; offsets: i32 [B, K + 1]; lengths: f32 [B, C], what a row is divided
    by to give its feature. What lies beyond the R tokens of an image is not written.
    """

    labels: Tensor
    members: Tensor
    offsets: Tensor
    lengths: Tensor

    @classmethod
    def empty(cls, B: int, C: int, K: int, device: torch.device) -> Grouping:
        ints = {"dtype": torch.int32, "device": device}
        return cls(
            torch.empty(B, C, **ints),
            torch.empty(B, C, **ints),
            torch.empty(B, K + 1, **ints),
            torch.empty(B, C, dtype=torch.float32, device=device),
        )


def lloyd(
    pairs: Pairs,
    selection: Selection,
    features: int,
    num_clusters: int,
    iterations: int,
    metric: str,
    sizes: Tensor,
) -> Grouping:
    """Cluster the selected tokens of each image. sizes: i32 [B, K] to write, unit stride in K."""
    B, C, ld = pairs.values.shape
    device = pairs.values.device
    grouping = Grouping.empty(B, C, num_clusters, device)
    # the block is fixed, so that no number of tokens compiles anew; interpreted it may be as small
    # as they are
    block = max(16, triton.next_power_of_2(C)) if INTERPRETED else LARGEST_CAPACITY
    with device_guard(pairs.values):
        lloyd_kernel[(B,)](
            pairs_ptr=pairs.values,
            norms_ptr=pairs.norms,
            counts_ptr=selection.counts,
            sums_ptr=torch.empty(B, num_clusters, ld, dtype=torch.float64, device=device),
            events_ptr=torch.empty(B, 2 * block, dtype=torch.int32, device=device),
            labels_ptr=grouping.labels,
            members_ptr=grouping.members,
            offsets_ptr=grouping.offsets,
            sizes_ptr=sizes,
            lengths_ptr=grouping.lengths,
            D=features,
            C=C,
            K=num_clusters,
            iterations=iterations,
            ld=ld // 4,
            stride_sb=sizes.stride(0),
            EUCLIDEAN=metric == "euclidean",
            BLOCK_R=block,
            # as many clusters a step as the registers of 16 warps hold
            BLOCK_K=2 if metric == "euclidean" else 4,
            BLOCK_E=8,
            num_warps=16,
        )
    return grouping
