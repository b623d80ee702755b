"""kmeans: select the valid tokens, cluster them in one of two forms, average each cluster."""

from __future__ import annotations

import torch
from torch import Tensor

from . import direct, lloyd
from .pairs import pairs
from .primary import Selection, select
from .segments import Grouping, means


def form(capacity: int, features: int, num_clusters: int, iterations: int) -> str:
    """How to cluster up to ``capacity`` tokens: "pairs" or "direct".

    All pairs of tokens cost capacity^2 x features products and 8 capacity^2 bytes once; each
    direct round costs 2 capacity x features x clusters products, two passes over the tokens and
    four launches. Of few tokens the launches are all that counts.
    """
    if capacity > lloyd.LARGEST_CAPACITY or num_clusters > lloyd.MOST_CLUSTERS:
        return "direct"
    if capacity <= 256:
        return "pairs"
    rounds = iterations + 1
    few_products = capacity <= 3 * num_clusters * rounds
    few_bytes = 3 * capacity <= features * rounds
    return "pairs" if few_products and few_bytes else "direct"


def cluster(
    x: Tensor,
    selection: Selection,
    num_clusters: int,
    iterations: int,
    metric: str,
    sizes: Tensor,
    centroids: Tensor | None = None,
) -> Grouping:
    """Cluster the selected tokens of x [B, N, D], unit stride in D.

    sizes: i32 [B, K] to write. centroids: f32 [B, K, D] to write, where wanted.
    """
    C, D = selection.capacity, x.shape[2]
    if form(C, D, num_clusters, iterations) == "direct":
        return direct.cluster(x, selection, num_clusters, iterations, metric, sizes, centroids)
    found = pairs(x, selection, metric)
    grouping = lloyd.lloyd(found, selection, D, num_clusters, iterations, metric, sizes)
    if centroids is not None:
        means(x, selection, grouping, centroids, norms=found.norms, owner=selection.owner)
    return grouping


def kmeans(
    x: Tensor,
    num_clusters: int,
    iterations: int = 10,
    metric: str = "cosine",
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `vmtc_kernels.kmeans`. x: [B, N, D], float32, float16 or bfloat16."""
    B, N, D = x.shape
    x = x if D == 1 or x.stride(2) == 1 else x.contiguous()
    centroids = torch.empty(B, num_clusters, D, dtype=torch.float32, device=x.device)
    sizes = torch.empty(B, num_clusters, dtype=torch.int32, device=x.device)
    if B == 0 or N == 0:
        labels = torch.empty(B, N, dtype=torch.int32, device=x.device)
        return labels, centroids.zero_(), sizes.zero_()
    selection = select(x, None, 0, valid, sizes)
    cluster(x, selection, num_clusters, iterations, metric, sizes, centroids)
    return selection.owner, centroids, sizes
