"""VMTC: keep the primary visual tokens, cluster the rest and merge each cluster into one token."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _checks, _dispatch, _registry
from .kmeans import METRICS, cluster

WEIGHTINGS = ("score", "uniform")


class MergedTokens(NamedTuple):
    """tokens: [B, P+K, D]; owner: i32 [B, N], the slot of each token or -1; sizes: i32 [B, P+K]."""

    tokens: Tensor
    owner: Tensor
    sizes: Tensor


def merge_tokens(
    x: Tensor,
    scores: Tensor,
    num_primary: int,
    num_merged: int,
    *,
    iterations: int = 10,
    metric: str = "cosine",
    weighting: str = "score",
    features: Tensor | None = None,
    valid: Tensor | None = None,
) -> MergedTokens:
    r"""Reduce the visual tokens of each image from ``N`` to ``P + K``.

    The ``P`` tokens of highest score are kept bit for bit, in ascending position (ties to the
    smaller position; NaN counts as -inf). The others are clustered by `kmeans` and each cluster
    becomes one token,

    .. math:: t_{P+k} = \sum_{l_i = k} w_i x_i \Big/ \sum_{l_i = k} w_i

    with :math:`w_i = \max(\mathrm{score}_i, 0)` or 1; a cluster whose weights sum to 0 uses 1.

    Args:
        x: ``[B, N, D]``, float32, float16 or bfloat16 (float64: reference only), any strides.
        scores: ``[B, N]``, floating, the importance of each token.
        num_primary, num_merged: ``P`` and ``K``, at least 0 and not both 0; ``P + K <= N`` unless
            ``valid`` is given. ``K = 0`` prunes, ``P = 0`` only merges.
        iterations, metric: as in `kmeans`.
        weighting: ``"score"`` or ``"uniform"``.
        features: ``[B, N, Df]``, what is clustered instead of ``x`` (attention keys, for example).
        valid: bool ``[B, N]``, True for real tokens; the others go nowhere.

    Returns:
        `MergedTokens`: ``tokens`` ``[B, P+K, D]`` in the dtype of ``x``, ``owner`` i32 ``[B, N]``
        (the slot that token ``i`` went to, -1 if not valid), ``sizes`` i32 ``[B, P+K]``. With fewer
        valid tokens than slots the unfilled slots are zero vectors of size 0; primary slots fill
        first. Differentiable in ``x`` and ``scores`` with the assignment held fixed.

    Raises:
        TypeError, ValueError: a wrong rank, dtype, size, device, count or option, named.

    Source: VMTC, arXiv 2411.15453; merging by importance as reported.
    """
    return MergedTokens(
        *_op(x, scores, num_primary, num_merged, iterations, metric, weighting, features, valid)
    )


def reference(
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
    """The definition of merge_tokens, one image at a time."""
    P = num_primary
    tokens, owner, sizes = _fake(x, scores, num_primary, num_merged)
    tokens.zero_(), owner.fill_(-1), sizes.zero_()
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    for b in range(x.shape[0]):
        everyone = torch.arange(x.shape[1], device=x.device)
        position = everyone if valid is None else everyone[valid[b]]
        score = scores[b, position].to(dtype)
        order = torch.where(score.isnan(), -torch.inf, score).sort(descending=True, stable=True)
        rank = order.indices
        primary = position[rank[:P].sort().values]
        redundant = position[rank[P:].sort().values]

        tokens[b, : len(primary)] = x[b, primary]
        owner[b, primary] = torch.arange(len(primary), device=x.device, dtype=torch.int32)
        if num_merged and len(redundant):
            clustered = (x if features is None else features)[b, redundant]
            labels, _ = cluster(clustered, num_merged, iterations, metric)
            weight = merge_weights(scores[b, redundant].to(dtype), labels, num_merged, weighting)
            wide = _wide(weight)
            total = wide.new_zeros(num_merged).index_add_(0, labels, wide)
            share = (weight / total[labels]).to(dtype)[:, None]
            merged = share.new_zeros(num_merged, x.shape[2])
            tokens[b, P:] = merged.index_add_(0, labels, share * x[b, redundant].to(dtype))
            owner[b, redundant] = P + labels.int()
        slots = owner[b, position]
        sizes[b] = torch.bincount(slots[slots >= 0], minlength=P + num_merged)
    return tokens, owner, sizes


def _wide(weight: Tensor) -> Tensor:
    """Weights to be summed: scores may add up beyond float32 (where the device has float64)."""
    return weight if weight.device.type == "mps" else weight.double()


def merge_weights(scores: Tensor, slot: Tensor, slots: int, weighting: str) -> Tensor:
    """Weight [..., R] of each token in its slot [..., R]: its score, or 1 where they sum to 0."""
    if weighting == "uniform":
        return torch.ones_like(scores)
    weight = torch.where(scores > 0, scores, 0)
    total = weight.new_zeros(*slot.shape[:-1], slots).scatter_add_(-1, slot, weight)
    return torch.where(total.gather(-1, slot) > 0, weight, 1)


def _check(
    x: Tensor,
    scores: Tensor,
    num_primary: int,
    num_merged: int,
    iterations: int = 10,
    metric: str = "cosine",
    weighting: str = "score",
    features: Tensor | None = None,
    valid: Tensor | None = None,
) -> None:
    op = "merge_tokens"
    _checks.tensor(op, "x", x, "B, N, D")
    _checks.floating(op, "x", x)
    _checks.nonempty_features(op, "x", x)
    _checks.tensor(op, "scores", scores, "B, N")
    _checks.floating(op, "scores", scores)
    _checks.size(op, "scores", scores, tuple(x.shape[:2]), "B, N of x")
    _checks.same_device(op, "scores", scores, x, "x")
    _checks.count(op, "num_primary", num_primary, 0)
    _checks.count(op, "num_merged", num_merged, 0)
    if num_primary + num_merged == 0:
        raise ValueError(f"{op}: num_primary + num_merged must be at least 1, got 0 + 0")
    if valid is None and num_primary + num_merged > x.shape[1]:
        raise ValueError(
            f"{op}: num_primary + num_merged must be at most the {x.shape[1]} tokens of x"
            f" (unless valid is given), got {num_primary} + {num_merged}"
        )
    _checks.count(op, "iterations", iterations, 0)
    _checks.option(op, "metric", metric, METRICS)
    _checks.option(op, "weighting", weighting, WEIGHTINGS)
    if features is not None:
        _checks.tensor(op, "features", features, "B, N, Df")
        _checks.floating(op, "features", features)
        _checks.nonempty_features(op, "features", features)
        _checks.size(op, "features", features[..., 0], tuple(x.shape[:2]), "B, N of x")
        _checks.same_device(op, "features", features, x, "x")
    _checks.valid_mask(op, valid, x)


def _prefer(
    capability: tuple[int, int],
    x: Tensor,
    scores: Tensor,
    num_primary: int,
    num_merged: int,
    iterations: int = 10,
    metric: str = "cosine",
    weighting: str = "score",
    features: Tensor | None = None,
    valid: Tensor | None = None,
) -> tuple[str, str]:
    most = x.shape[1] if valid is not None else x.shape[1] - num_primary
    return _dispatch.clustering(capability, most, num_merged)


def _fake(
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
    B, N, D = x.shape
    slots = num_primary + num_merged
    return (
        x.new_empty(B, slots, D),
        x.new_empty(B, N, dtype=torch.int32),
        x.new_empty(B, slots, dtype=torch.int32),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, scores, ctx.num_primary, _, _, _, ctx.weighting, _, _ = inputs
    tokens, owner, sizes = output
    ctx.mark_non_differentiable(owner, sizes)
    ctx.save_for_backward(x, scores, tokens, owner)


def _backward(ctx: Any, grad: Tensor, _owner: None, _sizes: None) -> tuple[Tensor | None, ...]:
    x, scores, tokens, owner = ctx.saved_tensors
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    slot = owner.clamp(min=0).long()
    owned = owner >= 0
    merged = owner >= ctx.num_primary
    score = torch.where(merged, scores.to(dtype), 0)
    weight = torch.where(merged, merge_weights(score, slot, grad.shape[1], ctx.weighting), 1)
    weight = torch.where(owned, weight, 0)
    wide = _wide(weight)
    # on a GPU scatter_add_ adds in any order, and index_put_ sorts first
    image = torch.arange(slot.shape[0], device=slot.device)[:, None].expand_as(slot)
    total = wide.new_zeros(grad.shape[:2]).index_put_((image, slot), wide, accumulate=True)
    total = total.gather(1, slot)
    share = torch.where(owned, weight / total, 0).to(dtype)[..., None]

    rows = slot[..., None].expand_as(x)
    grad_token = grad.to(dtype).gather(1, rows)
    # a token of weight 0 gets gradient 0, also from a slot whose gradient is not finite
    grad_x = torch.where(share > 0, share * grad_token, 0).to(x.dtype)

    grad_scores = None
    if ctx.needs_input_grad[1]:
        apart = x.to(dtype) - tokens.to(dtype).gather(1, rows)
        moved = torch.where(grad_token != 0, grad_token * apart, 0).sum(-1)
        by_score = merged & (scores > 0) & (ctx.weighting == "score")
        grad_scores = torch.where(by_score, moved / total, 0).to(scores.dtype)
    return grad_x, grad_scores, None, None, None, None, None, None, None


_op = _registry.define(
    "merge_tokens",
    "(Tensor x, Tensor scores, SymInt num_primary, SymInt num_merged, int iterations=10,"
    ' str metric="cosine", str weighting="score", Tensor? features=None, Tensor? valid=None)'
    " -> (Tensor tokens, Tensor owner, Tensor sizes)",
    reference=reference,
    check=_check,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    prefer=_prefer,
)
