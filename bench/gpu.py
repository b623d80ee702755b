"""What the GPU suites share: the device, our own providers, how many sets of inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

import vmtc_kernels

from .gpu_timing import rotation
from .runner import Provider, Verdict

DEVICE = "cuda"


def set_count(set_bytes: int, device: str) -> int:
    if device == "cpu":
        return 2
    return rotation(set_bytes, torch.cuda.get_device_properties(device).L2_cache_size)


def ours(
    name: str, calls: Sequence[Callable[[], Any]], verify: Callable[[Any], Verdict]
) -> list[Provider]:
    """The automatic choice first, which the targets are about, then each backend for a GPU.

    calls: the operator on each set of inputs.
    """
    available = vmtc_kernels.available_backends()

    def forced(backend: str | None) -> list[Callable[[], Any]]:
        def on(call: Callable[[], Any]) -> Callable[[], Any]:
            def run() -> Any:
                with vmtc_kernels.use_backend(backend):
                    return call()

            return run

        return [on(call) for call in calls]

    providers = []
    for backend in (None, "triton", "cuda"):
        first, *others = forced(backend)
        providers.append(
            Provider(
                f"{name}, {backend or 'automatic'}",
                "ours",
                "everything",
                first,
                verify,
                available[backend] if backend else None,
                tuple(others),
            )
        )
    return providers
