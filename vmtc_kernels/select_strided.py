"""Baseline: keep tokens at even strides."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _checks, _registry


class SelectedTokens(NamedTuple):
    """tokens: [B, M, D]; positions: i32 [B, M], where each came from, -1 in an unfilled slot."""

    tokens: Tensor
    positions: Tensor


def select_strided(x: Tensor, num_tokens: int, *, valid: Tensor | None = None) -> SelectedTokens:
    r"""Keep ``M`` tokens spread evenly over the valid ones, in ascending position.

    Of ``R`` valid tokens, those of rank :math:`\lfloor (2m+1) R / 2M \rfloor`; all of them if
    ``R <= M``.

    Args:
        x: ``[B, N, D]``, float32, float16, bfloat16 or float64, any strides.
        num_tokens: ``M`` of at least 1; at most ``N`` unless ``valid`` is given.
        valid: bool ``[B, N]``, True for real tokens.

    Returns:
        `SelectedTokens`: ``tokens`` ``[B, M, D]``, copied bit for bit, and ``positions`` i32
        ``[B, M]``. Unfilled slots are zero vectors of position -1. Differentiable in ``x``.

    Raises:
        TypeError, ValueError: a wrong rank, dtype, size, device or count, named.

    Source: ours, a baseline.
    """
    return SelectedTokens(*_op(x, num_tokens, valid))


def reference(x: Tensor, num_tokens: int, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The definition of select_strided, one image at a time."""
    tokens, index = _fake(x, num_tokens, valid)
    tokens.zero_(), index.fill_(-1)
    for b in range(x.shape[0]):
        everyone = torch.arange(x.shape[1], device=x.device)
        position = everyone if valid is None else everyone[valid[b]]
        kept = min(num_tokens, len(position))
        rank = (2 * torch.arange(kept, device=x.device) + 1) * len(position) // max(2 * kept, 1)
        index[b, :kept] = position[rank].int()
        tokens[b, :kept] = x[b, position[rank]]
    return tokens, index


def check_selection(op: str, x: Tensor, num_tokens: int, valid: Tensor | None) -> None:
    """The checks that every selecting baseline makes."""
    _checks.tensor(op, "x", x, "B, N, D")
    _checks.floating(op, "x", x)
    _checks.nonempty_features(op, "x", x)
    _checks.count(op, "num_tokens", num_tokens, 1)
    if valid is None and num_tokens > x.shape[1]:
        raise ValueError(
            f"{op}: num_tokens must be at most the {x.shape[1]} tokens of x"
            f" (unless valid is given), got {num_tokens}"
        )
    _checks.valid_mask(op, valid, x)


def _check(x: Tensor, num_tokens: int, valid: Tensor | None = None) -> None:
    check_selection("select_strided", x, num_tokens, valid)


def _fake(x: Tensor, num_tokens: int, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    B, _, D = x.shape
    return x.new_empty(B, num_tokens, D), x.new_empty(B, num_tokens, dtype=torch.int32)


def setup_selection(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keep what `selection_backward` needs; the same for every selecting baseline."""
    ctx.shape, ctx.arguments = inputs[0].shape, len(inputs)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])


def selection_backward(ctx: Any, grad: Tensor, _index: None) -> tuple[Tensor | None, ...]:
    """The gradient of a selected token goes to the position it came from."""
    (index,) = ctx.saved_tensors
    kept = torch.where((index >= 0)[..., None], grad, 0)
    position = index.clamp(min=0).long()[..., None].expand_as(grad)
    grad_x = grad.new_zeros(ctx.shape).scatter_add_(1, position, kept)
    return grad_x, *[None] * (ctx.arguments - 1)


_op = _registry.define(
    "select_strided",
    "(Tensor x, SymInt num_tokens, Tensor? valid=None) -> (Tensor tokens, Tensor positions)",
    reference=reference,
    check=_check,
    fake=_fake,
    setup_context=setup_selection,
    backward=selection_backward,
)
