"""Suites ``focus`` (prefill) and ``decode``: focus_attention against attention with a mask, written
out or by other kernels, and against plain causal attention, its floor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

import vmtc_kernels

from . import attention, focus
from . import attention_packages as packages
from .attention import MOST_PAIRS, Mask, Way
from .case import EVERYTHING, Case, Kind, Provider, Target, Verdict
from .focus import Problem, Setup, inference, near
from .machine import Machine, Sets, Suite, ours

ON_GPU = Setup(dtype="bfloat16")
IMAGE = 576


def _decode(setup: Setup, length: int) -> Setup:
    return replace(setup, phase="decode", after=length - setup.before - setup.images)


def prefill_setups(machine: Machine) -> list[Setup]:
    if not machine.gpu:
        return [Setup()]
    return [
        *(replace(ON_GPU, B=B, G=G) for B in (1, 8, 32) for G in (32, 8)),
        *(replace(ON_GPU, images=images, keep_ratio=0.25, G=8) for images in (2880, 16384)),
    ]


def decode_setups(machine: Machine) -> list[Setup]:
    usual = ON_GPU if machine.gpu else Setup()
    many = replace(usual, phase="decode", images=16384, keep_ratio=0.25)
    if not machine.gpu:
        return [_decode(usual, 4096), replace(many, G=8)]
    sizes = ((1, 32), (1, 8), (8, 8))
    return [replace(one, B=B, G=G) for one in (_decode(usual, 4096), many) for B, G in sizes]


def prefill_sweeps(machine: Machine) -> dict[str, list[Setup]]:
    usual = replace(ON_GPU, G=8) if machine.gpu else Setup(H=8, G=8)
    longest = 16384 if machine.gpu else 4096
    lengths = [L for L in (1024, 2048, 4096, 8192, 16384) if longest >= L]
    images = (1, 2, 4, 8, 16, 28) if machine.gpu else (1, 2, 4, 8)
    batches = (1, 4, 16, 64) if machine.gpu else (1, 2, 4, 8)
    return {
        "L": [replace(usual, after=L - usual.before - IMAGE) for L in lengths],
        "images": [replace(usual, images=IMAGE * n) for n in images],
        "B": [replace(usual, B=B) for B in batches],
    }


def decode_sweeps(machine: Machine) -> dict[str, list[Setup]]:
    usual = _decode(replace(ON_GPU if machine.gpu else Setup(), G=8), 4096)
    lengths = (1024, 2048, 4096, 8192, 16384, 32768)
    images = (1, 2, 4, 8, 16, 28)
    batches = (1, 4, 16, 64) if machine.gpu else (1, 2, 4)
    return {
        "L": [_decode(usual, L) for L in lengths],
        "images": [replace(usual, images=IMAGE * n, after=64) for n in images],
        "B": [replace(usual, B=B) for B in batches],
    }


def case(setup: Setup, machine: Machine) -> Case:
    itemsize = getattr(torch, setup.dtype).itemsize
    size = 2 * setup.B * setup.G * setup.length * setup.d * itemsize
    sets = machine.sets(partial(focus.problem, setup, machine.device), size)
    decode = setup.phase == "decode"
    # a half type is judged against the first sequence in float32, on the host
    exact = setup.dtype == "float32"
    expected = cache(lambda: _expected(sets.first, exact))
    plain = cache(lambda: sets.first.causal())

    def judge(got: Tensor) -> Verdict:
        if exact:
            return near(got, expected(), 1e-4)
        return near(got[:1].cpu(), expected(), 0.02, rows=0.01)

    def judge_plain(got: Tensor) -> Verdict:
        return near(got, plain(), 1e-5 if exact else 0.02, rows=0.0)

    def provider(
        name: str,
        kind: Kind,
        scope: str,
        call: Callable[[Problem], Any],
        verify: Callable[[Any], Verdict] = judge,
        **options: Any,
    ) -> Provider:
        run, *others = (inference(call) for call in sets.calls(call))
        return Provider(name, kind, scope, run, verify, others=tuple(others), **options)

    pairs = 4 * setup.B * setup.H * setup.queries * setup.length
    too_much = f"it keeps {pairs / 1e9:.0f} GB of weights" if pairs > MOST_PAIRS else None
    providers = ours(
        "focus_attention",
        [inference(call) for call in sets.calls(Problem.ours)],
        judge,
        machine,
    )
    providers += [
        provider("torch, eager", "rival", EVERYTHING, focus.eager, missing=too_much),
        provider(
            "torch, compiled",
            "rival",
            EVERYTHING,
            torch.compile(focus.eager, dynamic=False),
            missing=too_much,
            slow="it compiles",
        ),
    ]
    masks = sets.then(Mask.of)
    for way in (*attention.ways(setup, machine.device), *packages.ways(setup, machine.device)):
        run, *others = _attending(way, sets, masks)
        kind: Kind = "rival" if way.inhibits else "floor"
        verify = judge if way.inhibits else judge_plain
        more: dict[str, Any] = {"missing": way.missing, "slow": way.slow}
        more["others"] = tuple(others)
        providers.append(Provider(way.name, kind, way.scope, run, verify, **more))
    return Case(
        suite="decode" if decode else "focus",
        params={**asdict(setup), "L": setup.length},
        images=setup.B,
        cost=focus.cost(setup),
        providers=providers,
        targets=_targets(setup, machine),
        memory_unit=("the output", setup.B * setup.H * setup.queries * setup.d * itemsize),
        unit="sequence",
    )


def _attending(way: Way, sets: Sets[Problem], masks: Sets[Mask]) -> list[Callable[[], Any]]:
    """The calls of a way on each set; what it wants beforehand is made at the first."""

    @cache
    def prepared(seed: int) -> Callable[[], Tensor]:
        with torch.inference_mode(False):
            return way.prepare(sets.make(seed), masks.make(seed))

    return [inference(lambda seed=seed: prepared(seed)()) for seed in range(sets.count)]


def _targets(setup: Setup, machine: Machine) -> list[Target]:
    decode, few = setup.phase == "decode", setup.images < 1024
    if not machine.gpu:
        return [Target("rival", 3.0, "torch, eager"), Target("floor", 1.2 if decode else 1.5)]
    if decode:
        # of many image tokens most values are not read: faster than what reads them all
        return [Target("floor", 1.05 if few else 1 / 1.3)]
    return [
        Target("floor", 1.25 if few else 1.0),
        Target("rival", 10.0, "torch, eager"),
        Target("rival", 3.0, "FlexAttention"),
        Target("rival", 1.0, "SDPA"),
    ]


def _expected(given: Problem, exact: bool) -> Tensor:
    """By the reference; of the first sequence in float32 on the host if that cannot be exact."""
    available = vmtc_kernels.available_backends()
    if exact:
        with vmtc_kernels.use_backend("reference"):
            return given.ours()
    state = None if given.text_image is None else given.text_image[:1].cpu()
    one = Problem(
        replace(given.setup, B=1),
        *(x[:1].float().cpu() for x in (given.q, given.k, given.v)),
        given.modality[:1].cpu(),
        state,
    )
    # of many tokens the reference would hold every pair
    with vmtc_kernels.use_backend("reference" if available["cpu"] else "cpu"):
        return one.ours()


FOCUS = Suite("focus", prefill_setups, prefill_sweeps, case)
DECODE = Suite("decode", decode_setups, decode_sweeps, case)
