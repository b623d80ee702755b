"""Inhibited pairs in the order of the keys, and the tiles of keys that are left of them."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .focus_layout import Layout
from .launch import launch

_SIZES = (
    "M",
    "L",
    "Lq",
    "W",
    "words",
    "tiles",
    "blocks",
    "skip",
    "stride_mb",
    "stride_mh",
    "stride_mn",
    "stride_mw",
)


@triton.jit
def packed(bits, BLOCK: tl.constexpr):
    """i32 [BLOCK] of zeros and ones -> i32 [BLOCK / 32], the first in the lowest bit."""
    shifted = bits << (tl.arange(0, BLOCK) & 31)
    return tl.sum(tl.reshape(shifted, (BLOCK // 32, 32)), 1).to(tl.int32)


@triton.jit(do_not_specialize=_SIZES)
def bits_kernel(
    mask_ptr,  # i32 [B, M, Lq, W], by rank
    keys_ptr,  # of the layout
    queries_ptr,
    bits_ptr,  # i32 [B, M, words, Lq], by key
    flags_ptr,  # i32 [B, M, Lq]: whether the row of the mask has a bit; bits are written only then
    M,
    L,
    Lq,
    W,
    words,
    stride_mb,
    stride_mh,
    stride_mn,
    stride_mw,
    BLOCK_W: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A query a program."""
    pid = tl.program_id(0).to(tl.int64)
    row, i = pid // Lq, pid % Lq
    b, m = row // M, row % M
    mask_ptr += b * stride_mb + m * stride_mh + i * stride_mn
    position = tl.load(queries_ptr + b * 2 * Lq + i)
    some = tl.zeros((BLOCK_W,), tl.int32)
    for start in range(0, tl.where(position >= 0, W, 0), BLOCK_W):
        w = start + tl.arange(0, BLOCK_W)
        some |= tl.load(mask_ptr + w.to(tl.int64) * stride_mw, mask=w < W, other=0)
    flag = tl.max((some != 0).to(tl.int32), 0)
    tl.store(flags_ptr + pid, flag)
    if flag == 0:
        return
    for start in range(0, position + 1, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        rank = tl.load(keys_ptr + b * 3 * L + j, mask=j <= position, other=-1)
        held = (rank >= 0) & (rank // 32 < W)
        word = tl.load(mask_ptr + (rank // 32).to(tl.int64) * stride_mw, mask=held, other=0)
        w = start // 32 + tl.arange(0, BLOCK_N // 32)
        at = bits_ptr + (row * words + w) * Lq + i
        tl.store(at, packed((word >> (rank & 31)) & 1, BLOCK_N), mask=w < words)


@triton.jit(do_not_specialize=_SIZES)
def lists_kernel(
    bits_ptr,
    flags_ptr,
    valid_ptr,  # of the layout
    queries_ptr,
    lists_ptr,  # i32 [B, M, blocks, tiles]: tiles of which a pair is seen and not inhibited
    lengths_ptr,  # i32 [B, M, blocks]: how many; -1 where no query of the block has bits
    M,
    Lq,
    words,
    tiles,
    blocks,
    skip,  # -1, or 0: those of inhibited pairs alone stay too
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """A block of queries a program."""
    pid = tl.program_id(0).to(tl.int64)
    row, block = pid // blocks, pid % blocks
    b = row // M
    i = block * BLOCK_M + tl.arange(0, BLOCK_M)
    flags = tl.load(flags_ptr + row * Lq + i, mask=i < Lq, other=0)
    if tl.max(flags, 0) == 0:
        tl.store(lengths_ptr + pid, -1)
        return
    position = tl.load(queries_ptr + b * 2 * Lq + i, mask=i < Lq, other=-1)
    stop = tl.max(position, 0) + 1
    written = 0
    for start in range(0, (stop + BLOCK_N - 1) // BLOCK_N, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        live = tl.zeros((BLOCK_T,), tl.int32)
        for part in tl.static_range(BLOCK_N // 32):
            w = t * (BLOCK_N // 32) + part
            valid = tl.load(valid_ptr + b * words + w, mask=w < words, other=0)
            # the lowest bits, one for each key that is not behind the query
            ahead = tl.minimum(tl.maximum(position[:, None] + 1 - w[None, :] * 32, 0), 32)
            seen = tl.where(ahead == 32, -1, (1 << (ahead & 31)) - 1) & valid[None, :]
            inside = (flags != 0)[:, None] & (w < words)[None, :] & (seen != 0)
            at = bits_ptr + (row * words + w)[None, :] * Lq + i[:, None]
            bits = tl.load(at, mask=inside, other=0)
            # with a weight left every pair counts
            live |= tl.max(((seen & ~(bits & skip)) != 0).to(tl.int32), 0)
        place = written + tl.cumsum(live, 0) - live
        tl.store(lists_ptr + pid * tiles + place, t, mask=live != 0)
        written += tl.sum(live, 0)
    tl.store(lengths_ptr + pid, written)


class Bits(NamedTuple):
    """bits: i32 [B, M, words, Lq], by key; flags: i32 [B, M, Lq], whether a query has any; of one
    that has none they are not written."""

    bits: Tensor
    flags: Tensor


def empty_bits(heads: int, at: Layout) -> Bits:
    B, _, queries = at.queries.shape
    new = at.queries.new_empty
    return Bits(new(B, heads, at.valid.shape[1], queries), new(B, heads, queries))


def bits_by_key(mask: Tensor, at: Layout) -> Bits:
    """Of a mask i32 [B, M, Lq, W] by rank."""
    B, M, Lq, W = mask.shape
    made = empty_bits(M, at)
    launch(
        bits_kernel,
        B * M * Lq,
        at.values(),
        mask_ptr=mask,
        bits_ptr=made.bits,
        flags_ptr=made.flags,
        M=M,
        W=W,
        **{f"stride_m{axis}": mask.stride(n) for n, axis in enumerate("bhnw")},
        BLOCK_W=32,
        BLOCK_N=256,
        num_warps=1,
    )
    return made


def lists(
    made: Bits, at: Layout, suppression: float, block_m: int, block_n: int
) -> tuple[Tensor, Tensor]:
    """Which tiles of block_n keys each block of block_m queries must look at."""
    B, M, words, Lq = made.bits.shape
    blocks, tiles = triton.cdiv(Lq, block_m), words * 32 // block_n
    new = at.queries.new_empty
    found, lengths = new(B, M, blocks, tiles), new(B, M, blocks)
    launch(
        lists_kernel,
        B * M * blocks,
        at.values(),
        bits_ptr=made.bits,
        flags_ptr=made.flags,
        lists_ptr=found,
        lengths_ptr=lengths,
        M=M,
        tiles=tiles,
        blocks=blocks,
        skip=-int(suppression == 0),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_T=16,
        num_warps=4,
    )
    return found, lengths
