"""CMAI: causal attention in which pairs of text queries and image tokens are inhibited."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _checks, _dispatch, _modality, _registry
from .focus_mask import unpack
from .focus_scores import logits, softmax

# queries a block when attention is recomputed for the gradient
_BLOCK = 128


class MaskedAttention(NamedTuple):
    """out: [B, H, Lq, dv]; lse: f32 [B, H, Lq]."""

    out: Tensor
    lse: Tensor


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    modality: Tensor,
    mask: Tensor,
    *,
    suppression: float = 0.0,
    scale: float | None = None,
    query_positions: Tensor | None = None,
) -> MaskedAttention:
    r"""Causal attention with grouped heads, the weight of inhibited pairs reduced.

    .. math:: o_i = \sum_j w_{ij} v_j \Big/ \sum_j w_{ij}, \qquad
        w_{ij} = e^{s\, q_i \cdot k_j} \cdot (\mathrm{suppression} \text{ if inhibited, else } 1)

    over the keys that are visible: not padding and not behind the query. ``suppression=0`` removes
    inhibited pairs, 1 is plain attention.

    Args:
        q: ``[B, H, Lq, d]``, float32, float16 or bfloat16 (float64: reference only), any strides.
        k, v: ``[B, G, L, d]`` and ``[B, G, L, dv]``, where ``G`` divides ``H``.
        modality: uint8 ``[B, L]`` of the keys: 0 padding, 1 text, 2 image; others are padding.
        mask: int32 ``[B, M, Lq, W]`` with ``M`` 1 or ``H``, as `focus_mask` returns it: bit
            ``r % 32`` of word ``r // 32`` set inhibits the image token of rank ``r``. Image tokens
            of rank ``32 W`` or more are not inhibited.
        suppression: in [0, 1].
        scale: ``s``; ``d ** -0.5`` if None.
        query_positions: int32 ``[B, Lq]``; by default the last ``Lq`` of the ``L`` positions.

    Returns:
        `MaskedAttention`: ``out`` ``[B, H, Lq, dv]`` in the dtype of ``q``, and ``lse`` float32
        ``[B, H, Lq]``, the natural logarithm of :math:`\sum_j w_{ij}`. A query that is padding or
        sees nothing has zeros and -inf. Differentiable in q, k and v, through both results.

    Raises:
        TypeError, ValueError: a wrong rank, dtype, size, device or value, named.

    Source: the modified causal mask of arXiv 2411.15453 (as reported) for ``suppression=0``; other
    values are ours.
    """
    return MaskedAttention(*_op(q, k, v, modality, mask, suppression, scale, query_positions))


def _weights(
    q: Tensor,
    k: Tensor,
    modality: Tensor,
    mask: Tensor,
    suppression: float,
    scale: float | None,
    positions: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised weights [B, H, Lq, L], their lse [B, H, Lq], and the keys [B, L] that are seen."""
    length = modality.shape[1]
    count = min(length, 32 * mask.shape[3])
    at = _modality.places(modality, q.shape[2], count, positions)
    by_rank = unpack(mask, count) & at.exists[:, None, None]
    is_image = modality == _modality.IMAGE
    rank = (is_image.long().cumsum(1) - 1).clamp(min=0)
    ranked = (is_image & (rank < count))[:, None, None]
    index = rank.clamp(max=max(count - 1, 0))[:, None, None].expand(*mask.shape[:3], length)
    inhibited = by_rank.gather(-1, index) & ranked if count else ranked & False
    each = logits(q, k, scale)
    less = math.log(suppression) if suppression else -math.inf
    each = torch.where(inhibited, each + less, each)
    each = each.masked_fill(~at.visible[:, None], -torch.inf)
    if not length:
        return each, each.new_full(each.shape[:3], -torch.inf), at.visible.any(1)
    # not exp(each - lse): the sum would be rounded to what float32 tells apart at the largest logit
    return softmax(each, each > -torch.inf), each.logsumexp(-1), at.visible.any(1)


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    modality: Tensor,
    mask: Tensor,
    suppression: float = 0.0,
    scale: float | None = None,
    query_positions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition of masked_attention."""
    weights, lse, seen = _weights(q, k, modality, mask, suppression, scale, query_positions)
    # what nobody sees may hold anything
    values = v.to(weights.dtype).masked_fill(~seen[:, None, :, None], 0)
    out = weights @ values.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    return out.to(q.dtype), lse


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    modality: Tensor,
    mask: Tensor,
    suppression: float = 0.0,
    scale: float | None = None,
    query_positions: Tensor | None = None,
) -> None:
    op = "masked_attention"
    _modality.check_values(op, v)
    _modality.check_attention(op, q, k, v, modality)
    _modality.check_positions(op, query_positions, modality, q.shape[2])
    _checks.tensor(op, "mask", mask, "B, M, Lq, W")
    if mask.dtype != torch.int32:
        raise TypeError(f"{op}: mask must be int32, got {mask.dtype}")
    if mask.shape[1] not in (1, q.shape[1]):
        raise ValueError(
            f"{op}: mask must have 1 head or the {q.shape[1]} of q, got {mask.shape[1]}"
        )
    expected = (q.shape[0], mask.shape[1], q.shape[2], mask.shape[3])
    _checks.size(op, "mask", mask, expected, "B and Lq of q")
    _checks.same_device(op, "mask", mask, q, "q")
    _modality.check_suppression(op, suppression)


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    modality: Tensor,
    mask: Tensor,
    suppression: float = 0.0,
    scale: float | None = None,
    query_positions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, modality, mask, ctx.suppression, ctx.scale, positions = inputs
    ctx.save_for_backward(q, k, v, modality, mask, positions)


def _backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    """Attention once more, a block of queries at a time."""
    q, k, v, modality, mask, positions = ctx.saved_tensors
    scale = q.shape[-1] ** -0.5 if ctx.scale is None else ctx.scale
    queries, share = q.shape[2], q.shape[1] // k.shape[1]
    dtype = grad_lse.dtype
    length = modality.shape[1]
    if positions is None:
        places = torch.arange(length - queries, length, device=q.device, dtype=torch.int32)
        positions = places.expand(q.shape[0], queries)
    keys, values = (x.to(dtype).repeat_interleave(share, dim=1) for x in (k, v))
    grad_q = torch.zeros_like(q, dtype=dtype)
    grad_k, grad_v = torch.zeros_like(keys), torch.zeros_like(values)
    for begin in range(0, queries, _BLOCK):
        rows = slice(begin, begin + _BLOCK)
        weights, _, seen = _weights(
            q[:, :, rows],
            k,
            modality,
            mask[:, :, rows],
            ctx.suppression,
            ctx.scale,
            positions[:, rows],
        )
        upper = grad_out[:, :, rows].to(dtype)
        grad_v += weights.mT @ upper
        from_values = upper @ values.masked_fill(~seen[:, None, :, None], 0).mT
        mean = (weights * from_values).sum(-1) - grad_lse[:, :, rows]
        each = scale * weights * (from_values - mean[..., None])
        grad_q[:, :, rows] = each @ keys.masked_fill(~seen[:, None, :, None], 0)
        grad_k += each.mT @ q[:, :, rows].to(dtype)
    grad_k, grad_v = (x.unflatten(1, (-1, share)).sum(2) for x in (grad_k, grad_v))
    return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype), *[None] * 5


_op = _registry.define(
    "masked_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor modality, Tensor mask, float suppression=0.0,"
    " float? scale=None, Tensor? query_positions=None) -> (Tensor out, Tensor lse)",
    reference=reference,
    check=_check,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    prefer=_dispatch.attention,
    refuse=_modality.too_wide,
)
