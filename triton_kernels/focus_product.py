"""F = A_tt A_tv: what text attends to, through the text before it."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import dot
from .launch import launch, row_unit

_SIZES = (
    "M",
    "L",
    "Lq",
    "images",
    "blocks",
    "row_blocks",
    "columns",
    "start_row",
    "rows",
    "span",
    "splits",
    "ld",
    "stride_sb",
    "stride_sh",
    "stride_sn",
    "stride_si",
)


@triton.jit
def _state_rows(state_ptr, at, inside, r, images, stride_sn, stride_si, UNIT: tl.constexpr):
    """The state [keys, ranks] of the text keys at these positions; zeros where not inside."""
    at = at.to(tl.int64)[:, None] * stride_sn
    if UNIT > 1:
        # whole groups of ranks, so that a load is 16 bytes
        at = at * UNIT + r[None, :]
        in_r = r // UNIT < images // UNIT
    else:
        at = at + r.to(tl.int64)[None, :] * stride_si
        in_r = r < images
    return tl.load(state_ptr + at, mask=inside[:, None] & in_r[None, :], other=0.0)


@triton.jit(do_not_specialize=_SIZES)
def product_kernel(
    text_ptr,  # f32 [B, M, rows, columns]
    state_ptr,  # f32 [B, M, L_max, images]
    keys_ptr,  # of the layout
    rows_ptr,
    counts_ptr,
    scores_ptr,  # f32 [B, M, ld, images]: rows of queries if BY_QUERY, or as text_ptr has them
    M,
    L,
    Lq,
    images,
    blocks,
    row_blocks,
    columns,
    start_row,
    rows,
    ld,
    stride_sb,  # strides in units of STATE_UNIT elements, but that of the last
    stride_sh,
    stride_sn,
    stride_si,
    STATE_UNIT: tl.constexpr,
    BY_QUERY: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile of scores a program."""
    pid = tl.program_id(0)
    block, rest = pid % blocks, pid // blocks
    row_block = rest % row_blocks
    head = (rest // row_blocks).to(tl.int64)
    b, m = head // M, head % M
    texts = tl.minimum(tl.load(counts_ptr + b * 4), start_row + rows)
    first_row = start_row + row_block * BLOCK_M
    if first_row >= texts:
        return
    t = first_row + tl.arange(0, BLOCK_M)
    within = t < texts
    rows_ptr += b * 4 * Lq
    position = tl.load(rows_ptr + Lq + t, mask=within, other=0)
    visible = tl.load(rows_ptr + 3 * Lq + t, mask=within, other=0)
    stop = tl.max(visible, 0)
    r = block * BLOCK_N + tl.arange(0, BLOCK_N)
    state_ptr += (b * stride_sb + m * stride_sh) * STATE_UNIT
    text_ptr += (head * rows + (t - start_row).to(tl.int64))[:, None] * columns
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, stop, BLOCK_K):
        c = start + tl.arange(0, BLOCK_K)
        weights = tl.load(text_ptr + c[None, :], mask=c[None, :] < visible[:, None], other=0.0)
        # rows of keys that no query sees may not be written yet
        at = tl.load(keys_ptr + (b * 3 + 2) * L + c, mask=c < stop, other=0)
        to_image = _state_rows(state_ptr, at, c < stop, r, images, stride_sn, stride_si, STATE_UNIT)
        acc = dot(weights, to_image, acc, "ieee")
        total += tl.sum(weights, 1)
    mask = within[:, None] & (r < images)[None, :]
    if RENORMALIZE:
        acc = acc / tl.where(total == 0, 1.0, total)[:, None]
    if RESIDUAL:
        acc += _state_rows(state_ptr, position, within, r, images, stride_sn, stride_si, STATE_UNIT)
    row = t - start_row
    if BY_QUERY:
        row = tl.load(rows_ptr + t, mask=within, other=0)
    line = head * ld + row.to(tl.int64)
    tl.store(scores_ptr + line[:, None] * images + r[None, :], acc, mask=mask)


