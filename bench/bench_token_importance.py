"""Suite ``importance``: token_importance against plain torch, and reads nobody can do without."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import vmtc_kernels

from .attention import MOST_PAIRS, importance_from_eager
from .attention_packages import flash_colsum
from .case import EVERYTHING, Case, Cost, Kind, Provider, Target, Verdict
from .machine import Machine, Suite, near, ours

JUDGED = 8


@dataclass(frozen=True)
class Setup:
    B: int = 4
    H: int = 16
    N: int = 577
    d: int = 64
    # None: the mean over all queries
    cls_index: int | None = 0
    dtype: str = "float32"


ON_GPU = Setup(B=64, dtype="bfloat16")


def setups(machine: Machine) -> list[Setup]:
    if not machine.gpu:
        return [Setup(), Setup(B=1), Setup(B=1, cls_index=None)]
    every = replace(ON_GPU, cls_index=None)
    return [ON_GPU, replace(ON_GPU, B=1), replace(ON_GPU, B=8), every, replace(every, B=8)]


def sweeps(machine: Machine) -> dict[str, list[Setup]]:
    usual = replace(ON_GPU, B=8) if machine.gpu else Setup(B=1)
    batches = (1, 4, 16, 64, 256) if machine.gpu else (1, 2, 4, 8, 16, 32)
    # an image's tokens and [CLS]
    return {
        "N": [replace(usual, N=n + 1) for n in (144, 256, 576, 1024, 2304, 4096, 9216, 16384)],
        "B": [replace(usual, B=b) for b in batches],
    }


def case(setup: Setup, machine: Machine) -> Case:
    dtype = getattr(torch, setup.dtype)
    shape = (setup.B, setup.H, setup.N, setup.d)

    def make(seed: int) -> tuple[Tensor, ...]:
        generator = torch.Generator(machine.device).manual_seed(seed)
        return tuple(
            torch.randn(shape, generator=generator, device=machine.device).to(dtype)
            for _ in range(3)
        )

    sets = machine.sets(make, setup.B * setup.H * setup.N * setup.d * dtype.itemsize)

    @cache
    def judged() -> tuple[Tensor, ...]:
        """q, k and v in float64."""
        return tuple(x[:JUDGED].double() for x in sets.first)

    @cache
    def expected() -> Tensor:
        with vmtc_kernels.use_backend("reference"):
            return vmtc_kernels.token_importance(*judged()[:2], cls_index=setup.cls_index)

    @cache
    def attended() -> Tensor:
        return scaled_dot_product_attention(*judged())

    def run(given: tuple[Tensor, ...]) -> Tensor:
        return vmtc_kernels.token_importance(*given[:2], cls_index=setup.cls_index)

    def run_with_attention(given: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        return scaled_dot_product_attention(*given), run(given)

    def judge_both(got: tuple[Tensor, Tensor]) -> Verdict:
        out, scores = (part[:JUDGED] for part in got)
        attention = near(out, attended(), rounded)
        return near(scores, expected(), rounded) if attention.ok else attention

    # torch and flash-colsum round the logits or the weights to the type of the input
    rounded = 1e-5 if dtype == torch.float32 else 0.02
    exact = 1e-5 if dtype == torch.float32 else 1e-4

    def provider(
        name: str,
        call: Callable[[Tensor, Tensor], Tensor],
        kind: Kind = "rival",
        scope: str = EVERYTHING,
        wanted: Callable[[], Tensor] = expected,
        tolerance: float = rounded,
        **options: Any,
    ) -> Provider:
        first, *others = sets.calls(lambda given: call(*given[:2]))
        return Provider(
            name,
            kind,
            scope,
            first,
            lambda got: near(got[:JUDGED], wanted(), tolerance),
            others=tuple(others),
            **options,
        )

    def both(name: str, kind: Kind, call: Callable[..., Any], **options: Any) -> Provider:
        """What a model does that wants the scores besides."""
        first, *others = sets.calls(call)
        more = {"others": tuple(others), **options}
        return Provider(name, kind, "attention and importance", first, judge_both, **more)

    floors: list[Provider] = []
    targets = [Target("rival", 1.0)]
    if setup.cls_index is not None:
        at = slice(setup.cls_index, setup.cls_index + 1)
        floors = [
            provider(
                "the row q k'",
                lambda q, k: torch.matmul(q[:, :, at], k.mT),
                "floor",
                "logits alone",
                lambda: torch.matmul(judged()[0][:, :, at], judged()[1].mT),
            ),
            provider(
                "k.sum(-1)",
                lambda _, k: k.sum(-1, dtype=torch.float32),
                "floor",
                "one read of k",
                lambda: judged()[1].sum(-1),
            ),
        ]
        targets.append(Target("floor", 1.3, floors[machine.gpu].name))
    return Case(
        suite="importance",
        params=asdict(setup),
        images=setup.B,
        cost=cost(setup),
        providers=[
            *ours(
                "token_importance",
                sets.calls(run),
                lambda got: near(got[:JUDGED], expected(), exact),
                machine,
            ),
            *_rivals(setup, machine, provider),
            both("SDPA and token_importance", "ours", run_with_attention),
            both(
                "attention that keeps its weights",
                "rival",
                lambda given: importance_from_eager(*given, setup.cls_index),
                missing=_too_much(setup, setup.N),
            ),
            *floors,
        ],
        targets=targets,
    )


def _rivals(setup: Setup, machine: Machine, provider: Callable[..., Provider]) -> list[Provider]:
    plain = partial(importance, cls_index=setup.cls_index)
    compiled = torch.compile(plain, dynamic=True)
    too_much = _too_much(setup, setup.N if setup.cls_index is None else 1)
    colsum, missing = flash_colsum(setup.cls_index, machine.device)
    graph = ", graph" if machine.gpu else ""
    found = [
        provider(f"torch{graph}", plain, missing=too_much),
        provider(f"torch, compiled{graph}", compiled, missing=too_much, slow="it compiles"),
        provider(f"flash-colsum{graph}", colsum, missing=missing),
    ]
    if machine.gpu:
        found.append(provider("torch, eager", plain, missing=too_much, launch="eager"))
    return found


def _too_much(setup: Setup, queries: int) -> str | None:
    """Why weights cannot be kept, in float32."""
    stored = 4 * setup.B * setup.H * queries * setup.N
    return f"it keeps {stored / 1e9:.0f} GB of weights" if stored > MOST_PAIRS else None


def importance(q: Tensor, k: Tensor, cls_index: int | None) -> Tensor:
    """As one writes it down; in float32 from the logits on."""
    if cls_index is not None:
        q = q[:, :, cls_index : cls_index + 1]
    logits = (q @ k.mT).float() * q.shape[-1] ** -0.5
    return logits.softmax(-1).mean((1, 2))


def cost(setup: Setup) -> Cost:
    """The queries that are asked for and every key in, one number for each token out."""
    rows, itemsize = setup.B * setup.H, getattr(torch, setup.dtype).itemsize
    queries = setup.N if setup.cls_index is None else 1
    # two for each product, and for each logit the scale, max, exp, sum, division and head mean
    return Cost(
        bytes=itemsize * rows * (setup.N + queries) * setup.d + 4 * setup.B * setup.N,
        flops=rows * setup.N * queries * (2 * setup.d + 6),
    )


SUITE = Suite("importance", setups, sweeps, case)
