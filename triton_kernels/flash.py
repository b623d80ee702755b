"""Causal attention a tile of queries at a time, the inhibited pairs in bits by key."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .arithmetic import dot, narrow
from .focus_tiles import key_offsets, load_rows, products
from .launch import launch

_SIZES = (
    "H",
    "share",
    "M",
    "L",
    "Lq",
    "words",
    "tiles",
    "blocks",
    "stride_tb",
    "stride_qb",
    "stride_qh",
    "stride_qn",
    "stride_kb",
    "stride_kh",
    "stride_kn",
    "stride_vb",
    "stride_vh",
    "stride_vn",
)


@triton.jit
def _softmax_step(x, largest, total):
    """Weights of the logits x (base 2) against the largest so far, and what the former lose."""
    former = largest
    largest = tl.maximum(former, tl.max(x, 1))
    # no difference is inf - inf in a row that has seen nothing
    base = tl.where(largest == float("-inf"), 0.0, largest)
    weights = tl.exp2(x - base[:, None])
    factor = tl.exp2(former - base)
    return weights, factor, largest, total * factor + tl.sum(weights, 1)


@triton.jit(do_not_specialize=_SIZES)
def flash_kernel(
    q_ptr,  # [B, H, Lq, d], unit stride in d
    k_ptr,  # [B, H / share, L, d], or blocks of a paged cache
    v_ptr,
    table_ptr,  # i32 [B, pages] of a paged cache
    out_ptr,  # [B, H, Lq, dv]
    lse_ptr,  # f32 [B, H, Lq]
    keys_ptr,  # of the layout
    queries_ptr,
    counts_ptr,
    bits_ptr,  # i32 [B, M, words, Lq]: by key, see focus_bits.py
    flags_ptr,  # i32 [B, M, Lq]
    lists_ptr,  # i32 [B, M, blocks, tiles]
    lengths_ptr,  # i32 [B, M, blocks]: -1 where no query of the block has bits
    H,
    share,
    M,
    L,
    Lq,
    words,
    tiles,
    blocks,
    stride_tb,
    stride_qb,  # strides in units of UNIT elements
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    exponent,
    penalty,
    NEGATIVE: tl.constexpr,
    HAS_BITS: tl.constexpr,
    PAGE: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """A block of queries of one head a program.

    Tiles of keys that all its queries see and none of which is padding or inhibited come first,
    without a mask; then the others, where some have bits those of a list.
    """
    pid = tl.program_id(0)
    head = (pid // blocks).to(tl.int64)
    # the longest first
    block = blocks - 1 - pid % blocks
    b, h = head // H, head % H
    i = block * BLOCK_M + tl.arange(0, BLOCK_M)
    position = tl.load(queries_ptr + b * 2 * Lq + i, mask=i < Lq, other=-1)
    real = position >= 0
    first = tl.load(counts_ptr + b * 4 + 1)
    end = tl.load(counts_ptr + b * 4 + 2)
    holes = tl.load(counts_ptr + b * 4 + 3)
    stop = tl.minimum(tl.max(position, 0) + 1, end)
    seen_by_all = tl.minimum(tl.min(tl.where(real, position, L), 0) + 1, stop)

    q_ptr += (b * stride_qb + h * stride_qh) * UNIT
    k_ptr += h // share * stride_kh * UNIT
    v_ptr += h // share * stride_vh * UNIT
    if PAGE > 0:
        table_ptr += b * stride_tb
    else:
        k_ptr += b * stride_kb * UNIT
        v_ptr += b * stride_vb * UNIT
    k_page, k_step = tl.cast(stride_kb, tl.int64) * UNIT, tl.cast(stride_kn, tl.int64) * UNIT
    v_page, v_step = tl.cast(stride_vb, tl.int64) * UNIT, tl.cast(stride_vn, tl.int64) * UNIT
    keys_ptr += b * 3 * L
    q_offsets = i.to(tl.int64) * stride_qn * UNIT
    q = 0.0
    if CHUNK == BLOCK_D:
        q = load_rows(q_ptr, q_offsets, real, D, BLOCK_D, True)

    # tiles [begin, begin + count), of which [plain, plain + whole) need no mask
    begin = first // BLOCK_N
    count = tl.maximum((stop + BLOCK_N - 1) // BLOCK_N - begin, 0)
    plain = (first + BLOCK_N - 1) // BLOCK_N
    whole = tl.where(holes != 0, 0, tl.maximum(seen_by_all // BLOCK_N - plain, 0))
    listed = -1
    flags = tl.zeros((BLOCK_M,), tl.int32)
    if HAS_BITS:
        row = b * M + tl.minimum(h, M - 1)
        listed = tl.load(lengths_ptr + row * blocks + block)
        flags = tl.load(flags_ptr + row * Lq + i, mask=i < Lq, other=0)
        lists_ptr += (row * blocks + block) * tiles
        bits_ptr += row * words * Lq
        whole = tl.where(listed >= 0, 0, whole)
        count = tl.where(listed >= 0, listed, count)

    looked = tl.where(holes != 0, L, 0)
    sign = -exponent if NEGATIVE else exponent
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    n = tl.arange(0, BLOCK_N)
    for tile in range(plain, plain + whole):
        j = tile * BLOCK_N + n
        inside = j < L
        at = key_offsets(table_ptr, j, inside, k_page, k_step, PAGE)
        x = products(
            q, q_ptr, q_offsets, real, k_ptr, at, inside, D, BLOCK_D, CHUNK, CHUNK < BLOCK_D
        )
        at = key_offsets(table_ptr, j, inside, v_page, v_step, PAGE)
        v = load_rows(v_ptr, at, inside, DV, BLOCK_DV, False)
        weights, factor, largest, total = _softmax_step(x * sign, largest, total)
        acc = dot(narrow(weights, v.dtype), v, acc * factor[:, None], "ieee")

    for number in range(0, count - whole):
        tile = begin + number
        # the tiles without a mask lie behind the first of these, if that is cut
        tile = tl.where(tile >= plain, tile + whole, tile)
        if HAS_BITS:
            tile = tl.load(lists_ptr + number, mask=listed >= 0, other=tile)
        j = tile * BLOCK_N + n
        inside = (j >= first) & (j < stop)
        # what lies in the holes; nothing is loaded where there are none
        place = tl.load(keys_ptr + j, mask=inside & (j < looked), other=0)
        inside &= place != -1
        at = key_offsets(table_ptr, j, inside, k_page, k_step, PAGE)
        x = products(q, q_ptr, q_offsets, real, k_ptr, at, inside, D, BLOCK_D, CHUNK, True)
        at = key_offsets(table_ptr, j, inside, v_page, v_step, PAGE)
        v = load_rows(v_ptr, at, inside, DV, BLOCK_DV, True)
        x *= sign
        if HAS_BITS:
            word_ptr = bits_ptr + (tile * (BLOCK_N // 32)).to(tl.int64) * Lq + i
            word = tl.load(word_ptr, mask=flags != 0, other=0)
            word = tl.broadcast_to(word[:, None], (BLOCK_M, BLOCK_N))
            if BLOCK_N == 64:
                upper = tl.load(word_ptr + Lq, mask=flags != 0, other=0)
                word = tl.where((n >= 32)[None, :], upper[:, None], word)
            x = tl.where(((word >> (n & 31)[None, :]) & 1) != 0, x + penalty, x)
        x = tl.where(inside[None, :] & (j[None, :] <= position[:, None]), x, float("-inf"))
        weights, factor, largest, total = _softmax_step(x, largest, total)
        acc = dot(narrow(weights, v.dtype), v, acc * factor[:, None], "ieee")

    some = real & (total != 0)
    total = tl.where(some, total, 1.0)
    acc = tl.where(some[:, None], acc / total[:, None], 0.0)
    lse = tl.where(some, (largest + tl.log2(total)) * 0.6931471805599453, float("-inf"))
    dv = tl.arange(0, BLOCK_DV)
    mask = (i < Lq)[:, None]
    if DV < BLOCK_DV:
        mask = mask & (dv < DV)[None, :]
    out_ptr += head * Lq * DV + i.to(tl.int64)[:, None] * DV + dv[None, :]
    tl.store(out_ptr, narrow(acc, out_ptr.dtype.element_ty), mask=mask)
    tl.store(lse_ptr + head * Lq + i, lse, mask=i < Lq)


class Tile(NamedTuple):
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_D: int
    BLOCK_DV: int
    CHUNK: int
    num_warps: int
    num_stages: int


def tile(d: int, dv: int, dtype: torch.dtype, arch: tuple[int, int]) -> Tile:
    """The same for every batch and sequence, so that none of them compiles anew."""
    features, values = (max(16, triton.next_power_of_2(n)) for n in (d, dv))
    if dtype == torch.float32:
        return Tile(32, 32, features, values, min(16, features), 8 if values > 128 else 4, 2)
    if max(features, values) > 128:
        return Tile(64, 32, features, values, features, 8, 2)
    if arch[0] == 8 and max(features, values) > 64:
        # there queries are held in registers
        return Tile(128, 32, features, values, features, 8, 2)
    return Tile(128, 64, features, values, features, 8, 3 if arch[0] == 9 else 2)


def flash(choice: Tile, values: dict[str, Any]) -> None:
    """values: what the kernel takes beside its tile."""
    blocks = triton.cdiv(values["Lq"], choice.BLOCK_M)
    programs = values["q_ptr"].shape[0] * values["H"] * blocks
    launch(flash_kernel, programs, values, blocks=blocks, **choice._asdict())
