"""Suite ``kmeans``: clustering alone, also on the sizes that flash-kmeans is made for."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

import vmtc_kernels

from . import kmeans_packages, kmeans_torch
from .case import Case, Cost, Target
from .clustering import Task, flops
from .data import DATASETS
from .machine import Machine, Suite, ours

# the reference takes a second for an image of many tokens
JUDGED = 2


@dataclass(frozen=True)
class Setup:
    K: int = 128
    B: int = 1
    N: int = 4096
    D: int = 128
    metric: str = "euclidean"
    data: str = "blobs"
    iterations: int = 10
    dtype: str = "float32"


ON_GPU = Setup(B=32, N=16384, data="randn", dtype="bfloat16")


def setups(machine: Machine) -> list[Setup]:
    if machine.gpu:
        return [replace(ON_GPU, K=K) for K in (128, 1000)]
    return [Setup(), Setup(K=32, B=4, N=576, D=1024, data="field")]


def sweeps(machine: Machine) -> dict[str, list[Setup]]:
    usual = replace(ON_GPU, N=4096) if machine.gpu else Setup(K=32, N=1024, D=1024)
    batches = (1, 4, 16, 64, 256) if machine.gpu else (1, 2, 4, 8, 16)
    return {
        "N": [replace(usual, N=N) for N in (144, 256, 576, 1024, 2304, 4096, 16384)],
        "K": [replace(usual, K=K) for K in (4, 8, 16, 32, 64, 128, 256)],
        "D": [replace(usual, D=D) for D in (64, 256, 1024, 4096)],
        "B": [replace(usual, B=B) for B in batches],
    }


def case(setup: Setup, machine: Machine) -> Case:
    dtype = getattr(torch, setup.dtype)
    shape = (setup.B, setup.N, setup.D)
    size = setup.B * setup.N * setup.D * dtype.itemsize
    make = DATASETS[setup.data]
    sets = machine.sets(lambda seed: make(*shape, seed, machine.device).to(dtype), size)
    most = JUDGED if machine.gpu else setup.B
    task = Task(sets, shape, dtype, setup.K, setup.iterations, setup.metric, machine, most)

    def run(x: Tensor) -> Tensor:
        found = vmtc_kernels.kmeans(x, setup.K, iterations=setup.iterations, metric=setup.metric)
        return found.labels

    # without structure a label at a near tie takes others along, so the objective decides alone
    structured = setup.data != "randn"
    return Case(
        suite="kmeans",
        params=asdict(setup),
        images=setup.B,
        cost=cost(setup),
        providers=[
            *ours(
                "kmeans",
                sets.calls(run),
                lambda labels: task.judge(labels, same_labels=structured),
                machine,
            ),
            *kmeans_torch.rivals(task),
            *kmeans_packages.rivals(task),
        ],
        targets=[Target("rival", 1.0)],
        memory_unit=("the tokens", size),
    )


def cost(setup: Setup) -> Cost:
    B, N, K, D = setup.B, setup.N, setup.K, setup.D
    itemsize = getattr(torch, setup.dtype).itemsize
    return Cost(
        bytes=B * (itemsize * N * D + 4 * (K * D + N + K)),
        flops=B * flops(N, K, setup.iterations, D),
    )


SUITE = Suite("kmeans", setups, sweeps, case)
