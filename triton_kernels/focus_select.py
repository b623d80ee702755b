"""Which image tokens a text query keeps: the k-th largest score found bit by bit, no sort."""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .focus_bits import packed
from .launch import launch

_SIZES = (
    "M",
    "images",
    "L",
    "Lq",
    "words",
    "start_row",
    "rows",
    "min_keep",
    "ratio_bits",
    "stride_sb",
    "stride_sh",
    "stride_sn",
    "stride_si",
)


@triton.jit
def _scores(ptr, r, inside, stride):
    """Scores of the image tokens r in float32, NaN as -inf."""
    x = tl.load(ptr + r.to(tl.int64) * stride, mask=inside, other=float("-inf")).to(tl.float32)
    return tl.where(x == x, x, float("-inf"))


@triton.jit
def _ordered(x):
    """Signed integers in the order of x."""
    # one zero of both
    bits = tl.where(x == 0.0, 0, x.to(tl.int32, bitcast=True))
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit(do_not_specialize=_SIZES)
def select_kernel(
    scores_ptr,  # [B, M, rows, images], any strides: of queries, or of text queries by row
    keys_ptr,  # of the layout
    queries_ptr,
    rows_ptr,
    out_ptr,  # BY_KEY: i32 [B, M, words, Lq], by key; else i32 [B, M, Lq, words], by rank
    flags_ptr,  # BY_KEY: i32 [B, M, Lq]
    M,
    images,
    L,
    Lq,
    words,
    start_row,  # BY_KEY: the first text query of scores
    rows,  # BY_KEY: how many
    min_keep,
    ratio_bits,  # keep_ratio, a float64
    threshold,
    stride_sb,
    stride_sh,
    stride_sn,
    stride_si,
    HAS_RATIO: tl.constexpr,
    BY_KEY: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """A query a program, whose scores stay in registers if WHOLE: at most BLOCK images."""
    pid = tl.program_id(0).to(tl.int64)
    head, i = pid // Lq, pid % Lq
    b, m = head // M, head % M
    row = tl.load(queries_ptr + (b * 2 + 1) * Lq + i)
    seen = tl.load(rows_ptr + (b * 4 + 2) * Lq + row, mask=row >= 0, other=0)
    seen = tl.minimum(seen, images)
    if HAS_RATIO:
        product = tl.cast(ratio_bits, tl.int64).to(tl.float64, bitcast=True) * seen.to(tl.float64)
        keep = product.to(tl.int32)
        keep += (keep.to(tl.float64) < product).to(tl.int32)
        keep = tl.maximum(keep, min_keep)
    else:
        keep = tl.cast(min_keep, tl.int32)
    if BY_KEY:
        # another call has it, or none: no bits
        if row < start_row or row >= start_row + rows:
            if start_row == 0 and row < 0:
                tl.store(flags_ptr + pid, 0)
            return
        tl.store(flags_ptr + pid, (keep < seen).to(tl.int32))
        if keep >= seen:
            return
        scores_ptr += b * stride_sb + m * stride_sh + (row - start_row).to(tl.int64) * stride_sn
    else:
        scores_ptr += b * stride_sb + m * stride_sh + i * stride_sn

    lane = tl.arange(0, BLOCK)
    held = _scores(scores_ptr, lane, lane < seen, stride_si)
    ordered = _ordered(held)
    # bit by bit, from that of the sign, the largest number that at least `keep` scores reach; where
    # exactly so many do, it tells them as well
    found = tl.full((), -2147483648, tl.int32)
    bit = tl.where(keep < seen, found, 0)
    while bit != 0:
        trial = found ^ bit
        reach = tl.sum(((lane < seen) & (ordered >= trial)).to(tl.int32), 0)
        if not WHOLE:
            for start in range(BLOCK, seen, BLOCK):
                r = start + lane
                more = _ordered(_scores(scores_ptr, r, r < seen, stride_si))
                reach += tl.sum(((r < seen) & (more >= trial)).to(tl.int32), 0)
        found = tl.where(reach >= keep, trial, found)
        bit = tl.where(reach == keep, 0, (bit >> 1) & 0x7FFFFFFF)
    largest = tl.max(held, 0)
    above = tl.sum(((lane < seen) & (ordered > found)).to(tl.int32), 0)
    if not WHOLE:
        for start in range(BLOCK, seen, BLOCK):
            r = start + lane
            x = _scores(scores_ptr, r, r < seen, stride_si)
            largest = tl.maximum(largest, tl.max(x, 0))
            above += tl.sum(((r < seen) & (_ordered(x) > found)).to(tl.int32), 0)

    # of those that equal the last one kept the first stay
    left = keep - above
    if BY_KEY:
        position = tl.load(queries_ptr + b * 2 * Lq + i)
        stop = position + 1
    else:
        stop = words * 32
    equals = 0
    column = tl.arange(0, BLOCK_J)
    for start in range(0, stop, BLOCK_J):
        if BY_KEY:
            j = start + column
            r = tl.load(keys_ptr + b * 3 * L + j, mask=j < stop, other=-1)
        else:
            r = start + column
        inside = (r >= 0) & (r < seen)
        x = _scores(scores_ptr, r, inside, stride_si)
        key = _ordered(x)
        equal = (inside & (key == found)).to(tl.int32)
        place = equals + tl.cumsum(equal, 0)
        stays = (key > found) | ((key == found) & (place <= left))
        gone = inside & ~stays
        # all stay where the number to keep is not smaller than that of those seen
        gone = gone & (tl.zeros((BLOCK_J,), tl.int32) + keep < seen)
        if not HAS_RATIO:
            gone = gone & (x < threshold * largest)
        equals += tl.sum(equal, 0)
        word = packed(gone.to(tl.int32), BLOCK_J)
        w = start // 32 + tl.arange(0, BLOCK_J // 32)
        if BY_KEY:
            tl.store(out_ptr + (head * words + w) * Lq + i, word, mask=w < words)
        else:
            tl.store(out_ptr + pid * words + w, word, mask=w < words)


class Choice(NamedTuple):
    BLOCK: int
    BLOCK_J: int
    num_warps: int


def choice(images: int) -> Choice:
    """By the number of image tokens, which a model has few of."""
    # more than fit the registers come by a smaller block at a time
    block = max(256, triton.next_power_of_2(images)) if images <= 4096 else 2048
    return Choice(block, min(block, 1024), max(1, block // 512))


def selection(
    keep_ratio: float | None, threshold: float | None, min_keep: int, images: int
) -> dict[str, Any]:
    """The rule, as the kernel takes it."""
    # as 64 bits: a float argument of a kernel is a float32
    ratio = max(keep_ratio or 1.0, 1e-300)
    return {
        "ratio_bits": struct.unpack("<q", struct.pack("<d", ratio))[0],
        "threshold": float(threshold or 0.0),
        "min_keep": min(min_keep, images),
        "HAS_RATIO": keep_ratio is not None,
    }


def select(scores: Tensor, values: dict[str, Any]) -> None:
    """scores: [B, M, rows, images]; values: what the kernel takes beside them."""
    B, M, _, images = scores.shape
    chosen = choice(images)
    launch(
        select_kernel,
        B * M * values["Lq"],
        values,
        scores_ptr=scores,
        M=M,
        images=images,
        **{f"stride_s{axis}": scores.stride(n) for n, axis in enumerate("bhni")},
        WHOLE=images <= chosen.BLOCK,
        **chosen._asdict(),
    )
