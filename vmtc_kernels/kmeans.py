"""Batched k-means with deterministic seeds, repair of empty clusters and early stop."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _checks, _dispatch, _registry

METRICS = ("cosine", "euclidean")


class Clusters(NamedTuple):
    """labels: i32 [B, N], -1 where not valid; centroids: f32 [B, K, D]; sizes: i32 [B, K]."""

    labels: Tensor
    centroids: Tensor
    sizes: Tensor


def kmeans(
    x: Tensor,
    num_clusters: int,
    *,
    iterations: int = 10,
    metric: str = "cosine",
    valid: Tensor | None = None,
) -> Clusters:
    r"""Cluster the tokens of each image with Lloyd's algorithm.

    Features :math:`f_i = x_i` (euclidean) or :math:`x_i / \|x_i\|` (cosine). Of the ``R`` valid
    tokens, the one of rank :math:`\lfloor (2k+1) R / 2K \rfloor` seeds cluster ``k``. A round is

    .. math:: c_k = \mathrm{mean}_{l_i = k} f_i, \qquad l_i = \arg\min_k \mathrm{dist}(f_i, c_k)

    with :math:`\|f_i - c_k\|^2` (euclidean) or :math:`1 - f_i \cdot c_k / \|c_k\|` (cosine), ties
    to the smaller ``k``; then every empty cluster takes the token farthest from its own centroid
    among clusters of two or more. Rounds end early when no label changes.

    Args:
        x: ``[B, N, D]``, float32, float16 or bfloat16 (float64: reference only), any strides.
        num_clusters: ``K`` of at least 1. With fewer valid tokens than that, the surplus clusters
            have size 0 and a zero centroid.
        iterations: rounds after the first assignment to the seeds.
        metric: ``"cosine"`` or ``"euclidean"``.
        valid: bool ``[B, N]``, True for real tokens; the others get label -1.

    Returns:
        `Clusters`: ``labels`` i32 ``[B, N]``, ``centroids`` float32 ``[B, K, D]`` (the means of the
        members' features under those labels), ``sizes`` i32 ``[B, K]``. Differentiable in ``x``
        through ``centroids`` with the labels held fixed.

    A vector counts as zero for cosine where its squared norm is below ``D`` times the smallest
    normal number. A token whose squared norm is not finite (NaN, Inf, overflow) is at distance inf
    from every centroid, so it joins cluster 0 unless a repair moves it, and it enters no centroid.

    Raises:
        TypeError, ValueError: a wrong rank, dtype, size, device, count or option, named.

    Source: clustering of redundant tokens by cosine similarity, arXiv 2411.15453 (as reported);
    seeds and repair are ours.
    """
    return Clusters(*_op(x, num_clusters, iterations, metric, valid))


def _zero(x: Tensor) -> float:
    """The squared norm up to which a vector [..., D] counts as zero: its squares are subnormal."""
    return x.shape[-1] * torch.finfo(x.dtype).tiny


def features(x: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """Features [..., D] in float32 or wider, zero where not finite, and which are finite [...]."""
    x = x if x.dtype == torch.float64 else x.float()
    square = x.square().sum(-1)
    finite = square.isfinite()
    f = torch.where(finite[..., None], x, 0)
    if metric == "cosine":
        norm = square.sqrt()[..., None]
        f = torch.where(square[..., None] > _zero(f), f / norm, 0)
    return f, finite


def distances(f: Tensor, centroids: Tensor, metric: str) -> Tensor:
    """Distance [R, K] of features f [R, D] to centroids [K, D], one centroid at a time."""
    if metric == "euclidean":
        columns = [(f - c).square().sum(-1) for c in centroids]
    else:
        columns = [
            1 - (f * c).sum(-1) / norm if norm**2 > _zero(c) else torch.ones_like(f[:, 0])
            for c, norm in zip(centroids, torch.linalg.vector_norm(centroids, dim=-1), strict=True)
        ]
    return torch.stack(columns, dim=-1)


def assign(f: Tensor, finite: Tensor, centroids: Tensor, metric: str) -> Tensor:
    """Labels [R]: the nearest centroid, then the repair of empty clusters."""
    distance = distances(f, centroids, metric)
    distance[~finite] = torch.inf
    labels = distance.argmin(dim=-1)
    own = distance.gather(1, labels[:, None])[:, 0]
    sizes = torch.bincount(labels, minlength=len(centroids))
    for k in (sizes == 0).nonzero()[:, 0].tolist():
        movable = sizes[labels] >= 2
        if not movable.any():
            break
        farthest = torch.where(movable, own, -torch.inf).argmax()
        sizes[labels[farthest]] -= 1
        sizes[k] += 1
        labels[farthest] = k
    return labels


def means(f: Tensor, finite: Tensor, labels: Tensor, num_clusters: int) -> Tensor:
    """Centroids [K, D]: the mean of each cluster's finite members, zero where there is none.

    Summed in float64 (where the device has it), so that the mean of equal features is that feature
    and clusters of equal members have equal centroids.
    """
    wide = f if f.device.type == "mps" else f.double()
    total = wide.new_zeros(num_clusters, f.shape[-1]).index_add_(0, labels, wide)
    members = torch.bincount(labels[finite], minlength=num_clusters)
    return (total / members.clamp(min=1)[:, None]).to(f.dtype)


def cluster(x: Tensor, num_clusters: int, iterations: int, metric: str) -> tuple[Tensor, Tensor]:
    """Labels [R] and centroids [K, D] of the valid tokens x [R, D] of one image."""
    f, finite = features(x, metric)
    tokens = len(f)
    if tokens == 0:
        return torch.empty_like(finite, dtype=torch.long), f.new_zeros(num_clusters, f.shape[-1])
    ranks = (2 * torch.arange(num_clusters, device=f.device) + 1) * tokens // (2 * num_clusters)
    labels = assign(f, finite, f[ranks], metric)
    for _ in range(iterations):
        former = labels
        labels = assign(f, finite, means(f, finite, labels, num_clusters), metric)
        if torch.equal(labels, former):
            break
    return labels, means(f, finite, labels, num_clusters)


def reference(
    x: Tensor,
    num_clusters: int,
    iterations: int = 10,
    metric: str = "cosine",
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition of kmeans, one image at a time."""
    labels, centroids, sizes = _fake(x, num_clusters, iterations, metric, valid)
    labels.fill_(-1)
    for b in range(x.shape[0]):
        keep = slice(None) if valid is None else valid[b]
        image_labels, centroids[b] = cluster(x[b, keep], num_clusters, iterations, metric)
        labels[b, keep] = image_labels.int()
        sizes[b] = torch.bincount(image_labels, minlength=num_clusters)
    return labels, centroids, sizes


def _check(
    x: Tensor,
    num_clusters: int,
    iterations: int = 10,
    metric: str = "cosine",
    valid: Tensor | None = None,
) -> None:
    _checks.tensor("kmeans", "x", x, "B, N, D")
    _checks.floating("kmeans", "x", x)
    _checks.nonempty_features("kmeans", "x", x)
    _checks.count("kmeans", "num_clusters", num_clusters, 1)
    _checks.count("kmeans", "iterations", iterations, 0)
    _checks.option("kmeans", "metric", metric, METRICS)
    _checks.valid_mask("kmeans", valid, x)


def _prefer(
    capability: tuple[int, int],
    x: Tensor,
    num_clusters: int,
    iterations: int = 10,
    metric: str = "cosine",
    valid: Tensor | None = None,
) -> tuple[str, str]:
    return _dispatch.clustering(capability, x.shape[1], num_clusters)


def _fake(
    x: Tensor,
    num_clusters: int,
    iterations: int = 10,
    metric: str = "cosine",
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    B, N, D = x.shape
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (
        x.new_empty(B, N, dtype=torch.int32),
        x.new_empty(B, num_clusters, D, dtype=dtype),
        x.new_empty(B, num_clusters, dtype=torch.int32),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, _, _, ctx.metric, _ = inputs
    labels, _, sizes = output
    ctx.mark_non_differentiable(labels, sizes)
    ctx.save_for_backward(x, labels)


def _backward(ctx: Any, _labels: None, grad: Tensor, _sizes: None) -> tuple[Tensor | None, ...]:
    x, labels = ctx.saved_tensors
    f, finite = features(x, ctx.metric)
    member = finite & (labels >= 0)
    slot = labels.clamp(min=0).long()
    members = f.new_zeros(grad.shape[:2]).scatter_add_(1, slot, member.to(f.dtype))
    share = grad / members.clamp(min=1)[..., None]
    grad_x = share.gather(1, slot[..., None].expand_as(f)) * member[..., None]
    if ctx.metric == "cosine":
        # through f = x / |x|, whose derivative projects onto the tangent of the sphere
        norm = torch.linalg.vector_norm(x.to(f.dtype), dim=-1, keepdim=True)
        tangent = grad_x - f * (f * grad_x).sum(-1, keepdim=True)
        grad_x = torch.where(member[..., None] & (norm**2 > _zero(f)), tangent / norm, 0)
    return grad_x.to(x.dtype), None, None, None, None


_op = _registry.define(
    "kmeans",
    '(Tensor x, SymInt num_clusters, int iterations=10, str metric="cosine", Tensor? valid=None)'
    " -> (Tensor labels, Tensor centroids, Tensor sizes)",
    reference=reference,
    check=_check,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    prefer=_prefer,
)
