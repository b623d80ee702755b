"""K-means of gathered tokens: what every clustering must reach, and the task that rivals get.

All start from the same seeds and run as many rounds as `vmtc_kernels.kmeans`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

import vmtc_kernels

from .case import CLUSTERS, Provider, Verdict
from .machine import Machine, Sets, spread

# a label may differ where the token is this much farther from the other centroid, relatively, ...
NEAR_TIE = 1e-3
# ... and for no more than this share of the tokens
DIFFERING = 0.01
OBJECTIVE = 1e-3
# of rivals: rounding at a near tie may lead the same algorithm to another local minimum
RIVALS_OBJECTIVE = 0.05


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
        rows = centroids.gather(1, labels[..., None].expand(-1, -1, centroids.shape[2]))
        if self.metric == "cosine":
            return 1 - torch.nn.functional.cosine_similarity(f, rows, dim=-1)
        return (f - rows).square().sum(-1)

    def judge(self, labels: Tensor, *, same_labels: bool, objective: float = OBJECTIVE) -> Verdict:
        """same_labels: the provider breaks no tie and fills no cluster in its own way.

        objective: by how much the reference's may be missed, relatively, on any image.
        """
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
        ok = abs(worst) <= objective
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


@dataclass(frozen=True)
class Task:
    """K-means of tokens [B, R, D], one tensor for each set of inputs, judged on at most ``most``
    images of the first."""

    sets: Sets[Tensor]
    shape: tuple[int, int, int]
    dtype: torch.dtype
    clusters: int
    iterations: int
    metric: str
    machine: Machine
    most: int

    @cached_property
    def judged(self) -> Tensor:
        """The images of the first set that ``problem`` knows the answer of."""
        return spread(self.shape[0], self.most).to(self.machine.device)

    @cached_property
    def problem(self) -> Problem:
        some = self.sets.first[self.judged]
        return Problem.of(some, self.clusters, self.iterations, self.metric)

    def seeds(self, x: Tensor) -> Tensor:
        """[B, K, D]: the tokens of x [B, R, D] that the clusters start from."""
        return x[:, seed_ranks(x, self.clusters)].contiguous()

    def judge(self, labels: Tensor, **options: Any) -> Verdict:
        """labels: [B, R] of the first set."""
        return self.problem.judge(labels[self.judged], **options)

    def judge_rival(self, labels: Tensor) -> Verdict:
        return self.judge(labels, same_labels=False, objective=RIVALS_OBJECTIVE)

    def provider(
        self,
        name: str,
        run: Callable[[Tensor], Any],
        *,
        verify: Callable[[Any], Verdict] | None = None,
        scope: str = CLUSTERS,
        **options: Any,
    ) -> Provider:
        """run: tokens [B, R, D] -> what ``verify`` judges; without it, labels [B, R]."""
        first, *others = self.sets.calls(run)
        judge = verify or self.judge_rival
        return Provider(name, "rival", scope, first, judge, others=tuple(others), **options)


def seed_ranks(x: Tensor, clusters: int) -> Tensor:
    """[K]: the ranks of the tokens of x [B, R, D] that the clusters start from."""
    steps = torch.arange(clusters, device=x.device)
    return (2 * steps + 1) * x.shape[1] // (2 * clusters)


def flops(tokens: int, clusters: int, iterations: int, features: int) -> int:
    """Of one image by the cheaper of the two exact forms, no distance skipped: all pairs of tokens
    once, or each token with each centroid in each round."""
    pairs = tokens * (tokens + 1) * features
    rounds = (2 * (iterations + 1) * clusters + iterations) * tokens * features
    return min(pairs, rounds)
