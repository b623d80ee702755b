"""Few queries: the values by splits of the keys, those of inhibited pairs left alone."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .arithmetic import dot, narrow
from .focus_bits import Bits
from .focus_decode import ROWS, SPLIT, Logits
from .focus_tiles import key_offsets, load_rows
from .launch import launch

_SIZES = (
    "H",
    "share",
    "M",
    "Lq",
    "words",
    "splits",
    "value_splits",
    "blocks",
    "stride_tb",
    "stride_vb",
    "stride_vh",
    "stride_vn",
)
# keys of a split: the same for every batch, or its size would change how sums are grouped
VALUE_SPLIT = tl.constexpr(256)


@triton.jit(do_not_specialize=_SIZES)
def few_values_kernel(
    logits_ptr,
    v_ptr,  # [B, H / share, L, dv], or blocks of a paged cache
    table_ptr,
    queries_ptr,
    bits_ptr,  # of the inhibited pairs, see focus_bits.py
    flags_ptr,
    parts_ptr,  # f32 [B, H, Lq, value_splits, dv]: sums of weights times values
    largest_ptr,  # f32 [B, H, Lq, value_splits]: the largest logit that is left
    sums_ptr,  # f32 [B, H, Lq, value_splits]: of the weights
    H,
    share,
    M,
    Lq,
    words,
    splits,
    value_splits,
    blocks,
    stride_tb,
    stride_vb,  # strides in units of UNIT elements
    stride_vh,
    stride_vn,
    penalty,
    HAS_BITS: tl.constexpr,
    PAGE: tl.constexpr,
    DV: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """A split of the values of one head a program; those that no query weighs are not read."""
    pid = tl.program_id(0)
    split, rest = pid % value_splits, pid // value_splits
    block, rest = rest % blocks, (rest // blocks).to(tl.int64)
    groups = H // share
    b, group = rest // groups, rest % groups
    r = block * ROWS + tl.arange(0, ROWS)
    i, h = r // share, group * share + r % share
    position = tl.load(queries_ptr + b * 2 * Lq + i, mask=i < Lq, other=-1)
    stop = tl.minimum(tl.max(position, 0) + 1, (split + 1) * VALUE_SPLIT)
    if split * VALUE_SPLIT >= stop:
        return
    v_ptr += group * stride_vh * UNIT
    if PAGE > 0:
        table_ptr += b * stride_tb
    else:
        v_ptr += b * stride_vb * UNIT
    page, step = tl.cast(stride_vb, tl.int64) * UNIT, tl.cast(stride_vn, tl.int64) * UNIT
    row = (b * H + h) * Lq + i
    # of this query and head
    masked = b * M + tl.minimum(h, M - 1)
    flags = tl.zeros((ROWS,), tl.int32)
    if HAS_BITS:
        flags = tl.load(flags_ptr + masked * Lq + i, mask=i < Lq, other=0)
    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, BLOCK_DV), tl.float32)
    for start in range(split * VALUE_SPLIT, stop, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        at = row[:, None] * splits * SPLIT + j[None, :]
        # of what a query does not see nothing may be written
        seen = j[None, :] <= position[:, None]
        x = tl.load(logits_ptr + at, mask=seen, other=float("-inf"))
        if HAS_BITS:
            word_at = (masked[:, None] * words + (j // 32)[None, :]) * Lq + i[:, None]
            word = tl.load(bits_ptr + word_at, mask=seen & (flags != 0)[:, None], other=0)
            x = tl.where(((word >> (j & 31)[None, :]) & 1) != 0, x + penalty, x)
        former = largest
        largest = tl.maximum(former, tl.max(x, 1))
        base = tl.where(largest == float("-inf"), 0.0, largest)
        weights = tl.exp2(x - base[:, None])
        factor = tl.exp2(former - base)
        needed = tl.max((weights != 0).to(tl.int32), 0) != 0
        at = key_offsets(table_ptr, j, needed, page, step, PAGE)
        v = load_rows(v_ptr, at, needed, DV, BLOCK_DV, True)
        total = total * factor + tl.sum(weights, 1)
        acc = dot(narrow(weights, v.dtype), v, acc * factor[:, None], "ieee")
    at = row * value_splits + split
    tl.store(largest_ptr + at, largest, mask=i < Lq)
    tl.store(sums_ptr + at, total, mask=i < Lq)
    dv = tl.arange(0, BLOCK_DV)
    mask = (i < Lq)[:, None] & (dv < DV)[None, :]
    tl.store(parts_ptr + at[:, None] * DV + dv[None, :], acc, mask=mask)


@triton.jit(do_not_specialize=_SIZES)
def few_sum_kernel(
    parts_ptr,
    largest_ptr,
    sums_ptr,
    queries_ptr,
    out_ptr,  # [B, H, Lq, dv]
    lse_ptr,  # f32 [B, H, Lq]
    H,
    Lq,
    value_splits,
    DV: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """The splits of one query and head, in their order."""
    row = tl.program_id(0).to(tl.int64)
    b, i = row // Lq // H, row % Lq
    position = tl.load(queries_ptr + b * 2 * Lq + i)
    used = (position + VALUE_SPLIT) // VALUE_SPLIT
    dv = tl.arange(0, BLOCK_DV)
    largest = float("-inf")
    total = 0.0
    acc = tl.zeros((BLOCK_DV,), tl.float32)
    for start in range(0, used, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        at = row * value_splits + s
        maxima = tl.load(largest_ptr + at, mask=s < used, other=float("-inf"))
        sums = tl.load(sums_ptr + at, mask=s < used, other=0.0)
        mask = (s < used)[:, None] & (dv < DV)[None, :]
        parts = tl.load(parts_ptr + at[:, None] * DV + dv[None, :], mask=mask, other=0.0)
        former = largest
        largest = tl.maximum(former, tl.max(maxima, 0))
        base = tl.where(largest == float("-inf"), 0.0, largest)
        factors = tl.exp2(maxima - base)
        total = total * tl.exp2(former - base) + tl.sum(sums * factors, 0)
        acc = acc * tl.exp2(former - base) + tl.sum(parts * factors[:, None], 0)
    some = total != 0
    acc = tl.where(some, acc / tl.where(some, total, 1.0), 0.0)
    lse = (largest + tl.log2(tl.where(some, total, 1.0))) * 0.6931471805599453
    tl.store(lse_ptr + row, tl.where(some, lse, float("-inf")))
    tl.store(out_ptr + row * DV + dv, narrow(acc, out_ptr.dtype.element_ty), mask=dv < DV)


def few_values(made: Logits, bits: Bits | None, values: dict[str, Any]) -> None:
    """values: what the kernels take beside the logits and the bits."""
    q, dv = values["q_ptr"], values["DV"]
    B, H, Lq, _ = q.shape
    splits = triton.cdiv(values["L"], VALUE_SPLIT.value)
    new = made.logits.new_empty
    features = max(16, triton.next_power_of_2(dv))
    values = values | {
        "splits": made.largest.shape[3],
        "logits_ptr": made.logits,
        "bits_ptr": bits.bits if bits else None,
        "flags_ptr": bits.flags if bits else None,
        "parts_ptr": new(B, H, Lq, splits, dv),
        "largest_ptr": new(B, H, Lq, splits),
        "sums_ptr": new(B, H, Lq, splits),
        "value_splits": splits,
        "BLOCK_DV": features,
    }
    blocks = triton.cdiv(Lq * values["share"], ROWS.value)
    launch(
        few_values_kernel,
        B * H // values["share"] * blocks * splits,
        values,
        blocks=blocks,
        BLOCK_N=32 if q.dtype == torch.float32 else 64,
        num_warps=8 if features > 128 else 4,
        num_stages=1 if q.dtype == torch.float32 else 2,
    )
    launch(few_sum_kernel, B * H * Lq, values, BLOCK_S=16, num_warps=4)
