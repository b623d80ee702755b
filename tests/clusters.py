"""What must hold of every result of kmeans and merge_tokens, beside the labels themselves."""

from __future__ import annotations

import numpy as np
import oracle
import torch
from cases import array, assert_close, assert_same_bits, assert_same_clustering, bits
from torch import Tensor

from vmtc_kernels import Clusters, MergedTokens


def expected_clusters(
    x: Tensor,
    num_clusters: int,
    iterations: int = 10,
    metric: str = "cosine",
    valid: Tensor | None = None,
    exact_start: bool = False,
) -> list[oracle.Clustering]:
    masks = [None] * len(x) if valid is None else array(valid)
    return [
        oracle.kmeans(image, num_clusters, iterations, metric, mask, exact_start)
        for image, mask in zip(array(x), masks, strict=True)
    ]


def assert_clusters(got: Clusters, x: Tensor, metric: str, valid: Tensor | None = None) -> None:
    """What holds whatever the labels are: types, sizes, no avoidable empty cluster, means."""
    labels, centroids, sizes = got
    B, N, D = x.shape
    K = sizes.shape[1]
    assert (labels.shape, labels.dtype) == ((B, N), torch.int32)
    assert (centroids.shape, sizes.dtype) == ((B, K, D), torch.int32)
    assert centroids.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32)
    keep = np.ones((B, N), bool) if valid is None else array(valid)
    means = np.zeros((B, K, D))
    for b in range(B):
        row, count = array(labels[b]), keep[b].sum()
        assert (row[~keep[b]] == -1).all() and (row[keep[b]] >= 0).all()
        assert np.array_equal(array(sizes[b]), np.bincount(row[keep[b]], minlength=K))
        assert (array(sizes[b]) > 0).sum() == min(K, count)
        image = oracle.kmeans(array(x[b]), 1, 0, metric, keep[b])
        for k in range(K):
            members = image.features[(row == k) & image.finite]
            means[b, k] = members.mean(0) if len(members) else 0
    assert_close(centroids, means)


def assert_merged(
    got: MergedTokens,
    x: Tensor,
    scores: Tensor,
    num_primary: int,
    num_merged: int,
    weighting: str = "score",
    valid: Tensor | None = None,
) -> None:
    """What holds whatever the clusters are: the primary tokens, the sizes and the merged values."""
    tokens, owner, sizes = got
    (B, N, D), P, K = x.shape, num_primary, num_merged
    assert (tokens.shape, tokens.dtype) == ((B, P + K, D), x.dtype)
    assert (owner.shape, owner.dtype) == ((B, N), torch.int32)
    assert (sizes.shape, sizes.dtype) == ((B, P + K), torch.int32)
    wanted = np.zeros((B, P + K, D))
    for b in range(B):
        mask = np.ones(N, bool) if valid is None else array(valid[b])
        slot, size = array(owner[b]), array(sizes[b])
        primary = oracle.primary_positions(array(scores[b]), P, mask)
        assert [slot[i] for i in primary] == list(range(len(primary)))
        assert_same_bits(tokens[b, : len(primary)], x[b, primary])
        others = np.setdiff1d(np.flatnonzero(mask), primary)
        assert (slot[~mask] == -1).all()
        assert (slot[others] >= P).all() if K else (slot[others] == -1).all()
        assert np.array_equal(size, np.bincount(slot[slot >= 0], minlength=P + K))
        assert K == 0 or size.sum() == mask.sum()
        assert (size[:P] == (np.arange(P) < len(primary))).all()
        assert (size[P:] > 0).sum() == min(K, len(others))
        assert (bits(tokens[b])[size == 0] == 0).all()
        wanted[b] = oracle.merged(array(x[b]), array(scores[b]), slot, P, P + K, weighting)
    assert_close(tokens, wanted)


def assert_same_owners(
    got: MergedTokens,
    features: Tensor,
    scores: Tensor,
    num_primary: int,
    num_merged: int,
    iterations: int = 10,
    metric: str = "cosine",
    valid: Tensor | None = None,
) -> None:
    """The redundant tokens went where `oracle.kmeans` puts them."""
    images, labels = [], got.owner - num_primary
    for b in range(len(features)):
        mask = np.ones(features.shape[1], bool) if valid is None else array(valid[b]).copy()
        mask[oracle.primary_positions(array(scores[b]), num_primary, mask)] = False
        images.append(oracle.kmeans(array(features[b]), num_merged, iterations, metric, mask))
    assert_same_clustering(torch.where(labels < 0, -1, labels), images)
