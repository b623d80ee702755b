"""What the kernels of this section share: rows of queries and keys, and their products."""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import dot


@triton.jit
def key_offsets(table_ptr, j, inside, stride_b, stride_n, PAGE: tl.constexpr):
    """Where the rows of keys j begin, in elements; in a paged cache by its table of blocks."""
    if PAGE > 0:
        page = tl.load(table_ptr + j // PAGE, mask=inside, other=0).to(tl.int64)
        offsets = page * stride_b + (j % PAGE).to(tl.int64) * stride_n
    else:
        offsets = j.to(tl.int64) * stride_n
    return offsets


@triton.jit
def load_rows(ptr, offsets, inside, D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """[rows, BLOCK_D]; zeros where a row is not inside, and beyond D."""
    d = tl.arange(0, BLOCK_D)
    at = ptr + offsets[:, None] + d[None, :]
    if MASKED:
        if D < BLOCK_D:
            rows = tl.load(at, mask=inside[:, None] & (d < D)[None, :], other=0.0)
        else:
            rows = tl.load(at, mask=inside[:, None], other=0.0)
    elif D < BLOCK_D:
        rows = tl.load(at, mask=(d < D)[None, :], other=0.0)
    else:
        rows = tl.load(at)
    return rows


@triton.jit
def products(
    q,  # the rows of queries, where CHUNK is BLOCK_D
    q_ptr,
    q_offsets,
    q_inside,
    k_ptr,
    k_offsets,
    k_inside,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr,
    MASKED: tl.constexpr,
):
    """q_i . k_j in float32 [queries, keys]; float32 in chunks of D, as threads hold all of one."""
    acc = tl.zeros((q_offsets.shape[0], k_offsets.shape[0]), tl.float32)
    if CHUNK == BLOCK_D:
        k = load_rows(k_ptr, k_offsets, k_inside, D, BLOCK_D, MASKED)
        acc = dot(q, tl.trans(k), acc, "ieee")
    else:
        d = tl.arange(0, CHUNK)
        for start in range(0, D, CHUNK):
            in_d = (start + d < D)[None, :]
            q_at = q_ptr + q_offsets[:, None] + (start + d)[None, :]
            k_at = k_ptr + k_offsets[:, None] + (start + d)[None, :]
            part = tl.load(q_at, mask=q_inside[:, None] & in_d, other=0.0)
            k = tl.load(k_at, mask=k_inside[:, None] & in_d, other=0.0)
            acc = dot(part, tl.trans(k), acc, "ieee")
    return acc
