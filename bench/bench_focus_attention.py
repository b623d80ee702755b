"""focus_attention on a CPU, against eager attention and against plain causal attention."""

from __future__ import annotations

from dataclasses import asdict

import vmtc_kernels

from . import focus
from .focus import Setup, inference, near
from .runner import Case, Kind, Provider, Target

SETUPS = [
    Setup(),
    Setup(phase="decode", after=4096 - 35 - 576),
    Setup(phase="decode", images=16384, G=8, keep_ratio=0.25),
]


def case(setup: Setup) -> Case:
    given = focus.problem(setup)
    with vmtc_kernels.use_backend("reference"):
        expected = given.ours(return_mask=True)
    plain = given.causal()
    allowed = given.allowed()
    decode = setup.phase == "decode"

    def ours(backend: str, kind: Kind) -> Provider:
        def run() -> object:
            with vmtc_kernels.use_backend(backend):
                return given.ours()

        return Provider(
            f"focus_attention, {backend}",
            kind,
            "everything",
            inference(run),
            lambda got: near(got, expected.out, 1e-4),
            vmtc_kernels.available_backends()[backend],
        )

    providers = [
        ours("cpu", "ours"),
        ours("reference", "reference"),
        Provider(
            "torch, eager",
            "rival",
            "everything",
            inference(lambda: focus.eager(given)),
            lambda got: near(got, expected.out, 1e-4),
        ),
        Provider(
            "SDPA, ready mask",
            "rival",
            "attention alone",
            inference(lambda: given.masked(allowed)),
            lambda got: near(got, expected.out, 1e-4),
        ),
        Provider(
            "SDPA, causal",
            "floor",
            "attention alone, nothing inhibited",
            inference(given.causal),
            lambda got: near(got, plain, 1e-6, rows=0.0),
        ),
    ]
    return Case(
        suite="focus_attention",
        params=asdict(setup),
        images=setup.B,
        cost=focus.cost(setup),
        providers=providers,
        targets=[
            Target("rival", 3.0, named="torch, eager"),
            Target("floor", 1.2 if decode else 1.5),
        ],
        memory_unit=("the output", plain.nbytes),
    )
