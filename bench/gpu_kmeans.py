"""kmeans on the sizes that flash-kmeans is made for: many tokens, few features."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor

import vmtc_kernels

from .clustering import Problem
from .data import DATASETS
from .gpu import DEVICE, ours, set_count
from .gpu_clustering import Task, rivals, spread
from .runner import Case, Cost, Target

# the reference takes a second for an image of these sizes
JUDGED = 2


@dataclass(frozen=True)
class Setup:
    K: int
    B: int = 32
    N: int = 16384
    D: int = 128
    metric: str = "euclidean"
    data: str = "randn"
    iterations: int = 10
    dtype: str = "bfloat16"


SETUPS = [Setup(K) for K in (128, 1000)]


def case(setup: Setup, device: str = DEVICE, all_launches: bool = True) -> Case:
    dtype = getattr(torch, setup.dtype)
    size = setup.B * setup.N * setup.D * dtype.itemsize
    sets = [
        DATASETS[setup.data](setup.B, setup.N, setup.D, seed, device).to(dtype)
        for seed in range(set_count(size, device))
    ]
    cut = spread(setup.B, JUDGED).to(device)
    problem = Problem.of(sets[0][cut], setup.K, setup.iterations, setup.metric)

    def run(x: Tensor) -> Tensor:
        found = vmtc_kernels.kmeans(x, setup.K, iterations=setup.iterations, metric=setup.metric)
        return found.labels

    # without structure a label at a near tie takes others along, so the objective decides alone
    return Case(
        suite="kmeans",
        params=asdict(setup),
        images=setup.B,
        cost=cost(setup),
        providers=[
            *ours(
                "kmeans",
                [partial(run, x) for x in sets],
                lambda labels: problem.judge(labels[cut], same_labels=False),
            ),
            # all pairs of so many tokens fit no memory
            *rivals(Task(sets, cut, problem), all_launches=all_launches, gram=False),
        ],
        targets=[Target("rival", 1.0)],
        memory_unit=("the tokens", size),
    )


def cost(setup: Setup) -> Cost:
    B, N, K, D = setup.B, setup.N, setup.K, setup.D
    itemsize = getattr(torch, setup.dtype).itemsize
    rounds = (2 * (setup.iterations + 1) * K + setup.iterations) * N * D
    return Cost(bytes=B * (itemsize * N * D + 4 * (K * D + N + K)), flops=B * rounds)
