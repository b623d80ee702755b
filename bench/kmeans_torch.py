"""K-means in plain torch, in two forms: inner products of all pairs once, or as one writes it.

On a GPU they ask the host nothing, so that a graph can hold them; elsewhere they stop when no label
changes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .case import Provider
from .clustering import Task, seed_ranks

Form = Callable[..., Tensor]
# the matrix of all pairs has so many tokens a side at most
MOST_PAIRED = 5000


def rivals(task: Task) -> list[Provider]:
    _, tokens, _ = task.shape
    pairs = f"all pairs of {tokens} tokens are too many" if tokens > MOST_PAIRED else None
    graph = ", graph" if task.machine.gpu else ""
    found = []
    for name, form, missing in (
        ("torch Gram", torch_gram, pairs),
        ("torch direct", torch_direct, None),
    ):
        labels = _labels(task, form)
        compiled = _labels(task, _compiled(form))
        found += [
            task.provider(f"{name}{graph}", labels, missing=missing),
            task.provider(
                f"{name}, compiled{graph}", compiled, slow="it compiles", missing=missing
            ),
        ]
        if task.machine.gpu:
            found.append(task.provider(f"{name}, eager", labels, launch="eager", missing=missing))
    return found


def _labels(task: Task, form: Form) -> Callable[[Tensor], Tensor]:
    early = not task.machine.gpu
    return lambda x: form(x, task.clusters, task.iterations, task.metric, early=early)


def products(a: Tensor, b: Tensor) -> Tensor:
    """a b in float32: sums of half-type products, on a GPU by its matrix units."""
    if a.is_cuda and a.itemsize < 4:
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a.float(), b.float())


def gram_start(x: Tensor, clusters: int, metric: str) -> tuple[Tensor, Tensor]:
    """The inner products of all features [B, R, R], and the first labels [B, R]."""
    gram = products(x, x.mT)
    norms = gram.diagonal(dim1=1, dim2=2)
    ranks = seed_ranks(x, clusters)
    if metric == "cosine":
        inverse = norms.rsqrt()
        gram = gram * inverse[:, :, None] * inverse[:, None, :]
        return gram, gram[:, :, ranks].argmax(-1)
    return gram, (norms[:, ranks][:, None] - 2 * gram[:, :, ranks]).argmin(-1)


def gram_round(gram: Tensor, labels: Tensor, clusters: int, metric: str) -> Tensor:
    """Labels from inner products alone: with one-hot labels, S = G onehot holds every
    x_i . sum(cluster k), and the squared distance is G_ii - 2 S_ik / n_k + T_k / n_k^2 with
    T_k = sum of S_ik over the members; G_ii does not change which k is nearest."""
    member = _members(labels, clusters).float()
    count = member.sum(1, keepdim=True).clamp(min=1)
    inner = torch.bmm(gram, member)
    square = (inner * member).sum(1, keepdim=True)
    if metric == "cosine":
        return (inner * square.rsqrt()).argmax(-1)
    return (square / count**2 - 2 * inner / count).argmin(-1)


def direct_start(x: Tensor, clusters: int, metric: str) -> tuple[Tensor, Tensor]:
    """The features in the dtype of x, so that a product of half types stays one, and labels."""
    f = x
    if metric == "cosine":
        f = torch.nn.functional.normalize(x.float(), dim=-1).to(x.dtype)
    return f, _nearest(f, f[:, seed_ranks(x, clusters)], metric)


def direct_round(f: Tensor, labels: Tensor, clusters: int, metric: str) -> Tensor:
    member = _members(labels, clusters)
    count = member.sum(1)[..., None].clamp(min=1)
    centroids = products(member.to(f.dtype).mT, f) / count
    return _nearest(f, centroids.to(f.dtype), metric)


def torch_gram(
    x: Tensor, clusters: int, iterations: int, metric: str, early: bool = False, **steps: Any
) -> Tensor:
    return _rounds(x, clusters, iterations, metric, early, **(steps or _STEPS[torch_gram]))


def torch_direct(
    x: Tensor, clusters: int, iterations: int, metric: str, early: bool = False, **steps: Any
) -> Tensor:
    return _rounds(x, clusters, iterations, metric, early, **(steps or _STEPS[torch_direct]))


def _rounds(
    x: Tensor,
    clusters: int,
    iterations: int,
    metric: str,
    early: bool,
    start: Callable[..., Any],
    round_: Callable[..., Any],
) -> Tensor:
    state, labels = start(x, clusters, metric)
    for _ in range(iterations):
        former, labels = labels, round_(state, labels, clusters, metric)
        if early and torch.equal(labels, former):
            break
    return labels


_STEPS = {
    torch_gram: {"start": gram_start, "round_": gram_round},
    torch_direct: {"start": direct_start, "round_": direct_round},
}


def _members(labels: Tensor, clusters: int) -> Tensor:
    """bool [B, R, K]; torch's one_hot asks the host."""
    return labels[..., None] == torch.arange(clusters, device=labels.device)


def _nearest(f: Tensor, centroids: Tensor, metric: str) -> Tensor:
    square = centroids.float().square().sum(-1)[:, None]
    if metric == "cosine":
        return (products(f, centroids.mT) * square.rsqrt()).argmax(-1)
    if f.dtype == torch.float32:
        return torch.baddbmm(square, f, centroids.mT, alpha=-2).argmin(-1)
    return (square - 2 * products(f, centroids.mT)).argmin(-1)


def _compiled(form: Form) -> Form:
    """The form with its two steps compiled, once for all sizes."""
    steps = {name: torch.compile(step, dynamic=True) for name, step in _STEPS[form].items()}
    return lambda *arguments, **options: form(*arguments, **options, **steps)
