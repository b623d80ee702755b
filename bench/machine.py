"""Where a suite runs, inputs that are made when they are needed, and our own providers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Generic, TypeVar

import torch

import vmtc_kernels

from .case import EVERYTHING, Case, Kind, Provider, Verdict
from .gpu_timing import rotation

T = TypeVar("T")
Call = Callable[[], Any]


@dataclass(frozen=True)
class Machine:
    """device: where the tensors are. gpu: whether the providers are those for a GPU, which a test
    has on a CPU."""

    device: str = "cpu"
    gpu: bool = False

    def sets(self, make: Callable[[int], T], size: int) -> Sets[T]:
        """make: the inputs of a seed, of ``size`` bytes. A CPU starts with its data in the caches;
        a GPU goes round more sets than its cache holds."""
        if not self.gpu:
            count = 1
        elif self.device == "cpu":
            count = 2
        else:
            cache_bytes = torch.cuda.get_device_properties(self.device).L2_cache_size
            count = rotation(size, cache_bytes)

        def ordinary(seed: int) -> T:
            # who needs them first may be in a mode whose tensors nobody else can write to
            with torch.inference_mode(False):
                return make(seed)

        return Sets(count, cache(ordinary))


CPU, GPU = Machine(), Machine("cuda", True)


@dataclass(frozen=True)
class Sets(Generic[T]):
    """``count`` sets of inputs, each made when it is first asked for, and kept."""

    count: int
    make: Callable[[int], T]

    @property
    def first(self) -> T:
        return self.make(0)

    def calls(self, function: Callable[[T], Any]) -> list[Call]:
        """The function on each set."""
        return [lambda seed=seed: function(self.make(seed)) for seed in range(self.count)]

    def then(self, function: Callable[[T], Any]) -> Sets[Any]:
        """What is made of each set."""
        return Sets(self.count, cache(lambda seed: function(self.make(seed))))


@dataclass(frozen=True)
class Suite:
    """setups: the usual ones. sweeps: by the parameter that varies.

    case: of one set-up; costs nothing until a provider runs.
    run: by itself instead of by the runner: (set-up, machine, effort, notify).
    """

    name: str
    setups: Callable[[Machine], list[Any]]
    sweeps: Callable[[Machine], dict[str, list[Any]]]
    case: Callable[[Any, Machine], Case]
    run: Callable[..., Any] | None = None


def ours(
    name: str, calls: list[Call], verify: Callable[[Any], Verdict], machine: Machine
) -> list[Provider]:
    """On a GPU the automatic choice, which the targets are about, then each backend; on a CPU the
    compiled kernel and the reference.

    calls: the operator on each set of inputs.
    """
    available = vmtc_kernels.available_backends()
    backends: list[tuple[str | None, Kind]] = [("cpu", "ours"), ("reference", "reference")]
    if machine.gpu:
        backends = [(backend, "ours") for backend in (None, "triton", "cuda")]
    found = []
    for backend, kind in backends:
        first, *others = (_on(backend, call) for call in calls)
        found.append(
            Provider(
                f"{name}, {backend or 'automatic'}",
                kind,
                EVERYTHING,
                first,
                verify,
                available[backend] if backend else None,
                tuple(others),
                slow="nobody runs the definition for speed" if kind == "reference" else None,
            )
        )
    return found


def _on(backend: str | None, call: Call) -> Call:
    def run() -> Any:
        with vmtc_kernels.use_backend(backend):
            return call()

    return run


def near(got: torch.Tensor, expected: torch.Tensor, tolerance: float) -> Verdict:
    """Whether no value is farther off than ``tolerance`` of the largest."""
    if got.shape != expected.shape:
        return Verdict(False, f"shape {list(got.shape)}, expected {list(expected.shape)}")
    difference = float((got - expected).abs().max() / expected.abs().max())
    return Verdict(difference <= tolerance, f"differs by {difference:.0e} of the largest value")


def spread(batch: int, most: int) -> torch.Tensor:
    """Up to ``most`` images of a batch, the first and the last among them."""
    return torch.linspace(0, batch - 1, min(batch, most)).round().long()
