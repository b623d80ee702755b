"""The pilot's baseline: average pooling of the token grid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from . import _checks, _registry


def spatial_downsample(x: Tensor, grid: Sequence[int], factor: int) -> Tensor:
    r"""Average the tokens of each ``factor x factor`` cell of the grid.

    .. math:: y_{u,v} = \mathrm{mean}_{\lfloor r/f \rfloor = u, \lfloor c/f \rfloor = v} \; x_{r,c}

    Args:
        x: ``[B, gh*gw, D]``, tokens in row-major order, float32, float16, bfloat16 or float64.
        grid: ``(gh, gw)``. Where ``factor`` does not divide a side, the last cells are smaller.
        factor: ``f``, at least 1.

    Returns:
        ``[B, ceil(gh/f)*ceil(gw/f), D]`` in the dtype of ``x``, accumulated in float32 or wider.
        Differentiable in ``x``.

    Raises:
        TypeError, ValueError: a wrong rank, dtype, size or count, named.

    Source: the pilot experiment of arXiv 2411.15453.
    """
    return _op(x, grid, factor)


def reference(x: Tensor, grid: Sequence[int], factor: int) -> Tensor:
    """The definition of spatial_downsample."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    image = x.to(dtype).transpose(1, 2).unflatten(2, tuple(grid))  # [B, D, gh, gw]
    if x.shape[0] == 0:
        return _fake(x, grid, factor)
    cell = min(factor, max(grid))  # a larger one may not fit its integers
    pooled = avg_pool2d(image, cell, ceil_mode=True, count_include_pad=False)
    return pooled.flatten(2).transpose(1, 2).to(x.dtype).contiguous()


def _check(x: Tensor, grid: Sequence[int], factor: int) -> None:
    op = "spatial_downsample"
    _checks.tensor(op, "x", x, "B, N, D")
    _checks.floating(op, "x", x)
    _checks.nonempty_features(op, "x", x)
    if len(grid) != 2:
        raise ValueError(f"{op}: grid must be (gh, gw), got {list(grid)}")
    _checks.count(op, "grid", min(grid), 1)
    if grid[0] * grid[1] != x.shape[1]:
        raise ValueError(
            f"{op}: grid must hold the {x.shape[1]} tokens of x, got {grid[0]} x {grid[1]}"
        )
    _checks.count(op, "factor", factor, 1)


def _fake(x: Tensor, grid: Sequence[int], factor: int) -> Tensor:
    rows, columns = (-(-side // factor) for side in grid)
    return x.new_empty(x.shape[0], rows * columns, x.shape[2])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.grid, ctx.factor = inputs


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (gh, gw), f = ctx.grid, ctx.factor
    row = torch.arange(gh, device=grad.device) // f
    column = torch.arange(gw, device=grad.device) // f
    cell = (row[:, None] * -(-gw // f) + column).flatten()
    share = 1 / torch.bincount(cell, minlength=grad.shape[1]).to(grad.dtype)
    return (grad * share[:, None])[:, cell], None, None


_op = _registry.define(
    "spatial_downsample",
    "(Tensor x, int[] grid, int factor) -> Tensor",
    reference=reference,
    check=_check,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
