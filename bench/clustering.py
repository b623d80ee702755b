"""K-means on gathered tokens by other libraries, and the gate that every clustering must pass.

All start from the same seeds and run as many rounds as `vmtc_kernels.kmeans`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

import vmtc_kernels

from . import alone
from .runner import Provider, Verdict

# a label may differ where the token is this much farther from the other centroid, relatively, ...
NEAR_TIE = 1e-3
# ... and for no more than this share of the tokens
DIFFERING = 0.01
OBJECTIVE = 1e-3


@dataclass(frozen=True)
class Problem:
    """K-means of x [B, R, D], and what the reference answers.

    former: centroids [B, K, D] that the last assignment compared the tokens with.
    """

    x: Tensor
    clusters: int
    iterations: int
    labels: Tensor
    former: Tensor
    metric: str = "euclidean"

    @classmethod
    def of(cls, x: Tensor, clusters: int, iterations: int, metric: str = "euclidean") -> Problem:
        """iterations is at least 1."""
        with vmtc_kernels.use_backend("reference"):
            last, final = (
                vmtc_kernels.kmeans(x, clusters, iterations=rounds, metric=metric)
                for rounds in (iterations - 1, iterations)
            )
        return cls(x, clusters, iterations, final.labels.long(), last.centroids, metric)

    @property
    def seeds(self) -> Tensor:
        """[B, K, D]"""
        return self.x[:, seed_ranks(self.x, self.clusters)]

    def objective(self, labels: Tensor) -> Tensor:
        """[B]: the sum of the distances to the cluster means."""
        member = one_hot(labels, self.clusters).double()
        f = self._features()
        means = member.mT @ f / member.sum(1)[..., None].clamp(min=1)
        return self._distances(f, means, labels).sum(1)

    def _features(self) -> Tensor:
        x = self.x.double()
        return torch.nn.functional.normalize(x, dim=-1) if self.metric == "cosine" else x

    def _distances(self, f: Tensor, centroids: Tensor, labels: Tensor) -> Tensor:
        """[B, R]: of each token from the centroid of its label."""
        rows = _rows(centroids, labels)
        if self.metric == "cosine":
            return 1 - torch.nn.functional.cosine_similarity(f, rows, dim=-1)
        return (f - rows).square().sum(-1)

    def judge(self, labels: Tensor, *, same_labels: bool) -> Verdict:
        """same_labels: the provider breaks no tie and fills no cluster in its own way."""
        labels = labels.long()
        if (
            labels.shape != self.labels.shape
            or not 0 <= labels.min() <= labels.max() < self.clusters
        ):
            return Verdict(False, f"no labels of 0 to {self.clusters - 1} for every token")
        excess = self.objective(labels) / self.objective(self.labels) - 1
        worst = float(excess[excess.abs().argmax()])
        differing = int((labels != self.labels).sum())
        detail = f"{differing} of {labels.numel()} labels differ, objective {worst:+.2%}"
        ok = abs(worst) <= OBJECTIVE
        if same_labels:
            ok &= differing <= DIFFERING * labels.numel() and self._tie(labels) <= NEAR_TIE
        return Verdict(ok, detail)

    def _tie(self, labels: Tensor) -> float:
        """How much farther, relatively, the farthest misplaced token is from its centroid."""
        f = self._features()
        got, expected = (
            self._distances(f, self.former.double(), chosen) for chosen in (labels, self.labels)
        )
        return float((got / expected - 1).where(labels != self.labels, 0).max())


def seed_ranks(x: Tensor, clusters: int) -> Tensor:
    """[K]: the ranks of the tokens of x [B, R, D] that the clusters start from."""
    steps = torch.arange(clusters, device=x.device)
    return (2 * steps + 1) * x.shape[1] // (2 * clusters)


def _rows(table: Tensor, labels: Tensor) -> Tensor:
    """table [B, K, D], labels [B, R] -> [B, R, D]"""
    return table.gather(1, labels[..., None].expand(-1, -1, table.shape[2]))


def rivals(problem: Problem) -> list[Provider]:
    return [
        _faiss(problem),
        _sklearn(problem),
        _torch(problem, "torch Gram", torch_gram),
        _torch(problem, "torch direct", torch_direct),
        _fast_pytorch_kmeans(problem),
    ]


def torch_gram(x: Tensor, seeds: int, iterations: int) -> Tensor:
    """Labels from inner products alone: with G = X X' and one-hot labels, S = G onehot holds every
    x_i . sum(cluster k), and the squared distance is G_ii - 2 S_ik / n_k + T_k / n_k^2 with
    T_k = sum of S_ik over the members; G_ii does not change which k is nearest."""
    gram = torch.bmm(x, x.mT)
    ranks = seed_ranks(x, seeds)
    norms = gram.diagonal(dim1=1, dim2=2)
    labels = (norms[:, ranks][:, None] - 2 * gram[:, :, ranks]).argmin(-1)
    for _ in range(iterations):
        member = one_hot(labels, seeds).float()
        count = member.sum(1, keepdim=True).clamp(min=1)
        inner = torch.bmm(gram, member)
        square = (inner * member).sum(1, keepdim=True)
        former, labels = labels, (square / count**2 - 2 * inner / count).argmin(-1)
        if torch.equal(labels, former):
            break
    return labels


def torch_direct(x: Tensor, seeds: int, iterations: int) -> Tensor:
    """Labels by Lloyd's algorithm as one writes it down: a GEMM to assign, a GEMM to average."""
    centroids = x[:, seed_ranks(x, seeds)]
    labels = _nearest(x, centroids)
    for _ in range(iterations):
        member = one_hot(labels, seeds).float()
        count = member.sum(1)[..., None].clamp(min=1)
        former, labels = labels, _nearest(x, torch.bmm(member.mT, x) / count)
        if torch.equal(labels, former):
            break
    return labels


