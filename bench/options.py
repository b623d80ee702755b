"""What a run is to do, as `vmtc bench` and ``pytest bench/`` are told it.

Light to import: torch and the suites come with what is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

# what a run measures each provider with: samples, and seconds at most
EFFORT = {("cpu", False): (31, 6.0), ("cpu", True): (7, 0.5)}
EFFORT |= {("cuda", False): (41, 2.0), ("cuda", True): (15, 0.2)}
# of the set-ups of a sweep
SWEPT = {"cpu": (11, 1.5), "cuda": (15, 0.2)}


@dataclass(frozen=True)
class Options:
    """Of a run; see the options of the command."""

    suites: tuple[str, ...] = ()
    quick: bool = False
    sweeps: bool = False
    usual: bool = True
    only: str = ""
    device: str = ""
    threads: int = 0
    eager: bool = False
    size: str = ""

    def checked(self) -> Options:
        """With what is usual here in place of what was left out; raises ValueError."""
        import torch

        from .bench_llava import SIZES

        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        if device not in ("cpu", "cuda"):
            raise ValueError(f"devices are cpu, cuda, got {device}")
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError("torch finds no CUDA device")
        if self.eager and device == "cpu":
            raise ValueError("eager is about a GPU: a CPU has no graphs")
        if self.size and self.size not in SIZES:
            raise ValueError(f"sizes are {', '.join(SIZES)}, got {self.size}")
        size = self.size or ("tiny" if self.quick and device == "cpu" else "")
        threads = self.threads or torch.get_num_threads()
        found = replace(self, device=device, size=size, threads=threads)
        if not found.plan():
            raise ValueError(f"no set-up has {self.only!r} in its name")
        return found

    @property
    def machine(self) -> Any:
        from .machine import CPU, GPU

        return GPU if self.device == "cuda" else CPU

    def plan(self) -> list[Any]:
        from .suites import plan

        return plan(
            self.machine, self.suites, self.only, self.size, self.usual, self.sweeps, self.quick
        )

    def meter(self) -> Any:
        from . import environment, gpu_timing, runner

        if self.device == "cuda":
            return gpu_timing.GpuMeter(eager=self.eager)
        environment.limit_threads(self.threads)
        return runner.CPU

    def describe(self, meter: Any) -> dict[str, Any]:
        from . import ceilings, environment

        return {
            **environment.describe(self.threads, self.device),
            "eager": self.eager,
            "quick": self.quick,
            "ceilings": ceilings.measure(meter, self.machine),
        }

    def effort(self, planned: Any) -> Any:
        from .runner import Effort

        chosen = SWEPT[self.device] if planned.axis else EFFORT[self.device, self.quick]
        return Effort(*chosen, self.quick or planned.axis is not None)
