"""The attention of text queries, mean over heads: the logits twice, as no store is cheaper.

Storing the logits of all heads and reading them again moves 8 bytes a pair and head; computing them
again costs 2 d operations, which tensor cores do in less time for every d here.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .focus_tiles import key_offsets, load_rows, products
from .launch import launch

_SIZES = (
    "H",
    "share",
    "M",
    "L",
    "Lq",
    "images",
    "blocks",
    "columns",
    "start_row",
    "rows",
    "stride_tb",
    "stride_qb",
    "stride_qh",
    "stride_qn",
    "stride_kb",
    "stride_kh",
    "stride_kn",
    "stride_sb",
    "stride_sh",
    "stride_sn",
    "stride_si",
)


@triton.jit(do_not_specialize=_SIZES)
def text_softmax_kernel(
    q_ptr,  # [B, H, Lq, d], unit stride in d
    k_ptr,  # [B, H / share, L, d], or blocks of a paged cache
    table_ptr,
    keys_ptr,  # of the layout
    rows_ptr,
    counts_ptr,
    largest_ptr,  # f32 [B, H, Lq]: the largest logit (base 2) of a text query, by row
    inverses_ptr,  # f32 [B, H, Lq]: 1 / its sum of exp2(logit - largest)
    H,
    share,
    L,
    Lq,
    blocks,
    stride_tb,
    stride_qb,  # strides in units of UNIT elements
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kn,
    exponent,
    NEGATIVE: tl.constexpr,
    PAGE: tl.constexpr,
    D: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """A block of text queries of one head a program."""
    pid = tl.program_id(0)
    head = (pid // blocks).to(tl.int64)
    b, h = head // H, head % H
    texts = tl.load(counts_ptr + b * 4)
    start_row = pid % blocks * BLOCK_M
    if start_row >= texts:
        return
    t = start_row + tl.arange(0, BLOCK_M)
    rows_ptr += b * 4 * Lq
    i = tl.load(rows_ptr + t, mask=t < texts, other=0)
    position = tl.load(rows_ptr + Lq + t, mask=t < texts, other=-1)
    first = tl.load(counts_ptr + b * 4 + 1)
    holes = tl.load(counts_ptr + b * 4 + 3)
    looked = tl.where(holes != 0, L, 0)
    stop = tl.max(position, 0) + 1

    q_ptr += (b * stride_qb + h * stride_qh) * UNIT
    k_ptr += h // share * stride_kh * UNIT
    if PAGE > 0:
        table_ptr += b * stride_tb
    else:
        k_ptr += b * stride_kb * UNIT
    page, step = tl.cast(stride_kb, tl.int64) * UNIT, tl.cast(stride_kn, tl.int64) * UNIT
    keys_ptr += b * 3 * L
    q_offsets = i.to(tl.int64) * stride_qn * UNIT
    q = 0.0
    if CHUNK == BLOCK_D:
        q = load_rows(q_ptr, q_offsets, t < texts, D, BLOCK_D, True)
    sign = -exponent if NEGATIVE else exponent
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(first // BLOCK_N * BLOCK_N, stop, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        inside = (j >= first) & (j < stop)
        inside &= tl.load(keys_ptr + j, mask=inside & (j < looked), other=0) != -1
        at = key_offsets(table_ptr, j, inside, page, step, PAGE)
        x = products(q, q_ptr, q_offsets, t < texts, k_ptr, at, inside, D, BLOCK_D, CHUNK, True)
        wanted = inside[None, :] & (j[None, :] <= position[:, None])
        former = largest
        largest = tl.maximum(former, tl.max(tl.where(wanted, x * sign, float("-inf")), 1))
        base = tl.where(largest == float("-inf"), 0.0, largest)
        # rounded once, as text_attention does it: of large logits the difference is felt
        x = tl.where(wanted, tl.fma(x, sign, -base[:, None]), float("-inf"))
        total = total * tl.exp2(former - base) + tl.sum(tl.exp2(x), 1)
    tl.store(largest_ptr + head * Lq + t, largest, mask=t < texts)
    total = tl.where(t < texts, total, 1.0)
    tl.store(inverses_ptr + head * Lq + t, 1.0 / total, mask=t < texts)


@triton.jit
def store_attention(
    attention,  # [rows, keys]: the mean over heads
    wanted,  # of the same shape: pairs that are seen
    place,  # of the keys
    t,  # rows of the text queries
    position,
    seen,
    inside,
    first_rank,  # from here on the ranks that this tile fills with zeros where none is seen
    text_ptr,  # f32 [rows, columns], of these heads
    state_ptr,  # f32 [L_max, images]
    start_row,
    columns,
    images,
    stride_sn,
    stride_si,
    BLOCK_N: tl.constexpr,
):
    """To text by rank of the text key, to images into the state."""
    text = wanted & (place < -1)[None, :]
    text_at = (t - start_row).to(tl.int64)[:, None] * columns + (-2 - place)[None, :]
    tl.store(text_ptr + text_at, attention, mask=text)
    state_ptr += position.to(tl.int64)[:, None] * stride_sn
    image = wanted & ((place >= 0) & (place < images))[None, :]
    tl.store(state_ptr + place.to(tl.int64)[None, :] * stride_si, attention, mask=image)
    r = first_rank + tl.arange(0, BLOCK_N)
    none = inside[:, None] & (r[None, :] >= seen[:, None]) & (r < images)[None, :]
    zeros = tl.zeros(attention.shape, tl.float32)
    tl.store(state_ptr + r.to(tl.int64)[None, :] * stride_si, zeros, mask=none)


@triton.jit(do_not_specialize=_SIZES)
def text_attention_kernel(
    q_ptr,
    k_ptr,
    table_ptr,
    keys_ptr,
    rows_ptr,
    counts_ptr,
    largest_ptr,
    inverses_ptr,
    text_ptr,  # f32 [B, M, rows, columns]: to text keys by rank
    state_ptr,  # f32 [B, M, L_max, images]: to image tokens, by position of the query
    H,
    share,
    M,
    L,
    Lq,
    images,
    blocks,
    columns,
    start_row,  # the first text query of text_ptr
    rows,
    stride_tb,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_sb,
    stride_sh,
    stride_sn,
    stride_si,
    exponent,
    NEGATIVE: tl.constexpr,
    PAGE: tl.constexpr,
    D: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """A block of text queries with a tile of keys a program, over the heads of one mean."""
    pid = tl.program_id(0)
    tile = pid % blocks
    block = pid // blocks % ((rows + BLOCK_M - 1) // BLOCK_M)
    head = (pid // blocks // ((rows + BLOCK_M - 1) // BLOCK_M)).to(tl.int64)
    b, m = head // M, head % M
    texts = tl.minimum(tl.load(counts_ptr + b * 4), start_row + rows)
    first_row = start_row + block * BLOCK_M
    if first_row >= texts:
        return
    t = first_row + tl.arange(0, BLOCK_M)
    within = t < texts
    rows_ptr += b * 4 * Lq
    i = tl.load(rows_ptr + t, mask=within, other=0)
    position = tl.load(rows_ptr + Lq + t, mask=within, other=-1)
    seen = tl.load(rows_ptr + 2 * Lq + t, mask=within, other=0)
    stop = tl.max(position, 0) + 1
    j = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    place = tl.load(keys_ptr + b * 3 * L + j, mask=j < stop, other=-1)
    inside = place != -1

    q_ptr += b * stride_qb * UNIT
    if PAGE > 0:
        table_ptr += b * stride_tb
    else:
        k_ptr += b * stride_kb * UNIT
    page, step = tl.cast(stride_kb, tl.int64) * UNIT, tl.cast(stride_kn, tl.int64) * UNIT
    q_offsets = i.to(tl.int64) * stride_qn * UNIT
    at = key_offsets(table_ptr, j, inside, page, step, PAGE)
    sign = -exponent if NEGATIVE else exponent
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    heads = H // M
    # none where all keys lie behind all queries
    last = tl.where(tile * BLOCK_N < stop, heads, 0)
    for number in range(0, last):
        h = m * heads + number
        q_head = q_ptr + h * stride_qh * UNIT
        k_head = k_ptr + h // share * stride_kh * UNIT
        q = 0.0
        if CHUNK == BLOCK_D:
            q = load_rows(q_head, q_offsets, within, D, BLOCK_D, True)
        x = products(q, q_head, q_offsets, within, k_head, at, inside, D, BLOCK_D, CHUNK, True)
        row = (b * H + h) * Lq + t
        largest = tl.load(largest_ptr + row, mask=within, other=0.0)
        inverse = tl.load(inverses_ptr + row, mask=within, other=0.0)
        total += tl.exp2(tl.fma(x, sign, -largest[:, None])) * inverse[:, None]
    wanted = inside[None, :] & (j[None, :] <= position[:, None])
    store_attention(
        total / heads,
        wanted,
        place,
        t,
        position,
        seen,
        within,
        tile * BLOCK_N,
        text_ptr + head * rows * columns,
        state_ptr + b * stride_sb + m * stride_sh,
        start_row,
        columns,
        images,
        stride_sn,
        stride_si,
        BLOCK_N,
    )


class Tile(NamedTuple):
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_D: int
    CHUNK: int
    num_warps: int
    num_stages: int


def tile(d: int, dtype: torch.dtype) -> Tile:
    """The same for every batch and sequence, so that none of them compiles anew."""
    features = max(16, triton.next_power_of_2(d))
    if dtype == torch.float32:
        return Tile(32, 32, features, min(16, features), 4, 2)
    return Tile(64, 64, features, features, 4, 3 if d <= 128 else 2)


def text_softmax(choice: Tile, values: dict[str, Any]) -> None:
    blocks = triton.cdiv(values["Lq"], choice.BLOCK_M)
    programs = values["q_ptr"].shape[0] * values["H"] * blocks
    launch(text_softmax_kernel, programs, values, blocks=blocks, **choice._asdict())


def text_attention(choice: Tile, values: dict[str, Any]) -> None:
    # a tile of keys also fills a tile of ranks
    blocks = triton.cdiv(max(values["L"], values["images"]), choice.BLOCK_N)
    row_blocks = triton.cdiv(values["rows"], choice.BLOCK_M)
    programs = values["q_ptr"].shape[0] * values["M"] * row_blocks * blocks
    if choice.CHUNK == choice.BLOCK_D:
        # with the means of all heads held, a warp has half of the tile
        choice = choice._replace(num_warps=8)
    launch(text_attention_kernel, programs, values, blocks=blocks, **choice._asdict())
