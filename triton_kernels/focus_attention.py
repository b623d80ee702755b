"""focus_attention: scores of text queries, their selection in bits by key, attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .focus_bits import empty_bits
from .focus_decode import few, few_logits
from .focus_layout import Layout, layout
from .focus_scores import Rule, scored, state_of
from .focus_select import select, selection
from .launch import device_guard
from .masked_attention import attend, operands


def focused(
    given: dict[str, Any],
    at: Layout,
    rule: Rule,
    chosen: dict[str, Any],
    suppression: float,
    state: Tensor,
) -> Tensor:
    """given: the operands; chosen: the rule of selection; state: [B, M, L_max, images]."""
    bits = None
    logits = few_logits(given | at.values()) if few(given) else None
    if rule.images:
        bits = empty_bits(rule.heads(given["q_ptr"]), at)
        shared = {
            **at.values(),
            **chosen,
            "out_ptr": bits.bits,
            "flags_ptr": bits.flags,
            "BY_KEY": True,
        }
        for start, scores in scored(given, at, rule, state, None, logits):
            select(scores, {**shared, "start_row": start, "rows": scores.shape[2]})
    # a weight that is kept whole needs no bits
    bits = bits if suppression != 1 else None
    return attend(given, at, bits, suppression, logits)[0]


def focus_attention(
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
    """See `vmtc_kernels.focus_attention`. float32, float16 or bfloat16."""
    if q.shape[0] * q.shape[2] == 0:
        return torch.empty(*q.shape[:3], v.shape[3], dtype=q.dtype, device=q.device)
    rule = Rule(num_image, aggregate, head_mode, renormalize)
    with device_guard(q):
        at = layout(modality, q.shape[2], query_positions)
        state = text_image
        if state is None:
            state = state_of(q, modality.shape[1], rule, query_positions)
        chosen = selection(keep_ratio, threshold, min_keep, num_image)
        given = operands(q, k, v, scale)
        return focused(given, at, rule, chosen, suppression, state)
