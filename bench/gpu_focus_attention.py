"""focus_attention on a GPU: against plain causal attention by SDPA, eager torch, FlexAttention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import vmtc_kernels

from . import focus
from .focus import Problem, Setup, inference, near
from .gpu import DEVICE, ours, set_count
from .runner import Case, Kind, Provider, Target, Verdict

USUAL = Setup(dtype="bfloat16")
DECODE = replace(USUAL, phase="decode", after=4096 - 35 - 576)
MANY = replace(DECODE, images=16384, after=64, keep_ratio=0.25)
SETUPS = [
    *(replace(USUAL, B=B, G=G) for B in (1, 8, 32) for G in (32, 8)),
    *(replace(USUAL, images=images, keep_ratio=0.25, G=8) for images in (2880, 16384)),
    *(replace(one, B=B, G=G) for one in (DECODE, MANY) for B, G in ((1, 32), (1, 8), (8, 8))),
]
# one matrix of probabilities in float32; beyond it neither eager torch nor the reference runs
MOST_PAIRS = 4 << 30
CAUSAL = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def case(setup: Setup, device: str = DEVICE) -> Case:
    itemsize = getattr(torch, setup.dtype).itemsize
    size = 2 * setup.B * setup.G * setup.length * setup.d * itemsize
    sets = [focus.problem(setup, device, seed) for seed in range(set_count(size, device))]
    first = sets[0]
    expected = _expected(first)
    decode = setup.phase == "decode"
    plain = first.causal()

    def judge(got: Tensor) -> Verdict:
        return near(got[:1].cpu(), expected, 0.02, rows=0.01)

    def provider(
        name: str,
        kind: Kind,
        scope: str,
        call: Callable[[Problem], Any],
        verify: Callable[[Any], Verdict] = judge,
        **options: Any,
    ) -> Provider:
        run, *others = [inference(partial(call, given)) for given in sets]
        return Provider(name, kind, scope, run, verify, others=tuple(others), **options)

    pairs = 4 * setup.B * setup.H * setup.queries * setup.length
    too_much = f"a matrix of all pairs has {pairs / 1e9:.0f} GB" if pairs > MOST_PAIRS else None
    providers = [
        *ours("focus_attention", [inference(given.ours) for given in sets], judge),
        provider("torch, eager", "rival", "everything", focus.eager, missing=too_much),
        *_masked(sets, provider),
        *(
            provider(
                f"SDPA {name}, causal",
                "floor",
                "attention alone, nothing inhibited",
                partial(_causal, backend=backend),
                lambda got: near(got, plain, 0.02, rows=0.0),
            )
            for name, backend in CAUSAL.items()
        ),
    ]
    return Case(
        suite="focus_attention",
        params=asdict(setup),
        images=setup.B,
        cost=focus.cost(setup),
        providers=providers,
        targets=_targets(setup, decode),
        memory_unit=("the output", plain.nbytes),
    )


def _targets(setup: Setup, decode: bool) -> list[Target]:
    if decode:
        # of many image tokens most values are not read: faster than what reads them all
        return [Target("floor", 1.05 if setup.images < 1024 else 1 / 1.3)]
    return [
        Target("floor", 1.25 if setup.images < 1024 else 1.0),
        Target("rival", 10.0, named="torch, eager"),
        Target("rival", 3.0, named="FlexAttention"),
        Target("rival", 1.0, named="SDPA, ready mask"),
    ]


def _expected(given: Problem) -> Tensor:
    """Of the first sequence, on the host in float32."""
    state = None if given.text_image is None else given.text_image[:1].cpu()
    one = Problem(
        replace(given.setup, B=1),
        *(x[:1].float().cpu() for x in (given.q, given.k, given.v)),
        given.modality[:1].cpu(),
        state,
    )
    available = vmtc_kernels.available_backends()
    with vmtc_kernels.use_backend("reference" if available["cpu"] else "cpu"):
        return one.ours()


def _causal(given: Problem, backend: SDPBackend) -> Tensor:
    with sdpa_kernel(backend):
        return given.causal()


def _masked(sets: list[Problem], provider: Callable[..., Provider]) -> list[Provider]:
    """Attention alone, given which pairs are inhibited."""
    allowed = {id(given): given.allowed() for given in sets}
    found = [
        provider(
            "SDPA, ready mask",
            "rival",
            "attention alone",
            lambda given: given.masked(allowed[id(given)]),
        )
    ]
    if sets[0].setup.phase == "prefill" and sets[0].q.is_cuda:
        flex, make = _flex()
        found.append(
            provider(
                "FlexAttention, making its mask",
                "rival",
                "mask and attention",
                lambda given: flex(given, make(allowed[id(given)])),
                slow="it compiles",
            )
        )
    return found


def _flex() -> tuple[Callable[..., Tensor], Callable[[Tensor], Any]]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    attention = torch.compile(flex_attention, dynamic=False)
    block_mask = torch.compile(create_block_mask, dynamic=False)

    def make(allowed: Tensor) -> Any:
        batch, _, queries, length = allowed.shape

        def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return allowed[b, 0, i, j]

        return block_mask(sees, batch, None, queries, length, device=allowed.device)

    def run(given: Problem, mask: Any) -> Tensor:
        share = given.setup.H != given.setup.G
        return attention(given.q, given.k, given.v, block_mask=mask, enable_gqa=share)

    return run, make