def _nearest(x: Tensor, centroids: Tensor) -> Tensor:
    norms = centroids.square().sum(-1)[:, None]
    return torch.baddbmm(norms, x, centroids.mT, alpha=-2).argmin(-1)


def _torch(problem: Problem, name: str, labels: Callable[[Tensor, int, int], Tensor]) -> Provider:
    return Provider(
        name,
        "rival",
        "clustering alone",
        lambda: labels(problem.x, problem.clusters, problem.iterations),
        lambda result: problem.judge(result, same_labels=True),
    )


def _faiss(problem: Problem) -> Provider:
    _, missing = load("faiss", "faiss-cpu")
    # a process starts with its first call
    process = alone.process(problem.x.numpy(), problem.seeds.numpy(), problem.iterations)

    def run() -> None:
        process.submit(alone.train).result()

    # training ends with centroids: their labels are the gate's business and not timed
    def verify(_: None) -> Verdict:
        labels = [torch.from_numpy(image) for image in process.submit(alone.labels).result()]
        return problem.judge(torch.stack(labels), same_labels=False)

    return Provider("faiss", "rival", "clustering alone", run, verify, missing)


def _sklearn(problem: Problem) -> Provider:
    cluster, missing = load("sklearn.cluster", "scikit-learn")
    images, seeds = problem.x.numpy(), problem.seeds.numpy()

    def run() -> list[Any]:
        return [
            cluster.KMeans(
                problem.clusters, init=init, n_init=1, max_iter=problem.iterations, tol=0
            ).fit(x)
            for x, init in zip(images, seeds, strict=True)
        ]

    def verify(models: list[Any]) -> Verdict:
        labels = torch.stack([torch.from_numpy(model.labels_) for model in models])
        return problem.judge(labels, same_labels=False)

    return Provider("scikit-learn", "rival", "clustering alone", run, verify, missing)


def _fast_pytorch_kmeans(problem: Problem) -> Provider:
    module, missing = load("fast_pytorch_kmeans", "fast-pytorch-kmeans")

    def run() -> Any:
        model = module.MultiKMeans(problem.clusters, max_iter=problem.iterations, tol=-1)
        model.fit_predict(problem.x, centroids=problem.seeds)
        return model

    # the labels that it returns are older than its centroids
    def verify(model: Any) -> Verdict:
        return problem.judge(model.predict(problem.x), same_labels=False)

    return Provider("fast-pytorch-kmeans", "rival", "clustering alone", run, verify, missing)


def load(module: str, package: str) -> tuple[Any, str | None]:
    """The module, or None and why it is missing."""
    try:
        return importlib.import_module(module), None
    except ImportError as error:
        return None, f"{package} does not import: {error}"
