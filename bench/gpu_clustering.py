"""K-means on gathered tokens by others on a GPU: plain torch in two forms, and flash-kmeans.

What torch does is written so that a graph can hold it: no question to the host, so no early stop.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from .clustering import Problem, load, seed_ranks
from .runner import Provider, Verdict

Form = Callable[..., Tensor]


@dataclass(frozen=True)
class Task:
    """sets: tokens [B, R, D], one tensor for each set of inputs.

    judged: the images of the first set that ``problem`` knows the answer of.
    """

    sets: list[Tensor]
    judged: Tensor
    problem: Problem

    def provider(
        self,
        name: str,
        labels: Callable[[Tensor], Tensor],
        *,
        same_labels: bool,
        launch: Literal["graph", "eager"] = "graph",
        missing: str | None = None,
    ) -> Provider:
        """labels: tokens [B, R, D] -> labels [B, R]."""
        run, *others = [lambda x=x: labels(x) for x in self.sets]
        return Provider(
            name,
            "rival",
            "clustering alone",
            run,
            lambda got: self.problem.judge(got[self.judged], same_labels=same_labels),
            missing,
            tuple(others),
            launch,
        )


def spread(batch: int, most: int) -> Tensor:
    """Up to ``most`` images of a batch, the first and the last among them."""
    return torch.linspace(0, batch - 1, min(batch, most)).round().long()


def rivals(task: Task, *, all_launches: bool = True, gram: bool = True) -> list[Provider]:
    """all_launches: torch also without a graph and compiled, and the whole of flash-kmeans."""
    forms: list[tuple[str, Form, bool]] = [("torch direct", torch_direct, False)]
    if gram:
        forms.insert(0, ("torch Gram", torch_gram, True))
    found = []
    for name, form, same_labels in forms:
        found.append(_torch(task, f"{name}, graph", form, same_labels))
        if all_launches:
            found.append(_torch(task, f"{name}, compiled, graph", _compiled(form), same_labels))
            eager = _torch(task, f"{name}, eager", form, same_labels)
            found.append(replace(eager, launch="eager"))
    found.append(_flash_kernels(task))
    if all_launches:
        found.append(_flash_kmeans(task))
    return found


def _torch(task: Task, name: str, form: Form, same_labels: bool) -> Provider:
    problem = task.problem

    def labels(x: Tensor) -> Tensor:
        return form(x, problem.clusters, problem.iterations, problem.metric)

    return task.provider(name, labels, same_labels=same_labels)


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
    """See `clustering.torch_gram`: S [B, R, K] holds each feature times the sum of each cluster."""
    member = _members(labels, clusters).float()
    count = member.sum(1, keepdim=True).clamp(min=1)
    inner = torch.bmm(gram, member)
    square = (inner * member).sum(1, keepdim=True)
    if metric == "cosine":
        return (inner * square.rsqrt()).argmax(-1)
    return (square / count**2 - 2 * inner / count).argmin(-1)


def torch_gram(
    x: Tensor,
    clusters: int,
    iterations: int,
    metric: str,
    start: Callable[..., Any] = gram_start,
    round_: Callable[..., Any] = gram_round,
) -> Tensor:
    gram, labels = start(x, clusters, metric)
    for _ in range(iterations):
        labels = round_(gram, labels, clusters, metric)
    return labels


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


def torch_direct(
    x: Tensor,
    clusters: int,
    iterations: int,
    metric: str,
    start: Callable[..., Any] = direct_start,
    round_: Callable[..., Any] = direct_round,
) -> Tensor:
    f, labels = start(x, clusters, metric)
    for _ in range(iterations):
        labels = round_(f, labels, clusters, metric)
    return labels


def _members(labels: Tensor, clusters: int) -> Tensor:
    """bool [B, R, K]; torch's one_hot asks the host."""
    return labels[..., None] == torch.arange(clusters, device=labels.device)


def _nearest(f: Tensor, centroids: Tensor, metric: str) -> Tensor:
    inner = products(f, centroids.mT)
    square = centroids.float().square().sum(-1)[:, None]
    if metric == "cosine":
        return (inner * square.rsqrt()).argmax(-1)
    return (square - 2 * inner).argmin(-1)


_STEPS = {torch_gram: (gram_start, gram_round), torch_direct: (direct_start, direct_round)}


def _compiled(form: Form) -> Form:
    """The form with its two steps compiled, once for all sizes."""
    start, round_ = (torch.compile(step, dynamic=True) for step in _STEPS[form])
    return lambda *arguments: form(*arguments, start=start, round_=round_)


def _flash_kernels(task: Task) -> Provider:
    """flash-kmeans' own kernels without its loop, which asks the host in every round."""
    assign, missing = load("flash_kmeans.assign_euclid_triton", "flash-kmeans")
    update, missing_too = load("flash_kmeans.centroid_update_triton", "flash-kmeans")
    missing = missing or missing_too
    problem = task.problem
    if problem.metric != "euclidean":
        missing = missing or "only its euclidean kernels are called by themselves"

    def labels(x: Tensor) -> Tensor:
        # its own loop keeps the norms in the dtype of x, and loses near duplicates
        norms = x.float().square().sum(-1)
        centroids = x[:, seed_ranks(x, problem.clusters)].contiguous()
        for _ in range(problem.iterations):
            found = assign.euclid_assign_triton(x, centroids, norms)
            centroids = update.triton_centroid_update_sorted_euclid(x, found, centroids)
        return assign.euclid_assign_triton(x, centroids, norms)

    name = "flash-kmeans' kernels, graph"
    return task.provider(name, labels, same_labels=False, missing=missing)


def _flash_kmeans(task: Task) -> Provider:
    # from the package itself one may get plain torch instead, without a word
    module, missing = load("flash_kmeans.kmeans_triton_impl", "flash-kmeans")
    kernels, _ = load("flash_kmeans.assign_euclid_triton", "flash-kmeans")
    problem = task.problem
    cosine = problem.metric == "cosine"

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        function = module.batch_kmeans_Cosine if cosine else module.batch_kmeans_Euclid
        seeds = x[:, seed_ranks(x, problem.clusters)].contiguous()
        _, centroids, _ = function(
            x, problem.clusters, max_iters=problem.iterations, tol=-1.0, init_centroids=seeds
        )
        return x, centroids

    # the labels that it returns are older than its centroids
    def verify(result: tuple[Tensor, Tensor]) -> Verdict:
        x, centroids = result
        if cosine:
            f = torch.nn.functional.normalize(x, dim=-1)
            labels = kernels.cosine_assign_triton(f, centroids)
        else:
            labels = kernels.euclid_assign_triton(x, centroids, x.float().square().sum(-1))
        return problem.judge(labels[task.judged], same_labels=False)

    first, *others = [lambda x=x: run(x) for x in task.sets]
    return Provider(
        "flash-kmeans, eager",
        "rival",
        "clustering alone",
        first,
        verify,
        missing,
        tuple(others),
        "eager",
        "its cosine kernel tries 162 tiles" if cosine and task.sets[0].shape[2] > 512 else None,
    )
