"""CMAI in one operator: score, inhibit, attend; no matrix of all pairs is stored."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from . import _dispatch, _modality, _registry
from .focus_mask import focus_mask
from .focus_mask import reference as _mask_reference
from .focus_scores import focus_scores
from .focus_scores import reference as _scores_reference
from .masked_attention import masked_attention
from .masked_attention import reference as _attention_reference


class FocusAttention(NamedTuple):
    """out: [B, H, Lq, dv]. Where asked for, else None: lse f32 [B, H, Lq]; scores f32
    [B, M, Lq, I]; mask i32 [B, M, Lq, ceil(I/32)], a bit set where a pair is inhibited."""

    out: Tensor
    lse: Tensor | None
    scores: Tensor | None
    mask: Tensor | None


def focus_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    modality: Tensor,
    num_image: int,
    *,
    keep_ratio: float | None = None,
    threshold: float | None = None,
    aggregate: str = "product",
    head_mode: str = "mean",
    renormalize: bool = True,
    min_keep: int = 1,
    suppression: float = 0.0,
    scale: float | None = None,
    text_image: Tensor | None = None,
    query_positions: Tensor | None = None,
    return_lse: bool = False,
    return_scores: bool = False,
    return_mask: bool = False,
) -> Tensor | FocusAttention:
    """Causal attention that inhibits the image tokens on which a text token does not focus.

    `focus_scores`, `focus_mask` and `masked_attention` of one layer as one operator, the scores
    taken before inhibition: what each argument means is said there. Serves prefill (``Lq = L``),
    chunked prefill and decode (``Lq < L``, with ``text_image``).

    Args:
        q: ``[B, H, Lq, d]``, float32, float16 or bfloat16 (float64: reference only), any strides.
        k, v: ``[B, G, L, d]`` and ``[B, G, L, dv]``, where ``G`` divides ``H``.
        modality: uint8 ``[B, L]`` of the keys: 0 padding, 1 text, 2 image; others are padding.
        num_image: ``I``, at least 0: image tokens of rank ``I`` or more are never inhibited.
        keep_ratio: in (0, 1], or
        threshold: in [0, 1); exactly one of the two.
        aggregate, head_mode, renormalize: as in `focus_scores`.
        min_keep: at least 1.
        suppression: in [0, 1], what the weight of an inhibited pair is multiplied by.
        scale: ``d ** -0.5`` if None.
        text_image: float32 ``[B, M, L_max, I]``, ``M`` 1 or, for ``head_mode="per_head"``, ``H``.
            Needed where ``Lq < L``; the rows of this call's text queries are written into it.
        query_positions: int32 ``[B, Lq]``, strictly ascending; by default the last positions.
        return_lse, return_scores, return_mask: return these too. The three parts are then run one
            after the other.

    Returns:
        ``out`` ``[B, H, Lq, dv]`` in the dtype of ``q``, or `FocusAttention` where more is asked
        for. A query that is padding has zeros. Differentiable in q, k and v, the mask held fixed.

    Raises:
        TypeError, ValueError: a wrong rank, dtype, size, device, option or value, named.

    Source: CMAI, arXiv 2411.15453, as reported; that the scores are of the same layer is ours.
    """
    given = (
        keep_ratio,
        threshold,
        aggregate,
        head_mode,
        renormalize,
        min_keep,
        suppression,
        scale,
        text_image,
        query_positions,
    )
    if not (return_lse or return_scores or return_mask):
        return _op(q, k, v, modality, num_image, *given)
    _check(q, k, v, modality, num_image, *given)
    whole = _parts(q, k, v, modality, num_image, *given)
    return FocusAttention(
        whole.out,
        whole.lse if return_lse else None,
        whole.scores if return_scores else None,
        whole.mask if return_mask else None,
    )


def _parts(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    modality: Tensor,
    num_image: int,
    keep_ratio: float | None = None,
    threshold: float | None = None,
    aggregate: str = "product",
    head_mode: str = "mean",
    renormalize: bool = True,
    min_keep: int = 1,
    suppression: float = 0.0,
    scale: float | None = None,
    text_image: Tensor | None = None,
    query_positions: Tensor | None = None,
) -> FocusAttention:
    """The three operators, one after the other."""
    scores = focus_scores(
        q,
        k,
        modality,
        num_image,
        aggregate=aggregate,
        head_mode=head_mode,
        renormalize=renormalize,
        scale=scale,
        text_image=text_image,
        query_positions=query_positions,
    )
    mask = focus_mask(
        scores,
        modality,
        keep_ratio=keep_ratio,
        threshold=threshold,
        min_keep=min_keep,
        query_positions=query_positions,
    )
    out, lse = masked_attention(
        q,
        k,
        v,
        modality,
        mask,
        suppression=suppression,
        scale=scale,
        query_positions=query_positions,
    )
    return FocusAttention(out, lse, scores, mask)


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    modality: Tensor,
    num_image: int,
    keep_ratio: float | None = None,
    threshold: float | None = None,
    aggregate: str = "product",
    head_mode: str = "mean",
    renormalize: bool = True,
    min_keep: int = 1,
    suppression: float = 0.0,
    scale: float | None = None,
    text_image: Tensor | None = None,
    query_positions: Tensor | None = None,
) -> Tensor:
    """The definition of focus_attention."""
    scores = _scores_reference(
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
    mask = _mask_reference(scores, modality, keep_ratio, threshold, min_keep, query_positions)
    out, _ = _attention_reference(q, k, v, modality, mask, suppression, scale, query_positions)
    return out


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    modality: Tensor,
    num_image: int,
    keep_ratio: float | None = None,
    threshold: float | None = None,
    aggregate: str = "product",
    head_mode: str = "mean",
    renormalize: bool = True,
    min_keep: int = 1,
    suppression: float = 0.0,
    scale: float | None = None,
    text_image: Tensor | None = None,
    query_positions: Tensor | None = None,
) -> None:
    op = "focus_attention"
    _modality.check_values(op, v)
    _modality.check_attention(op, q, k, v, modality)
    _modality.check_positions(op, query_positions, modality, q.shape[2])
    _modality.check_scores(op, q, modality, num_image, aggregate, head_mode, text_image)
    _modality.check_selection(op, keep_ratio, threshold, min_keep)
    _modality.check_suppression(op, suppression)


def _fake(q: Tensor, k: Tensor, v: Tensor, *args: object, **kwargs: object) -> Tensor:
    return q.new_empty(*q.shape[:3], v.shape[3])


def _differentiable(*args: object, **kwargs: object) -> Tensor:
    """Where a gradient may be asked for: the gradient is that of masked_attention."""
    _check(*args, **kwargs)  # type: ignore[arg-type]
    return _parts(*args, **kwargs).out  # type: ignore[arg-type]


_op = _registry.define(
    "focus_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor modality, SymInt num_image, float? keep_ratio=None,"
    " float? threshold=None, str aggregate='product', str head_mode='mean', bool renormalize=True,"
    " SymInt min_keep=1, float suppression=0.0, float? scale=None,"
    " Tensor(a!)? text_image=None, Tensor? query_positions=None) -> Tensor",
    reference=reference,
    check=_check,
    fake=_fake,
    mutates="text_image",
    autograd=_differentiable,
    prefer=_dispatch.attention,
    refuse=_modality.too_wide,
)
