"""paged_focus_attention: the kernels of focus_attention, keys and values found by a table."""

from __future__ import annotations

import torch
from torch import Tensor

from .focus_attention import focused
from .focus_layout import Pages, layout
from .focus_scores import Rule, state_of
from .focus_select import selection
from .launch import device_guard
from .masked_attention import operands


def paged_focus_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
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
    """See `vmtc_kernels.paged_focus_attention`. float32, float16 or bfloat16."""
    if q.shape[0] * q.shape[2] == 0:
        return torch.empty(*q.shape[:3], v_cache.shape[3], dtype=q.dtype, device=q.device)
    rule = Rule(num_image, aggregate, head_mode, renormalize)
    with device_guard(q):
        table = block_table if block_table.stride(1) == 1 else block_table.contiguous()
        pages = Pages(table, seq_lens.contiguous(), k_cache)
        at = layout(modality, q.shape[2], query_positions, pages)
        state = text_image
        if state is None:
            state = state_of(q, modality.shape[1], rule, query_positions)
        chosen = selection(keep_ratio, threshold, min_keep, num_image)
        given = operands(q, k_cache, v_cache, scale, table)
        return focused(given, at, rule, chosen, suppression, state)
