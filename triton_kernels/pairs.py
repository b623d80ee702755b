"""Inner products or squared distances of all pairs of tokens of an image, on tensor cores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import dot
from .launch import capability, device_guard, row_unit
from .primary import Selection

# (device, dtype, metric, D, alignments) whose tiles are all compiled and loaded
_ready: set[tuple[Any, ...]] = set()
_SIZES = ("N", "C", "tiles", "ld", "stride_xb", "stride_xn")


@triton.jit(do_not_specialize=_SIZES)
def pairs_kernel(
    x_ptr,  # [B, N, D], unit stride in D
    rows_ptr,  # i32 [B, N]: which tokens
    counts_ptr,  # i32 [B]: how many, R
    pairs_ptr,  # f32 [B, C, ld]: the first R rows and columns are written
    norms_ptr,  # f32 [B, C]: squared norms
    N,
    D,
    C,
    tiles,
    ld,  # in units of 4
    stride_xb,  # in units of UNIT elements
    stride_xn,
    EUCLIDEAN: tl.constexpr,
    UNIT: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    FLUSH: tl.constexpr,
):
    """One tile on or below the diagonal a program; the tile above it is its mirror image."""
    pid = tl.program_id(0)
    b = (pid // tiles).to(tl.int64)
    tile = pid % tiles
    # tile (row, column) of the lower triangle: the square root may be one off
    row = ((tl.sqrt(8.0 * tile + 1.0) - 1.0) * 0.5).to(tl.int32)
    row = tl.where(row * (row + 1) // 2 > tile, row - 1, row)
    row = tl.where((row + 1) * (row + 2) // 2 <= tile, row + 1, row)
    column = tile - row * (row + 1) // 2
    R = tl.load(counts_ptr + b)
    if row * BLOCK_R >= R:
        return

    i = row * BLOCK_R + tl.arange(0, BLOCK_R)
    j = column * BLOCK_R + tl.arange(0, BLOCK_R)
    d = tl.arange(0, BLOCK_D)
    position_i = tl.load(rows_ptr + b * N + i, mask=i < R, other=0).to(tl.int64)
    position_j = tl.load(rows_ptr + b * N + j, mask=j < R, other=0).to(tl.int64)
    x_ptr += b * stride_xb * UNIT
    a_ptr = x_ptr + position_i * stride_xn * UNIT
    c_ptr = x_ptr + position_j * stride_xn * UNIT

    products = tl.zeros((BLOCK_R, BLOCK_R), tl.float32)
    norm_i = tl.zeros((BLOCK_R,), tl.float32)
    norm_j = tl.zeros((BLOCK_R,), tl.float32)
    # tensor cores truncate as they add: their sums are short, and added in float32
    for start in range(0, D, FLUSH):
        part = tl.zeros((BLOCK_R, BLOCK_R), tl.float32)
        for offset in range(start, tl.minimum(start + FLUSH, D), BLOCK_D):
            column_d = offset + d
            if EVEN_D:
                a = tl.load(a_ptr[:, None] + column_d[None, :])
                c = tl.load(c_ptr[:, None] + column_d[None, :])
            else:
                inside = (column_d < D)[None, :]
                a = tl.load(a_ptr[:, None] + column_d[None, :], mask=inside, other=0.0)
                c = tl.load(c_ptr[:, None] + column_d[None, :], mask=inside, other=0.0)
            part = dot(a, tl.trans(c), part, PRECISION)
            if EUCLIDEAN:
                wide_a, wide_c = a.to(tl.float32), c.to(tl.float32)
                norm_i += tl.sum(wide_a * wide_a, 1)
                norm_j += tl.sum(wide_c * wide_c, 1)
        products += part

    same = i[:, None] == j[None, :]
    inside = (i < R)[:, None] & (j < R)[None, :]
    norms_ptr += b * C
    if EUCLIDEAN:
        both = norm_i[:, None] + norm_j[None, :]
        values = tl.where(same, 0.0, both - 2 * products)
        # what is small beside the norms has lost its digits
        lost = inside & ~same & (values < 0.03125 * both)
        if tl.max(tl.max(lost.to(tl.int32), 1), 0) > 0:
            direct = tl.zeros((BLOCK_R, BLOCK_R), tl.float32)
            for f in range(0, D):
                apart = (
                    tl.load(a_ptr + f).to(tl.float32)[:, None]
                    - tl.load(c_ptr + f).to(tl.float32)[None, :]
                )
                direct += apart * apart
            values = tl.where(lost, direct, values)
        if row == column:
            tl.store(norms_ptr + i, norm_i, mask=i < R)
    else:
        values = products
        if row == column:
            tl.store(norms_ptr + i, tl.sum(tl.where(same, products, 0.0), 1), mask=i < R)

    ld = tl.cast(ld, tl.int64) * 4
    pairs_ptr += b * C * ld
    # whole groups of four columns, so that a store is 16 bytes; rows are padded to that
    groups = (R + 3) // 4
    wanted = (i < R)[:, None] & (j // 4 < groups)[None, :]
    tl.store(pairs_ptr + i[:, None] * ld + j[None, :], values, mask=wanted)
    if row != column:
        wanted = (j < R)[:, None] & (i // 4 < groups)[None, :]
        tl.store(pairs_ptr + j[:, None] * ld + i[None, :], tl.trans(values), mask=wanted)


class Tile(NamedTuple):
    BLOCK_R: int
    BLOCK_D: int
    num_warps: int
    num_stages: int


def tiles(dtype: torch.dtype, metric: str, unit: int) -> list[Tile]:
    """Tiles that fit the registers, from the smallest to the largest."""
    if dtype == torch.float32:
        return [Tile(64, 32, 8, 2)] if unit > 1 else [Tile(32, 32, 4, 2)]
    if unit == 1:
        # element by element each has an address of its own
        return [Tile(32, 32, 4, 4), Tile(64, 32, 8, 4)]
    small = [Tile(32, 64, 4, 4), Tile(64, 64, 4, 4)]
    # the direct sums of euclidean would spill a larger one
    return small if metric == "euclidean" else [*small, Tile(128, 64, 8, 3)]


def tile(
    batch: int,
    capacity: int,
    dtype: torch.dtype,
    metric: str,
    unit: int,
    arch: tuple[int, int],
) -> Tile:
    """The largest tile of which there are enough to occupy every multiprocessor."""
    processors = {8: 108, 9: 132, 10: 148, 12: 170}.get(arch[0], 108)
    choices = tiles(dtype, metric, unit)
    for choice in reversed(choices):
        edge = triton.cdiv(capacity, choice.BLOCK_R)
        # two blocks of 128 fit a multiprocessor
        if batch * edge * (edge + 1) // 2 >= processors * (choice.BLOCK_R // 64):
            return choice
    return choices[0]


class Pairs(NamedTuple):
    """values: f32 [B, C, ld]; norms: f32 [B, C], squared."""

    values: Tensor
    norms: Tensor


def _prepare(x_ptr: Tensor, **arguments: Any) -> None:
    kernel = pairs_kernel.warmup(x_ptr=x_ptr, grid=(1,), **arguments)
    if x_ptr.is_cuda:
        # compiled so far; who asks for what launches it gets it loaded
        kernel.run  # noqa: B018


def pairs(x: Tensor, selection: Selection, metric: str) -> Pairs:
    """Of the selected tokens of x [B, N, D], unit stride in D: x_i.x_j, or |x_i - x_j|^2.

    A row or column of a token that is not finite is not finite either.
    """
    B, N, D = x.shape
    C = selection.capacity
    ld = triton.cdiv(C, 4) * 4
    found = Pairs(
        torch.empty(B, C, ld, dtype=torch.float32, device=x.device),
        torch.empty(B, C, dtype=torch.float32, device=x.device),
    )
    unit = row_unit(x)
    chosen = tile(B, C, x.dtype, metric, unit, capability(x))

    def launch(choice: Tile, run: Callable[..., Any], tiles: int) -> None:
        run(
            x_ptr=x,
            rows_ptr=selection.rows,
            counts_ptr=selection.counts,
            pairs_ptr=found.values,
            norms_ptr=found.norms,
            N=N,
            D=D,
            C=C,
            tiles=tiles,
            ld=ld // 4,
            stride_xb=x.stride(0) // unit,
            stride_xn=x.stride(1) // unit,
            EUCLIDEAN=metric == "euclidean",
            UNIT=unit,
            EVEN_D=D % choice.BLOCK_D == 0,
            PRECISION="ieee",
            BLOCK_R=choice.BLOCK_R,
            BLOCK_D=choice.BLOCK_D,
            FLUSH=512,
            num_warps=choice.num_warps,
            num_stages=choice.num_stages,
        )

    with device_guard(x):
        edge = triton.cdiv(C, chosen.BLOCK_R)
        count = edge * (edge + 1) // 2
        launch(chosen, pairs_kernel[(B * count,)], count)
        # another batch size may take another tile: it must find it compiled, and loaded, which no
        # graph being captured allows
        known = (x.device, x.dtype, metric, D, unit, x.data_ptr() % 16 == 0)
        if known not in _ready:
            for other in tiles(x.dtype, metric, unit):
                if other != chosen:
                    launch(other, _prepare, 1)
            _ready.add(known)
    return found
