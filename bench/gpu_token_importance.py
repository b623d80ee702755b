"""token_importance on a GPU: of [CLS] against one read of the keys, else against plain torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
from torch import Tensor

import vmtc_kernels

from .clustering import load
from .gpu import DEVICE, ours, set_count
from .runner import Case, Cost, Kind, Provider, Target, Verdict

JUDGED = 8


@dataclass(frozen=True)
class Setup:
    B: int = 64
    H: int = 16
    N: int = 577
    d: int = 64
    # None: the mean over all queries
    cls_index: int | None = 0
    dtype: str = "bfloat16"


SETUPS = [Setup(), Setup(B=1), Setup(B=8), Setup(cls_index=None), Setup(B=8, cls_index=None)]


def case(setup: Setup, device: str = DEVICE) -> Case:
    shape, dtype = (setup.B, setup.H, setup.N, setup.d), getattr(torch, setup.dtype)
    generator = torch.Generator(device).manual_seed(0)
    keys = setup.B * setup.H * setup.N * setup.d * dtype.itemsize
    sets = [
        [torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(2)]
        for _ in range(set_count(keys, device))
    ]
    q, k = (value[:JUDGED].double() for value in sets[0])
    with vmtc_kernels.use_backend("reference"):
        expected = vmtc_kernels.token_importance(q, k, cls_index=setup.cls_index)

    def judge(got: Tensor, tolerance: float = 1e-4) -> Verdict:
        return near(got[:JUDGED], expected, tolerance)

    # torch and flash-colsum round the logits or the weights to the type of the input
    rounded = partial(judge, tolerance=0.02)

    def run(q: Tensor, k: Tensor) -> Tensor:
        return vmtc_kernels.token_importance(q, k, cls_index=setup.cls_index)

    def provider(
        name: str,
        kind: Kind,
        call: Callable[[Tensor, Tensor], Tensor],
        verify: Callable[[Tensor], Verdict] = rounded,
        missing: str | None = None,
    ) -> Provider:
        first, *others = [partial(call, q, k) for q, k in sets]
        scope = "everything" if kind == "rival" else "one read of k"
        return Provider(name, kind, scope, first, verify, missing, tuple(others))

    plain = partial(torch_importance, cls_index=setup.cls_index)
    compiled = torch.compile(plain, dynamic=True)
    colsum, missing = load("flash_colsum", "flash-colsum")
    cls_len = None if setup.cls_index is None else 1
    providers = [
        *ours("token_importance", [partial(run, q, k) for q, k in sets], judge),
        provider("torch, graph", "rival", plain),
        provider("torch, compiled, graph", "rival", compiled),
        replace(provider("torch, eager", "rival", plain), launch="eager"),
        provider(
            "flash-colsum, graph",
            "rival",
            lambda q, k: colsum.flash_colsum(q, k, cls_len=cls_len),
            missing=missing,
        ),
    ]
    if setup.cls_index is not None:
        sums = k.sum(-1)
        providers.append(
            provider(
                "k.sum(-1)",
                "floor",
                lambda _, k: k.sum(-1, dtype=torch.float32),
                lambda got: near(got[:JUDGED], sums, 1e-4),
            )
        )
    return Case(
        suite="token_importance",
        params=asdict(setup),
        images=setup.B,
        cost=cost(setup),
        providers=providers,
        targets=[
            Target("rival", 1.0),
            *([Target("floor", 1.3)] if setup.cls_index is not None else []),
        ],
    )


def torch_importance(q: Tensor, k: Tensor, cls_index: int | None) -> Tensor:
    """As one writes it down; in float32 from the logits on."""
    if cls_index is not None:
        q = q[:, :, cls_index : cls_index + 1]
    logits = (q @ k.mT).float() * q.shape[-1] ** -0.5
    return logits.softmax(-1).mean((1, 2))


def cost(setup: Setup) -> Cost:
    """The queries that are asked for and every key in, one number for each token out."""
    rows, itemsize = setup.B * setup.H, getattr(torch, setup.dtype).itemsize
    queries = setup.N if setup.cls_index is None else 1
    return Cost(
        bytes=itemsize * rows * (setup.N + queries) * setup.d + 4 * setup.B * setup.N,
        flops=rows * setup.N * queries * (2 * setup.d + 6),
    )


def near(got: Tensor, expected: Tensor, tolerance: float) -> Verdict:
    if got.shape != expected.shape:
        return Verdict(False, f"shape {list(got.shape)}, expected {list(expected.shape)}")
    difference = float((got - expected).abs().max() / expected.abs().max())
    return Verdict(difference <= tolerance, f"differs by {difference:.0e} of the largest value")
