"""Who is who in each sequence: ranks of image and text keys, the text queries, in one pass."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch

_SIZES = (
    "L",
    "Lq",
    "words",
    "stride_mb",
    "stride_ml",
    "stride_pb",
    "stride_pi",
    "pages",
    "stride_tb",
)


@triton.jit(do_not_specialize=_SIZES)
def layout_kernel(
    modality_ptr,  # u8 [B, L]
    lengths_ptr,  # i32 [B] or None: keys from there on are padding
    positions_ptr,  # i32 [B, Lq] or None
    table_ptr,  # i32 [B, ...] of a paged cache: keys whose entry is no block are padding
    keys_ptr,  # i32 [B, 3, L]: place, images up to here, position of a text key by rank
    valid_ptr,  # i32 [B, words]: a bit for each key that is not padding
    queries_ptr,  # i32 [B, 2, Lq]: position or -1, row among the text queries or -1
    rows_ptr,  # i32 [B, 4, Lq]: of the text queries, see `Layout`
    counts_ptr,  # i32 [B, 4]
    L,
    Lq,
    words,
    stride_mb,
    stride_ml,
    stride_pb,
    stride_pi,
    pages,  # how many blocks the cache has
    stride_tb,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One sequence a program."""
    b = tl.program_id(0).to(tl.int64)
    length = L
    if lengths_ptr is not None:
        length = tl.minimum(tl.maximum(tl.load(lengths_ptr + b), 0), L)
    keys_ptr += b * 3 * L
    texts = 0
    images = 0
    first = L
    end = 0
    lane = tl.arange(0, BLOCK)
    for start in range(0, L, BLOCK):
        j = start + lane
        inside = j < length
        if PAGE > 0:
            entry = tl.load(table_ptr + b * stride_tb + j // PAGE, mask=inside, other=-1)
            inside = (entry >= 0) & (entry < pages)
        kind = tl.load(
            modality_ptr + b * stride_mb + j.to(tl.int64) * stride_ml, mask=inside, other=0
        )
        text = (kind == 1).to(tl.int32)
        image = (kind == 2).to(tl.int32)
        # both counts in one scan: a block has fewer than 2^16 keys
        both = tl.cumsum(text + (image << 16), 0)
        text_rank = texts + (both & 0xFFFF) - text
        image_rank = images + (both >> 16) - image
        place = tl.where(text != 0, -2 - text_rank, tl.where(image != 0, image_rank, -1))
        tl.store(keys_ptr + j, place, mask=j < L)
        tl.store(keys_ptr + L + j, image_rank + image, mask=j < L)
        tl.store(keys_ptr + 2 * L + text_rank, j, mask=text != 0)
        known = text + image
        word = tl.sum(tl.reshape(known << (lane & 31), (BLOCK // 32, 32)), 1)
        w = start // 32 + tl.arange(0, BLOCK // 32)
        tl.store(valid_ptr + b * words + w, word.to(tl.int32), mask=w < words)
        texts += tl.sum(text, 0)
        images += tl.sum(image, 0)
        first = tl.minimum(first, tl.min(tl.where(known != 0, j, L), 0))
        end = tl.maximum(end, tl.max(tl.where(known != 0, j + 1, 0), 0))
    # what follows reads what other threads have written
    tl.debug_barrier()
    rows = 0
    for start in range(0, Lq, BLOCK):
        i = start + lane
        if positions_ptr is not None:
            at = tl.load(
                positions_ptr + b * stride_pb + i.to(tl.int64) * stride_pi, mask=i < Lq, other=-1
            )
        else:
            at = length - Lq + i
        inside = (i < Lq) & (at >= 0) & (at < L)
        place = tl.load(keys_ptr + at, mask=inside, other=-1)
        seen = tl.load(keys_ptr + L + at, mask=inside, other=0)
        text = (place < -1).to(tl.int32)
        row = rows + tl.cumsum(text, 0) - text
        tl.store(queries_ptr + b * 2 * Lq + i, tl.where(place != -1, at, -1), mask=i < Lq)
        tl.store(queries_ptr + (b * 2 + 1) * Lq + i, tl.where(text != 0, row, -1), mask=i < Lq)
        row_ptr = rows_ptr + b * 4 * Lq + row
        tl.store(row_ptr, i, mask=text != 0)
        tl.store(row_ptr + Lq, at, mask=text != 0)
        tl.store(row_ptr + 2 * Lq, seen, mask=text != 0)
        tl.store(row_ptr + 3 * Lq, -1 - place, mask=text != 0)
        rows += tl.sum(text, 0)
    tl.store(counts_ptr + b * 4, rows)
    tl.store(counts_ptr + b * 4 + 1, tl.minimum(first, end))
    tl.store(counts_ptr + b * 4 + 2, end)
    tl.store(counts_ptr + b * 4 + 3, (end - tl.minimum(first, end) != texts + images).to(tl.int32))


class Layout(NamedTuple):
    """keys: i32 [B, 3, L]: the place of a key (rank of an image token, -2 - rank of a text token,
    -1 padding), how many image tokens there are up to it, and the position of the text token of a
    rank. valid: i32 [B, words], bits of the keys that are not padding. queries: i32 [B, 2, Lq]:
    position, -1 for padding, and the row among the text queries, -1 for others. rows: i32
    [B, 4, Lq] of the text queries: which query, its position, how many image tokens and how many
    text tokens it sees. counts: i32 [B, 4]: text queries, first key that is not padding, behind the
    last, whether there is padding between them."""

    keys: Tensor
    valid: Tensor
    queries: Tensor
    rows: Tensor
    counts: Tensor

    def values(self) -> dict[str, Any]:
        """As kernels take them."""
        tensors = {f"{name}_ptr": tensor for name, tensor in self._asdict().items()}
        sizes = {"L": self.keys.shape[2], "Lq": self.rows.shape[2], "words": self.valid.shape[1]}
        return tensors | sizes


class Pages(NamedTuple):
    """table: i32 [B, ...], unit stride; lengths: i32 [B]; blocks: a cache [blocks, page, ...]."""

    table: Tensor
    lengths: Tensor
    blocks: Tensor


def layout(
    modality: Tensor, queries: int, positions: Tensor | None, pages: Pages | None = None
) -> Layout:
    B, L = modality.shape
    # whole pairs of words: a tile of 64 keys reads two
    words = triton.cdiv(L, 64) * 2

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=modality.device)

    made = Layout(
        empty(B, 3, L), empty(B, words), empty(B, 2, queries), empty(B, 4, queries), empty(B, 4)
    )
    launch(
        layout_kernel,
        B,
        made.values(),
        modality_ptr=modality,
        lengths_ptr=pages.lengths if pages else None,
        positions_ptr=positions,
        table_ptr=pages.table if pages else None,
        stride_mb=modality.stride(0),
        stride_ml=modality.stride(1),
        stride_pb=positions.stride(0) if positions is not None else 0,
        stride_pi=positions.stride(1) if positions is not None else 0,
        pages=pages.blocks.shape[0] if pages else 0,
        stride_tb=pages.table.stride(0) if pages else 0,
        PAGE=pages.blocks.shape[1] if pages else 0,
        BLOCK=2048,
        num_warps=8,
    )
    return made
