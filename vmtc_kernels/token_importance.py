"""Importance of visual tokens: the attention that they receive, no N x N matrix stored."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _checks, _dispatch, _registry

# queries a block when attention is recomputed for the gradient: N x 128 numbers a head at a time
_BLOCK = 128


def token_importance(
    q: Tensor, k: Tensor, *, cls_index: int | None = 0, scale: float | None = None
) -> Tensor:
    r"""How much attention each visual token receives in one vision-encoder layer.

    With :math:`A_h = \mathrm{softmax}(s\, q_h k_h^\top)` over the keys,

    .. math:: \mathrm{importance}_j = \frac1H \sum_h A_h[c, j]
        \qquad\text{or}\qquad \frac1{HN} \sum_{h,i} A_h[i, j] \text{ without [CLS].}

    Args:
        q, k: ``[B, H, N, d]``, queries and keys, float32, float16 or bfloat16 (float64: reference
            only), any strides.
        cls_index: position ``c`` of the [CLS] token, or None for encoders that have none.
        scale: ``s``; ``d ** -0.5`` if None.

    Returns:
        float32 ``[B, N]`` (float64 for float64 input); each row sums to 1. Differentiable in q, k.

    Raises:
        TypeError, ValueError: a wrong rank, dtype, size, device or index, named.

    Source: [CLS] attention as the measure of importance, arXiv 2411.15453 (as reported); the mean
    received attention for encoders without [CLS] is ours.
    """
    return _op(q, k, cls_index, scale)


def _attention(q: Tensor, k: Tensor, scale: float | None) -> Tensor:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return (scale * q.to(dtype) @ k.to(dtype).transpose(-1, -2)).softmax(-1)


def reference(
    q: Tensor, k: Tensor, cls_index: int | None = 0, scale: float | None = None
) -> Tensor:
    """The definition of token_importance."""
    if cls_index is not None:
        return _attention(q[:, :, cls_index, None], k, scale)[:, :, 0].mean(dim=1)
    return _attention(q, k, scale).mean(dim=(1, 2))


def _check(q: Tensor, k: Tensor, cls_index: int | None = 0, scale: float | None = None) -> None:
    op = "token_importance"
    _checks.tensor(op, "q", q, "B, H, N, d")
    _checks.tensor(op, "k", k, "B, H, N, d")
    _checks.floating(op, "q", q)
    if k.dtype != q.dtype:
        raise TypeError(f"{op}: k must be {q.dtype} like q, got {k.dtype}")
    _checks.size(op, "k", k, tuple(q.shape), "the shape of q")
    _checks.same_device(op, "k", k, q, "q")
    _checks.nonempty_features(op, "q", q)
    if q.shape[1] == 0:
        raise ValueError(f"{op}: q must have at least one head, got {list(q.shape)}")
    if cls_index is not None:
        _checks.count(op, "cls_index", cls_index, 0)
        if cls_index >= q.shape[2]:
            raise ValueError(
                f"{op}: cls_index must be below the number of tokens {q.shape[2]}, got {cls_index}"
            )


def _prefer(
    capability: tuple[int, int],
    q: Tensor,
    k: Tensor,
    cls_index: int | None = 0,
    scale: float | None = None,
) -> tuple[str, str]:
    return _dispatch.importance(capability)


def _fake(q: Tensor, k: Tensor, cls_index: int | None = 0, scale: float | None = None) -> Tensor:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape[0], q.shape[2], dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, ctx.cls_index, ctx.scale = inputs
    ctx.save_for_backward(q, k)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    q, k = ctx.saved_tensors
    scale = q.shape[-1] ** -0.5 if ctx.scale is None else ctx.scale
    heads, tokens = q.shape[1:3]
    if ctx.cls_index is None:
        rows = [slice(i, min(i + _BLOCK, tokens)) for i in range(0, tokens, _BLOCK)]
        share = grad / (heads * tokens)
    else:
        rows = [slice(ctx.cls_index, ctx.cls_index + 1)]
        share = grad / heads
    grad_q = torch.zeros_like(q, dtype=grad.dtype)
    grad_k = torch.zeros_like(k, dtype=grad.dtype)
    keys = k.to(grad.dtype)
    for block in rows:
        attention = _attention(q[:, :, block], k, scale)
        received = attention * share[:, None, None, :]
        logits = scale * (received - attention * received.sum(-1, keepdim=True))
        grad_q[:, :, block] = logits @ keys
        grad_k += logits.transpose(-1, -2) @ q[:, :, block].to(grad.dtype)
    return grad_q.to(q.dtype), grad_k.to(k.dtype), None, None


_op = _registry.define(
    "token_importance",
    "(Tensor q, Tensor k, int? cls_index=0, float? scale=None) -> Tensor",
    reference=reference,
    check=_check,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    prefer=_prefer,
)
