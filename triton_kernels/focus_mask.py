"""focus_mask: a text query a program, the bits by rank."""

from __future__ import annotations

import torch
from torch import Tensor

from .focus_layout import layout
from .focus_select import select, selection
from .launch import device_guard


def focus_mask(
    scores: Tensor,
    modality: Tensor,
    keep_ratio: float | None = None,
    threshold: float | None = None,
    min_keep: int = 1,
    query_positions: Tensor | None = None,
) -> Tensor:
    """See `vmtc_kernels.focus_mask`. scores: float32, float16 or bfloat16."""
    B, M, Lq, images = scores.shape
    words = (images + 31) // 32
    mask = torch.empty(B, M, Lq, words, dtype=torch.int32, device=scores.device)
    if mask.numel() == 0:
        return mask
    with device_guard(scores):
        at = layout(modality, Lq, query_positions)
        select(
            scores,
            {
                **at.values(),
                **selection(keep_ratio, threshold, min_keep, images),
                "out_ptr": mask,
                "flags_ptr": None,
                "words": words,
                "start_row": 0,
                "rows": Lq,
                "BY_KEY": False,
            },
        )
    return mask
