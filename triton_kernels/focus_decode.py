"""Few queries: the logits by splits of the keys, stored so that keys are read once."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .focus_logits import store_attention
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
    "splits",
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
# keys of a split: the same for every batch, or its size would change how sums are grouped
SPLIT = tl.constexpr(128)
# (query, head of a group) pairs of a program, the least that tensor cores take
ROWS = tl.constexpr(16)


@triton.jit(do_not_specialize=_SIZES)
def few_logits_kernel(
    q_ptr,  # [B, H, Lq, d], unit stride in d
    k_ptr,  # [B, H / share, L, d], or blocks of a paged cache
    table_ptr,
    keys_ptr,  # of the layout
    queries_ptr,
    logits_ptr,  # f32 [B, H, Lq, splits * SPLIT], base 2; -inf where not seen
    largest_ptr,  # f32 [B, H, Lq, splits]: the largest logit of a split
    sums_ptr,  # f32 [B, H, Lq, splits]: of exp2(logit - largest)
    H,
    share,
    L,
    Lq,
    splits,
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
    BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """A split of the keys of one head with ROWS rows of all queries of its group a program.

    What lies behind all of them is not written.
    """
    pid = tl.program_id(0)
    split, rest = pid % splits, pid // splits
    block, rest = rest % blocks, (rest // blocks).to(tl.int64)
    groups = H // share
    b, group = rest // groups, rest % groups
    r = block * ROWS + tl.arange(0, ROWS)
    i, h = r // share, group * share + r % share
    position = tl.load(queries_ptr + b * 2 * Lq + i, mask=i < Lq, other=-1)
    stop = tl.max(position, 0) + 1
    if split * SPLIT >= stop:
        return
    j = split * SPLIT + tl.arange(0, SPLIT)
    inside = tl.load(keys_ptr + b * 3 * L + j, mask=j < stop, other=-1) != -1
    q_ptr += b * stride_qb * UNIT
    k_ptr += group * stride_kh * UNIT
    if PAGE > 0:
        table_ptr += b * stride_tb
    else:
        k_ptr += b * stride_kb * UNIT
    page, step = tl.cast(stride_kb, tl.int64) * UNIT, tl.cast(stride_kn, tl.int64) * UNIT
    q_offsets = (h * stride_qh + i.to(tl.int64) * stride_qn) * UNIT
    real = position >= 0
    q = 0.0
    if CHUNK == BLOCK_D:
        q = load_rows(q_ptr, q_offsets, real, D, BLOCK_D, True)
    at = key_offsets(table_ptr, j, inside, page, step, PAGE)
    x = products(q, q_ptr, q_offsets, real, k_ptr, at, inside, D, BLOCK_D, CHUNK, True)
    x *= -exponent if NEGATIVE else exponent
    x = tl.where(inside[None, :] & (j[None, :] <= position[:, None]), x, float("-inf"))
    largest = tl.max(x, 1)
    base = tl.where(largest == float("-inf"), 0.0, largest)
    row = (b * H + h) * Lq + i
    tl.store(logits_ptr + row[:, None] * splits * SPLIT + j[None, :], x, mask=(i < Lq)[:, None])
    tl.store(largest_ptr + row * splits + split, largest, mask=i < Lq)
    sums = tl.sum(tl.exp2(x - base[:, None]), 1)
    tl.store(sums_ptr + row * splits + split, sums, mask=i < Lq)


@triton.jit(do_not_specialize=_SIZES)
def few_attention_kernel(
    logits_ptr,
    largest_ptr,
    sums_ptr,
    keys_ptr,
    rows_ptr,
    counts_ptr,
    text_ptr,  # f32 [B, M, rows, columns]: to text keys by rank
    state_ptr,  # f32 [B, M, L_max, images]: to image tokens, by position of the query
    H,
    M,
    L,
    Lq,
    images,
    splits,
    blocks,
    columns,
    rows,
    stride_sb,
    stride_sh,
    stride_sn,
    stride_si,
    BLOCK_H: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """A text query with one split of the keys a program, over the heads of one mean."""
    pid = tl.program_id(0)
    tile, rest = pid % blocks, pid // blocks
    t = rest % rows
    head = (rest // rows).to(tl.int64)
    b, m = head // M, head % M
    if t >= tl.load(counts_ptr + b * 4):
        return
    rows_ptr += b * 4 * Lq + t
    i = tl.load(rows_ptr)
    position = tl.load(rows_ptr + Lq)
    seen = tl.load(rows_ptr + 2 * Lq)
    j = tile * SPLIT + tl.arange(0, SPLIT)
    place = tl.load(keys_ptr + b * 3 * L + j, mask=j <= position, other=-1)
    heads = H // M
    used = position // SPLIT + 1
    total = tl.zeros((SPLIT,), tl.float32)
    # none where all keys lie behind the query
    for first in range(0, tl.where(tile < used, heads, 0), BLOCK_H):
        n = first + tl.arange(0, BLOCK_H)
        row = (b * H + m * heads + n) * Lq + i
        largest = tl.full((BLOCK_H,), float("-inf"), tl.float32)
        weight = tl.zeros((BLOCK_H,), tl.float32)
        for start in range(0, used, BLOCK_S):
            s = start + tl.arange(0, BLOCK_S)
            mask = (n < heads)[:, None] & (s < used)[None, :]
            at = row[:, None] * splits + s[None, :]
            maxima = tl.load(largest_ptr + at, mask=mask, other=float("-inf"))
            sums = tl.load(sums_ptr + at, mask=mask, other=0.0)
            former = largest
            largest = tl.maximum(former, tl.max(maxima, 1))
            base = tl.where(largest == float("-inf"), 0.0, largest)
            weight = weight * tl.exp2(former - base)
            weight += tl.sum(sums * tl.exp2(maxima - base[:, None]), 1)
        weight = tl.where(n < heads, weight, 1.0)
        base = tl.where(n < heads, largest, 0.0)
        at = row[:, None] * splits * SPLIT + j[None, :]
        x = tl.load(logits_ptr + at, mask=(n < heads)[:, None], other=float("-inf"))
        total += tl.sum(tl.exp2(x - base[:, None]) / weight[:, None], 0)
    one = tl.zeros((1,), tl.int32)
    store_attention(
        (total / heads)[None, :],
        (place != -1)[None, :],
        place,
        t + one,
        position + one,
        seen + one,
        one == 0,
        tile * SPLIT,
        text_ptr + head * rows * columns,
        state_ptr + b * stride_sb + m * stride_sh,
        0,
        columns,
        images,
        stride_sn,
        stride_si,
        SPLIT,
    )


class Logits(NamedTuple):
    """What `few_logits_kernel` writes."""

    logits: Tensor
    largest: Tensor
    sums: Tensor

    def values(self) -> dict[str, Any]:
        """As kernels take them."""
        return {f"{name}_ptr": tensor for name, tensor in self._asdict().items()} | {
            "splits": self.largest.shape[3]
        }


def few(values: dict[str, Any]) -> bool:
    """Whether a call has so few queries that splits of its keys are needed to fill a chip."""
    return values["Lq"] <= 16 and values["Lq"] * values["share"] <= 64


def few_logits(values: dict[str, Any]) -> Logits:
    """values: what the kernel takes beside its results."""
    q, d = values["q_ptr"], values["D"]
    B, H, Lq, _ = q.shape
    splits = triton.cdiv(values["L"], SPLIT.value)

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=q.device)

    made = Logits(new(B, H, Lq, splits * SPLIT.value), new(B, H, Lq, splits), new(B, H, Lq, splits))
    blocks = triton.cdiv(Lq * values["share"], ROWS.value)
    features = max(16, triton.next_power_of_2(d))
    launch(
        few_logits_kernel,
        B * H // values["share"] * blocks * splits,
        values | made.values(),
        blocks=blocks,
        BLOCK_D=features,
        CHUNK=min(16, features) if q.dtype == torch.float32 else features,
        num_warps=8 if features > 128 else 4,
    )
    return made


def few_attention(made: Logits, values: dict[str, Any]) -> None:
    """values: what the kernel takes beside the logits."""
    # a split of the keys also fills as many ranks
    blocks = triton.cdiv(max(values["L"], values["images"]), SPLIT.value)
    launch(
        few_attention_kernel,
        values["q_ptr"].shape[0] * values["M"] * values["rows"] * blocks,
        values | made.values(),
        blocks=blocks,
        BLOCK_H=8,
        BLOCK_S=64,
        num_warps=4,
    )
