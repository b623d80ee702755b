"""merge_tokens: select the primary tokens, cluster the others, copy and merge."""

from __future__ import annotations

import torch
from torch import Tensor

from .kmeans import cluster
from .primary import select
from .segments import Grouping, means


def merge_tokens(
    x: Tensor,
    scores: Tensor,
    num_primary: int,
    num_merged: int,
    iterations: int = 10,
    metric: str = "cosine",
    weighting: str = "score",
    features: Tensor | None = None,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `vmtc_kernels.merge_tokens`. x: [B, N, D], float32, float16 or bfloat16."""
    B, N, D = x.shape
    P, K = num_primary, num_merged
    x = x if D == 1 or x.stride(2) == 1 else x.contiguous()
    tokens = torch.empty(B, P + K, D, dtype=x.dtype, device=x.device)
    sizes = torch.empty(B, P + K, dtype=torch.int32, device=x.device)
    if B == 0 or N == 0:
        owner = torch.empty(B, N, dtype=torch.int32, device=x.device)
        return tokens.zero_(), owner, sizes.zero_()
    selection = select(x, scores, P, valid, sizes)
    if K == 0:
        grouping = Grouping.empty(B, 1, 0, x.device)
    else:
        clustered = x
        if features is not None:
            inner = features.shape[2] == 1 or features.stride(2) == 1
            clustered = features if inner else features.contiguous()
        grouping = cluster(clustered, selection, K, iterations, metric, sizes[:, P:])
    means(
        x,
        selection,
        grouping,
        tokens,
        scores=scores if weighting == "score" else None,
        sizes=sizes,
        owner=selection.owner,
    )
    return tokens, selection.owner, sizes
