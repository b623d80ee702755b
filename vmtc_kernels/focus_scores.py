"""CMAI: how much a text token, through the text before it, attends to each image token."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _dispatch, _modality, _registry


def focus_scores(
    q: Tensor,
    k: Tensor,
    modality: Tensor,
    num_image: int,
    *,
    aggregate: str = "product",
    head_mode: str = "mean",
    renormalize: bool = True,
    scale: float | None = None,
    text_image: Tensor | None = None,
    query_positions: Tensor | None = None,
) -> Tensor:
    r"""Focus of each text query on each image token.

    With :math:`A_h = \mathrm{softmax}(s\, q_h k_h^\top)` over the visible keys, the attention of a
    layer before inhibition, of which :math:`A^{tt}` goes from text to text and :math:`A^{tv}` from
    text to the image token of rank :math:`r`,

    .. math:: F_{ir} = \sum_{k \le i} A^{tt}_{ik} A^{tv}_{kr}
        \qquad\text{or}\qquad F = A^{tv} + A^{tt} A^{tv} \text{ for "residual".}

    Args:
        q: ``[B, H, Lq, d]``, float32, float16 or bfloat16 (float64: reference only), any strides.
        k: ``[B, G, L, d]``, where ``G`` divides ``H``; head ``h`` of q reads head ``h // (H/G)``.
        modality: uint8 ``[B, L]`` of the keys: 0 padding, 1 text, 2 image; others are padding.
            A query sees the keys that are not padding and not behind its own position.
        num_image: ``I``, at least 0: image tokens of rank ``I`` or more have no scores.
        aggregate: ``"product"`` or ``"residual"``.
        head_mode: ``"mean"``, both parts are averaged over the heads first and ``M = 1``, or
            ``"per_head"``, ``M = H``.
        renormalize: divide each row of :math:`A^{tt}` by its sum; a zero row stays zero.
        scale: ``s``; ``d ** -0.5`` if None.
        text_image: float32 ``[B, M, L_max, I]`` with ``L_max >= L``, the rows :math:`A^{tv}_k` by
            position. Those of the text queries of this call are written, those of earlier ones
            read. Needed where ``Lq < L`` (chunked prefill, decode).
        query_positions: int32 ``[B, Lq]``, strictly ascending, the position of each query; by
            default the last ``Lq`` of the ``L``. A query outside of ``0..L-1`` is padding.

    Returns:
        float32 ``[B, M, Lq, I]`` (float64 for float64 input); rows that are not text are zero. Not
        differentiable: scores only decide what is inhibited.

    Raises:
        TypeError, ValueError: a wrong rank, dtype, size, device or option, named.

    Source: text-to-image attention aggregated by text-to-text attention, arXiv 2411.15453; mean
    over heads, renormalisation and the residual form are ours.
    """
    return _op(
        q,
        k,
        modality,
        num_image,
        aggregate,
        head_mode,
        renormalize,
        scale,
        text_image,
        query_positions,
    )


def logits(q: Tensor, k: Tensor, scale: float | None) -> Tensor:
    """scale q k^T [B, H, Lq, L] in float32 or float64; groups of heads of q share one of k."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    each = k.to(dtype).repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    return scale * q.to(dtype) @ each.mT


def softmax(logits: Tensor, allowed: Tensor) -> Tensor:
    """Over the allowed keys; a row that has none is zero, and no other key is looked at."""
    weights = logits.masked_fill(~allowed, -torch.inf).softmax(-1)
    return weights.masked_fill(~allowed.any(-1, keepdim=True), 0)


def reference(
    q: Tensor,
    k: Tensor,
    modality: Tensor,
    num_image: int,
    aggregate: str = "product",
    head_mode: str = "mean",
    renormalize: bool = True,
    scale: float | None = None,
    text_image: Tensor | None = None,
    query_positions: Tensor | None = None,
) -> Tensor:
    """The definition of focus_scores."""
    length = modality.shape[1]
    at = _modality.places(modality, q.shape[2], num_image, query_positions)
    attention = softmax(logits(q, k, scale), at.visible[:, None])
    if head_mode == "mean":
        attention = attention.mean(1, keepdim=True)
    attention = attention.masked_fill(~at.text[:, None, :, None], 0)  # [B, M, Lq, L]
    heads = attention.shape[1]

    image = at.image[:, None, None].expand(-1, heads, q.shape[2], -1)
    to_image = attention.gather(-1, image) if length else attention.new_zeros(image.shape)
    to_image = to_image.masked_fill(~at.exists[:, None, None], 0)
    if text_image is None:
        text_image = attention.new_zeros(q.shape[0], heads, length, num_image)
    b, i = at.text.nonzero(as_tuple=True)
    text_image[b, :, at.position[b, i]] = to_image[b, :, i]

    # rows that no call has written hold anything
    read = (modality == _modality.TEXT) & at.visible.any(1)
    rows = text_image[:, :, :length].masked_fill(~read[:, None, :, None], 0)
    to_text = attention.masked_fill(~(modality == _modality.TEXT)[:, None, None], 0)
    if renormalize:
        total = to_text.sum(-1, keepdim=True)
        to_text = to_text / total.masked_fill(total == 0, 1)
    scores = to_text @ rows
    return scores + to_image if aggregate == "residual" else scores


def _check(
    q: Tensor,
    k: Tensor,
    modality: Tensor,
    num_image: int,
    aggregate: str = "product",
    head_mode: str = "mean",
    renormalize: bool = True,
    scale: float | None = None,
    text_image: Tensor | None = None,
    query_positions: Tensor | None = None,
) -> None:
    op = "focus_scores"
    _modality.check_attention(op, q, k, None, modality)
    _modality.check_positions(op, query_positions, modality, q.shape[2])
    _modality.check_scores(op, q, modality, num_image, aggregate, head_mode, text_image)


def _fake(
    q: Tensor,
    k: Tensor,
    modality: Tensor,
    num_image: int,
    aggregate: str = "product",
    head_mode: str = "mean",
    renormalize: bool = True,
    scale: float | None = None,
    text_image: Tensor | None = None,
    query_positions: Tensor | None = None,
) -> Tensor:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    heads = 1 if head_mode == "mean" else q.shape[1]
    return q.new_empty(q.shape[0], heads, q.shape[2], num_image, dtype=dtype)


_op = _registry.define(
    "focus_scores",
    "(Tensor q, Tensor k, Tensor modality, SymInt num_image, str aggregate='product',"
    " str head_mode='mean', bool renormalize=True, float? scale=None,"
    " Tensor(a!)? text_image=None, Tensor? query_positions=None) -> Tensor",
    reference=reference,
    check=_check,
    fake=_fake,
    mutates="text_image",
    autograd=None,
    prefer=_dispatch.attention,
    refuse=_modality.too_wide,
)
