"""CMAI: which (text query, image token) pairs are inhibited, as packed bits."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _checks, _dispatch, _modality, _registry


def focus_mask(
    scores: Tensor,
    modality: Tensor,
    *,
    keep_ratio: float | None = None,
    threshold: float | None = None,
    min_keep: int = 1,
    query_positions: Tensor | None = None,
) -> Tensor:
    r"""Inhibit the pairs of low focus, by exactly one of two rules.

    ``keep_ratio``: of the ``n`` image tokens that a text query sees, the
    :math:`\max(\mathrm{min\_keep}, \lceil \mathrm{keep\_ratio} \cdot n \rceil)` of highest score
    stay, ties to the smaller rank (the product is taken in float64). ``threshold``: the pair is
    inhibited when :math:`F_{ir} < \mathrm{threshold} \cdot \max_r F_{ir}`, the maximum over the
    visible ones, but the ``min_keep`` of highest score always stay.

    Args:
        scores: ``[B, M, Lq, I]``, floating, as `focus_scores` returns them; NaN counts as -inf.
        modality: uint8 ``[B, L]`` of the keys: 0 padding, 1 text, 2 image; others are padding.
        keep_ratio: in (0, 1].
        threshold: in [0, 1).
        min_keep: at least 1, so that no query loses every image token.
        query_positions: int32 ``[B, Lq]``; by default the last ``Lq`` of the ``L`` positions.

    Returns:
        int32 ``[B, M, Lq, ceil(I/32)]``: bit ``r % 32`` of word ``r // 32`` is set where the image
        token of rank ``r`` is inhibited. Only text queries have bits, for image tokens they see.

    Raises:
        TypeError, ValueError: a wrong rank, dtype, size, device or value, named.

    Source: inhibition of pairs of low focus, arXiv 2411.15453; both rules are ours.
    """
    return _op(scores, modality, keep_ratio, threshold, min_keep, query_positions)


def reference(
    scores: Tensor,
    modality: Tensor,
    keep_ratio: float | None = None,
    threshold: float | None = None,
    min_keep: int = 1,
    query_positions: Tensor | None = None,
) -> Tensor:
    """The definition of focus_mask."""
    at = _modality.places(modality, scores.shape[2], scores.shape[3], query_positions)
    sees = at.exists[:, None] & (at.image[:, None] <= at.position[..., None])
    sees = (sees & at.text[..., None])[:, None]  # [B, 1, Lq, I]
    if scores.dtype != torch.float64:
        scores = scores.float()
    ranked = scores.masked_fill(scores.isnan() | ~sees, -torch.inf)
    # those that are not seen come last, also behind scores of -inf
    order = ranked.sort(dim=-1, descending=True, stable=True).indices
    order = order.gather(
        -1,
        sees.expand_as(ranked)
        .gather(-1, order)
        .to(torch.uint8)
        .sort(dim=-1, descending=True, stable=True)
        .indices,
    )
    place = torch.arange(scores.shape[3], device=scores.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(-1, order, place)
    if keep_ratio is not None:
        seen = sees.sum(-1, keepdim=True)
        keep = (keep_ratio * seen.double()).ceil().long().clamp(min=min_keep)
        inhibited = sees & (rank >= keep)
    else:
        assert threshold is not None
        largest = ranked.amax(-1, keepdim=True) if ranked.shape[-1] else ranked
        inhibited = sees & (rank >= min_keep) & (ranked < threshold * largest)
    return pack(inhibited)


def pack(inhibited: Tensor) -> Tensor:
    """bool [..., I] -> i32 [..., ceil(I/32)], the first in the lowest bit."""
    count = inhibited.shape[-1]
    words = torch.nn.functional.pad(inhibited.long(), (0, -count % 32)).unflatten(-1, (-1, 32))
    shifted = words << torch.arange(32, device=inhibited.device)
    return shifted.sum(-1).to(torch.int32)


def unpack(mask: Tensor, count: int) -> Tensor:
    """i32 [..., W] -> bool [..., count]; count is at most 32 W."""
    bits = mask[..., None] >> torch.arange(32, device=mask.device, dtype=torch.int32)
    return (bits & 1).bool().flatten(-2)[..., :count]


def _check(
    scores: Tensor,
    modality: Tensor,
    keep_ratio: float | None = None,
    threshold: float | None = None,
    min_keep: int = 1,
    query_positions: Tensor | None = None,
) -> None:
    op = "focus_mask"
    _checks.tensor(op, "scores", scores, "B, M, Lq, I")
    _checks.floating(op, "scores", scores)
    if scores.shape[1] == 0:
        raise ValueError(f"{op}: scores must have at least one head, got {list(scores.shape)}")
    _modality.check_modality(op, modality, scores, "scores")
    _modality.check_positions(op, query_positions, modality, scores.shape[2])
    _modality.check_selection(op, keep_ratio, threshold, min_keep)


def _fake(
    scores: Tensor,
    modality: Tensor,
    keep_ratio: float | None = None,
    threshold: float | None = None,
    min_keep: int = 1,
    query_positions: Tensor | None = None,
) -> Tensor:
    words = (scores.shape[3] + 31) // 32
    return scores.new_empty(*scores.shape[:3], words, dtype=torch.int32)


_op = _registry.define(
    "focus_mask",
    "(Tensor scores, Tensor modality, float? keep_ratio=None, float? threshold=None,"
    " SymInt min_keep=1, Tensor? query_positions=None) -> Tensor",
    reference=reference,
    check=_check,
    fake=_fake,
    autograd=None,
    prefer=_dispatch.attention,
)
