"""token_importance of [CLS] against the one row of q k' that it cannot do without."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

import vmtc_kernels

from .runner import Case, Cost, Kind, Provider, Target, Verdict

CLS = 0


@dataclass(frozen=True)
class Setup:
    B: int = 4
    H: int = 16
    N: int = 577
    d: int = 64


SETUPS = [Setup(B=4), Setup(B=1)]


def case(setup: Setup) -> Case:
    generator = torch.Generator().manual_seed(0)
    shape = (setup.B, setup.H, setup.N, setup.d)
    q, k = (torch.randn(shape, generator=generator) for _ in range(2))
    with vmtc_kernels.use_backend("reference"):
        expected = vmtc_kernels.token_importance(q.double(), k.double(), cls_index=CLS)

    def ours(backend: str, kind: Kind) -> Provider:
        def run() -> Tensor:
            with vmtc_kernels.use_backend(backend):
                return vmtc_kernels.token_importance(q, k, cls_index=CLS)

        missing = vmtc_kernels.available_backends()[backend]
        name = f"token_importance, {backend}"
        return Provider(name, kind, "everything", run, lambda got: near(got, expected), missing)

    def logits(got: Tensor) -> Verdict:
        exact = q.double()[:, :, CLS : CLS + 1] @ k.double().mT
        return near(got, exact)

    row = Provider(
        "the row q k'",
        "floor",
        "logits alone",
        lambda: torch.matmul(q[:, :, CLS : CLS + 1], k.transpose(-1, -2)),
        logits,
    )
    return Case(
        suite="token_importance",
        params={**asdict(setup), "cls_index": CLS, "dtype": "float32"},
        images=setup.B,
        cost=cost(setup),
        providers=[ours("cpu", "ours"), ours("reference", "reference"), row],
        targets=[Target("floor", 1.3)],
    )


def cost(setup: Setup) -> Cost:
    """One query and every key of each head in, one number for each token out."""
    rows = setup.B * setup.H
    numbers = rows * (setup.N + 1) * setup.d + setup.B * setup.N
    # two for each product, and for each logit the scale, max, exp, sum, division and head mean
    return Cost(bytes=4 * numbers, flops=rows * setup.N * (2 * setup.d + 6))


def near(got: Tensor, expected: Tensor) -> Verdict:
    if got.shape != expected.shape:
        return Verdict(False, f"shape {list(got.shape)}, expected {list(expected.shape)}")
    difference = float((got - expected).abs().max() / expected.abs().max())
    return Verdict(difference <= 1e-5, f"differs by {difference:.0e} of the largest value")
