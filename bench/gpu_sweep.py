"""merge_tokens on a GPU over one size at a time, the others as usual."""

from __future__ import annotations

from dataclasses import replace

from . import gpu_merge_tokens
from .gpu import DEVICE
from .gpu_merge_tokens import Setup
from .runner import Case, Target

USUAL = Setup(B=8, D=1024)
SETUPS = [
    # a quarter of the tokens stays, so that few are enough for the clusters
    *(replace(USUAL, N=N, P=N // 4) for N in (144, 256, 1024, 2304, 4096)),
    *(replace(USUAL, K=K) for K in (4, 16, 64, 256)),
    *(replace(USUAL, D=D) for D in (64, 256, 2048, 8192)),
]


def case(setup: Setup, device: str = DEVICE) -> Case:
    found = gpu_merge_tokens.case(setup, device, all_launches=False)
    return replace(found, suite="sweep", targets=[Target("rival", 1.0)])
