"""merge_tokens whole on a GPU against k-means that only clusters tokens already gathered."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor

import vmtc_kernels
from vmtc_kernels import MergedTokens

from .bench_merge_tokens import verify
from .clustering import Problem
from .data import DATASETS
from .gpu import DEVICE, ours, set_count
from .gpu_clustering import Task, rivals, spread
from .runner import Case, Cost, Target, Verdict

# the reference takes 20 ms an image
JUDGED = 16


@dataclass(frozen=True)
class Setup:
    B: int
    D: int
    metric: str = "cosine"
    data: str = "blobs"
    N: int = 576
    P: int = 128
    K: int = 32
    iterations: int = 10
    dtype: str = "bfloat16"


# what matters most comes first, as a run may be cut short
SETUPS = [
    Setup(B, D, metric, data)
    for metric, data in (("cosine", "blobs"), ("euclidean", "blobs"), ("cosine", "field"))
    for D in (1024, 4096)
    for B in (1, 8, 64, 256)
]


def case(setup: Setup, device: str = DEVICE, all_launches: bool = True) -> Case:
    make, cut = DATASETS[setup.data], spread(setup.B, JUDGED).to(device)
    dtype = getattr(torch, setup.dtype)
    sets = [
        Inputs.of(make(setup.B, setup.N, setup.D, seed, device).to(dtype), setup.P, seed)
        for seed in range(set_count(setup.B * setup.N * setup.D * dtype.itemsize, device))
    ]
    first, gathered = sets[0], [inputs.gathered() for inputs in sets]
    problem = Problem.of(gathered[0][cut], setup.K, setup.iterations, setup.metric)

    def run(inputs: Inputs) -> MergedTokens:
        return vmtc_kernels.merge_tokens(
            inputs.x,
            inputs.scores,
            setup.P,
            setup.K,
            iterations=setup.iterations,
            metric=setup.metric,
        )

    def judge(result: MergedTokens) -> Verdict:
        some = MergedTokens(*(value[cut] for value in result))
        return verify(some, first.x[cut], first.scores[cut], first.redundant[cut], problem)

    calls = [partial(run, inputs) for inputs in sets]
    return Case(
        suite="merge_tokens",
        params=asdict(setup),
        images=setup.B,
        cost=cost(setup),
        providers=[
            *ours("merge_tokens", calls, judge),
            *rivals(Task(gathered, cut, problem), all_launches=all_launches),
        ],
        targets=[
            Target("rival", 1.0),
            Target("rival", 20.0, "flash-kmeans"),
            Target("rival", 6.0 if setup.B <= 8 else 4.0, "torch"),
        ],
        memory_unit=("the redundant tokens", gathered[0].nbytes),
    )


@dataclass(frozen=True)
class Inputs:
    """x [B, N, D], scores [B, N], and the positions [B, R] of the redundant tokens, ascending."""

    x: Tensor
    scores: Tensor
    redundant: Tensor

    @classmethod
    def of(cls, x: Tensor, num_primary: int, seed: int) -> Inputs:
        generator = torch.Generator(x.device).manual_seed(seed + 1)
        scores = torch.rand(x.shape[:2], generator=generator, device=x.device)
        order = scores.argsort(dim=1, descending=True, stable=True)
        return cls(x, scores, order[:, num_primary:].sort().values)

    def gathered(self) -> Tensor:
        rows = self.redundant[..., None].expand(-1, -1, self.x.shape[2])
        return self.x.gather(1, rows)


def cost(setup: Setup) -> Cost:
    """Everything read and written once; the products of the cheaper of the two exact forms: all
    pairs of redundant tokens once, or each with each centroid in each round."""
    B, N, P, K, D = setup.B, setup.N, setup.P, setup.K, setup.D
    redundant = N - P
    itemsize = getattr(torch, setup.dtype).itemsize
    numbers = itemsize * (N + P + K) * D + 4 * (2 * N + P + K)
    pairs = redundant * (redundant + 1) * D
    rounds = (2 * (setup.iterations + 1) * K + setup.iterations) * redundant * D
    return Cost(bytes=B * numbers, flops=B * (min(pairs, rounds) + 2 * redundant * D))