@triton.jit(do_not_specialize=_SIZES)
def product_split_kernel(
    text_ptr,  # f32 [B, M, rows, columns]
    state_ptr,  # f32 [B, M, L_max, images]
    keys_ptr,  # of the layout
    rows_ptr,
    counts_ptr,
    parts_ptr,  # f32 [B, M, rows, splits, images]
    totals_ptr,  # f32 [B, M, rows, splits]: the sums of the weights
    M,
    L,
    Lq,
    images,
    blocks,
    columns,
    rows,
    span,  # text keys of a split
    splits,
    stride_sb,
    stride_sh,
    stride_sn,
    stride_si,
    STATE_UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One split of the sum of one text query a program."""
    pid = tl.program_id(0)
    block, rest = pid % blocks, pid // blocks
    split, rest = rest % splits, rest // splits
    t = rest % rows
    head = (rest // rows).to(tl.int64)
    b, m = head // M, head % M
    if t >= tl.load(counts_ptr + b * 4):
        return
    first = split * span
    stop = tl.minimum(tl.load(rows_ptr + (b * 4 + 3) * Lq + t), first + span)
    if first >= stop:
        return
    line = head * rows + t
    r = block * BLOCK_N + tl.arange(0, BLOCK_N)
    state_ptr += (b * stride_sb + m * stride_sh) * STATE_UNIT
    acc = tl.zeros((BLOCK_K, BLOCK_N), tl.float32)
    total = tl.zeros((BLOCK_K,), tl.float32)
    for start in range(first, stop, BLOCK_K):
        c = start + tl.arange(0, BLOCK_K)
        weights = tl.load(text_ptr + line * columns + c, mask=c < stop, other=0.0)
        at = tl.load(keys_ptr + (b * 3 + 2) * L + c, mask=c < stop, other=0)
        to_image = _state_rows(state_ptr, at, c < stop, r, images, stride_sn, stride_si, STATE_UNIT)
        acc += weights[:, None] * to_image
        total += weights
    at = line * splits + split
    tl.store(parts_ptr + at * images + r, tl.sum(acc, 0), mask=r < images)
    if block == 0:
        tl.store(totals_ptr + at, tl.sum(total, 0))


@triton.jit(do_not_specialize=_SIZES)
def product_sum_kernel(
    parts_ptr,  # f32 [B, M, rows, splits, images]
    totals_ptr,  # f32 [B, M, rows, splits]
    state_ptr,
    rows_ptr,
    counts_ptr,
    scores_ptr,  # f32 [B, M, ld, images]
    M,
    Lq,
    images,
    blocks,
    rows,
    span,
    splits,
    ld,
    stride_sb,
    stride_sh,
    stride_sn,
    stride_si,
    STATE_UNIT: tl.constexpr,
    BY_QUERY: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The splits of a text query added in their order."""
    pid = tl.program_id(0)
    block, rest = pid % blocks, pid // blocks
    t = rest % rows
    head = (rest // rows).to(tl.int64)
    b, m = head // M, head % M
    if t >= tl.load(counts_ptr + b * 4):
        return
    rows_ptr += b * 4 * Lq + t
    used = (tl.load(rows_ptr + 3 * Lq) + span - 1) // span
    r = block * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_N,), tl.float32)
    total = 0.0
    for start in range(0, used, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        at = (head * rows + t) * splits + s
        total += tl.sum(tl.load(totals_ptr + at, mask=s < used, other=0.0), 0)
        mask = (s < used)[:, None] & (r < images)[None, :]
        parts = tl.load(parts_ptr + at[:, None] * images + r[None, :], mask=mask, other=0.0)
        acc += tl.sum(parts, 0)
    if RENORMALIZE:
        acc = acc / tl.where(total == 0, 1.0, total)
    if RESIDUAL:
        state_ptr += (b * stride_sb + m * stride_sh) * STATE_UNIT
        state_ptr += tl.load(rows_ptr + Lq).to(tl.int64) * stride_sn * STATE_UNIT
        acc += tl.load(state_ptr + r.to(tl.int64) * stride_si, mask=r < images, other=0.0)
    row = t
    if BY_QUERY:
        row = tl.load(rows_ptr)
    tl.store(scores_ptr + (head * ld + row) * images + r, acc, mask=r < images)


# text keys of a split of one sum, where there are few queries
SPAN = 256
# so few that their sums alone would not fill a chip
FEW = 16


def product(text: Tensor, state: Tensor, scores: Tensor, values: dict[str, Any]) -> None:
    """text: [B, M, rows, columns]; scores: [B, M, ld, images], the rows of text queries written.

    values: what the kernels take beside these.
    """
    B, M, rows, columns = text.shape
    images = scores.shape[3]
    unit = row_unit(state) if state.stride(3) == 1 and images % 4 == 0 else 1
    values = values | {
        "text_ptr": text,
        "state_ptr": state,
        "scores_ptr": scores,
        "M": M,
        "images": images,
        "rows": rows,
        "columns": columns,
        "ld": scores.shape[2],
        **{f"stride_s{axis}": state.stride(n) // unit for n, axis in enumerate("bhn")},
        "stride_si": state.stride(3),
        "STATE_UNIT": unit,
    }
    if values["Lq"] > FEW:
        # float32 products are done thread by thread: small tiles fit the registers
        tile = {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 16, "num_warps": 4, "num_stages": 3}
        blocks, row_blocks = triton.cdiv(images, 64), triton.cdiv(rows, 32)
        programs = B * M * row_blocks * blocks
        launch(product_kernel, programs, values, blocks=blocks, row_blocks=row_blocks, **tile)
        return
    # the more rows, the longer, so that the parts of sums take no more memory
    span = SPAN * triton.cdiv(rows * M, 32)
    splits = triton.cdiv(columns, span)
    blocks = triton.cdiv(images, 128)
    values |= {
        "parts_ptr": scores.new_empty(B, M, rows, splits, images),
        "totals_ptr": scores.new_empty(B, M, rows, splits),
        "blocks": blocks,
        "span": span,
        "splits": splits,
    }
    tile = {"BLOCK_N": 128, "BLOCK_K": 32, "num_warps": 4, "num_stages": 3}
    launch(product_split_kernel, B * M * rows * splits * blocks, values, **tile)
    tile = {"BLOCK_S": 16, "BLOCK_N": 128, "num_warps": 4}
    launch(product_sum_kernel, B * M * rows * blocks, values, **tile)
